//! One command on one channel: bytes both ways at once, how it ended, and its end by force.

use super::link::{Link, LinkError};
use crate::connection::{Collector, Exit, Stream};
use crate::deadline::{Deadline, Stop};
use crate::process::quote;
use ssh2::{Channel, Session};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::time::Duration;

/// How long the killing of a command may take after its deadline.
const GRACE: Duration = Duration::from_secs(5);
const CHUNK: usize = 1 << 16;
/// What the shell prints before the command runs, followed by its process id and a newline.
const MARK: &[u8] = b"\x01shakedown:";
/// Noise of a login shell before the mark is not kept beyond this many bytes.
const MOST_NOISE: usize = 1 << 20;

/// How a command came to its end, or this channel to its own.
pub(super) enum Ended {
    Exit(Exit),
    /// Out of time, or Ctrl-C. `killed`: the command is gone and the link is good.
    Stopped {
        stop: Stop,
        killed: bool,
    },
    /// It printed more than can be kept.
    TooMuch {
        killed: bool,
    },
    /// The source of standard input failed; the command was not left with half of it.
    Input {
        source: io::Error,
        killed: bool,
    },
    Lost(String),
}

/// Runs `line` on a fresh channel to its end.
pub(super) fn run(
    link: &mut Link,
    channel: Channel,
    line: &str,
    stdin: Box<dyn Read + '_>,
    collector: &mut Collector<'_>,
    deadline: &Deadline,
) -> Ended {
    let mut running = Running::new(channel, stdin);
    let failure = match running
        .start(link, line, deadline)
        .and_then(|()| running.pump(link, collector, deadline))
    {
        Ok(exit) if running.stdout.pid.is_some() => return Ended::Exit(exit),
        Ok(exit) => {
            let said = running.noise();
            return Ended::Lost(format!("the login shell did not run /bin/sh, it ended with {exit}: {said}"));
        }
        Err(failure) => failure,
    };
    match failure {
        Failure::Link(LinkError::Stop(stop)) => Ended::Stopped { stop, killed: running.kill(link) },
        Failure::TooMuch => Ended::TooMuch { killed: running.kill(link) },
        Failure::Input(source) => Ended::Input { source, killed: running.kill(link) },
        Failure::Link(error) => Ended::Lost(error.to_string()),
    }
}

enum Failure {
    Link(LinkError),
    TooMuch,
    Input(io::Error),
}

impl<E: Into<LinkError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Link(error.into())
    }
}

struct Running<'a> {
    channel: Channel,
    /// `None` once end-of-file was sent.
    stdin: Option<BufReader<Box<dyn Read + 'a>>>,
    stdout: Opening,
    stderr: Opening,
    buffer: Vec<u8>,
}

impl<'a> Running<'a> {
    fn new(channel: Channel, stdin: Box<dyn Read + 'a>) -> Self {
        Self {
            channel,
            stdin: Some(BufReader::with_capacity(CHUNK, stdin)),
            stdout: Opening::default(),
            stderr: Opening::default(),
            buffer: vec![0; CHUNK],
        }
    }

    /// Asks the login shell, whichever it is, to become a POSIX shell that says its process id, which
    /// is also its group's: OpenSSH makes each command a session leader.
    fn start(&mut self, link: &mut Link, line: &str, deadline: &Deadline) -> Result<(), Failure> {
        let mark = "printf '\\001shakedown:%d\\n' \"$$\"";
        let script = format!("{mark}; {mark} >&2\n{line}");
        let request = format!("exec /bin/sh -c {}", quote(&script));
        Ok(link.complete(deadline, |_| self.channel.exec(&request))?)
    }

    /// Moves bytes both ways until the server has closed the channel.
    fn pump(
        &mut self,
        link: &mut Link,
        collector: &mut Collector<'_>,
        deadline: &Deadline,
    ) -> Result<Exit, Failure> {
        loop {
            link.check(deadline)?;
            let received = self.receive(collector)?;
            if received {
                link.heard();
            }
            if collector.overflowed() {
                return Err(Failure::TooMuch);
            }
            let sent = self.send()?;
            // End-of-file alone is no end: a command may close its output and read on.
            if self.channel.eof() && again(self.channel.wait_close())?.is_some() {
                break;
            }
            // Reading one stream can have taken bytes of the other off the socket.
            if !received && !sent && self.channel.read_window().available == 0 {
                link.wait(deadline)?;
            }
        }
        let exit = match self.channel.exit_signal()?.exit_signal {
            Some(signal) => Exit::Signal(signal),
            None => Exit::Code(self.channel.exit_status()?),
        };
        link.complete(deadline, |_| self.channel.close())?;
        Ok(exit)
    }

    /// What was printed before or instead of the mark.
    fn noise(&self) -> String {
        let both = [&self.stdout.noise[..], &self.stderr.noise[..]].concat();
        String::from_utf8_lossy(&both).trim().to_owned()
    }

    /// Takes one chunk of each stream; false when nothing is there.
    fn receive(&mut self, collector: &mut Collector<'_>) -> Result<bool, Failure> {
        let mut moved = false;
        for stream in [Stream::Stdout, Stream::Stderr] {
            let (mut reader, opening) = match stream {
                Stream::Stdout => (self.channel.stream(0), &mut self.stdout),
                Stream::Stderr => (self.channel.stderr(), &mut self.stderr),
            };
            match reader.read(&mut self.buffer) {
                Ok(0) => {}
                Ok(count) => {
                    moved = true;
                    opening.pass(&self.buffer[..count], |bytes| collector.take(stream, bytes));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(LinkError::Lost(error.to_string()).into()),
            }
        }
        Ok(moved)
    }

    /// Gives the command what it can take of its input; false when it can take nothing now.
    fn send(&mut self) -> Result<bool, Failure> {
        let Some(source) = &mut self.stdin else { return Ok(false) };
        let bytes = match source.fill_buf() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(Failure::Input(error)),
        };
        if bytes.is_empty() {
            let sent = again(self.channel.send_eof())?.is_some();
            if sent {
                self.stdin = None;
            }
            return Ok(sent);
        }
        match self.channel.write(bytes) {
            Ok(count) => {
                source.consume(count);
                Ok(count > 0)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            // The command wants no more of it. If it is the socket that broke, reading says so.
            Err(_) => {
                self.stdin = None;
                Ok(true)
            }
        }
    }

    /// Ends the command and its process group; true when that is certain and the link still good.
    fn kill(&mut self, link: &mut Link) -> bool {
        let deadline = Deadline::after(GRACE, "the end of a command");
        link.cleaning_up = true;
        let killed = self.try_kill(link, &deadline).is_ok();
        link.cleaning_up = false;
        killed
    }

    fn try_kill(&mut self, link: &mut Link, deadline: &Deadline) -> Result<(), Failure> {
        let mut nobody = Collector::new(false, None);
        // The process id may be still to come, and what is half sent blocks the second channel.
        while !self.channel.eof() && (self.stdout.pid.is_none() || link.half_sent()) {
            let received = self.receive(&mut nobody)?;
            if link.half_sent() {
                self.send()?;
            }
            if !received {
                link.wait(deadline)?;
            }
        }
        // No end-of-file: the command could believe that its input is complete.
        self.stdin = None;
        if let Some(pid) = self.stdout.pid {
            let channel = link.complete(deadline, Session::channel_session)?;
            let mut killer = Running::new(channel, Box::new(io::empty()));
            // A server that gave it no group of its own leaves the second way.
            let kill = format!("kill -s KILL -- -{pid} || kill -s KILL {pid}");
            killer.start(link, &kill, deadline)?;
            killer.pump(link, &mut nobody, deadline)?;
        }
        self.pump(link, &mut nobody, deadline)?;
        Ok(())
    }
}

/// "Again" is not an error but `None`.
fn again(result: Result<(), ssh2::Error>) -> Result<Option<()>, LinkError> {
    match result {
        Ok(()) => Ok(Some(())),
        Err(error) => match io::Error::from(error) {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error => Err(LinkError::Lost(error.to_string())),
        },
    }
}

/// The start of an output stream: what the login shell's start-up files print, then the mark.
#[derive(Default)]
struct Opening {
    pid: Option<u32>,
    noise: Vec<u8>,
}

impl Opening {
    /// Passes on what comes after the mark.
    fn pass(&mut self, bytes: &[u8], mut pass: impl FnMut(&[u8])) {
        if self.pid.is_some() {
            return pass(bytes);
        }
        self.noise.extend_from_slice(bytes);
        let Some(mark) = self.noise.windows(MARK.len()).position(|window| window == MARK) else {
            let surplus = self.noise.len().saturating_sub(MOST_NOISE);
            self.noise.drain(..surplus);
            return;
        };
        let after = &self.noise[mark + MARK.len()..];
        let Some(end) = after.iter().position(|byte| *byte == b'\n') else { return };
        self.pid = std::str::from_utf8(&after[..end]).ok().and_then(|digits| digits.parse().ok());
        if self.pid.is_some() {
            pass(&after[end + 1..]);
            self.noise = Vec::new();
        }
    }
}
