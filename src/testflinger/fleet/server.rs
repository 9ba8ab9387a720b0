//! A lab behind a Testflinger server: jobs and requests for shards, a run directory for verdicts.

use super::each::each;
use super::lab::{Harvest, JobState, Lab, News, Order, Trouble, Verdict};
use super::remote::{Job, trouble};
use super::saved::{Left, Saved};
use super::shards::{ShardId, Shards, State};
use super::show::{Notice, Progress, Row};
use super::split::Index;
use crate::deadline::{Deadline, Stop};
use crate::fault::{Fault, visible};
use crate::process;
use crate::record::{Outcome, Record, Run};
use crate::testflinger::client::Client;
use crate::testflinger::wire::{self, job_state};
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A verdict of a shard.
#[derive(Debug)]
pub struct Finding {
    record: Record,
    evidence: Option<PathBuf>,
    agent: Option<String>,
}

/// The lab.
pub struct ServerLab<'a> {
    client: Client,
    run: &'a Run,
    saved: Saved,
    began: Instant,
    jobs: HashMap<ShardId, Job>,
    /// No agent would be left without those.
    needs_all: bool,
    rows: BTreeMap<Index, Row>,
    watcher: &'a (dyn Fn(Notice<'_>) + Sync),
}

impl<'a> ServerLab<'a> {
    /// Of a run that is to be done.
    pub fn new(client: Client, run: &'a Run, saved: Saved, watcher: &'a (dyn Fn(Notice<'_>) + Sync)) -> Self {
        let (began, jobs, rows) = (Instant::now(), HashMap::new(), BTreeMap::new());
        Self { client, run, saved, began, jobs, needs_all: false, rows, watcher }
    }

    /// With what an earlier process left; the books of the run.
    pub fn go_on(&mut self, left: Left, expected: Vec<Duration>) -> Shards {
        let Left { shards, rows } = left;
        let shards = Shards::resumed(expected, shards, rows.keys().copied());
        // Whether it was sent, nobody knows.
        self.jobs = shards.open().map(|(id, shard)| (id, Job::new(&shard.job, true))).collect();
        self.rows = rows;
        shards
    }

    /// The verdicts, by scenario.
    pub fn rows(&self) -> impl Iterator<Item = (&str, &Row)> {
        self.rows.iter().map(|(index, row)| (self.saved.plan.scenarios[*index].as_str(), row))
    }

    fn incoming(&self) -> PathBuf {
        self.saved.directory().join(".incoming")
    }

    /// The findings of a shard, by scenario.
    fn findings(
        &self,
        records: impl IntoIterator<Item = (Record, Option<PathBuf>)>,
        agent: Option<&String>,
    ) -> BTreeMap<Index, Finding> {
        let finding = |(record, evidence): (Record, Option<PathBuf>)| {
            // Neither of these is the last word on a scenario.
            let open = matches!(record.outcome, Outcome::Interrupted | Outcome::Deferred);
            let index = *self.saved.index.get(&record.scenario)?;
            (!open).then(|| (index, Finding { record, evidence, agent: agent.cloned() }))
        };
        records.into_iter().filter_map(finding).collect()
    }

    fn heard_of(&self, job: &Job) -> BTreeMap<Index, Finding> {
        let records = job.log.records.iter().cloned().map(|record| (record, None));
        self.findings(records, job.log.agent.as_ref())
    }

    fn collect_one(&self, shard: ShardId, job: &mut Job) -> Result<Harvest<Finding>, Trouble> {
        let (artifacts, why) = job.collect(&self.client, &self.incoming().join(shard.to_string()))?;
        let agent = job.log.agent.clone();
        let mut findings = self.heard_of(job);
        // What came with its evidence is better than what was only heard.
        findings.extend(self.findings(artifacts.records, agent.as_ref()));
        Ok(Harvest { findings: findings.into_iter().collect(), ended: artifacts.ended, agent, why })
    }

    /// Brings a job as far as it goes: on the server, with what travels with it.
    fn send(&self, id: &str, tried: bool, mut job: Map<String, Value>) -> Result<(), Trouble> {
        // A server takes one id twice: only one that says that it has none is sent it again.
        let is_there = tried && self.client.job(id).map_err(trouble)?.is_some();
        if !is_there {
            match self.client.submit(&job) {
                // Nobody else is left.
                Err(error) if error.status() == Some(422) && job["exclude_agents"] != json!([]) => {
                    job.insert("exclude_agents".into(), json!([]));
                    self.client.submit(&job)
                }
                other => other,
            }
            .map_err(trouble)?;
        }
        let archive = Saved::archive(self.saved.directory());
        self.client.send_attachments(id, &archive).map_err(trouble)
    }
}

/// Refuses a queue from which nobody takes jobs: before anything is on record.
///
/// # Errors
/// When there is no such queue, no agent that works, or no answer.
pub fn check_queue(client: &Client, queue: &str) -> Result<()> {
    let agents =
        client.agents_of(queue).with_context(|| {
            Fault::host("cannot ask the server for its agents").fix(
                "check --server or TESTFLINGER_SERVER, and TESTFLINGER_CLIENT_ID and TESTFLINGER_SECRET_KEY where it wants a login",
            )
        })?;
    let fault = match agents.as_deref() {
        None => Fault::host(format!("the server knows no queue `{queue}`"))
            .fix("correct the name, or start an agent for it"),
        Some([]) => Fault::host(format!("no agent takes jobs from the queue `{queue}`")).fix("start one"),
        Some(agents) if !agents.iter().any(wire::AgentData::works) => {
            Fault::host(format!("all agents of the queue `{queue}` are offline: {}", agents.len()))
                .fix("set one of them online")
        }
        Some(_) => return Ok(()),
    };
    Err(fault.into())
}

impl Lab for ServerLab<'_> {
    type Finding = Finding;

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn rest(&mut self, time: Duration) -> Result<(), Trouble> {
        let pause = Deadline::after(time, "the pause between two rounds");
        loop {
            match pause.check() {
                Ok(()) => std::thread::sleep(pause.slice(Duration::from_millis(100))),
                Err(Stop::Interrupted) => return Err(Trouble::Interrupted),
                Err(Stop::Expired { .. }) => return Ok(()),
            }
        }
    }

    fn hosts(&mut self, without: &BTreeSet<String>) -> Result<usize, Trouble> {
        let agents =
            self.client.agents_of(&self.saved.plan.common.queue).map_err(trouble)?.unwrap_or_default();
        let working: Vec<_> = agents.iter().filter(|agent| agent.works()).collect();
        let trusted = working.iter().filter(|agent| !without.contains(&agent.name)).count();
        self.needs_all = trusted == 0;
        Ok(if self.needs_all { working.len() } else { trusted })
    }

    fn write_down(&mut self, shards: &Shards) -> Result<(), Trouble> {
        self.saved.save(shards).map_err(Trouble::Fatal)
    }

    fn submit(&mut self, orders: &[Order]) -> Vec<Result<(), Trouble>> {
        let common = &self.saved.plan.common;
        let item = |order: &Order| {
            let names = order.scenarios.iter().map(|index| self.saved.plan.scenarios[*index].as_str());
            let exclude = order.exclude.iter().filter(|_| !self.needs_all);
            let tried = self.jobs.get(&order.shard).is_some_and(|job| job.tried);
            (order.job.clone(), tried, common.job(&order.job, order.shard, names, exclude))
        };
        let results = each(orders.iter().map(item).collect(), |(id, tried, job)| {
            if process::interrupted() {
                return (tried, Err(Trouble::Interrupted));
            }
            (true, self.send(&id, tried, job))
        });
        for (order, (tried, _)) in orders.iter().zip(&results) {
            self.jobs.insert(order.shard, Job::new(&order.job, *tried));
        }
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn states(&mut self) -> Result<HashMap<String, JobState>, Trouble> {
        let found = self.client.search([self.saved.plan.common.tag.as_str()]).map_err(trouble)?;
        let state = |state: &str| match state {
            "waiting" => JobState::Waiting,
            "test" => JobState::Testing,
            state if job_state::is_final(state) => JobState::Over,
            _ => JobState::Busy,
        };
        Ok(found.into_iter().map(|job| (job.job_id, state(&job.state))).collect())
    }

    fn listen(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<News, Trouble>> {
        let jobs: Vec<_> = shards.iter().map(|(id, _)| self.jobs.remove(id).unwrap_or_default()).collect();
        let client = &self.client;
        let heard = each(jobs, |mut job| {
            let any = job.listen(client);
            (job, any)
        });
        let mut news = Vec::new();
        for ((id, _), (job, any)) in shards.iter().zip(heard) {
            news.push(any.map(|any| News { any, agent: job.log.agent.clone(), over: job.log.is_over }));
            self.jobs.insert(*id, job);
        }
        news
    }

    fn collect(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<Harvest<Finding>, Trouble>> {
        if let Err(error) = fs::create_dir_all(self.incoming()) {
            return vec![Err(Trouble::Fatal(
                anyhow::Error::new(error).context("cannot make room for artifacts"),
            ))];
        }
        let jobs: Vec<_> =
            shards.iter().map(|(id, _)| (*id, self.jobs.remove(id).unwrap_or_default())).collect();
        let collected = each(jobs, |(id, mut job)| {
            let harvest = self.collect_one(id, &mut job);
            (id, job, harvest)
        });
        let mut harvests = Vec::new();
        for (id, job, harvest) in collected {
            // What it said is in the harvest.
            if harvest.is_err() {
                self.jobs.insert(id, job);
            }
            harvests.push(harvest);
        }
        harvests
    }

    fn heard(&mut self, shard: ShardId) -> Vec<(Index, Finding)> {
        self.jobs.get(&shard).map(|job| self.heard_of(job).into_iter().collect()).unwrap_or_default()
    }

    fn cancel(&mut self, shards: &[(ShardId, String)]) {
        let client = &self.client;
        // Also those whose submission had no answer.
        let tried = |shard: &ShardId| self.jobs.get(shard).is_some_and(|job| job.tried);
        let jobs: Vec<_> = shards.iter().filter(|(shard, _)| tried(shard)).collect();
        let failed = each(jobs, |(_, job)| client.cancel(job).err().map(|error| (job, error)));
        for (job, error) in failed.into_iter().flatten() {
            (self.watcher)(Notice::Line(&format!("job {job} could not be cancelled: {error}")));
        }
    }

    fn keep(&mut self, scenario: Index, verdict: Verdict<Finding>) -> Result<(), Trouble> {
        let name = &self.saved.plan.scenarios[scenario];
        let without = |outcome: Outcome, reason: String| {
            self.run.not_run(outcome, &[(name, &[], &reason)])?;
            Ok(Row { outcome, seconds: 0.0, host: String::new(), reason: Some(reason) })
        };
        let row = match verdict {
            Verdict::Found(Finding { record, evidence, agent }) => {
                // Evidence that cannot be had is not worth the verdict.
                let adopted = match self.run.adopt(record.clone(), evidence.as_deref()) {
                    Err(_) if evidence.is_some() => self.run.adopt(record, None),
                    adopted => adopted,
                };
                adopted.map(|record| Row::of(record, agent))
            }
            Verdict::Error(reason) => without(Outcome::Error, reason),
            Verdict::Interrupted => without(Outcome::Interrupted, "the run was interrupted".into()),
        };
        let row = row.map_err(Trouble::Fatal)?;
        (self.watcher)(Notice::Verdict(name, &row));
        self.saved.keep(scenario, &row).map_err(Trouble::Fatal)?;
        self.rows.insert(scenario, row);
        Ok(())
    }

    fn say(&mut self, text: &str) {
        (self.watcher)(Notice::Line(&visible(text)));
    }

    fn round(&mut self, shards: &Shards) {
        // What is on record has been moved out of it.
        let _ = fs::remove_dir_all(self.incoming());
        let mut progress = Progress { scenarios_owed: shards.owed(), ..Progress::default() };
        for (_, shard) in shards.open() {
            match shard.state {
                State::Running { .. } => progress.running += 1,
                _ => progress.waiting += 1,
            }
        }
        (self.watcher)(Notice::Progress(progress));
    }
}
