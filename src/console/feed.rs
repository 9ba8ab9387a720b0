//! The filtered text of a console as it grows: one writer, any number of readers.
//!
//! A reader is a position in the text since power-on. Owns waiting and the bound on memory; knows
//! nothing of sockets or prompts.

use crate::deadline::{Deadline, Stop};
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// At least this much of the end of the text is kept, and at most twice as much.
pub(crate) const KEPT: usize = 4 << 20;
/// Waits wake this often to see Ctrl-C; new text wakes them at once.
const SLICE: Duration = Duration::from_millis(200);

/// Why a wait on the console ended without what it waited for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The serial line was closed: the machine is gone.
    #[error("the serial line was closed: the machine has ended")]
    Closed,
    /// The time is up, or the user interrupted.
    #[error(transparent)]
    Stopped(#[from] Stop),
}

/// Text since power-on, of which the older part may be forgotten.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    text: Vec<u8>,
    /// Position of `text[0]`.
    start: u64,
    closed: bool,
}

impl Inner {
    fn from(&self, position: u64) -> &[u8] {
        let skip = usize::try_from(position.saturating_sub(self.start)).unwrap_or(usize::MAX);
        &self.text[skip.min(self.text.len())..]
    }

    fn end(&self) -> u64 {
        self.start + self.text.len() as u64
    }
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `write` append text, and wakes all readers.
    pub(crate) fn append(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut inner = self.lock();
        write(&mut inner.text);
        if inner.text.len() > 2 * KEPT {
            let surplus = inner.text.len() - KEPT;
            inner.text.drain(..surplus);
            inner.start += surplus as u64;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// No more text will come; every wait ends once it has seen what there is.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// True once no more text will come.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Wakes all readers although nothing changed.
    fn wake(&self) {
        let _guard = self.lock();
        self.changed.notify_all();
    }

    /// The position after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.lock().end()
    }

    /// The text from `position` on, or from the oldest byte kept.
    pub(crate) fn text(&self, position: u64) -> Vec<u8> {
        self.lock().from(position).to_vec()
    }

    /// Waits until `look` finds something in the text from `position` on.
    ///
    /// `look` gets the text and the position after it, and is asked again whenever there is more.
    /// It runs with the feed locked, so it must be quick.
    pub(crate) fn wait<T>(
        &self,
        deadline: &Deadline,
        position: &mut u64,
        mut look: impl FnMut(&[u8], &mut u64) -> Option<T>,
    ) -> Result<T, WaitError> {
        let mut inner = self.lock();
        let mut seen = None;
        loop {
            // Forgotten text counts as read, so that offsets into the slice are right.
            *position = inner.start.max(*position);
            if seen != Some(inner.end()) {
                seen = Some(inner.end());
                if let Some(found) = look(inner.from(*position), position) {
                    return Ok(found);
                }
            }
            if inner.closed {
                return Err(WaitError::Closed);
            }
            deadline.check()?;
            let (guard, _) = self
                .changed
                .wait_timeout(inner, deadline.slice(SLICE))
                .unwrap_or_else(PoisonError::into_inner);
            inner = guard;
        }
    }

    /// Waits until the line is closed and all its text is here.
    pub(crate) fn wait_closed(&self, deadline: &Deadline) -> Result<(), Stop> {
        match self.wait(deadline, &mut 0, |_, _| None::<()>) {
            Err(WaitError::Stopped(stop)) => Err(stop),
            _ => Ok(()),
        }
    }
}

/// The text from a position on as a blocking [`Read`], which ends when its [`Stopper`] is dropped.
#[derive(Debug)]
pub(crate) struct Reader {
    feed: Arc<Feed>,
    position: u64,
    stopped: Arc<AtomicBool>,
}

/// Ends its [`Reader`] on drop.
#[derive(Debug)]
pub(crate) struct Stopper {
    feed: Arc<Feed>,
    stopped: Arc<AtomicBool>,
}

impl Reader {
    pub(crate) fn new(feed: &Arc<Feed>, position: u64) -> (Self, Stopper) {
        let stopped = Arc::new(AtomicBool::new(false));
        let stopper = Stopper { feed: Arc::clone(feed), stopped: Arc::clone(&stopped) };
        (Self { feed: Arc::clone(feed), position, stopped }, stopper)
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.feed.lock();
        loop {
            if self.stopped.load(Ordering::SeqCst) {
                return Ok(0);
            }
            self.position = inner.start.max(self.position);
            let text = inner.from(self.position);
            if !text.is_empty() {
                let count = text.len().min(buffer.len());
                buffer[..count].copy_from_slice(&text[..count]);
                self.position += count as u64;
                return Ok(count);
            }
            if inner.closed {
                return Ok(0);
            }
            inner = self.feed.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Stopper {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.feed.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10), "test")
    }

    #[test]
    fn readers_have_positions_of_their_own() {
        let feed = Feed::default();
        feed.append(|text| text.extend(b"one two"));
        let mut position = 4;
        let found = feed.wait(&soon(), &mut position, |text, _| Some(text.to_vec()));
        assert_eq!(found.expect("there is text"), b"two");
        assert_eq!(feed.text(0), b"one two");
    }

    #[test]
    fn the_end_of_the_line_ends_a_wait_after_the_last_text() {
        let feed = Arc::new(Feed::default());
        let waiter = Arc::clone(&feed);
        let thread = std::thread::spawn(move || waiter.wait(&soon(), &mut 0, |_, _| None::<()>));
        feed.append(|text| text.extend(b"last words"));
        feed.close();
        assert_eq!(thread.join().expect("joins"), Err(WaitError::Closed));
        let found = feed.wait(&soon(), &mut 0, |text, _| text.ends_with(b"words").then_some(()));
        assert_eq!(found, Ok(()));
    }

    #[test]
    fn a_guest_that_prints_for_ever_does_not_fill_our_memory() {
        let feed = Feed::default();
        for n in 0..40u8 {
            feed.append(|text| text.extend(std::iter::repeat_n(n, KEPT / 4)));
        }
        assert_eq!(feed.end(), 10 * KEPT as u64);
        let kept = feed.text(0);
        assert!((KEPT..=2 * KEPT).contains(&kept.len()), "{}", kept.len());
        assert_eq!(kept.last(), Some(&39));
    }

    #[test]
    fn a_reader_ends_when_it_is_told_to() {
        let feed = Arc::new(Feed::default());
        feed.append(|text| text.extend(b"abc"));
        let (mut reader, stopper) = Reader::new(&feed, 1);
        let thread = std::thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text)
        });
        let mut nothing = 3;
        let quick = Deadline::after(Duration::from_millis(20), "test");
        assert!(feed.wait(&quick, &mut nothing, |_, _| None::<()>).is_err());
        drop(stopper);
        let text = thread.join().expect("joins").expect("reads");
        assert!(text == b"bc" || text.is_empty(), "{text:?}");
    }
}
