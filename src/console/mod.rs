//! The serial console: what a guest prints, and a shell on it.
//!
//! [`Console`] owns the serial line for the machine's whole life: a thread reads it so that QEMU
//! never blocks, keeps the evidence, and feeds the text to whoever waits. [`Console::login`] makes
//! a [`Shell`] of it, which is a [`Connection`](crate::connection::Connection). Knows nothing of
//! QEMU: any connected UNIX socket with a terminal behind it will do.

pub mod ansi;
mod bridge;
mod feed;
mod frame;
mod login;
mod shell;
#[cfg(test)]
mod testing;
mod transcript;

pub use bridge::ESCAPE;
pub use feed::WaitError;
pub use login::{Escalate, LoginProfile};
/// Patterns are matched against bytes, since a console is not always UTF-8.
pub use regex::bytes::Regex;
pub use shell::Shell;

use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use bridge::Screen;
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
    screen: Screen,
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
        let line = Arc::new(Line { stream, feed, transcript, screen: Screen::default(), events });
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
            self.screen.show(bytes);
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
        self.put(text.as_bytes())
    }

    /// Sends bytes that leave no trace in the evidence.
    fn put(&self, bytes: &[u8]) -> Result<(), WaitError> {
        let mut rest = bytes;
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

#[cfg(test)]
mod tests {
    use super::testing::wire;
    use super::*;
    use crate::record::event::Observer;
    use std::sync::mpsc;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10), "test")
    }

    #[test]
    fn patterns_are_found_in_order_and_across_sequences_cut_in_two() {
        let (mut console, mut guest, logs) = wire();
        guest.write_all(b"boot\r\nLAN IPv4 \x1b[0;3").expect("writes");
        console.first_output(&soon()).expect("there is some");
        guest.write_all(b"1maddress: 10.0.2.15\x1b[0m\r\nagain 10.0.2.16\r\n").expect("writes");
        let address = Regex::new(r"\d+\.\d+\.\d+\.\d+").expect("a pattern");
        assert_eq!(console.wait_for(&address, &soon()).expect("is printed"), "10.0.2.15");
        assert_eq!(console.wait_for(&address, &soon()).expect("is printed"), "10.0.2.16");
        let brief = Deadline::after(Duration::from_millis(20), "test");
        assert_eq!(console.wait_for(&address, &brief), Err(brief.expiry().into()));
        drop(guest);
        assert_eq!(console.wait_for(&address, &soon()), Err(WaitError::Closed));
        console.wait_closed(&soon()).expect("is closed");
        assert_eq!(console.text(), "boot\nLAN IPv4 address: 10.0.2.15\nagain 10.0.2.16\n");
        assert_eq!(console.tail(1), "again 10.0.2.16");
        let raw = std::fs::read(logs.path().join("serial.log")).expect("reads");
        assert!(raw.windows(7).any(|window| window == b"\x1b[0;31m"), "the log is raw");
    }

    #[test]
    fn a_pattern_is_found_behind_much_text() {
        let (mut console, mut guest, _logs) = wire();
        let writer = std::thread::spawn(move || {
            let line = [b"x".repeat(100), b"\r\n".to_vec()].concat();
            (0..5000).try_for_each(|_| guest.write_all(&line)).expect("writes");
            guest.write_all(b"the end").expect("writes");
            guest
        });
        console.wait_for(&Regex::new("the end").expect("a pattern"), &soon()).expect("comes last");
        writer.join().expect("joins");
    }

    #[test]
    fn the_first_byte_is_an_event_and_a_deaf_guest_does_not_block_us() {
        struct Tell(mpsc::SyncSender<Event>);
        impl Observer for Tell {
            fn observe(&self, event: &Event) {
                let _ = self.0.send(event.clone());
            }
        }
        let (ours, mut guest) = UnixStream::pair().expect("a socket pair");
        let logs = tempfile::tempdir().expect("temp dir");
        let (sender, events) = mpsc::sync_channel(8);
        let console = Console::attach(ours, logs.path(), Events::to(Tell(sender))).expect("attaches");
        guest.write_all(b"S").expect("writes");
        assert_eq!(events.recv().expect("an event"), Event::FirstConsoleOutput);
        let brief = Deadline::after(Duration::from_millis(50), "test");
        let typed = Keyboard::new(&console.line, &brief).enter(&"x".repeat(8 << 20));
        assert_eq!(typed, Err(brief.expiry().into()));
    }
}
