//! Literals of the attribute: sizes, durations, and words with a suggestion for typos.

use std::fmt::Display;

/// Bytes from `"4G"`, `"1536M"`, `"512K"`, `"1T"`; the units are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => {
            return Err(format!("`{text}` is not a size: write a whole number and K, M, G or T, as in `4G`"));
        }
    };
    let number = positive(number, text)?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 64 bits can say"))
}

/// Milliseconds from `"90s"`, `"3m"`, `"1h"`, `"1500ms"`.
pub(crate) fn duration(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(format!(
                "`{text}` is not a duration: write a whole number and ms, s, m or h, as in `3m`"
            ));
        }
    };
    let number = positive(number, text)?;
    // A bound far above any sense, far below where clock arithmetic overflows.
    number
        .checked_mul(factor)
        .filter(|ms| *ms <= 1_000 * 3_600_000)
        .ok_or_else(|| format!("`{text}` is more than 1000 hours"))
}

/// One label of RFC 1123, section 2.1.
pub(crate) fn hostname(text: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=63).contains(&text.len())
        && text.chars().all(plain)
        && !text.starts_with('-')
        && !text.ends_with('-')
    {
        return Ok(());
    }
    Err(format!("`{text}` is not a hostname: write up to 63 letters, digits and inner hyphens"))
}

fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

fn positive(number: &str, text: &str) -> Result<u64, String> {
    match number.parse() {
        Ok(0) => Err(format!("`{text}` is nothing: it must be more than zero")),
        Ok(number) => Ok(number),
        Err(_) if number.is_empty() => Err(format!("`{text}` does not begin with a number")),
        Err(_) => Err(format!("`{text}` is more than 64 bits can say")),
    }
}

/// Says that `word` is none of `known`, with the nearest of them first.
pub(crate) fn unknown(what: &str, word: impl Display, known: &[&str]) -> String {
    let word = word.to_string();
    let nearest = known
        .iter()
        .map(|k| (strsim::jaro_winkler(&word.to_lowercase(), k), *k))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let list = known.join("`, `");
    match nearest {
        Some((_, nearest)) => {
            format!("unknown {what} `{word}`; did you mean `{nearest}`? Known are `{list}`")
        }
        None => format!("unknown {what} `{word}`; known are `{list}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("4G"), Ok(4 << 30));
        assert_eq!(size("1536M"), Ok(1536 << 20));
        for wrong in ["", "4", "G", "4g", "4GB", "1.5G", "-1G", "0G", "99999999T", "99999999999999999999G"] {
            let message = size(wrong).expect_err(wrong);
            assert!(message.contains(&format!("`{wrong}`")), "{message}");
        }
    }

    #[test]
    fn durations_are_in_milliseconds() {
        for (text, ms) in [("1500ms", 1_500), ("90s", 90_000), ("3m", 180_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(ms));
        }
        for wrong in ["", "3", "m", "3min", "1m30s", "0s", "1001h", "18446744073709551615h"] {
            let message = duration(wrong).expect_err(wrong);
            assert!(message.contains(&format!("`{wrong}`")), "{message}");
        }
    }

    #[test]
    fn hostnames_are_one_label() {
        assert!(["a", "node-1", "N1"].iter().all(|name| hostname(name).is_ok()));
        let long = "x".repeat(64);
        assert!(["", "-a", "a-", "a.b", "a_b", "ä", &long].iter().all(|name| hostname(name).is_err()));
    }

    #[test]
    fn typos_get_the_nearest_word() {
        let message = unknown("key", "timout", &["name", "timeout"]);
        assert_eq!(message, "unknown key `timout`; did you mean `timeout`? Known are `name`, `timeout`");
        assert!(!unknown("key", "zzz", &["name", "timeout"]).contains("did you mean"));
    }
}
