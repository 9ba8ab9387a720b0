//! One execution of a scenario: a thread of its own, watched until its deadline.
//!
//! The body may block where it never looks at its deadline. So it is not trusted to end: past the
//! deadline it gets a moment, then its machine is killed (every wait on a machine ends with it),
//! then its thread is left behind and the run goes on. What a left-behind thread holds ends with
//! the process.

use super::panics;
use super::scenario::{Body, Scenario};
use super::stage::{Run, Stage};
use super::verdict::{Phase, Verdict};
use crate::deadline::Deadline;
use crate::process;
use crate::record::{Evidence, Outcome};
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often the watcher looks whether it must step in. An end of the body wakes it at once.
const POLL: Duration = Duration::from_millis(100);
/// What a body gets to notice that its time is up: waits look every fifth of a second, a command is
/// ended on the machine in five, and QEMU is asked twice for its last moments, a second each.
const GRACE: Duration = Duration::from_secs(10);

/// Runs a scenario to its outcome, and puts it on record. There is evidence unless it could not
/// even be begun.
pub(super) fn execute(run: &Arc<Run>, scenario: &'static Scenario) -> (Verdict, Option<Evidence>) {
    if process::interrupted() {
        return (unstarted(run, scenario, Verdict::new(Outcome::Interrupted, "not started")), None);
    }
    let stage = match run.open(scenario) {
        Ok(stage) => Arc::new(stage),
        Err(error) => return (unstarted(run, scenario, Verdict::of(Phase::Setup, Ok(Err(error)))), None),
    };
    let prepared = match &scenario.machine {
        Some(needs) => Verdict::of(Phase::Setup, panics::catch(|| stage.prepare(needs))),
        None => Verdict::new(Outcome::Passed, ""),
    };
    let mut verdict = match prepared.outcome {
        Outcome::Passed => perform_watched(&stage, scenario),
        _ => prepared,
    };
    if let Err(error) = stage.close(&verdict) {
        verdict = verdict.but(error);
    }
    if verdict.outcome != Outcome::Passed {
        let directory = shown(stage.evidence().directory());
        verdict.message = format!("{}\nEvidence: {}", verdict.message, directory.display());
    }
    (verdict, Some(stage.evidence().clone()))
}

/// A path as one would type it: relative where it is below the current directory.
pub(super) fn shown(path: &Path) -> &Path {
    let here = std::env::current_dir().ok();
    here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path)
}

/// Puts on record that a scenario did not run.
pub(super) fn unstarted(run: &Run, scenario: &Scenario, verdict: Verdict) -> Verdict {
    match run.record_unstarted(scenario, &verdict) {
        Ok(()) => verdict,
        Err(error) => verdict.but(error),
    }
}

fn perform_watched(stage: &Arc<Stage>, scenario: &'static Scenario) -> Verdict {
    let deadline = Deadline::after(scenario.timeout(), "scenario timeout");
    let (verdicts, inbox) = mpsc::channel();
    let thread = std::thread::Builder::new().name(scenario.name.to_owned()).spawn({
        let (stage, deadline) = (Arc::clone(stage), deadline.clone());
        move || perform(&stage, scenario, &deadline, &verdicts)
    });
    if let Err(error) = thread {
        return Verdict::new(Outcome::Error, format!("cannot start a thread: {error}"));
    }
    watch(&inbox, &deadline, stage.settling(), &|| stage.kill_machine())
}

/// The scenario itself, in its own thread. The verdict is sent before the machine is put away; the
/// end of the channel says that it is.
fn perform(stage: &Stage, scenario: &Scenario, deadline: &Deadline, verdicts: &mpsc::Sender<Verdict>) {
    // A receiver that is gone has left this thread behind and has its verdict.
    // What comes after the verdict, the evidence above all, is not the scenario's time.
    let send = |verdict: Verdict| {
        let verdict = verdict.in_time(deadline);
        drop(verdicts.send(verdict.clone()));
        verdict
    };
    match (scenario.body, &scenario.machine) {
        (Body::Plain(body), _) => drop(send(Verdict::of(Phase::Body, panics::catch(body)))),
        (Body::Vm(body), Some(needs)) => {
            let mut vm = match panics::catch(|| stage.boot(needs, deadline)) {
                Ok(Ok(vm)) => vm,
                failed => {
                    return drop(send(Verdict::of(Phase::Setup, failed.map(|result| result.map(drop)))));
                }
            };
            let mut verdict = Verdict::of(Phase::Body, panics::catch(|| body(&mut vm)));
            if let Some(death) = stage.death(&mut vm, &verdict) {
                verdict = verdict.after(&death);
            }
            let verdict = send(verdict);
            stage.debug(&mut vm, &verdict);
            stage.settle(vm, &verdict);
        }
        (Body::Vm(_), None) => {
            drop(send(Verdict::new(Outcome::Error, "the scenario declares no machine")));
        }
    }
}

/// Waits for the verdict, then for the end of the thread, and never much longer than it should.
fn watch(
    inbox: &Receiver<Verdict>,
    deadline: &Deadline,
    settling: Duration,
    kill_machine: &dyn Fn(),
) -> Verdict {
    let lost = || Verdict::new(Outcome::Error, "the scenario's thread ended without a verdict");
    let stop = loop {
        match inbox.recv_timeout(deadline.slice(POLL)) {
            Ok(verdict) => return settled(inbox, verdict, settling, kill_machine),
            Err(RecvTimeoutError::Disconnected) => return lost(),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(stop) = deadline.check() {
            break stop;
        }
    };
    match inbox.recv_timeout(GRACE) {
        Ok(verdict) => return settled(inbox, verdict, settling, kill_machine),
        Err(RecvTimeoutError::Disconnected) => return lost(),
        Err(RecvTimeoutError::Timeout) => kill_machine(),
    }
    let end = match inbox.recv_timeout(GRACE) {
        // What it says now is about the machine that was taken from it.
        Ok(last) => {
            settled(inbox, last.clone(), settling, kill_machine);
            format!("ended when its machine was killed: {}", last.message)
        }
        Err(RecvTimeoutError::Disconnected) => return lost(),
        Err(RecvTimeoutError::Timeout) => "was left behind".to_owned(),
    };
    let result: Result<()> = Err(stop.into());
    let mut verdict = Verdict::of(Phase::Body, Ok(result));
    verdict.message += &format!("; the body did not notice and {end}");
    verdict
}

fn settled(
    inbox: &Receiver<Verdict>,
    verdict: Verdict,
    settling: Duration,
    kill_machine: &dyn Fn(),
) -> Verdict {
    // Nothing more is ever sent: this ends when the thread does.
    if inbox.recv_timeout(settling) == Err(RecvTimeoutError::Timeout) {
        kill_machine();
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SETTLING: Duration = Duration::from_secs(60);

    fn passed() -> Verdict {
        Verdict::new(Outcome::Passed, "")
    }

    #[test]
    fn a_verdict_is_passed_on_once_the_thread_has_ended() {
        let (verdicts, inbox) = mpsc::channel();
        verdicts.send(passed()).expect("open");
        drop(verdicts);
        let ample = Deadline::after(Duration::from_secs(60), "scenario timeout");
        let verdict = watch(&inbox, &ample, SETTLING, &|| panic!("nothing to kill"));
        assert_eq!(verdict, passed());
    }

    #[test]
    fn a_body_that_hangs_loses_its_machine_once_and_is_left_behind() {
        let (verdicts, inbox) = mpsc::channel();
        let kills = AtomicUsize::new(0);
        let over = Deadline::after(Duration::ZERO, "scenario timeout");
        let verdict = watch(&inbox, &over, SETTLING, &|| {
            kills.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(verdict.outcome, Outcome::Failed);
        assert!(verdict.message.contains("scenario timeout") && verdict.message.contains("left behind"));
        assert_eq!(kills.into_inner(), 1);
        drop(verdicts);
    }

    #[test]
    fn a_body_that_ends_when_its_machine_is_killed_has_failed_all_the_same() {
        let (verdicts, inbox) = mpsc::channel();
        let verdicts = std::sync::Mutex::new(Some(verdicts));
        let over = Deadline::after(Duration::ZERO, "scenario timeout");
        let verdict = watch(&inbox, &over, SETTLING, &|| {
            let sender = verdicts.lock().expect("not poisoned").take();
            if let Some(sender) = sender {
                sender.send(Verdict::new(Outcome::Error, "QEMU ended")).expect("open");
            }
        });
        assert_eq!(verdict.outcome, Outcome::Failed);
        assert!(verdict.message.contains("(scenario timeout)"), "{}", verdict.message);
        assert!(verdict.message.ends_with("killed: QEMU ended"), "{}", verdict.message);
    }
}
