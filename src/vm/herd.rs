//! All machines of one scenario, as its watchdog sees them: from outside of the thread that drives
//! them.

use super::machine::Death;
use super::qemu::Watch;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The machines of one scenario: the one that it declared, and the forks that it made.
#[derive(Debug, Default)]
pub struct Herd {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<Watch>,
    death: Option<Death>,
}

impl Herd {
    /// A machine runs.
    pub(super) fn join(&self, watch: Watch) {
        let mut state = self.state();
        state.running.retain(|other| other.gone().is_none());
        state.running.push(watch);
    }

    /// A machine died under its scenario. The first one is remembered.
    pub(super) fn died(&self, death: Death) {
        self.state().death.get_or_insert(death);
    }

    /// How a machine died that is gone already, if one did.
    pub(crate) fn death(&self) -> Option<Death> {
        self.state().death.clone()
    }

    /// Ends all of them at once, so that every wait on them ends. True when there were any.
    pub fn kill(&self) -> bool {
        let state = self.state();
        state.running.iter().for_each(Watch::kill);
        !state.running.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
