//! Shakedown tests machines the way `cargo test` tests code.

pub mod connection;
pub mod console;
pub mod deadline;
pub mod fault;
pub mod process;
pub mod record;
pub mod vm;
