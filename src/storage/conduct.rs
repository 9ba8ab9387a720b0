//! A layout from its seed to its verdicts, over any connection, with the evidence of every step.

use super::graph::Graph;
use super::layout::Layout;
use super::plan::{self, Ended, Evidence, Expect, Step};
use super::teardown::{self, Action};
use super::verify::{self, Level};
use crate::connection::{Cmd, Session};
use crate::fault::Fault;
use crate::record::Outcome;
use anyhow::Result;
use serde::Serialize;

/// What cleans.
#[derive(Clone, Debug)]
pub enum Cleaner {
    /// The steps of our own plan, in the order of the machine's block graph.
    Plan,
    /// A command line of the machine. It gets `--action ACTION DISK...`.
    Command(String),
    /// A POSIX script, given to the machine's `sh`, with the same arguments.
    Script(String),
}

/// What a level came to.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// What was looked at.
    pub level: Level,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not pass; for a pass, what was found although nothing had to be gone.
    pub reason: Option<String>,
}

impl Verdict {
    /// Failed when something was found.
    pub(super) fn of(level: Level, found: Vec<String>) -> Self {
        let outcome = if found.is_empty() { Outcome::Passed } else { Outcome::Failed };
        Self { level, outcome, reason: joined(found) }
    }
}

pub(super) fn joined(lines: Vec<String>) -> Option<String> {
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// Makes a layout on disks that are free for it.
///
/// # Errors
/// A host [`Fault`] when it cannot be made: nothing is said of any cleaner then. What was begun is
/// cleaned.
pub fn seed(session: &mut Session<'_>, layout: &Layout, disks: &[String]) -> Result<Evidence> {
    let evidence = layout.seed(disks).run(session)?;
    let Some(failure) = evidence.failure() else { return Ok(evidence) };
    let sweep = teardown::by_script(disks, Action::WipeSignatures);
    let swept = plan::run(session, &[Step::must("clean what was begun", sweep)])?;
    let swept = swept.failure().map(|failure| format!("\n{failure}")).unwrap_or_default();
    Err(Fault::host(format!("the layout {} cannot be made: {failure}{swept}", layout.name)).into())
}

/// Has a cleaner clean disks. That it fails is in the evidence.
///
/// # Errors
/// When the connection breaks or the machine hangs.
pub fn clean(
    session: &mut Session<'_>,
    disks: &[String],
    action: Action,
    cleaner: &Cleaner,
) -> Result<Evidence> {
    let arguments = format!("--action {action} {}", disks.join(" "));
    let (line, input) = match cleaner {
        Cleaner::Plan => {
            session.run(super::seed::SETTLE)?;
            let graph = Graph::of(session)?;
            return plan::run(session, &teardown::steps(&graph, disks, action));
        }
        Cleaner::Command(line) => (format!("{line} {arguments}"), ""),
        Cleaner::Script(text) => (format!("sh -s -- {arguments}"), &**text),
    };
    let output = session.run(Cmd::new(&line).stdin(input).allow_failure())?;
    let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    let step = Step { what: "the cleaner".into(), run: line, expect: Expect::Success };
    Ok(Evidence { steps: vec![Ended { step, status: Some(output.exit.status()), output: said }] })
}

/// Looks at the levels that need the machine running, after a cleaner that left `cleaned`.
///
/// # Errors
/// When the connection breaks or the machine hangs.
pub fn verify(
    session: &mut Session<'_>,
    layout: &Layout,
    disks: &[String],
    cleaned: &Evidence,
) -> Result<(Vec<Verdict>, Evidence)> {
    let looks = verify::gone(layout, disks);
    let at = looks.len();
    // In one shell: each costs an emulated machine some tenths of a second.
    let mut gone = plan::run(session, &[looks, verify::resurrect(layout, disks)].concat())?;
    let again = Evidence { steps: gone.steps.split_off(at) };
    let found: Vec<_> = gone.residue().into_iter().chain(gone.failure()).chain(cleaned.failure()).collect();
    let is_gone = Verdict::of(Level::Gone, found);
    let level = Level::NotResurrectable;
    // What failed among the looks kept the rest from being tried.
    let stays_away = match (again.residue(), again.failure().or_else(|| gone.failure())) {
        (found, _) if !found.is_empty() => Verdict::of(level, [again.made(), found].concat()),
        (_, None) => Verdict::of(level, Vec::new()),
        // Where something is left, it may be in the way.
        (_, Some(failure)) if is_gone.outcome == Outcome::Failed => Verdict::of(level, vec![failure]),
        (_, Some(failure)) => Verdict { level, outcome: Outcome::Error, reason: Some(failure) },
    };
    gone.steps.extend(again.steps);
    Ok((vec![is_gone, stays_away], gone))
}
