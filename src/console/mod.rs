//! The serial console: what a guest prints, and a shell on it.
//!
//! [`Console`] owns the serial line for the machine's whole life: a thread reads it so that QEMU
//! never blocks, keeps the evidence, and feeds the text to whoever waits. [`Console::login`] makes
//! a [`Shell`] of it, which is a [`Connection`](crate::connection::Connection). Knows nothing of
//! QEMU: any connected UNIX socket with a terminal behind it will do.

pub mod ansi;
mod feed;
mod frame;
mod login;
mod shell;
#[cfg(test)]
mod testing;
mod transcript;

pub use feed::WaitError;
pub use login::{Escalate, LoginProfile};
/// Patterns are matched against bytes, since a console is not always UTF-8.
pub use regex::bytes::Regex;
pub use shell::Shell;

use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use feed::Feed;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use transcript::Transcript;

/// No match of [`Console::wait_for`] may be longer than this, so that a wait never has to look at
/// the whole log again for each new byte.
const LONGEST_MATCH: usize = 64 << 10;

/// A machine's serial console.
#[derive(Debug)]
pub struct Console {
    line: Arc<Line>,
    position: u64,
}

/// The serial line, shared by the console, its shells and the thread that reads it.
#[derive(Debug)]
struct Line {
    stream: UnixStream,
    feed: Arc<Feed>,
    transcript: Mutex<Transcript>,
    events: Events,
}

impl Console {
    /// Takes over a connected serial line and starts to read it. `log_dir` receives `serial.log`
    /// (the guest's bytes) and `console.cast` (asciicast v2, for `asciinema play`).
    ///
    /// # Errors
    /// When the evidence cannot be written or the thread cannot be started.
    pub fn attach(stream: UnixStream, log_dir: &Path, events: Events) -> Result<Self> {
        let transcript = Mutex::new(Transcript::create(log_dir)?);
        // A guest that does not read must not block us; see `Keyboard`.
        stream
            .set_write_timeout(Some(Duration::from_millis(200)))
            .context(Fault::host("cannot set up the serial line"))?;
        let feed = Arc::new(Feed::default());
        let line = Arc::new(Line { stream, feed, transcript, events });
        let pump = Arc::clone(&line);
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || pump.pump())
            .context(Fault::host("cannot start the console's thread"))?;
        Ok(Self { line, position: 0 })
    }

    /// Another reader of the same line, which begins with power-on.
    #[must_use]
    pub fn reader(&self) -> Self {
        Self { line: Arc::clone(&self.line), position: 0 }
    }

    /// Waits until the guest has printed anything at all.
    ///
    /// # Errors
    /// [`WaitError`].
    pub fn first_output(&self, deadline: &Deadline) -> Result<(), WaitError> {
        self.line.feed.wait(deadline, &mut 0, |text, _| (!text.is_empty()).then_some(()))
    }

    /// Waits for a pattern in what the guest prints, control sequences taken out, and gives the
    /// text that matched. Begins where the last match ended, at first with power-on.
    ///
    /// Lines end with `\r\n` here, as they come. A match may be 64 KiB long at most.
    ///
    /// # Errors
    /// [`WaitError`]; the position stays before what was not matched.
    pub fn wait_for(&mut self, pattern: &Regex, deadline: &Deadline) -> Result<String, WaitError> {
        self.line.feed.wait(deadline, &mut self.position, |text, position| {
            if let Some(found) = pattern.find(text) {
                *position += found.end() as u64;
                return Some(String::from_utf8_lossy(found.as_bytes()).into_owned());
            }
            *position += text.len().saturating_sub(LONGEST_MATCH) as u64;
            None
        })
    }

    /// Waits until the line is closed and its last byte is in the evidence: after QEMU ended.
    ///
    /// # Errors
    /// [`Stop`] when the line is still open.
    pub fn wait_closed(&self, deadline: &Deadline) -> Result<(), Stop> {
        self.line.feed.wait_closed(deadline)
    }

    /// What the guest has printed, or the last few MiB of it, as lines without control sequences.
    pub fn text(&self) -> String {
        self.line.text(0)
    }

    /// The last `lines` lines that are not blank, for messages.
    pub fn tail(&self, lines: usize) -> String {
        self.line.tail(lines)
    }

    /// Waits for a login or shell prompt, logs in as `profile` says, and proves the shell.
    ///
    /// # Errors
    /// A machine [`Fault`] that names the prompt and carries the last lines, with [`WaitError`] in
    /// its chain where a wait ended.
    pub fn login(&mut self, profile: &LoginProfile, deadline: &Deadline) -> Result<Shell> {
        let shell = login::login(&self.line, profile, deadline)?;
        self.line.events.emit(Event::LoginSeen);
        Ok(shell)
    }

    /// Takes up a shell again that an earlier process started on this machine ([`Shell::token`]):
    /// the machine was frozen with it and continues from there.
    ///
    /// # Errors
    /// A machine [`Fault`] when that shell does not answer.
    pub fn resume(&mut self, token: &str, deadline: &Deadline) -> Result<Shell> {
        Shell::resume(&self.line, token, deadline)
    }
}

impl Line {
    /// Reads until the other end closes.
    fn pump(&self) {
        let mut filter = ansi::Filter::default();
        let mut buffer = vec![0; 64 << 10];
        let mut first = true;
        let mut healthy = true;
        loop {
            let count = match (&self.stream).read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let bytes = &buffer[..count];
            let written = self.transcript().received(bytes);
            self.feed.append(|text| filter.feed(bytes, text));
            if std::mem::take(&mut first) {
                self.events.emit(Event::FirstConsoleOutput);
            }
            // A full disk must not stop the guest; it is said once.
            if let (Err(error), true) = (&written, healthy) {
                self.events.note(format!("the console log is incomplete: {error}"));
            }
            healthy &= written.is_ok();
        }
        self.feed.close();
    }

    fn transcript(&self) -> std::sync::MutexGuard<'_, Transcript> {
        self.transcript.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn text(&self, position: u64) -> String {
        String::from_utf8_lossy(&self.feed.text(position)).replace('\r', "")
    }

    fn tail(&self, count: usize) -> String {
        // No console line of interest is longer than this.
        let text = self.text(self.feed.end().saturating_sub(400 * (count as u64 + 1)));
        let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }
}

/// Types at the guest, for as long as a deadline allows.
#[derive(Clone, Debug)]
struct Keyboard {
    line: Arc<Line>,
    deadline: Deadline,
}

impl Keyboard {
    fn new(line: &Arc<Line>, deadline: &Deadline) -> Self {
        Self { line: Arc::clone(line), deadline: deadline.clone() }
    }

    fn enter(&self, text: &str) -> Result<(), WaitError> {
        self.send(&format!("{text}\n"), false)
    }

    /// As [`Keyboard::enter`]; the evidence shows asterisks.
    fn enter_secret(&self, text: &str) -> Result<(), WaitError> {
        self.send(&format!("{text}\n"), true)
    }

    fn send(&self, text: &str, secret: bool) -> Result<(), WaitError> {
        // The pump tells of a transcript that cannot be written.
        let _ = self.line.transcript().typed(text, secret);
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match (&self.line.stream).write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.deadline.check()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(WaitError::Closed),
            }
        }
        Ok(())
    }
}

/// For rexpect, which writes what is no secret.
impl Write for Keyboard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(&String::from_utf8_lossy(bytes), false).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
