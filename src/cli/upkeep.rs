//! `list`, `prune` and `rm`: what one does with any store.

use super::Verdict;
use super::table::Table;
use super::terminal::{self, Paint};
use super::value;
use anyhow::Result;
use jiff::Timestamp;
use shakedown::deadline::human;
use shakedown::image::store::{Kind, Store, Stored};
use std::io;
use std::time::Duration;

#[derive(clap::Subcommand)]
pub(super) enum Upkeep {
    /// List what the store has, last used first
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove what was not used for long; never what is in use
    Prune {
        /// Not used for this long, such as `12h` or `30d`
        #[arg(long, value_name = "TIME", value_parser = value::age, default_value = "30d")]
        older_than: Duration,
        /// And then, last used first, what the store has beyond this size, such as `5G`
        #[arg(long, value_name = "SIZE", value_parser = value::size)]
        max_size: Option<u64>,
        /// Print one JSON array of what was removed
        #[arg(long)]
        json: bool,
    },
    /// Remove by name or key
    Rm {
        /// A name, which may mean several, or at least 8 characters of a key
        #[arg(required = true)]
        names: Vec<String>,
        /// Print one JSON array of what was removed
        #[arg(long)]
        json: bool,
    },
}

/// The column of a list that only one kind of entry has.
pub(super) struct Column<K> {
    pub(super) header: &'static str,
    pub(super) text: fn(&K) -> String,
}

impl Upkeep {
    pub(super) fn run<K: Kind>(self, store: &Store<K>, column: &Column<K>) -> Result<Verdict> {
        let (list, json, empty) = match self {
            Self::List { json } => (store.list()?, json, EMPTY.to_owned()),
            Self::Prune { older_than, max_size, json } => {
                let removed = store.prune(Some(older_than), max_size)?;
                (removed, json, Kept::of(&store.list()?).explain(older_than))
            }
            Self::Rm { names, json } => {
                let mut removed = Vec::new();
                for name in &names {
                    removed.extend(store.rm(name)?);
                }
                (removed, json, "Nothing to remove".to_owned())
            }
        };
        if json {
            terminal::print_json(&list)?;
        } else if list.is_empty() {
            terminal::say(&empty);
        } else {
            terminal::print(&table(&list, column).render(Paint::of(&io::stdout())))?;
        }
        Ok(Verdict::Fine)
    }
}

const EMPTY: &str = "The store is empty";

/// What a store still has when nothing was removed.
#[derive(Clone, Copy)]
struct Kept {
    entries: usize,
    in_use: usize,
    bytes: u64,
}

impl Kept {
    fn of<K>(list: &[Stored<K>]) -> Self {
        let in_use = list.iter().filter(|entry| entry.in_use).count();
        Self { entries: list.len(), in_use, bytes: list.iter().map(|entry| entry.bytes).sum() }
    }

    /// Why that is so, and what to do for who needs the space.
    fn explain(self, older_than: Duration) -> String {
        let Self { entries, in_use, bytes } = self;
        if entries == 0 {
            return EMPTY.into();
        }
        let mut text = format!("Nothing to remove: {entries} kept, {} MiB", bytes >> 20);
        if in_use > 0 {
            text += &format!("; {in_use} in use");
        }
        if entries > in_use {
            let days = older_than.as_secs() / (24 * 3600);
            let limit = if days > 1 { format!("{days} days") } else { human(older_than) };
            text +=
                &format!("; {} used in the last {limit}, which `--older-than 0s` removes", entries - in_use);
        }
        text
    }
}

fn table<K>(list: &[Stored<K>], column: &Column<K>) -> Table<7> {
    let mut table = Table::new(["NAME", "KEY", "SIZE", "BUILT", "LAST USED", column.header, ""]);
    for entry in list {
        let manifest = &entry.manifest;
        table.row([
            manifest.name.as_str().into(),
            manifest.key[..manifest.key.len().min(12)].into(),
            format!("{} MiB", entry.bytes >> 20).into(),
            ago(manifest.built_at).into(),
            ago(entry.used_at).into(),
            (column.text)(&manifest.facts).into(),
            if entry.in_use { "in use" } else { "" }.into(),
        ]);
    }
    table
}

/// How long ago that was, roughly.
pub(super) fn ago(time: Timestamp) -> String {
    let minutes = Timestamp::now().duration_since(time).as_mins().max(0);
    match minutes {
        0 => "just now".into(),
        1..=119 => format!("{minutes} min ago"),
        120..=2879 => format!("{} h ago", minutes / 60),
        _ => format!("{} days ago", minutes / (24 * 60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_space_is_told_why_there_is_none() {
        let month = Duration::from_secs(30 * 24 * 3600);
        let kept = |entries, in_use| Kept { entries, in_use, bytes: 5 << 30 };
        assert_eq!(kept(0, 0).explain(month), "The store is empty");
        assert_eq!(
            kept(3, 1).explain(month),
            "Nothing to remove: 3 kept, 5120 MiB; 1 in use; 2 used in the last 30 days, which `--older-than 0s` removes"
        );
        let text = kept(1, 0).explain(Duration::from_secs(12 * 3600));
        assert!(text.ends_with("; 1 used in the last 720 min, which `--older-than 0s` removes"), "{text}");
        assert_eq!(kept(1, 1).explain(Duration::ZERO), "Nothing to remove: 1 kept, 5120 MiB; 1 in use");
    }
}
