//! The command line: which subcommands there are, how errors are shown, what the exit status means.
//!
//! Each subcommand is a thin file here over the library. Standard output carries the answer and
//! nothing else; progress, questions and errors go to standard error.

mod agent;
mod bench;
mod binaries;
mod demo;
mod device;
mod doctor;
mod fleet;
mod image;
mod jobs;
mod ledger;
mod plan;
mod progress;
mod project;
mod raw;
mod residue;
mod table;
mod template;
mod terminal;
mod upkeep;
mod value;
mod vm;

use clap::{Parser, Subcommand};
use shakedown::deadline::Stop;
use shakedown::harness::WrongSettings;
use shakedown::record::environment;
use shakedown::testflinger::jobs::WrongInput;
use shakedown::{host, process};
use std::io;
use std::process::ExitCode;

/// Tests machines the way `cargo test` tests code: boot an image, drive it, record what happened.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES, after_long_help = more(), max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Demo),
    Doctor(doctor::Doctor),
    Image(image::Image),
    Template(template::Template),
    Vm(vm::Vm),
    Plan(plan::Plan),
    Ledger(ledger::Ledger),
    Agent(agent::Agent),
    Device(device::Device),
    Fleet(fleet::Fleet),
    Jobs(jobs::Jobs),
    Bench(bench::Bench),
}

const EXAMPLES: &str = "\
Examples:
  shakedown demo                The main job, from a bare host to a scenario that ran
  shakedown doctor --install    What this host has and lacks, and installing that
  shakedown vm run -- uname -a  A command on a machine made for it
  shakedown vm shell            A machine to work in by hand

`shakedown --help` lists the environment variables and exit statuses.";

/// What `--help` has and `-h` has not.
fn more() -> String {
    format!(
        "{EXAMPLES_OF_ALL}\n\nEnvironment variables:\n{}  NO_COLOR\n      anything: no colours\n\n{EXIT_STATUS}",
        environment::help()
    )
}

const EXAMPLES_OF_ALL: &str = "\
Examples:
  shakedown demo                The main job, from a bare host to a scenario that ran
  shakedown doctor --install    What this host has and lacks, and installing that
  shakedown vm run -- uname -a  A command on a machine made for it
  shakedown vm shell            A machine to work in by hand
  shakedown vm debug NAME       A scenario of this project, stopped at its failure
  shakedown vm list             The machines that run
  shakedown plan list           The storage layouts to judge cleanups by
  shakedown image list          The boot images in the store
  shakedown template prune      Removes frozen machines that were not used for long
  shakedown ledger check        Whether every line of the ledger is valid
  shakedown fleet run --queue Q  The scenarios of this project, on many hosts
  shakedown jobs                A Testflinger job on each machine of a list
  shakedown bench boot --json   How fast machines boot here";

const EXIT_STATUS: &str = "\
Exit status:
  0    all is well
  1    what was asked about is not, or an error
  2    wrong usage, or a setting that makes no sense
  130  interrupted
`vm run` exits as its command does, and with 125 for an error of ours.";

/// What a subcommand found.
enum Verdict {
    Fine,
    NotFine,
    /// The exit status of somebody else.
    Status(u8),
}

/// Reads the command line, does it, and says how it went.
pub(crate) fn main() -> ExitCode {
    // The name under which supervisors of Testflinger start an agent.
    if agent::is_meant() {
        return ExitCode::from(agent::main());
    }
    let Cli { command } = Cli::parse();
    let otherwise = match &command {
        Command::Vm(vm) => vm.error_status(),
        _ => 1,
    };
    // Here, because many subcommands read no setting, and a typo in one must not go unheard.
    let ready = environment::check_names().map_err(Into::into).and_then(|()| match &command {
        // These have their own ways to end.
        Command::Agent(_) | Command::Device(_) => Ok(()),
        _ => process::handle_signals(),
    });
    let result = ready.and_then(|()| match command {
        Command::Demo(demo) => demo.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Image(image) => image.run(),
        Command::Template(template) => template.run(),
        Command::Vm(vm) => vm.run(),
        Command::Plan(plan) => plan.run(),
        Command::Ledger(ledger) => ledger.run(),
        Command::Fleet(fleet) => fleet.run(),
        Command::Jobs(jobs) => jobs.run(),
        Command::Bench(bench) => bench.run(),
        Command::Agent(agent) => Ok(Verdict::Status(agent.run())),
        Command::Device(device) => Ok(Verdict::Status(device.run())),
    });
    match result {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::NotFine) => ExitCode::from(1),
        Ok(Verdict::Status(status)) => ExitCode::from(status),
        Err(error) => {
            let status = status_of(&error, otherwise);
            match status {
                BROKEN_PIPE => {}
                // What broke because of it is no news.
                INTERRUPTED => terminal::say("interrupted"),
                _ => terminal::print_error(&error),
            }
            ExitCode::from(status)
        }
    }
}

/// 128 + SIGINT, as a shell reports a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;
/// As a shell reports a program that SIGPIPE ended: whoever read our output has gone, as in
/// `shakedown doctor | head -1`.
const BROKEN_PIPE: u8 = 141;

/// `otherwise`: of what has no status of its own.
fn status_of(error: &anyhow::Error, otherwise: u8) -> u8 {
    let broken_pipe = |e: &(dyn std::error::Error + 'static)| {
        e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    };
    if process::interrupted() || error.chain().any(|e| e.downcast_ref() == Some(&Stop::Interrupted)) {
        INTERRUPTED
    } else if error.chain().any(broken_pipe) {
        BROKEN_PIPE
    } else if error.is::<WrongSettings>()
        || error.is::<WrongInput>()
        || error.chain().any(|e| e.is::<host::setting::Invalid>())
    {
        2
    } else {
        otherwise
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, Result};
    use clap::CommandFactory;
    use shakedown::fault::Fault;
    use shakedown::harness::Settings;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exit_statuses_tell_usage_from_faults() {
        let invalid = host::setting::Invalid::Value { name: "X", value: "y".into(), wants: "z".into() };
        let status = |error: Result<()>| status_of(&error.expect_err("an error"), 1);
        assert_eq!(status(Err(invalid).context(Fault::host("reading settings"))), 2);
        assert_eq!(status(Settings::parse("[package").map(drop).context("reading")), 2);
        assert_eq!(status(Err(Fault::host("no tool").into())), 1);
        assert_eq!(status(Err(Stop::Interrupted).context("waiting")), INTERRUPTED);
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert_eq!(status(Err(pipe).context("printing")), BROKEN_PIPE);
    }
}
