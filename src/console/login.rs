//! From a booting guest to a shell of the right user.
//!
//! Prompts say only when to type; that a shell is there is known when it answers a probe whose
//! answer cannot be its own echo. Owns the dialogue up to that; [`super::shell`] goes on from there.

use super::feed::{Reader, Stopper, WaitError};
use super::shell::{Shell, nonce};
use super::{Keyboard, Line};
use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use rexpect::ReadUntil;
use rexpect::error::Error as RexpectError;
use rexpect::reader::Regex;
use rexpect::session::StreamSession;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// What may stand between a prompt and the end of the text: messages of the kernel and of systemd.
const NOISE: &str = r"(?:(?:\[[ *.\dA-Z]{4,20}\]| {9})[^\n]*(?:\n|$)|[\r\n])*$";
/// A getty's prompt. `Last login: ...` and `login: root (automatic login)` go on.
const LOGIN: &str = r"[^\n]*\blogin: ?";
const PASSWORD: &str = r"[^\n]*[Pp]assword(?: for [^\n:]*)?: ?";
/// The end of nearly every POSIX shell's prompt; busybox has a blank before its sign.
const SHELL: &str = r"(?:^|[\n\r\w)\]~/]|/\S* )[#$] ";
const REFUSED: &str = r"Login incorrect|Sorry, try again|incorrect password|Authentication (?:failure|error)|not in the sudoers file|may not run sudo|(?:sudo|su): [^\n]*(?:not found|required|must be)";
/// After a prompt this long without anything else it is one.
const CALM: Duration = Duration::from_millis(300);
/// rexpect's own timeout: so often we look at our deadline.
const LOOK_MS: u64 = 1000;
/// So many looks without a prompt, and Enter is pressed to get a new one.
const LOOKS_BEFORE_ENTER: u32 = 5;
/// A getty may restart and ask again.
const ATTEMPTS: u32 = 5;

/// How to log in.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoginProfile {
    /// Typed at a login prompt; empty means `root`. An image that logs in by itself never asks.
    pub user: String,
    /// Typed at every password prompt; nothing but Enter if absent.
    pub password: Option<String>,
    /// How to become root where the user is not.
    pub escalate: Escalate,
    /// Regular expression for the login prompt, in place of `login: `.
    pub login_prompt: Option<String>,
    /// Regular expression for the end of the shell's prompt, in place of `# ` or `$ `.
    pub shell_prompt: Option<String>,
}

impl LoginProfile {
    /// What announces that a login is possible, also where it is automatic.
    ///
    /// # Errors
    /// A host [`Fault`] when the profile's own pattern is not a regular expression.
    pub fn prompt(&self) -> Result<super::Regex> {
        let pattern = self.login_prompt.as_deref().unwrap_or(r"\blogin: ");
        super::Regex::new(pattern)
            .with_context(|| Fault::host(format!("login_prompt `{pattern}` is not a regular expression")))
    }
}

/// How a user becomes root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Escalate {
    /// Not at all: the shell stays the user's.
    #[default]
    None,
    /// `sudo -i`.
    Sudo,
    /// `su -`.
    Su,
}

/// Logs in and starts a shell's agent.
pub(super) fn login(line: &Arc<Line>, profile: &LoginProfile, deadline: &Deadline) -> Result<Shell> {
    // What went wrong in words of its own needs no others.
    let explain = |error: anyhow::Error| match error.is::<Fault>() {
        true => error,
        false => error.context(Fault::machine(format!(
            "no shell on the serial console. Last lines:\n{}",
            line.tail(10)
        ))),
    };
    let patterns = Patterns::new(profile)?;
    let mut dialogue = Dialogue::begin(line, &patterns, profile, deadline);
    let uid = dialogue.shell().map_err(explain)?;
    let command = match profile.escalate {
        Escalate::Sudo if uid != 0 => Some("sudo -i"),
        Escalate::Su if uid != 0 => Some("su -"),
        _ => None,
    };
    if let Some(command) = command {
        let uid = dialogue.escalate(command).map_err(explain)?;
        if uid != 0 {
            return Err(
                Fault::machine(format!("`{command}` on the serial console left user id {uid}")).into()
            );
        }
    }
    // Its reader would go on filling rexpect's buffer.
    drop(dialogue);
    Shell::start(line, deadline).map_err(explain)
}

struct Patterns {
    login: Regex,
    password: Regex,
    shell: Regex,
    refused: Regex,
    noise: Regex,
}

impl Patterns {
    fn new(profile: &LoginProfile) -> Result<Self> {
        let compile = |name: &str, pattern: &str, end: &str| {
            Regex::new(&format!("(?:{pattern}){end}"))
                .with_context(|| Fault::host(format!("`{name}` is no regular expression: {pattern}")))
        };
        let or = |own: &Option<String>, default: &str| own.clone().unwrap_or_else(|| default.into());
        Ok(Self {
            login: compile("login_prompt", &or(&profile.login_prompt, LOGIN), NOISE)?,
            password: compile("password", PASSWORD, NOISE)?,
            shell: compile("shell_prompt", &or(&profile.shell_prompt, SHELL), NOISE)?,
            refused: compile("refused", REFUSED, "")?,
            noise: compile("noise", &format!("^{NOISE}"), "")?,
        })
    }

    /// The prompt at the end of `text`, if there is one.
    fn prompt(&self, text: &str) -> Option<Seen> {
        let found = |regex: &Regex| {
            let line = regex.find(text)?.as_str().trim_start().lines().next()?;
            Some(line.trim_end().to_owned())
        };
        None.or_else(|| found(&self.password).map(Seen::Password))
            .or_else(|| found(&self.login).map(Seen::Login))
            .or_else(|| self.shell.is_match(text).then_some(Seen::Shell))
    }
}

/// What was seen on the console.
#[derive(Debug, PartialEq)]
enum Seen {
    Login(String),
    Password(String),
    Shell,
    Refused(String),
    /// The answer to a probe.
    Answer(u32),
    Nothing,
}

struct Dialogue<'a> {
    session: StreamSession<Keyboard>,
    /// Ends the thread that rexpect reads with.
    _stopper: Stopper,
    line: &'a Arc<Line>,
    /// How far rexpect has read: it counts bytes as characters.
    position: u64,
    keyboard: Keyboard,
    patterns: &'a Patterns,
    profile: &'a LoginProfile,
    deadline: &'a Deadline,
    prompt: String,
    last_typed: String,
    /// What the answer to the last probe begins with.
    probe: String,
}

impl<'a> Dialogue<'a> {
    fn begin(
        line: &'a Arc<Line>,
        patterns: &'a Patterns,
        profile: &'a LoginProfile,
        deadline: &'a Deadline,
    ) -> Self {
        // A prompt is at the end; all else is history.
        let position = line.feed.end().saturating_sub(4096);
        let (reader, stopper) = Reader::new(&line.feed, position);
        let keyboard = Keyboard::new(line, deadline);
        let options = rexpect::session::Options::new().timeout_ms(Some(LOOK_MS));
        let session = StreamSession::new(reader, keyboard.clone(), options);
        let (prompt, last_typed) = (String::new(), String::new());
        Self {
            session,
            _stopper: stopper,
            line,
            position,
            keyboard,
            patterns,
            profile,
            deadline,
            prompt,
            last_typed,
            probe: nonce(),
        }
    }

    /// Types `command` at the shell and goes on as [`Dialogue::shell`] does.
    fn escalate(&mut self, command: &str) -> Result<u32> {
        self.session.send_line(command)?;
        (self.prompt, self.last_typed) = (String::new(), command.into());
        self.shell()
    }

    /// Answers prompts until a shell has answered a probe, and returns its user id.
    fn shell(&mut self) -> Result<u32> {
        let user = if self.profile.user.is_empty() { "root" } else { &self.profile.user };
        let (mut logins, mut quiet) = (0, 0);
        loop {
            let seen = self.look()?;
            quiet = if matches!(seen, Seen::Nothing) { quiet + 1 } else { 0 };
            match seen {
                Seen::Answer(uid) => return Ok(uid),
                Seen::Login(prompt) => {
                    logins += 1;
                    if logins > ATTEMPTS {
                        return Err(Fault::machine(format!(
                            "the guest asked for a login {ATTEMPTS} times at `{}`",
                            prompt.trim()
                        ))
                        .into());
                    }
                    self.session.send_line(user)?;
                    (self.prompt, self.last_typed) = (prompt, user.into());
                }
                Seen::Password(prompt) => {
                    self.keyboard.enter_secret(self.profile.password.as_deref().unwrap_or_default())?;
                    self.prompt = format!("{} {}", self.prompt, prompt.trim());
                }
                Seen::Refused(text) if !self.last_typed.is_empty() => {
                    return Err(Fault::machine(format!(
                        "the guest said `{text}` to `{}` on the serial console, last prompt `{}`",
                        self.last_typed,
                        self.prompt.trim()
                    ))
                    .fix("set `user`, `password` and `escalate` of the image's login")
                    .into());
                }
                Seen::Shell => {
                    self.probe = nonce();
                    // Echoed as typed, with a blank in the middle; answered without.
                    let probe = format!("printf '%s%s-%s.\\n' SHAKE DOWN{} \"$(id -u)\"", self.probe);
                    self.session.send_line(&probe)?;
                }
                Seen::Nothing if quiet % LOOKS_BEFORE_ENTER == 0 => self.keyboard.enter("")?,
                Seen::Refused(_) | Seen::Nothing => {}
            }
        }
    }

    /// Waits a moment for anything that calls for an answer.
    fn look(&mut self) -> Result<Seen> {
        self.deadline.check().map_err(WaitError::from)?;
        let answer = Regex::new(&format!(r"SHAKEDOWN{}-(\d+)\.", self.probe)).context("a fixed pattern")?;
        let Patterns { login, password, shell, refused, noise: _ } = self.patterns;
        let needles = [&answer, refused, password, login, shell];
        let any = needles.iter().map(|&regex| ReadUntil::Regex(regex.clone())).collect();
        let (before, matched) = match self.session.exp_any(any) {
            Ok(found) => found,
            Err(RexpectError::Timeout { .. }) => return Ok(Seen::Nothing),
            Err(RexpectError::EOF { .. }) => return Err(WaitError::Closed.into()),
            Err(error) => return Err(error.into()),
        };
        self.position += (before.chars().count() + matched.chars().count()) as u64;
        if let Some(uid) = answer.captures(&matched).and_then(|c| c[1].parse().ok()) {
            return Ok(Seen::Answer(uid));
        }
        if refused.is_match(&matched) {
            return Ok(Seen::Refused(matched));
        }
        if !self.calm()? {
            return Ok(Seen::Nothing);
        }
        Ok(self.patterns.prompt(&matched).unwrap_or(Seen::Nothing))
    }

    /// True when after a moment nothing but noise has followed what was matched.
    fn calm(&self) -> Result<bool, WaitError> {
        let moment = self.deadline.within(CALM, "calm after a prompt");
        let noise = &self.patterns.noise;
        let more = self.line.feed.wait(&moment, &mut self.position.clone(), |text, _| {
            (!noise.is_match(&String::from_utf8_lossy(text))).then_some(())
        });
        match more {
            Ok(()) => Ok(false),
            Err(WaitError::Stopped(stop)) => self.deadline.check().map(|()| true).map_err(|_| stop.into()),
            Err(closed) => Err(closed),
        }
    }
}

#[cfg(test)]
#[path = "login_tests.rs"]
mod tests;
