//! The session budget: what of a run is put off, and what of the queue is done.
//!
//! Before a run begins, the ledger's medians say how long it will take; what would end beyond
//! `SHAKEDOWN_SESSION_BUDGET` is deferred there and then. While it runs, the clock has the last
//! word, because builds take their time and nothing is known of a new scenario: one that does not
//! fit into what is left does not begin. What is deferred is told, in the ledger, and queued.
//!
//! Under nextest each scenario is a process, and none sees the whole: there only the clock decides,
//! which began with the first process of the run.

use super::budget::{self, Job, Lanes, about};
use super::scenario::Scenario;
use super::slots;
use super::stage::Run;
use super::verdict::Verdict;
use crate::deadline::Deadline;
use crate::nearest;
use crate::process;
use crate::record::Outcome;
use crate::record::deferred::Queue;
use crate::record::history::History;
use crate::record::metadata::BootKind;
use crate::vm::{Boot, accel};
use anyhow::Result;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// What the budget is called.
const VARIABLE: &str = "SHAKEDOWN_SESSION_BUDGET";
/// The probe of the accelerator takes seconds, and only where its answer is not known yet.
const PROBE: Duration = Duration::from_secs(120);

/// Keeps a run within its budget.
pub(super) struct Session {
    run: Arc<Run>,
    /// The test binary, as the queue knows it.
    test: &'static str,
    /// `None`: a person looks into failures, which takes as long as it takes.
    limit: Option<Duration>,
    /// What is known of the scenarios that shall run.
    estimates: HashMap<&'static str, Duration>,
    /// What does not run, and why.
    deferred: HashMap<&'static str, Verdict>,
    /// The first one runs however long it is.
    first: Option<&'static str>,
}

impl Session {
    /// Decides which of `scenarios`, all that this process is going to run in their order, are put
    /// off, puts that on record and says so.
    ///
    /// # Errors
    /// When the queue is broken, or what is deferred cannot be put on record.
    pub(super) fn plan(
        run: &Arc<Run>,
        test: &'static str,
        scenarios: &[&'static Scenario],
        threads: Option<usize>,
    ) -> Result<Self> {
        // A queue that cannot be read is better known now than at the first entry that is done.
        run.queue().read()?;
        let mut session = Self {
            run: Arc::clone(run),
            test,
            limit: run.session_budget(),
            estimates: HashMap::new(),
            deferred: HashMap::new(),
            first: scenarios.first().map(|scenario| scenario.name),
        };
        // Without a run directory there is no run. Each scenario says so, with what to do.
        let (Some(limit), false) = (session.limit, scenarios.is_empty()) else { return Ok(session) };
        let Ok(spent) = run.elapsed() else { return Ok(session) };
        let timeouts: Duration = scenarios.iter().map(|scenario| scenario.timeout()).sum();
        if spent + timeouts > limit {
            session.estimates = estimates(run, scenarios)?;
            let machines = slots::machines_at_once()?;
            let threads =
                threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
            // One of several processes has no plan for the whole.
            if !run.joined() {
                session.put_off(scenarios, Lanes { threads, machines }, spent, limit)?;
            }
        }
        Ok(session)
    }

    fn put_off(
        &mut self,
        scenarios: &[&'static Scenario],
        lanes: Lanes,
        spent: Duration,
        limit: Duration,
    ) -> Result<()> {
        let job = |scenario: &&'static Scenario| Job {
            estimate: self.estimate(scenario).unwrap_or_default(),
            machine: scenario.machine.is_some(),
        };
        let jobs: Vec<_> = scenarios.iter().map(job).collect();
        let slots = budget::plan(&jobs, lanes, spent, limit);
        let reason = |end| {
            format!(
                "it would end {} into the run, by the ledger's medians, and the budget is {} ({VARIABLE})",
                about(end),
                about(limit)
            )
        };
        let deferred: Vec<_> = scenarios
            .iter()
            .zip(slots)
            .filter(|(_, slot)| !slot.fits)
            .map(|(scenario, slot)| (*scenario, reason(slot.end)))
            .collect();
        if deferred.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = deferred
            .iter()
            .map(|(scenario, reason)| (*scenario, reason.as_str(), self.estimate(scenario)))
            .collect();
        self.run.defer(self.test, &entries)?;
        eprintln!(
            "note: this run would take {} by the ledger's medians, and its budget is {} ({VARIABLE}): {} of {} scenarios are deferred",
            about(budget::length(&jobs, lanes, spent)),
            about(limit),
            deferred.len(),
            scenarios.len()
        );
        self.deferred = deferred
            .into_iter()
            .map(|(scenario, reason)| (scenario.name, Verdict::new(Outcome::Deferred, reason)))
            .collect();
        Ok(())
    }

    fn estimate(&self, scenario: &Scenario) -> Option<Duration> {
        self.estimates.get(scenario.name).copied()
    }

    /// Why the scenario does not begin now; it is on record then. `None`: it may.
    pub(super) fn defers(&self, scenario: &'static Scenario) -> Option<Verdict> {
        if let Some(verdict) = self.deferred.get(scenario.name) {
            return Some(verdict.clone());
        }
        let limit = self.limit?;
        let first = self.first == Some(scenario.name) && !self.run.joined();
        let spent = self.run.elapsed().ok()?;
        let estimate = self.estimate(scenario);
        if first || process::interrupted() || spent + estimate.unwrap_or_default() <= limit {
            return None;
        }
        let needs =
            estimate.map(|estimate| format!(", this one takes {}", about(estimate))).unwrap_or_default();
        let reason = format!(
            "the run has taken {}{needs}, and the budget is {} ({VARIABLE})",
            about(spent),
            about(limit)
        );
        let recorded = self.run.defer(self.test, &[(scenario, &reason, estimate)]);
        let verdict = Verdict::new(Outcome::Deferred, reason);
        Some(match recorded {
            Ok(()) => verdict,
            Err(error) => verdict.but(error),
        })
    }

    /// Takes a scenario that has run out of the queue. One that ended in `error` or was interrupted
    /// is still owed a run.
    pub(super) fn done(&self, scenario: &Scenario, verdict: Verdict) -> Verdict {
        if !matches!(verdict.outcome, Outcome::Passed | Outcome::Failed) {
            return verdict;
        }
        match self.run.queue().remove(|entry| entry.is(self.test, scenario.name)) {
            Ok(()) => verdict,
            Err(error) => verdict.but(error),
        }
    }
}

/// What each is expected to take: its own median, else that of all whose machine comes up likewise.
fn estimates(run: &Run, scenarios: &[&'static Scenario]) -> Result<HashMap<&'static str, Duration>> {
    let Some(ledger) = run.ledger() else { return Ok(HashMap::new()) };
    let machines = scenarios.iter().any(|scenario| scenario.machine.is_some());
    // Where there is no accelerator, no machine will run, and its scenario says why.
    let accelerator =
        machines.then(|| accel::detect(&Deadline::after(PROBE, "probing the accelerator")).ok());
    let accelerator = accelerator.flatten().map(|accelerator| accelerator.kind.as_str());
    let history = History::read(ledger, accelerator)?;
    let estimate = |scenario: &&'static Scenario| {
        let boot = match &scenario.machine {
            None => BootKind::None,
            Some(needs) if needs.boot == Boot::Fork => BootKind::Fork,
            Some(_) => BootKind::Cold,
        };
        let known = history.median(scenario.name).or_else(|| history.typical(boot))?;
        Some((scenario.name, known))
    };
    Ok(scenarios.iter().filter_map(estimate).collect())
}

/// What of the queue belongs to this test binary, oldest first, as far as it still exists.
pub(super) struct Owed {
    pub(super) scenarios: Vec<&'static Scenario>,
    /// Names that no scenario has any more.
    gone: Vec<String>,
}

impl Owed {
    /// # Errors
    /// When the queue cannot be read.
    pub(super) fn read(queue: &Queue, test: &str, all: &[&'static Scenario]) -> Result<Self> {
        let mut owed = Self { scenarios: Vec::new(), gone: Vec::new() };
        for entry in queue.read()?.into_iter().filter(|entry| entry.test == test) {
            match all.iter().find(|scenario| scenario.name == entry.scenario) {
                Some(scenario) => owed.scenarios.push(scenario),
                None => owed.gone.push(entry.scenario),
            }
        }
        Ok(owed)
    }

    /// Removes what can never be run, and says so.
    ///
    /// # Errors
    /// When the queue cannot be written.
    pub(super) fn forget_gone(&self, queue: &Queue, test: &str, all: &[&'static Scenario]) -> Result<()> {
        if self.gone.is_empty() {
            return Ok(());
        }
        for name in &self.gone {
            let guess = nearest::guess(name, all.iter().map(|scenario| scenario.name));
            let guess = guess.map(|guess| format!("; is it `{guess}` now?")).unwrap_or_default();
            eprintln!(
                "note: `{name}` was deferred and does not exist any more, so it is no longer queued{guess}"
            );
        }
        queue.remove(|entry| self.gone.iter().any(|name| entry.is(test, name)))
    }
}
