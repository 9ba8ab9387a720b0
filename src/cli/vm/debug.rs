//! `shakedown vm debug`: a scenario of the project, stopped at its failure.
//!
//! Finds the test binary that has the scenario and becomes it; stopping is the harness's business.

use crate::cli::{Verdict, terminal};
use anyhow::{Context, Result};
use serde::Deserialize;
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::{harness, nearest, process};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A build of everything, on a slow machine.
const BUILD: Duration = Duration::from_secs(3600);
/// Listing takes milliseconds.
const LIST: Duration = Duration::from_secs(30);

/// Run a scenario of this project, and stop at its failure with the machine alive.
///
/// The way in by SSH is printed then, and the place of the evidence; the scenario's time stands still.
/// Enter ends the machine, and the run goes on as always. Needs a terminal.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  shakedown vm debug storage::a_lost_disk_is_replaced")]
pub(super) struct Debug {
    /// Its whole name, as `cargo test -- --list` shows it
    scenario: String,
}

/// A test binary.
#[derive(Clone)]
struct Binary {
    program: PathBuf,
    /// Where cargo runs it.
    directory: PathBuf,
}

impl Debug {
    pub(super) fn run(&self) -> Result<Verdict> {
        harness::needs_terminal()?;
        let mut scenarios: BTreeMap<String, Binary> = BTreeMap::new();
        for binary in binaries()? {
            match names(&binary) {
                Ok(names) => scenarios.extend(names.into_iter().map(|name| (name, binary.clone()))),
                Err(error) => terminal::say(&format!("left out: {error:#}")),
            }
        }
        let Some(binary) = scenarios.get(&self.scenario) else {
            let hint = nearest::guess(&self.scenario, scenarios.keys().map(String::as_str));
            let hint = hint.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
            return Err(Fault::host(format!("no scenario `{}` in this project{hint}", self.scenario))
                .fix("`cargo test -- --list` shows them")
                .into());
        };
        let error = Command::new(&binary.program)
            .args(["--exact", &self.scenario, "--include-ignored"])
            .current_dir(&binary.directory)
            .env("SHAKEDOWN_DEBUG", "1")
            .env_remove("SHAKEDOWN_MARKERS")
            .exec();
        Err(error).with_context(|| Fault::host(format!("cannot start {}", binary.program.display())))
    }
}

/// A line of cargo's JSON, of which the rest does not matter:
/// <https://doc.rust-lang.org/cargo/reference/external-tools.html#artifact-messages>.
#[derive(Deserialize)]
struct Artifact {
    manifest_path: PathBuf,
    target: Target,
    executable: PathBuf,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

/// Builds the project's tests.
fn binaries() -> Result<Vec<Binary>> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--tests", "--no-run", "--message-format", "json-render-diagnostics"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = process::spawn(command)?;
    let (_, stdout, _) = child.pipes();
    let lines = BufReader::new(stdout.context("cargo has no output")?).lines();
    let binaries = lines.map_while(Result::ok).filter_map(|line| test(&line)).collect();
    let status = child.wait(&Deadline::after(BUILD, "building the tests"))?;
    if !status.success() {
        return Err(Fault::host(format!("cargo ended with {}", process::describe(status)))
            .fix("correct what it says, or go to a project's directory")
            .into());
    }
    Ok(binaries)
}

/// The test binary that a line of cargo's JSON tells of.
fn test(line: &str) -> Option<Binary> {
    let artifact: Artifact = serde_json::from_str(line).ok()?;
    artifact.target.kind.iter().any(|kind| kind == "test").then(|| Binary {
        program: artifact.executable,
        directory: artifact.manifest_path.parent().map(Path::to_owned).unwrap_or_default(),
    })
}

/// What the binary lists.
fn names(binary: &Binary) -> Result<Vec<String>> {
    let mut command = Command::new(&binary.program);
    command
        .args(["--list", "--format", "terse"])
        .current_dir(&binary.directory)
        .env_remove("SHAKEDOWN_MARKERS");
    let list = process::output(command, &Deadline::after(LIST, "listing the scenarios"))?;
    Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_binaries_are_told_from_all_else_that_cargo_says() {
        let line = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/p/Cargo.toml","target":{{"kind":["{kind}"],"name":"x"}},"executable":{executable}}}"#
            )
        };
        let found = test(&line("test", r#""/p/target/x""#)).expect("is one");
        assert_eq!(
            (found.program.as_path(), found.directory.as_path()),
            (Path::new("/p/target/x"), Path::new("/p"))
        );
        assert!(test(&line("lib", r#""/p/target/x""#)).is_none());
        assert!(test(&line("test", "null")).is_none());
        assert!(test(r#"{"reason":"build-finished","success":true}"#).is_none());
        assert!(test("no JSON").is_none());
    }
}
