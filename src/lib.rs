//! Shakedown tests machines the way `cargo test` tests code.

pub mod connection;
pub mod console;
pub mod deadline;
pub mod fault;
pub mod harness;
pub mod host;
pub mod image;
mod nearest;
pub mod process;
pub mod record;
pub mod vm;

/// What the author of a scenario needs: `use shakedown::prelude::*;`
pub mod prelude {
    pub use crate::connection::{Cmd, Connection, Exit, Output};
    pub use crate::scenario;
    pub use crate::vm::Vm;
    pub use anyhow::{Context, Result, anyhow, bail, ensure};
    pub use std::time::Duration;
}

pub use shakedown_macros::scenario;

/// What the expansions of our macros name. Not for anyone else.
#[doc(hidden)]
pub mod __private {
    pub use crate::harness::{IntoResult, SCENARIOS, without_crate};
    pub use linkme;
}
