//! The life of a machine as typed events: log, progress display and timings are its readers.

use crate::process;
use serde::Serialize;
use std::fmt;
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
    /// A machine is booted to be frozen; `log` is where its evidence is.
    TemplateStarted { name: String, log: String },
    /// A frozen machine is there, made now (`cached: false`) or before.
    TemplateReady { name: String, seconds: f64, cached: bool },
    /// A machine continues from a template and has answered.
    Forked { seconds: f64 },
    /// Waiting for a slot among the machines that this host runs at once.
    SlotWait { limit: usize },
    /// QEMU is about to be started with this command line.
    QemuStarting { command: Vec<String> },
    /// QEMU runs.
    QemuStarted { pid: u32 },
    /// The guest wrote its first byte to the serial console.
    FirstConsoleOutput,
    /// A login prompt on the serial console, or root's shell there.
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

/// For a person: one line, then what belongs to it on lines of its own.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ImageBuildStarted { image, log } => write!(f, "building image {image}\n{log}"),
            Self::ImageBuildProgress { phase, percent: Some(percent) } => {
                write!(f, "building image: {phase}, {percent} %")
            }
            Self::ImageBuildProgress { phase, percent: None } => write!(f, "building image: {phase}"),
            Self::ImageReady { image, seconds, cached } => {
                let how = if *cached { "from the store" } else { "built" };
                write!(f, "image {image} ready, {how} in {seconds:.3} s")
            }
            Self::TemplateStarted { name, log } => write!(f, "booting a machine to fork from: {name}\n{log}"),
            Self::TemplateReady { name, seconds, cached } => {
                let how = if *cached { "from the store" } else { "made" };
                write!(f, "template {name} ready, {how} in {seconds:.3} s")
            }
            Self::Forked { seconds } => write!(f, "forked in {seconds:.3} s"),
            Self::SlotWait { limit } => write!(f, "waiting: {limit} machines run already"),
            Self::QemuStarting { command } => {
                let words: Vec<_> = command.iter().map(|word| process::quote(word)).collect();
                write!(f, "starting QEMU\n{}", words.join(" "))
            }
            Self::QemuStarted { pid } => write!(f, "QEMU started, pid {pid}"),
            Self::FirstConsoleOutput => f.write_str("first output on the console"),
            Self::LoginSeen => f.write_str("login on the console"),
            Self::SshReady => f.write_str("first command ran over SSH"),
            Self::Command { connection, command, status, seconds } => {
                write!(f, "{connection}: {status} after {seconds:.3} s\n{command}")
            }
            Self::PowerOffRequested => f.write_str("power-off requested"),
            Self::QemuExited { status } => write!(f, "QEMU ended: {status}"),
            Self::Note { text } => f.write_str(text),
        }
    }
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

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}
