//! Attachments: an archive of files that the user of a job sent. Nothing in it is trusted.

use crate::testflinger::archive::{Limits, inside, make_dir, make_parents, members, no_links};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path};
use std::time::{Duration, SystemTime};
use tar::{Entry, EntryType};

/// Where members may be: below the name of a phase that has attachments.
const TOPS: [&str; 3] = ["provision", "firmware_update", "test"];
/// More than any job has, and what an archive made to fill the disk is stopped at.
const LIMITS: Limits = Limits { bytes: 64 << 30, members: 1 << 20 };
/// Of directories.
const MODE: u32 = 0o755;

/// Unpacks a gzipped tar into `into`, which must exist and be empty.
///
/// # Errors
/// When it is no such archive, or has a member that is not below a phase, leaves the directory by its
/// name or its link, or is neither file, directory nor link. What came before it may be unpacked.
pub(super) fn unpack(archive: impl Read, into: &Path) -> Result<()> {
    members(archive, LIMITS, |entry| {
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        unpack_one(entry, into).with_context(|| format!("member {name:?}"))
    })
}

fn unpack_one(entry: &mut Entry<'_, impl Read>, into: &Path) -> Result<()> {
    let name = inside(&entry.path().context("a name that is none")?)?;
    let top = name.components().next().and_then(|top| top.as_os_str().to_str().map(str::to_owned));
    if name.components().count() < 2 || !top.is_some_and(|top| TOPS.contains(&top.as_str())) {
        bail!("it is not below provision/, firmware_update/ or test/");
    }
    let target = into.join(&name);
    make_parents(into, &name, MODE)?;
    let mode = entry.header().mode().unwrap_or(0o644);
    match entry.header().entry_type() {
        EntryType::Directory => make_dir(&target, MODE),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            clear(&target)?;
            let owner = if mode & 0o100 == 0 { mode & !0o111 } else { mode };
            let mode = owner & 0o755 | 0o600;
            let mut file = File::options().write(true).create_new(true).mode(mode).open(&target)?;
            io::copy(entry, &mut file)?;
            // Whatever the umask is.
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            let time = Duration::from_secs(entry.header().mtime().unwrap_or(0));
            let _ = SystemTime::UNIX_EPOCH.checked_add(time).map(|time| file.set_modified(time));
            Ok(())
        }
        EntryType::Symlink => {
            let to = entry.link_name()?.context("a link to nothing")?.into_owned();
            if to.is_absolute() {
                bail!("it links to {}, out of the archive", to.display());
            }
            leads_inside(into, &name, &to).with_context(|| format!("it links to {}", to.display()))?;
            clear(&target)?;
            Ok(symlink(to, &target)?)
        }
        EntryType::Link => {
            // Relative to the archive.
            let to = entry.link_name()?.context("a link to nothing")?.into_owned();
            let to = inside(&to).with_context(|| format!("it links to {}", to.display()))?;
            no_links(into, to.parent().unwrap_or(Path::new("")))?;
            // One to a link is that link, which from here leads elsewhere.
            if !fs::symlink_metadata(into.join(&to)).is_ok_and(|meta| meta.is_file()) {
                bail!("it links to {}, which is no file", to.display());
            }
            clear(&target)?;
            Ok(fs::hard_link(into.join(to), &target)?)
        }
        EntryType::XGlobalHeader => Ok(()),
        other => bail!("it is no file, directory or link but {other:?}"),
    }
}

/// Refuses what a link called `name` would lead out of `into`, as the kernel follows it.
///
/// A step up is one only from a directory: from a link it leads to wherever the link's end is.
fn leads_inside(into: &Path, name: &Path, to: &Path) -> Result<()> {
    let mut at = name.parent().unwrap_or(Path::new("")).to_owned();
    for component in to.components() {
        if component == Component::ParentDir {
            no_links(into, &at)?;
            if !into.join(&at).is_dir() {
                bail!("{} is no directory", at.display());
            }
        }
        at = inside(&at.join(component))?;
    }
    Ok(())
}

/// Makes room for a member that comes a second time.
fn clear(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("its name is taken"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    struct Member(&'static str, EntryType, &'static str, u32);

    fn file(name: &'static str) -> Member {
        Member(name, EntryType::Regular, "", 0o644)
    }

    fn link(name: &'static str, to: &'static str) -> Member {
        Member(name, EntryType::Symlink, to, 0o777)
    }

    fn archive(members: &[Member]) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for Member(name, kind, to, mode) in members {
            let mut header = Header::new_gnu();
            // Not by `set_path`, which refuses what an attacker would write.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.as_old_mut().linkname[..to.len()].copy_from_slice(to.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            header.set_mtime(1_700_000_000);
            let content: &[u8] = if *kind == EntryType::Regular { b"content" } else { b"" };
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content).expect("appends");
        }
        builder.into_inner().expect("ends").finish().expect("ends")
    }

    fn unpacked(members: &[Member]) -> (tempfile::TempDir, Result<()>) {
        let dir = tempfile::tempdir().expect("temp dir");
        let into = dir.path().join("attachments");
        fs::create_dir(&into).expect("makes");
        let outcome = unpack(&archive(members)[..], &into);
        (dir, outcome)
    }

    #[test]
    fn files_come_with_modes_that_do_no_harm() {
        let (dir, outcome) = unpacked(&[
            file("/test/data/config.json"),
            Member("test/sub/s.sh", EntryType::Regular, "", 0o4775),
            Member("provision/odd", EntryType::Regular, "", 0o077),
            link("test/link", "data/../sub/s.sh"),
            Member("test/hard", EntryType::Link, "test/sub/s.sh", 0o644),
            file("test/sub/s.sh"),
        ]);
        outcome.expect("unpacks");
        let mode = |name: &str| {
            let meta = fs::metadata(dir.path().join("attachments").join(name)).expect(name);
            (meta.permissions().mode() & 0o7777, meta.modified().expect("a time"))
        };
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert_eq!(mode("test/data/config.json"), (0o644, then));
        assert_eq!(mode("test/hard").0, 0o755, "it was linked when the file had this mode");
        assert_eq!(mode("test/link").0, 0o644);
        assert_eq!(mode("provision/odd").0, 0o644);
    }

    #[test]
    fn nothing_leaves_the_directory() {
        for members in [
            &[file("setup/x")] as &[Member],
            &[Member("test", EntryType::Directory, "", 0o755)],
            &[file("x")],
            &[file("test/../../x")],
            &[file("test/../x")],
            &[link("test/l", "/etc/passwd")],
            &[link("test/l", "../../x")],
            &[link("test/l", "../.."), file("test/l/x")],
            &[link("test/d", "."), file("test/d/x")],
            &[Member("test/h", EntryType::Link, "../secret", 0o644)],
            &[Member("test/h", EntryType::Link, "/etc/passwd", 0o644)],
            &[link("test/d", "../provision"), Member("test/h", EntryType::Link, "test/d/x", 0o644)],
            // As the kernel goes: up from where the first link leads.
            &[link("test/l", ".."), link("test/m", "l/../x")],
            &[link("test/m", "l/../../x"), link("test/l", "..")],
            // Where it is written, it leads to `x` here; from its other name, out.
            &[
                file("test/a/b/x"),
                link("test/a/b/l", "../../../x"),
                Member("test/h", EntryType::Link, "test/a/b/l", 0o644),
            ],
            &[Member("test/fifo", EntryType::Fifo, "", 0o644)],
            &[Member("test/dev", EntryType::Char, "", 0o644)],
        ] {
            let names: Vec<_> = members.iter().map(|member| member.0).collect();
            let (dir, outcome) = unpacked(members);
            assert!(outcome.is_err(), "{names:?}");
            let outside = fs::read_dir(dir.path()).expect("reads").count();
            assert_eq!(outside, 1, "{names:?} left the directory");
        }
    }

    #[test]
    fn a_part_of_an_archive_is_an_error() {
        let whole = archive(&[file("test/a"), file("test/b")]);
        let dir = tempfile::tempdir().expect("temp dir");
        assert!(unpack(&whole[..whole.len() / 2], dir.path()).is_err());
        assert!(unpack(&b"no archive"[..], dir.path()).is_err());
    }
}
