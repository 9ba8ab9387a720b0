//! The archive of a job's attachments: a gzipped tar, packed once for all machines with the same files.

use crate::fault::Fault;
use crate::testflinger::archive::{Copies, Packer};
use crate::testflinger::template::Attachment;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// A file without a name: however this process ends, nothing is left.
#[derive(Debug)]
pub(super) struct Archive(File);

impl Archive {
    /// By which this process, and no other, can open it again.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// Archives by what is in them.
#[derive(Debug, Default)]
pub(super) struct Packs(Mutex<BTreeMap<Vec<Attachment>, Arc<Archive>>>);

impl Packs {
    /// The archive of `attachments`.
    ///
    /// # Errors
    /// A host [`Fault`] for a file that cannot be read, or no room for the archive.
    pub(super) fn get(&self, attachments: &[Attachment]) -> Result<Arc<Archive>> {
        // Held while packing: what several wait for is packed once.
        let mut packs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(archive) = packs.get(attachments) {
            return Ok(Arc::clone(archive));
        }
        let archive = Arc::new(pack(attachments)?);
        packs.insert(attachments.to_vec(), Arc::clone(&archive));
        Ok(archive)
    }
}

fn pack(attachments: &[Attachment]) -> Result<Archive> {
    let file = tempfile::tempfile().context(Fault::host("cannot make an archive of the attachments"))?;
    let mut packer = Packer::new(&file, Copies::Faithful);
    for Attachment { local, member } in attachments {
        packer
            .add(local, member)
            .with_context(|| Fault::host(format!("cannot pack the attachment {}", local.display())))?;
    }
    packer.finish().context(Fault::host("cannot write the archive of the attachments"))?;
    Ok(Archive(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    #[test]
    fn files_directories_and_modes_are_packed_and_only_once() {
        let dir = tempfile::tempdir().expect("temp dir");
        let (tool, data) = (dir.path().join("tool"), dir.path().join("data"));
        std::fs::write(&tool, "x").expect("writes");
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).expect("sets");
        std::fs::create_dir(&data).expect("makes");
        std::os::unix::fs::symlink("one", data.join("link")).expect("links");
        std::fs::write(data.join("one"), "1").expect("writes");
        let of = |local: &Path, member: &str| Attachment { local: local.into(), member: member.into() };
        let attachments = [of(&tool, "test/bin/tool"), of(&data, "provision/data")];
        let packs = Packs::default();
        let archive = packs.get(&attachments).expect("packs");
        assert!(Arc::ptr_eq(&archive, &packs.get(&attachments).expect("packs")));
        let file = File::open(archive.path()).expect("opens");
        let mut read = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let mut members: Vec<_> = read
            .entries()
            .expect("a tar")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let mode = entry.header().mode().expect("a mode") & 0o100;
                (
                    entry.path().expect("a path").display().to_string(),
                    entry.header().entry_type().as_byte(),
                    mode,
                )
            })
            .collect();
        members.sort();
        let expected = [
            ("provision/data", b'5', 0o100),
            ("provision/data/link", b'2', 0o100),
            ("provision/data/one", b'0', 0),
            ("test/bin/tool", b'0', 0o100),
        ];
        assert_eq!(members, expected.map(|(name, kind, mode)| (name.to_owned(), kind, mode)));
        let gone = packs.get(&[of(&dir.path().join("none"), "test/none")]).expect_err("it is not there");
        assert!(format!("{gone:#}").contains("none"));
    }
}
