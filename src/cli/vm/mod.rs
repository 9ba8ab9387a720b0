//! `shakedown vm`: machines at hand, outside of scenarios.

mod debug;
mod list;
mod machine;
mod run;
mod shell;

use super::Verdict;
use anyhow::Result;

/// Work with machines by hand: run a command on one, or see which run.
#[derive(clap::Args)]
pub(super) struct Vm {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    Run(run::Run),
    Shell(shell::Shell),
    Debug(debug::Debug),
    List(list::List),
    Kill(list::Kill),
}

impl Vm {
    pub(super) fn run(self) -> Result<Verdict> {
        match self.action {
            Action::Run(run) => run.run(),
            Action::Shell(shell) => shell.run(),
            Action::Debug(debug) => debug.run(),
            Action::List(list) => list.run(),
            Action::Kill(kill) => kill.run(),
        }
    }

    /// The exit status of our own errors: another one where 1 may be somebody else's.
    pub(super) fn error_status(&self) -> u8 {
        match self.action {
            Action::Run(_) => run::OWN_ERROR,
            _ => 1,
        }
    }
}
