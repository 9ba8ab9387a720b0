//! Values on the command line: times and sizes, read strictly.

use anyhow::{Context, Result, bail, ensure};
use jiff::{Span, SpanRelativeTo, Unit};
use std::time::Duration;

/// How long ago something was: `12h`, `30d`.
pub(crate) fn age(text: &str) -> Result<Duration> {
    let span: Span = text.parse().context("write it like `90s`, `12h` or `30d`")?;
    let seconds = span.total((Unit::Second, SpanRelativeTo::days_are_24_hours()))?;
    Duration::try_from_secs_f64(seconds).context("it must not be negative")
}

/// How long something may take: `90s`, `12h`.
pub(crate) fn limit(text: &str) -> Result<Duration> {
    let limit = age(text)?;
    ensure!(!limit.is_zero(), "it must be more than none");
    // Far below where the arithmetic of clocks overflows.
    ensure!(limit < Duration::from_secs(1 << 30), "it is too long");
    Ok(limit)
}

/// Bytes, from `500M` or `5G`; units are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64> {
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

/// A disk's size: whole sectors, and some.
pub(crate) fn disk(text: &str) -> Result<u64> {
    let bytes = size(text)?;
    ensure!(bytes > 0 && bytes.is_multiple_of(512), "a disk has a whole number of sectors of 512 bytes");
    ensure!(bytes < 1 << 62, "it is too large");
    Ok(bytes)
}

/// A machine's memory, in MiB.
pub(crate) fn memory(text: &str) -> Result<u32> {
    let bytes = size(text)?;
    ensure!(bytes > 0 && bytes.is_multiple_of(1 << 20), "a machine has a whole number of MiB");
    u32::try_from(bytes >> 20).context("it is too large")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_read_strictly() {
        assert_eq!(age("30d").expect("reads"), Duration::from_secs(30 * 24 * 3600));
        assert_eq!(age("0s").expect("reads"), Duration::ZERO);
        assert!(["", "30", "-3d", "x"].iter().all(|text| age(text).is_err()));
        assert_eq!(limit("90m").expect("reads"), Duration::from_secs(90 * 60));
        assert!(["0s", "-3d", "99999999h"].iter().all(|text| limit(text).is_err()));
        assert_eq!((size("5G").expect("reads"), size("500").expect("reads")), (5 << 30, 500));
        assert!(["", "G", "5g", "-1", "99999999999T"].iter().all(|text| size(text).is_err()));
    }

    #[test]
    fn disks_have_sectors_and_machines_mebibytes() {
        assert_eq!(disk("1500M").expect("reads"), 1500 << 20);
        assert!(["0", "100", "8388608T"].iter().all(|text| disk(text).is_err()));
        assert_eq!(memory("2G").expect("reads"), 2048);
        assert!(["0", "1500K", "4194304G"].iter().all(|text| memory(text).is_err()));
    }
}
