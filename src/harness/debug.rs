//! Stopping at the first failure, with the machine alive: `SHAKEDOWN_DEBUG`, `shakedown vm debug`.
//!
//! Owns the pause and what a person is told in it. What failed and what comes after is as always.

use super::trial::shown;
use super::verdict::Verdict;
use crate::fault::Fault;
use crate::process;
use crate::record::Outcome;
use crate::vm::Vm;
use anyhow::Result;
use std::io::{self, IsTerminal, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Whether a run stops, and has not yet.
#[derive(Debug)]
pub(super) struct Debugger(AtomicBool);

impl Debugger {
    /// # Errors
    /// Where nobody could end the pause.
    pub(super) fn new(wanted: bool) -> Result<Self> {
        if wanted {
            needs_terminal()?;
        }
        Ok(Self::of(wanted))
    }

    /// That never stops.
    pub(super) fn off() -> Self {
        Self::of(false)
    }

    fn of(armed: bool) -> Self {
        Self(AtomicBool::new(armed))
    }

    /// Stops here, unless the run has stopped before or there is nothing to look into. Ends with Enter,
    /// Ctrl-C, or the end of the machine.
    pub(super) fn stop_at(&self, vm: &mut Vm, verdict: &Verdict, evidence: &Path) {
        let failed = matches!(verdict.outcome, Outcome::Failed | Outcome::Error);
        if !failed || vm.ended() || !self.0.swap(false, Ordering::SeqCst) {
            return;
        }
        let running = vm.running();
        let ssh = running.ssh_command().unwrap_or_else(|| "this image has no SSH".into());
        eprintln!(
            "\n{}: {}\n\nThe machine stays as it is.\n  way in    {ssh}\n  evidence  {}\n  end it    Enter, or `shakedown vm kill {}`",
            verdict.outcome,
            verdict.message,
            shown(evidence).display(),
            running.id()
        );
        while !process::interrupted() && !vm.ended() {
            match process::wait_readable(io::stdin(), Duration::from_millis(200)) {
                Ok(false) => {}
                // The end of the input is as good as Enter.
                Ok(true) => {
                    let _ = io::stdin().lock().read(&mut [0; 256]);
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

/// Refuses to stop where nobody can make it go on.
///
/// # Errors
/// When standard input is no terminal.
pub fn needs_terminal() -> Result<()> {
    if io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Fault::host("stopping at a failure needs a terminal, where Enter goes on")
        .fix("without one: run the scenario as it is, and read its evidence")
        .into())
}
