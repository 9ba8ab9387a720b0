//! What a person at the terminal sees while a test binary is busy with something else than tests.

use crate::record::event::{Event, Observer};
use std::sync::{Mutex, PoisonError};

/// Lines on standard error about what takes long: images that are built, machines that are booted
/// to fork from, and waiting for a slot. Everything else is in the evidence.
#[derive(Debug, Default)]
pub(super) struct Lines {
    last: Mutex<Option<String>>,
}

impl Observer for Lines {
    fn observe(&self, event: &Event) {
        let shown = match event {
            Event::ImageBuildStarted { .. }
            | Event::ImageReady { cached: false, .. }
            | Event::TemplateStarted { .. }
            | Event::TemplateReady { cached: false, .. }
            | Event::SlotWait { .. } => event.to_string(),
            // Percentages would flood a log; a phase is said once.
            Event::ImageBuildProgress { phase, .. } => {
                Event::ImageBuildProgress { phase: phase.clone(), percent: None }.to_string()
            }
            _ => return,
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() != Some(&shown) {
            eprintln!("shakedown: {shown}");
            *last = Some(shown);
        }
    }
}
