//! The hosts, agents and server of a simulation.

use super::{
    AT_ONCE, BEAT, DELAY, FINISH, Model, POLL, QUANTILES, REQUEST, REQUESTS_OF_A_JOB, REQUESTS_OF_A_POLL,
    SETUP, SUBMISSION,
};
use crate::testflinger::fleet::lab::{Ended, Harvest, JobState, Lab, News, Order, Trouble, Verdict};
use crate::testflinger::fleet::shards::{ShardId, Shards};
use crate::testflinger::fleet::split::Index;
use fastrand::Rng;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::time::Duration;

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

pub(super) struct Host {
    pub(super) first_poll: f64,
    pub(super) dies: f64,
}

pub(super) struct Job {
    id: String,
    shard: ShardId,
    pub(super) scenarios: Vec<Index>,
    exclude: BTreeSet<String>,
    pub(super) run: Option<OnHost>,
    cancelled: bool,
    beats_heard: u64,
}

/// A job on its host. What lies after the death of the host does not happen.
pub(super) struct OnHost {
    pub(super) host: usize,
    pub(super) from: f64,
    pub(super) test_from: f64,
    /// When each of the scenarios ends.
    pub(super) ends: Vec<f64>,
    over: f64,
}

/// Something that happens at a time: a host asks for a job.
type Ask = (Reverse<u64>, usize);

pub(super) struct SimulatedLab {
    pub(super) clock: f64,
    pub(super) hosts: Vec<Host>,
    asks: BinaryHeap<Ask>,
    queue: VecDeque<usize>,
    pub(super) jobs: Vec<Job>,
    /// Of jobs, by id.
    numbers: HashMap<String, usize>,
    pub(super) medians: Vec<f64>,
    pub(super) actual: Vec<f64>,
    pub(super) verdicts: Vec<usize>,
    pub(super) errors: usize,
    pub(super) completions: Vec<usize>,
    pub(super) requests: u64,
    pub(super) by_minute: BTreeMap<u64, u64>,
    pub(super) agent_requests: u64,
}

const MICRO: f64 = 1e6;

impl SimulatedLab {
    pub(super) fn new(model: &Model) -> Self {
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
            numbers: HashMap::new(),
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
}

fn ask(at: f64, host: usize) -> Ask {
    (Reverse((at * MICRO) as u64), host)
}

fn name(host: usize) -> String {
    format!("host{host}")
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

    fn write_down(&mut self, _: &Shards) -> Result<(), Trouble> {
        Ok(())
    }

    fn submit(&mut self, orders: &[Order]) -> Vec<Result<(), Trouble>> {
        let submit = |order: &Order| {
            // One after the other, so that hosts may begin before the last one is submitted.
            self.asked(1, 2.0, SUBMISSION / AT_ONCE);
            self.numbers.insert(order.job.clone(), self.jobs.len());
            self.jobs.push(Job {
                id: order.job.clone(),
                shard: order.shard,
                scenarios: order.scenarios.clone(),
                exclude: order.exclude.clone(),
                run: None,
                cancelled: false,
                beats_heard: 0,
            });
            self.queue.push_back(self.jobs.len() - 1);
            Ok(())
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
        Ok(self.jobs.iter().map(|job| (job.id.clone(), state(job))).collect())
    }

    fn listen(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<News, Trouble>> {
        self.asked(shards.len(), 1.0, REQUEST);
        let news = |(_, job): &(ShardId, String)| {
            let id = self.numbers[job];
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
            let number = self.numbers[job];
            let (findings, job) = (self.heard_of(number), &self.jobs[number]);
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

    fn cancel(&mut self, shards: &[(ShardId, String)]) {
        self.asked(shards.len(), 1.0, REQUEST);
        for (_, job) in shards {
            let Some(number) = self.numbers.get(job).copied() else { continue };
            self.jobs[number].cancelled = true;
            self.queue.retain(|waiting| *waiting != number);
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
