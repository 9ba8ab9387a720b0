//! Gzipped tars: what attachments and artifacts travel as. Packs what is ours, and reads what is not:
//! nothing in an archive that came from elsewhere is trusted.

use super::gauge::{Gauge, Room};
use crate::record::files;
use anyhow::{Context, Result, bail, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use rustix::fs::{SeekFrom, seek};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use tar::{Archive, Builder, Entry, Header, HeaderMode};

/// What becomes of links, and of what else a file system knows of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copies {
    /// Links stay links; modes, times and owners travel. Whether they count is for who unpacks.
    Faithful,
    /// A link becomes what it leads to, since agents refuse links that lead out of an archive. Of the
    /// modes only the right to execute travels.
    Plain,
}

impl Copies {
    fn mode(self) -> HeaderMode {
        match self {
            Self::Faithful => HeaderMode::Complete,
            Self::Plain => HeaderMode::Deterministic,
        }
    }
}

/// Writes an archive. What is no file, directory or link is left out.
pub(super) struct Packer<W: Write> {
    builder: Builder<GzEncoder<BufWriter<W>>>,
    copies: Copies,
}

impl<W: Write> Packer<W> {
    pub(super) fn new(to: W, copies: Copies) -> Self {
        let mut builder = Builder::new(GzEncoder::new(BufWriter::new(to), Compression::default()));
        builder.follow_symlinks(copies == Copies::Plain);
        builder.mode(copies.mode());
        Self { builder, copies }
    }

    /// Adds what is at `path`, and all that is below it, as `name`.
    ///
    /// # Errors
    /// When something cannot be read, is a link to a directory that does not stay one, or the archive
    /// cannot be written.
    pub(super) fn add(&mut self, path: &Path, name: &Path) -> Result<()> {
        ensure!(self.put(path, name)?, files::cannot("pack", path).because("it is no file or directory"));
        Ok(())
    }

    /// False for what is left out.
    fn put(&mut self, path: &Path, name: &Path) -> Result<bool> {
        let cannot = || files::cannot("pack", path);
        let kind = fs::symlink_metadata(path).with_context(cannot)?.file_type();
        if kind.is_dir() {
            self.builder.append_dir(name, path).with_context(cannot)?;
            let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
            let mut entries = entries.with_context(cannot)?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                self.put(&entry.path(), &name.join(entry.file_name()))?;
            }
        } else if kind.is_symlink() && self.copies == Copies::Faithful {
            self.builder.append_path_with_name(path, name).with_context(cannot)?;
        } else if fs::metadata(path).with_context(cannot)?.is_file() {
            self.put_file(path, name).with_context(cannot)?;
        } else {
            ensure!(!kind.is_symlink(), cannot().because("it is a link to what is no file"));
            return Ok(false);
        }
        Ok(true)
    }

    /// As much as there was at first: a log may grow meanwhile, and no member may be of another size than
    /// its header says.
    fn put_file(&mut self, path: &Path, name: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        let meta = file.metadata()?;
        // Not by its blocks, which are few where the file system compresses.
        let has_holes = seek(&file, SeekFrom::Hole(0)).is_ok_and(|hole| hole < meta.len());
        file.rewind()?;
        if has_holes {
            return self.builder.append_file(name, &mut file);
        }
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(&meta, self.copies.mode());
        let size = meta.len();
        self.builder.append_data(&mut header, name, file.take(size).chain(io::repeat(0)).take(size))
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn finish(self) -> Result<()> {
        let written = self.builder.into_inner().and_then(GzEncoder::finish).and_then(|mut to| to.flush());
        written.context("cannot write the archive")
    }
}

/// How much an archive may be: more than any has, and less than fills a disk or the memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Of all its members.
    pub(super) bytes: u64,
    pub(super) members: usize,
}

/// What a reader of members takes into memory between two of them: names, and maps of sparse files.
const LARGEST_HEADERS: u64 = 256 << 10;

/// Goes through the members of an archive.
///
/// # Errors
/// When it is no gzipped tar, or a part of one, or too large; that of `act`.
pub(super) fn members<R: Read>(
    archive: R,
    limits: Limits,
    mut act: impl FnMut(&mut Entry<'_, Gauge<GzDecoder<R>>>) -> Result<()>,
) -> Result<()> {
    let room = Room::of(LARGEST_HEADERS);
    let mut archive = Archive::new(Gauge::new(GzDecoder::new(archive), &room));
    let mut bytes = 0_u64;
    for (count, entry) in archive.entries().context("it is no archive")?.enumerate() {
        let mut entry = entry.context("it is no gzipped tar, or a part of one")?;
        let headers = LARGEST_HEADERS - room.left();
        bytes = bytes.saturating_add(entry.size()).saturating_add(headers);
        if bytes > limits.bytes || count >= limits.members {
            bail!("it is too large");
        }
        room.set(u64::MAX);
        act(&mut entry)?;
        // Here, and not among the headers of the next one.
        io::copy(&mut entry, &mut io::sink()).context("it is a part of an archive")?;
        room.set(LARGEST_HEADERS);
    }
    Ok(())
}

/// `path` without a leading `/` and without `.` and `..`; refused where it leaves its root.
pub(super) fn inside(path: &Path) -> Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                if !clean.pop() {
                    bail!("it leaves the archive");
                }
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(clean)
}

/// Refuses a directory below `into` that is reached through a link: it may be anywhere.
pub(super) fn no_links(into: &Path, dir: &Path) -> Result<()> {
    let mut at = into.to_owned();
    for component in dir.components() {
        at.push(component);
        if fs::symlink_metadata(&at).is_ok_and(|meta| !meta.is_dir()) {
            bail!("it goes through {}, which is no directory", at.display());
        }
    }
    Ok(())
}

/// Makes the directories below `into` that `name` is in, none of them through a link.
pub(super) fn make_parents(into: &Path, name: &Path, mode: u32) -> Result<()> {
    let parent = name.parent().unwrap_or(Path::new(""));
    no_links(into, parent)?;
    let mut at = into.to_owned();
    for component in parent.components() {
        at.push(component);
        make_dir(&at, mode)?;
    }
    Ok(())
}

/// Makes a directory, unless there is one.
pub(super) fn make_dir(path: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // Not `is_dir`, which follows links.
            if fs::symlink_metadata(path)?.is_dir() { Ok(()) } else { bail!("there is a file of that name") }
        }
        other => other.with_context(|| files::cannot("make", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tar::EntryType;

    const LIMITS: Limits = Limits { bytes: 1 << 20, members: 10 };

    fn names(archive: &[u8]) -> Result<Vec<(String, EntryType, u32)>> {
        let mut names = Vec::new();
        members(archive, LIMITS, |entry| {
            let (name, header) = (entry.path()?.display().to_string(), entry.header());
            names.push((name, header.entry_type(), header.mode()? & 0o777));
            Ok(())
        })?;
        Ok(names)
    }

    #[test]
    fn what_can_be_packed_is_with_links_or_without() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("top/sub")).expect("makes");
        fs::write(path("top/sub/file"), "content").expect("writes");
        fs::write(path("tool"), "x").expect("writes");
        for (name, mode) in [("tool", 0o775), ("top/sub/file", 0o660), ("top", 0o750), ("top/sub", 0o750)] {
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).expect("sets");
        }
        symlink("../tool", path("top/link")).expect("links");
        let _socket = std::os::unix::net::UnixListener::bind(path("top/socket")).expect("binds");
        symlink(".", path("to-directory")).expect("links");
        let packed = |copies| {
            let mut bytes = Vec::new();
            let mut packer = Packer::new(&mut bytes, copies);
            packer.add(&path("top"), Path::new("as")).expect("packs");
            for odd in ["none", "top/socket"] {
                packer.add(&path(odd), Path::new(odd)).expect_err(odd);
            }
            let to_directory = packer.add(&path("to-directory"), Path::new("link"));
            assert_eq!(to_directory.is_ok(), copies == Copies::Faithful);
            packer.finish().expect("ends");
            names(&bytes).expect("is an archive")
        };
        use EntryType::{Directory, Regular, Symlink};
        let of = |name: &str, kind, mode| (name.to_owned(), kind, mode);
        assert_eq!(
            packed(Copies::Faithful),
            [
                of("as", Directory, 0o750),
                of("as/link", Symlink, 0o777),
                of("as/sub", Directory, 0o750),
                of("as/sub/file", Regular, 0o660),
                of("link", Symlink, 0o777),
            ]
        );
        assert_eq!(
            packed(Copies::Plain),
            [
                of("as", Directory, 0o755),
                of("as/link", Regular, 0o755),
                of("as/sub", Directory, 0o755),
                of("as/sub/file", Regular, 0o644),
            ]
        );
    }

    #[test]
    fn a_file_that_grows_meanwhile_spoils_no_archive() {
        let mut bytes = Vec::new();
        let mut packer = Packer::new(&mut bytes, Copies::Faithful);
        // It has more in it than its size says, as one that grows.
        for name in ["a", "b"] {
            packer.add(Path::new("/proc/version"), Path::new(name)).expect("packs");
        }
        packer.finish().expect("ends");
        let names: Vec<_> =
            names(&bytes).expect("is an archive").into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn holes_stay_holes() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(64 << 20).expect("sets");
        let mut bytes = Vec::new();
        let mut packer = Packer::new(&mut bytes, Copies::Faithful);
        packer.add(file.path(), Path::new("image")).expect("packs");
        packer.finish().expect("ends");
        assert!(bytes.len() < 4096, "{}", bytes.len());
    }

    fn archive(fill: impl FnOnce(&mut Builder<GzEncoder<Vec<u8>>>)) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        fill(&mut builder);
        builder.into_inner().expect("ends").finish().expect("ends")
    }

    fn append(builder: &mut Builder<impl Write>, kind: EntryType, size: u64) {
        let mut header = Header::new_gnu();
        header.set_path("x").expect("a name");
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, io::repeat(b'x').take(size)).expect("appends");
    }

    #[test]
    fn what_is_too_large_or_too_many_is_refused_before_it_is_read() {
        for (kind, size, count) in [
            (EntryType::Regular, 1 << 19, 3),
            (EntryType::Regular, 1, 11),
            (EntryType::GNULongName, LARGEST_HEADERS, 1),
            (EntryType::XHeader, LARGEST_HEADERS, 1),
        ] {
            let bytes = archive(|builder| (0..count).for_each(|_| append(builder, kind, size)));
            let error = format!("{:#}", names(&bytes).expect_err("refused"));
            assert!(error.contains("too large"), "{kind:?}: {error}");
        }
        let fits = archive(|builder| (0..10).for_each(|_| append(builder, EntryType::Regular, 1 << 16)));
        assert_eq!(names(&fits).expect("is within the limits").len(), 10);
    }

    #[test]
    fn names_of_all_members_together_count() {
        let long = "n".repeat(100 << 10);
        let bytes = archive(|builder| {
            for number in 0..10 {
                let mut header = Header::new_gnu();
                header.set_size(0);
                builder.append_data(&mut header, format!("{long}{number}"), io::empty()).expect("appends");
            }
        });
        let mut count = 0;
        let limits = Limits { bytes: 300 << 10, members: 10 };
        members(&bytes[..], limits, |_| {
            count += 1;
            Ok(())
        })
        .expect_err("refused");
        assert_eq!(count, 2);
    }

    #[test]
    fn a_part_of_an_archive_is_an_error() {
        let whole = archive(|builder| append(builder, EntryType::Regular, 1000));
        names(&whole).expect("is whole");
        for part in [&whole[..whole.len() / 2], b"no archive", b""] {
            names(part).expect_err("is a part");
        }
    }
}
