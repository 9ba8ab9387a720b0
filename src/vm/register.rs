//! Which machines of this user run now, whoever started them.
//!
//! Each has an entry below the cache directory: `machines/*/machine.json`. An entry counts as long as
//! its QEMU lives, which is told by process id and start time together, so that a number that was
//! given to another process means nothing. Dead entries are swept with the other scratch directories.

use super::machine::Launch;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process::{self, quote};
use crate::record::Scratch;
use crate::record::files::{read_json, write_json};
use crate::record::metadata::{BootKind, Utc};
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FILE: &str = "machine.json";
/// The kernel takes its time to tear down a gigabyte.
const END: Duration = Duration::from_secs(10);

/// A machine, as others see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// QEMU's process id, by which one names the machine.
    pub id: u32,
    /// When that process started, in clock ticks since the host did: proc_pid_stat(5), field 22.
    pub start_ticks: u64,
    /// The process that it belongs to.
    pub owner: u32,
    /// Since when it runs.
    pub since: Utc,
    /// The run that it is part of.
    pub run_id: String,
    /// The scenario, or what else it is for.
    pub scenario: String,
    /// The image's name.
    pub image: String,
    /// How it came to its running state.
    pub boot: BootKind,
    /// The directory of its evidence.
    pub evidence: PathBuf,
    /// The way in by SSH, where the image has one.
    pub ssh: Option<Ssh>,
}

/// A way in by SSH.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ssh {
    /// On 127.0.0.1.
    pub port: u16,
    /// Whose account the key opens.
    pub user: String,
    /// The private key, where it is in a file.
    pub key: Option<PathBuf>,
}

/// An entry, for as long as its machine is ours.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) running: Running,
    _directory: Scratch,
}

impl Entry {
    /// Enters a machine that has just been started.
    pub(super) fn new(launch: &Launch, qemu: u32, ssh_port: Option<u16>) -> Result<Self> {
        let metadata = launch.evidence.metadata();
        let ssh = |port| Ssh {
            port,
            user: launch.image.ssh_user().to_owned(),
            key: launch.key.file().map(Path::to_owned),
        };
        let running = Running {
            id: qemu,
            start_ticks: start_ticks(qemu).unwrap_or_default(),
            owner: std::process::id(),
            since: Utc::now(),
            run_id: metadata.run_id,
            scenario: metadata.scenario,
            image: launch.image.name.clone(),
            boot: metadata.boot,
            evidence: launch.evidence.directory().to_owned(),
            ssh: ssh_port.map(ssh),
        };
        let directory = Scratch::under(&launch.machines)?;
        write_json(&directory.path().join(FILE), &running)?;
        Ok(Self { running, _directory: directory })
    }
}

/// The machines that run, oldest first, by the entries below `cache`.
///
/// # Errors
/// A host [`Fault`] when the entries cannot be read.
pub fn list(cache: &Path) -> Result<Vec<Running>> {
    let directory = cache.join("machines");
    let entries = match directory.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| Fault::host(format!("cannot read {}", directory.display())))?,
    };
    // An entry may vanish while we look.
    let read = |entry: std::io::Result<std::fs::DirEntry>| read_json(&entry.ok()?.path().join(FILE)).ok();
    let mut list: Vec<Running> = entries.filter_map(read).filter(Running::lives).collect();
    list.sort_by_key(|running| (running.since, running.id));
    Ok(list)
}

impl Running {
    /// Whether it still runs.
    fn lives(&self) -> bool {
        start_ticks(self.id) == Some(self.start_ticks)
    }

    /// Ends it, whoever it belongs to; that one sees its machine die. False when it had ended.
    ///
    /// # Errors
    /// A host [`Fault`] when the system refuses, and when it does not end.
    pub fn kill(&self) -> Result<bool> {
        let cannot = || Fault::host(format!("cannot end machine {}", self.id));
        let Some(pid) = i32::try_from(self.id).ok().and_then(Pid::from_raw) else { return Ok(false) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(false),
            process => process.with_context(cannot)?,
        };
        // Looked at only now: the descriptor stays with the process, the number may not.
        if !self.lives() {
            return Ok(false);
        }
        match pidfd_send_signal(&process, Signal::KILL) {
            Err(Errno::SRCH) => return Ok(false),
            sent => sent.with_context(cannot)?,
        }
        let deadline = Deadline::after(END, "the end of a killed process");
        while !process::wait_readable(&process, deadline.slice(Duration::from_millis(200)))? {
            deadline.check().with_context(cannot)?;
        }
        Ok(true)
    }

    /// A command line that leads into it, for a person with an SSH client. The host key is new with
    /// every machine, so it is not looked at; the connection does not leave this host.
    pub fn ssh_command(&self) -> Option<String> {
        let Ssh { port, user, key } = self.ssh.as_ref()?;
        let key = key.as_ref()?.to_string_lossy();
        Some(format!(
            "ssh -i {} -p {port} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR {user}@127.0.0.1",
            quote(&key)
        ))
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
    use std::process::Command;

    /// A process in the place of a QEMU, and its entry below `cache`.
    fn machine(cache: &Path) -> (process::Child, Running) {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let child = process::spawn(sleep).expect("starts");
        let running = Running {
            id: child.id(),
            start_ticks: start_ticks(child.id()).expect("runs"),
            owner: std::process::id(),
            since: Utc::now(),
            run_id: "run".into(),
            scenario: "a::b".into(),
            image: "debian".into(),
            boot: BootKind::Fork,
            evidence: "/notes/run/a--b".into(),
            ssh: Some(Ssh { port: 40022, user: "root".into(), key: Some("/k y/id".into()) }),
        };
        enter(cache, &running);
        (child, running)
    }

    fn enter(cache: &Path, running: &Running) {
        let directory = cache.join("machines").join(format!("{}-{}", running.id, running.start_ticks));
        std::fs::create_dir_all(&directory).expect("makes");
        write_json(&directory.join(FILE), running).expect("writes");
    }

    #[test]
    fn what_lives_is_listed_and_can_be_killed_once() {
        let cache = tempfile::tempdir().expect("temp dir");
        assert_eq!(list(cache.path()).expect("no directory yet"), []);
        let (mut child, running) = machine(cache.path());
        std::fs::create_dir(cache.path().join("machines/without-entry")).expect("makes");
        assert_eq!(list(cache.path()).expect("reads"), std::slice::from_ref(&running));
        assert!(running.kill().expect("is ours"));
        assert_eq!(list(cache.path()).expect("reads"), [], "a process that only waits to be reaped");
        child.kill();
        assert!(!running.kill().expect("nothing to do"));
    }

    #[test]
    fn a_number_that_was_given_to_another_process_is_not_killed() {
        let cache = tempfile::tempdir().expect("temp dir");
        let (mut child, running) = machine(cache.path());
        let stale = Running { start_ticks: running.start_ticks - 1, ..running.clone() };
        enter(cache.path(), &stale);
        assert_eq!(list(cache.path()).expect("reads"), [running]);
        assert!(!stale.kill().expect("is not that one"));
        assert!(child.try_wait().expect("asks").is_none(), "it still runs");
    }

    #[test]
    fn the_way_in_is_a_command_line_for_a_shell() {
        let cache = tempfile::tempdir().expect("temp dir");
        let (_child, running) = machine(cache.path());
        let line = running.ssh_command().expect("has SSH");
        assert!(
            line.starts_with("ssh -i '/k y/id' -p 40022 ") && line.ends_with(" root@127.0.0.1"),
            "{line}"
        );
    }
}
