//! Commands through the QEMU guest agent: no network, no login, no handshake.
//!
//! Protocol: <https://www.qemu.org/docs/master/interop/qemu-ga-ref.html>. `guest-exec` runs a
//! program, `guest-exec-status` tells how it goes; output comes at the end, 16 MiB of each stream at
//! most (the agent's own limit).

use super::json_lines::{JsonLines, LinesError};
use super::{Cmd, Collector, Connection, ConnectionError, Exit, Output, Stream, signal_name};
use crate::deadline::{Deadline, Stop};
use qapi::qga;
use serde_json::{Value, json};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const PEER: &str = "guest agent";
/// The agent decodes a request as a whole, in memory.
const MOST_INPUT: u64 = 8 << 20;
/// Of each stream; the agent's own limit.
const MOST_OUTPUT: u64 = 16 << 20;
/// How a command's end is waited for: the agent does not tell by itself. A look costs the guest a
/// millisecond or two under emulation, so they become rarer.
const FIRST_LOOK: Duration = Duration::from_millis(4);
const LAST_LOOK: Duration = Duration::from_millis(100);
/// Said when the prelude failed; its output is its own affair.
const NO_PRELUDE: &str = "shakedown: no prelude";
/// For the end of a command that exceeded its deadline.
const KILL_TIME: Duration = Duration::from_secs(5);
/// What root gets when logging in; the agent itself runs with almost nothing.
const ENVIRONMENT: [&str; 5] = [
    "HOME=/root",
    "USER=root",
    "LOGNAME=root",
    "SHELL=/bin/sh",
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
];

/// A guest's agent, proven by one exchange.
#[derive(Debug)]
pub struct Agent {
    lines: JsonLines,
    /// An answer may still come to a request that was given up.
    unsettled: bool,
    /// Runs in front of the next command.
    prelude: Option<fn() -> String>,
}

impl Agent {
    /// Takes over our end of the agent's port and waits until the agent answers.
    ///
    /// # Errors
    /// [`ConnectionError::Stopped`] when no agent answers in time, [`ConnectionError::Transport`]
    /// when the machine ends.
    pub fn open(stream: UnixStream, deadline: &Deadline) -> Result<Self, ConnectionError> {
        let lines = JsonLines::new(stream).map_err(|error| broken("cannot use the agent's port", error))?;
        let mut agent = Self { lines, unsettled: true, prelude: None };
        agent.settle(deadline).map_err(|error| fault("guest-sync", error))?;
        Ok(agent)
    }

    /// Has what `script` gives then run in front of the next command, in the same shell: starting
    /// one costs an emulated guest a tenth of a second.
    pub fn prelude(&mut self, script: fn() -> String) {
        self.prelude = Some(script);
    }

    /// True until the next command when there is something to run in front of it.
    pub fn has_prelude(&self) -> bool {
        self.prelude.is_some()
    }

    /// Gets back in step: the answer to our number follows a mark, and all before that is stale.
    fn settle(&mut self, deadline: &Deadline) -> Result<(), LinesError> {
        // A bare 0xFF makes the agent forget half a request.
        self.lines.send_bytes(b"\xff", deadline)?;
        loop {
            let number = RandomState::new().build_hasher().finish() >> 16;
            let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
            self.lines.send(&request, deadline)?;
            // An agent that starts only now never saw the request: it is sent again.
            let patience = deadline.within(Duration::from_secs(2), "the agent's answer");
            loop {
                match self.lines.receive(&patience) {
                    Ok(answer) if answer.get("return") == Some(&json!(number)) => {
                        self.unsettled = false;
                        return Ok(());
                    }
                    Ok(_) | Err(LinesError::NotJson(_)) => {}
                    Err(LinesError::Stopped(Stop::Expired { .. })) if !deadline.expired() => break,
                    Err(error) => return Err(error),
                }
            }
        }
    }

    fn call<C: qapi::Command>(&mut self, command: &C, deadline: &Deadline) -> Result<C::Ok, Failure> {
        if self.unsettled {
            self.settle(deadline)?;
        }
        let request = json!({ "execute": C::NAME, "arguments": command });
        self.unsettled = true;
        self.lines.send(&request, deadline)?;
        let mut answer = self.lines.receive(deadline)?;
        self.unsettled = false;
        if let Some(refusal) = answer.get("error") {
            let text = refusal.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
            return Err(Failure::Refused(text.to_owned()));
        }
        let result = answer.get_mut("return").map(Value::take).unwrap_or_default();
        serde_json::from_value(result).map_err(|error| Failure::Lines(error.into()))
    }

    fn start(&mut self, line: &str, input: Vec<u8>, deadline: &Deadline) -> Result<i64, Failure> {
        let command = qga::guest_exec {
            // A session of its own, so that all of it can be killed.
            path: "setsid".into(),
            arg: Some(vec!["/bin/sh".into(), "-c".into(), format!("cd\n{line}")]),
            env: Some(ENVIRONMENT.map(str::to_owned).to_vec()),
            input_data: Some(input),
            capture_output: Some(qga::GuestExecCaptureOutput::flag(true)),
        };
        Ok(self.call(&command, deadline)?.pid)
    }

    fn wait(&mut self, pid: i64, deadline: &Deadline) -> Result<qga::GuestExecStatus, Failure> {
        let mut pause = FIRST_LOOK;
        loop {
            let status = self.call(&qga::guest_exec_status { pid }, deadline)?;
            if status.exited {
                return Ok(status);
            }
            deadline.check().map_err(LinesError::from)?;
            std::thread::sleep(deadline.slice(pause));
            pause = (pause * 3 / 2).min(LAST_LOOK);
        }
    }

    fn kill(&mut self, pid: i64) {
        let deadline = Deadline::after(KILL_TIME, "the end of a command that took too long");
        let line = format!("kill -s KILL -- -{pid}");
        if let Ok(kill) = self.start(&line, Vec::new(), &deadline) {
            let _ = self.wait(kill, &deadline);
            let _ = self.wait(pid, &deadline);
        }
    }
}

/// Why a call has no result.
enum Failure {
    Refused(String),
    Lines(LinesError),
}

impl<E: Into<LinesError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Lines(error.into())
    }
}

impl Connection for Agent {
    fn peer(&self) -> String {
        PEER.into()
    }

    fn exec(&mut self, cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError> {
        let deadline = cmd.deadline(deadline);
        let Cmd { line, stdin, keep, on_output, .. } = cmd;
        let mut input = Vec::new();
        stdin.take(MOST_INPUT + 1).read_to_end(&mut input).map_err(|source| ConnectionError::Host {
            what: "cannot read what the command is to get".into(),
            source,
        })?;
        if input.len() as u64 > MOST_INPUT {
            let source = io::Error::other("the guest agent takes 8 MiB at once; use SSH for more");
            return Err(ConnectionError::Host { what: "too much standard input".into(), source });
        }
        let failure = |failure, line: &str| match failure {
            Failure::Lines(LinesError::Stopped(stop)) => {
                ConnectionError::Stopped { line: line.to_owned(), peer: PEER.into(), stop }
            }
            Failure::Lines(error) => fault("guest-exec", error),
            Failure::Refused(why) => broken("the agent refused to run a command", io::Error::other(why)),
        };
        let with_prelude = match self.prelude.take() {
            Some(prelude) => {
                format!(
                    "{{ {}; }} >/dev/null 2>&1 || {{ echo {NO_PRELUDE} >&2; exit 125; }}\n{line}",
                    prelude()
                )
            }
            None => line.clone(),
        };
        let pid = self.start(&with_prelude, input, &deadline).map_err(|error| failure(error, &line))?;
        let status = match self.wait(pid, &deadline) {
            Ok(status) => status,
            Err(error) => {
                self.kill(pid);
                return Err(failure(error, &line));
            }
        };
        if status.out_truncated == Some(true) || status.err_truncated == Some(true) {
            return Err(ConnectionError::TooMuch {
                line,
                peer: PEER.into(),
                limit: MOST_OUTPUT,
                instead: "use SSH for more",
            });
        }
        if with_prelude.len() > line.len() && status.exitcode == Some(125) {
            let words = status.err_data.as_deref().unwrap_or_default();
            if words.trim_ascii() == NO_PRELUDE.as_bytes() {
                let why = io::Error::other("date(1) or what it needs is broken there");
                return Err(broken("the machine does not set its clock", why));
            }
        }
        let mut collector = Collector::new(keep, on_output);
        collector.take(Stream::Stdout, &status.out_data.unwrap_or_default());
        collector.take(Stream::Stderr, &status.err_data.unwrap_or_default());
        let exit = match (status.exitcode, status.signal) {
            (_, Some(signal)) => Exit::Signal(signal_name(signal as i32)),
            (code, None) => Exit::Code(code.unwrap_or_default() as i32),
        };
        Ok(collector.finish(exit))
    }
}

fn fault(what: &str, error: LinesError) -> ConnectionError {
    match error {
        LinesError::Stopped(stop) => {
            ConnectionError::Stopped { line: what.to_owned(), peer: PEER.into(), stop }
        }
        error => broken("the agent's port broke", error),
    }
}

fn broken(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> ConnectionError {
    ConnectionError::Transport { peer: PEER.into(), what: what.to_owned(), source: Some(error.into()) }
}
