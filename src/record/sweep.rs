//! Who is alive: a locked marker for each scenario that runs, and the record of those that died.
//!
//! The markers are in one directory, so that a sweep costs what runs and not what ever ran. The
//! lock, not the file, says that the owner lives: the kernel drops it however the process ends.

use super::evidence::conclude;
use super::files;
use super::ledger::{self, Record};
use super::metadata::{Metadata, Outcome, Utc};
use super::run::{RootLock, RunFile};
use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::slice;

const RUNNING: &str = ".running";

/// Says that a scenario runs in this process.
pub(super) struct Marker {
    path: PathBuf,
    _file: File,
}

/// What a marker says to a sweep.
#[derive(Serialize, Deserialize)]
struct Running {
    directory: PathBuf,
    /// The ledger of the run that died, which need not be that of the run that sweeps.
    ledger: Option<PathBuf>,
}

impl Marker {
    pub(super) fn set(log_root: &Path, directory: &Path, ledger: Option<&Path>) -> Result<Self> {
        let running = log_root.join(RUNNING);
        let name: Vec<_> = directory.iter().rev().take(2).map(|part| part.to_string_lossy()).collect();
        let path = running.join(name.join("@"));
        let content = Running { directory: directory.to_owned(), ledger: ledger.map(Path::to_owned) };
        let set = || -> Result<File> {
            // Between the file and its lock nobody may take it for a dead one.
            let _lock = RootLock::take(log_root)?;
            fs::create_dir_all(&running)?;
            let mut file = files::lock_file(&path)?;
            files::lock(&file, &path)?;
            file.write_all(&serde_json::to_vec(&content)?)?;
            Ok(file)
        };
        let file = set().with_context(|| files::cannot("make", &path))?;
        Ok(Self { path, _file: file })
    }

    /// The outcome is recorded.
    pub(super) fn clear(self) -> Result<()> {
        files::remove(&self.path)
    }
}

/// What a [`sweep`] came to.
#[derive(Debug, Default)]
pub struct Swept {
    /// The records that it added.
    pub added: Vec<Record>,
    /// Those that it could not write, for the next sweep: the marker of each, and why.
    pub left: Vec<(PathBuf, anyhow::Error)>,
}

/// Completes the records of scenarios whose process died: each gets `record.json` and its ledger
/// line, `interrupted` where there was no outcome yet. Takes a few milliseconds. Of a process that was
/// killed while it forked, the child may hold the locks a moment longer; such a scenario is left to
/// the next sweep.
///
/// # Errors
/// A host [`Fault`](crate::fault::Fault) when the log root cannot be read or locked. A ledger of a
/// dead run that cannot be written is no error: it must not cost the runs that come after.
pub fn sweep(log_root: &Path) -> Result<Swept> {
    let running = log_root.join(RUNNING);
    if !fs::read_dir(&running).is_ok_and(|mut entries| entries.next().is_some()) {
        return Ok(Swept::default());
    }
    let _lock = RootLock::take(log_root)?;
    let mut swept = Swept::default();
    for entry in fs::read_dir(&running).with_context(|| files::cannot("read", &running))? {
        let path = entry.with_context(|| files::cannot("read", &running))?.path();
        match sweep_marker(&path) {
            Ok(added) => swept.added.extend(added),
            Err(error) => swept.left.push((path, error)),
        }
    }
    Ok(swept)
}

/// Buries the owner of this marker if it is dead. The marker goes only once all is written.
fn sweep_marker(path: &Path) -> Result<Option<Record>> {
    let file = files::lock_file(path).with_context(|| files::cannot("lock", path))?;
    if !files::try_lock(&file).with_context(|| files::cannot("lock", path))? {
        return Ok(None);
    }
    let added = bury(path)?;
    files::remove(path)?;
    Ok(added)
}

/// Does what the dead owner of this marker can no longer do, however far it had come.
fn bury(marker: &Path) -> Result<Option<Record>> {
    // A torn marker, or a directory that somebody removed: nothing happened, or nobody cares.
    let Ok(Running { directory, ledger }) = files::read_json(marker) else { return Ok(None) };
    let Ok(mut metadata) = files::read_json::<Metadata>(&directory.join("metadata.json")) else {
        return Ok(None);
    };
    let kept = directory.join("record.json");
    if let Ok(record) = files::read_json::<Record>(&kept) {
        let Some(ledger) = ledger else { return Ok(None) };
        if ledger::has(&ledger, &record)? {
            return Ok(None);
        }
        ledger::append(&ledger, slice::from_ref(&record))?;
        return Ok(Some(record));
    }
    if metadata.outcome.is_none() {
        let end = last_sign_of_life(&directory).unwrap_or(metadata.generated_at);
        let total = metadata.timings.start.map_or(0.0, |start| end.seconds_since(start));
        let run = directory.parent().and_then(|run| files::read_json::<RunFile>(&run.join("run.json")).ok());
        let run_started = run.map(|run| run.started_at).or(metadata.timings.start).unwrap_or(end);
        conclude(&mut metadata, end, total, run_started);
        metadata.outcome = Some(Outcome::Interrupted);
        metadata.reason = Some("the process died".to_owned());
        metadata.generated_at = Utc::now();
        files::write_json(&directory.join("metadata.json"), &metadata)?;
    }
    let record = Record::of(&metadata, Some(&directory));
    files::write_json(&kept, &record)?;
    if let Some(ledger) = ledger {
        ledger::append(&ledger, slice::from_ref(&record))?;
    }
    Ok(Some(record))
}

/// When the last event was written.
fn last_sign_of_life(directory: &Path) -> Option<Utc> {
    let modified = fs::metadata(directory.join("events.jsonl")).and_then(|file| file.modified()).ok()?;
    Timestamp::try_from(modified).ok().map(Utc::from)
}

#[cfg(test)]
mod tests;
