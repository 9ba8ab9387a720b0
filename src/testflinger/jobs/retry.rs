//! When something that failed is tried again, and when no more.

use crate::testflinger::client::OUTAGE;
use std::time::{Duration, Instant};

/// The first wait; each one is twice the one before.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(60);
/// Whoever was never heard of is probably a typo.
const FIRST_CONTACT: Duration = Duration::from_secs(5);

/// Something that is due at some time, and again later when it fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    due: Instant,
    failing_since: Option<Instant>,
    wait: Duration,
}

impl Retry {
    /// Due at once.
    pub(super) fn now() -> Self {
        Self { due: Instant::now(), failing_since: None, wait: FIRST }
    }

    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// It worked; it is due again `after` this.
    pub(super) fn worked(&mut self, after: Duration) {
        *self = Self { due: Instant::now() + after, failing_since: None, wait: FIRST };
    }

    /// It failed: how long until the next try, or `None` when it has failed for too long.
    pub(super) fn failed(&mut self, has_contact: bool) -> Option<Duration> {
        let now = Instant::now();
        let since = *self.failing_since.get_or_insert(now);
        let limit = if has_contact { OUTAGE } else { FIRST_CONTACT };
        let wait = self.wait;
        if now + wait - since > limit {
            return None;
        }
        self.due = now + wait;
        self.wait = (wait * 2).min(LONGEST);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_and_success_forgives() {
        let mut retry = Retry::now();
        assert!(retry.is_due());
        let waits: Vec<_> = (0..9).filter_map(|_| retry.failed(true)).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
        assert!(!retry.is_due());
        retry.wait = FIRST;
        retry.failing_since = Some(Instant::now() - FIRST_CONTACT);
        assert_eq!(retry.failed(false), None, "nobody was ever there");
        assert!(retry.failed(true).is_some());
        retry.worked(Duration::ZERO);
        assert!(retry.is_due());
        assert_eq!(retry.failed(true), Some(FIRST));
    }
}
