//! How a job ended: from the exit statuses of its phases, not from its state, which is `complete`
//! whatever happened.

use crate::fault::visible;
use crate::record::metadata;
use crate::testflinger::client::JobResult;
use crate::testflinger::wire::{Phase, job_state};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All phases ended with 0.
    Passed,
    /// The test or the update of the firmware failed: the machine misbehaved.
    Failed,
    /// The machine could not be provisioned: the test never ran.
    ProvisionFailed,
    /// Someone cancelled it.
    Cancelled,
    /// The server no longer knows it.
    Expired,
    /// Anything else: the lab or we failed.
    Error,
}

impl Outcome {
    /// Its name in files, and for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::ProvisionFailed => "provision_failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Error => "error",
        }
    }

    /// The same in the words of the ledger.
    pub const fn in_ledger(self) -> metadata::Outcome {
        match self {
            Self::Passed => metadata::Outcome::Passed,
            Self::Failed => metadata::Outcome::Failed,
            Self::Cancelled => metadata::Outcome::Interrupted,
            Self::ProvisionFailed | Self::Expired | Self::Error => metadata::Outcome::Error,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name().replace('_', " "))
    }
}

/// What the agents of Testflinger print as the last line of a phase that was cancelled. The original
/// one then says that the job is complete.
const CANCELLED: &str = "Job cancellation was requested, exiting.";

/// Judges a job that has ended, and says why; `test`: whether it asks for the test phase.
pub fn judge(result: &JobResult, test: bool) -> (Outcome, Option<String>) {
    if result.state == job_state::CANCELLED {
        return (Outcome::Cancelled, Some("it was cancelled".into()));
    }
    let status = |phase| result.phases.get(&phase).and_then(|phase| phase.status);
    // Cleanup says nothing about the machine. A failed setup does: nothing ran after it.
    let failed = Phase::ALL
        .into_iter()
        .filter(|phase| *phase != Phase::Cleanup)
        .find_map(|phase| status(phase).filter(|status| *status != 0).map(|status| (phase, status)));
    if let Some((phase, status)) = failed {
        let last = Some(&result.phases[&phase]).filter(|of| !of.is_cut).and_then(|of| last_line(&of.output));
        if last.as_deref() == Some(CANCELLED) {
            return (Outcome::Cancelled, Some(format!("it was cancelled during {phase}")));
        }
        let outcome = match phase {
            Phase::Provision => Outcome::ProvisionFailed,
            Phase::Test | Phase::FirmwareUpdate => Outcome::Failed,
            _ => Outcome::Error,
        };
        let last = last.map(|line| format!(": {line}")).unwrap_or_default();
        return (outcome, Some(format!("{phase} ended with {status}{last}")));
    }
    if test && status(Phase::Test).is_none() {
        return (Outcome::Error, Some("the test phase never ran, and no other failed".into()));
    }
    if Phase::ALL.into_iter().all(|phase| phase == Phase::Cleanup || status(phase).is_none()) {
        return (Outcome::Error, Some("no phase ran".into()));
    }
    (Outcome::Passed, None)
}

/// The largest exit status of the phases that count: neither setup nor cleanup.
pub fn exit(result: &JobResult) -> Option<i64> {
    let counts = |phase: &Phase| !matches!(phase, Phase::Setup | Phase::Cleanup);
    result.phases.iter().filter(|(phase, _)| counts(phase)).filter_map(|(_, result)| result.status).max()
}

/// The last line that says something, short and harmless. The banner at the top says nothing.
fn last_line(output: &str) -> Option<String> {
    let is_banner = |line: &str| line.starts_with('*') && line.ends_with('*');
    let line = output.lines().rev().map(str::trim).find(|line| !line.is_empty() && !is_banner(line))?;
    let mut short: String = visible(line).chars().take(160).collect();
    if short.len() < line.len() {
        short.push('…');
    }
    Some(short)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testflinger::client::PhaseResult;

    fn result(state: &str, statuses: &[(Phase, i64, &str)]) -> JobResult {
        let phases = statuses.iter().map(|(phase, status, output)| {
            let output = (*output).to_owned();
            (*phase, PhaseResult { status: Some(*status), output, ..PhaseResult::default() })
        });
        JobResult { state: state.into(), phases: phases.collect() }
    }

    #[test]
    fn the_phases_say_how_it_ended() {
        use Outcome::{Cancelled, Error, Failed, Passed, ProvisionFailed};
        use Phase::{Cleanup, FirmwareUpdate, Provision, Reserve, Setup, Test};
        for (statuses, outcome, why) in [
            (&[(Provision, 0, ""), (Test, 0, ""), (Cleanup, 1, "")][..], Passed, ""),
            (&[(Provision, 0, ""), (Test, 3, "a\nb\n\n"), (Reserve, 1, "")], Failed, "test ended with 3: b"),
            (
                &[(Provision, 46, "***\n* Starting testflinger provision phase on a *\n***\n")],
                ProvisionFailed,
                "provision ended with 46",
            ),
            (&[(FirmwareUpdate, 1, ""), (Test, 0, "")], Failed, "firmware_update ended with 1"),
            (&[(Setup, 1, "no power")], Error, "setup ended with 1: no power"),
            (&[(Test, 0, ""), (Reserve, 2, "")], Error, "reserve ended with 2"),
            (&[(Setup, 0, ""), (Provision, 0, "")], Error, "the test phase never ran, and no other failed"),
            (&[], Error, "the test phase never ran, and no other failed"),
            (
                &[(Test, 247, "x\nJob cancellation was requested, exiting.\n")],
                Cancelled,
                "it was cancelled during test",
            ),
        ] {
            let (judged, reason) = judge(&result("complete", statuses), true);
            assert_eq!((judged, reason.unwrap_or_default().as_str()), (outcome, why), "{statuses:?}");
        }
        assert_eq!(judge(&result("cancelled", &[(Test, 0, "")]), true).0, Cancelled);
        assert_eq!(judge(&result("complete", &[(Provision, 0, "")]), false).0, Passed);
        assert_eq!(judge(&result("complete", &[(Cleanup, 0, "")]), false).0, Error, "nothing ran");
    }

    #[test]
    fn only_phases_about_the_machine_make_the_exit_status() {
        use Phase::{Cleanup, Provision, Setup, Test};
        let result =
            result("complete", &[(Setup, 9, ""), (Provision, 0, ""), (Test, 3, ""), (Cleanup, 8, "")]);
        assert_eq!(exit(&result), Some(3));
        assert_eq!(exit(&JobResult::default()), None);
    }

    #[test]
    fn a_last_line_cannot_flood_or_command_a_terminal() {
        let line = last_line(&("x\u{1b}[2J".to_owned() + &"y".repeat(1000) + "\n \n")).expect("a line");
        assert!(!line.contains('\u{1b}') && line.chars().count() <= 161, "{line}");
    }

    #[test]
    fn names_in_files_are_those_of_the_code() {
        for outcome in [Outcome::Passed, Outcome::ProvisionFailed, Outcome::Expired] {
            assert_eq!(serde_json::json!(outcome), outcome.name());
        }
    }
}
