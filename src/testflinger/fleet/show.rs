//! What is told to who watches a run.

use crate::record::{Outcome, Record};
use serde::{Deserialize, Serialize};

/// A verdict as the table shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

impl Row {
    /// Of a record that is one of the run's.
    pub(super) fn of(record: Record, agent: Option<String>) -> Self {
        Self {
            outcome: record.outcome,
            seconds: record.duration_seconds,
            host: agent.unwrap_or(record.host.hostname),
            reason: record.reason,
        }
    }
}

/// Something that happened.
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
