//! Commands over the serial console, exact in output and exit status.
//!
//! A small agent (`agent.sh`, typed once, run by `sh` in front of the login shell) takes requests
//! and answers with frames ([`super::frame`]). It keeps a command's output in a private temporary
//! directory, so what a kernel message mangles is asked for again and the command never reruns.
//! Waits are on the console's text directly: no polling.
//!
//! Limits: output comes at the end (`on_output` is called once per stream). An exit status above 128
//! counts as a signal if the command line replaced its shell (`exec`) or that shell's EXIT trap.
//! Without `setsid` in the guest a deadline kills only the command's shell. Standard output is a file
//! to the command: one that itself opens `/dev/stdout` with `>` truncates what it printed before.

use super::feed::WaitError;
use super::frame::{Answer, Reply, cksum, parse};
use super::{Keyboard, Line};
use crate::connection::{Cmd, Collector, Connection, ConnectionError, MOST_KEPT, Output, Stream};
use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

const AGENT: &str = include_str!("agent.sh");
const PEER: &str = "ttyS0";
/// A terminal in canonical mode drops what is beyond 4095 bytes in a line (termios(3)).
const LINE: usize = 1000;
/// Standard input goes in pieces of this many bytes, each acknowledged: the kernel keeps 64 KiB for a
/// reader that is slow, and drops the rest.
const CHUNK: usize = 40 << 10;
/// How long the guest may be silent before it is asked to say its last frame again.
const PATIENCE: Duration = Duration::from_secs(1);
const MOST_PATIENCE: Duration = Duration::from_secs(30);

/// A shell on the serial console: a [`Connection`].
#[derive(Debug)]
pub struct Shell {
    line: Arc<Line>,
    nonce: String,
    /// Number of the last request.
    id: u64,
    user_id: Option<u32>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// The last request was cut short; what the agent is doing is unknown.
    Unsettled,
    /// It does not answer any more.
    Unusable,
}

impl Shell {
    /// Starts the agent in the login shell that is waiting at its prompt.
    pub(super) fn start(line: &Arc<Line>, deadline: &Deadline) -> Result<Self> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let nonce = nonce();
            let mut shell = Self { line: Arc::clone(line), nonce, id: 0, user_id: None, state: State::Ready };
            let attempt = deadline.within(Duration::from_secs(20), "start of the console's agent");
            match shell.load(&attempt) {
                Ok((_, missing)) if !missing.is_empty() => {
                    let what = format!("the guest lacks {missing}, which the serial console needs");
                    let fix = "add coreutils, grep and sed, or busybox, to the image";
                    return Err(Fault::machine(what).fix(fix).into());
                }
                Ok((user_id, _)) => {
                    shell.user_id = Some(user_id);
                    return Ok(shell);
                }
                Err(WaitError::Stopped(Stop::Expired { .. })) if attempts < 3 && !deadline.expired() => {
                    Keyboard::new(line, deadline).send("\x03", false)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Types the agent; its user id and the tools that it lacks.
    fn load(&mut self, deadline: &Deadline) -> Result<(u32, String), WaitError> {
        let keyboard = Keyboard::new(&self.line, deadline);
        let mut position = self.line.feed.end();
        // Echo is turned off before the agent's many lines, and the shell that reads them has no
        // line editing. `go` comes twice for the reason given in agent.sh.
        keyboard.enter(&format!(
            "sh -c 'sd_t=$(stty -g);stty -echo;n=$(printf \"\\n.\");n=${{n%.}};s=;\
             printf \"@%s:%s.\\n@%s:%s.\\n\" {0} 0:go:0 {0} 0:go:0;\
             while IFS= read -r l;do [ \"$l\" = . ]&&break;s=$s$l$n;done;\
             sd_k={0};eval \"$s\"' 2>/dev/null",
            self.nonce
        ))?;
        let mut answer = Answer::default();
        self.line
            .feed
            .wait(deadline, &mut position, |text, position| self.take(text, position, &mut answer, 0))?;
        let code = AGENT.lines().map(str::trim_start).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let typed = code.fold(String::new(), |typed, line| typed + line + "\n") + ".";
        keyboard.enter(&typed)?;
        loop {
            let mut answer = Answer::default();
            self.listen(&mut position, &mut answer, 0, deadline)?;
            if let Some(Reply::Ready { user_id, missing }) = answer.reply {
                return Ok((user_id, missing));
            }
        }
    }

    /// See [`super::Console::resume`].
    pub(super) fn resume(line: &Arc<Line>, token: &str, deadline: &Deadline) -> Result<Self> {
        let nonce = token.to_owned();
        let mut shell = Self { line: Arc::clone(line), nonce, id: 0, user_id: None, state: State::Unsettled };
        shell
            .settle(deadline)
            .context(Fault::machine("the console's shell of the frozen machine does not answer"))?;
        Ok(shell)
    }

    /// What [`super::Console::resume`] needs to find this shell again in a copy of the machine.
    pub fn token(&self) -> &str {
        &self.nonce
    }

    /// Ends this shell's agent: what to type for it, once it has said its last. Then the login shell
    /// that was in front of it is at its prompt again.
    pub(crate) fn leave(self) -> &'static str {
        // Each answer comes twice, and nobody has waited for the second one.
        let whole = |text: &[u8], _: &mut u64| {
            let mut lines = text.strip_suffix(b"\n")?.rsplit(|&byte| byte == b'\n');
            (lines.next() == lines.next()).then_some(())
        };
        let moment = Deadline::after(PATIENCE, "the rest of an answer");
        let _ = self.line.feed.wait(&moment, &mut self.line.feed.end().saturating_sub(1024), whole);
        // The end of its input.
        "\x04"
    }

    /// The numeric user id, where known.
    pub fn user_id(&self) -> Option<u32> {
        self.user_id
    }

    /// Gets from an unknown state to an agent that waits for a request.
    fn settle(&mut self, deadline: &Deadline) -> Result<()> {
        for seconds in [2, 4, 8] {
            let attempt = deadline.within(Duration::from_secs(seconds), "answer of the console's agent");
            Keyboard::new(&self.line, &attempt).send("\x03", false)?;
            match self.ask("sync", "- -", &attempt) {
                Ok(_) => {
                    self.state = State::Ready;
                    return Ok(());
                }
                Err(WaitError::Stopped(Stop::Expired { .. })) if !deadline.expired() => {}
                Err(error) => return Err(error.into()),
            }
        }
        // A command may have killed the agent; the login shell is still behind it.
        self.state = State::Unusable;
        *self = Self::start(&self.line, deadline)?;
        Ok(())
    }

    /// `None` when it printed more than is kept.
    fn command(
        &mut self,
        line: &str,
        input: &[u8],
        deadline: &Deadline,
    ) -> Result<Option<Output>, WaitError> {
        let stdin = if input.is_empty() { "-" } else { "i" };
        if !input.is_empty() {
            self.put(input, deadline)?;
        }
        self.id += 1;
        let mut pieces = encode(line, LINE);
        let last = pieces.pop().unwrap_or_default();
        let mut request = String::new();
        for piece in pieces {
            let _ = writeln!(request, "{} add {} - {piece}", self.nonce, self.id);
        }
        let _ = writeln!(request, "{} run {} {stdin} {last}", self.nonce, self.id);
        let mut position = self.line.feed.end();
        Keyboard::new(&self.line, deadline).send(&request, false)?;
        let mut answer = Answer::default();
        let mut round = 0;
        loop {
            self.listen(&mut position, &mut answer, round, deadline)?;
            if answer.is_too_long() {
                return Ok(None);
            }
            let gaps = match answer.assemble() {
                Some(Ok(output)) => return Ok(Some(output)),
                Some(Err(gaps)) => gaps,
                None => Vec::new(),
            };
            round += 1;
            let mut request = String::new();
            for (stream, from, to) in gaps {
                let _ = writeln!(request, "{} get {} {stream} {from},{to}", self.nonce, self.id);
            }
            let _ = writeln!(request, "{} again {} {round} -", self.nonce, self.id);
            Keyboard::new(&self.line, deadline).send(&request, false)?;
        }
    }

    /// Sends standard input until it arrived whole.
    fn put(&mut self, bytes: &[u8], deadline: &Deadline) -> Result<(), WaitError> {
        let sum = format!("{} {}", cksum(bytes), bytes.len());
        loop {
            for chunk in bytes.chunks(CHUNK) {
                let text = BASE64.encode(chunk);
                let lines: Vec<_> = text.as_bytes().chunks(LINE).map(String::from_utf8_lossy).collect();
                self.ask("put", &format!("{} -\n{}", lines.len(), lines.join("\n")), deadline)?;
            }
            if self.ask("load", &sum, deadline)? == Some(Reply::Load { whole: true }) {
                return Ok(());
            }
            deadline.check()?;
        }
    }

    /// Sends one request and waits for its reply.
    fn ask(&mut self, verb: &str, rest: &str, deadline: &Deadline) -> Result<Option<Reply>, WaitError> {
        self.id += 1;
        let mut position = self.line.feed.end();
        Keyboard::new(&self.line, deadline).enter(&format!("{} {verb} {} {rest}", self.nonce, self.id))?;
        let mut answer = Answer::default();
        self.listen(&mut position, &mut answer, 0, deadline)?;
        Ok(answer.reply)
    }

    /// Takes frames until the reply to question `round` is there. When the guest falls silent it is
    /// asked for its last frame, for which a kernel message may have hit.
    fn listen(
        &self,
        position: &mut u64,
        answer: &mut Answer,
        round: u64,
        deadline: &Deadline,
    ) -> Result<(), WaitError> {
        let keyboard = Keyboard::new(&self.line, deadline);
        let mut patience = PATIENCE;
        loop {
            let frames = answer.frames;
            let slice = deadline.within(patience, "patience");
            let found = self
                .line
                .feed
                .wait(&slice, position, |text, position| self.take(text, position, answer, round));
            match found {
                Err(WaitError::Stopped(Stop::Expired { .. })) if !deadline.expired() => {
                    if answer.frames == frames {
                        keyboard.enter(&format!("{} again {} {round} -", self.nonce, self.id))?;
                        patience = (2 * patience).min(MOST_PATIENCE);
                    }
                }
                Err(WaitError::Stopped(Stop::Expired { .. })) => return Err(deadline.expiry().into()),
                other => return other,
            }
        }
    }

    /// Takes the frames out of the whole lines of `text`.
    fn take(&self, text: &[u8], position: &mut u64, answer: &mut Answer, round: u64) -> Option<()> {
        let whole = text.iter().rposition(|&byte| byte == b'\n')? + 1;
        *position += whole as u64;
        for line in text[..whole].split(|&byte| byte == b'\n') {
            if let Some(body) = parse(line, &self.nonce, self.id) {
                answer.accept(body);
            }
        }
        (answer.reply.is_some() && answer.round >= round).then_some(())
    }

    fn broken(what: String, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ConnectionError {
        ConnectionError::Transport { peer: PEER.into(), what, source: Some(error.into()) }
    }
}

impl Connection for Shell {
    fn peer(&self) -> String {
        PEER.into()
    }

    fn exec(&mut self, mut cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError> {
        if self.state == State::Unusable {
            return Err(ConnectionError::Transport {
                peer: PEER.into(),
                what: format!("the shell stopped answering; last lines:\n{}", self.line.tail(5)),
                source: None,
            });
        }
        let deadline = cmd.deadline(deadline);
        if self.state == State::Unsettled {
            self.settle(&deadline).map_err(|error| {
                let what = "the shell does not answer after a command that was stopped";
                Self::broken(what.into(), error)
            })?;
        }
        let mut stdin = Vec::new();
        cmd.stdin.read_to_end(&mut stdin).map_err(|source| ConnectionError::Host {
            what: format!("cannot read the standard input of `{}`", cmd.line),
            source,
        })?;
        match self.command(&cmd.line, &stdin, &deadline) {
            Ok(None) => Err(ConnectionError::TooMuch {
                line: cmd.line,
                peer: PEER.into(),
                limit: MOST_KEPT as u64,
                instead: "let it print into a file, or use SSH with `Cmd::on_output`",
            }),
            Ok(Some(output)) => {
                let mut collector = Collector::new(cmd.keep, cmd.on_output);
                collector.take(Stream::Stdout, &output.stdout);
                collector.take(Stream::Stderr, &output.stderr);
                Ok(collector.finish(output.exit))
            }
            Err(WaitError::Stopped(stop)) => {
                // The agent kills the command on Ctrl-C. Whether it did is found out by the next
                // command, in that one's time.
                self.state = State::Unsettled;
                let moment = Deadline::after(PATIENCE, "Ctrl-C");
                let _ = Keyboard::new(&self.line, &moment).send("\x03", false);
                Err(ConnectionError::Stopped { line: cmd.line, peer: PEER.into(), stop })
            }
            Err(error) => {
                self.state = State::Unusable;
                Err(Self::broken(format!("the line was lost during `{}`", cmd.line), error))
            }
        }
    }
}

/// Eight hexadecimal digits that no other shell has had.
pub(super) fn nonce() -> String {
    format!("{:08x}", RandomState::new().build_hasher().finish() as u32)
}

/// Text as pieces for the shell's `printf %b`, each `length` characters at most (give or take one).
///
/// Only printable ASCII goes over the line. `read` drops blanks at the ends, so these are encoded.
fn encode(text: &str, length: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece = String::new();
    for &byte in text.as_bytes() {
        if piece.len() + 5 > length {
            pieces.push(std::mem::take(&mut piece));
        }
        match byte {
            b'!'..=b'[' | b']'..=b'~' => piece.push(char::from(byte)),
            b' ' if !piece.is_empty() && !piece.ends_with(' ') => piece.push(' '),
            _ => {
                let _ = write!(piece, "\\0{byte:03o}");
            }
        }
    }
    pieces.push(piece);
    for piece in &mut pieces {
        if piece.ends_with(' ') {
            piece.pop();
            piece.push_str("\\0040");
        }
    }
    pieces
}

#[cfg(test)]
#[path = "shell_tests.rs"]
mod tests;
