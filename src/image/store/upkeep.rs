//! What the store has, and getting rid of it.

use super::{IN_USE, Kind, MANIFEST, Manifest, Store, is_key};
use crate::fault::Fault;
use crate::nearest;
use crate::record::files::{read_json, remove};
use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// How long it is known why a build failed.
const FAILURE_KEPT: Duration = Duration::from_secs(24 * 3600);

/// An entry, as a list shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Stored<K> {
    /// What it is.
    #[serde(flatten)]
    pub manifest: Manifest<K>,
    /// Where it is.
    pub path: PathBuf,
    /// The space it takes.
    pub bytes: u64,
    /// When it was last used.
    pub used_at: Timestamp,
    /// Whether a machine runs on it now.
    pub in_use: bool,
}

impl<K: Kind> Store<K> {
    /// All entries, last used first. What is damaged is not among them.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Stored<K>>> {
        let mut list: Vec<Stored<K>> =
            self.names()?.iter().filter(|name| is_key(name)).filter_map(|key| self.stored(key)).collect();
        list.sort_by(|a, b| b.used_at.cmp(&a.used_at).then_with(|| a.manifest.key.cmp(&b.manifest.key)));
        Ok(list)
    }

    fn stored(&self, key: &str) -> Option<Stored<K>> {
        let path = self.dir.join(key);
        let manifest: Manifest<K> = read_json(&path.join(MANIFEST)).ok()?;
        let file = File::open(path.join(IN_USE)).ok()?;
        let used_at = Timestamp::try_from(file.metadata().ok()?.modified().ok()?).ok()?;
        let bytes = fs::read_dir(&path)
            .ok()?
            .filter_map(|file| Some(file.ok()?.metadata().ok()?.blocks() * 512))
            .sum();
        let in_use = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        Some(Stored { manifest, path, bytes, used_at, in_use })
    }

    /// Removes one entry, named by its key, the beginning of its key (8 characters or more), or the
    /// name of the image for which it was built; the name may mean several.
    ///
    /// # Errors
    /// A host [`Fault`] when there is none, or one is in use.
    pub fn rm(&self, name: &str) -> Result<Vec<Stored<K>>> {
        let list = self.list()?;
        let by_key = |entry: &Stored<K>| name.len() >= 8 && entry.manifest.key.starts_with(name);
        let matching: Vec<_> =
            list.iter().filter(|e| e.manifest.name == name || by_key(e)).cloned().collect();
        if matching.is_empty() {
            let known: Vec<_> = list.iter().map(|entry| entry.manifest.name.as_str()).collect();
            let hint = nearest::hint(name, known.iter().copied());
            return Err(Fault::host(format!("no {} `{name}` in the store{hint}", K::NAME)).into());
        }
        for entry in &matching {
            if !self.remove(&entry.manifest.key)? {
                return Err(Fault::host(format!(
                    "{} `{}` ({}) is in use",
                    K::NAME,
                    entry.manifest.name,
                    entry.path.display()
                ))
                .fix("end the machines that run on it first")
                .into());
            }
        }
        Ok(matching)
    }

    /// Removes entries that were not used for `older_than`, then those last used longest ago until
    /// the store has no more than `max_bytes`; never one in use. Leftovers of failed builds go too,
    /// and so do entries that nobody can read: of another version, or damaged.
    ///
    /// # Errors
    /// When the store cannot be changed.
    pub fn prune(&self, older_than: Option<Duration>, max_bytes: Option<u64>) -> Result<Vec<Stored<K>>> {
        let mut kept = self.list()?;
        let mut total: u64 = kept.iter().map(|entry| entry.bytes).sum();
        let mut removed = Vec::new();
        while let Some(entry) = kept.pop() {
            let age = Timestamp::now().duration_since(entry.used_at);
            let old = older_than.is_some_and(|limit| age.unsigned_abs() >= limit && !age.is_negative());
            let large = max_bytes.is_some_and(|limit| total > limit);
            if (old || large) && self.remove(&entry.manifest.key)? {
                total = total.saturating_sub(entry.bytes);
                removed.push(entry);
            }
        }
        for key in self.names()?.iter().filter(|name| is_key(name)) {
            if read_json::<Manifest<K>>(&self.dir.join(key).join(MANIFEST)).is_err() {
                self.remove(key)?;
            }
        }
        self.sweep()?;
        for name in self.names()? {
            if let Some(key) =
                name.strip_suffix(".lock").filter(|key| is_key(key) && !self.dir.join(key).exists())
                && self.is_stale(key)
                && let Some(lock) = self.try_lock(key)?
            {
                remove(&self.path(key, "log"))?;
                remove(&self.path(key, "failed"))?;
                remove(&lock.path)?;
            }
        }
        Ok(removed)
    }

    /// Whether nobody can want to know any more why a build failed. A run that did ends before.
    fn is_stale(&self, key: &str) -> bool {
        let failed = self.path(key, "failed").metadata().and_then(|file| file.modified());
        failed.map_or(true, |at| at.elapsed().unwrap_or_default() >= FAILURE_KEPT)
    }

    /// False when it is in use or being built.
    fn remove(&self, key: &str) -> Result<bool> {
        let Some(lock) = self.try_lock(key)? else { return Ok(false) };
        let in_use = File::open(self.dir.join(key).join(IN_USE));
        if let Ok(file) = &in_use
            && let Err(TryLockError::WouldBlock) = file.try_lock()
        {
            return Ok(false);
        }
        // Nobody takes it into use meanwhile, as we hold that lock until it is gone.
        self.discard(key, &lock)?;
        Ok(true)
    }
}
