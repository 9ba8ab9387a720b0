//! Packs what a job leaves in `artifacts/`.

use crate::testflinger::archive::{Copies, Packer};
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// The directory of a job's artifacts, and the top directory of their archive.
pub(super) const NAME: &str = "artifacts";

/// True when there is something to pack in `rundir`.
pub(super) fn are_in(rundir: &Path) -> bool {
    fs::read_dir(rundir.join(NAME)).is_ok_and(|mut entries| entries.next().is_some())
}

/// Writes the artifacts in `rundir` to `archive`. Links stay links; what is no file, directory or
/// link is left out.
///
/// # Errors
/// When something cannot be read, or the archive not be written.
pub(super) fn pack(rundir: &Path, archive: &Path) -> Result<()> {
    let file = super::place::append(archive).context("cannot make the archive")?;
    file.set_len(0)?;
    let mut packer = Packer::new(file, Copies::Faithful);
    packer.add(&rundir.join(NAME), Path::new(NAME))?;
    packer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::fs::File;

    #[test]
    fn all_that_can_be_packed_is() {
        let dir = tempfile::tempdir().expect("temp dir");
        assert!(!are_in(dir.path()));
        fs::create_dir_all(dir.path().join("artifacts/sub")).expect("makes");
        assert!(are_in(dir.path()));
        fs::write(dir.path().join("artifacts/sub/file"), "content").expect("writes");
        std::os::unix::fs::symlink("nowhere", dir.path().join("artifacts/link")).expect("links");
        let _socket =
            std::os::unix::net::UnixListener::bind(dir.path().join("artifacts/socket")).expect("binds");
        let archive = dir.path().join("artifacts.tar.gz");
        pack(dir.path(), &archive).expect("packs");
        let mut packed = tar::Archive::new(GzDecoder::new(File::open(&archive).expect("opens")));
        let names: Vec<_> = packed
            .entries()
            .expect("is a tar")
            .map(|entry| entry.expect("entry").path().expect("path").to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["artifacts", "artifacts/link", "artifacts/sub", "artifacts/sub/file"]);
    }
}
