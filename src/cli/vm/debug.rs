//! `shakedown vm debug`: a scenario of the project, stopped at its failure.
//!
//! Finds the test binary that has the scenario and becomes it; stopping is the harness's business.

use crate::cli::binaries::{self, Binary};
use crate::cli::{Verdict, terminal};
use anyhow::{Context, Result};
use shakedown::fault::Fault;
use shakedown::{harness, nearest};
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

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

impl Debug {
    pub(super) fn run(&self) -> Result<Verdict> {
        harness::needs_terminal()?;
        let mut scenarios: BTreeMap<String, Binary> = BTreeMap::new();
        for binary in binaries::build(&["--tests"])? {
            match binaries::names(&binary, &[]) {
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
