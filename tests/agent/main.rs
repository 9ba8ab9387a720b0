//! The agent against a server of our own: recorded jobs, its promises, and everything that can go wrong.

#[path = "../testflinger/http.rs"]
#[allow(dead_code)] // what only other tests use
mod http;
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
