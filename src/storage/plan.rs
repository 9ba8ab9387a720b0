//! Plans: what is to be run, step by step, from one source for people, scripts and our own runs.
//!
//! Owns steps, their rendering as a POSIX script and as JSON, and running them over a connection
//! with the evidence of each. What the steps are is `seed`'s, `teardown`'s and `verify`'s.

use crate::connection::{Cmd, Session};
use crate::fault::Fault;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write as _;

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Makes the layout.
    Seed,
    /// Takes it away.
    Teardown,
    /// Looks for what is left.
    Verify,
}

/// What it means how a step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// It must succeed, or nothing after it makes sense.
    Success,
    /// It looks for something: whatever it prints is residue.
    Silence,
    /// It puts away what other steps made, and runs in any case.
    Always,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// For people.
    pub what: String,
    /// POSIX shell. Steps of a plan run in one shell, one after the other, without input.
    pub run: String,
    /// How its end is to be read.
    pub expect: Expect,
}

impl Step {
    pub(super) fn must(what: impl Into<String>, run: impl Into<String>) -> Self {
        Self { what: what.into(), run: run.into(), expect: Expect::Success }
    }

    pub(super) fn look(what: impl Into<String>, run: impl Into<String>) -> Self {
        Self { what: what.into(), run: run.into(), expect: Expect::Silence }
    }

    pub(super) fn always(what: impl Into<String>, run: impl Into<String>) -> Self {
        Self { what: what.into(), run: run.into(), expect: Expect::Always }
    }
}

/// Steps in their order, and what they are for.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The layout's name.
    pub layout: &'static str,
    /// What it is for.
    pub phase: Phase,
    /// The disks, in the layout's order.
    pub disks: Vec<String>,
    /// In their order.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The plan as a script of its own: no prompts, no input. It exits with 1 when a step fails or
    /// finds residue.
    pub fn script(&self) -> String {
        let mut text = format!(
            "#!/bin/sh\n# Layout {}, {:?}, on {}. Made by `shakedown plan`.\nset -eu\nbad=\n",
            self.layout,
            self.phase,
            self.disks.join(" ")
        );
        let always: String =
            self.steps.iter().filter(|step| step.expect == Expect::Always).map(Step::group).collect();
        if !always.is_empty() {
            let _ = write!(text, "put_away() {{\nset +e\n{always}}}\ntrap put_away EXIT\n");
        }
        for step in &self.steps {
            let _ = match step.expect {
                Expect::Always => Ok(()),
                Expect::Success => write!(text, "\n# {}\n{}", step.what, step.group()),
                Expect::Silence => write!(
                    text,
                    "\n# {0}: prints nothing\nfound=$({1}) || :\n[ -z \"$found\" ] || {{ bad=1; printf '%s: %s\\n' {2} \"$found\"; }}\n",
                    step.what,
                    step.group().trim_end(),
                    crate::process::quote(&step.what)
                ),
            };
        }
        text + "\n[ -z \"$bad\" ]\n"
    }

    /// Runs the steps over `session`, in one shell.
    ///
    /// # Errors
    /// When the connection breaks or the machine hangs; not when a step fails.
    pub fn run(&self, session: &mut Session<'_>) -> Result<Evidence> {
        run(session, &self.steps)
    }
}

impl Step {
    fn group(&self) -> String {
        format!("{{\n{}\n}} </dev/null\n", self.run)
    }
}

/// How a step ended.
#[derive(Clone, Debug, Serialize)]
pub struct Ended {
    /// The step.
    #[serde(flatten)]
    pub step: Step,
    /// `None` when it was not reached.
    pub status: Option<i32>,
    /// What it printed, standard error included.
    pub output: String,
}

/// What all the steps of a plan did.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Evidence {
    /// In their order.
    pub steps: Vec<Ended>,
}

impl Evidence {
    /// The step that had to succeed and did not, in words.
    pub fn failure(&self) -> Option<String> {
        let broken = |ended: &&Ended| {
            ended.step.expect == Expect::Success && ended.status.is_some_and(|status| status != 0)
        };
        self.steps.iter().find(broken).map(|ended| {
            let status = ended.status.unwrap_or_default();
            format!("{} ended with exit status {status}:\n{}", ended.step.what, ended.transcript())
        })
    }

    /// What the looks found that should not be there, in words.
    pub fn residue(&self) -> Vec<String> {
        let found = |ended: &&Ended| ended.step.expect == Expect::Silence && !ended.output.trim().is_empty();
        self.steps
            .iter()
            .filter(found)
            .map(|ended| format!("{}:\n{}", ended.step.what, ended.transcript()))
            .collect()
    }
}

impl Evidence {
    /// The steps that did something and succeeded, with their commands, for who follows a finding.
    pub fn made(&self) -> Vec<String> {
        let made = |ended: &&Ended| ended.step.expect == Expect::Success && ended.status == Some(0);
        self.steps
            .iter()
            .filter(made)
            .map(|ended| format!("{}:\n{}", ended.step.what, ended.transcript()))
            .collect()
    }
}

impl Ended {
    fn transcript(&self) -> String {
        let run = self.step.run.lines().map(|line| format!("  $ {line}\n"));
        let out = self.output.trim_end().lines().map(|line| format!("    {line}\n"));
        run.chain(out).collect::<String>().trim_end().to_owned()
    }
}

/// Runs steps in one shell and takes apart what they printed: starting a shell, and a command over
/// the guest agent, cost an emulated machine a tenth of a second each.
pub(super) fn run(session: &mut Session<'_>, steps: &[Step]) -> Result<Evidence> {
    let mark = mark();
    let mut script = String::from("exec 2>&1\nbroken=\n");
    for (number, step) in steps.iter().enumerate() {
        let guard = if step.expect == Expect::Always { ":" } else { "[ -z \"$broken\" ]" };
        let broken = if step.expect == Expect::Success { "[ $status = 0 ] || broken=1\n" } else { "" };
        let _ = write!(
            script,
            "if {guard}; then\nprintf '\\n{mark} {number} begins\\n'\n{}status=$?\n{broken}printf '\\n{mark} {number} %s\\n' $status\nfi\n",
            step.group()
        );
    }
    let output = session.run(Cmd::new("sh -s").stdin(script).allow_failure())?;
    let text = output.text().into_owned();
    let mut evidence = Evidence::default();
    for (number, step) in steps.iter().enumerate() {
        let begin = text.split_once(&format!("\n{mark} {number} begins\n"));
        let end = begin.and_then(|(_, rest)| rest.split_once(&format!("\n{mark} {number} ")));
        let (status, output) = match (begin, end) {
            (Some(_), Some((output, rest))) => {
                let status = rest.lines().next().and_then(|status| status.trim().parse().ok());
                (
                    Some(status.with_context(|| Fault::host("a step's end is not readable"))?),
                    output.to_owned(),
                )
            }
            // It took the shell with it.
            (Some((_, rest)), None) => (Some(output.exit.status().max(1)), rest.to_owned()),
            (None, _) => (None, String::new()),
        };
        evidence.steps.push(Ended { step: step.clone(), status, output });
    }
    Ok(evidence)
}

/// Something that no command prints.
fn mark() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    format!("@step-{:016x}", RandomState::new().build_hasher().finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Local;
    use crate::deadline::Deadline;
    use crate::record::event::Events;
    use std::process::Command;
    use std::time::Duration;

    fn ran(steps: &[Step]) -> Evidence {
        let deadline = Deadline::after(Duration::from_secs(30), "test");
        run(&mut Session::new(&mut Local, deadline, Events::silent()), steps).expect("runs")
    }

    fn steps() -> Vec<Step> {
        vec![
            Step::must("name it", "name=here"),
            Step::look("nothing", "test $name = there && echo seen"),
            Step::look("something", "printf $name; echo twice >&2"),
            Step::must("read", "read line"),
            Step::must("not reached", "echo no"),
            Step::look("not looked", "echo no"),
            Step::always("put away", "echo away $name"),
        ]
    }

    #[test]
    fn each_step_has_its_own_evidence() {
        let evidence = ran(&steps());
        let status: Vec<_> = evidence.steps.iter().map(|ended| ended.status).collect();
        assert_eq!(status, [Some(0), Some(1), Some(0), Some(1), None, None, Some(0)]);
        assert_eq!(evidence.residue(), ["something:\n  $ printf $name; echo twice >&2\n    heretwice"]);
        assert!(evidence.failure().expect("one failed").starts_with("read ended with exit status 1"));
        assert_eq!(evidence.steps[6].output.trim(), "away here");
    }

    #[test]
    fn a_step_that_ends_the_shell_is_the_one_that_failed() {
        let evidence = ran(&[Step::must("leave", "echo bye; exit 0"), Step::must("after", ":")]);
        assert!(evidence.failure().expect("failed").contains("bye"));
        assert_eq!(evidence.steps[1].status, None);
    }

    #[test]
    fn the_script_does_the_same() {
        let plan =
            |steps: &[Step]| Plan { layout: "x", phase: Phase::Verify, disks: vec![], steps: steps.to_vec() };
        let sh = |plan: Plan| Command::new("sh").arg("-c").arg(plan.script()).output().expect("sh runs");
        let out = sh(plan(&steps()));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!((out.status.code(), &text[..]), (Some(1), "something: here\naway here\n"));
        let out = sh(plan(&steps()[..2]));
        assert_eq!((out.status.code(), out.stdout.len()), (Some(0), 0));
        assert_eq!(sh(plan(&steps()[..3])).status.code(), Some(1), "residue");
    }
}
