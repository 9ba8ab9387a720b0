//! Scratch space: a private directory for sockets, overlays and disks, gone with its owner.
//!
//! A directory is locked by a file in it for as long as its owner lives. What a killed owner left,
//! the next start removes with [`sweep_under`].

use super::files;
use crate::fault::Fault;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const LOCK: &str = ".lock";

/// A directory of mode 0700 that is removed on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// In `base`, which is made where it is missing: for disks, the cache directory.
    ///
    /// # Errors
    /// A host [`Fault`] when the directory cannot be made.
    pub fn under(base: &Path) -> Result<Self> {
        let private = fs::Permissions::from_mode(0o700);
        let make = || -> Result<Self> {
            fs::create_dir_all(base)?;
            loop {
                let mut builder = tempfile::Builder::new();
                let path = builder.prefix(&prefix()).permissions(private.clone()).tempdir_in(base)?.keep();
                if let Some(lock) = claim(&path) {
                    return Ok(Self { path, _lock: lock });
                }
                // A sweep took the directory for a dead one before it was locked.
            }
        };
        make().with_context(|| {
            Fault::host(format!("cannot make scratch space in {}", base.display()))
                .fix("make the directory writable and see that its file system has room")
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now is removed by a sweep.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes what dead owners left in `base`: directories of our name and of this user, no links.
///
/// # Errors
/// A host [`Fault`] when `base` exists and cannot be read, or when a directory cannot be removed.
pub fn sweep_under(base: &Path) -> Result<usize> {
    let entries = match fs::read_dir(base) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries.with_context(|| files::cannot("read", base))?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.with_context(|| files::cannot("read", base))?;
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(&prefix())
            // `DirEntry::metadata` does not follow links.
            && entry.metadata().is_ok_and(|data| data.is_dir() && data.uid() == uid());
        if ours && let Some(_lock) = claim(&path) {
            removed += usize::from(discard(&path).with_context(|| files::cannot("remove", &path))?);
        }
    }
    Ok(removed)
}

/// Removes a claimed directory; `false` when another sweep was faster.
fn discard(path: &Path) -> std::io::Result<bool> {
    use std::io::ErrorKind::{DirectoryNotEmpty, NotFound};
    // Under another name, where a maker that has not locked it yet cannot come in any more.
    let dead = path.with_extension("dead");
    match fs::rename(path, &dead).and_then(|()| fs::remove_dir_all(&dead)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), NotFound | DirectoryNotEmpty) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The lock of a scratch directory, unless somebody else has it or it is gone.
fn claim(directory: &Path) -> Option<File> {
    let path = directory.join(LOCK);
    let file = files::lock_file(&path).ok()?;
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    let locked = files::try_lock(&file).ok()?;
    let current = file.metadata().ok().zip(fs::symlink_metadata(&path).ok());
    (locked && current.is_some_and(|(a, b)| same(&a, &b))).then_some(file)
}

fn prefix() -> String {
    format!("shakedown-{}-", uid())
}

fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn base() -> tempfile::TempDir {
        tempfile::tempdir().expect("temp dir")
    }

    #[test]
    fn it_is_private_and_gone_with_its_owner() {
        let base = base();
        let scratch = Scratch::under(base.path()).expect("makes");
        let mode = fs::metadata(scratch.path()).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::write(scratch.path().join("disk.img"), "x").expect("writes");
        drop(scratch);
        assert_eq!(fs::read_dir(base.path()).expect("reads").count(), 0);
    }

    #[test]
    fn a_sweep_takes_the_dead_and_spares_the_living() {
        let base = base();
        let living = Scratch::under(base.path()).expect("makes");
        let dead = Scratch::under(base.path()).expect("makes");
        fs::write(dead.path().join("qmp.sock"), "").expect("writes");
        let left = dead.path().to_owned();
        let kept = base.path().join("copy");
        fs::rename(&left, &kept).expect("is moved out of the way of drop");
        drop(dead);
        fs::rename(&kept, &left).expect("is moved back");
        files::eventually(|| (sweep_under(base.path()).expect("sweeps") == 1).then_some(()));
        assert!(living.path().exists() && !left.exists());
        assert_eq!(sweep_under(base.path()).expect("sweeps"), 0);
    }

    #[test]
    fn a_directory_that_died_before_its_lock_is_swept() {
        let base = base();
        let path = base.path().join(format!("{}abc", prefix()));
        fs::create_dir(&path).expect("makes");
        assert_eq!(sweep_under(base.path()).expect("sweeps"), 1);
        assert!(!path.exists());
    }

    #[test]
    fn links_and_other_names_are_left_alone() {
        let (base, target) = (base(), base());
        fs::write(target.path().join("precious"), "").expect("writes");
        symlink(target.path(), base.path().join(format!("{}link", prefix()))).expect("links");
        let inside = base.path().join(format!("{}dir", prefix()));
        fs::create_dir(&inside).expect("makes");
        symlink(target.path(), inside.join("link")).expect("links");
        fs::create_dir(base.path().join("shakedown-other")).expect("makes");
        assert_eq!(sweep_under(base.path()).expect("sweeps"), 1);
        assert!(target.path().join("precious").exists() && base.path().join("shakedown-other").exists());
        assert_eq!(sweep_under(&base.path().join("missing")).expect("nothing to do"), 0);
    }

    #[test]
    fn a_lock_that_is_a_link_is_not_opened() {
        let (base, target) = (base(), base());
        let path = base.path().join(format!("{}abc", prefix()));
        fs::create_dir(&path).expect("makes");
        symlink(target.path().join("made"), path.join(LOCK)).expect("links");
        assert_eq!(sweep_under(base.path()).expect("sweeps"), 0);
        assert!(!target.path().join("made").exists());
    }

    #[test]
    fn makers_and_sweepers_do_not_meet() {
        let base = base();
        std::thread::scope(|threads| {
            let makers: Vec<_> = (0..4)
                .map(|_| {
                    threads.spawn(|| {
                        for _ in 0..50 {
                            let scratch = Scratch::under(base.path()).expect("makes");
                            fs::write(scratch.path().join("file"), "").expect("it is still there");
                        }
                    })
                })
                .collect();
            while !makers.iter().all(|maker| maker.is_finished()) {
                sweep_under(base.path()).expect("a sweep minds nobody");
            }
        });
        assert_eq!(sweep_under(base.path()).expect("sweeps"), 0, "nothing is left");
    }
}
