//! The agent against a server of our own: recorded jobs, its promises, and everything that can go wrong.

mod server;
mod support;

mod device;
mod disk;
mod duty;
mod faults;
mod influx;
mod jobs;
mod results;
mod tokens;
mod traces;
