//! The content-addressed store: what was built once is there for every process of this user.
//!
//! Owns the directory, its locks and its rules. What is built, and how, comes from outside: images
//! from here, templates of booted machines from `vm`.
//!
//! ```text
//! KEY/            a published entry; never changes
//!   manifest.json what it is, with the size and digest of each file
//!   build.log     the whole output of its build
//!   in-use        locked (shared) by whoever uses it; its time is that of the last use
//! KEY.lock        locked (exclusive) by whoever builds or removes KEY
//! KEY.log         the output of the build that runs now, or of the last one that failed
//! KEY.failed      why the last build failed
//! tmp-KEY/        a build, or an entry on its way out
//! ```
//!
//! Locks are `flock`s: they end with their process, however it ends. What is in `tmp-KEY` while
//! nobody holds `KEY.lock` was left by a death, and is swept.

mod upkeep;

pub use upkeep::Stored;

use super::digest;
use crate::deadline::{Deadline, Stop};
use crate::fault::{Blame, Fault, blame};
use crate::process;
use crate::record::event::{Event, Events};
use crate::record::files::{read_json, remove, write_json};
use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// How often a lock that someone else holds is tried.
const POLL: Duration = Duration::from_millis(50);
const MANIFEST: &str = "manifest.json";
const LOG: &str = "build.log";
const IN_USE: &str = "in-use";
const SCHEMA: u32 = 1;

/// What is kept in a store: the part of a manifest that only its kind has.
pub trait Kind: Clone + Serialize + DeserializeOwned {
    /// As messages call it: `image`.
    const NAME: &'static str;
    /// Whether the content of the files is put on record too. Their sizes always are.
    const DIGESTS: bool;

    /// A build begins; its output goes to `log`.
    fn started(name: &str, log: &Path) -> Event;

    /// It is there, after so many seconds.
    fn ready(name: &str, seconds: f64, cached: bool) -> Event;
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest<K> {
    /// Of this record's format.
    pub schema_version: u32,
    /// The name for which it was built. Others may mean the same entry.
    pub name: String,
    /// SHA-256 of everything that went in.
    pub key: String,
    /// When its build ended.
    pub built_at: Timestamp,
    /// How long the build took.
    pub seconds: f64,
    /// The version of this crate that built it.
    pub shakedown_version: String,
    /// The files, by name.
    pub files: BTreeMap<String, FileRecord>,
    /// What only this kind of entry has.
    #[serde(flatten)]
    pub facts: K,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal, where this kind of entry has digests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// An entry that is complete and stays while this value, or a clone of it, lives.
#[derive(Clone, Debug)]
pub(crate) struct Entry<K> {
    pub(crate) dir: PathBuf,
    pub(crate) manifest: Manifest<K>,
    pub(crate) guard: Guard,
}

/// While it lives, the entry is not removed.
#[derive(Clone, Debug)]
pub struct Guard(#[allow(dead_code, reason = "held for its lock")] Arc<File>);

/// The store in a directory.
#[derive(Debug)]
pub struct Store<K> {
    dir: PathBuf,
    /// Clears what a dead build left outside of its own directory.
    sweep: fn(&Path),
    kind: PhantomData<fn() -> K>,
}

impl<K> Clone for Store<K> {
    fn clone(&self) -> Self {
        Self { dir: self.dir.clone(), sweep: self.sweep, kind: PhantomData }
    }
}

/// Why a build failed, for those who want the same in the same run.
#[derive(Serialize, Deserialize)]
struct Failure {
    /// Its id. Another run may have other limits, or a cause less.
    run: Option<String>,
    error: String,
    /// A machine under test failed, not we.
    machine: bool,
}

enum Found<K> {
    Entry(Box<Entry<K>>),
    Missing,
    Damaged(String),
}

impl<K: Kind> Store<K> {
    /// The store in `dir`, which is made if need be; what dead builds left is cleared where that is
    /// possible. What cannot be cleared is in the way of its own key only, and said there.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub(crate) fn open(dir: PathBuf, sweep: fn(&Path)) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| Fault::host(format!("cannot make the {} store {}", K::NAME, dir.display())))?;
        let store = Self { dir, sweep, kind: PhantomData };
        let _ = store.sweep();
        Ok(store)
    }

    /// The entry `key`, from the store or built by `build` into the directory it is given, with its
    /// output in the file it is given. Of several processes that want it, one builds. A build that
    /// failed is not tried again in the same `run`; without one it always is.
    ///
    /// # Errors
    /// What `build` gives; the same for those who came later in the run. A host [`Fault`] when the
    /// store cannot be written, [`Stop`] in the chain when the wait must end.
    pub(crate) fn get(
        &self,
        key: &str,
        name: &str,
        run: Option<&str>,
        deadline: &Deadline,
        events: &Events,
        build: impl FnOnce(&Path, &Path) -> Result<K>,
    ) -> Result<Entry<K>> {
        let started = Instant::now();
        let ready = |entry: Entry<K>, cached| {
            events.emit(K::ready(name, started.elapsed().as_secs_f64(), cached));
            entry
        };
        if let Found::Entry(entry) = self.find(key, false)? {
            return Ok(ready(*entry, true));
        }
        let lock = self.lock_waiting(key, name, deadline, events)?;
        match self.find(key, true)? {
            Found::Entry(entry) => return Ok(ready(*entry, true)),
            Found::Missing => {}
            Found::Damaged(why) => {
                events
                    .note(format!("{} `{name}` in the store is damaged ({why}): building it anew", K::NAME));
                self.discard(key, &lock)?;
            }
        }
        if let Some(failure) = self.failure_in(key, run) {
            let fault = if failure.machine { Fault::machine } else { Fault::host };
            let what =
                format!("{} `{name}` could not be made before in this run:\n{}", K::NAME, failure.error);
            return Err(fault(what).fix("correct the cause, then start again").into());
        }
        let (log, failed) = (self.path(key, "log"), self.path(key, "failed"));
        remove(&log)?;
        remove(&failed)?;
        events.emit(K::started(name, &log));
        let manifest = self.build(key, name, &lock, deadline, |dir| build(dir, &log));
        if let Err(error) = &manifest {
            self.remember_failure(key, run, error);
            let _ = self.temporary(key, &lock);
        }
        let manifest = manifest?;
        match self.find(key, true)? {
            Found::Entry(entry) => Ok(ready(*entry, false)),
            Found::Missing => bail!(Fault::host(format!("{} {} has vanished", K::NAME, manifest.key))),
            Found::Damaged(why) => {
                bail!(Fault::host(format!("{} `{name}` is damaged right after its build: {why}", K::NAME)))
            }
        }
    }

    /// Builds in a place of its own, then makes it an entry.
    fn build(
        &self,
        key: &str,
        name: &str,
        lock: &BuildLock,
        deadline: &Deadline,
        build: impl FnOnce(&Path) -> Result<K>,
    ) -> Result<Manifest<K>> {
        let dir = self.temporary(key, lock)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| Fault::host(format!("cannot make {}", dir.display())))?;
        let started = Instant::now();
        let facts = build(&dir)?;
        let manifest = Manifest {
            schema_version: SCHEMA,
            name: name.into(),
            key: key.into(),
            built_at: Timestamp::now(),
            seconds: started.elapsed().as_secs_f64(),
            shakedown_version: env!("CARGO_PKG_VERSION").into(),
            files: records(&dir, K::DIGESTS, deadline)?,
            facts,
        };
        self.publish(&dir, &manifest)?;
        Ok(manifest)
    }

    /// For others of the run. What was cut short by Ctrl-C says nothing about the next attempt.
    fn remember_failure(&self, key: &str, run: Option<&str>, error: &anyhow::Error) {
        let stopped = error.chain().any(|e| e.downcast_ref() == Some(&Stop::Interrupted));
        if !stopped && !process::interrupted() {
            let machine = blame(error) == Some(Blame::Machine);
            let failure = Failure { run: run.map(str::to_owned), error: format!("{error:#}"), machine };
            let _ = write_json(&self.path(key, "failed"), &failure);
        }
    }

    /// Makes the finished directory an entry, in one step that either happened or did not.
    fn publish(&self, dir: &Path, manifest: &Manifest<K>) -> Result<()> {
        let log = self.path(&manifest.key, "log");
        write_json(&dir.join(MANIFEST), manifest)?;
        let target = self.dir.join(&manifest.key);
        let publish = || -> io::Result<()> {
            File::create(dir.join(IN_USE))?;
            if log.exists() {
                fs::rename(&log, dir.join(LOG))?;
            }
            // After a power cut an entry is whole or absent.
            for file in fs::read_dir(dir)? {
                File::open(file?.path())?.sync_all()?;
            }
            File::open(dir)?.sync_all()?;
            fs::rename(dir, &target)?;
            File::open(&self.dir)?.sync_all()
        };
        publish().with_context(|| Fault::host(format!("cannot publish {}", target.display())))
    }

    /// Looks an entry up and takes it into use. `patient`: we hold its lock, so that nobody can be
    /// about to remove it, and a lock that is in the way is a glance of [`Self::list`].
    fn find(&self, key: &str, patient: bool) -> Result<Found<K>> {
        let dir = self.dir.join(key);
        let path = dir.join(IN_USE);
        let cannot = || Fault::host(format!("cannot lock {}", path.display()));
        let file = match File::options().write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(if dir.exists() {
                    Found::Damaged("no in-use file".into())
                } else {
                    Found::Missing
                });
            }
            Err(error) => return Err(error).with_context(cannot),
        };
        if patient {
            file.lock_shared().with_context(cannot)?;
        } else {
            match file.try_lock_shared() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Found::Missing),
                Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
            }
        }
        if !is_at(&file, &path) {
            return Ok(Found::Missing);
        }
        let manifest = match read_json(&dir.join(MANIFEST)).and_then(|manifest| verify(manifest, key, &dir)) {
            Ok(manifest) => manifest,
            Err(error) => return Ok(Found::Damaged(format!("{error:#}"))),
        };
        file.set_modified(SystemTime::now()).with_context(cannot)?;
        Ok(Found::Entry(Box::new(Entry { dir, manifest, guard: Guard(Arc::new(file)) })))
    }

    fn failure_in(&self, key: &str, run: Option<&str>) -> Option<Failure> {
        let failure: Failure = read_json(&self.path(key, "failed")).ok()?;
        (run.is_some() && failure.run.as_deref() == run).then_some(failure)
    }

    /// Takes an entry out of sight in one step, then removes it. Who has its files open keeps them.
    fn discard(&self, key: &str, lock: &BuildLock) -> Result<()> {
        let temporary = self.temporary(key, lock)?;
        fs::rename(self.dir.join(key), &temporary)
            .with_context(|| Fault::host(format!("cannot remove {} {key} from the store", K::NAME)))?;
        self.temporary(key, lock).map(drop)
    }

    /// The place for work on `key`, empty: it does not exist.
    fn temporary(&self, key: &str, _lock: &BuildLock) -> Result<PathBuf> {
        let dir = self.dir.join(format!("tmp-{key}"));
        if dir.exists() {
            (self.sweep)(&dir);
            refuse_mounts(&dir)?;
            remove_tree(&dir)?;
        }
        Ok(dir)
    }

    fn sweep(&self) -> Result<()> {
        for name in self.names()? {
            if let Some(key) = name.strip_prefix("tmp-").filter(|key| is_key(key))
                && let Some(lock) = self.try_lock(key)?
            {
                let _ = self.temporary(key, &lock);
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let read = || -> io::Result<Vec<String>> {
            fs::read_dir(&self.dir)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect()
        };
        read()
            .with_context(|| Fault::host(format!("cannot read the {} store {}", K::NAME, self.dir.display())))
    }

    fn path(&self, key: &str, suffix: &str) -> PathBuf {
        self.dir.join(format!("{key}.{suffix}"))
    }

    /// The right to change `key`, unless someone has it.
    fn try_lock(&self, key: &str) -> Result<Option<BuildLock>> {
        let path = self.path(key, "lock");
        let cannot = || Fault::host(format!("cannot lock {}", path.display()));
        loop {
            let mut options = File::options();
            let mut file = options
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .with_context(cannot)?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => {
                    // Whoever waits says whom for.
                    file.set_len(0)
                        .and_then(|()| write!(file, "{}", std::process::id()))
                        .with_context(cannot)?;
                    return Ok(Some(BuildLock { path, _file: file }));
                }
                // Removed by `prune` between our opening and locking it.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
            }
        }
    }

    /// Waits for that right; says so, and for whom.
    fn lock_waiting(&self, key: &str, name: &str, deadline: &Deadline, events: &Events) -> Result<BuildLock> {
        let mut waited = false;
        loop {
            if let Some(lock) = self.try_lock(key)? {
                return Ok(lock);
            }
            if !waited {
                let holder = self.holder(key);
                events.note(format!("waiting for {} `{name}`, which {holder} builds", K::NAME));
                waited = true;
            }
            deadline.check().with_context(|| {
                Fault::host(format!("{} `{name}` is still being built by {}", K::NAME, self.holder(key)))
            })?;
            std::thread::sleep(deadline.slice(POLL));
        }
    }

    fn holder(&self, key: &str) -> String {
        let pid = fs::read_to_string(self.path(key, "lock")).unwrap_or_default();
        if pid.is_empty() { "another process".into() } else { format!("process {pid}") }
    }
}

/// The right to build or remove an entry.
struct BuildLock {
    path: PathBuf,
    _file: File,
}

/// Whether the open file is still the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

/// Takes the entry in `dir` out of use, so that who wants it next builds it anew: it turned out to be
/// no good, although all its files are there.
pub(crate) fn condemn(dir: &Path) -> Result<()> {
    remove(&dir.join(MANIFEST))
}

/// A removal must not go on into a file system that something mounted below `dir`.
fn refuse_mounts(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below =
        mounts.lines().filter_map(|line| line.split(' ').nth(1)).find(|at| Path::new(at).starts_with(dir));
    match below {
        None => Ok(()),
        Some(at) => Err(Fault::host(format!("{} cannot be removed: {at} is mounted there", dir.display()))
            .fix(format!("umount {at}"))
            .into()),
    }
}

/// What a build was killed with may still be on its way out, and writing.
fn remove_tree(dir: &Path) -> Result<()> {
    let limit = Deadline::after(Duration::from_secs(10), "removal of a build");
    loop {
        match fs::remove_dir_all(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => return Ok(()),
            Err(error) => {
                let writing =
                    [io::ErrorKind::DirectoryNotEmpty, io::ErrorKind::NotFound, io::ErrorKind::ResourceBusy];
                if limit.expired() || !writing.contains(&error.kind()) {
                    return Err(error)
                        .with_context(|| Fault::host(format!("cannot remove {}", dir.display())));
                }
                std::thread::sleep(limit.slice(POLL));
            }
        }
    }
}

fn is_key(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn records(dir: &Path, digests: bool, deadline: &Deadline) -> Result<BTreeMap<String, FileRecord>> {
    let mut files = BTreeMap::new();
    let broken = || Fault::host(format!("cannot read {}", dir.display()));
    for entry in fs::read_dir(dir).with_context(broken)? {
        let path = entry.with_context(broken)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = path.metadata().with_context(broken)?.len();
        let sha256 = digests.then(|| digest::of_file(&path, deadline)).transpose()?;
        files.insert(name, FileRecord { bytes, sha256 });
    }
    Ok(files)
}

/// Cheap, since it is done at each use: presence and sizes, not digests.
fn verify<K>(manifest: Manifest<K>, key: &str, dir: &Path) -> Result<Manifest<K>> {
    if manifest.schema_version != SCHEMA || manifest.key != key {
        bail!("its manifest is of another one or of another version");
    }
    for (name, record) in &manifest.files {
        let found = dir.join(name).metadata().with_context(|| format!("no {name}"))?.len();
        if found != record.bytes {
            bail!("{name} has {found} bytes instead of {}", record.bytes);
        }
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests;
