//! A search of raw disks for what a cleanup may have left: the sentinel, and all that says what a
//! disk is part of, by offset.
//!
//! Reads an image file as a disk would be read after power-off; holes are skipped. Knows no layout:
//! a signature counts wherever it is.

use super::layout::SENTINEL;
use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Find {
    /// From the disk's beginning, in bytes.
    pub offset: u64,
    /// What it is.
    pub what: &'static str,
}

impl std::fmt::Display for Find {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}", self.what, self.offset)
    }
}

/// What stands at an offset within a unit of the disk.
struct Magic {
    what: &'static str,
    /// In which steps things of this kind lie on a disk.
    unit: usize,
    /// From the beginning of the unit.
    at: usize,
    bytes: &'static [u8],
}

const fn magic(what: &'static str, unit: usize, at: usize, bytes: &'static [u8]) -> Magic {
    Magic { what, unit, at, bytes }
}

/// Each as util-linux's libblkid knows it. Where a magic number is short, what stands beside it in
/// every superblock is in it as well.
const MAGICS: [Magic; 14] = [
    magic("a sentinel", 1, 0, SENTINEL.as_bytes()),
    // magic, major version 1; magic, version 0.90.
    magic("an md superblock 1.x", 512, 0, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    magic("an md superblock 0.90", 512, 0, b"\xfc\x4e\x2b\xa9\0\0\0\0\x5a\0\0\0"),
    magic("a PV label", 512, 0, b"LABELONE"),
    magic("LVM metadata", 512, 4, b" LVM2 x[5A%r0N*>"),
    magic("a LUKS header", 512, 0, b"LUKS\xba\xbe"),
    magic("a second LUKS header", 512, 0, b"SKUL\xba\xbe"),
    // s_magic, s_state clean or not, s_errors continue.
    magic("an ext superblock", 1024, 56, b"\x53\xef\x01\0\x01\0"),
    magic("an XFS superblock", 512, 0, b"XFSB\0\0"),
    magic("a btrfs superblock", 4096, 64, b"_BHRfS_M"),
    magic("a swap signature", 4096, 4086, b"SWAPSPACE2"),
    magic(
        "a bcache superblock",
        4096,
        24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    magic("a GPT header", 512, 0, b"EFI PART"),
    magic("a ZFS uberblock", 1024, 0, b"\x0c\xb1\xba\0\0\0\0\0"),
];

/// Read at once; a whole number of all units.
const CHUNK: usize = 1 << 20;
/// More says nothing new.
const MOST: usize = 200;

/// Searches the image of a disk.
///
/// # Errors
/// When it cannot be read.
pub fn scan(image: &Path, deadline: &Deadline) -> Result<Vec<Find>> {
    let broken = || Fault::host(format!("cannot read the disk image {}", image.display()));
    let file = File::open(image).with_context(broken)?;
    let size = file.metadata().with_context(broken)?.len();
    let zeros = vec![0; 4096];
    let mut finds = Vec::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < size && finds.len() < MOST {
        deadline.check()?;
        at = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data / CHUNK as u64 * CHUNK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error).with_context(broken),
        };
        let length = (CHUNK as u64).min(size - at) as usize;
        let chunk = &mut buffer[..length];
        file.read_exact_at(chunk, at).with_context(broken)?;
        for (number, page) in chunk.chunks(4096).enumerate() {
            // Comparing memory is much faster than looking at it.
            if *page != zeros[..page.len()] {
                look(page, at + number as u64 * 4096, &mut finds);
            }
        }
        at += length as u64;
    }
    Ok(finds)
}

fn look(page: &[u8], offset: u64, finds: &mut Vec<Find>) {
    for Magic { what, unit, at, bytes } in &MAGICS {
        let mut found = |place: usize| finds.push(Find { offset: offset + place as u64, what });
        if *unit == 1 {
            // Sentinels are at the beginning of something; none lies across two pages.
            for place in memchr::memmem::find_iter(page, bytes) {
                found(place);
            }
            continue;
        }
        for start in (0..page.len()).step_by(*unit) {
            if page.get(start + at..start + at + bytes.len()) == Some(*bytes) {
                found(start + at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn scanned(writes: &[(u64, &[u8])]) -> Vec<Find> {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        file.as_file().set_len(64 << 20).expect("long");
        for (at, bytes) in writes {
            file.as_file().write_all_at(bytes, *at).expect("written");
        }
        scan(file.path(), &Deadline::after(Duration::from_secs(30), "test")).expect("scans")
    }

    #[test]
    fn every_signature_is_found_where_it_is() {
        for magic in &MAGICS {
            let at = (40 << 20) + magic.at as u64;
            assert_eq!(scanned(&[(at, magic.bytes)]), [Find { offset: at, what: magic.what }]);
        }
        let last = (64 << 20) - 4096;
        assert_eq!(scanned(&[(last, MAGICS[1].bytes)])[0].offset, last);
    }

    #[test]
    fn zeros_and_noise_have_nothing() {
        let noise: Vec<u8> = (0..1_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        assert_eq!(scanned(&[(0, &vec![0; 1 << 20]), (5 << 20, &noise)]), []);
        // Half a sector off is no label.
        assert_eq!(scanned(&[(256, b"LABELONE")]), []);
    }
}
