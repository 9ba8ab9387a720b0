//! An authenticated libssh2 session on its socket, and the only place that waits for it.
//!
//! The session is in non-blocking mode. Every wait is one `poll` of the socket, cut into short
//! slices in which the deadline, Ctrl-C, the machine's life and the peer's silence are looked at.

use super::Target;
use crate::deadline::{Deadline, Stop};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use ssh2::{BlockDirections, ErrorCode, MethodType, Session};
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SLICE: Duration = Duration::from_millis(100);
/// A peer from which nothing came for so long is lost, although TCP still holds: QEMU keeps the
/// connection of a guest that crashed.
const SILENCE: Duration = Duration::from_secs(60);
/// Between questions that any living server answers.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// `LIBSSH2_ERROR_EAGAIN`, `.._AUTHENTICATION_FAILED`, `.._PUBLICKEY_UNVERIFIED` of `libssh2.h`.
const EAGAIN: ErrorCode = ErrorCode::Session(-37);
const REFUSED: [ErrorCode; 2] = [ErrorCode::Session(-18), ErrorCode::Session(-19)];

/// Why the link did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Stop(#[from] Stop),
    #[error("{}", .0.message())]
    Ssh(#[from] ssh2::Error),
    #[error("{0}")]
    Lost(String),
}

impl LinkError {
    /// True when the server knows the user or the key not (yet).
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Ssh(error) if REFUSED.contains(&error.code()))
    }
}

pub(super) struct Link {
    session: Session,
    socket: TcpStream,
    gone: Arc<dyn Fn() -> Option<String> + Send + Sync>,
    heard: Instant,
    asked: Instant,
    /// Waits no longer end on Ctrl-C: what is under way is the clean-up after it.
    pub(super) cleaning_up: bool,
}

impl Link {
    /// Key exchange and login on a socket on which the server has begun to speak.
    pub(super) fn open(socket: TcpStream, target: &Target, deadline: &Deadline) -> Result<Self, LinkError> {
        let mut session = Session::new()?;
        // ed25519 is the cheapest for a machine that is emulated.
        session.method_pref(
            MethodType::HostKey,
            "ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,rsa-sha2-256",
        )?;
        session.set_blocking(false);
        session.set_tcp_stream(socket.try_clone().map_err(|error| LinkError::Lost(error.to_string()))?);
        let mut link = Self {
            session: session.clone(),
            socket,
            gone: Arc::clone(&target.gone),
            heard: Instant::now(),
            asked: Instant::now(),
            cleaning_up: false,
        };
        link.complete(deadline, |_| session.handshake())?;
        let public = target.key.public_line();
        let private = target.key.private_openssh();
        link.complete(deadline, |session| {
            session.userauth_pubkey_memory(&target.user, Some(public.trim_end()), &private, None)
        })?;
        link.session.set_keepalive(true, 1);
        Ok(link)
    }

    /// The server's public host key, as the protocol has it.
    pub(super) fn host_key(&self) -> Vec<u8> {
        self.session.host_key().map(|(key, _)| key.to_vec()).unwrap_or_default()
    }

    /// False when the peer has closed the connection while nobody looked.
    pub(super) fn is_open(&self) -> bool {
        match self.socket.peek(&mut [0]) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Repeats `act`, waiting in between, until it gives something else than "again".
    pub(super) fn complete<T>(
        &mut self,
        deadline: &Deadline,
        mut act: impl FnMut(&Session) -> Result<T, ssh2::Error>,
    ) -> Result<T, LinkError> {
        loop {
            match act(&self.session) {
                Err(error) if error.code() == EAGAIN => self.wait(deadline)?,
                other => return Ok(other?),
            }
        }
    }

    /// True when libssh2 holds a packet that is partly sent. Only a repetition of the very call that
    /// began it can finish it; until then every other call is told "again".
    pub(super) fn half_sent(&self) -> bool {
        matches!(self.session.block_directions(), BlockDirections::Outbound | BlockDirections::Both)
    }

    /// Asks the peer for a sign of life when it is time.
    fn keep_alive(&mut self) -> Result<(), LinkError> {
        // A socket without room would leave a half-sent packet that nobody repeats.
        if self.asked.elapsed() > KEEPALIVE
            && self.session.authenticated()
            && !self.half_sent()
            && poll_for(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Duration::ZERO)?
        {
            self.asked = Instant::now();
            self.session.keepalive_send()?;
        }
        Ok(())
    }

    /// Notes that the peer lives, where bytes arrived without a wait.
    pub(super) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Ends when the time is up and on Ctrl-C.
    pub(super) fn check(&self, deadline: &Deadline) -> Result<(), Stop> {
        match deadline.check() {
            Err(Stop::Interrupted) if self.cleaning_up && !deadline.expired() => Ok(()),
            other => other,
        }
    }

    /// Waits until the socket can move, for one slice at most.
    pub(super) fn wait(&mut self, deadline: &Deadline) -> Result<(), LinkError> {
        self.check(deadline)?;
        if let Some(why) = (self.gone)() {
            return Err(LinkError::Lost(why));
        }
        self.keep_alive()?;
        let events = if self.half_sent() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        if poll_for(&mut [PollFd::new(&self.socket, events)], deadline.slice(SLICE))? {
            self.heard = Instant::now();
        } else if self.heard.elapsed() > SILENCE {
            let seconds = SILENCE.as_secs();
            return Err(LinkError::Lost(format!(
                "nothing heard for {seconds} s, not even keep-alive answers"
            )));
        }
        Ok(())
    }
}

/// Polls for at most `slice`; true when something happened.
pub(super) fn poll_for(fds: &mut [PollFd<'_>], slice: Duration) -> Result<bool, LinkError> {
    let lost = |error: &dyn std::fmt::Display| LinkError::Lost(format!("poll failed: {error}"));
    let slice = Timespec::try_from(slice).map_err(|error| lost(&error))?;
    match poll(fds, Some(&slice)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(lost(&errno)),
    }
}
