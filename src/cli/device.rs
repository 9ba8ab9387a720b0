//! `shakedown device`: what an agent calls in each phase of a job.

use super::terminal;
use anyhow::{Context, Result};
use clap::ValueEnum;
use shakedown::testflinger::device::{self, Call, Failure};
use shakedown::testflinger::wire::Phase;
use std::path::PathBuf;
use std::process::Command;

/// Make a machine of this host the device of a Testflinger queue: an agent's phase commands.
///
/// `provision` forks a machine for the job, `runtest` runs the job's `test_cmds` on this host, with the
/// way into the machine in DEVICE_IP, DEVICE_PORT, DEVICE_USER and DEVICE_SSH_CONFIG, `reserve` keeps the
/// machine for people, `cleanup` ends it. Called in the run directory of the job.
#[derive(clap::Args)]
#[command(after_help = MORE)]
pub(super) struct Device {
    /// What is to be done
    stage: Stage,
    /// Configuration of the device
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// The job, as the agent wrote it
    #[arg(value_name = "JOB", default_value = "testflinger.json")]
    job: PathBuf,
}

const MORE: &str = "\
In testflinger-agent.conf:
  provision_command: shakedown device provision -c /etc/shakedown/device.yaml testflinger.json
  test_command: shakedown device runtest -c /etc/shakedown/device.yaml testflinger.json
  cleanup_command: shakedown device cleanup -c /etc/shakedown/device.yaml testflinger.json

Exit status:
  0   done; of `runtest` that of the script
  1   the job asks for what cannot be, or its machine failed
  2   wrong usage
  46  no job can be served: the agent goes offline";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Stage {
    Provision,
    FirmwareUpdate,
    Runtest,
    Allocate,
    Reserve,
    Cleanup,
    /// What `provision` starts
    #[value(hide = true)]
    Keep,
}

impl Device {
    /// Gives the exit status. By then an error is shown, and is where the agent looks for it.
    pub(super) fn run(self) -> u8 {
        let call = Call { config: self.config, job: self.job };
        let result = match self.stage.phase() {
            Some(phase) => keeper(&call)
                .map_err(|error| Failure { code: 1, error })
                .and_then(|keeper| device::run(phase, &call, keeper)),
            None => device::keep(&call).map(|()| 0).map_err(|error| Failure { code: 1, error }),
        };
        result.unwrap_or_else(|Failure { code, error }| {
            terminal::print_error(&error);
            code
        })
    }
}

impl Stage {
    fn phase(self) -> Option<Phase> {
        Some(match self {
            Self::Provision => Phase::Provision,
            Self::FirmwareUpdate => Phase::FirmwareUpdate,
            Self::Runtest => Phase::Test,
            Self::Allocate => Phase::Allocate,
            Self::Reserve => Phase::Reserve,
            Self::Cleanup => Phase::Cleanup,
            Self::Keep => return None,
        })
    }
}

/// The process that a machine belongs to.
fn keeper(call: &Call) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.args(["device", "keep", "-c"]).arg(&call.config).arg(&call.job);
    Ok(command)
}
