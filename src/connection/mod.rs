//! Ways to run commands on a machine and to move files: one trait, several transports.
//!
//! Owns the vocabulary ([`Cmd`], [`Output`], [`Exit`], [`ConnectionError`]) and the rule that a
//! transport that broke and a command that failed are different things. A transport brings one
//! primitive, [`Connection::exec`]; files move through it. Knows nothing of QEMU.

pub mod agent;
mod collector;
mod files;
pub(crate) mod json_lines;
pub mod key;
pub mod local;
pub mod session;
pub mod ssh;

pub use agent::Agent;
pub use key::KeyPair;
pub use local::Local;
pub use session::{Session, Witness};
pub use ssh::Ssh;

pub(crate) use collector::Collector;

use crate::deadline::{Deadline, Stop};
use crate::fault::visible;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

/// A command line for the machine's POSIX shell, and how to treat it.
///
/// A plain string converts into it. A non-zero exit is an error unless [`Cmd::allow_failure`].
pub struct Cmd<'a> {
    /// Given to `/bin/sh -c` as it is.
    pub line: String,
    /// What standard input reads, to its end. A read must not block: it runs in the loop that also
    /// takes the output. Over SSH it may say that nothing is there yet (`WouldBlock`).
    pub stdin: Box<dyn Read + 'a>,
    /// A limit of its own, inside the connection's deadline.
    pub timeout: Option<Duration>,
    /// Whether a non-zero exit is a result rather than an error.
    pub may_fail: bool,
    /// Whether [`Output`] gets all that is printed, up to [`MOST_KEPT`] of each stream; false for
    /// what is too big for memory: then it has the last of standard error and nothing else.
    pub keep: bool,
    /// Receives output as it comes, where the transport can stream; at the end where it cannot.
    pub on_output: Option<Sink<'a>>,
}

/// Receives output while a command runs.
pub type Sink<'a> = Box<dyn FnMut(Stream, &[u8]) + 'a>;

/// Which of the two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// A signal ended it; the name without `SIG`, as RFC 4254 section 6.10 writes it.
    Signal(String),
}

/// What a command printed, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Standard output, byte for byte.
    pub stdout: Vec<u8>,
    /// Standard error, byte for byte; its last 64 KiB where nothing else is kept.
    pub stderr: Vec<u8>,
}

/// How many bytes of each stream are kept of a command: what a machine prints must not fill the
/// memory of the host that tests it.
pub const MOST_KEPT: usize = 64 << 20;
/// Why a command has no (good) output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what they hold
pub enum ConnectionError {
    /// The command ran and failed: the machine's answer.
    #[error("`{line}` on {peer} ended with {exit}{}", tail(stderr))]
    Failed { line: String, peer: String, exit: Exit, stdout: Vec<u8>, stderr: Vec<u8> },
    /// The channel to the machine broke or could not be made; whether the command ran is unknown.
    #[error("{peer}: {what}")]
    Transport {
        peer: String,
        what: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The command did not end in time. It was killed where the transport can do that.
    #[error("`{line}` on {peer} did not end")]
    Stopped {
        line: String,
        peer: String,
        #[source]
        stop: Stop,
    },
    /// The command printed more than is kept of it, and was killed where the transport can do that:
    /// the machine's answer, as what it runs decides how much it says.
    #[error("`{line}` on {peer} printed more than {} MiB, which is all that is kept; {instead}", limit >> 20)]
    TooMuch {
        line: String,
        peer: String,
        /// In bytes, of one stream.
        limit: u64,
        /// How to have all of it, as an imperative: `use SSH for more`.
        instead: &'static str,
    },
    /// This host could not do its part: a local file cannot be read or written.
    #[error("{what}")]
    Host {
        what: String,
        #[source]
        source: io::Error,
    },
}

/// A way to run commands on one machine and to move files to and from it.
///
/// Implementations prove their channel with one command before they are handed out, and never
/// outlive a call's deadline.
pub trait Connection: Send {
    /// Who is at the other end: `root@127.0.0.1:40022`, `ttyS0`, `this host`.
    fn peer(&self) -> String;

    /// Runs a command to its end: it has exited and its output streams are closed. What it leaves
    /// in the background must therefore send its output elsewhere.
    ///
    /// Does not look at the exit status: [`Connection::run`] does.
    ///
    /// # Errors
    /// All but [`ConnectionError::Failed`].
    fn exec(&mut self, cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError>;

    /// Copies a local file to `remote`, replacing it as a whole, with the permission bits `mode`.
    ///
    /// The file is written beside `remote` with mode 0600 and renamed once it is complete.
    ///
    /// # Errors
    /// As [`Connection::run`].
    fn upload(
        &mut self,
        local: &Path,
        remote: &str,
        mode: u32,
        deadline: &Deadline,
    ) -> Result<(), ConnectionError> {
        files::upload(self, local, remote, mode, deadline)
    }

    /// Copies the file `remote` to `local`, which appears only when it is complete, with mode 0600.
    ///
    /// # Errors
    /// As [`Connection::run`].
    fn download(&mut self, remote: &str, local: &Path, deadline: &Deadline) -> Result<(), ConnectionError> {
        files::download(self, remote, local, deadline)
    }

    /// Runs a command and checks its exit status, unless the command may fail.
    ///
    /// # Errors
    /// Any [`ConnectionError`].
    fn run(&mut self, cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError> {
        let (line, may_fail) = (cmd.line.clone(), cmd.may_fail);
        let output = self.exec(cmd, deadline)?;
        if may_fail || output.success() {
            return Ok(output);
        }
        Err(ConnectionError::Failed {
            line,
            peer: self.peer(),
            exit: output.exit,
            stdout: output.stdout,
            stderr: output.stderr,
        })
    }
}

impl<'a> Cmd<'a> {
    /// A command line for `/bin/sh`.
    pub fn new(line: impl Into<String>) -> Self {
        Self {
            line: line.into(),
            stdin: Box::new(io::empty()),
            timeout: None,
            may_fail: false,
            keep: true,
            on_output: None,
        }
    }

    /// Gives the command these bytes on standard input.
    #[must_use]
    pub fn stdin(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin_from(io::Cursor::new(bytes.into()))
    }

    /// Gives the command what `source` reads: a file too big for memory. A read must not block.
    #[must_use]
    pub fn stdin_from(mut self, source: impl Read + 'a) -> Self {
        self.stdin = Box::new(source);
        self
    }

    /// Limits this command alone.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// A non-zero exit is a result, not an error.
    #[must_use]
    pub fn allow_failure(mut self) -> Self {
        self.may_fail = true;
        self
    }

    /// Keeps no standard output, and of standard error only the end: [`Cmd::on_output`] is to see them.
    #[must_use]
    pub fn discard_stdout(mut self) -> Self {
        self.keep = false;
        self
    }

    /// Sees output as it comes.
    #[must_use]
    pub fn on_output(mut self, see: impl FnMut(Stream, &[u8]) + 'a) -> Self {
        self.on_output = Some(Box::new(see));
        self
    }

    /// The deadline of this command under the caller's.
    pub fn deadline(&self, outer: &Deadline) -> Deadline {
        match self.timeout {
            Some(timeout) => outer.within(timeout, "the command's own timeout"),
            None => outer.clone(),
        }
    }
}

impl From<&str> for Cmd<'_> {
    fn from(line: &str) -> Self {
        Self::new(line)
    }
}

impl From<String> for Cmd<'_> {
    fn from(line: String) -> Self {
        Self::new(line)
    }
}

impl Output {
    /// True for exit status 0.
    pub fn success(&self) -> bool {
        self.exit == Exit::Code(0)
    }

    /// Standard output as text; invalid UTF-8 is replaced.
    pub fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }

    /// Standard output as text without white space around it: what `$(...)` would give, and more.
    pub fn trimmed(&self) -> String {
        self.text().trim().to_owned()
    }

    /// The lines of standard output, without their ends.
    pub fn lines(&self) -> Vec<String> {
        self.text().lines().map(str::to_owned).collect()
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(name) => write!(f, "signal {name}"),
        }
    }
}

impl Exit {
    /// As a shell reports it in `$?`: the status, or 128 and the number of the signal.
    pub fn status(&self) -> i32 {
        match self {
            Self::Code(code) => *code,
            // The first 64 are all that Linux has (signal(7)); an unknown name stays above 128.
            Self::Signal(name) => 128 + (1..=64).find(|n| signal_name(*n) == *name).unwrap_or(0),
        }
    }
}

/// The name of a signal as [`Exit::Signal`] has it; its number where it has no name.
pub(crate) fn signal_name(number: i32) -> String {
    match signal_hook::low_level::signal_name(number) {
        Some(name) => name.trim_start_matches("SIG").to_owned(),
        None => number.to_string(),
    }
}

/// The last lines of standard error, for a message.
fn tail(stderr: &[u8]) -> String {
    let text = visible(&String::from_utf8_lossy(stderr));
    let lines: Vec<_> = text.trim_end().lines().collect();
    let last = lines[lines.len().saturating_sub(5)..].join("\n  ");
    if last.is_empty() { String::new() } else { format!("\n  {last}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_what_a_shell_says() {
        for (exit, status) in [
            (Exit::Code(3), 3),
            (Exit::Signal("KILL".into()), 137),
            (Exit::Signal("TERM".into()), 143),
            (Exit::Signal("40".into()), 168),
            (Exit::Signal("unheard of".into()), 128),
        ] {
            assert_eq!(exit.status(), status, "{exit}");
        }
    }
}
