//! Runs the command of a phase: output as it comes, limits, and an end that nothing survives.
//!
//! Does not know what the output is for, nor where cancellation comes from.

use super::survivors::{GRACE, Mark};
use crate::fault::Fault;
use crate::process::{self, Child};
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use std::io::{self, PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// How often flags are looked at: what a process does wakes us at once.
const GLANCE: Duration = Duration::from_millis(200);

/// What ends a phase that does not end itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// The time by which it must be done, and the limit in seconds as the user knows it.
    pub(super) global: Option<(Instant, u64)>,
    /// For how many seconds it may be silent.
    pub(super) output: Option<u64>,
}

/// Why a phase was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// The time for the job was up.
    Global(u64),
    /// It was silent for too long.
    Output(u64),
    /// Somebody cancelled the job.
    Cancelled,
    /// The agent must end at once.
    Stopped,
}

impl Cut {
    /// The name of the event.
    pub(super) fn event(self) -> &'static str {
        match self {
            Self::Global(_) => "global_timeout",
            Self::Output(_) => "output_timeout",
            Self::Cancelled | Self::Stopped => "cancelled",
        }
    }

    /// What the user reads.
    pub(super) fn text(self) -> String {
        match self {
            Self::Global(limit) => format!("ERROR: Global timeout reached! ({limit}s)"),
            Self::Output(limit) => format!("ERROR: Output timeout reached! ({limit}s)"),
            Self::Cancelled => "Job cancellation was requested, exiting.".into(),
            Self::Stopped => "ERROR: The agent was stopped.".into(),
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// 0 to 255; a signal counts down from 256, as in the original.
    pub(super) code: u8,
    /// Why it was ended, if it did not end itself.
    pub(super) cut: Option<Cut>,
}

/// The status of a phase that was ended: that of a shell that died of SIGKILL.
const KILLED: u8 = 247;

fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(-status.signal()?)).unwrap_or(1);
    u8::try_from(code.rem_euclid(256)).unwrap_or(1)
}

/// Runs `command`, whose environment carries `mark`, to its end. `output` gets what it prints, and
/// `ask` is asked now and then whether it must end.
///
/// # Errors
/// When it cannot be started or watched.
pub(super) fn run(
    mut command: Command,
    mark: &Mark,
    limits: &Limits,
    mut ask: impl FnMut() -> Option<Cut>,
    mut output: impl FnMut(&[u8]),
) -> Result<Ended> {
    let (reader, writer) = io::pipe().context(Fault::host("cannot make a pipe"))?;
    // Room for bursts, so that a command is not slowed down by what is done with its output.
    let _ = rustix::pipe::fcntl_setpipe_size(&reader, 1 << 20);
    rustix::io::ioctl_fionbio(&reader, true).context(Fault::host("cannot prepare a pipe"))?;
    let errors = writer.try_clone().context(Fault::host("cannot make a pipe"))?;
    command.stdout(writer).stderr(errors);
    let mut child = process::spawn(command)?;
    let mut reader = Some(reader);
    let mut buffer = vec![0; 256 << 10];
    let mut heard = Instant::now();
    let mut ending: Option<(Cut, Instant)> = None;
    loop {
        let woken = wait(reader.as_ref(), &child, next_look(limits, heard, ending.is_some()))?;
        if let (true, Some(pipe)) = (woken, &mut reader) {
            match pipe.read(&mut buffer) {
                Ok(0) => reader = None,
                Ok(size) => {
                    heard = Instant::now();
                    output(&buffer[..size]);
                    // Its end and its limits are looked at below even if it never pauses.
                }
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error).context(Fault::host("cannot read the output")),
            }
        }
        match ending {
            None => {
                if let Some(status) = child.try_wait_alone()? {
                    drain(reader, &mut buffer, &mut output);
                    return Ok(Ended { code: code(status), cut: None });
                }
                let cut = over(limits, heard).or_else(&mut ask);
                if let Some(cut) = cut {
                    child.signal(Signal::TERM);
                    mark.signal(Signal::TERM);
                    let grace = if cut == Cut::Stopped { Duration::ZERO } else { GRACE };
                    ending = Some((cut, Instant::now() + grace));
                }
            }
            Some((cut, kill)) => {
                let gone = child.try_wait_alone()?.is_some() && !mark.is_alive();
                if gone || Instant::now() >= kill {
                    // The group first, then who left it: what is killed cannot fork any more.
                    child.kill();
                    while mark.signal(Signal::KILL) > 0 && Instant::now() < kill + GRACE {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    drain(reader, &mut buffer, &mut output);
                    return Ok(Ended { code: KILLED, cut: Some(cut) });
                }
            }
        }
    }
}

fn over(limits: &Limits, heard: Instant) -> Option<Cut> {
    if let Some((end, limit)) = limits.global
        && Instant::now() >= end
    {
        return Some(Cut::Global(limit));
    }
    limits.output.filter(|limit| heard.elapsed().as_secs() >= *limit).map(Cut::Output)
}

fn next_look(limits: &Limits, heard: Instant, ending: bool) -> Duration {
    if ending {
        return Duration::from_millis(20);
    }
    let now = Instant::now();
    let ends = [
        limits.global.map(|(end, _)| end),
        limits.output.and_then(|limit| heard.checked_add(Duration::from_secs(limit))),
    ];
    ends.into_iter().flatten().map(|end| end.saturating_duration_since(now)).fold(GLANCE, Duration::min)
}

/// True when there may be output to read.
fn wait(reader: Option<&PipeReader>, child: &Child, timeout: Duration) -> Result<bool> {
    // Rounded up: a limit is not asked for before it is there.
    let timeout = timeout + Duration::from_millis(1);
    let timespec = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    let mut fds = vec![PollFd::new(child.pidfd(), PollFlags::IN)];
    fds.extend(reader.map(|reader| PollFd::new(reader, PollFlags::IN)));
    match poll(&mut fds, Some(&timespec)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context(Fault::host("poll failed")),
    }
    Ok(fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
}

/// What is in the pipe when the shell has ended. Who still holds its other end is not waited for.
fn drain(reader: Option<PipeReader>, buffer: &mut [u8], output: &mut impl FnMut(&[u8])) {
    let Some(mut reader) = reader else { return };
    // Not for ever: a process in the background may write faster than is read here.
    let mut most = 4 << 20;
    while let Ok(size @ 1..) = reader.read(buffer) {
        output(&buffer[..size]);
        most -= size.min(most);
        if most == 0 {
            return;
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testflinger::agent::survivors::VARIABLE;

    fn mark(test: &str) -> Mark {
        Mark::Phase(format!("runner-{}-{test}/test", std::process::id()))
    }

    fn shell(script: &str, mark: &Mark) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        if let Mark::Phase(mark) = mark {
            command.env(VARIABLE, mark);
        }
        command
    }

    fn run_to_end(script: &str, test: &str, limits: &Limits) -> (Ended, String) {
        let mark = mark(test);
        let mut text = Vec::new();
        let ended = run(shell(script, &mark), &mark, limits, || None, |bytes| text.extend_from_slice(bytes));
        assert!(
            ended.as_ref().is_ok_and(|ended| ended.cut.is_none()) || !mark.is_alive(),
            "something survived"
        );
        (ended.expect("runs"), String::from_utf8(text).expect("UTF-8"))
    }

    #[test]
    fn codes_are_those_of_the_original() {
        for (script, code) in [("exit 7", 7), ("exit 46", 46), ("kill -9 $$", 247), ("kill -15 $$", 241)] {
            assert_eq!(run_to_end(script, "codes", &Limits::default()).0, Ended { code, cut: None });
        }
    }

    #[test]
    fn all_output_is_read_and_both_streams_are_one() {
        let (_, text) =
            run_to_end("echo a; echo b >&2; seq 100000; printf end", "output", &Limits::default());
        assert!(text.starts_with("a\nb\n1\n2\n") && text.ends_with("\n100000\nend"));
    }

    #[test]
    fn output_comes_while_the_command_runs() {
        let mark = mark("stream");
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("go");
        let script = format!("echo first; until [ -e {} ]; do sleep 0.01; done; echo last", file.display());
        let mut pieces = 0;
        let ended = run(
            shell(&script, &mark),
            &mark,
            &Limits::default(),
            || None,
            |bytes| {
                // It would never end if it were read at its end only.
                if bytes == b"first\n" {
                    std::fs::write(&file, "").expect("writes");
                }
                pieces += 1;
            },
        );
        assert_eq!((ended.expect("runs").code, pieces), (0, 2));
    }

    #[test]
    fn a_phase_that_takes_too_long_is_ended_with_all_it_started() {
        let limits = Limits { global: Some((Instant::now() + Duration::from_millis(300), 15)), output: None };
        let script = "echo start; setsid sleep 1000 & (sleep 1000 & wait)";
        let (ended, text) = run_to_end(script, "global", &limits);
        assert_eq!(ended, Ended { code: 247, cut: Some(Cut::Global(15)) });
        assert_eq!(text, "start\n");
    }

    #[test]
    fn who_does_not_mind_sigterm_is_killed_and_its_last_words_are_heard() {
        let limits = Limits { global: None, output: Some(1) };
        let script = "trap 'echo stopping' TERM; while :; do sleep 0.05 >/dev/null; done";
        let (ended, text) = run_to_end(script, "term", &limits);
        assert_eq!(ended.cut, Some(Cut::Output(1)));
        assert!(text.contains("stopping\n"), "{text:?}");
    }

    #[test]
    fn a_talkative_command_is_not_silent() {
        let limits = Limits { global: None, output: Some(1) };
        let (ended, _) = run_to_end("for i in 1 2 3 4 5 6; do echo $i; sleep 0.3; done", "talk", &limits);
        assert_eq!(ended, Ended { code: 0, cut: None });
    }

    #[test]
    fn a_command_that_never_pauses_is_ended_too() {
        let limits = Limits { global: Some((Instant::now() + Duration::from_millis(100), 1)), output: None };
        assert_eq!(run_to_end("yes", "yes", &limits).0.cut, Some(Cut::Global(1)));
    }

    #[test]
    fn a_process_in_the_background_does_not_hold_the_phase() {
        let mark = mark("background");
        let ended = run(shell("sleep 1000 & echo done", &mark), &mark, &Limits::default(), || None, |_| {});
        assert_eq!(ended.expect("runs").code, 0);
        assert!(mark.is_alive(), "it may serve a later phase");
        mark.end();
    }
}
