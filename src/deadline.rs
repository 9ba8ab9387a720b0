//! One time budget, made once and handed down.
//!
//! A [`Deadline`] knows who owns it, so that its expiry names a setting a person can change.
//! Waits ask it how long they may still take; no wait has a default of its own.

use crate::process;
use std::borrow::Cow;
use std::time::{Duration, Instant};

/// A point in time by which something must be done, and whose limit that is.
#[derive(Clone, Debug)]
pub struct Deadline {
    at: Instant,
    budget: Duration,
    owner: Cow<'static, str>,
}

/// Why a wait must end now although it did not get what it waited for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// The budget is used up.
    #[error("no answer within {} ({owner})", human(*budget))]
    Expired {
        /// The setting or the part of the program that set the limit.
        owner: String,
        /// The whole budget, not what was left of it when this wait began.
        budget: Duration,
    },
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

/// What the clock cannot count is as good as this: a hundred years.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Deadline {
    /// `budget` from now, owned by `owner`: a setting (`BOOT_IMAGE_VM_LOGIN_TIMEOUT`) or a phrase
    /// (`scenario timeout`).
    pub fn after(budget: Duration, owner: impl Into<Cow<'static, str>>) -> Self {
        let now = Instant::now();
        Self { at: now.checked_add(budget).unwrap_or(now + NEVER), budget, owner: owner.into() }
    }

    /// A tighter budget inside this one: `budget` from now, or this deadline where it comes first.
    #[must_use]
    pub fn within(&self, budget: Duration, owner: impl Into<Cow<'static, str>>) -> Self {
        let inner = Self::after(budget, owner);
        if inner.at < self.at { inner } else { self.clone() }
    }

    /// Time left; zero once expired.
    pub fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Time left, but no more than `slice`: how long one poll may sleep.
    pub fn slice(&self, slice: Duration) -> Duration {
        self.remaining().min(slice)
    }

    /// True once the time is up.
    pub fn expired(&self) -> bool {
        self.remaining().is_zero()
    }

    /// To be asked in every wait loop: an error when the wait must end.
    ///
    /// # Errors
    /// [`Stop::Interrupted`] after Ctrl-C or SIGTERM, [`Stop::Expired`] once the time is up.
    pub fn check(&self) -> Result<(), Stop> {
        if process::interrupted() {
            Err(Stop::Interrupted)
        } else if self.expired() {
            Err(self.expiry())
        } else {
            Ok(())
        }
    }

    /// The error that says this deadline expired.
    pub fn expiry(&self) -> Stop {
        Stop::Expired { owner: self.owner.to_string(), budget: self.budget }
    }

    /// Who set this limit.
    pub fn owner(&self) -> &str {
        &self.owner
    }
}

/// Seconds as a person writes them: `0.25 s`, `12.3 s`, `900 s`, `15 min`.
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds >= 120.0 && duration.as_millis().is_multiple_of(60_000) {
        format!("{} min", duration.as_secs() / 60)
    } else if duration.subsec_millis() == 0 {
        format!("{} s", duration.as_secs())
    } else if seconds < 1.0 {
        format!("{seconds:.2} s")
    } else {
        format!("{seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tighter_budget_wins_and_keeps_its_owner() {
        let outer = Deadline::after(Duration::from_secs(10), "scenario timeout");
        assert_eq!(outer.within(Duration::from_secs(1), "login").owner(), "login");
        assert_eq!(outer.within(Duration::from_secs(60), "login").owner(), "scenario timeout");
    }

    #[test]
    fn expiry_names_owner_and_whole_budget() {
        let deadline = Deadline::after(Duration::ZERO, "BOOT_IMAGE_VM_LOGIN_TIMEOUT");
        let text = deadline.check().expect_err("expired").to_string();
        assert_eq!(text, "no answer within 0 s (BOOT_IMAGE_VM_LOGIN_TIMEOUT)");
    }

    #[test]
    fn a_budget_without_end_does_not_overflow() {
        let deadline = Deadline::after(Duration::MAX, "nobody");
        assert!(deadline.remaining() > NEVER / 2);
        assert_eq!(deadline.within(Duration::MAX, "nobody else").check(), Ok(()));
    }

    #[test]
    fn durations_read_well() {
        for (ms, text) in [(250, "0.25 s"), (12_340, "12.3 s"), (90_000, "90 s"), (900_000, "15 min")] {
            assert_eq!(human(Duration::from_millis(ms)), text);
        }
    }
}
