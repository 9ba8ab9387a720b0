//! Packs what a job leaves in `artifacts/`.

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use tar::Builder;

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
    let mut builder = Builder::new(GzEncoder::new(BufWriter::new(file), Compression::default()));
    builder.follow_symlinks(false);
    pack_dir(&mut builder, &rundir.join(NAME), Path::new(NAME))?;
    builder.into_inner()?.finish()?.flush().context("cannot write the archive")
}

fn pack_dir(builder: &mut Builder<impl Write>, dir: &Path, name: &Path) -> Result<()> {
    builder.append_dir(name, dir).with_context(|| format!("cannot pack {}", dir.display()))?;
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut entries: Vec<_> = entries.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name, kind) = (entry.path(), name.join(entry.file_name()), entry.file_type()?);
        if kind.is_dir() {
            pack_dir(builder, &path, &name)?;
        } else if kind.is_symlink() {
            builder
                .append_path_with_name(&path, &name)
                .with_context(|| format!("cannot pack {}", path.display()))?;
        } else if kind.is_file() {
            let mut file = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
            builder
                .append_file(&name, &mut file)
                .with_context(|| format!("cannot pack {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;

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
