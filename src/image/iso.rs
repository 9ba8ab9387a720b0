//! Reads ISO 9660: what boots it, and which files are in it.
//!
//! Only as much as it takes to refuse a broken image with words. Sources: ECMA-119 (volume
//! descriptors 8, directory records 9.1), "El Torito" Bootable CD-ROM Format Specification 1.0,
//! IEEE P1282 draft 1.12 (Rock Ridge `NM`) and P1281 (System Use `CE`). The file is not trusted:
//! every number is checked against its size, and no structure is followed more than a bounded
//! number of steps.

use crate::fault::Fault;
use anyhow::Context;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// ECMA-119 6.1.2: the logical sector.
const SECTOR: u64 = 2048;
/// ECMA-119 6.2.1: descriptors begin after the system area.
const FIRST_DESCRIPTOR: u64 = 16;
/// More descriptors than any image has.
const MAX_DESCRIPTORS: u64 = 64;
/// More than any directory of a boot image has.
const MAX_DIRECTORY: u64 = 8 << 20;
/// Continuations of one record's system use area.
const MAX_CONTINUATIONS: usize = 8;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum IsoError {
    /// Not this format at all.
    #[error("it is no ISO 9660 image: no `CD001` at byte 32769")]
    NotIso,
    /// The file ends before what it announces.
    #[error("it is truncated: {what} ends at byte {needed}, the file at byte {actual}")]
    Truncated {
        /// What lies beyond the end.
        what: String,
        /// Where that ends.
        needed: u64,
        /// The size of the file.
        actual: u64,
    },
    /// A structure contradicts its specification.
    #[error("it is corrupt: {0}")]
    Corrupt(String),
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

type Result<T, E = IsoError> = std::result::Result<T, E>;

/// Who can start a boot entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// Platform 0x00: BIOS.
    Bios,
    /// Platform 0xEF: UEFI.
    Efi,
    /// Another one.
    Other(u8),
}

/// An entry of the El Torito boot catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// Who starts it.
    pub platform: Platform,
    /// Where its boot image is, in bytes; of an EFI entry possibly only its beginning.
    pub image: Range<u64>,
}

/// A file or directory in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// Whether it is a directory.
    pub directory: bool,
}

/// An opened image, whose volume is known to be whole.
#[derive(Debug)]
pub struct Iso<R> {
    reader: R,
    size: u64,
    /// The volume's name, such as `SHAKEDOWN`.
    pub volume_id: String,
    root: Extent,
    catalog: Option<u64>,
}

impl Iso<File> {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// A host [`Fault`] that names the file and what is wrong with it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let fault = || Fault::host(format!("{} cannot be used", path.display()));
        let file = File::open(path).with_context(fault)?;
        Self::new(file).with_context(fault)
    }
}

impl<R: Read + Seek> Iso<R> {
    /// Reads the volume descriptors.
    ///
    /// # Errors
    /// [`IsoError`] when there is no primary one, or the volume does not fit the file.
    pub fn new(mut reader: R) -> Result<Self> {
        let size = reader.seek(SeekFrom::End(0))?;
        let mut primary: Option<[u8; SECTOR as usize]> = None;
        let mut catalog = None;
        let mut terminated = false;
        for number in 0..MAX_DESCRIPTORS {
            let offset = (FIRST_DESCRIPTOR + number) * SECTOR;
            let mut sector = [0; SECTOR as usize];
            reader.seek(SeekFrom::Start(offset))?;
            if reader.read_exact(&mut sector).is_err() || &sector[1..6] != b"CD001" {
                if primary.is_none() {
                    return Err(IsoError::NotIso);
                }
                break;
            }
            match sector[0] {
                0 if sector[7..].starts_with(b"EL TORITO SPECIFICATION") => {
                    catalog.get_or_insert(u64::from(le32(&sector, 71)) * SECTOR);
                }
                1 if primary.is_none() => primary = Some(sector),
                255 => {
                    terminated = true;
                    break;
                }
                _ => {}
            }
        }
        let primary = primary.ok_or(IsoError::NotIso)?;
        if !terminated {
            return Err(IsoError::Corrupt("its volume descriptors have no end".into()));
        }
        let block = u64::from(le16(&primary, 128));
        if block != SECTOR {
            return Err(IsoError::Corrupt(format!(
                "its logical blocks have {block} bytes instead of {SECTOR}"
            )));
        }
        fits("the volume", u64::from(le32(&primary, 80)) * SECTOR, size)?;
        let root = extent(&primary[156..190], size)?;
        if !root.directory {
            return Err(IsoError::Corrupt("its root is no directory".into()));
        }
        let volume_id = String::from_utf8_lossy(&primary[40..72]).trim_end().to_owned();
        Ok(Self { reader, size, volume_id, root, catalog })
    }

    /// What firmware can start; empty for an image of data.
    ///
    /// # Errors
    /// [`IsoError`] when the catalog contradicts its specification or a boot image lies outside.
    pub fn boot_entries(&mut self) -> Result<Vec<BootEntry>> {
        let Some(offset) = self.catalog else { return Ok(Vec::new()) };
        let catalog = self.read("the boot catalog", offset, SECTOR)?;
        let (validation, rest) = catalog.split_at(32);
        let sum = validation
            .chunks_exact(2)
            .fold(0_u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
        if validation[0] != 1 || validation[30..] != [0x55, 0xaa] || sum != 0 {
            return Err(IsoError::Corrupt("the boot catalog has no valid first entry".into()));
        }
        let mut entries = Vec::new();
        let mut platform = Platform::from(validation[1]);
        // The default entry stands alone, then come sections: a header and its entries.
        let mut expected = 1;
        let mut last_section = false;
        for record in rest.chunks_exact(32) {
            match record[0] {
                // A continuation of the entry before it.
                0x44 => {}
                0x88 | 0x00 if expected > 0 => {
                    expected -= 1;
                    if record[0] == 0x88 {
                        entries.push(self.boot_entry(platform, record)?);
                    }
                }
                0x90 | 0x91 if expected == 0 && !last_section => {
                    last_section = record[0] == 0x91;
                    platform = Platform::from(record[1]);
                    expected = le16(record, 2);
                }
                0x00 => break,
                other => {
                    return Err(IsoError::Corrupt(format!(
                        "the boot catalog has an entry of type {other:#04x}"
                    )));
                }
            }
        }
        Ok(entries)
    }

    fn boot_entry(&self, platform: Platform, record: &[u8]) -> Result<BootEntry> {
        let start = u64::from(le32(record, 8)) * SECTOR;
        // Counted in virtual sectors of 512 bytes; firmware reads EFI images by their own size.
        let length = u64::from(le16(record, 6)).max(1) * 512;
        if start < FIRST_DESCRIPTOR * SECTOR {
            return Err(IsoError::Corrupt(format!("the boot image for {platform:?} lies before the volume")));
        }
        fits(&format!("the boot image for {platform:?}"), start + length, self.size)?;
        Ok(BootEntry { platform, image: start..start + length })
    }

    /// Finds a file or directory by its path, such as `live/vmlinuz`: by Rock Ridge names where the
    /// image has them, else by plain ones without regard to case and version.
    ///
    /// # Errors
    /// [`IsoError`] when a directory on the way is broken, or the file lies outside.
    pub fn find(&mut self, path: &str) -> Result<Option<Extent>> {
        let mut at = self.root;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            if !at.directory {
                return Ok(None);
            }
            match self.find_in(at, name)? {
                Some(found) => at = found,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn find_in(&mut self, directory: Extent, name: &str) -> Result<Option<Extent>> {
        if directory.bytes > MAX_DIRECTORY {
            return Err(IsoError::Corrupt(format!("a directory has {} bytes", directory.bytes)));
        }
        let bytes = self.read("a directory", directory.offset, directory.bytes)?;
        for sector in bytes.chunks(SECTOR as usize) {
            let mut rest = sector;
            // A length of zero: the next record is in the next sector.
            while let Some(length) =
                rest.first().map(|length| usize::from(*length)).filter(|length| *length > 0)
            {
                if length < 34 || length > rest.len() || 33 + usize::from(rest[32]) > length {
                    return Err(IsoError::Corrupt("a directory record has an impossible length".into()));
                }
                let (record, next) = rest.split_at(length);
                if self.has_name(record, name)? {
                    return extent(record, self.size).map(Some);
                }
                rest = next;
            }
        }
        Ok(None)
    }

    fn has_name(&mut self, record: &[u8], name: &str) -> Result<bool> {
        let end = 33 + usize::from(record[32]);
        let plain = &record[33..end];
        // The directory itself and its parent.
        if matches!(plain, [0 | 1]) {
            return Ok(false);
        }
        // System use begins at an even offset.
        let system_use = record.get(end + (end & 1)..).unwrap_or_default();
        if let Some(long) = self.rock_ridge_name(system_use)? {
            return Ok(long == name.as_bytes());
        }
        let plain = plain.split(|byte| *byte == b';').next().unwrap_or_default();
        let plain = plain.strip_suffix(b".").unwrap_or(plain);
        Ok(plain.eq_ignore_ascii_case(name.as_bytes()))
    }

    fn rock_ridge_name(&mut self, system_use: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut name: Option<Vec<u8>> = None;
        let mut area = system_use.to_vec();
        for _ in 0..MAX_CONTINUATIONS {
            let mut continuation = None;
            let mut rest = &area[..];
            while let [a, b, length, _, ..] = *rest {
                let length = usize::from(length);
                if length < 4 || length > rest.len() {
                    break;
                }
                let (field, next) = rest.split_at(length);
                match &[a, b] {
                    b"NM" if length >= 5 => name.get_or_insert_default().extend_from_slice(&field[5..]),
                    b"CE" if length >= 28 => {
                        continuation = Some((
                            u64::from(le32(field, 4)) * SECTOR + u64::from(le32(field, 12)),
                            le32(field, 20),
                        ));
                    }
                    b"ST" => break,
                    _ => {}
                }
                rest = next;
            }
            match continuation {
                Some((offset, length)) if u64::from(length) <= SECTOR => {
                    area = self.read("a directory record's continuation", offset, length.into())?;
                }
                _ => break,
            }
        }
        Ok(name)
    }

    fn read(&mut self, what: &str, offset: u64, length: u64) -> Result<Vec<u8>> {
        fits(what, offset.saturating_add(length), self.size)?;
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.reader.seek(SeekFrom::Start(offset))?;
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl From<u8> for Platform {
    fn from(id: u8) -> Self {
        match id {
            0x00 => Self::Bios,
            0xef => Self::Efi,
            other => Self::Other(other),
        }
    }
}

/// The extent of a directory record (ECMA-119 9.1), which must lie in the file.
fn extent(record: &[u8], size: u64) -> Result<Extent> {
    let offset = u64::from(le32(record, 2)) * SECTOR;
    let bytes = u64::from(le32(record, 10));
    fits("a file", offset + bytes, size)?;
    Ok(Extent { offset, bytes, directory: record[25] & 2 != 0 })
}

fn fits(what: &str, needed: u64, actual: u64) -> Result<()> {
    if needed > actual { Err(IsoError::Truncated { what: what.into(), needed, actual }) } else { Ok(()) }
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
