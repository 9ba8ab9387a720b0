//! SSH by libssh2: one session to one machine, one channel per command.
//!
//! Owns the session and when it is made anew. `dial` gets a session that is proven to work, `link`
//! waits on its socket, `command` runs one command on it.

mod command;
mod dial;
mod link;

use super::{Cmd, Collector, Connection, ConnectionError, KeyPair, Output};
use crate::deadline::{Deadline, Stop};
use command::Ended;
use link::{Link, LinkError};
use ssh2::Channel;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a lost session may take to come back for the next command.
const RECONNECT: Duration = Duration::from_secs(30);
/// Longest command line, in bytes: libssh2 sends it in one packet of at most 35,000 bytes.
const LONGEST_LINE: usize = 32_000;

/// Whom to log in to.
#[derive(Clone)]
pub struct Target {
    /// Where its SSH server is, or will be.
    pub addr: SocketAddr,
    /// The user to log in as.
    pub user: String,
    /// The key that the user's `authorized_keys` has, or will have.
    pub key: KeyPair,
    /// Says why the machine is gone, once it is. Asked about ten times a second in every wait.
    pub gone: Arc<dyn Fn() -> Option<String> + Send + Sync>,
}

impl Target {
    /// A machine that is never known to be gone.
    pub fn new(addr: SocketAddr, user: impl Into<String>, key: KeyPair) -> Self {
        Self { addr, user: user.into(), key, gone: Arc::new(|| None) }
    }

    /// Waits end as soon as `gone` gives a reason, such as `QEMU ended with exit status 1`.
    #[must_use]
    pub fn until(mut self, gone: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.gone = Arc::new(gone);
        self
    }

    fn transport(&self, what: impl Into<String>) -> ConnectionError {
        ConnectionError::Transport { peer: self.to_string(), what: what.into(), source: None }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.user, self.addr)
    }
}

/// A machine over SSH.
///
/// - **Deadline**: a command that exceeds it is killed on the machine, with its process group, by a
///   second channel; that may take 5 s more. Where it fails the session is closed. A process that
///   left the group lives on.
/// - **Loss**: a session that broke is made anew once for the *next* command. A command that may
///   have run is never repeated. A machine that is silent for 60 s counts as lost.
/// - **Host key**: any is accepted at first and no other after that. Forwarded ports are on
///   loopback, and machines make their host keys as they boot.
/// - **Noise**: what the login shell's start-up files print is not in a command's output.
///
/// The server ends a channel only after it has told how the command ended (OpenSSH does); one that
/// did not would look like exit status 0.
pub struct Ssh {
    target: Target,
    /// `None` once it broke; taken out while a command runs, so that a broken one is never kept.
    link: Option<Link>,
    host_key: Vec<u8>,
    attempts: u32,
}

impl Ssh {
    /// Waits until `target` runs a command over SSH.
    ///
    /// Transport errors are retried after short pauses, and so is a refused login, because the
    /// machine may still be about to write `authorized_keys`.
    ///
    /// # Errors
    /// [`ConnectionError::Transport`] when the time is up, on Ctrl-C ([`Stop`] is its source) or when
    /// the machine is gone; with the number of attempts and the last problem.
    pub fn open(target: Target, deadline: &Deadline) -> Result<Self, ConnectionError> {
        let (link, attempts) = dial::dial(&target, None, deadline)?;
        Ok(Self { host_key: link.host_key(), target, link: Some(link), attempts })
    }

    /// How many connections were begun until one worked.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// A session with a channel on which nothing has been asked yet: the last moment at which it
    /// is safe to start over.
    fn channel(&mut self, deadline: &Deadline) -> Result<(Link, Channel), LinkOrDial> {
        if let Some(mut link) = self.link.take().filter(Link::is_open) {
            link.heard();
            match link.complete(deadline, ssh2::Session::channel_session) {
                Ok(channel) => return Ok((link, channel)),
                Err(LinkError::Stop(stop)) => return Err(LinkOrDial::Link(LinkError::Stop(stop))),
                Err(_) => {}
            }
        }
        let patience = deadline.within(RECONNECT, "SSH reconnection");
        let (mut link, _) =
            dial::dial(&self.target, Some(&self.host_key), &patience).map_err(LinkOrDial::Dial)?;
        let channel = link.complete(deadline, ssh2::Session::channel_session).map_err(LinkOrDial::Link)?;
        Ok((link, channel))
    }
}

enum LinkOrDial {
    Link(LinkError),
    Dial(ConnectionError),
}

impl Connection for Ssh {
    fn peer(&self) -> String {
        self.target.to_string()
    }

    fn exec(&mut self, cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError> {
        let deadline = cmd.deadline(deadline);
        let Cmd { line, stdin, keep, on_output, .. } = cmd;
        if line.len() > LONGEST_LINE || line.contains('\0') {
            return Err(ConnectionError::Host {
                what: format!("cannot send this command line ({} bytes)", line.len()),
                source: io::Error::other(format!(
                    "it must have no NUL and at most {LONGEST_LINE} bytes; give a long script to `sh -s` on \
                     standard input"
                )),
            });
        }
        let peer = self.peer();
        let stopped = |line: String, stop: Stop| ConnectionError::Stopped { line, peer: peer.clone(), stop };
        let (mut link, channel) = match self.channel(&deadline) {
            Ok(both) => both,
            Err(LinkOrDial::Dial(error)) => return Err(error),
            Err(LinkOrDial::Link(LinkError::Stop(stop))) => return Err(stopped(line, stop)),
            Err(LinkOrDial::Link(error)) => return Err(self.target.transport(error.to_string())),
        };
        let mut collector = Collector::new(keep, on_output);
        let ended = command::run(&mut link, channel, &line, stdin, &mut collector, &deadline);
        let (result, whole) = match ended {
            Ended::Exit(exit) => (Ok(collector.finish(exit)), true),
            Ended::Stopped { stop, killed } => (Err(stopped(line, stop)), killed),
            Ended::TooMuch { killed } => (Err(Collector::too_much(line, self.peer())), killed),
            Ended::Input { source, killed } => (
                Err(ConnectionError::Host { what: "cannot read what the command is to get".into(), source }),
                killed,
            ),
            Ended::Lost(what) => {
                (Err(self.target.transport(format!("lost while `{line}` ran: {what}"))), false)
            }
        };
        self.link = whole.then_some(link);
        result
    }
}
