//! A lab behind a Testflinger server: jobs and requests for shards, a run directory for verdicts.

use super::each::each;
use super::harvest::{self, Log};
use super::job::Common;
use super::run::{Harvest, JobState, Lab, News, Order, Trouble, Verdict};
use super::shards::{ShardId, Shards, State};
use super::split::Index;
use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::process;
use crate::record::{Outcome, Record, Run, files};
use crate::testflinger::client::{Client, Error};
use crate::testflinger::wire::{self, Phase, job_state};
use anyhow::{Context, Result};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A shard's artifacts, packed.
const LARGEST_ARTIFACTS: u64 = 2 << 30;

/// A verdict as the table shows it.
#[derive(Clone, Debug)]
pub struct Row {
    /// How it ended.
    pub outcome: Outcome,
    /// What it took, where it ran.
    pub seconds: f64,
    /// The agent, or the host where that is not known.
    pub host: String,
    /// Why, for every outcome but `passed`.
    pub reason: Option<String>,
}

/// A verdict of a shard.
#[derive(Debug)]
pub struct Finding {
    record: Record,
    evidence: Option<PathBuf>,
    agent: Option<String>,
}

/// What is told to who watches.
#[derive(Debug)]
pub enum Notice<'a> {
    /// Something worth a line.
    Line(&'a str),
    /// A scenario has its verdict.
    Verdict(&'a str, &'a Row),
    /// How far the run is.
    Progress(Progress),
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // they are their names
pub struct Progress {
    pub scenarios_owed: usize,
    pub waiting: usize,
    pub running: usize,
}

/// The lab.
pub struct ServerLab<'a> {
    client: Client,
    common: Common,
    run: &'a Run,
    names: Vec<String>,
    index: HashMap<String, Index>,
    archive: PathBuf,
    began: Instant,
    jobs: HashMap<ShardId, Job>,
    /// No agent would be left without those.
    needs_all: bool,
    rows: BTreeMap<Index, Row>,
    saved: String,
    watcher: &'a (dyn Fn(Notice<'_>) + Sync),
}

/// What is known of a shard's job.
#[derive(Default)]
struct Job {
    id: String,
    /// It was sent; the server may have it.
    tried: bool,
    log: Log,
    /// The first fragment that was not heard.
    fragment: u64,
}

impl<'a> ServerLab<'a> {
    /// Of the scenarios with these names; `archive` is what travels with each shard.
    pub fn new(
        client: Client,
        common: Common,
        run: &'a Run,
        names: Vec<String>,
        archive: PathBuf,
        watcher: &'a (dyn Fn(Notice<'_>) + Sync),
    ) -> Self {
        let index = names.iter().enumerate().map(|(index, name)| (name.clone(), index)).collect();
        Self {
            client,
            common,
            run,
            names,
            index,
            archive,
            began: Instant::now(),
            jobs: HashMap::new(),
            needs_all: false,
            rows: BTreeMap::new(),
            saved: String::new(),
            watcher,
        }
    }

    /// The verdicts, by scenario.
    pub fn rows(&self) -> impl Iterator<Item = (&str, &Row)> {
        self.rows.iter().map(|(index, row)| (self.names[*index].as_str(), row))
    }

    /// Writes the ids of jobs down: before they are used, so that nobody has to guess them.
    fn save(&mut self, shards: Option<&Shards>) -> Result<()> {
        let shard = |id: &ShardId| {
            let job = &self.jobs[id];
            let known = shards.map(|shards| shards.get(*id));
            let why = known.and_then(|shard| match &shard.state {
                State::Lost(why) => Some(why.clone()),
                _ => None,
            });
            let state = known.map(|shard| match shard.state {
                State::New => "new",
                State::Waiting => "waiting",
                State::Running { .. } => "running",
                State::Ended => "ended",
                State::Lost(_) => "lost",
                State::Dropped => "cancelled",
            });
            json!({
                "shard": id, "job_id": job.id, "state": state, "lost_because": why,
                "agent": known.and_then(|shard| shard.agent.clone()),
                "scenarios": known.map(|shard| {
                    shard.scenarios.iter().map(|index| &self.names[*index]).collect::<Vec<_>>()
                }),
            })
        };
        let mut ids: Vec<_> = self.jobs.keys().copied().collect();
        ids.sort_unstable();
        let text = json!({
            "server": self.client.base(), "queue": self.common.queue, "tag": self.common.tag,
            "shards": ids.iter().map(shard).collect::<Vec<_>>(),
        })
        .to_string();
        if text != self.saved {
            files::replace(&self.run.directory().join("fleet.json"), text.as_bytes())?;
            self.saved = text;
        }
        Ok(())
    }

    fn incoming(&self) -> PathBuf {
        self.run.directory().join(".incoming")
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
            let index = *self.index.get(&record.scenario)?;
            (!open).then(|| (index, Finding { record, evidence, agent: agent.cloned() }))
        };
        records.into_iter().filter_map(finding).collect()
    }

    fn collect_one(&self, shard: ShardId, job: &mut Job) -> Result<Harvest<Finding>, Trouble> {
        let name = self.incoming().join(shard.to_string());
        let artifacts = match self.fetch(&job.id, &name)? {
            Ok(Some(archive)) => harvest::unpack(archive, &name.with_extension("d")),
            Ok(None) => Ok(harvest::Artifacts::default()),
            // It is as if there were none: what was heard still counts.
            Err(why) => Err(anyhow::anyhow!("its artifacts cannot be had: {why}")),
        };
        let (artifacts, spoilt) = match artifacts {
            Ok(artifacts) => (artifacts, None),
            Err(error) => (harvest::Artifacts::default(), Some(format!("{error:#}"))),
        };
        let mut why = String::new();
        if artifacts.ended.is_none() {
            listen(&self.client, job)?;
            why = spoilt.map_or_else(|| self.why(job), Ok)?;
        }
        let agent = job.log.agent.clone();
        let heard = job.log.records.iter().cloned().map(|record| (record, None));
        let mut findings = self.findings(heard, agent.as_ref());
        // What came with its evidence is better than what was only heard.
        findings.extend(self.findings(artifacts.records, agent.as_ref()));
        Ok(Harvest { findings: findings.into_iter().collect(), ended: artifacts.ended, agent, why })
    }

    /// The artifacts of a job, if it has any, or why they cannot be had.
    fn fetch(&self, job: &str, name: &std::path::Path) -> Result<Result<Option<File>, String>, Trouble> {
        let open = || -> Result<File> {
            let path = name.with_extension("tar.gz");
            files::remove(&path)?;
            fs::remove_dir_all(name.with_extension("d")).or_else(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })?;
            let file = File::options().read(true).write(true).create_new(true).open(&path);
            file.with_context(|| files::cannot("make", &path))
        };
        let mut file = open().map_err(Trouble::Fatal)?;
        match self.client.fetch_artifacts(job, &mut file, LARGEST_ARTIFACTS) {
            Ok(true) => {
                let rewound = std::io::Seek::rewind(&mut file).context(Fault::host("cannot read artifacts"));
                rewound.map(|()| Ok(Some(file))).map_err(Trouble::Fatal)
            }
            Ok(false) => Ok(Ok(None)),
            Err(error) => trouble_of_one(error).map(Err),
        }
    }

    /// Why a job ended without having run its scenarios to their end.
    fn why(&self, job: &Job) -> Result<String, Trouble> {
        let result = match self.client.result(&job.id, 0) {
            Ok(Some(result)) => result,
            Ok(None) => return Ok("the server forgot its job".into()),
            Err(error) => return trouble_of_one(error),
        };
        let failed = result.phases.iter().find_map(|(phase, result)| {
            let status = result.status.filter(|status| *status != 0)?;
            Some(format!("its {phase} phase ended with status {status}"))
        });
        let why = match failed {
            Some(why) => why,
            None if result.state == job_state::CANCELLED => "its job was cancelled".into(),
            None if result.phases.get(&Phase::Test).is_none_or(|test| test.status.is_none()) => {
                "its job ended without a test phase".into()
            }
            None => "its job ended without the end of its scenarios".into(),
        };
        let last = job.log.last_words.trim().lines().last().unwrap_or_default();
        Ok(if last.is_empty() { why } else { format!("{why} ({})", crate::fault::visible(last)) })
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

/// Hears what is new in a job's log; whether there is anything.
///
/// A log that cannot be read is a silent one.
fn listen(client: &Client, job: &mut Job) -> Result<bool, Trouble> {
    let parts = match client.log(&job.id, wire::Log::Output, job.fragment) {
        Ok(parts) => parts,
        Err(error) => return trouble_of_one(error).map(|_| false),
    };
    let mut next = job.fragment;
    for phase in Phase::ALL {
        let Some(part) = parts.get(&phase) else { continue };
        let Ok(last) = u64::try_from(part.last) else { continue };
        if last >= job.fragment {
            next = next.max(last.saturating_add(1));
            job.log.hear(&part.text);
        }
    }
    let any = next > job.fragment;
    job.fragment = next;
    Ok(any)
}

/// What is wrong with one job is no trouble of the others; what is wrong with us or the server is.
fn trouble_of_one(error: Error) -> Result<String, Trouble> {
    if error.is_passing() || matches!(error.status(), Some(401 | 403)) || matches!(error, Error::Here { .. })
    {
        return Err(trouble(error));
    }
    Ok(format!("{:#}", anyhow::Error::new(error)))
}

fn trouble(error: Error) -> Trouble {
    let passes = error.is_passing();
    let error = anyhow::Error::new(error);
    if passes { Trouble::Away(format!("{error:#}")) } else { Trouble::Fatal(error) }
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
        let agents = self.client.agents_of(&self.common.queue).map_err(trouble)?.unwrap_or_default();
        let working: Vec<_> = agents.iter().filter(|agent| agent.works()).collect();
        let trusted = working.iter().filter(|agent| !without.contains(&agent.name)).count();
        self.needs_all = trusted == 0;
        Ok(if self.needs_all { working.len() } else { trusted })
    }

    fn submit(&mut self, orders: &[Order]) -> Vec<Result<String, Trouble>> {
        let mut prepare = || -> Result<(), Trouble> {
            for order in orders {
                if let std::collections::hash_map::Entry::Vacant(place) = self.jobs.entry(order.shard) {
                    place.insert(Job { id: uuid::Uuid::new_v4().to_string(), ..Job::default() });
                }
            }
            self.save(None).map_err(Trouble::Fatal)
        };
        if let Err(trouble) = prepare() {
            return vec![Err(trouble)];
        }
        let items: Vec<_> = orders
            .iter()
            .map(|order| {
                let job = &self.jobs[&order.shard];
                let names = order.scenarios.iter().map(|index| self.names[*index].as_str());
                let exclude = order.exclude.iter().filter(|_| !self.needs_all);
                (job.id.clone(), job.tried, self.common.job(&job.id, order.shard, names, exclude))
            })
            .collect();
        let results = each(items, |(id, tried, mut job)| {
            if process::interrupted() {
                return (tried, Err(Trouble::Interrupted));
            }
            // A server takes one id twice: only one that says that it has none is sent it again.
            let there = match if tried { self.client.job(&id) } else { Ok(None) } {
                Ok(job) => job.is_some(),
                Err(error) => return (true, Err(trouble(error))),
            };
            let sent = if there {
                Ok(())
            } else {
                match self.client.submit(&job) {
                    // Nobody else is left.
                    Err(error) if error.status() == Some(422) && job["exclude_agents"] != json!([]) => {
                        job.insert("exclude_agents".into(), json!([]));
                        self.client.submit(&job).map(drop)
                    }
                    other => other.map(drop),
                }
            };
            (
                true,
                sent.and_then(|()| self.client.send_attachments(&id, &self.archive))
                    .map(|()| id)
                    .map_err(trouble),
            )
        });
        for (order, (tried, _)) in orders.iter().zip(&results) {
            if let Some(job) = self.jobs.get_mut(&order.shard) {
                job.tried = *tried;
            }
        }
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn states(&mut self) -> Result<HashMap<String, JobState>, Trouble> {
        let found = self.client.search([self.common.tag.as_str()]).map_err(trouble)?;
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
            let any = listen(client, &mut job);
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
            self.jobs.insert(id, job);
            harvests.push(harvest);
        }
        harvests
    }

    fn heard(&mut self, shard: ShardId) -> Vec<(Index, Finding)> {
        let Some(job) = self.jobs.get(&shard) else { return Vec::new() };
        let records = job.log.records.iter().cloned().map(|record| (record, None));
        self.findings(records, job.log.agent.as_ref()).into_iter().collect()
    }

    fn cancel(&mut self, jobs: &[String]) {
        let client = &self.client;
        let failed = each(jobs.to_vec(), |job| client.cancel(&job).err().map(|error| (job, error)));
        for (job, error) in failed.into_iter().flatten() {
            (self.watcher)(Notice::Line(&format!("job {job} could not be cancelled: {error}")));
        }
    }

    fn keep(&mut self, scenario: Index, verdict: Verdict<Finding>) -> Result<(), Trouble> {
        let name = &self.names[scenario];
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
                adopted.map(|record| Row {
                    outcome: record.outcome,
                    seconds: record.duration_seconds,
                    host: agent.unwrap_or(record.host.hostname),
                    reason: record.reason,
                })
            }
            Verdict::Error(reason) => without(Outcome::Error, reason),
            Verdict::Interrupted => without(Outcome::Interrupted, "the run was interrupted".into()),
        };
        let row = row.map_err(Trouble::Fatal)?;
        (self.watcher)(Notice::Verdict(name, &row));
        self.rows.insert(scenario, row);
        Ok(())
    }

    fn say(&mut self, text: &str) {
        (self.watcher)(Notice::Line(&crate::fault::visible(text)));
    }

    fn round(&mut self, shards: &Shards) {
        if let Err(error) = self.save(Some(shards)) {
            (self.watcher)(Notice::Line(&format!("{error:#}")));
        }
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
