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

use super::run::{self, Ended, Harvest, JobState, Lab, News, Order, Trouble, Verdict};
use super::shards::{ShardId, Shards};
use super::split::Index;
use anyhow::Result;
use fastrand::Rng;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
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
        Ok(()) => Ok(lab.report(&shards)),
        Err(Trouble::Fatal(error)) => Err(error),
        Err(other) => anyhow::bail!("{other:?}"),
    }
}

/// One scenario's median, by a number from 0 to 1.
fn quantile(at: f64) -> f64 {
    let at = at * (QUANTILES.len() - 1) as f64;
    let low = (at as usize).min(QUANTILES.len() - 2);
    let part = at - low as f64;
    QUANTILES[low] * (1.0 - part) + QUANTILES[low + 1] * part
}

/// A standard normal number, by Box and Muller.
fn normal(rng: &mut Rng) -> f64 {
    let (a, b) = (1.0 - rng.f64(), rng.f64());
    (-2.0 * a.ln()).sqrt() * (2.0 * std::f64::consts::PI * b).cos()
}

struct Host {
    first_poll: f64,
    dies: f64,
}

struct Job {
    shard: ShardId,
    scenarios: Vec<Index>,
    exclude: BTreeSet<String>,
    run: Option<OnHost>,
    cancelled: bool,
    beats_heard: u64,
}

/// A job on its host. What lies after the death of the host does not happen.
struct OnHost {
    host: usize,
    from: f64,
    test_from: f64,
    /// When each of the scenarios ends.
    ends: Vec<f64>,
    over: f64,
}

/// Something that happens at a time: a host asks for a job.
type Ask = (Reverse<u64>, usize);

struct SimulatedLab {
    clock: f64,
    hosts: Vec<Host>,
    asks: BinaryHeap<Ask>,
    queue: VecDeque<usize>,
    jobs: Vec<Job>,
    medians: Vec<f64>,
    actual: Vec<f64>,
    verdicts: Vec<usize>,
    errors: usize,
    completions: Vec<usize>,
    requests: u64,
    by_minute: BTreeMap<u64, u64>,
    agent_requests: u64,
}

const MICRO: f64 = 1e6;

impl SimulatedLab {
    fn new(model: &Model) -> Self {
        let mut rng = Rng::with_seed(model.seed);
        let Model { scenarios, hosts, scale, noise, .. } = *model;
        let medians: Vec<_> = (0..scenarios).map(|_| quantile(rng.f64()) * scale).collect();
        let actual: Vec<_> = medians.iter().map(|m| m * (noise * normal(&mut rng)).exp()).collect();
        let even = actual.iter().sum::<f64>() / hosts.max(1) as f64;
        let dying: HashSet<_> = rng.choose_multiple(0..hosts, model.dying).into_iter().collect();
        let hosts: Vec<_> = (0..hosts)
            .map(|host| Host {
                first_poll: rng.f64() * POLL,
                dies: if dying.contains(&host) { rng.f64() * even } else { f64::INFINITY },
            })
            .collect();
        let asks = hosts.iter().enumerate().map(|(id, host)| ask(host.first_poll, id)).collect();
        Self {
            clock: 0.0,
            hosts,
            asks,
            queue: VecDeque::new(),
            jobs: Vec::new(),
            medians,
            actual,
            verdicts: vec![0; scenarios],
            errors: 0,
            completions: vec![0; scenarios],
            requests: 0,
            by_minute: BTreeMap::new(),
            agent_requests: 0,
        }
    }

    /// Lets everything happen until `time`.
    fn pass_until(&mut self, time: f64) {
        while let Some((Reverse(at), host)) = self.asks.peek().copied() {
            let at = at as f64 / MICRO;
            if at > time {
                break;
            }
            self.asks.pop();
            if at < self.hosts[host].dies {
                self.agent_requests += REQUESTS_OF_A_POLL;
                let next = self.take(host, at).unwrap_or(at + POLL);
                self.asks.push(ask(next, host));
            }
        }
        self.clock = time;
    }

    /// A host takes the oldest job that it may have; when it will ask for another one.
    fn take(&mut self, host: usize, at: f64) -> Option<f64> {
        let jobs = &self.jobs;
        let place = self.queue.iter().position(|job| !jobs[*job].exclude.contains(&name(host)))?;
        let job = &mut self.jobs[self.queue.remove(place)?];
        let test_from = at + SETUP;
        let mut end = test_from;
        let ends: Vec<_> = job
            .scenarios
            .iter()
            .map(|scenario| {
                end += self.actual[*scenario];
                end
            })
            .collect();
        let over = end + FINISH;
        let alive = over.min(self.hosts[host].dies);
        for (scenario, end) in job.scenarios.iter().zip(&ends) {
            self.completions[*scenario] += usize::from(*end <= alive);
        }
        self.agent_requests += REQUESTS_OF_A_JOB + ((alive - at) / BEAT) as u64;
        job.run = Some(OnHost { host, from: at, test_from, ends, over });
        Some(over)
    }

    /// Requests were made: the clock and the books know.
    fn asked(&mut self, number: usize, each: f64, seconds: f64) {
        let requests = (number as f64 * each) as u64;
        self.requests += requests;
        *self.by_minute.entry((self.clock / 60.0) as u64).or_default() += requests;
        let rounds = (number as f64 / AT_ONCE).ceil();
        self.pass_until(self.clock + rounds * seconds);
    }

    /// Until when a job can be heard of.
    fn life(&self, run: &OnHost) -> f64 {
        run.over.min(self.hosts[run.host].dies)
    }

    /// Scenarios of which the server has heard by now.
    fn heard_of(&self, job: usize) -> Vec<(Index, ())> {
        let job = &self.jobs[job];
        let Some(run) = &job.run else { return Vec::new() };
        let until = self.life(run).min(self.clock) - DELAY;
        let over = run.over <= self.clock.min(self.hosts[run.host].dies);
        let done = run.ends.iter().filter(|end| over || **end <= until).count();
        job.scenarios[..done].iter().map(|scenario| (*scenario, ())).collect()
    }

    fn report(self, shards: &Shards) -> Report {
        let makespan = self.clock;
        let work: f64 = self.actual.iter().sum();
        let longest = self.actual.iter().copied().fold(0.0, f64::max);
        let first = self.hosts.iter().map(|host| host.first_poll).fold(f64::INFINITY, f64::min);
        let foreseen = capacity_bound(&self.hosts, work).max(first + SETUP + longest);
        let loss = self.jobs.iter().filter_map(|job| {
            let run = job.run.as_ref()?;
            let dies = self.hosts[run.host].dies;
            let under_way = run.ends.iter().position(|end| *end > dies).filter(|_| run.test_from <= dies)?;
            Some(dies + SETUP + self.actual[job.scenarios[under_way]])
        });
        let peak = self.by_minute.values().max().copied().unwrap_or_default();
        Report {
            makespan,
            lower_bound: loss.fold(foreseen, f64::max),
            foreseen_bound: foreseen,
            requests: self.requests,
            peak_requests_per_second: peak as f64 / 60.0,
            agent_requests: self.agent_requests,
            shards: self.jobs.len(),
            lost_shards: shards
                .all()
                .iter()
                .filter(|shard| matches!(shard.state, super::shards::State::Lost(_)) && shard.agent.is_some())
                .count(),
            repeated: self.completions.iter().filter(|number| **number > 1).count(),
            given_up: self.errors,
            lost: self.verdicts.iter().filter(|number| **number == 0).count(),
            doubled: self.verdicts.iter().filter(|number| **number > 1).count(),
            longest_scenario: longest,
            total_work: work,
        }
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

fn ask(at: f64, host: usize) -> Ask {
    (Reverse((at * MICRO) as u64), host)
}

fn name(host: usize) -> String {
    format!("host{host}")
}

fn number(job: &str) -> usize {
    job.parse().unwrap_or(usize::MAX)
}

impl Lab for SimulatedLab {
    type Finding = ();

    fn now(&self) -> Duration {
        Duration::from_secs_f64(self.clock)
    }

    fn rest(&mut self, time: Duration) -> Result<(), Trouble> {
        self.pass_until(self.clock + time.as_secs_f64());
        Ok(())
    }

    fn hosts(&mut self, without: &BTreeSet<String>) -> Result<usize, Trouble> {
        self.asked(1, 1.0, REQUEST);
        // The server does not notice who dies.
        Ok(self.hosts.len() - without.len())
    }

    fn submit(&mut self, orders: &[Order]) -> Vec<Result<String, Trouble>> {
        let submit = |order: &Order| {
            // One after the other, so that hosts may begin before the last one is submitted.
            self.asked(1, 2.0, SUBMISSION / AT_ONCE);
            self.jobs.push(Job {
                shard: order.shard,
                scenarios: order.scenarios.clone(),
                exclude: order.exclude.clone(),
                run: None,
                cancelled: false,
                beats_heard: 0,
            });
            self.queue.push_back(self.jobs.len() - 1);
            Ok((self.jobs.len() - 1).to_string())
        };
        orders.iter().map(submit).collect()
    }

    fn states(&mut self) -> Result<HashMap<String, JobState>, Trouble> {
        self.asked(1, 1.0, REQUEST);
        let state = |job: &Job| {
            let Some(run) = &job.run else {
                return if job.cancelled { JobState::Over } else { JobState::Waiting };
            };
            let now = self.clock.min(self.hosts[run.host].dies);
            if job.cancelled || now >= run.over {
                JobState::Over
            } else if now >= run.test_from {
                JobState::Testing
            } else {
                JobState::Busy
            }
        };
        Ok(self.jobs.iter().enumerate().map(|(id, job)| (id.to_string(), state(job))).collect())
    }

    fn listen(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<News, Trouble>> {
        self.asked(shards.len(), 1.0, REQUEST);
        let news = |(_, job): &(ShardId, String)| {
            let id = number(job);
            let said = self.heard_of(id).len() as u64;
            let job = &self.jobs[id];
            let Some(run) = &job.run else { return Ok(News::default()) };
            let until = self.life(run).min(self.clock) - DELAY;
            let beats = said + ((until - run.from).max(0.0) / BEAT) as u64;
            let (over, agent) = (run.ends.last().is_none_or(|end| *end <= until), Some(name(run.host)));
            let any = beats > job.beats_heard;
            self.jobs[id].beats_heard = beats;
            Ok(News { any, agent, over })
        };
        shards.iter().map(news).collect()
    }

    fn collect(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<Harvest<()>, Trouble>> {
        self.asked(shards.len(), 1.0, REQUEST);
        let harvest = |(_, job): &(ShardId, String)| {
            let findings = self.heard_of(number(job));
            let job = &self.jobs[number(job)];
            let ended = job.run.as_ref().filter(|run| run.over <= self.life(run) && !job.cancelled);
            Ok(Harvest {
                findings,
                ended: ended.map(|run| Ended {
                    hopeless: None,
                    how: String::new(),
                    took: Duration::from_secs_f64(run.over - FINISH - run.test_from),
                }),
                agent: job.run.as_ref().map(|run| name(run.host)),
                why: "it died".into(),
            })
        };
        shards.iter().map(harvest).collect()
    }

    fn heard(&mut self, shard: ShardId) -> Vec<(Index, ())> {
        let job = self.jobs.iter().position(|job| job.shard == shard);
        job.map(|job| self.heard_of(job)).unwrap_or_default()
    }

    fn cancel(&mut self, jobs: &[String]) {
        self.asked(jobs.len(), 1.0, REQUEST);
        for job in jobs {
            self.jobs[number(job)].cancelled = true;
            self.queue.retain(|waiting| *waiting != number(job));
        }
    }

    fn keep(&mut self, scenario: Index, verdict: Verdict<()>) -> Result<(), Trouble> {
        self.verdicts[scenario] += 1;
        self.errors += usize::from(!matches!(verdict, Verdict::Found(())));
        Ok(())
    }

    fn say(&mut self, _: &str) {}

    fn round(&mut self, _: &Shards) {}
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
