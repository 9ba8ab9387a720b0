//! From nothing to a session that ran one command, while the machine may still be booting.
//!
//! Three things look alike from here and want different answers. QEMU's user network accepts a
//! forwarded TCP connection at once, before it knows whether the guest will: a guest whose network is
//! down leaves the connection silent, so a fresh one is begun beside it; a guest without a listener
//! resets it, so the next one follows after a short pause; a guest that is merely slow is also
//! silent at first, so the older ones are kept for a while: the first to speak is taken.

use super::link::{Link, LinkError, poll_for};
use super::{Target, command};
use crate::connection::{Collector, ConnectionError, Exit};
use crate::deadline::{Deadline, Stop};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Silent connections kept at once; well below the 10 at which OpenSSH begins to drop some.
const MOST_PENDING: usize = 4;
/// A restored guest answers within this on an idle host: no second connection loads it before.
const FIRST_PATIENCE: Duration = Duration::from_secs(2);
/// Key exchange, login and one command, on a guest that is emulated and busy.
const HANDSHAKE: Duration = Duration::from_secs(30);
const SILENT: &str = "connected, but the SSH server stayed silent";
const SLICE: Duration = Duration::from_millis(100);

/// Gets a session to `target` that has run a command, and the number of connections begun for it.
///
/// With `host_key`, only a server that has this key will do.
pub(super) fn dial(
    target: &Target,
    host_key: Option<&[u8]>,
    deadline: &Deadline,
) -> Result<(Link, u32), ConnectionError> {
    let mut knocks = Knocks::new(target.addr);
    loop {
        let result = try_once(&mut knocks, target, host_key, deadline);
        let gone = (target.gone)();
        let stop = match result {
            Ok(Attempt::Usable(link)) => return Ok((link, knocks.attempts)),
            Ok(Attempt::Impostor) => {
                return Err(target.transport(
                    "another machine answers: its host key is not the one of the first connection",
                ));
            }
            Err(Knock::Problem { what, refused }) => {
                // What a machine that is gone does to connections tells nothing.
                if gone.is_none() {
                    knocks.failed(what, refused);
                }
                deadline.check().err()
            }
            Err(Knock::Stop(stop)) => Some(stop),
        };
        if gone.is_some() || stop.is_some() {
            let why = gone.unwrap_or_else(|| "SSH is not usable".into());
            let source = stop.map(|stop| Box::new(stop) as _);
            return Err(ConnectionError::Transport {
                peer: target.to_string(),
                what: format!("{why}; {}", knocks.summary()),
                source,
            });
        }
    }
}

enum Attempt {
    Usable(Link),
    Impostor,
}

enum Knock {
    Stop(Stop),
    Problem { what: String, refused: bool },
}

impl From<LinkError> for Knock {
    fn from(error: LinkError) -> Self {
        Self::Problem { refused: error.is_refusal(), what: error.to_string() }
    }
}

impl From<io::Error> for Knock {
    fn from(error: io::Error) -> Self {
        Self::Problem { what: error.to_string(), refused: false }
    }
}

fn try_once(
    knocks: &mut Knocks,
    target: &Target,
    host_key: Option<&[u8]>,
    deadline: &Deadline,
) -> Result<Attempt, Knock> {
    let socket = knocks.first_to_speak(target, deadline)?;
    let patience = deadline.within(HANDSHAKE, "SSH handshake");
    let mut link = Link::open(socket, target, &patience)?;
    if host_key.is_some_and(|known| known != link.host_key()) {
        return Ok(Attempt::Impostor);
    }
    let channel = link.complete(&patience, ssh2::Session::channel_session)?;
    let mut nothing = Collector::new(false, None);
    match command::run(&mut link, channel, "true", Box::new(io::empty()), &mut nothing, &patience) {
        command::Ended::Exit(Exit::Code(0)) => Ok(Attempt::Usable(link)),
        command::Ended::Exit(exit) => Err(problem(format!("`true` ended with {exit}"))),
        command::Ended::Stopped { stop, .. } => Err(problem(format!("`true` did not end: {stop}"))),
        command::Ended::TooMuch { .. } => Err(problem("`true` printed without end".into())),
        command::Ended::Input { source, .. } => Err(source.into()),
        command::Ended::Lost(what) => Err(problem(what)),
    }
}

fn problem(what: String) -> Knock {
    Knock::Problem { what, refused: false }
}

/// Connections that were begun and have not yet spoken, and the pace at which others are begun.
struct Knocks {
    addr: SocketAddr,
    pending: VecDeque<TcpStream>,
    begun: Instant,
    next: Instant,
    attempts: u32,
    refusals: u32,
    last: Option<String>,
}

impl Knocks {
    fn new(addr: SocketAddr) -> Self {
        let now = Instant::now();
        Self { addr, pending: VecDeque::new(), begun: now, next: now, attempts: 0, refusals: 0, last: None }
    }

    /// Waits for a connection whose other end has sent a byte.
    fn first_to_speak(&mut self, target: &Target, deadline: &Deadline) -> Result<TcpStream, Knock> {
        loop {
            deadline.check().map_err(Knock::Stop)?;
            if let Some(why) = (target.gone)() {
                return Err(problem(why));
            }
            if Instant::now() >= self.next {
                self.begin()?;
            }
            let pause = self.next.saturating_duration_since(Instant::now()).min(SLICE);
            let mut fds: Vec<_> =
                self.pending.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
            poll_for(&mut fds, deadline.slice(pause))?;
            drop(fds);
            if let Some(socket) = self.spoken() {
                // The others would only cost the guest a process each.
                self.pending.clear();
                return Ok(socket);
            }
        }
    }

    fn begin(&mut self) -> Result<(), Knock> {
        self.attempts += 1;
        // Small beside the time already spent, so that a slow boot is not flooded.
        let apart = (self.begun.elapsed() / 20).clamp(Duration::from_secs(1), Duration::from_secs(10));
        self.next = Instant::now() + if self.attempts == 1 { FIRST_PATIENCE } else { apart };
        if self.pending.len() == MOST_PENDING {
            self.pending.pop_front();
            self.last = Some(SILENT.into());
        }
        self.pending.push_back(begin_connect(self.addr)?);
        Ok(())
    }

    /// The first that has spoken. Those that were closed are taken out and noted.
    fn spoken(&mut self) -> Option<TcpStream> {
        let mut index = 0;
        while let Some(socket) = self.pending.get(index) {
            let what = match socket.peek(&mut [0]) {
                Ok(0) => "the connection was closed before the SSH banner".into(),
                Ok(_) => return self.pending.remove(index),
                Err(error) if waits(&error) => {
                    index += 1;
                    continue;
                }
                Err(error) => error.to_string(),
            };
            self.pending.remove(index);
            self.failed(what, false);
        }
        None
    }

    /// Notes a failure and when to begin the next connection. After a refused login that is later:
    /// OpenSSH 9.8 and newer lock out an address that fails often.
    fn failed(&mut self, what: String, refused: bool) {
        let elapsed = self.begun.elapsed();
        let pause = if refused {
            self.refusals += 1;
            (elapsed / 4).clamp(Duration::from_millis(500), Duration::from_secs(5))
        } else {
            (elapsed / 20).clamp(Duration::from_millis(50), Duration::from_secs(1))
        };
        self.last = Some(what);
        self.next = Instant::now() + pause;
    }

    fn summary(&self) -> String {
        let mut text = match self.attempts {
            1 => "1 attempt".to_owned(),
            count => format!("{count} attempts"),
        };
        if self.refusals > 0 {
            text += &format!(", {} of them with the login refused", self.refusals);
        }
        match &self.last {
            Some(last) => text + "; the last problem: " + last,
            None if self.pending.is_empty() => text,
            None => text + "; the last problem: " + SILENT,
        }
    }
}

/// Begins a TCP connection without waiting for it.
fn begin_connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    match connect(&socket, &addr) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(errno) => Err(errno.into()),
    }
}

/// Not connected yet, or nothing to read yet.
fn waits(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
