//! `shakedown ledger`: whether the ledger can be relied on.

use super::Verdict;
use super::project::Project;
use super::terminal;
use anyhow::Result;
use shakedown::fault::Fault;
use shakedown::record::ledger;
use std::path::PathBuf;

/// Look after the ledger of runs.
#[derive(clap::Args)]
pub(super) struct Ledger {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Check every line, and name the line and the field of every fault
    Check {
        /// The ledger [default: BOOT_IMAGE_VM_LEDGER_PATH, or notes/vm-run-ledger.jsonl]
        file: Option<PathBuf>,
    },
}

impl Ledger {
    pub(super) fn run(self) -> Result<Verdict> {
        let Action::Check { file } = self.action;
        let file = match file {
            Some(file) => file,
            None => default_file()?,
        };
        let problems = ledger::check(&file)?;
        for problem in &problems {
            terminal::print(&format!("{}:{problem}\n", file.display()))?;
        }
        if problems.is_empty() {
            let lines = ledger::read(&file)?.count();
            terminal::print(&format!("{}: {lines} lines, all valid\n", file.display()))?;
            return Ok(Verdict::Fine);
        }
        Ok(Verdict::NotFine)
    }
}

fn default_file() -> Result<PathBuf> {
    Project::here()?
        .environment
        .ledger
        .ok_or_else(|| Fault::host("the ledger is turned off by BOOT_IMAGE_VM_DISABLE_LEDGER").into())
}
