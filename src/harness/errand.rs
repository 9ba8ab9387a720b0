//! A machine for something that is no scenario: what `shakedown vm` works on.
//!
//! It is prepared, recorded and put away as a scenario's machine is. It has no ledger line, and no
//! watcher: what works on it must heed its deadline.

use super::Settings;
use super::stage::{Run, Stage};
use super::trial::shown;
use super::verdict::{Phase, Verdict};
use crate::deadline::Deadline;
use crate::record::Environment;
use crate::record::event::Events;
use crate::vm::{Needs, Vm};
use anyhow::Result;
use std::sync::Arc;
use std::time::Duration;

/// What is to be done, and on what machine.
#[derive(Clone, Debug)]
pub struct Errand {
    /// As the evidence calls it.
    pub name: &'static str,
    /// The machine.
    pub needs: Needs,
    /// The time for boot and work together.
    pub timeout: Duration,
}

impl Errand {
    /// Gets the machine, lets `work` have it, and puts it away. `watcher` is told what happens.
    ///
    /// # Errors
    /// That of `work`, or why there is no machine; the place of the evidence is in its chain.
    pub fn run<T>(
        &self,
        environment: Environment,
        settings: Settings,
        watcher: Events,
        work: impl FnOnce(&mut Vm) -> Result<T>,
    ) -> Result<T> {
        let run = Arc::new(Run::new(environment, settings, watcher));
        run.check([&self.needs])?;
        let stage = run.open_aside(self.name)?;
        let (phase, result) = self.perform(&stage, work);
        let closed = stage.close(&Verdict::of_result(phase, &result));
        let directory = shown(stage.evidence().directory()).display().to_string();
        let value = result
            .map_err(|error| error.context(format!("{} ended early; evidence: {directory}", self.name)))?;
        closed.map(|()| value)
    }

    fn perform<T>(&self, stage: &Stage, work: impl FnOnce(&mut Vm) -> Result<T>) -> (Phase, Result<T>) {
        let boot = || {
            stage.prepare(&self.needs)?;
            stage.boot(&self.needs, &Deadline::after(self.timeout, "--timeout"))
        };
        let mut vm = match boot() {
            Ok(vm) => vm,
            Err(error) => return (Phase::Setup, Err(error)),
        };
        let mut result = work(&mut vm);
        let verdict = Verdict::of_result(Phase::Body, &result);
        if let Some(death) = stage.death(&mut vm, &verdict) {
            result = result.map_err(|error| error.context(death.to_string()));
        }
        stage.settle(vm, &verdict);
        (Phase::Body, result)
    }
}
