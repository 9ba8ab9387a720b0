//! `shakedown agent`, and `testflinger-agent`, which is the same under another name.

use super::terminal;
use clap::Parser;
use shakedown::testflinger::agent::config::WrongConfig;
use shakedown::testflinger::agent::{self, End, Options, TERMINATED};
use std::path::{Path, PathBuf};

/// Take jobs from a Testflinger server, and run them on a machine of this lab.
///
/// A drop-in for the agent of Testflinger: it takes the same configuration and also works when it is
/// started through a link named `testflinger-agent`. SIGTERM ends it after its job, a second one at
/// once; SIGUSR1 restarts it after its job. Exit status: 1 to be restarted, 2 for wrong usage or
/// configuration, 70 for any other error, 143 after SIGTERM.
#[derive(clap::Args)]
pub(super) struct Agent {
    /// Configuration file; one agent runs for each
    #[arg(short, long = "config", value_name = "FILE", default_value = "testflinger-agent.conf")]
    config: Vec<PathBuf>,
    /// Port to serve Prometheus metrics on, on all interfaces
    #[arg(short = 'p', long = "metrics_port", alias = "metrics-port", value_name = "PORT")]
    metrics_port: Option<u16>,
    /// File with the refresh token, which others renew
    #[arg(long, value_name = "PATH", default_value = "/var/lib/testflinger-agent/refresh_token")]
    token_file: PathBuf,
}

/// The same, without a subcommand.
#[derive(Parser)]
#[command(name = NAME, version)]
struct Alone {
    #[command(flatten)]
    agent: Agent,
}

const NAME: &str = "testflinger-agent";

/// As a shell program says that something inside went wrong. Not 1: that asks for a restart.
const INTERNAL: u8 = 70;

/// True when the program was started under the agent's name.
pub(super) fn is_meant() -> bool {
    std::env::args_os().next().is_some_and(|program| Path::new(&program).file_name() == Some(NAME.as_ref()))
}

/// The program under the agent's name.
pub(super) fn main() -> u8 {
    Alone::parse().agent.run()
}

impl Agent {
    /// Runs to its end, says why, and gives the exit status.
    pub(super) fn run(self) -> u8 {
        let Self { config, metrics_port, token_file } = self;
        // Port 0 is what is passed where metrics are not wanted.
        let metrics_port = metrics_port.filter(|port| *port != 0);
        match agent::run(&Options { configs: config, metrics_port, token_file }) {
            Ok(End::Terminated) => TERMINATED,
            Ok(End::Restart) => {
                terminal::say("Restart Requested");
                1
            }
            Err(error) => {
                terminal::print_error(&error);
                if error.is::<WrongConfig>() { 2 } else { INTERNAL }
            }
        }
    }
}
