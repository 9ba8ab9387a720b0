//! The job client against a server of our own, which is strict and can misbehave.

mod http;
mod server;
mod support;

mod client;
mod faults;
mod runs;
