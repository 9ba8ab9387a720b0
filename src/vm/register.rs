//! Which machines of this user run now, whoever started them.
//!
//! Each has an entry below the cache directory: `machines/*/machine.json`. An entry counts as long as
//! its QEMU lives, which is told by process id and start time together, so that a number that was
//! given to another process means nothing. Dead entries are swept with the other scratch directories.

use super::machine::Launch;
use crate::fault::Fault;
use crate::process::{Other, quote};
use crate::record::Scratch;
use crate::record::files::{read_json, write_json};
use crate::record::metadata::{BootKind, Utc};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
const FILE: &str = "machine.json";

/// A machine, as others see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// QEMU; by its id one names the machine.
    #[serde(flatten)]
    pub process: Other,
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
            process: Other::with_id(qemu).unwrap_or(Other { id: qemu, start_ticks: 0 }),
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
    let mut list: Vec<Running> =
        entries.filter_map(read).filter(|running: &Running| running.process.lives()).collect();
    list.sort_by_key(|running| (running.since, running.id()));
    Ok(list)
}

impl Running {
    /// The number by which one names it.
    pub fn id(&self) -> u32 {
        self.process.id
    }

    /// Ends it, whoever it belongs to; that one sees its machine die. False when it had ended.
    ///
    /// # Errors
    /// A host [`Fault`] when the system refuses, and when it does not end.
    pub fn kill(&self) -> Result<bool> {
        self.process.kill().with_context(|| Fault::host(format!("cannot end machine {}", self.id())))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use std::process::Command;

    /// A process in the place of a QEMU, and its entry below `cache`.
    fn machine(cache: &Path) -> (process::Child, Running) {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let child = process::spawn(sleep).expect("starts");
        let running = Running {
            process: Other::with_id(child.id()).expect("runs"),
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
        let directory =
            cache.join("machines").join(format!("{}-{}", running.id(), running.process.start_ticks));
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
        let process = Other { start_ticks: running.process.start_ticks - 1, ..running.process };
        let stale = Running { process, ..running.clone() };
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
