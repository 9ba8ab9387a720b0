//! A lab that exists in numbers alone: hosts, agents and a server on a clock of their own, driven by
//! the code that drives real ones.
//!
//! # The model
//!
//! A scenario takes its median times a random factor that the splitter does not know (log-normal,
//! [`Model::noise`]). Medians have the spread of those of this project's own scenarios, [`QUANTILES`].
//! Agents ask for a job every [`POLL`] seconds, each at times of its own, and at once after a job. A
//! job costs [`SETUP`] seconds before its scenarios and [`FINISH`] after them. What a shard says
//! arrives within [`DELAY`]. A request takes the server [`REQUEST`] seconds, a submission with its
//! attachments [`SUBMISSION`], and [`AT_ONCE`] are under way at once. Hosts that die do so at
//! a random time of the run, in silence, and never come back.
//!
//! # The bounds
//!
//! No schedule can end before [`Report::lower_bound`]. It is the largest of:
//!
//! 1. capacity: the first time `T` by which all hosts together have worked as long as all scenarios
//!    take, where a host works from its first poll and one setup on, until `T` or its death, without
//!    any pause;
//! 2. length: the first poll of any host, a setup, and the longest scenario;
//! 3. loss: for each scenario that died with its host, the death, a setup, and the whole scenario once
//!    more. So it is as if each death were known at once, and a free host stood by.
//!
//! Nothing is in it for further jobs of a host, for the work that died, for submitting, for waiting, or
//! for bringing evidence back. [`Report::foreseen_bound`] leaves out the third: it is that of a
//! scheduler that knows beforehand who will die, and has none of them begin what it will not finish.

mod lab;

use super::lab::Trouble;
use super::run;
use super::shards::{Shards, State};
use anyhow::Result;
use lab::{Host, SimulatedLab};
use std::time::Duration;

/// Every twentieth of the medians of this project's own 73 scenarios, in seconds, as they were when
/// this was written: from a fork that runs one command to a cold boot with everything.
pub const QUANTILES: [f64; 21] = [
    1.5, 2.8, 2.9, 3.0, 3.0, 3.1, 3.1, 3.1, 3.2, 3.3, 3.4, 3.5, 4.1, 8.3, 13.3, 26.2, 36.8, 44.6, 54.8, 61.5,
    96.9,
];
/// Seconds between two polls of an agent that has no work.
pub const POLL: f64 = 10.0;
/// Seconds of a job before its scenarios: attachments, provisioning.
pub const SETUP: f64 = 5.0;
/// Seconds of a job after its scenarios: artifacts, outcome.
pub const FINISH: f64 = 3.0;
/// Seconds until the server has what a shard said.
pub const DELAY: f64 = 5.0;
/// Seconds of an ordinary request.
pub const REQUEST: f64 = 0.02;
/// Seconds of a submission: the job, and its attachments.
pub const SUBMISSION: f64 = 0.2;
/// Requests at once.
pub const AT_ONCE: f64 = 8.0;
/// A shard says something every so many seconds.
const BEAT: f64 = 15.0;
/// What an agent asks and tells for one job, beside its log.
const REQUESTS_OF_A_JOB: u64 = 20;
/// What an agent asks in one poll: what the server thinks of it, and for a job.
const REQUESTS_OF_A_POLL: u64 = 2;

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// How many scenarios.
    pub scenarios: usize,
    /// How many hosts.
    pub hosts: usize,
    /// How many of them die.
    pub dying: usize,
    /// By how much scenarios are longer than [`QUANTILES`].
    pub scale: f64,
    /// The standard deviation of the logarithm of what a scenario takes.
    pub noise: f64,
    /// Equal seeds, equal runs.
    pub seed: u64,
}

/// What a simulated run came to. Times are in seconds.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // they are their names
pub struct Report {
    pub makespan: f64,
    pub lower_bound: f64,
    pub foreseen_bound: f64,
    /// The requests of the run, not those of agents.
    pub requests: u64,
    /// Requests of the run in the busiest minute, for each second.
    pub peak_requests_per_second: f64,
    /// As the model has it.
    pub agent_requests: u64,
    pub shards: usize,
    /// Shards that died with their host, or were thought to.
    pub lost_shards: usize,
    /// Scenarios that ran to their end more than once.
    pub repeated: usize,
    /// Scenarios that went down with so many hosts that they ended in `error`.
    pub given_up: usize,
    /// Scenarios without any verdict.
    pub lost: usize,
    /// Scenarios with more than one.
    pub doubled: usize,
    pub longest_scenario: f64,
    pub total_work: f64,
}

impl Report {
    /// What a run came to.
    fn of(lab: &SimulatedLab, shards: &Shards) -> Self {
        let makespan = lab.clock;
        let work: f64 = lab.actual.iter().sum();
        let longest = lab.actual.iter().copied().fold(0.0, f64::max);
        let first = lab.hosts.iter().map(|host| host.first_poll).fold(f64::INFINITY, f64::min);
        let foreseen = capacity_bound(&lab.hosts, work).max(first + SETUP + longest);
        let loss = lab.jobs.iter().filter_map(|job| {
            let run = job.run.as_ref()?;
            let dies = lab.hosts[run.host].dies;
            let under_way = run.ends.iter().position(|end| *end > dies).filter(|_| run.test_from <= dies)?;
            Some(dies + SETUP + lab.actual[job.scenarios[under_way]])
        });
        let peak = lab.by_minute.values().max().copied().unwrap_or_default();
        Self {
            makespan,
            lower_bound: loss.fold(foreseen, f64::max),
            foreseen_bound: foreseen,
            requests: lab.requests,
            peak_requests_per_second: peak as f64 / 60.0,
            agent_requests: lab.agent_requests,
            shards: lab.jobs.len(),
            lost_shards: shards
                .all()
                .iter()
                .filter(|shard| matches!(shard.state, State::Lost(_)) && shard.agent.is_some())
                .count(),
            repeated: lab.completions.iter().filter(|number| **number > 1).count(),
            given_up: lab.errors,
            lost: lab.verdicts.iter().filter(|number| **number == 0).count(),
            doubled: lab.verdicts.iter().filter(|number| **number > 1).count(),
            longest_scenario: longest,
            total_work: work,
        }
    }

    /// How much longer than it must.
    pub fn makespan_ratio(&self) -> f64 {
        self.makespan / self.lower_bound
    }

    /// Of the run itself.
    pub fn requests_per_second(&self) -> f64 {
        self.requests as f64 / self.makespan
    }
}

/// Runs a simulation to its end.
///
/// # Errors
/// As [`run::run`]; no simulation has led to one.
pub fn simulate(model: &Model) -> Result<Report> {
    let mut lab = SimulatedLab::new(model);
    let mut shards = Shards::new(lab.medians.iter().map(|s| Duration::from_secs_f64(*s)).collect());
    match run::run(&mut lab, &mut shards, None) {
        Ok(()) => Ok(Report::of(&lab, &shards)),
        Err(Trouble::Fatal(error)) => Err(error),
        Err(other) => anyhow::bail!("{other:?}"),
    }
}

/// The first bound: by bisection, as capacity grows with time.
fn capacity_bound(hosts: &[Host], work: f64) -> f64 {
    let capacity = |time: f64| -> f64 {
        hosts.iter().map(|host| (time.min(host.dies) - host.first_poll - SETUP).max(0.0)).sum()
    };
    let (mut low, mut high) = (0.0, work + POLL + SETUP);
    while high - low > 1e-3 {
        let middle = (low + high) / 2.0;
        if capacity(middle) < work { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMALL: Model = Model { scenarios: 300, hosts: 20, dying: 0, scale: 20.0, noise: 0.2, seed: 1 };

    #[test]
    fn nothing_is_lost_and_nothing_doubled_when_hosts_die() {
        for seed in 0..5 {
            let report = simulate(&Model { dying: 4, seed, ..SMALL }).expect("ends");
            assert_eq!((report.lost, report.given_up, report.doubled), (0, 0, 0), "{report:?}");
            assert!(report.lost_shards > 0, "{report:?}");
            assert!(report.repeated <= report.lost_shards, "one at most was under way: {report:?}");
        }
    }

    #[test]
    fn a_run_is_never_shorter_than_its_bound() {
        for seed in 0..20 {
            let report = simulate(&Model { dying: seed as usize % 5, seed, ..SMALL }).expect("ends");
            assert!(report.makespan_ratio() >= 1.0, "{report:?}");
            assert!(report.lower_bound >= report.foreseen_bound, "{report:?}");
        }
    }

    #[test]
    fn the_capacity_bound_counts_what_hosts_can_do() {
        let host = |first_poll, dies| Host { first_poll, dies };
        let bound = capacity_bound(&[host(0.0, f64::INFINITY), host(5.0, f64::INFINITY)], 105.0);
        assert!((bound - (SETUP + 55.0)).abs() < 0.1, "{bound}");
        let bound = capacity_bound(&[host(0.0, f64::INFINITY), host(0.0, SETUP + 20.0)], 100.0);
        assert!((bound - (SETUP + 80.0)).abs() < 0.1, "{bound}");
    }

    /// The claim of `shakedown bench fleet`, at a tenth of its size and so with coarser ends.
    #[test]
    fn hosts_end_together_and_the_server_is_left_alone() {
        let model = Model { scenarios: 2000, hosts: 200, dying: 2, ..SMALL };
        for seed in 1..4 {
            let report = simulate(&Model { seed, ..model }).expect("ends");
            assert!(report.makespan_ratio() < 1.08, "{report:?}");
            assert!(report.requests_per_second() < 10.0, "{report:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_lab_ends_with_one_verdict_each(
            scenarios in 0usize..80, hosts in 1usize..12, alive in 1usize..12, scale in 0.1f64..40.0, seed: u64,
        ) {
            let dying = hosts.saturating_sub(alive);
            let model = Model { scenarios, hosts, dying, scale, noise: 0.3, seed };
            let report = simulate(&model).expect("ends");
            prop_assert_eq!(report.lost + report.doubled, 0, "{:?}", report);
        }
    }
}
