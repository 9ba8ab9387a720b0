//! How a run went, by number, and the line that says so.

use super::marker::Selection;
use super::stage::Run;
use super::{trial, under_nextest};
use crate::record::Outcome;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Outcomes by number: libtest-mimic knows only one way to fail.
#[derive(Default)]
pub(super) struct Tally(Mutex<BTreeMap<Outcome, usize>>);

impl Tally {
    pub(super) fn count(&self, outcome: Outcome) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome).or_default() += 1;
    }

    /// The last line of a run, for standard error. Nextest has its own.
    pub(super) fn summary(
        &self,
        run: &Run,
        not_selected: usize,
        selection: Option<&Selection>,
    ) -> Option<String> {
        if under_nextest() {
            return None;
        }
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parts: Vec<_> = counts
            .iter()
            .map(|(outcome, number)| match outcome {
                Outcome::Deferred => format!("{number} deferred (run them with --deferred)"),
                _ => format!("{number} {outcome}"),
            })
            .collect();
        if let Some(selection) = selection {
            parts.push(format!("{not_selected} not selected by {}", selection.origin()));
        }
        if parts.is_empty() {
            parts.push("nothing ran".into());
        }
        let evidence = run.evidence().map(|path| format!("; evidence in {}", trial::shown(path).display()));
        Some(format!("scenarios: {}{}", parts.join(", "), evidence.unwrap_or_default()))
    }
}
