//! The test binaries of the project that the current directory is in: built by cargo, asked for their
//! scenarios.

use anyhow::{Context, Result};
use serde::Deserialize;
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::process;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A build of everything, on a slow machine.
const BUILD: Duration = Duration::from_secs(3600);
/// Listing takes milliseconds.
const LIST: Duration = Duration::from_secs(30);

/// A test binary.
#[derive(Clone)]
pub(super) struct Binary {
    pub(super) program: PathBuf,
    /// Where cargo runs it.
    pub(super) directory: PathBuf,
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

/// Builds those of the project's tests that `which` says to cargo.
pub(super) fn build(which: &[&str]) -> Result<Vec<Binary>> {
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let mut command = Command::new(cargo);
    command.arg("test").args(which).args(["--no-run", "--message-format", "json-render-diagnostics"]);
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

/// What the binary lists with these arguments.
pub(super) fn names(binary: &Binary, arguments: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new(&binary.program);
    command
        .args(["--list", "--format", "terse"])
        .args(arguments)
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
