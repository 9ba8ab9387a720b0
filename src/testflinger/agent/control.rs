//! What is asked of the whole process by signals: to end, to end now, to restart.

use crate::fault::Fault;
use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long destructors may take after the second signal.
const LAST_MOMENTS: Duration = Duration::from_secs(3);

/// As a shell reports a program that SIGTERM ended.
pub const TERMINATED: u8 = 143;

#[derive(Clone, Debug, Default)]
pub(super) struct Control(Arc<(Mutex<Wishes>, Condvar)>);

#[derive(Clone, Copy, Debug, Default)]
struct Wishes {
    drain: bool,
    now: bool,
    restart: bool,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on signals set wishes: SIGTERM and SIGINT to end after the job, a second one to end
    /// now, SIGUSR1 to restart after the job.
    pub(super) fn obey_signals(&self) -> Result<()> {
        let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGUSR1])
            .context(Fault::host("cannot install signal handlers"))?;
        let control = self.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .stack_size(64 << 10)
            .spawn(move || {
                for signal in signals.forever() {
                    control.wish(signal == SIGUSR1);
                }
            })
            .context(Fault::host("cannot start the signal thread"))?;
        Ok(())
    }

    fn wish(&self, restart: bool) {
        let mut wishes = self.lock();
        if restart {
            wishes.restart = true;
        } else if !wishes.drain {
            wishes.drain = true;
        } else if !wishes.now {
            wishes.now = true;
            std::thread::spawn(|| {
                std::thread::sleep(LAST_MOMENTS);
                std::process::exit(i32::from(TERMINATED));
            });
        }
        drop(wishes);
        self.0.1.notify_all();
    }

    /// To take no more jobs and end.
    pub(super) fn drains(&self) -> bool {
        self.lock().drain
    }

    /// To end now, whatever runs.
    pub(super) fn ends_now(&self) -> bool {
        self.lock().now
    }

    /// To end with the status that asks for a restart.
    pub(super) fn restarts(&self) -> bool {
        self.lock().restart
    }

    /// Sleeps, unless a wish comes or is there.
    pub(super) fn sleep(&self, duration: Duration) {
        self.sleep_unless(duration, |wishes| wishes.drain || wishes.restart);
    }

    /// Sleeps, unless all is to end now.
    pub(super) fn sleep_unless_urgent(&self, duration: Duration) {
        self.sleep_unless(duration, |wishes| wishes.now);
    }

    fn sleep_unless(&self, duration: Duration, wish: impl Fn(&Wishes) -> bool) {
        let begun = Instant::now();
        let mut wishes = self.lock();
        while !wish(&wishes) {
            let left = duration.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return;
            }
            wishes = self.0.1.wait_timeout(wishes, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_signal_is_urgent_and_wishes_end_sleeps() {
        let control = Control::default();
        control.wish(true);
        assert!(control.restarts() && !control.drains());
        control.wish(false);
        assert!(control.drains() && !control.ends_now());
        control.sleep_unless_urgent(Duration::from_millis(1));
        control.sleep(Duration::from_secs(3600));
    }
}
