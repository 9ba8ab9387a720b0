//! What was put off to a later run: `deferred.jsonl` in the log root.
//!
//! Owns the file and its rules: one line per scenario, oldest first, rewritten as a whole under the
//! lock of the log root. Who defers, and who is done, is the harness's to say.

use super::files;
use super::metadata::{SCHEMA_VERSION, Utc};
use super::run::RootLock;
use crate::fault::Fault;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;

const FILE: &str = "deferred.jsonl";

/// One line: a scenario that is owed a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Deferred {
    pub schema_version: u32,
    /// The test binary that has it, as `cargo test --test` calls it.
    pub test: String,
    pub scenario: String,
    /// The run that put it off first.
    pub run_id: String,
    pub deferred_at: Utc,
    /// What it was expected to take; absent where nothing was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate_seconds: Option<f64>,
    pub reason: String,
}

impl Deferred {
    /// Whether it is this scenario of this test binary.
    pub fn is(&self, test: &str, scenario: &str) -> bool {
        self.test == test && self.scenario == scenario
    }
}

/// The queue in a log root.
#[derive(Clone, Debug)]
pub struct Queue {
    log_root: PathBuf,
}

impl Queue {
    /// That in `log_root`, which need not exist.
    pub fn in_log_root(log_root: impl Into<PathBuf>) -> Self {
        Self { log_root: log_root.into() }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.log_root.join(FILE)
    }

    /// The entries, oldest first.
    ///
    /// # Errors
    /// A host [`Fault`] that names the line which is none.
    pub fn read(&self) -> Result<Vec<Deferred>> {
        let path = self.path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| files::cannot("read", &path)),
        };
        let entry = |(index, line): (usize, &str)| {
            parse(line).with_context(|| {
                Fault::host(format!("line {} of {} is no deferred scenario", index + 1, path.display()))
                    .fix("correct or remove that line, or the whole file: then nothing is owed any more")
            })
        };
        text.lines().enumerate().map(entry).collect()
    }

    /// Adds entries; one that is there already keeps its place.
    ///
    /// # Errors
    /// As [`Queue::read`], and when the file cannot be written.
    pub fn add(&self, new: impl IntoIterator<Item = Deferred>) -> Result<()> {
        self.change(|entries| {
            for entry in new {
                if !entries.iter().any(|other| other.is(&entry.test, &entry.scenario)) {
                    entries.push(entry);
                }
            }
        })
    }

    /// Removes the entries that `done` names. That there are none is fine, and costs nothing where
    /// there is no queue.
    ///
    /// # Errors
    /// As [`Queue::add`].
    pub fn remove(&self, done: impl Fn(&Deferred) -> bool) -> Result<()> {
        if !self.path().exists() {
            return Ok(());
        }
        self.change(|entries| entries.retain(|entry| !done(entry)))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Deferred>)) -> Result<()> {
        let path = self.path();
        fs::create_dir_all(&self.log_root).with_context(|| files::cannot("make", &self.log_root))?;
        let _lock = RootLock::take(&self.log_root)?;
        let old = self.read()?;
        let mut entries = old.clone();
        change(&mut entries);
        if entries == old {
            return Ok(());
        }
        if entries.is_empty() {
            return files::remove(&path);
        }
        let mut text = Vec::new();
        for entry in &entries {
            serde_json::to_writer(&mut text, entry).with_context(|| files::cannot("write", &path))?;
            text.push(b'\n');
        }
        files::replace(&path, &text)
    }
}

fn parse(line: &str) -> Result<Deferred> {
    let entry: Deferred = serde_json::from_str(line)?;
    anyhow::ensure!(
        entry.schema_version == SCHEMA_VERSION,
        "field `schema_version`: {}, but this shakedown knows {SCHEMA_VERSION}",
        entry.schema_version
    );
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(scenario: &str) -> Deferred {
        Deferred {
            schema_version: SCHEMA_VERSION,
            test: "scenarios".into(),
            scenario: scenario.into(),
            run_id: "2026-01-31T120000Z-1a2b3c4d".into(),
            deferred_at: Utc::now(),
            estimate_seconds: Some(1.5),
            reason: "the budget".into(),
        }
    }

    fn queue() -> (tempfile::TempDir, Queue) {
        let directory = tempfile::tempdir().expect("temp dir");
        let queue = Queue::in_log_root(directory.path().join("notes"));
        (directory, queue)
    }

    fn names(queue: &Queue) -> Vec<String> {
        queue.read().expect("reads").into_iter().map(|entry| entry.scenario).collect()
    }

    #[test]
    fn the_oldest_is_first_once_and_gone_when_done() {
        let (_directory, queue) = queue();
        assert!(names(&queue).is_empty());
        queue.remove(|_| true).expect("nothing to do");
        assert!(!queue.log_root.exists(), "leaves no trace");
        queue.add([entry("b"), entry("a")]).expect("adds");
        let mut again = entry("b");
        again.reason = "another".into();
        queue.add([again, entry("c")]).expect("adds");
        assert_eq!(names(&queue), ["b", "a", "c"]);
        assert_eq!(queue.read().expect("reads")[0].reason, "the budget");
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(queue.path()).expect("exists"));
        assert_eq!(mode & 0o777, 0o600, "its owner's alone");
        queue.remove(|entry| entry.is("scenarios", "a") || entry.is("other", "b")).expect("removes");
        assert_eq!(names(&queue), ["b", "c"]);
        queue.remove(|_| true).expect("removes");
        assert!(!queue.path().exists(), "an empty queue is no file");
    }

    #[test]
    fn several_that_add_and_remove_at_once_lose_nothing() {
        let (_directory, queue) = queue();
        queue.add([entry("kept")]).expect("adds");
        std::thread::scope(|scope| {
            for n in 0..8 {
                let queue = &queue;
                scope.spawn(move || {
                    queue.add([entry(&format!("new-{n}")), entry(&format!("done-{n}"))]).expect("adds");
                    queue.remove(|entry| entry.scenario == format!("done-{n}")).expect("removes");
                });
            }
        });
        let mut found = names(&queue);
        found.sort();
        let mut expected: Vec<_> = (0..8).map(|n| format!("new-{n}")).collect();
        expected.insert(0, "kept".into());
        assert_eq!(found, expected);
    }

    #[test]
    fn a_line_that_is_none_is_named_and_kept() {
        let (_directory, queue) = queue();
        queue.add([entry("a")]).expect("adds");
        let sound = fs::read_to_string(queue.path()).expect("reads");
        for wrong in ["{}", "", "{\"scenario\": 1}", &sound.trim().replace(":1,", ":2,")] {
            let text = format!("{sound}{wrong}\n");
            fs::write(queue.path(), &text).expect("writes");
            let error = format!("{:#}", queue.add([entry("b")]).expect_err(wrong));
            assert!(error.contains("line 2 of") && error.contains("Fix: correct or remove"), "{error}");
            assert_eq!(fs::read_to_string(queue.path()).expect("reads"), text);
        }
    }
}
