//! The terminal in raw mode: every key as it is, and nothing done to what is shown.

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use shakedown::process;
use std::io;
use std::sync::{Mutex, PoisonError};

/// How the terminal was.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// As long as this lives the terminal is in raw mode. It is as before after an error, a panic and
/// signals that can be caught.
pub(crate) struct Raw;

impl Raw {
    pub(crate) fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("cannot tell how the terminal is set")?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        process::before_sudden_exit(restore);
        let guard = Self;
        // What was typed before the machine was there is not for it.
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).context("cannot set the terminal")?;
        Ok(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Rows and columns; the usual ones where the terminal does not tell.
pub(crate) fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}
