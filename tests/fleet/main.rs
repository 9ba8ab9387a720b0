//! `shakedown fleet run` against a strict server of our own, with hosts that do what agents do, and die
//! as they do.

#[path = "../testflinger/http.rs"]
#[allow(dead_code)] // as below
mod http;
#[path = "../testflinger/server.rs"]
#[allow(dead_code)] // the half of it that other tests use
mod server;

mod host;
mod killed;
mod runs;
