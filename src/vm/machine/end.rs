//! The end of a machine: whose fault it was, what it leaves behind.

use super::{AGENT, LAST_MOMENTS, Vm};
use crate::connection::{Cmd, Connection, ConnectionError, Output, Witness};
use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::process;
use crate::vm::diagnose;
use crate::vm::spec::DriveFormat;
use anyhow::{Context, Result};
use qapi::qmp;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long QEMU may take to write its disks and end.
const POWER_OFF: Duration = Duration::from_secs(30);

/// An end that nobody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// The guest powered it off.
    PoweredOff,
    /// The guest restarted it, of its own will or in a panic, where that was not foreseen.
    Restarted,
    /// QEMU crashed or was killed, or could not write to the machine's disks: how, and its last words.
    Broke(String),
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PoweredOff => "the machine powered itself off",
            Self::Restarted => "the machine restarted by itself (a panic? `reboots` allows it)",
            Self::Broke(obituary) => obituary,
        })
    }
}

impl Vm {
    /// Files the evidence that every run has, and more when it did not pass; then ends the machine.
    pub fn finish(mut self, passed: bool) {
        if let (Some(template), Ok(private)) = (&self.template, self.private_memory()) {
            template.learn(private);
        }
        self.collect(passed);
    }

    /// Takes the power away. What the guest has not written by then is lost.
    ///
    /// # Errors
    /// A host [`Fault`] when QEMU does not end; it is killed then.
    pub fn cut_power(&mut self) -> Result<()> {
        let deadline = self.deadline.within(POWER_OFF, "QEMU's end");
        self.powered_off = true;
        let asked = self.qmp.execute(&qmp::quit {}, &deadline).context(Fault::host("QEMU does not quit"));
        let ended = asked.and_then(|_| self.qemu.wait(&deadline).context(Fault::host("QEMU does not end")));
        if ended.is_err() {
            self.qemu.kill();
        }
        ended.map(drop)
    }

    /// Shows `look` the raw content of the machine's disk `number`, counted as its [`Needs`](crate::vm::Needs) do. Of a
    /// machine that is off.
    ///
    /// # Errors
    /// A host [`Fault`] when there is no such disk or it cannot be read, and those of `look`.
    pub fn raw_disk<T>(&self, number: usize, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let serial = format!("disk{number}");
        let drive = self.spec.drives.iter().find(|drive| drive.serial == serial);
        let drive = drive.with_context(|| Fault::host(format!("the machine has no disk {number}")))?;
        if drive.format == DriveFormat::Raw {
            return look(&drive.file);
        }
        let raw = drive.file.with_extension("flat");
        let mut command = Command::new(&self.launch.host.qemu_img);
        command.args(["convert", "-O", "raw", "-f", drive.format.as_str()]).args([&drive.file, &raw]);
        process::output(command, &self.deadline)
            .with_context(|| Fault::host(format!("cannot read {}", drive.file.display())))?;
        let seen = look(&raw);
        // It would go with the machine; a big one is not kept so long.
        let _ = std::fs::remove_file(raw);
        seen
    }

    /// Collects what the machine can still say, once.
    pub(super) fn collect(&mut self, passed: bool) {
        if !std::mem::replace(&mut self.collected, true) {
            diagnose::collect(self, passed);
        }
    }

    /// Turns the end of a wait into an error that says whose fault it is and what was last seen.
    pub(super) fn explain(&mut self, error: impl Into<anyhow::Error>, what: &str) -> anyhow::Error {
        let error = error.into();
        if error.chain().any(|e| matches!(e.downcast_ref(), Some(Stop::Interrupted))) {
            return error;
        }
        self.trouble.store(true, Ordering::SeqCst);
        let error = error.context(Fault::machine(format!("{what}; {}", self.console.last_words())));
        self.add_obituary(error)
    }

    /// A QEMU that was killed or crashed is the host's fault whatever the wait on it says; one that
    /// ended well was powered off by its guest.
    pub(super) fn add_obituary(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self.death(LAST_MOMENTS) {
            Some(broke @ Death::Broke(_)) => error.context(Fault::host(broke.to_string())),
            Some(guest) => error.context(Fault::machine(guest.to_string())),
            None => error,
        }
    }

    /// How it died; `None` while it lives, and when it was asked to power off. Waits for `patience`,
    /// since a connection breaks some moments before the end of QEMU can be seen.
    pub(crate) fn death(&mut self, patience: Duration) -> Option<Death> {
        let patience = Deadline::after(patience, "QEMU's last moments");
        let Ok(status) = self.qemu.wait(&patience) else { return self.disk_full() };
        match status.success() {
            true if self.powered_off => None,
            true if self.qmp.restarted() => Some(Death::Restarted),
            true => Some(Death::PoweredOff),
            false => Some(Death::Broke(self.qemu.obituary())),
        }
    }

    /// A machine that lives, and whose disks this host could not keep up with.
    fn disk_full(&mut self) -> Option<Death> {
        let deadline = Deadline::after(LAST_MOMENTS, "asking QEMU for disk errors");
        let error = self.qmp.disk_error(&deadline).ok()??.to_owned();
        let place = self.workspace.path().display();
        Some(Death::Broke(format!(
            "QEMU had an error with a file in {place}, which the guest saw as a broken disk: {error}"
        )))
    }

    /// The channel for questions about the machine's state: SSH where it is there, else the agent,
    /// else the console.
    pub(in crate::vm) fn ask(
        &mut self,
        cmd: Cmd<'_>,
        deadline: &Deadline,
    ) -> Option<std::result::Result<Output, ConnectionError>> {
        if let Some(ssh) = &mut self.ssh {
            return Some(ssh.run(cmd, deadline));
        }
        // Where nobody can log in there is hardly an agent, and it had the whole scenario to start.
        let patience = if self.launch.image.login.is_some() { AGENT } else { Duration::from_secs(1) };
        if let Some(agent) = self.agent(&deadline.within(patience, "the guest agent's first answer")) {
            return Some(agent.run(cmd, deadline));
        }
        if self.shell.is_none()
            && let Some(profile) = &self.launch.image.login
        {
            self.shell = self.console.login(profile, deadline).ok();
        }
        self.shell.as_mut().map(|shell| shell.run(cmd, deadline))
    }

    pub(in crate::vm) fn collect_host_side(&mut self, deadline: &Deadline) {
        if self.qemu.ended().is_some() {
            let obituary = self.qemu.obituary();
            self.note(obituary);
        } else if let Err(error) = self.take_screenshot("screenshot", deadline) {
            self.note(format!("no screenshot: {error:#}"));
        }
    }

    pub(crate) fn file(&self, label: &str, extension: &str, content: &[u8]) {
        let path = self.launch.evidence.diagnostic(label, extension);
        if let Err(error) = std::fs::write(&path, content) {
            self.note(format!("cannot write {}: {error}", path.display()));
        }
    }

    pub(in crate::vm) fn note(&self, text: impl Into<String>) {
        self.launch.evidence.events().note(text);
    }
}

/// A machine that its scenario made itself ends before the verdict is known: it leaves its evidence
/// if anything went wrong with it, and how it died if it did.
impl Drop for Vm {
    fn drop(&mut self) {
        if self.collected || !(self.trouble.load(Ordering::SeqCst) || std::thread::panicking()) {
            return;
        }
        if let Some(death) = self.death(LAST_MOMENTS) {
            self.launch.herd.died(death);
        }
        self.collect(false);
    }
}
