//! `shakedown vm shell`: a machine to work in.

use super::machine::Machine;
use crate::cli::raw::{self, Raw};
use crate::cli::{Verdict, terminal, value};
use anyhow::{Context, Result};
use shakedown::fault::Fault;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::Duration;

/// A machine to work in by hand: root's shell on its serial console. Ctrl-] leaves, and ends it.
///
/// Needs a terminal, whose size the console gets. The line that leads into the same machine by SSH is
/// shown first, for a second terminal.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Shell {
    /// How long the machine may live
    #[arg(long, value_name = "TIME", value_parser = value::limit, default_value = "12h")]
    timeout: Duration,
    #[command(flatten)]
    machine: Machine,
}

const EXAMPLES: &str = "\
Examples:
  shakedown vm shell
  shakedown vm shell --disk 4G --disk 4G --hostname raid
  shakedown vm shell --image vendor.iso --firmware uefi";

impl Shell {
    pub(super) fn run(self) -> Result<Verdict> {
        if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
            return Err(Fault::host("`vm shell` needs a terminal, for its input and its output")
                .fix("without one: shakedown vm run -- COMMAND")
                .into());
        }
        // Not through the standard library's buffers, of which poll(2) knows nothing.
        let own = |fd: io::Result<_>| fd.map(File::from).context("cannot use the terminal");
        let keys = own(io::stdin().as_fd().try_clone_to_owned())?;
        let screen = own(io::stdout().as_fd().try_clone_to_owned())?;
        self.machine.with("vm-shell", self.timeout, |vm| {
            let id = vm.running().id();
            terminal::say(&format!("Machine {id}. Ctrl-] leaves and ends it."));
            if let Some(line) = vm.running().ssh_command() {
                terminal::say(&format!("By SSH: {line}"));
            }
            let (rows, columns) = raw::size();
            vm.fit_console(rows, columns)?;
            let raw = Raw::enter()?;
            let result = vm.interact(keys, screen);
            drop(raw);
            terminal::say(&format!("\nMachine {id} ends."));
            result
        })?;
        Ok(Verdict::Fine)
    }
}
