//! `shakedown fleet run` against a strict server of our own, with hosts that do what agents do, and die
//! as they do.

#[path = "../jobs/http.rs"]
#[allow(dead_code)] // as below
mod http;
#[path = "../jobs/server.rs"]
#[allow(dead_code)] // the half of it that other tests use
mod server;

mod host;
mod runs;
