//! The end of a job: artifacts and outcome go to the server, and what cannot go waits in
//! `results_basedir` until it can. Either agent, this one and the original, sends what the other left.

use super::job::{INTERNAL, line};
use super::outbox::{Outbox, chain};
use super::place::{self, Memo, Place, move_dir, read_job};
use super::spool::Cursor;
use super::{Agent, artifacts};
use crate::record::files;
use crate::testflinger::client::Error;
use crate::testflinger::wire::{Job, Log, Phase, ResultUpdate, Statuses, job_state};
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// The statuses of a job's phases, for its commands and for the other agent.
pub(super) const OUTCOME: &str = "testflinger-outcome.json";

/// Where results go that can never be sent.
const QUARANTINE: &str = "quarantine";

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    #[serde(default, skip_serializing_if = "Statuses::is_empty")]
    status: Statuses,
}

impl Outcome {
    pub(super) fn of(statuses: &Statuses) -> Self {
        Self { status: statuses.clone() }
    }

    pub(super) fn write(&self, place: &Place) -> Result<()> {
        place::write_python_json(&place.rundir.join(OUTCOME), self)
    }
}

/// What became of an attempt to send.
enum Sent {
    All,
    /// The outcome is there, and something cannot ever be.
    Partly(anyhow::Error),
}

/// Sends what a job left, or lays it aside.
pub(super) fn hand_in(agent: &Agent, place: &Place, memo: &Memo) -> Result<()> {
    let job = place.job()?;
    match send(agent, place, &job, Some(memo), true) {
        Ok(Sent::All) => place.remove(),
        Ok(Sent::Partly(error)) => quarantine(agent, place, job.id(), &error),
        Err(error) => {
            agent.log.warning(format!("The results of job {} wait: {error:#}", job.id()));
            place.move_to(&agent.config.results_basedir.join(job.id()))
        }
    }
}

/// Sends what waits.
pub(super) fn resend(agent: &Agent) -> Result<()> {
    let basedir = &agent.config.results_basedir;
    let mut dirs: Vec<_> = match fs::read_dir(basedir) {
        Ok(entries) => entries.flatten().filter(|entry| entry.path().is_dir()).collect(),
        Err(_) => return Ok(()),
    };
    dirs.sort_by_key(fs::DirEntry::file_name);
    // A part is what is being copied here, or was when its agent died: the whole is elsewhere.
    let is_whole = |dir: &&fs::DirEntry| {
        dir.file_name() != QUARANTINE && dir.path().extension() != Some("part".as_ref())
    };
    for dir in dirs.iter().filter(is_whole) {
        let place = Place::waiting(&dir.path());
        let name = dir.file_name().to_string_lossy().into_owned();
        if place.memo().is_ok_and(|memo| memo.agent_id != agent.config.agent_id) {
            // Of another agent on this host, which sends it itself.
            continue;
        }
        let job = match place.job().or_else(|_| read_job(&dir.path().join("testflinger.json"))) {
            Ok(job) => job,
            // As it is while another agent moves it here.
            Err(error) if young(&dir.path()) => {
                agent.log.debug(format!("{name}: {error:#}"));
                continue;
            }
            Err(error) => {
                quarantine(agent, &place, &name, &error)?;
                continue;
            }
        };
        match send(agent, &place, &job, place.memo().ok().as_ref(), false) {
            Ok(Sent::All) => {
                place.remove()?;
                agent.log.info(format!("Sent the results of job {} that had waited", job.id()));
            }
            Ok(Sent::Partly(error)) => quarantine(agent, &place, &name, &error)?,
            // The others may fare better: the server may dislike just this one.
            Err(error) => agent.log.debug(format!("The results of job {name} wait: {error:#}")),
        }
    }
    Ok(())
}

/// An error means that it may succeed later.
fn send(agent: &Agent, place: &Place, job: &Job, memo: Option<&Memo>, insist: bool) -> Result<Sent> {
    let mut partly = None;
    if place.state.exists() {
        say(agent, place, job, None)?;
    }
    if let Err(error) = send_artifacts(agent, place, job, insist)? {
        agent.log.error(format!("Job {}: {error:#}", job.id()));
        if place.state.exists() {
            say(agent, place, job, Some(format!("\nERROR: {error:#}\n")))?;
        }
        partly = Some(error);
    }
    let status = match memo {
        Some(memo) => memo.statuses.clone(),
        // Of the other agent, or of one of its jobs that had not one phase.
        None => files::read_json::<Outcome>(&place.rundir.join(OUTCOME))
            .map(|outcome| outcome.status)
            .unwrap_or_default(),
    };
    let asked = match agent.ask(insist, |client| client.job_state(job.id())) {
        Err(error) if error.is_outage() => return Err(anyhow!(chain(&error))),
        other => other.ok().flatten(),
    };
    let cancelled = memo.is_some_and(|memo| memo.cancelled) || asked.as_deref() == Some(job_state::CANCELLED);
    let state = if cancelled { job_state::CANCELLED } else { job_state::COMPLETE };
    let update = ResultUpdate {
        status: Some(status).filter(|status| !status.is_empty()),
        job_state: Some(state.into()),
        device_info: None,
    };
    match agent.ask(insist, |client| client.update_result(job.id(), &update)) {
        Ok(()) => Ok(partly.map_or(Sent::All, Sent::Partly)),
        Err(error) if error.is_outage() => Err(anyhow!(chain(&error))),
        Err(error) => Ok(Sent::Partly(anyhow!(chain(&error)))),
    }
}

/// Delivers what is in the spool, and `more`.
fn say(agent: &Agent, place: &Place, job: &Job, more: Option<String>) -> Result<()> {
    let outbox = Outbox::start(&place.state, line(agent, job))?;
    if let Some(text) = more {
        outbox.text(Log::Output, Phase::Cleanup, text);
    }
    if outbox.finish() { Ok(()) } else { Err(anyhow!("the server does not take the rest of its log")) }
}

/// The outer error may pass, the inner one may not.
fn send_artifacts(agent: &Agent, place: &Place, job: &Job, insist: bool) -> Result<Result<()>> {
    if !artifacts::are_in(&place.rundir) {
        return Ok(Ok(()));
    }
    let archive = place.rundir.join("artifacts.tar.gz");
    if let Err(error) = artifacts::pack(&place.rundir, &archive) {
        let _ = fs::remove_file(&archive);
        let full = error.chain().any(|e| {
            e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::StorageFull)
        });
        let error = error.context("The artifacts could not be packed");
        return if full { Err(error) } else { Ok(Err(error)) };
    }
    let sent = agent.ask(insist, |client| client.send_artifacts(job.id(), &archive));
    let _ = fs::remove_file(&archive);
    match sent {
        Ok(()) => {
            // Only now: they are never deleted unsent.
            let artifacts = place.rundir.join(artifacts::NAME);
            fs::remove_dir_all(&artifacts).with_context(|| files::cannot("remove", &artifacts)).map(Ok)
        }
        Err(error) if error.is_outage() => Err(anyhow!(chain(&error)).context("the artifacts were not sent")),
        Err(error) => Ok(Err(anyhow!(chain(&error)).context("The artifacts could not be stored"))),
    }
}

fn quarantine(agent: &Agent, place: &Place, name: &str, why: &anyhow::Error) -> Result<()> {
    let to = agent.config.results_basedir.join(QUARANTINE).join(name);
    agent.log.error(format!(
        "{} cannot be sent and is kept in {}: {why:#}",
        place.rundir.display(),
        to.display()
    ));
    if place.state.starts_with(&place.rundir) { move_dir(&place.rundir, &to) } else { place.move_to(&to) }
}

/// True for a directory that was made a moment ago.
fn young(dir: &Path) -> bool {
    let age = fs::metadata(dir).ok().and_then(|meta| meta.modified().ok()?.elapsed().ok());
    age.is_some_and(|age| age < Duration::from_secs(60))
}

/// Takes over a job that the original agent left when it died, for [`super::job::resume`].
pub(super) fn adopt(agent: &Agent, place: &Place, phase: Option<Phase>) -> Result<()> {
    let job = read_job(&place.rundir.join("testflinger.json"))?;
    let statuses = place::read_object(&place.rundir.join(OUTCOME))
        .and_then(|outcome| serde_json::from_value::<Outcome>(outcome.into()).ok())
        .unwrap_or_default()
        .status;
    let memo = Memo { agent_id: agent.config.agent_id.clone(), phase, statuses, ..Memo::default() };
    place.make_ours(&job, &memo)?;
    Cursor::after_another(&place.state)
}

/// Ends a job of ours of which nothing is left here.
pub(super) fn tell_lost(agent: &Agent, job: &str, phase: Option<Phase>) -> Result<(), Error> {
    let status = phase.map(|phase| [(phase, INTERNAL)].into());
    let update = ResultUpdate { status, job_state: Some(job_state::COMPLETE.into()), device_info: None };
    match agent.client.update_result(job, &update) {
        Err(error) if error.is_outage() => Err(error),
        other => {
            if let Err(error) = other {
                agent.log.error(chain(&error));
            }
            Ok(())
        }
    }
}
