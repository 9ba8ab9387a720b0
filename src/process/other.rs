//! Processes that are not our children: found again by number and start time, and ended.

use super::wait_readable;
use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// The kernel takes its time to tear down a gigabyte.
const END: Duration = Duration::from_secs(10);

/// A process of anybody's. Number and start time together: a number that was given to another
/// process means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// Its number.
    pub id: u32,
    /// When it started, in clock ticks since the host did: proc_pid_stat(5), field 22.
    pub start_ticks: u64,
}

impl Other {
    /// The process that has this number now, if one runs.
    pub fn with_id(id: u32) -> Option<Self> {
        Some(Self { id, start_ticks: start_ticks(id)? })
    }

    /// Whether it still runs. One that only waits to be reaped does not.
    pub fn lives(&self) -> bool {
        start_ticks(self.id) == Some(self.start_ticks)
    }

    /// Ends it by SIGKILL, and waits for that. False when it had ended.
    ///
    /// # Errors
    /// A host [`Fault`] when the system refuses, and when it does not end.
    pub fn kill(&self) -> Result<bool> {
        self.end(Duration::ZERO)
    }

    /// Asks it to end by SIGTERM, and ends it by SIGKILL when it has not after `patience`. False when it
    /// had ended.
    ///
    /// # Errors
    /// As [`Self::kill`].
    pub fn end(&self, patience: Duration) -> Result<bool> {
        let cannot = || Fault::host(format!("cannot end process {}", self.id));
        let Some(process) = self.hold().with_context(cannot)? else { return Ok(false) };
        if !patience.is_zero() {
            send(&process, Signal::TERM).with_context(cannot)?;
            if wait_readable(&process, patience)? {
                return Ok(true);
            }
        }
        send(&process, Signal::KILL).with_context(cannot)?;
        let deadline = Deadline::after(END, "the end of a killed process");
        while !wait_readable(&process, deadline.slice(Duration::from_millis(200)))? {
            deadline.check().with_context(cannot)?;
        }
        Ok(true)
    }

    /// A descriptor that stays with it, unless it has ended.
    fn hold(&self) -> Result<Option<OwnedFd>, Errno> {
        let Some(pid) = i32::try_from(self.id).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Looked at only now: the descriptor stays with the process, the number may not.
            Ok(process) => Ok(self.lives().then_some(process)),
            Err(Errno::SRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn send(process: &OwnedFd, signal: Signal) -> Result<(), Errno> {
    match pidfd_send_signal(process, signal) {
        Err(Errno::SRCH) => Ok(()),
        sent => sent,
    }
}

/// When a process started; `None` when there is none, or only its exit status.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything; field 3 is the first after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let ticks = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(ticks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::spawn;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    /// A shell that runs `script` and has said so.
    fn shell(script: &str) -> crate::process::Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("{script}; echo; while :; do sleep 0.01; done")]);
        command.stdout(Stdio::piped());
        let mut child = spawn(command).expect("starts");
        let (_, stdout, _) = child.pipes();
        BufReader::new(stdout.expect("piped")).read_line(&mut String::new()).expect("reads");
        child
    }

    #[test]
    fn it_is_asked_first_and_then_killed() {
        let child = shell("trap 'exit 3' TERM");
        let other = Other::with_id(child.id()).expect("runs");
        assert!(other.lives() && other.end(Duration::from_secs(20)).expect("ends"));
        assert!(!other.lives(), "what only waits to be reaped has ended");
        assert!(!other.end(Duration::from_secs(20)).expect("nothing to do"));
        let child = shell("trap '' TERM");
        let other = Other::with_id(child.id()).expect("runs");
        assert!(other.end(Duration::from_millis(50)).expect("ends") && !other.lives());
    }

    #[test]
    fn a_number_that_was_given_to_another_process_means_nothing() {
        let mut child = shell(":");
        let other = Other::with_id(child.id()).expect("runs");
        let stale = Other { start_ticks: other.start_ticks - 1, ..other };
        assert!(!stale.lives() && !stale.kill().expect("is not that one"));
        assert!(child.try_wait().expect("asks").is_none(), "it still runs");
        assert_eq!(Other::with_id(u32::MAX), None);
    }
}
