//! Values on the command line: times and sizes, read strictly.

use anyhow::{Context, Result, ensure};
use jiff::{Span, SpanRelativeTo, Unit};
use std::time::Duration;

pub(crate) use shakedown::vm::size::{bytes as size, disk, memory};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_strictly() {
        assert_eq!(age("30d").expect("reads"), Duration::from_secs(30 * 24 * 3600));
        assert_eq!(age("0s").expect("reads"), Duration::ZERO);
        assert!(["", "30", "-3d", "x"].iter().all(|text| age(text).is_err()));
        assert_eq!(limit("90m").expect("reads"), Duration::from_secs(90 * 60));
        assert!(["0s", "-3d", "99999999h"].iter().all(|text| limit(text).is_err()));
    }
}
