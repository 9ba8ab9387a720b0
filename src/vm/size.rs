//! Sizes of disks and memories, as people write them: `500M`, `5G`.

use anyhow::{Context, Result, bail, ensure};

/// Bytes, from `500M` or `5G`; units are powers of 1024.
///
/// # Errors
/// When it is written otherwise, or is too large for 64 bits.
pub fn bytes(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => bail!("write it like `500M` or `5G`"),
    };
    let number: u64 = digits.parse().context("write it like `500M` or `5G`")?;
    number.checked_mul(1 << shift).context("it is too large")
}

/// A disk's size in bytes: whole sectors, and some.
///
/// # Errors
/// As [`bytes`], and when no disk can have it.
pub fn disk(text: &str) -> Result<u64> {
    let bytes = bytes(text)?;
    ensure!(bytes > 0 && bytes.is_multiple_of(512), "a disk has a whole number of sectors of 512 bytes");
    ensure!(bytes < 1 << 62, "it is too large");
    Ok(bytes)
}

/// A machine's memory, in MiB.
///
/// # Errors
/// As [`bytes`], and when no machine can have it.
pub fn memory(text: &str) -> Result<u32> {
    let bytes = bytes(text)?;
    ensure!(bytes > 0 && bytes.is_multiple_of(1 << 20), "a machine has a whole number of MiB");
    u32::try_from(bytes >> 20).context("it is too large")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_strictly() {
        assert_eq!((bytes("5G").expect("reads"), bytes("500").expect("reads")), (5 << 30, 500));
        assert!(["", "G", "5g", "-1", "99999999999T"].iter().all(|text| bytes(text).is_err()));
    }

    #[test]
    fn disks_have_sectors_and_machines_mebibytes() {
        assert_eq!(disk("1500M").expect("reads"), 1500 << 20);
        assert!(["0", "100", "8388608T"].iter().all(|text| disk(text).is_err()));
        assert_eq!(memory("2G").expect("reads"), 2048);
        assert!(["0", "1500K", "4194304G"].iter().all(|text| memory(text).is_err()));
    }
}
