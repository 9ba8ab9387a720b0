//! Shakedown tests machines the way `cargo test` tests code.

pub mod connection;
pub mod deadline;
pub mod fault;
pub mod host;
pub mod process;
pub mod record;
pub mod vm;
