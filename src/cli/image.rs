//! `shakedown image`: builds boot images, and looks after the store that keeps them.

use super::Verdict;
use super::progress::Progress;
use super::table::Table;
use super::terminal::{self, Paint};
use anyhow::{Context, Result, bail};
use jiff::{Span, SpanRelativeTo, Timestamp, Unit};
use serde_json::json;
use shakedown::deadline::Deadline;
use shakedown::harness::Settings;
use shakedown::host;
use shakedown::image::store::{Store, Stored};
use shakedown::image::{Built, Images};
use shakedown::record::Environment;
use shakedown::record::event::Events;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// A build takes one to two minutes, a slow mirror some more.
const BUILD: Duration = Duration::from_secs(3600);

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
    /// List what the store has, last used first
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove what was not used for long; never what is in use
    Prune {
        /// Not used for this long, such as `12h` or `30d`
        #[arg(long, value_name = "TIME", value_parser = age, default_value = "30d")]
        older_than: Duration,
        /// And then, last used first, what the store has beyond this size, such as `5G`
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_size: Option<u64>,
        /// Print one JSON array of what was removed
        #[arg(long)]
        json: bool,
    },
    /// Remove images
    Rm {
        /// The name of an image, or at least 8 characters of its key
        #[arg(required = true)]
        names: Vec<String>,
        /// Print one JSON array of what was removed
        #[arg(long)]
        json: bool,
    },
}

impl Image {
    pub(super) fn run(self) -> Result<Verdict> {
        match self.action {
            Action::Build { name, json } => build(name.as_deref(), json)?,
            Action::List { json } => show(&store()?.list()?, json, "The store is empty")?,
            Action::Prune { older_than, max_size, json } => {
                show(&store()?.prune(Some(older_than), max_size)?, json, "Nothing to remove")?;
            }
            Action::Rm { names, json } => {
                let store = store()?;
                let mut removed = Vec::new();
                for name in &names {
                    removed.extend(store.rm(name)?);
                }
                show(&removed, json, "Nothing to remove")?;
            }
        }
        Ok(Verdict::Fine)
    }
}

fn store() -> Result<Store<Built>> {
    Images::store_in(&host::cache_dir()?)
}

fn build(name: Option<&str>, as_json: bool) -> Result<()> {
    let images = images()?;
    let progress = Progress::new();
    let begun = Instant::now();
    let result =
        images.get(name, &Deadline::after(BUILD, "shakedown image build"), &Events::to(progress.clone()));
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

/// The images of the project that the current directory is in.
fn images() -> Result<Images> {
    let here = std::env::current_dir().context("cannot tell the current directory")?;
    let project = here.ancestors().find(|dir| dir.join("Cargo.toml").is_file());
    let settings = match project {
        Some(dir) => {
            let manifest = dir.join("Cargo.toml");
            let text = std::fs::read_to_string(&manifest)
                .with_context(|| format!("cannot read {}", manifest.display()))?;
            Settings::parse(&text)?
        }
        None => Settings::default(),
    };
    let environment = Environment::read(project.unwrap_or(Path::new(&here)))?;
    Images::new(host::cache_dir()?, &environment, &settings.image, &settings.images)
}

fn show(list: &[Stored<Built>], as_json: bool, empty: &str) -> Result<()> {
    if as_json {
        return terminal::print_json(&list);
    }
    if list.is_empty() {
        terminal::say(empty);
        return Ok(());
    }
    let mut table = Table::new(["NAME", "KEY", "SIZE", "BUILT", "LAST USED", "KERNEL", ""]);
    for entry in list {
        let manifest = &entry.manifest;
        table.row([
            manifest.name.as_str().into(),
            manifest.key[..manifest.key.len().min(12)].into(),
            format!("{} MiB", entry.bytes >> 20).into(),
            ago(manifest.built_at).into(),
            ago(entry.used_at).into(),
            manifest.facts.kernel_release.as_str().into(),
            if entry.in_use { "in use" } else { "" }.into(),
        ]);
    }
    terminal::print(&table.render(Paint::of(&io::stdout())))
}

fn ago(time: Timestamp) -> String {
    let minutes = Timestamp::now().duration_since(time).as_mins().max(0);
    match minutes {
        0 => "just now".into(),
        1..=119 => format!("{minutes} min ago"),
        120..=2879 => format!("{} h ago", minutes / 60),
        _ => format!("{} days ago", minutes / (24 * 60)),
    }
}

fn age(text: &str) -> Result<Duration> {
    let span: Span = text.parse().context("write it like `12h` or `30d`")?;
    let seconds = span.total((Unit::Second, SpanRelativeTo::days_are_24_hours()))?;
    Duration::try_from_secs_f64(seconds).context("it must not be negative")
}

fn size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => bail!("write it like `500M` or `5G`"),
    };
    let number: u64 = digits.parse().context("write it like `500M` or `5G`")?;
    number.checked_mul(1 << shift).context("it is too large")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_sizes_are_read_strictly() {
        assert_eq!(age("30d").expect("reads"), Duration::from_secs(30 * 24 * 3600));
        assert_eq!(age("90m").expect("reads"), Duration::from_secs(90 * 60));
        assert!(["", "30", "-3d", "x"].iter().all(|text| age(text).is_err()));
        assert_eq!((size("5G").expect("reads"), size("500").expect("reads")), (5 << 30, 500));
        assert!(["", "G", "5g", "-1", "99999999999T"].iter().all(|text| size(text).is_err()));
    }
}
