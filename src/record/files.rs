//! What crash safety rests on: whole-file replacement, private directories, locks that time out.

use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

/// A writer holds a lock for microseconds; one that holds it this long is stopped or stuck.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// Makes one directory for its owner alone. The plain I/O error, for callers that try names.
pub(crate) fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Replaces `path` as a whole: readers and crashes see the old content or the new one.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
        file.write_all(content)?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| cannot("write", path))
}

/// As [`replace`], by the text of a value.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).with_context(|| cannot("write", path))?;
    text.push(b'\n');
    replace(path, &text)
}

/// Reads what [`write_json`] wrote.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let read = || -> Result<T> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    read().with_context(|| cannot("read", path))
}

/// Opens a file to lock it, making it where it is missing.
pub(crate) fn lock_file(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    File::options().create(true).truncate(false).write(true).mode(0o600).custom_flags(no_follow).open(path)
}

/// Waits for the exclusive lock on `file`. Ctrl-C does not end the wait: what is written under
/// these locks is the record of the interruption.
pub(crate) fn lock(file: &File, path: &Path) -> Result<()> {
    let deadline = Deadline::after(LOCK_LIMIT, "limit for file locks");
    loop {
        if try_lock(file).with_context(|| cannot("lock", path))? {
            return Ok(());
        }
        if deadline.expired() {
            return Err(deadline.expiry()).with_context(|| {
                Fault::host(format!("{} stays locked by another process", path.display()))
                    .fix(format!("find it with `fuser -v {}` and end it", path.display()))
            });
        }
        std::thread::sleep(deadline.slice(Duration::from_millis(1)));
    }
}

/// Takes the exclusive lock if nobody has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// `remove_file`, for which a file that is gone is a success.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| cannot("remove", path))
        }
        _ => Ok(()),
    }
}

pub(crate) fn cannot(what: &str, path: &Path) -> Fault {
    Fault::host(format!("cannot {what} {}", path.display()))
}

/// For tests of locks: asks until there is an answer. A child that another test has just forked
/// holds this process's locks until its `exec`.
#[cfg(test)]
pub(crate) fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(Duration::from_secs(20), "test");
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(!deadline.expired(), "no answer in time");
        std::thread::yield_now();
    }
}
