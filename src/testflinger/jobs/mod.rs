//! The job client: one job for each machine of a list, submitted, watched and judged.
//!
//! Owns the machines file, the output directory and what a job's result means. Talks to
//! the server through [`client`](super::client); showing anything to anybody is the caller's business.
//!
//! One thread decides ([`run()`]); a few workers wait for the network, so that it is always free to hear
//! Ctrl-C. What is about to be done is on disk before it is done: a process that is killed at any point
//! is continued by the next one.

mod crew;
mod drive;
pub mod hw_status;
pub mod machines;
pub mod outcome;
mod pack;
mod plan;
mod record;
mod retry;
mod store;
mod work;

pub use drive::run;
pub use outcome::Outcome;

use super::client::Login;
use super::wire::Phase;
use crate::fault::Fault;
use crate::record::Environment;
use crate::record::metadata::Utc;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Submit what is not submitted yet.
    pub send: bool,
    /// Wait for the ends of jobs.
    pub watch: bool,
    /// See [`machines`]. Read for submissions only.
    pub machines_file: PathBuf,
    /// See [`template`](super::template). Read for submissions only.
    pub template_file: PathBuf,
    /// Where a directory for each machine is.
    pub output_dir: PathBuf,
    /// How long between two questions for the states of all jobs.
    pub poll_interval: Duration,
    /// The server that was asked for.
    pub server: Option<String>,
    /// The server of a run that begins, where none was asked for.
    pub default_server: String,
    /// Who submits; `None` for anybody.
    pub login: Option<Login>,
    /// How often a machine gets another job when it could not be provisioned.
    pub retry_provision: u32,
    /// Submit to queues whose agents are all offline too.
    pub wait_for_agents: bool,
    /// Begin a run even where one was interrupted.
    pub new_run: bool,
    /// Where runs and the ledger are.
    pub environment: Environment,
}

/// A machines file or a template that makes no sense. What is wrong is in the chain below it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongInput(String);

/// Something that happened, for who watches.
#[derive(Clone, Debug)]
pub enum News {
    /// It begins, or goes on.
    Begun {
        /// All of them, as they are known so far.
        rows: Vec<Row>,
        /// When it began that goes on.
        resumed: Option<Utc>,
    },
    /// Something is other than before: submitted, in another state, ended, given up.
    Changed(Row),
    /// The server is in trouble; all is tried again.
    Trouble {
        /// What was attempted, and why it failed.
        what: String,
        /// Until the next try.
        wait: Duration,
    },
    /// Some time has passed.
    Tick,
}

/// What is known of a machine's job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The machine.
    pub machine: String,
    /// Its job; none as long as nothing was submitted.
    pub job_id: Option<String>,
    /// 1 for the first job of the machine in this run.
    pub attempt: u32,
    /// As the server last said, or `submitted`; none as long as nothing was submitted.
    pub state: Option<String>,
    /// How it ended; none as long as it has not. A job that could not be submitted is an error.
    pub outcome: Option<Outcome>,
    /// Why, for every outcome but `passed`.
    pub reason: Option<String>,
    /// Exit statuses of phases.
    pub statuses: BTreeMap<Phase, i64>,
    /// The largest of those that say something about the machine.
    pub exit_status: Option<i64>,
    /// What the test said of the hardware.
    pub hw_status: Option<String>,
    /// From the submission to the end.
    pub seconds: Option<f64>,
    /// Earlier jobs of the machine.
    pub previous_jobs: Vec<String>,
    /// Where its files are.
    pub directory: PathBuf,
}

/// What it came to.
#[derive(Debug)]
pub struct Report {
    /// The tag that all jobs of the run have.
    pub run: String,
    /// Where they are.
    pub server: String,
    /// One for each machine.
    pub rows: Vec<Row>,
    /// What could not be recorded.
    pub problem: Option<anyhow::Error>,
}

/// Why something did not work.
#[derive(Debug)]
enum Trouble {
    /// The same may work later.
    Passing(anyhow::Error),
    /// It will not work.
    Lasting(anyhow::Error),
    /// Nothing will work: this host cannot keep what must not be lost.
    Here(anyhow::Error),
}

impl Trouble {
    fn lasting(fault: Fault) -> Self {
        Self::Lasting(fault.into())
    }
}
