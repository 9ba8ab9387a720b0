//! One QEMU process: started, watched, ended.
//!
//! Owns the process, its standard error and its three sockets. What is said over the sockets is
//! the business of `qmp`, `console` and the guest agent.

use super::spec::{AGENT_FD, MachineSpec, QMP_FD, SERIAL_FD};
use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::process::{self, Child};
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A running QEMU. Dropping it kills it.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    stderr: PathBuf,
    events: Events,
    reported: bool,
}

/// Our ends of the sockets that QEMU was started with.
#[derive(Debug)]
pub struct Channels {
    /// The serial console, `ttyS0`.
    pub console: UnixStream,
    /// QEMU's control protocol.
    pub qmp: UnixStream,
    /// The virtio-serial port of the guest agent.
    pub agent: UnixStream,
}

impl Qemu {
    /// Starts QEMU; its standard error goes to `stderr`, apart from the console.
    ///
    /// The command line is announced before the act, so that a death leaves it behind.
    ///
    /// # Errors
    /// A host [`Fault`] when the program cannot be started.
    pub fn start(spec: &MachineSpec, stderr: &Path, events: &Events) -> Result<(Self, Channels)> {
        let argv = spec.argv();
        let words = argv.iter().map(|w| w.to_string_lossy().into_owned()).collect();
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        let log = File::create(stderr)
            .with_context(|| Fault::host(format!("cannot write {}", stderr.display())))?;
        command.stderr(log);
        let pair = || UnixStream::pair().context(Fault::host("cannot make a socket pair"));
        let ((console, fd10), (qmp, fd11), (agent, fd12)) = (pair()?, pair()?, pair()?);
        command
            .fd_mappings(vec![
                FdMapping { parent_fd: fd10.into(), child_fd: SERIAL_FD },
                FdMapping { parent_fd: fd11.into(), child_fd: QMP_FD },
                FdMapping { parent_fd: fd12.into(), child_fd: AGENT_FD },
            ])
            .context(Fault::host("cannot hand sockets to QEMU"))?;
        events.emit(Event::QemuStarting { command: words });
        let child = process::spawn(command)?;
        events.emit(Event::QemuStarted { pid: child.id() });
        let qemu = Self { child, stderr: stderr.to_owned(), events: events.clone(), reported: false };
        Ok((qemu, Channels { console, qmp, agent }))
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        self.report(status);
        status
    }

    /// A watch on the end of this QEMU that waits elsewhere can hold.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn watch(&self) -> Result<Watch> {
        let pidfd = self.child.pidfd().try_clone().context(Fault::host("cannot watch QEMU"))?;
        Ok(Watch { pidfd, pid: self.child.id() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest has nothing to do: QEMU uses next to no processor time. At the end of
    /// the deadline it is as it is.
    ///
    /// # Errors
    /// [`Stop::Interrupted`] in the chain, and when QEMU ends.
    pub fn wait_idle(&mut self, deadline: &Deadline) -> Result<()> {
        const SLICE: Duration = Duration::from_millis(250);
        /// Of one processor. Timer ticks alone make three per cent under emulation.
        const IDLE: f64 = 0.12;
        let mut quiet = 0;
        let mut used = self.processor_seconds()?;
        while quiet < 2 {
            match deadline.check() {
                Err(Stop::Expired { .. }) => return Ok(()),
                other => other?,
            }
            let begun = Instant::now();
            if process::wait_readable(self.child.pidfd(), SLICE)? {
                return Err(Fault::host(self.obituary()).into());
            }
            let now = self.processor_seconds()?;
            let share = (now - used) / begun.elapsed().as_secs_f64();
            quiet = if share < IDLE { quiet + 1 } else { 0 };
            used = now;
        }
        Ok(())
    }

    /// What QEMU has used so far: proc_pid_stat(5), fields 14 and 15, in ticks of a hundredth.
    fn processor_seconds(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.id());
        let text =
            std::fs::read_to_string(&path).with_context(|| Fault::host(format!("cannot read {path}")))?;
        let after_name = text.rsplit(')').next().unwrap_or_default();
        let ticks: u64 =
            after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// `Stop` in the chain when the time is up.
    pub fn wait(&mut self, deadline: &Deadline) -> Result<ExitStatus> {
        let status = self.child.wait(deadline)?;
        self.report(Some(status));
        Ok(status)
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        let status = self.child.kill();
        self.report(status);
    }

    /// Why it is no longer there: its exit and the last lines of its standard error.
    pub fn obituary(&mut self) -> String {
        let end = self.ended().map_or_else(|| "still runs".to_owned(), process::describe);
        let stderr = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        let lines: Vec<_> = stderr.trim_end().lines().collect();
        match &lines[lines.len().saturating_sub(5)..] {
            [] => format!("QEMU ended with {end}"),
            last => format!("QEMU ended with {end}:\n  {}", last.join("\n  ")),
        }
    }

    fn report(&mut self, status: Option<ExitStatus>) {
        if let Some(status) = status
            && !self.reported
        {
            self.reported = true;
            self.events.emit(Event::QemuExited { status: process::describe(status) });
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Tells whether a QEMU still runs, and can end it, without owning it.
#[derive(Debug)]
pub struct Watch {
    pidfd: std::os::fd::OwnedFd,
    pid: u32,
}

impl Watch {
    /// Why waiting for the machine is pointless, or `None` while it runs.
    pub fn gone(&self) -> Option<String> {
        process::wait_readable(&self.pidfd, Duration::ZERO)
            .unwrap_or(true)
            .then(|| format!("QEMU (process {}) has ended", self.pid))
    }

    /// Waits until it has ended or `timeout` has passed; false in the latter case.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn wait(&self, timeout: Duration) -> Result<bool> {
        process::wait_readable(&self.pidfd, timeout)
    }

    /// Ends it. Through the descriptor, so that never another process is hit.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }
}
