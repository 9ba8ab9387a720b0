//! The initramfs: busybox, our init, and the kernel modules that find the image.
//!
//! Format: cpio "newc", <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>.
//! Compressed a little: firmware that reads from an emulated CD-ROM is slow, and so is an emulated CPU
//! that unpacks.

use super::SOURCE_DATE_EPOCH;
use crate::fault::Fault;
use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// What goes in.
pub(super) struct Initramfs<'a> {
    pub(super) init: &'a str,
    pub(super) busybox: &'a [u8],
    /// `uname -r` of the kernel.
    pub(super) release: &'a str,
    /// Uncompressed modules, by their path in `modules.dep`.
    pub(super) modules: &'a BTreeMap<String, Vec<u8>>,
    /// For each module those it needs.
    pub(super) dependencies: &'a BTreeMap<String, Vec<String>>,
}

impl Initramfs<'_> {
    /// Writes it to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        File::create(path)
            .and_then(|file| self.write_to(GzEncoder::new(BufWriter::new(file), Compression::fast())))
            .and_then(|gzip| gzip.finish()?.flush())
            .with_context(|| Fault::host(format!("cannot write {}", path.display())))
    }

    fn write_to<W: Write>(&self, mut out: W) -> std::io::Result<W> {
        let base = format!("lib/modules/{}", self.release);
        let modules_dep = modules_dep(self.dependencies);
        let mut files: BTreeMap<String, (u32, &[u8])> = BTreeMap::from([
            ("init".into(), (PROGRAM, self.init.as_bytes())),
            ("bin/busybox".into(), (PROGRAM, self.busybox)),
            (format!("{base}/modules.dep"), (FILE, modules_dep.as_bytes())),
        ]);
        for (name, bytes) in self.modules {
            files.insert(format!("{base}/{}", plain_name(name)), (FILE, bytes));
        }
        // Mount points of init, then what the files need: a directory comes before what is in it.
        let mounts = ["dev", "proc", "sys", "image", "lower", "rw", "root"].map(str::to_owned);
        let mut directories = BTreeSet::from(mounts);
        for path in files.keys() {
            directories.extend(path.match_indices('/').map(|(end, _)| path[..end].to_owned()));
        }
        let mut number = 0;
        let mut entry = |name: &str, mode, links| {
            number += 1;
            let time = u32::try_from(SOURCE_DATE_EPOCH).unwrap_or(0);
            cpio::newc::Builder::new(name).ino(number).mode(mode).nlink(links).mtime(time)
        };
        for name in &directories {
            out = entry(name, DIRECTORY, 2).write(out, 0).finish()?;
        }
        for (name, (mode, bytes)) in &files {
            let size = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
            let mut writer = entry(name, *mode, 1).write(out, size);
            writer.write_all(bytes)?;
            out = writer.finish()?;
        }
        cpio::newc::trailer(out)
    }
}

/// `modules.dep` of what is inside, where no module is compressed.
fn modules_dep(dependencies: &BTreeMap<String, Vec<String>>) -> String {
    let line = |(module, needs): (&String, &Vec<String>)| {
        let needs: String = needs.iter().map(|need| format!(" {}", plain_name(need))).collect();
        format!("{}:{needs}\n", plain_name(module))
    };
    dependencies.iter().map(line).collect()
}

fn plain_name(module: &str) -> &str {
    [".xz", ".zst", ".gz"].iter().find_map(|end| module.strip_suffix(end)).unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_archive_has_directories_before_files_and_plain_modules() {
        let modules = BTreeMap::from([
            ("kernel/fs/isofs/isofs.ko.xz".to_owned(), b"isofs".to_vec()),
            ("kernel/drivers/cdrom/cdrom.ko.xz".to_owned(), b"cdrom!".to_vec()),
        ]);
        let dependencies = BTreeMap::from([
            ("kernel/fs/isofs/isofs.ko.xz".to_owned(), vec!["kernel/drivers/cdrom/cdrom.ko.xz".to_owned()]),
            ("kernel/drivers/cdrom/cdrom.ko.xz".to_owned(), vec![]),
        ]);
        let initramfs = Initramfs {
            init: "#!/bin/busybox sh\n",
            busybox: b"ELF",
            release: "6.1.0",
            modules: &modules,
            dependencies: &dependencies,
        };
        let bytes = initramfs.write_to(Vec::new()).expect("writes");
        let mut rest = &bytes[..];
        let mut found = BTreeMap::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            let name = reader.entry().name().to_owned();
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(found.contains_key(parent), "{name} before its directory");
            }
            let mode = reader.entry().mode();
            let mut content = Vec::new();
            reader.read_to_end(&mut content).expect("reads");
            found.insert(name, (mode, content));
            rest = reader.finish().expect("goes on");
        }
        let text = |name: &str| String::from_utf8_lossy(&found[name].1).into_owned();
        assert_eq!(found["init"].0, PROGRAM);
        assert_eq!(found["proc"].0, DIRECTORY);
        assert_eq!(text("lib/modules/6.1.0/kernel/drivers/cdrom/cdrom.ko"), "cdrom!");
        assert_eq!(
            text("lib/modules/6.1.0/modules.dep"),
            "kernel/drivers/cdrom/cdrom.ko:\nkernel/fs/isofs/isofs.ko: kernel/drivers/cdrom/cdrom.ko\n"
        );
    }
}
