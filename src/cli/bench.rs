//! `shakedown bench`: where every claim about speed is measured.

mod agent;
mod fleet;

use super::Verdict;
use super::residue::Residue;
use super::terminal;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::harness::{self, Body, Scenario, Settings};
use shakedown::host;
use shakedown::image::Images;
use shakedown::process;
use shakedown::record::event::Events;
use shakedown::record::metadata::Timings;
use shakedown::record::{Environment, Outcome, Scratch, scratch};
use shakedown::vm::{Boot, Firmware, Medium, Needs, Vm, accel};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Measure what this host gives: medians, the number of runs, the accelerator and the load.
#[derive(clap::Args)]
pub(super) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// From power-on to the end of the first SSH command
    Boot {
        #[command(flatten)]
        options: Options,
    },
    /// From the start of a fork to its first command, beside a cold boot in the same run
    Fork {
        #[command(flatten)]
        options: Options,
    },
    /// 40 scenarios of one command each, by `cargo test` and by `cargo nextest`, in a checkout of
    /// Shakedown
    Suite {
        #[command(flatten)]
        options: Options,
    },
    /// Building the `debian` image from an empty cache, and finding it again
    Image {
        #[command(flatten)]
        options: Options,
    },
    /// All storage layouts, cleaned in all ways and looked at on all levels
    Residue(Residue),
    /// What a Testflinger agent costs: memory, start, a job without work, and 100 MB of output
    Agent {
        #[command(flatten)]
        options: Options,
    },
    Fleet(fleet::Fleet),
    /// Listing 1,000 scenarios, from the start of the process to its end
    List {
        #[command(flatten)]
        options: Options,
        /// Only list, in this process
        #[arg(long, hide = true)]
        only: bool,
    },
}

#[derive(clap::Args)]
struct Options {
    /// How often each figure is measured [default: as many as its noise asks for]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A figure by its name, with all its samples in seconds.
type Samples = Vec<(&'static str, Vec<f64>)>;

impl Bench {
    pub(super) fn run(self) -> Result<Verdict> {
        let load = load_average();
        let (name, options, usual, measure): (_, _, _, fn(u32) -> Result<Samples>) = match self.what {
            What::Boot { options } => ("boot", options, 3, boot),
            What::Fork { options } => ("fork", options, 20, fork),
            What::Suite { options } => ("suite", options, 1, suite),
            What::Image { options } => ("image", options, 1, image),
            What::Residue(residue) => return residue.run(),
            What::Fleet(fleet) => return fleet.run(),
            What::Agent { options } => ("agent", options, 3, agent::measure),
            What::List { only: true, .. } => {
                harness::bench_list(1000, Path::new("/dev/null"))?;
                return Ok(Verdict::Fine);
            }
            What::List { options, .. } => ("list", options, 20, list),
        };
        let runs = options.runs.unwrap_or(usual);
        let samples = measure(runs)?;
        // An agent has no machine of ours.
        let accelerator = match name {
            "agent" => None,
            _ => {
                Some(accel::detect(&Deadline::after(Duration::from_secs(60), "the probe"))?.kind.to_string())
            }
        };
        let mut result = Map::new();
        result.insert("bench".into(), name.into());
        result.insert("schema_version".into(), 1.into());
        for (figure, seconds) in &samples {
            result.insert((*figure).into(), round(median(seconds)).into());
        }
        if let [(_, cold), (_, fork), ..] = &samples[..]
            && name == "fork"
        {
            result.insert("ratio".into(), round(median(cold) / median(fork)).into());
        }
        if name == "suite" {
            result.insert("scenarios".into(), SUITE.into());
        }
        result.insert("runs".into(), runs.into());
        result.insert("samples".into(), samples.iter().map(|(f, s)| ((*f).to_owned(), rounded(s))).collect());
        if let Some(accelerator) = &accelerator {
            result.insert("accelerator".into(), accelerator.clone().into());
        }
        result.insert("load_average".into(), json!(load));
        result.insert("cpus".into(), std::thread::available_parallelism().map_or(1, usize::from).into());
        result.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        if options.json {
            terminal::print_json(&Value::Object(result))?;
        } else {
            for (figure, seconds) in &samples {
                terminal::print(&format!(
                    "{figure:<28} {:>8.3}  (median of {})\n",
                    median(seconds),
                    seconds.len()
                ))?;
            }
            let accelerator = accelerator.map_or_else(String::new, |kind| format!("accelerator {kind}, "));
            terminal::print(&format!("{accelerator}load average {:.2}\n", load[0]))?;
        }
        Ok(Verdict::Fine)
    }
}

const fn boots(name: &'static str, medium: Medium, firmware: Firmware) -> Scenario {
    Scenario {
        name,
        markers: &["vm"],
        machine: Some(Needs { boot: Boot::Cold, medium, firmware, ..Needs::DEFAULT }),
        timeout: None,
        ignore: None,
        file: file!(),
        line: line!(),
        body: Body::Vm(|_| Ok(())),
    }
}

static BOOTS: [Scenario; 3] = [
    boots("iso_bios_to_ssh_seconds", Medium::Cdrom, Firmware::Bios),
    boots("iso_uefi_to_ssh_seconds", Medium::Cdrom, Firmware::Uefi),
    boots("kernel_to_ssh_seconds", Medium::Kernel, Firmware::Bios),
];

fn boot(runs: u32) -> Result<Samples> {
    let stage = Stage::new()?;
    let mut samples: Samples = BOOTS.iter().map(|scenario| (scenario.name, Vec::new())).collect();
    // In turn, so that a disturbance does not hit one figure alone.
    for _ in 0..runs {
        for (scenario, (name, seconds)) in BOOTS.iter().zip(&mut samples) {
            let timings = stage.perform(scenario)?;
            let measured = timings.boot_to_ssh_seconds.context("no SSH, and yet it passed")?;
            terminal::say(&format!("{name}: {measured}"));
            seconds.push(measured);
        }
    }
    Ok(samples)
}

/// Where benchmarks run: not among the project's runs, since medians of scenarios shall not be those
/// of benchmarks.
struct Stage {
    scratch: Scratch,
    environment: Environment,
}

impl Stage {
    fn new() -> Result<Self> {
        let scratch = scratch()?;
        let environment = Environment {
            log_root: scratch.path().join("notes"),
            ledger: None,
            ..Environment::read(&std::env::current_dir()?)?
        };
        Ok(Self { scratch, environment })
    }

    /// Runs a scenario that has to pass; its evidence is kept when it does not.
    fn perform(&self, scenario: &'static Scenario) -> Result<Timings> {
        let run = harness::perform(self.environment.clone(), Settings::default(), scenario, Events::silent());
        if run.outcome == Outcome::Passed {
            return Ok(run.timings);
        }
        // Out of what is removed, and on the same file system.
        let kept = host::cache_dir()?.join(format!("bench-{}", std::process::id()));
        std::fs::rename(self.scratch.path().join("notes"), &kept).context("cannot keep the evidence")?;
        bail!("{}: {}: {}\nEvidence is below {}", scenario.name, run.outcome, run.message, kept.display())
    }
}

/// Space that is gone when this process is: what a killed one left, the next machine or benchmark
/// removes, as it is where machines have theirs.
fn scratch() -> Result<Scratch> {
    let machines = host::cache_dir()?.join("machines");
    scratch::sweep_under(&machines)?;
    Scratch::under(&machines)
}

static FORKS: Scenario = Scenario {
    name: "forks",
    markers: &["vm"],
    machine: Some(Needs::DEFAULT),
    timeout: Some(Duration::from_secs(1800)),
    ignore: None,
    file: file!(),
    line: line!(),
    body: Body::Vm(measure_forks),
};

/// How many forks, and what was measured: a scenario's body takes no arguments and gives no result.
static FORKED: Mutex<(u32, Vec<[f64; 3]>)> = Mutex::new((0, Vec::new()));

fn measure_forks(vm: &mut Vm) -> Result<()> {
    let origin = vm.origin().context("this machine was not forked")?;
    let mut forked = FORKED.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..forked.0 {
        let begun = Instant::now();
        let mut fork = origin.fork()?;
        fork.shell()?.run("true")?;
        let command = begun.elapsed();
        let private = fork.private_memory()?;
        let asked = Instant::now();
        fork.ssh()?.run("true")?;
        let ssh = command + asked.elapsed();
        forked.1.push([command.as_secs_f64(), ssh.as_secs_f64(), private as f64 / f64::from(1 << 20)]);
    }
    Ok(())
}

fn fork(runs: u32) -> Result<Samples> {
    let stage = Stage::new()?;
    FORKED.lock().unwrap_or_else(PoisonError::into_inner).0 = runs;
    let mut cold = Vec::new();
    // A cold boot takes as long as dozens of forks: fewer will do.
    for _ in 0..runs.div_ceil(4) {
        cold.push(stage.perform(&BOOTS[2])?.boot_to_ssh_seconds.context("no SSH, and yet it passed")?);
        terminal::say(&format!("cold: {:.2}", cold.last().copied().unwrap_or_default()));
    }
    stage.perform(&FORKS)?;
    let forked = &FORKED.lock().unwrap_or_else(PoisonError::into_inner).1;
    let column = |index: usize| forked.iter().map(|sample| sample[index]).collect();
    Ok(vec![
        ("cold_first_ssh_seconds", cold),
        ("fork_first_command_seconds", column(0)),
        ("fork_first_ssh_seconds", column(1)),
        ("private_mib", column(2)),
    ])
}

/// The number of scenarios in `benches/suite.rs`.
const SUITE: u32 = 40;

fn suite(runs: u32) -> Result<Samples> {
    if !Path::new("benches/suite.rs").is_file() {
        bail!(Fault::host("there is no benches/suite.rs here").fix("run this in a checkout of Shakedown"));
    }
    let deadline = Deadline::after(Duration::from_secs(6 * 3600), "bench suite");
    let cargo = |args: &[&str]| -> Result<f64> {
        let begun = Instant::now();
        let mut command = Command::new("cargo");
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let status = process::spawn(command)?.wait(&deadline)?;
        if !status.success() {
            bail!("`cargo {}` failed with {}", args.join(" "), process::describe(status));
        }
        Ok(begun.elapsed().as_secs_f64())
    };
    // Compiled, and with the template at hand: what is measured is the running.
    cargo(&["test", "--quiet", "--example", "suite", "--", "--exact", "scenario_00"])?;
    cargo(&["nextest", "run", "--no-run", "--example", "suite"])?;
    let (mut plain, mut nextest) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        plain.push(cargo(&["test", "--quiet", "--example", "suite"])?);
        nextest.push(cargo(&["nextest", "run", "--example", "suite"])?);
    }
    Ok(vec![("seconds", plain), ("nextest_seconds", nextest)])
}

fn image(runs: u32) -> Result<Samples> {
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    let environment = Environment::read(&std::env::current_dir()?)?;
    let deadline = Deadline::after(Duration::from_secs(3600), "bench image");
    for _ in 0..runs {
        let cache = scratch()?;
        let get = || -> Result<f64> {
            let begun = Instant::now();
            let images = Images::new(cache.path().to_owned(), &environment, &None, &BTreeMap::new())?;
            images.get(Some("debian"), None, &deadline, &Events::silent())?;
            Ok(begun.elapsed().as_secs_f64())
        };
        cold.push(get()?);
        terminal::say(&format!("cold: {:.1}", cold.last().copied().unwrap_or_default()));
        for _ in 0..10 {
            warm.push(get()?);
        }
    }
    Ok(vec![("cold_seconds", cold), ("warm_seconds", warm)])
}

fn list(runs: u32) -> Result<Samples> {
    let program = std::env::current_exe().context("cannot tell our own path")?;
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let begun = Instant::now();
        let status =
            Command::new(&program).args(["bench", "list", "--only"]).stdout(Stdio::null()).status()?;
        if !status.success() {
            bail!("listing failed: {status}");
        }
        seconds.push(begun.elapsed().as_secs_f64());
    }
    Ok(vec![("list_1000_seconds", seconds)])
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 10_000.0).round() / 10_000.0
}

fn rounded(seconds: &[f64]) -> Value {
    seconds.iter().map(|s| Value::from(round(*s))).collect()
}

/// The load over 1, 5 and 15 minutes when the measurement began.
pub(super) fn load_average() -> [f64; 3] {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut numbers = text.split_whitespace().map_while(|word| word.parse().ok());
    [(); 3].map(|()| numbers.next().unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
