//! What the boot files need of a root file system's tar.

use crate::fault::Fault;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

/// Taken out of a root file system.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// `uname -r` of the kernel.
    pub(super) release: String,
    pub(super) kernel: Vec<u8>,
    pub(super) busybox: Vec<u8>,
    modules_dep: String,
    modules_builtin: String,
    /// Installed versions by package.
    pub(super) packages: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the tar at `path` once; file contents that are not needed are skipped, not read.
    ///
    /// # Errors
    /// A host [`Fault`] that names what the root lacks.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut tree = Self::default();
        let mut status = String::new();
        walk(path, |name, entry| {
            if let Some(release) = name.strip_prefix("boot/vmlinuz-") {
                if !tree.kernel.is_empty() {
                    bail!("two kernels: {} and {release}", tree.release);
                }
                release.clone_into(&mut tree.release);
                entry.read_to_end(&mut tree.kernel)?;
            } else if matches!(name, "bin/busybox" | "usr/bin/busybox") {
                entry.read_to_end(&mut tree.busybox)?;
            } else if name == "var/lib/dpkg/status" {
                entry.read_to_string(&mut status)?;
            } else if name.ends_with("/modules.dep") {
                entry.read_to_string(&mut tree.modules_dep)?;
            } else if name.ends_with("/modules.builtin") {
                entry.read_to_string(&mut tree.modules_builtin)?;
            }
            Ok(())
        })?;
        tree.packages = installed(&status);
        for (there, what) in [
            (!tree.kernel.is_empty(), "kernel (boot/vmlinuz-*)"),
            (!tree.busybox.is_empty(), "busybox"),
            (!tree.modules_dep.is_empty(), "modules.dep"),
            (!tree.packages.is_empty(), "dpkg status"),
        ] {
            if !there {
                return Err(Fault::host(format!("the root file system has no {what}")).into());
            }
        }
        Ok(tree)
    }

    /// The lines of `modules.dep` for `wanted` and for all that these need. Built-in ones need none.
    ///
    /// # Errors
    /// A host [`Fault`] that names a module the kernel does not have.
    pub(super) fn dependencies<'a>(
        &self,
        wanted: impl Iterator<Item = &'a str>,
    ) -> Result<BTreeMap<String, Vec<String>>> {
        let lines: BTreeMap<&str, Vec<&str>> = self
            .modules_dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(module, needs)| (module, needs.split_whitespace().collect()))
            .collect();
        let builtin: BTreeSet<String> = self.modules_builtin.lines().map(module_name).collect();
        let by_name: BTreeMap<String, &str> = lines.keys().map(|path| (module_name(path), *path)).collect();
        let mut chosen = BTreeMap::new();
        for module in wanted {
            let name = module_name(module);
            let Some(path) = by_name.get(&name) else {
                if builtin.contains(&name) {
                    continue;
                }
                return Err(Fault::host(format!("kernel {} has no module `{module}`", self.release)).into());
            };
            // modules.dep has the whole closure on each line.
            for path in std::iter::once(path).chain(&lines[path]) {
                let needs = lines.get(path).into_iter().flatten();
                chosen.insert((*path).to_owned(), needs.map(|need| (*need).to_owned()).collect());
            }
        }
        Ok(chosen)
    }

    /// The contents of modules, as named in `modules.dep`; from the tar at `path`.
    ///
    /// # Errors
    /// When one is missing.
    pub(super) fn modules<'a>(
        &self,
        path: &Path,
        names: impl Iterator<Item = &'a String>,
    ) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut wanted: BTreeSet<&str> = names.map(String::as_str).collect();
        let mut modules = BTreeMap::new();
        let prefix = format!("lib/modules/{}/", self.release);
        walk(path, |name, entry| {
            let name = name.strip_prefix("usr/").unwrap_or(name);
            if let Some(module) = name.strip_prefix(&prefix).and_then(|name| wanted.take(name)) {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                modules.insert(module.to_owned(), bytes);
            }
            Ok(())
        })?;
        match wanted.first() {
            None => Ok(modules),
            Some(missing) => {
                Err(Fault::host(format!("the root file system lacks the kernel module {missing}")).into())
            }
        }
    }
}

/// Calls `visit` with the name (without `./`) and the content of every regular file.
fn walk(path: &Path, mut visit: impl FnMut(&str, &mut dyn Read) -> Result<()>) -> Result<()> {
    let broken = || Fault::host(format!("cannot read {}", path.display()));
    let file = File::open(path).with_context(broken)?;
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek().with_context(broken)? {
        let mut entry = entry.with_context(broken)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path().with_context(broken)?.to_string_lossy().into_owned();
        visit(name.trim_start_matches("./"), &mut entry).with_context(|| format!("reading {name}"))?;
    }
    Ok(())
}

/// `kernel/drivers/scsi/sr-mod.ko.xz` is `sr_mod`: the kernel takes `-` and `_` for the same.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Installed packages and versions of a dpkg status file.
fn installed(status: &str) -> BTreeMap<String, String> {
    let field = |paragraph: &str, name: &str| {
        paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned)
    };
    status
        .split("\n\n")
        .filter(|paragraph| field(paragraph, "Status").is_some_and(|status| status.ends_with(" installed")))
        .filter_map(|paragraph| Some((field(paragraph, "Package")?, field(paragraph, "Version")?)))
        .collect()
}

/// Writes a tar with the recipe's overlay and, after it, the project's own files.
///
/// Directories are made as they are needed, mode 0755, and existing ones keep theirs; everything
/// belongs to root.
///
/// # Errors
/// When a file cannot be read or the tar not be written.
pub(super) fn write_overlay(out: &Path, own: &[super::OwnFile]) -> Result<()> {
    let broken = || Fault::host(format!("cannot write {}", out.display()));
    let file = File::create(out).with_context(broken)?;
    let mut tar = tar::Builder::new(io::BufWriter::new(file));
    for file in super::files::OVERLAY {
        let mode = if file.executable { 0o755 } else { 0o644 };
        let mut header = header(tar::EntryType::Regular, mode, file.text.len() as u64);
        tar.append_data(&mut header, file.path, file.text.as_bytes()).with_context(broken)?;
    }
    for (path, target) in super::files::LINKS {
        tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), path, target).with_context(broken)?;
    }
    for file in own {
        file.append(&mut tar).with_context(broken)?;
    }
    tar.into_inner().and_then(|mut writer| writer.flush()).with_context(broken)
}

pub(super) fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header.set_mtime(super::SOURCE_DATE_EPOCH);
    header
}

/// A module as `insmod` of any kernel takes it. Distributions compress them, each in its own way.
///
/// # Errors
/// When the host lacks the program that unpacks it.
pub(super) fn uncompressed(
    name: &str,
    bytes: Vec<u8>,
    scratch: &Path,
    deadline: &crate::deadline::Deadline,
) -> Result<Vec<u8>> {
    let program = match name.rsplit('.').next() {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => {
            let mut plain = Vec::new();
            flate2::read::GzDecoder::new(&bytes[..])
                .read_to_end(&mut plain)
                .with_context(|| format!("unpacking {name}"))?;
            return Ok(plain);
        }
        _ => return Ok(bytes),
    };
    let packed = scratch.join(name.rsplit('/').next().unwrap_or(name));
    let plain = packed.with_extension("");
    std::fs::write(&packed, bytes)
        .with_context(|| Fault::host(format!("cannot write {}", packed.display())))?;
    let mut command = std::process::Command::new(program);
    command.args(["-d", "-q", "-f"]).arg(&packed);
    crate::process::output(command, deadline).with_context(|| {
        Fault::host(format!("cannot unpack the kernel module {name}"))
            .fix(format!("apt-get install {program}"))
    })?;
    let mut bytes = Vec::new();
    File::open(&plain)
        .and_then(|file| BufReader::new(file).read_to_end(&mut bytes))
        .with_context(|| Fault::host(format!("cannot read {}", plain.display())))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/isofs/isofs.ko:\n\
        kernel/drivers/scsi/sr_mod.ko: kernel/drivers/cdrom/cdrom.ko kernel/drivers/scsi/scsi_mod.ko\n\
        kernel/drivers/cdrom/cdrom.ko:\nkernel/drivers/scsi/scsi_mod.ko: kernel/lib/crc-t10dif.ko\n\
        kernel/lib/crc-t10dif.ko:\n";
    const STATUS: &str = "Package: bash\nStatus: install ok installed\nVersion: 5.2\n\n\
        Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n";

    fn tar(leave_out: &str) -> tempfile::NamedTempFile {
        let out = tempfile::NamedTempFile::new().expect("temp file");
        let mut tar = tar::Builder::new(out.as_file());
        for (path, text) in [
            ("./boot/vmlinuz-6.1.0", "kernel"),
            ("./usr/bin/busybox", "busybox"),
            ("./usr/lib/modules/6.1.0/modules.dep", DEP),
            ("./usr/lib/modules/6.1.0/modules.builtin", "kernel/drivers/virtio/virtio-pci.ko\n"),
            ("./usr/lib/modules/6.1.0/kernel/fs/isofs/isofs.ko", "isofs"),
            ("./var/lib/dpkg/status", STATUS),
        ] {
            if path != leave_out {
                let mut header = header(tar::EntryType::Regular, 0o644, text.len() as u64);
                tar.append_data(&mut header, path, text.as_bytes()).expect("appends");
            }
        }
        tar.finish().expect("ends");
        drop(tar);
        out
    }

    #[test]
    fn what_boots_is_found_and_what_lacks_is_named() {
        let file = tar("");
        let tree = Tree::read(file.path()).expect("is whole");
        assert_eq!(
            (tree.release.as_str(), &tree.kernel[..], &tree.busybox[..]),
            ("6.1.0", &b"kernel"[..], &b"busybox"[..])
        );
        assert_eq!(tree.packages, BTreeMap::from([("bash".into(), "5.2".into())]));
        for (path, words) in [("./boot/vmlinuz-6.1.0", "no kernel"), ("./usr/bin/busybox", "no busybox")] {
            let text = format!("{:#}", Tree::read(tar(path).path()).expect_err("is not whole"));
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn modules_come_with_all_they_need() {
        let file = tar("");
        let tree = Tree::read(file.path()).expect("is whole");
        let needs = tree.dependencies(["sr-mod", "virtio_pci"].into_iter()).expect("resolves");
        let names: Vec<_> = needs.keys().map(|path| module_name(path)).collect();
        assert_eq!(names, ["cdrom", "scsi_mod", "sr_mod"], "virtio_pci is built in");
        let text = format!("{:#}", tree.dependencies(["nvme"].into_iter()).expect_err("has none"));
        assert!(text.contains("no module `nvme`"), "{text}");
        let isofs = ["kernel/fs/isofs/isofs.ko".to_owned()];
        assert_eq!(tree.modules(file.path(), isofs.iter()).expect("is there")[&isofs[0]], b"isofs");
        let cdrom = ["kernel/drivers/cdrom/cdrom.ko".to_owned()];
        let text = format!("{:#}", tree.modules(file.path(), cdrom.iter()).expect_err("is not in the tar"));
        assert!(text.contains("cdrom.ko"), "{text}");
    }

    #[test]
    fn the_overlay_has_every_file_for_root() {
        let out = tempfile::NamedTempFile::new().expect("temp file");
        write_overlay(out.path(), &[]).expect("writes");
        let mut found = BTreeMap::new();
        let mut archive = tar::Archive::new(File::open(out.path()).expect("opens"));
        for entry in archive.entries().expect("reads") {
            let entry = entry.expect("reads");
            assert_eq!(entry.header().uid().expect("has one"), 0);
            let path = entry.path().expect("has one").to_string_lossy().into_owned();
            found.insert(path, entry.header().mode().expect("has one"));
        }
        assert_eq!(found["usr/local/lib/shakedown/lan-address"], 0o755);
        assert_eq!(found["etc/resolv.conf"], 0o777);
        assert!(found.keys().all(|path| !path.ends_with('/')), "directories keep their modes");
    }
}
