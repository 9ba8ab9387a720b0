//! The life of a machine as typed events: log, progress display and timings are its readers.

use serde::Serialize;
use std::sync::Arc;

/// Something that happened, worth a line in the log of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what they hold
pub enum Event {
    /// A build of an image began; `log` receives its whole output.
    ImageBuildStarted { image: String, log: String },
    /// A build moved on. `percent` is of the phase, where the tool tells.
    ImageBuildProgress { phase: String, percent: Option<u8> },
    /// An image is in the store, built now (`cached: false`) or before.
    ImageReady { image: String, seconds: f64, cached: bool },
    /// Waiting for a slot among the machines that this host runs at once.
    SlotWait { limit: usize },
    /// QEMU is about to be started with this command line.
    QemuStarting { command: Vec<String> },
    /// QEMU runs.
    QemuStarted { pid: u32 },
    /// The guest wrote its first byte to the serial console.
    FirstConsoleOutput,
    /// A shell prompt on the serial console, as root.
    LoginSeen,
    /// The first command ran over SSH.
    SshReady,
    /// A command ran over a connection (`ssh`, `console`, `local`, ...); `status` as the shell says it.
    Command { connection: String, command: String, status: String, seconds: f64 },
    /// Power-off was asked for.
    PowerOffRequested,
    /// QEMU ended; `status` says how.
    QemuExited { status: String },
    /// Free text, for what has no type of its own.
    Note { text: String },
}

/// Receives events. Must not block for long: it runs in the thread that does the work.
pub trait Observer: Send + Sync {
    /// Takes note of one event.
    fn observe(&self, event: &Event);
}

/// A handle to whoever listens; cheap to clone and to hand down.
#[derive(Clone)]
pub struct Events(Arc<dyn Observer>);

impl Events {
    /// Events go to `observer`.
    pub fn to(observer: impl Observer + 'static) -> Self {
        Self(Arc::new(observer))
    }

    /// Nobody listens.
    pub fn silent() -> Self {
        struct Nobody;
        impl Observer for Nobody {
            fn observe(&self, _: &Event) {}
        }
        Self::to(Nobody)
    }

    /// Tells the observer.
    pub fn emit(&self, event: Event) {
        self.0.observe(&event);
    }

    /// Tells the observer something that has no type of its own.
    pub fn note(&self, text: impl Into<String>) {
        self.emit(Event::Note { text: text.into() });
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}
