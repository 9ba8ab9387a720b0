//! What the ledger tells about how long scenarios take.
//!
//! Owns which lines count: passed ones, on the accelerator at hand, the newest of them. What to do
//! with the figures is the harness's business.

use super::files;
use super::ledger::MOST_SECONDS;
use super::metadata::{BootKind, Outcome};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

/// How much of the end of a ledger is looked at: some thousand executions.
const TAIL: u64 = 8 << 20;
/// How many executions of a scenario count. It changes, and so does its machine.
const NEWEST: usize = 11;

/// Durations by scenario.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// In seconds, oldest first.
    by_scenario: HashMap<String, Vec<f64>>,
    by_boot: HashMap<BootKind, Vec<f64>>,
}

/// As much of a line as is needed; the rest is not even read into memory.
#[derive(Deserialize)]
struct Glance {
    scenario: String,
    outcome: Outcome,
    boot: BootKind,
    accelerator: Option<String>,
    duration_seconds: f64,
    timings: Option<Build>,
}

#[derive(Deserialize)]
struct Build {
    build_seconds: Option<f64>,
}

impl History {
    /// That in the ledger at `path`, of machines with this accelerator and of scenarios without
    /// one. No ledger is an empty history. Lines that are none are passed over: `ledger check`
    /// tells of them.
    ///
    /// # Errors
    /// A host [`Fault`](crate::fault::Fault) when the ledger cannot be read.
    pub fn read(path: &Path, accelerator: Option<&str>) -> Result<Self> {
        Self::read_where(path, |glance| {
            glance.boot == BootKind::None || glance.accelerator.as_deref() == accelerator
        })
    }

    /// That of all machines, whatever their accelerator: to compare scenarios with each other, and not
    /// to say what they take here.
    ///
    /// # Errors
    /// As [`History::read`].
    pub fn read_all(path: &Path) -> Result<Self> {
        Self::read_where(path, |_| true)
    }

    fn read_where(path: &Path, counts: impl Fn(&Glance) -> bool) -> Result<Self> {
        match tail(path) {
            Ok(text) => Ok(Self::of(&text, counts)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| files::cannot("read the ledger", path)),
        }
    }

    fn of(text: &[u8], counts: impl Fn(&Glance) -> bool) -> Self {
        let mut history = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            let Ok(glance) = serde_json::from_slice::<Glance>(line) else { continue };
            if glance.outcome != Outcome::Passed || !counts(&glance) {
                continue;
            }
            // A build is once for all; that a scenario was the one to wait for it is chance.
            let build = glance.timings.and_then(|timings| timings.build_seconds).unwrap_or_default();
            let seconds = glance.duration_seconds - build;
            if (0.0..=MOST_SECONDS).contains(&seconds) {
                history.by_scenario.entry(glance.scenario).or_default().push(seconds);
                history.by_boot.entry(glance.boot).or_default().push(seconds);
            }
        }
        history
    }

    /// What the scenario takes.
    pub fn median(&self, scenario: &str) -> Option<Duration> {
        self.by_scenario.get(scenario).and_then(|seconds| median(seconds))
    }

    /// What others take whose machine comes up in the same way.
    pub fn typical(&self, boot: BootKind) -> Option<Duration> {
        self.by_boot.get(&boot).and_then(|seconds| median(seconds))
    }
}

fn tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    // The first line may be cut; it is no JSON then.
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut text = Vec::new();
    file.take(TAIL).read_to_end(&mut text)?;
    Ok(text)
}

/// Of the newest ones. Of an even number it is the greater of the two in the middle.
fn median(seconds: &[f64]) -> Option<Duration> {
    let mut newest = seconds[seconds.len().saturating_sub(NEWEST)..].to_vec();
    newest.sort_by(f64::total_cmp);
    let median = newest.get(newest.len() / 2)?;
    Duration::try_from_secs_f64(*median).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(
        scenario: &str,
        outcome: &str,
        boot: &str,
        accelerator: &str,
        seconds: f64,
        build: f64,
    ) -> String {
        serde_json::json!({
            "schema_version": 1, "scenario": scenario, "outcome": outcome, "boot": boot,
            "accelerator": Some(accelerator).filter(|name| !name.is_empty()), "duration_seconds": seconds,
            "timings": {"build_seconds": build, "total_seconds": seconds}, "qemu": {"command": ["x"]},
        })
        .to_string()
    }

    fn on(accelerator: Option<&str>) -> impl Fn(&Glance) -> bool {
        move |glance| glance.boot == BootKind::None || glance.accelerator.as_deref() == accelerator
    }

    fn seconds(duration: Option<Duration>) -> Option<f64> {
        duration.map(|duration| duration.as_secs_f64())
    }

    #[test]
    fn only_what_passed_here_counts_and_a_build_does_not() {
        let text = [
            line("a", "passed", "fork", "tcg", 10.0, 0.0),
            line("a", "passed", "fork", "tcg", 112.0, 100.0),
            line("a", "passed", "fork", "tcg", 14.0, 0.5),
            line("a", "passed", "fork", "kvm", 1.0, 0.0),
            line("a", "failed", "fork", "tcg", 900.0, 0.0),
            line("b", "passed", "none", "", 3.0, 0.0),
            line("c", "passed", "cold", "tcg", -1.0, 0.0),
            "torn {".into(),
            r#"{"timestamp": "2025-12-25T23:41:40Z", "outcome": "passed"}"#.into(),
        ]
        .join("\n");
        let history = History::of(text.as_bytes(), on(Some("tcg")));
        assert_eq!(seconds(history.median("a")), Some(12.0));
        assert_eq!(seconds(history.median("b")), Some(3.0));
        assert_eq!((history.median("c"), history.median("d")), (None, None));
        assert_eq!(seconds(history.typical(BootKind::Fork)), Some(12.0));
        assert_eq!(history.typical(BootKind::Cold), None);
        let elsewhere = History::of(text.as_bytes(), on(Some("kvm")));
        assert_eq!(seconds(elsewhere.median("a")), Some(1.0));
        assert_eq!(History::of(text.as_bytes(), on(None)).median("a"), None);
    }

    #[test]
    fn old_executions_are_forgotten() {
        let old = (0..50).map(|_| line("a", "passed", "none", "", 100.0, 0.0));
        let new = (0..NEWEST).map(|_| line("a", "passed", "none", "", 1.0, 0.0));
        let text: Vec<_> = old.chain(new).collect();
        assert_eq!(seconds(History::of(text.join("\n").as_bytes(), on(None)).median("a")), Some(1.0));
    }

    #[test]
    fn the_end_of_a_long_ledger_is_enough() {
        let directory = tempfile::tempdir().expect("temp dir");
        let path = directory.path().join("ledger.jsonl");
        assert_eq!(History::read(&path, None).expect("no ledger"), History::default());
        let filler = line(&"x".repeat(1 << 16), "passed", "none", "", 1.0, 0.0);
        let mut lines = vec![filler; (TAIL >> 16) as usize + 1];
        lines.insert(0, line("first", "passed", "none", "", 1.0, 0.0));
        lines.push(line("last", "passed", "none", "", 2.0, 0.0));
        std::fs::write(&path, lines.join("\n")).expect("writes");
        let history = History::read(&path, None).expect("reads");
        assert_eq!(seconds(history.median("last")), Some(2.0));
        assert_eq!(history.median("first"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in prop::collection::vec(any::<u8>(), 0..200)) {
            History::of(&text, on(Some("tcg")));
        }

        #[test]
        fn a_median_lies_among_the_newest(all in prop::collection::vec(0.0..1e6_f64, 1..40)) {
            let newest = &all[all.len().saturating_sub(NEWEST)..];
            let found = median(&all).expect("one").as_secs_f64();
            prop_assert!(newest.iter().any(|seconds| (seconds - found).abs() < 1e-6));
            let below = newest.iter().filter(|seconds| **seconds < found - 1e-6).count();
            let above = newest.iter().filter(|seconds| **seconds > found + 1e-6).count();
            prop_assert!(below <= newest.len() / 2 && above <= newest.len() / 2);
        }
    }
}
