//! The work of a run on many hosts: send out shards, watch them, take what comes back.
//!
//! Decides by what a [`Lab`] shows, and acts through it alone, so that the simulation exercises this
//! very code. Time is the lab's, too.

use super::lab::{Ended, JobState, Lab, Order, Trouble, Verdict};
use super::shards::{End, GivenUp, Shard, ShardId, Shards, State};
use super::split::Sizes;
use crate::testflinger::client::OUTAGE;
use std::collections::HashMap;
use std::time::Duration;

/// Each shard that runs is listened to so often.
const LISTEN_EVERY: Duration = Duration::from_secs(45);
/// A shard that runs its scenarios says so every 15 seconds ([`super::job`]). One that does not for
/// so long is lost.
const SILENCE: Duration = Duration::from_secs(75);
/// Before its scenarios, a job may be silent: a machine is installed. This is more than that takes.
const STUCK: Duration = Duration::from_secs(45 * 60);
/// When others have come so far: so many times as long as the slowest of them, and no less than
/// [`SETTLED`].
const SLOWER: u32 = 5;
const SETTLED: Duration = Duration::from_secs(120);
/// When nobody takes a shard for so long, nobody will.
const PATIENCE: Duration = Duration::from_secs(6 * 3600);
/// How many shards are listened to in a second, at most: a server has more to do.
const MOST_LISTENED: f64 = 20.0;
/// Agents come and go.
const COUNT_EVERY: Duration = Duration::from_secs(300);
/// What a job costs beside its scenarios, until one has shown it.
const OVERHEAD: Duration = Duration::from_secs(15);
/// However little a job costs, what it does should be more.
const SMALLEST: Duration = Duration::from_secs(60);
/// Agents end a phase after four hours, if they are not told otherwise; and what a host has when it
/// dies has to be done again.
const LARGEST: Duration = Duration::from_secs(3600);

/// Runs all scenarios. Each has its verdict on record when this returns, whatever happened; `most` is
/// how many jobs there may be at once.
///
/// # Errors
/// [`Trouble::Fatal`] or [`Trouble::Interrupted`], with which it ended early.
pub fn run<L: Lab>(lab: &mut L, shards: &mut Shards, most: Option<usize>) -> Result<(), Trouble> {
    let mut fleet = Fleet {
        most,
        hosts: 0,
        counted: None,
        overhead: OVERHEAD,
        setup: None,
        listened: HashMap::new(),
        started: 0,
        away: None,
    };
    let mut result = fleet.until_done(lab, shards);
    let open = jobs_of(shards.open());
    if !open.is_empty() {
        lab.cancel(&open);
    }
    for (id, _) in open {
        for (scenario, finding) in lab.heard(id) {
            if shards.accept(id, scenario) {
                result = result.and(lab.keep(scenario, Verdict::Found(finding)));
            }
        }
        shards.close(id, &End::Dropped);
    }
    // Each gets its verdict, also when one cannot be written.
    for scenario in shards.unfinished() {
        shards.finish(scenario);
        let verdict = match &result {
            Err(Trouble::Interrupted) => Verdict::Interrupted,
            Err(Trouble::Fatal(error)) => Verdict::Error(format!("the run ended early: {error:#}")),
            _ => Verdict::Error("the run ended without it".into()),
        };
        let kept = lab.keep(scenario, verdict);
        result = result.and(kept);
    }
    result = result.and(lab.write_down(shards));
    lab.round(shards);
    result
}

struct Fleet {
    most: Option<usize>,
    hosts: usize,
    /// When agents were last counted.
    counted: Option<Duration>,
    /// What a job costs beside its scenarios.
    overhead: Duration,
    /// The longest way of any job to its scenarios.
    setup: Option<Duration>,
    listened: HashMap<ShardId, Duration>,
    /// How many shards found a host since the last round.
    started: usize,
    /// Since when the server has not been heard of.
    away: Option<Duration>,
}

impl Fleet {
    fn until_done<L: Lab>(&mut self, lab: &mut L, shards: &mut Shards) -> Result<(), Trouble> {
        let whole = shards.backlog();
        let mut last_sign = lab.now();
        while !shards.all_done() {
            let before = (shards.owed(), shards.all().len());
            match self.round(lab, shards, whole) {
                Ok(()) if self.away.is_some() => {
                    self.away = None;
                    lab.say("the server is back");
                    // Nobody could be heard.
                    last_sign = lab.now();
                    hear_all(shards, lab.now());
                }
                Err(Trouble::Away(why)) => {
                    let now = lab.now();
                    let since = *self.away.get_or_insert_with(|| {
                        lab.say(&format!("the server is away, waiting for it: {why}"));
                        now
                    });
                    if now.saturating_sub(since) > OUTAGE {
                        let outage = crate::deadline::human(OUTAGE);
                        return Err(Trouble::Fatal(anyhow::anyhow!(
                            "the server has been away for {outage}: {why}"
                        )));
                    }
                }
                other => other?,
            }
            let runs = shards.open().any(|(_, shard)| matches!(shard.state, State::Running { .. }));
            if runs || self.away.is_some() || before != (shards.owed(), shards.all().len()) {
                last_sign = lab.now();
            }
            if lab.now().saturating_sub(last_sign) > PATIENCE {
                return Err(Trouble::Fatal(anyhow::anyhow!(
                    "no agent took any of the jobs in {}",
                    crate::deadline::human(PATIENCE)
                )));
            }
            lab.write_down(shards)?;
            lab.round(shards);
            if !shards.all_done() {
                lab.rest(interval(shards))?;
            }
        }
        Ok(())
    }

    fn round<L: Lab>(&mut self, lab: &mut L, shards: &mut Shards, whole: Duration) -> Result<(), Trouble> {
        if shards.open().next().is_some() {
            let over = self.watch(lab, shards)?;
            self.collect(lab, shards, over, None)?;
            let silent = self.listen(lab, shards)?;
            if !silent.is_empty() {
                // First the end, then the harvest: nothing comes after it.
                lab.cancel(&silent);
                self.collect(lab, shards, silent, Some("its host fell silent"))?;
            }
        }
        // After a loss there is one agent less.
        if self.counted.is_none_or(|then| lab.now().saturating_sub(then) >= COUNT_EVERY) {
            self.hosts = lab.hosts(shards.distrusted())?;
            self.counted = Some(lab.now());
        }
        self.send(lab, shards, whole)
    }

    /// Sends out as much as there may be at once.
    fn send<L: Lab>(&mut self, lab: &mut L, shards: &mut Shards, whole: Duration) -> Result<(), Trouble> {
        let hosts = self.hosts.min(self.most.unwrap_or(usize::MAX)).max(1);
        // Some wait already when a host becomes free; but not many, or what was lost waits behind them.
        let ahead = (2 * self.started).clamp(hosts / 50 + 1, hosts / 4 + 1);
        let most = self.most.unwrap_or(hosts + ahead);
        let open = shards.open().count();
        let smallest = (4 * self.overhead).max(SMALLEST).min(whole.div_f64(hosts as f64));
        shards.make(most.saturating_sub(open), Sizes { hosts, smallest, largest: LARGEST });
        let order = |(shard, new): (ShardId, &Shard)| Order {
            shard,
            job: new.job.clone(),
            scenarios: new.scenarios.clone(),
            exclude: shards.distrusted().clone(),
        };
        let orders: Vec<_> =
            shards.open().filter(|(_, shard)| shard.state == State::New).map(order).collect();
        if orders.is_empty() {
            return Ok(());
        }
        lab.write_down(shards)?;
        let mut trouble = Ok(());
        for (order, result) in orders.iter().zip(lab.submit(&orders)) {
            match result {
                Ok(()) => shards.get_mut(order.shard).state = State::Waiting,
                Err(error) => trouble = worse(trouble, error),
            }
        }
        trouble
    }

    /// Learns the state of each job; those that are over.
    fn watch<L: Lab>(&mut self, lab: &mut L, shards: &mut Shards) -> Result<Vec<(ShardId, String)>, Trouble> {
        let states = lab.states()?;
        let now = lab.now();
        // One that is not submitted is no business of the server's.
        let open = jobs_of(shards.open().filter(|(_, shard)| shard.state != State::New));
        let mut over = Vec::new();
        // Before agents are counted there are shards in a run that goes on alone: how long their way
        // to their scenarios was, nobody knows.
        let went_on = self.counted.is_none() && self.setup.is_none();
        self.started = 0;
        for (id, job) in open {
            let shard = shards.get_mut(id);
            // A server forgets a job after a week, or when it lost its memory.
            match states.get(&job).copied().unwrap_or(JobState::Over) {
                JobState::Waiting => {}
                JobState::Over => over.push((id, job)),
                state => {
                    let tests = state == JobState::Testing;
                    match &mut shard.state {
                        State::Running { since, heard, testing, .. } if *testing != tests => {
                            (*heard, *testing) = (now, tests);
                            self.setup = self.setup.max(Some(now.saturating_sub(*since)));
                        }
                        State::Running { .. } => {}
                        other => {
                            *other = State::Running { since: now, heard: now, testing: tests, over: false };
                            self.started += 1;
                            if tests && !went_on {
                                self.setup = self.setup.max(Some(Duration::ZERO));
                            }
                        }
                    }
                }
            }
        }
        Ok(over)
    }

    /// Listens to those that were not heard for long; the ones that are silent.
    fn listen<L: Lab>(
        &mut self,
        lab: &mut L,
        shards: &mut Shards,
    ) -> Result<Vec<(ShardId, String)>, Trouble> {
        let (now, pause) = (lab.now(), interval(shards));
        let ends = |shard: &Shard| matches!(shard.state, State::Running { over: true, .. });
        let settled = self.setup.map_or(STUCK, |longest| (longest * SLOWER).max(SETTLED));
        // Evidence is waited for; but not long, when it is all that is waited for.
        let evidence = if shards.open().all(|(_, shard)| ends(shard)) { SILENCE } else { STUCK };
        let mut running: Vec<_> = shards
            .open()
            .filter_map(|(id, shard)| {
                let State::Running { since, heard, testing, over } = shard.state else { return None };
                let last = self.listened.get(&id).copied().unwrap_or(since);
                // Whoever may be lost is listened to before it is.
                let suspect = testing && !over && now.saturating_sub(heard) + pause > SILENCE;
                Some((!suspect, last, id, shard.job.clone()))
            })
            .collect();
        running.sort();
        let share = pause.as_secs_f64() / LISTEN_EVERY.as_secs_f64();
        let most = (running.len() as f64 * share).ceil().max(4.0).min(MOST_LISTENED * pause.as_secs_f64());
        running.truncate(most as usize);
        let asked: Vec<_> = running.into_iter().map(|(_, _, id, job)| (id, job)).collect();
        let answers = if asked.is_empty() { Vec::new() } else { lab.listen(&asked) };
        let (mut silent, mut trouble) = (Vec::new(), Ok(()));
        for ((id, job), answer) in asked.into_iter().zip(answers) {
            let news = match answer {
                Ok(news) => news,
                Err(error) => {
                    trouble = worse(trouble, error);
                    continue;
                }
            };
            self.listened.insert(id, now);
            let shard = shards.get_mut(id);
            shard.agent = news.agent.or(shard.agent.take());
            let State::Running { heard, testing, over, .. } = &mut shard.state else { continue };
            *over |= news.over;
            if news.any {
                *heard = now;
            }
            let limit = match (*testing, *over) {
                (_, true) => evidence,
                (true, false) => SILENCE,
                (false, false) => settled,
            };
            if now.saturating_sub(*heard) > limit {
                silent.push((id, job));
            }
        }
        trouble.map(|()| silent)
    }

    /// Takes what came back, and closes the shards. `lost`: they did not end, and why.
    fn collect<L: Lab>(
        &mut self,
        lab: &mut L,
        shards: &mut Shards,
        over: Vec<(ShardId, String)>,
        lost: Option<&str>,
    ) -> Result<(), Trouble> {
        if over.is_empty() {
            return Ok(());
        }
        let mut trouble = Ok(());
        for ((id, _), harvest) in over.iter().zip(lab.collect(&over)) {
            let harvest = match harvest {
                Ok(harvest) => harvest,
                Err(error) => {
                    trouble = worse(trouble, error);
                    continue;
                }
            };
            let ran_nothing = harvest.findings.is_empty();
            for (scenario, finding) in harvest.findings {
                if shards.accept(*id, scenario) {
                    lab.keep(scenario, Verdict::Found(finding))?;
                }
            }
            let shard = shards.get_mut(*id);
            shard.agent = harvest.agent.or(shard.agent.take());
            let end = match harvest.ended {
                Some(Ended { hopeless: Some(why), .. }) => End::Hopeless(why),
                // Not the scenarios' fault: another C library, another processor.
                Some(Ended { how, .. }) if ran_nothing => {
                    End::Lost(format!("its test binary ran none of its scenarios: {how}"))
                }
                Some(Ended { took, .. }) => {
                    if let State::Running { since, .. } = shard.state {
                        let cost = lab.now().saturating_sub(since).saturating_sub(took);
                        self.overhead = (self.overhead * 7 + cost * 3) / 10;
                    }
                    End::Whole
                }
                None => End::Lost(lost.map_or(harvest.why, str::to_owned)),
            };
            if let End::Lost(why) = &end {
                self.counted = None;
                let by = shard.agent.as_deref().map(|agent| format!(" on {agent}")).unwrap_or_default();
                lab.say(&format!("shard {id}{by} is lost: {why}; what it has not finished goes elsewhere"));
            }
            for GivenUp { scenario, reason } in shards.close(*id, &end) {
                lab.keep(scenario, Verdict::Error(reason))?;
            }
        }
        trouble
    }
}

/// The pause between two rounds: the more there is to ask, the longer.
fn interval(shards: &Shards) -> Duration {
    Duration::from_secs(3) + Duration::from_millis(12) * shards.open().count().min(1500) as u32
}

/// Shards with the ids of their jobs.
fn jobs_of<'a>(shards: impl Iterator<Item = (ShardId, &'a Shard)>) -> Vec<(ShardId, String)> {
    shards.map(|(id, shard)| (id, shard.job.clone())).collect()
}

fn hear_all(shards: &mut Shards, now: Duration) {
    let open: Vec<_> = shards.open().map(|(id, _)| id).collect();
    for id in open {
        if let State::Running { heard, .. } = &mut shards.get_mut(id).state {
            *heard = now;
        }
    }
}

/// One trouble is told of all: the one with which nothing goes on.
fn worse(first: Result<(), Trouble>, second: Trouble) -> Result<(), Trouble> {
    match first {
        Ok(()) | Err(Trouble::Away(_)) => Err(second),
        other => other,
    }
}
