//! What `#[scenario]` registers: constant data about one test, gathered by the linker.

use crate::vm::{Needs, Vm};
use anyhow::Result;
use std::time::Duration;

/// One scenario. Made by `#[scenario]`; everything in it is known at compile time.
#[derive(Debug)]
pub struct Scenario {
    /// The path of the function without the crate's name: `storage::disks_are_blank`.
    pub name: &'static str,
    /// Labels by which it is selected. One with a machine carries `vm`.
    pub markers: &'static [&'static str],
    /// The machine, for a scenario that has one.
    pub machine: Option<Needs>,
    /// The time for boot and body together, where it is not the default.
    pub timeout: Option<Duration>,
    /// Why it does not run unless it is asked for.
    pub ignore: Option<&'static str>,
    /// The source file, as the compiler names it.
    pub file: &'static str,
    /// The line of the attribute.
    pub line: u32,
    /// What it does.
    pub body: Body,
}

/// The function behind a scenario.
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// Runs on this host alone.
    Plain(fn() -> Result<()>),
    /// Drives a machine.
    Vm(fn(&mut Vm) -> Result<()>),
}

impl Scenario {
    /// What a scenario gets that names no timeout: enough for a boot without hardware
    /// virtualisation on a loaded host.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

    /// The time for boot and body together.
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(Self::DEFAULT_TIMEOUT)
    }
}

/// What the function of a scenario may return.
#[diagnostic::on_unimplemented(
    message = "a scenario returns `()` or a `Result<(), E>`, not `{Self}`",
    label = "returns `{Self}`"
)]
pub trait IntoResult {
    /// As the harness wants it.
    ///
    /// # Errors
    /// The function's own.
    fn into_result(self) -> Result<()>;
}

impl IntoResult for () {
    fn into_result(self) -> Result<()> {
        Ok(())
    }
}

impl<E: Into<anyhow::Error>> IntoResult for std::result::Result<(), E> {
    fn into_result(self) -> Result<()> {
        self.map_err(Into::into)
    }
}

/// `krate::module::function` without its first part; at compile time, so that a name costs nothing.
pub const fn without_crate(path: &'static str) -> &'static str {
    let bytes = path.as_bytes();
    let mut at = 0;
    while at + 1 < bytes.len() {
        if bytes[at] == b':' && bytes[at + 1] == b':' {
            return path.split_at(at + 2).1;
        }
        at += 1;
    }
    path
}

/// Every scenario that is linked into this binary, in no particular order.
#[linkme::distributed_slice]
pub static SCENARIOS: [Scenario];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_the_crate_only() {
        assert_eq!(without_crate("scenarios::storage::blank"), "storage::blank");
        assert_eq!(without_crate("scenarios::blank"), "blank");
        assert_eq!(without_crate("blank"), "blank");
    }
}
