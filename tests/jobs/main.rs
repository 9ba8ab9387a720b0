//! The job client against a server of our own, which is strict and can misbehave.

#[path = "../testflinger/http.rs"]
#[allow(dead_code)] // what only other tests use
mod http;
#[path = "../testflinger/server.rs"]
#[allow(dead_code)] // the half of it that other tests use
mod server;
mod support;

mod client;
mod faults;
mod runs;
