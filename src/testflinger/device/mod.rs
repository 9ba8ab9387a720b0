//! A device connector: makes a QEMU machine the device of a queue.
//!
//! An agent calls it as the command of its phases, in the run directory of the job: `provision` forks
//! a machine of an image, `runtest` runs the job's script beside it, `reserve` keeps it for people,
//! `cleanup` ends it. Does not take jobs; any agent of Testflinger can call it.
//!
//! A machine must outlive the command that made it, so it belongs to a process of its own, the *keeper*.
//! That ends, and the machine with it, when `cleanup` says so, when the next job begins on the same
//! agent, when the run directory of its job is gone, or when the agent ends what its job left running.

pub mod config;
mod door;
mod failure;
mod keeper;
mod machine;
mod provision;
mod request;
mod reserve;
mod serial;
mod ssh_agent;
mod test;

pub use failure::Failure;
pub use keeper::keep;

use crate::fault::Fault;
use crate::host;
use crate::record::files;
use crate::testflinger::wire::{Job, Phase};
use anyhow::{Context, Result, bail};
use config::Config;
use machine::Machine;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// What every call is about.
#[derive(Clone, Debug)]
pub struct Call {
    /// `device.yaml`.
    pub config: PathBuf,
    /// `testflinger.json`: the job, as the agent wrote it.
    pub job: PathBuf,
}

/// Does what a phase of the job asks for, and gives the exit status of the phase. `keeper` is the
/// command line that calls [`keep`] for the same [`Call`].
///
/// # Errors
/// With the exit status, once the error is where agents look for it.
pub fn run(phase: Phase, call: &Call, keeper: Command) -> Result<u8, Failure> {
    let work = || {
        let owner = Owner::of(call)?;
        // Without a look at the job, of which scripts may have removed the file.
        if phase == Phase::Cleanup {
            return owner.cleanup().map(|()| 0);
        }
        let site = owner.site(call)?;
        match phase {
            Phase::Setup | Phase::Cleanup => Ok(0),
            Phase::Provision => provision::provision(&site, keeper).map(|()| 0),
            Phase::FirmwareUpdate => firmware_update(&site),
            Phase::Test => test::test(&site),
            Phase::Allocate => site.machine(phase).map(|_| 0),
            Phase::Reserve => reserve::reserve(&site).map(|()| 0),
        }
    };
    work().map_err(|error| Failure::of(phase, error))
}

/// Whose device it is.
struct Owner {
    config: Config,
    agent: String,
    cache: PathBuf,
}

impl Owner {
    fn of(call: &Call) -> Result<Self> {
        let config = Config::read(&call.config)?;
        Ok(Self { agent: config.agent_name()?, config, cache: host::cache_dir()? })
    }

    fn site(self, call: &Call) -> Result<Site> {
        let job = Job::new(files::read_json(&call.job)?).with_context(|| files::cannot("use", &call.job))?;
        let rundir = std::env::current_dir().context(Fault::host("cannot tell the current directory"))?;
        let Self { config, agent, cache } = self;
        Ok(Site { config, agent, job, rundir, cache })
    }

    fn cleanup(&self) -> Result<()> {
        match Machine::end(&self.cache, &self.agent)? {
            Some(job) => say(format!("The machine of job {job} has ended.")),
            None => say("There is no machine to end."),
        }
        Ok(())
    }
}

/// Where a call happens: the device, the job, and its run directory.
struct Site {
    config: Config,
    agent: String,
    job: Job,
    rundir: PathBuf,
    cache: PathBuf,
}

impl Site {
    /// The machine of this job, which `phase` cannot do without, made known to the agent.
    fn machine(&self, phase: Phase) -> Result<Machine> {
        let machine = self.living(phase)?;
        machine.introduce(&self.agent, &self.rundir)?;
        Ok(machine)
    }

    /// The machine of this job, while it lives.
    fn living(&self, phase: Phase) -> Result<Machine> {
        let machine = Machine::find(&self.cache, &self.agent).filter(|machine| machine.job == self.job.id());
        let Some(machine) = machine else {
            bail!(
                Fault::host(format!("there is no machine for `{phase}`"))
                    .fix("`provision_data` in the job makes one, for example `{distro: debian}`")
            );
        };
        if let Some(why) = machine.ended() {
            bail!(Fault::machine(format!("the machine has ended: {why}")));
        }
        Ok(machine)
    }
}

/// QEMU's firmware is a file of this host.
fn firmware_update(site: &Site) -> Result<u8> {
    let data = site.job.data(Phase::FirmwareUpdate);
    if data.and_then(|data| data.get("ignore_failure")).and_then(serde_json::Value::as_bool) == Some(true) {
        say("The firmware of a QEMU machine cannot be updated; `ignore_failure` is set.");
        return Ok(0);
    }
    bail!(
        Fault::host("the firmware of a QEMU machine cannot be updated: it is a file of this host")
            .fix("leave `firmware_update_data` out of the job, or set `ignore_failure` in it")
    )
}

/// For the log of the job, which may have lost its reader.
fn say(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
}
