//! What is done for one machine: one try each, of which any may fail and be tried again.

use super::outcome::{self, Outcome};
use super::pack::{Archive, Packs};
use super::store::{Ended, HW_STATUS, Job, OUTPUT, Stage, Store, log_of};
use super::{Trouble, hw_status};
use crate::fault::Fault;
use crate::record::metadata::Utc;
use crate::testflinger::client::{Client, Error, JobResult, PhaseResult};
use crate::testflinger::template::Template;
use crate::testflinger::wire::{Phase, job_state};
use serde_json::Value;
use std::borrow::Cow;

/// Of what the phases of a job print, more than this is of no use, and would not fit into memory.
const LARGEST_LOGS: u64 = 32 << 20;

/// What all workers share.
#[derive(Debug)]
pub(super) struct Shop {
    pub(super) client: Client,
    pub(super) store: Store,
    /// Of a run that only watches there is none.
    pub(super) template: Option<Template>,
    pub(super) packs: Packs,
    pub(super) wait_for_agents: bool,
}

type Done<T = ()> = Result<T, Trouble>;

impl Shop {
    /// Brings a job as far as it goes: on the server with all that belongs to it.
    pub(super) fn send(&self, job: &mut Job) -> Done {
        let template = self.template.as_ref().ok_or_else(|| {
            Trouble::lasting(
                Fault::host("its submission was interrupted")
                    .fix("`shakedown jobs` without `--check-status`"),
            )
        })?;
        let filled = template.fill(&job.machine).map_err(Trouble::Lasting)?;
        // Before anything is sent: files that cannot be read are found out now.
        let archive = filled.wants_upload.then(|| self.packs.get(&filled.attachments)).transpose();
        let archive = archive.map_err(Trouble::Lasting)?;
        let mut body = filled.job;
        match job.stage {
            Stage::Planned => {
                self.check_queue(&body)?;
                job.asks_for_test = asks_for_test(&body);
                job.stage = Stage::Intended;
                job.submitted_at = Utc::now();
                self.store.save(job).map_err(Trouble::Here)?;
                self.submit(job, &mut body)?;
            }
            // The answer to an earlier try was lost, or nobody was left to hear it.
            Stage::Intended if self.client.job(&job.job_id)?.is_none() => self.submit(job, &mut body)?,
            Stage::Intended | Stage::Submitted | Stage::Queued => {}
        }
        if job.stage == Stage::Intended {
            job.stage = Stage::Submitted;
            job.before = None;
        }
        self.store.clear(&job.machine).and_then(|()| self.store.write_id(job)).map_err(Trouble::Here)?;
        self.store.save(job).map_err(Trouble::Here)?;
        if let Some(archive) = archive {
            self.attach(job, &archive)?;
        }
        job.stage = Stage::Queued;
        self.store.save(job).map_err(Trouble::Here)
    }

    fn submit(&self, job: &mut Job, body: &mut serde_json::Map<String, Value>) -> Done {
        body.insert("job_id".into(), job.job_id.clone().into());
        if let Some(Value::Array(tags)) = body.get_mut("tags") {
            tags.push(job.run.clone().into());
        }
        match self.client.submit(body) {
            // A server that chooses ids itself.
            Ok(id) if uuid::Uuid::try_parse(&id).is_ok() => {
                job.job_id = id;
                Ok(())
            }
            Ok(_) => Err(Trouble::lasting(Fault::host("the server gave the job an id that is no UUID"))),
            Err(error) if error.is_ambiguous() || error.is_passing() => Err(Trouble::Passing(error.into())),
            Err(error) => {
                self.store.forget(job).map_err(Trouble::Here)?;
                job.stage = Stage::Planned;
                Err(Trouble::Lasting(error.into()))
            }
        }
    }

    /// A job in a queue that nobody serves would wait for a week.
    fn check_queue(&self, job: &serde_json::Map<String, Value>) -> Done {
        let queue = job.get("job_queue").and_then(Value::as_str).unwrap_or_default();
        let Some(agents) = self.client.agents_of(queue)? else {
            let fault = Fault::host(format!("the server knows no queue {queue}"));
            return Err(Trouble::lasting(fault.fix("correct the name in the machines file or the template")));
        };
        let excluded = job.get("exclude_agents").and_then(Value::as_array);
        let is_excluded = |name: &str| excluded.is_some_and(|list| list.iter().any(|other| other == name));
        if self.wait_for_agents || agents.iter().any(|a| a.works() && !is_excluded(&a.name)) {
            return Ok(());
        }
        let fault = Fault::host(format!("no agent of the queue {queue} is online"));
        Err(Trouble::lasting(fault.fix("give `--wait-for-available-agents` to submit all the same")))
    }

    /// A job whose attachments cannot be had would wait for a week as well: it is cancelled.
    fn attach(&self, job: &mut Job, archive: &Archive) -> Done {
        let Err(error) = self.client.send_attachments(&job.job_id, &archive.path()) else { return Ok(()) };
        if error.is_passing() {
            return Err(error.into());
        }
        let cancelled = match self.client.cancel(&job.job_id) {
            Ok(_) => "the job was cancelled".to_owned(),
            Err(cancel) => format!("and the job could not be cancelled: {cancel}"),
        };
        let reason = format!("its attachments could not be uploaded; {cancelled}: {error}");
        job.stage = Stage::Queued;
        job.ended = Some(ended(Outcome::Error, Some(reason)));
        Ok(())
    }

    /// The state of one job that a search did not find; `None` when the server does not have it.
    pub(super) fn state(&self, job: &Job) -> Done<Option<String>> {
        self.client.job_state(&job.job_id).map_err(watching)
    }

    /// Fetches the result of a job that has ended, keeps what is of use, and judges it; `None` when it
    /// goes on after all.
    pub(super) fn collect(&self, job: &Job) -> Done<Option<Ended>> {
        let Some(result) = self.client.result(&job.job_id, LARGEST_LOGS).map_err(watching)? else {
            return Ok(Some(expired()));
        };
        if !job_state::is_final(&result.state) {
            return Ok(None);
        }
        let (outcome, reason) = outcome::judge(&result, job.asks_for_test);
        let hw_status = self.keep(job, &result, outcome).map_err(Trouble::Here)?;
        let statuses = result.phases.iter().filter_map(|(phase, of)| Some((*phase, of.status?))).collect();
        let exit = outcome::exit(&result);
        Ok(Some(Ended { statuses, exit, hw_status, ..ended(outcome, reason) }))
    }

    fn keep(&self, job: &Job, result: &JobResult, outcome: Outcome) -> anyhow::Result<Option<String>> {
        // As in the original: of a job that was cancelled there is nothing to know.
        if outcome == Outcome::Cancelled {
            return Ok(None);
        }
        let output = result.phases.get(&Phase::Test).map(whole).unwrap_or_default();
        let found = hw_status::find(&output);
        for (phase, of) in &result.phases {
            if *phase != Phase::Test && of.status.is_some_and(|status| status != 0) {
                self.store.write(&job.machine, &log_of(*phase), &whole(of))?;
            }
        }
        self.store.write(&job.machine, HW_STATUS, found.as_deref().unwrap_or(hw_status::UNKNOWN))?;
        self.store.write(&job.machine, OUTPUT, &output)?;
        Ok(found)
    }
}

/// What a phase printed, saying so where it is not all of it.
fn whole(phase: &PhaseResult) -> Cow<'_, str> {
    if phase.is_cut {
        format!(
            "{}\n[the rest is left out: the job printed more than {} MiB]\n",
            phase.output,
            LARGEST_LOGS >> 20
        )
        .into()
    } else {
        phase.output.as_str().into()
    }
}

fn asks_for_test(job: &serde_json::Map<String, Value>) -> bool {
    let test = job.get("test_data").and_then(Value::as_object);
    // As an agent sees it, once the attachments are unpacked.
    test.is_some_and(|data| data.keys().any(|key| key != "attachments"))
}

fn ended(outcome: Outcome, reason: Option<String>) -> Ended {
    let (statuses, exit, hw_status) = Default::default();
    Ended { at: Utc::now(), outcome, reason, statuses, exit, hw_status }
}

/// The end of a job that the server does not have.
pub(super) fn expired() -> Ended {
    ended(Outcome::Expired, Some("the server does not have it: jobs are kept for seven days".into()))
}

/// The end of a job whose result cannot be had.
pub(super) fn lost(error: &anyhow::Error) -> Ended {
    ended(Outcome::Error, Some(format!("its result cannot be had: {error:#}")))
}

/// Who may not look at jobs any more has lost none: that ends the watch, and not the jobs.
fn watching(error: Error) -> Trouble {
    let refused = |error: &Error| matches!(error.status(), Some(401 | 403));
    match &error {
        Error::NoToken { source } if !source.is_passing() => Trouble::Here(refusal(error)),
        _ if refused(&error) => Trouble::Here(refusal(error)),
        _ => error.into(),
    }
}

/// Says what to do for a server that does not let us in.
pub(super) fn refusal(error: Error) -> anyhow::Error {
    if let Error::NoToken { source } = &error
        && matches!(**source, Error::Unsafe { .. })
    {
        // It was never asked.
        return error.into();
    }
    let fault = Fault::host("the server refuses us");
    anyhow::Error::new(error)
        .context(fault.fix("check `--server`, TESTFLINGER_CLIENT_ID and TESTFLINGER_SECRET_KEY"))
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        if error.is_passing() { Self::Passing(error.into()) } else { Self::Lasting(error.into()) }
    }
}
