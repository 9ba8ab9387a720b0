//! `shakedown template`: looks after the frozen machines that forks continue from.

use super::Verdict;
use super::upkeep::{Column, Upkeep};
use anyhow::Result;
use shakedown::host;
use shakedown::vm::template::{self, Frozen};

/// Look after templates: booted, frozen machines that scenarios fork from.
///
/// They are made when the first scenario needs one, and made anew when they have been removed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Template {
    #[command(subcommand)]
    action: Upkeep,
}

const EXAMPLES: &str = "\
Examples:
  shakedown template list                            What there is, and what it takes
  shakedown template prune --older-than 7d           Remove what was not used for a week
  shakedown template prune --older-than 0s           Remove all that are not in use
  shakedown template prune --max-size 4G             Keep no more than that
  shakedown template rm debian                       Remove those of an image";

const COLUMN: Column<Frozen> = Column { header: "MACHINE", text: machine };

fn machine(frozen: &Frozen) -> String {
    format!("{} MiB, {}", frozen.memory_mib, frozen.accelerator)
}

impl Template {
    pub(super) fn run(self) -> Result<Verdict> {
        self.action.run(&template::store_in(&host::cache_dir()?)?, &COLUMN)
    }
}
