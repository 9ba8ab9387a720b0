//! One job, from the moment it was taken to its outcome: phases, events, statuses.

use super::outbox::{Line, Outbox, chain};
use super::phase::describe_exception;
use super::place::{self, Memo, Place};
use super::runner::{Cut, Ended};
use super::spool::{Post, now};
use super::survivors::Mark;
use super::{Agent, attachments, release, results};
use crate::testflinger::client::Error;
use crate::testflinger::wire::{
    AgentData, AgentUpdate, Event, Job, Log, Phase, ProvisionLog, ResultUpdate, job_state,
};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the end of a job waits for a server that does not answer, before its results are laid
/// aside.
const PATIENCE: Duration = Duration::from_secs(10);

/// The status of a phase that failed without its command: ours is the fault.
pub(super) const INTERNAL: u8 = 100;
/// The status of a phase after which the machine cannot be used.
const RECOVERY_FAILED: u8 = 46;

/// What is to be done after a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct After {
    /// To be offline, and why.
    pub(super) offline: Option<String>,
    /// To restart, and why.
    pub(super) restart: Option<String>,
}

/// A job that runs.
pub(super) struct Running<'a> {
    pub(super) agent: &'a Agent,
    pub(super) job: Job,
    pub(super) place: Place,
    pub(super) memo: Memo,
    pub(super) outbox: Outbox,
    after: After,
    begun: Instant,
}

/// Runs a job that was just taken. `None` when it was left as it is, for the agent must end now.
///
/// # Errors
/// When it could not even begin. The server was told, if it could be.
pub(super) fn run(agent: &Agent, job: Job) -> Result<Option<After>> {
    let place = Place::of(&agent.config.execution_basedir, job.id());
    let memo = Memo { agent_id: agent.config.agent_id.clone(), ..Memo::default() };
    let begin = || -> Result<Outbox> {
        place.make(&job, &memo)?;
        Outbox::start(&place.state, line(agent, &job))
    };
    let outbox = match begin() {
        Ok(outbox) => outbox,
        Err(error) => {
            tell_failure(agent, &job, &format!("{error:#}"));
            let _ = place.remove();
            return Err(error.context(format!("job {} could not begin", job.id())));
        }
    };
    agent.metrics.job(&agent.config.agent_id);
    agent.log.info(format!("Starting job {}", job.id()));
    let mut running = Running::new(agent, job, place, memo, outbox);
    running.event("job_start", format!("{}/jobs/{}", agent.client.base(), running.job.id()));
    running.outbox.post(Post::Agent(AgentUpdate::job(running.job.id())));
    let detail = match running.prepare() {
        Ok(()) => running.phases(),
        Err((phase, error)) => Some(running.fail(phase, &format!("{error:#}"))),
    };
    Ok(running.conclude(detail))
}

/// Goes on with a job that an agent left when it died: ends what it started, cleans up, and tells.
pub(super) fn resume(agent: &Agent, place: Place) -> Result<Option<After>> {
    let (job, memo) = (place.job()?, place.memo()?);
    let mark = Mark::Job(job.id().to_owned());
    agent.log.warning(format!("Job {} was left by an agent that died; it is cleaned up", job.id()));
    let ended = mark.end();
    if ended > 0 {
        agent.log.warning(format!("Ended {ended} processes of job {}", job.id()));
    }
    if memo.ended {
        let after = After { offline: memo.offline.clone(), restart: None };
        results::hand_in(agent, &place, &memo)?;
        return Ok(Some(after));
    }
    place.make_rundir()?;
    let outbox = Outbox::start(&place.state, line(agent, &job))?;
    let mut running = Running::new(agent, job, place, memo, outbox);
    let detail = match running.memo.phase.unwrap_or(Phase::Setup) {
        Phase::Cleanup => {
            let failed = running.memo.events.iter().rev().find(|event| event.event_name.ends_with("_fail"));
            failed.map(|event| event.event_name.clone())
        }
        phase => Some(running.fail(phase, "The agent died during this phase; the job ends here.")),
    };
    Ok(running.conclude(detail))
}

pub(super) fn line(agent: &Agent, job: &Job) -> Line {
    Line {
        client: Arc::clone(&agent.client),
        agent: agent.config.agent_id.clone(),
        job: job.clone(),
        log: Arc::clone(&agent.log),
        influx: agent.influx.clone(),
        glance: agent.config.polling_interval().clamp(Duration::from_secs(1), Duration::from_secs(10)),
    }
}

/// Tells of a job that has no place on disk, as well as it can be done.
fn tell_failure(agent: &Agent, job: &Job, why: &str) {
    let update = ResultUpdate {
        status: Some([(Phase::Setup, INTERNAL)].into()),
        job_state: Some(job_state::COMPLETE.into()),
        device_info: None,
    };
    let log_data = format!("\nERROR: {why}\n");
    let at = now();
    let fragment = crate::testflinger::wire::Fragment {
        fragment_number: 0,
        timestamp: &at,
        phase: Phase::Setup,
        log_data: &log_data,
    };
    let told = agent.insist(|client| client.post_fragment(job.id(), Log::Output, &fragment));
    let told = told.and_then(|()| agent.insist(|client| client.update_result(job.id(), &update)));
    if let Err(error) = told {
        agent.log.error(format!("Cannot tell the server that job {} failed: {}", job.id(), chain(&error)));
    }
}

impl<'a> Running<'a> {
    fn new(agent: &'a Agent, job: Job, place: Place, memo: Memo, outbox: Outbox) -> Self {
        let after = After { offline: memo.offline.clone(), restart: None };
        Self { agent, job, place, memo, outbox, after, begun: Instant::now() }
    }

    /// Writes the files that commands expect, and unpacks attachments.
    fn prepare(&mut self) -> Result<(), (Phase, anyhow::Error)> {
        let files = || -> Result<()> {
            place::write_python_json(&self.place.rundir.join("testflinger.json"), &self.job)?;
            self.write_outcome()?;
            let errors = self.place.rundir.join("device-connector-error.json");
            place::append(&errors).with_context(|| format!("cannot make {}", errors.display()))?;
            Ok(())
        };
        files().map_err(|error| (Phase::Setup, error))?;
        let phase = self.job.first_attached().unwrap_or(Phase::Setup);
        if self.job.has_attachments() { self.attach().map_err(|error| (phase, error)) } else { Ok(()) }
    }

    fn attach(&self) -> Result<()> {
        let archive = self.place.state.join("attachments.tar.gz");
        let fetched = self.agent.insist(|client| {
            let mut file = File::create(&archive).map_err(|source| Error::Here {
                what: format!("cannot write {}", archive.display()),
                source,
            })?;
            client.fetch_attachments(self.job.id(), &mut file)
        });
        if fetched.context("The attachments could not be fetched")? {
            let into = self.place.rundir.join("attachments");
            fs::create_dir(&into).context("cannot make the directory of attachments")?;
            let file = File::open(&archive).context("cannot read the attachments")?;
            attachments::unpack(file, &into).context("The attachments could not be unpacked")?;
        }
        let _ = fs::remove_file(archive);
        Ok(())
    }

    /// Runs all phases but cleanup; the detail of the job's end where one of them ended it.
    fn phases(&mut self) -> Option<String> {
        for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Cleanup) {
            if !self.enter(phase) {
                self.event("cancelled", "");
                return None;
            }
            self.event(&format!("{phase}_start"), "");
            let begun = Instant::now();
            let ended = self.run_phase(phase)?;
            self.agent.influx.tell(phase.name(), Some(ended.code));
            self.measure(phase, begun, ended.code);
            let name = self.close(phase, ended);
            if phase == Phase::Provision {
                let (job_id, exit_code) = (self.job.id().to_owned(), ended.code);
                let detail = name.clone();
                self.outbox.post(Post::Provision(ProvisionLog { job_id, exit_code, detail }));
            }
            if ended.code != 0 && phase != Phase::Test {
                return Some(name);
            }
        }
        None
    }

    /// Tells that `phase` begins; false when the job is cancelled.
    fn enter(&mut self, phase: Phase) -> bool {
        if self.agent.control.restarts() && self.after.restart.is_none() {
            self.after.restart = Some(super::SIGNALLED.into());
            self.outbox.comment(super::SIGNALLED);
        }
        self.memo.phase = Some(phase);
        self.save();
        self.outbox.post(Post::Enter(phase));
        self.outbox.settle();
        if let Some(data) = self.outbox.admin() {
            self.heed(data);
        }
        self.memo.cancelled |= self.outbox.cancelled();
        !self.memo.cancelled
    }

    /// Remembers what an admin asked, for the end of the job.
    fn heed(&mut self, data: AgentData) {
        self.agent.log.info(format!("After this job: {} ({})", data.state, data.comment));
        if data.state == "restart" {
            self.after.restart = Some(data.comment);
            return;
        }
        self.after.offline = (data.state != "waiting").then_some(data.comment);
        self.memo.offline.clone_from(&self.after.offline);
        self.save();
    }

    /// Tells how `phase` ended, and gives the name of the event that says so.
    fn close(&mut self, phase: Phase, ended: Ended) -> String {
        if let Some(cut) = ended.cut {
            self.memo.cancelled |= cut == Cut::Cancelled;
            self.event(cut.event(), cut.text());
        }
        let name = match ended.code {
            0 => format!("{phase}_success"),
            RECOVERY_FAILED => "recovery_fail".into(),
            _ => format!("{phase}_fail"),
        };
        if ended.code == RECOVERY_FAILED {
            let comment =
                format!("Set to offline by agent. Recovery failed during job '{}' execution.", self.job.id());
            self.agent.metrics.recovery_failure(&self.agent.config.agent_id);
            self.outbox.comment(&comment);
            self.outbox.post(Post::Agent(AgentUpdate::state("offline", &*comment)));
            self.after.offline = Some(comment.clone());
            self.memo.offline = Some(comment);
            self.save();
        }
        let detail = match ended.code {
            0 => String::new(),
            _ => describe_exception(&self.place.rundir, phase),
        };
        self.event(&name, detail);
        name
    }

    /// A phase that fails for a reason of ours: the user reads why, and sees it in the status.
    fn fail(&mut self, phase: Phase, why: &str) -> String {
        self.agent.log.error(format!("Job {}: {why}", self.job.id()));
        if self.memo.phase != Some(phase) && !self.enter(phase) {
            self.event("cancelled", "");
            return "cancelled".into();
        }
        self.print(phase, &format!("\nERROR: {why}\n"));
        self.record(phase, INTERNAL);
        let name = format!("{phase}_fail");
        self.event(&name, why);
        name
    }

    /// Cleans up and hands in the outcome, whatever came before; `None` when the agent must end now.
    fn conclude(mut self, detail: Option<String>) -> Option<After> {
        if self.agent.control.ends_now() {
            return None;
        }
        self.memo.phase = Some(Phase::Cleanup);
        self.event("cleanup_start", "");
        let ended = self.run_phase(Phase::Cleanup)?;
        let name = if ended.code == 0 { "cleanup_success" } else { "cleanup_fail" };
        let why = if ended.code == 0 {
            String::new()
        } else {
            describe_exception(&self.place.rundir, Phase::Cleanup)
        };
        self.event(name, why);
        self.event("job_end", detail.unwrap_or_else(|| "normal_exit".into()));
        let left = Mark::Job(self.job.id().to_owned()).end();
        if left > 0 {
            self.agent.log.warning(format!("Ended {left} processes that job {} left", self.job.id()));
        }
        self.memo.ended = true;
        let saved = self.save();
        self.outbox.secure(PATIENCE);
        let Self { agent, job, place, memo, outbox, after, .. } = self;
        if !outbox.finish() {
            agent.log.warning(format!("Not all of job {} could be told; it is resent later", job.id()));
        }
        if !saved {
            // What was delivered has left room.
            let outcome = results::Outcome::of(&memo.statuses);
            if let Err(error) = place.save(&memo).and_then(|()| outcome.write(&place)) {
                agent.log.error(format!("Statuses of job {} are not on disk: {error:#}", job.id()));
            }
        }
        if let Err(error) = results::hand_in(agent, &place, &memo) {
            agent.log.error(format!("Job {}: {error:#}", job.id()));
        }
        agent.log.info(format!("Job {} has ended", job.id()));
        Some(after)
    }

    pub(super) fn event(&mut self, name: &str, detail: impl Into<String>) {
        let event = Event { event_name: name.into(), timestamp: now(), detail: detail.into() };
        self.memo.events.push(event);
        self.save();
        if self.job.webhook().is_some() {
            self.outbox.post(Post::Events(self.memo.events.clone()));
        }
    }

    /// Notes the status of a phase, and tells it.
    pub(super) fn record(&mut self, phase: Phase, code: u8) {
        self.memo.statuses.insert(phase, code);
        self.save();
        if let Err(error) = self.write_outcome() {
            self.agent.log.warning(format!("{error:#}"));
        }
        let status = Some(self.memo.statuses.clone());
        self.outbox.post(Post::Result(ResultUpdate { status, ..ResultUpdate::default() }));
    }

    fn write_outcome(&self) -> Result<()> {
        results::Outcome::of(&self.memo.statuses).write(&self.place)
    }

    /// False when it is not on disk.
    fn save(&self) -> bool {
        let saved = self.place.save(&self.memo);
        if let Err(error) = &saved {
            self.agent.log.warning(format!("A crash now would lose some of the job: {error:#}"));
        }
        saved.is_ok()
    }

    fn measure(&self, phase: Phase, begun: Instant, code: u8) {
        let agent = &self.agent.config.agent_id;
        if code != 0 {
            self.agent.metrics.failure(agent, phase.name());
        }
        let identifier = self.agent.config.identifier.clone().unwrap_or_default();
        let seconds = begun.elapsed().as_secs();
        release::measure(self, phase, code, move |metrics, agent, release| {
            metrics.duration(agent, phase.name(), &identifier, release, seconds);
        });
    }

    /// How much of the job's time is left, and how much it had.
    pub(super) fn limit(&self, phase: Phase) -> Option<(Instant, u64)> {
        let limit = self.agent.config.global_limit(self.job.global_timeout());
        let from = match phase {
            // Its length is in its data.
            Phase::Reserve => return None,
            // It must run however long the others took.
            Phase::Cleanup => Instant::now(),
            _ => self.begun,
        };
        Some((from.checked_add(Duration::from_secs(limit))?, limit))
    }

    /// Shows the user a text of ours, in the log of a phase.
    pub(super) fn print(&self, phase: Phase, text: &str) {
        use std::io::Write;
        if let Ok(mut file) = place::append(&self.place.rundir.join(format!("{phase}.log"))) {
            let _ = file.write_all(text.as_bytes());
        }
        self.outbox.text(Log::Output, phase, text.to_owned());
    }
}
