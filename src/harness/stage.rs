//! The seam between a trial and the floors below: its evidence, its slot, its machine.
//!
//! Everything the harness needs of `record` and `vm` goes through here and nowhere else.

use super::scenario::Scenario;
use super::settings::Settings;
use super::slots::{Slot, Slots};
use super::verdict::Verdict;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::record::event::Events;
use crate::record::{self, Environment, Evidence, Outcome};
use crate::vm::{Needs, Vm};
use anyhow::{Context, Result};
use once_cell::sync::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long a machine may wait for others to end. Each of them has a deadline of its own, so this
/// is reached only where something outside of us keeps slots.
const SLOT_WAIT: Duration = Duration::from_secs(3600);

/// One invocation of the test binary.
pub(super) struct Run {
    environment: Environment,
    #[expect(dead_code, reason = "SEAM(vm): the image of a scenario is found in it")]
    settings: Settings,
    /// Made when the first scenario needs it: a name filter that matches nothing leaves no trace.
    record: OnceCell<record::Run>,
}

/// What one execution of a scenario stands on.
pub(super) struct Stage {
    evidence: Evidence,
    events: Events,
    slot: Mutex<Option<Slot>>,
}

impl Run {
    pub(super) fn new(environment: Environment, settings: Settings) -> Self {
        Self { environment, settings, record: OnceCell::new() }
    }

    fn record(&self) -> Result<&record::Run> {
        self.record.get_or_try_init(|| {
            for dead in record::sweep(&self.environment.log_root)? {
                eprintln!("note: `{}` of run {} died and is now on record", dead.scenario, dead.run_id);
            }
            record::Run::start(self.environment.clone())
        })
    }

    /// Where the evidence of this run is, once there is any.
    pub(super) fn evidence(&self) -> Option<&Path> {
        self.record.get().map(record::Run::directory)
    }

    /// Puts a scenario on record that did not run: ignored, or not started.
    pub(super) fn record_unstarted(&self, scenario: &Scenario, verdict: &Verdict) -> Result<()> {
        let markers = markers(scenario);
        self.record()?.not_run(verdict.outcome, &[(scenario.name, &markers, &verdict.message)])
    }

    /// Writes down that a scenario begins, before it does.
    pub(super) fn open(&self, scenario: &Scenario) -> Result<Stage> {
        let evidence = self.record()?.scenario(scenario.name, &markers(scenario))?;
        Ok(Stage { events: Events::to(evidence.clone()), evidence, slot: Mutex::new(None) })
    }
}

fn markers(scenario: &Scenario) -> Vec<String> {
    scenario.markers.iter().map(ToString::to_string).collect()
}

impl Stage {
    /// Gets what a machine needs before its own time begins to count: SEAM(vm) the image, built or
    /// fetched, and a slot among the machines of this host.
    pub(super) fn prepare(&self, needs: &Needs) -> Result<()> {
        let slots = Slots::in_directory(cache_directory()?.join("slots"))?;
        let wait = Deadline::after(SLOT_WAIT, "waiting for other machines to end");
        let slot = slots.acquire(needs.memory_mib, &wait, &self.events)?;
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(slot);
        Ok(())
    }

    /// Boots or forks the machine. SEAM(vm).
    pub(super) fn boot(&self, _needs: &Needs, _deadline: &Deadline) -> Result<Vm> {
        Err(Fault::host("no machine can be started yet").into())
    }

    /// Ends the machine at once, from another thread than the one that drives it, so that all its
    /// waits end. SEAM(vm).
    pub(super) fn kill_machine(&self) {}

    /// Collects diagnostics, powers the machine off, and destroys it. SEAM(vm).
    pub(super) fn settle(&self, _vm: Vm, _verdict: &Verdict) {}

    /// Where the evidence of this execution is.
    pub(super) fn evidence(&self) -> &Path {
        self.evidence.directory()
    }

    /// Gives the slot back and writes the outcome down.
    pub(super) fn close(&self, verdict: &Verdict) -> Result<()> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = (verdict.outcome != Outcome::Passed).then_some(verdict.message.as_str());
        self.evidence.finish(verdict.outcome, reason).map(drop)
    }
}

/// SEAM(host): the host module's own.
fn cache_directory() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("SHAKEDOWN_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("shakedown")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/shakedown")))
        .context(Fault::host("there is no place for a cache").fix("set SHAKEDOWN_CACHE"))
}
