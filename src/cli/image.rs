//! `shakedown image`: builds boot images, and looks after the store that keeps them.

use super::Verdict;
use super::progress::Progress;
use super::project::Project;
use super::terminal;
use super::upkeep::{Column, Upkeep};
use anyhow::Result;
use serde_json::json;
use shakedown::deadline::Deadline;
use shakedown::host;
use shakedown::image::{Built, Images};
use shakedown::record::event::Events;
use std::time::{Duration, Instant};

/// A Debian build takes one to two minutes, a NixOS one was seen to take 35; a slow network some more.
const BUILD: Duration = Duration::from_secs(2 * 3600);

/// Build boot images, and look after the store that keeps them.
#[derive(clap::Args)]
pub(super) struct Image {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Build an image of this project, unless the store has it
    Build {
        /// Its name in the project's settings [default: the project's default image]
        name: Option<String>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Upkeep(Upkeep),
}

const COLUMN: Column<Built> = Column { header: "KERNEL", text: |built| built.kernel_release.clone() };

impl Image {
    pub(super) fn run(self) -> Result<Verdict> {
        match self.action {
            Action::Build { name, json } => build(name.as_deref(), json).map(|()| Verdict::Fine),
            Action::Upkeep(upkeep) => upkeep.run(&Images::store_in(&host::cache_dir()?)?, &COLUMN),
        }
    }
}

fn build(name: Option<&str>, as_json: bool) -> Result<()> {
    let Project { environment, settings } = Project::here()?;
    let images = Images::new(host::cache_dir()?, &environment, &settings.image, &settings.images)?;
    let progress = Progress::new();
    let begun = Instant::now();
    let result = images.get(
        name,
        None,
        &Deadline::after(BUILD, "shakedown image build"),
        &Events::to(progress.clone()),
    );
    progress.finish();
    let image = result?;
    if as_json {
        let kernel = image.kernel.as_ref();
        return terminal::print_json(&json!({
            "name": image.name,
            "recipe": image.recipe,
            "digest": image.digest,
            "file": image.file,
            "format": image.format,
            "kernel": kernel.map(|files| &files.kernel),
            "initrd": kernel.map(|files| &files.initrd),
            "cmdline": kernel.map(|files| &files.cmdline),
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    }
    terminal::print(&format!("{}\n", image.file.display()))
}
