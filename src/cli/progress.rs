//! The progress of an image's build and a machine's life: one moving line on a terminal, plain
//! lines elsewhere.

use super::terminal;
use indicatif::{ProgressBar, ProgressStyle};
use shakedown::record::event::{Event, Observer};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Shows events; clones show on the same line.
#[derive(Clone)]
pub(super) struct Progress(Arc<Inner>);

struct Inner {
    bar: Option<ProgressBar>,
    /// Where there is no bar, says only what takes long.
    brief: bool,
    last: Mutex<String>,
}

/// A line that moves on standard error, when that is a terminal.
pub(super) fn spinner() -> Option<ProgressBar> {
    terminal::interactive().then(|| {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    })
}

impl Progress {
    /// Moves on standard error when that is a terminal.
    pub(super) fn new() -> Self {
        Self::with(false)
    }

    /// As [`Progress::new`], but lines only for what takes long: for commands whose standard error is
    /// somebody else's.
    pub(super) fn brief() -> Self {
        Self::with(true)
    }

    fn with(brief: bool) -> Self {
        let bar = spinner();
        Self(Arc::new(Inner { bar, brief, last: Mutex::new(String::new()) }))
    }

    /// Takes the moving line away.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.0.bar {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn observe(&self, event: &Event) {
        // The first line says what; the rest is for the log.
        let text = event.to_string();
        let line = text.lines().next().unwrap_or_default().to_owned();
        match &self.0.bar {
            Some(bar) => bar.set_message(line),
            None if self.0.brief && !is_long(event) => {}
            None => {
                let line = match event {
                    // A log needs no percentages.
                    Event::ImageBuildProgress { phase, .. } => format!("building image: {phase}"),
                    Event::Command { .. } => return,
                    _ => line,
                };
                let mut last = self.0.last.lock().unwrap_or_else(PoisonError::into_inner);
                if *last != line {
                    terminal::say(&line);
                    *last = line;
                }
            }
        }
    }
}

/// What one waits for so long that one wants to know why.
fn is_long(event: &Event) -> bool {
    matches!(event, Event::ImageBuildStarted { .. } | Event::TemplateStarted { .. } | Event::SlotWait { .. })
}
