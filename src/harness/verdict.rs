//! From how a body ended to an outcome and to the text a person reads.

use crate::deadline::{Deadline, Stop};
use crate::fault::{Blame, blame, visible};
use crate::process;
use crate::record::Outcome;
use crate::vm::Death;
use anyhow::{Error, Result};
use std::io;

/// An outcome and why. A passed scenario has no message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    pub(crate) message: String,
}

/// What was going on when an error that blames nobody came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Evidence, image, slot, boot: our work.
    Setup,
    /// The scenario's own function: what it says is about the machine.
    Body,
}

impl Phase {
    fn unblamed(self) -> Outcome {
        match self {
            Self::Setup => Outcome::Error,
            Self::Body => Outcome::Failed,
        }
    }
}

impl Verdict {
    pub(crate) fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        // Some of it may be a guest's words.
        Self { outcome, message: visible(&message.into()) }
    }

    /// Judges the end of a phase: `Err` is the message of a panic.
    pub(crate) fn of(phase: Phase, result: Result<Result<()>, String>) -> Self {
        match result {
            Ok(result) => Self::of_result(phase, &result),
            // A panic when everything is being torn down says nothing about the machine.
            Err(message) if process::interrupted() => Self::new(Outcome::Interrupted, message),
            Err(message) => Self::new(phase.unblamed(), message),
        }
    }

    /// Judges the end of a phase that did not panic.
    pub(crate) fn of_result<T>(phase: Phase, result: &Result<T>) -> Self {
        let Err(error) = result else { return Self::new(Outcome::Passed, "") };
        let outcome = match blame(error) {
            _ if process::interrupted() || interrupted(error) => Outcome::Interrupted,
            Some(Blame::Machine) => Outcome::Failed,
            Some(Blame::Host) => Outcome::Error,
            None => phase.unblamed(),
        };
        Self::new(outcome, explain(error))
    }

    /// The same, given how the machine died meanwhile. A scenario may be about a guest that powers
    /// itself off; with a QEMU that broke nothing has passed, and nothing that failed says why.
    pub(crate) fn after(mut self, death: &Death) -> Self {
        let outcome = match (self.outcome, death) {
            (Outcome::Interrupted, _) | (Outcome::Passed, Death::PoweredOff) => return self,
            (_, Death::PoweredOff | Death::Restarted) => Outcome::Failed,
            (_, Death::Broke(_)) => Outcome::Error,
        };
        let cause = death.to_string();
        if !self.message.contains(&cause) {
            let separator = if self.message.is_empty() { "" } else { "\nseen as: " };
            self.message = format!("{cause}{separator}{}", self.message);
        }
        Self { outcome, ..self }
    }

    /// The same, when it could not be put on record: without a record nothing has passed.
    pub(crate) fn but(mut self, error: Error) -> Self {
        if matches!(self.outcome, Outcome::Passed | Outcome::Ignored | Outcome::Deferred) {
            self.outcome = Outcome::Error;
        }
        let error = explain(&error.context("cannot put the outcome on record"));
        self.message = if self.message.is_empty() { error } else { format!("{}\n{error}", self.message) };
        self
    }

    /// The same, but a body that ended well too late has failed.
    pub(crate) fn in_time(self, deadline: &Deadline) -> Self {
        if self.outcome == Outcome::Passed && deadline.expired() {
            Self::new(Outcome::Failed, deadline.expiry().to_string())
        } else {
            self
        }
    }
}

fn interrupted(error: &Error) -> bool {
    let is = |stop: Option<&Stop>| matches!(stop, Some(Stop::Interrupted));
    is(error.downcast_ref()) || error.chain().any(|cause| is(cause.downcast_ref()))
}

const FULL: &str = "Fix: free space on that file system (where it is the cache's: `shakedown template prune --older-than 0s`, and the \
                    same for `image`; old directories in notes/ may be deleted), or set BOOT_IMAGE_VM_LOG_ROOT or SHAKEDOWN_CACHE \
                    to a place that has it";

fn is_full(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::StorageFull)
}

/// The chain of an error, outermost first, one link a line; the fixes at the end.
pub(crate) fn explain(error: &Error) -> String {
    let mut links: Vec<String> = Vec::new();
    let mut fixes: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Ours is always the last line; what a guest says may look like one.
        let (link, fix) = match text.rsplit_once('\n') {
            Some((link, fix)) if fix.starts_with("Fix: ") => (link.to_owned(), Some(fix)),
            _ => (text.clone(), None),
        };
        // Errors that print their source have said it already.
        if !links.last().is_some_and(|last| last.contains(&link)) {
            links.push(link);
        }
        fixes.extend(fix.map(str::to_owned));
    }
    let mut text = links.join("\ncaused by: ");
    // It can meet any write, and the way out is always the same.
    if fixes.is_empty() && error.chain().any(is_full) {
        fixes.push(FULL.to_owned());
    }
    for fix in fixes {
        text = format!("{text}\n{fix}");
    }
    visible(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Fault;
    use anyhow::{Context, anyhow};
    use std::time::Duration;

    fn outcome(phase: Phase, error: impl Into<Error>) -> Outcome {
        Verdict::of(phase, Ok(Err(error.into()))).outcome
    }

    #[test]
    fn blame_decides_and_else_the_phase() {
        use Phase::{Body, Setup};
        assert_eq!(outcome(Body, anyhow!("3 disks, not 2")), Outcome::Failed);
        assert_eq!(outcome(Setup, anyhow!("no such file")), Outcome::Error);
        assert_eq!(outcome(Setup, Fault::machine("no login prompt")), Outcome::Failed);
        assert_eq!(outcome(Body, Fault::host("disk full")), Outcome::Error);
        assert_eq!(outcome(Body, Stop::Interrupted), Outcome::Interrupted);
        assert_eq!(outcome(Body, Error::new(Stop::Interrupted).context("booting")), Outcome::Interrupted);
        assert_eq!(Verdict::of(Body, Err("boom".into())).outcome, Outcome::Failed);
        assert_eq!(Verdict::of(Setup, Err("boom".into())).outcome, Outcome::Error);
    }

    #[test]
    fn a_death_of_the_machine_decides() {
        let broke = Death::Broke("QEMU ended with signal 9".into());
        let verdict = Verdict::new(Outcome::Failed, "no answer").after(&broke);
        assert_eq!(verdict, Verdict::new(Outcome::Error, "QEMU ended with signal 9\nseen as: no answer"));
        assert_eq!(verdict.clone().after(&broke), verdict, "said once");
        assert_eq!(Verdict::new(Outcome::Passed, "").after(&broke).outcome, Outcome::Error);
        assert_eq!(Verdict::new(Outcome::Interrupted, "").after(&broke).outcome, Outcome::Interrupted);
        assert_eq!(Verdict::new(Outcome::Passed, "").after(&Death::PoweredOff).outcome, Outcome::Passed);
        let broken = Verdict::new(Outcome::Error, "the connection broke").after(&Death::PoweredOff);
        assert_eq!(broken.outcome, Outcome::Failed);
    }

    #[test]
    fn success_after_the_deadline_is_a_failure() {
        let passed = || Verdict::of(Phase::Body, Ok(Ok(())));
        let over = Deadline::after(Duration::ZERO, "scenario timeout");
        let verdict = passed().in_time(&over);
        assert_eq!(verdict.outcome, Outcome::Failed);
        assert_eq!(verdict.message, "no answer within 0 s (scenario timeout)");
        let ample = Deadline::after(Duration::from_secs(3600), "scenario timeout");
        assert_eq!(passed().in_time(&ample).outcome, Outcome::Passed);
    }

    #[test]
    fn the_chain_reads_downwards_and_ends_with_the_fix() {
        let io = std::io::Error::other("disk full");
        let error = Err::<(), _>(io)
            .context(Fault::host("cannot write overlay").fix("free some space"))
            .context("booting")
            .expect_err("is an error");
        assert_eq!(
            explain(&error),
            "booting\ncaused by: cannot write overlay\ncaused by: disk full\nFix: free some space"
        );
    }
}
