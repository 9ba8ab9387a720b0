//! `shakedown vm list` and `kill`: machines of all processes of this user.

use crate::cli::Verdict;
use crate::cli::table::Table;
use crate::cli::terminal::{self, Paint};
use crate::cli::upkeep::ago;
use anyhow::Result;
use shakedown::fault::Fault;
use shakedown::host;
use shakedown::vm::register::{self, Running};
use std::io;

/// List the machines that run, oldest first
#[derive(clap::Args)]
pub(super) struct List {
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// End machines; whatever runs on them sees its machine die
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  shakedown vm kill 12345\n  shakedown vm kill --all")]
pub(super) struct Kill {
    /// What `shakedown vm list` shows as ID
    #[arg(required_unless_present = "all", conflicts_with = "all", value_name = "ID")]
    ids: Vec<u32>,
    /// All machines of this user
    #[arg(long)]
    all: bool,
}

impl List {
    pub(super) fn run(&self) -> Result<Verdict> {
        let list = register::list(&host::cache_dir()?)?;
        if self.json {
            terminal::print_json(&list)?;
        } else if list.is_empty() {
            terminal::say("No machine runs");
        } else {
            terminal::print(&table(&list).render(Paint::of(&io::stdout())))?;
        }
        Ok(Verdict::Fine)
    }
}

fn table(list: &[Running]) -> Table<6> {
    let mut table = Table::new(["ID", "FOR", "IMAGE", "STARTED", "SSH PORT", "EVIDENCE"]);
    for running in list {
        table.row([
            running.id().to_string().into(),
            running.scenario.as_str().into(),
            running.image.as_str().into(),
            ago(running.since.into()).into(),
            running.ssh.as_ref().map_or("-".to_owned(), |ssh| ssh.port.to_string()).into(),
            running.evidence.display().to_string().into(),
        ]);
    }
    table
}

impl Kill {
    pub(super) fn run(&self) -> Result<Verdict> {
        let list = register::list(&host::cache_dir()?)?;
        let unknown = self.ids.iter().find(|id| !list.iter().any(|running| running.id() == **id));
        if let Some(id) = unknown {
            return Err(Fault::host(format!("no machine {id} runs"))
                .fix("`shakedown vm list` shows them")
                .into());
        }
        let mut ended = 0;
        for running in list.iter().filter(|running| self.all || self.ids.contains(&running.id())) {
            if running.kill()? {
                ended += 1;
                terminal::print(&format!("ended {} ({})\n", running.id(), running.scenario))?;
            }
        }
        if ended == 0 {
            terminal::say("No machine runs");
        }
        Ok(Verdict::Fine)
    }
}
