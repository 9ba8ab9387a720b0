//! The harness: finds the scenarios, selects them, runs them and says how it went.
//!
//! Owns the registry, markers, settings, the command line, deadlines and outcomes, and how many
//! machines run at once. Printing and filtering by name are libtest-mimic's. Does not know how a
//! machine is made or how evidence is written; `stage` is where it asks for both.
//!
//! # What runs
//!
//! `-m EXPRESSION` or `SHAKEDOWN_MARKERS` selects by marker, before names are filtered. Scenarios
//! that are not selected are not there: not listed, not run, not on record, as with a name filter.
//!
//! A scenario is *ignored* for a reason of its own (`ignore = "reason"`) or because of a marker
//! that the settings ignore. `--ignored` and `--include-ignored` run it all the same; so does, in
//! the second case, an expression that names the marker and does not negate it: `-m nightly`. An
//! ignored scenario prints its reason and gets a ledger line. Under `cargo nextest` ignored
//! scenarios are never started, and so leave no line.
//!
//! `SHAKEDOWN_SCENARIOS` names a file with the names of scenarios, one a line: only these exist then,
//! and one that does not is an error. It is how a part of a run is done on another host.
//!
//! A run has a budget of time, `SHAKEDOWN_SESSION_BUDGET`. What does not fit into it, by the medians
//! of the ledger and by the clock, is *deferred*: told, in the ledger, and queued in
//! `deferred.jsonl`, which `--deferred` works off. Under nextest a deferred scenario counts as one
//! that failed, since nextest would call it passed otherwise.
//!
//! # How it ends
//!
//! Exit status 0: all that ran has passed. 101: something `failed` or ended in `error`. 2: wrong
//! settings, markers or command line; nothing ran. 130: Ctrl-C or SIGTERM; what ran and what had
//! not begun is recorded as `interrupted`.

mod budget;
mod command_line;
mod debug;
mod errand;
mod marker;
mod named;
mod panics;
mod progress;
mod scenario;
mod session;
mod settings;
pub mod slots;
mod stage;
mod tally;
mod trial;
mod verdict;

pub use debug::needs_terminal;
pub use errand::Errand;
pub use marker::BUILT_IN as BUILT_IN_MARKERS;
pub use scenario::{Body, IntoResult, SCENARIOS, Scenario, without_crate};
pub use settings::{Settings, WrongSettings};

use crate::fault::Fault;
use crate::process;
use crate::record::deferred::Queue;
use crate::record::event::Events;
use crate::record::metadata::Timings;
use crate::record::{Environment, Outcome};
use anyhow::{Context, Result, bail};
use command_line::CommandLine;
use debug::Debugger;
use libtest_mimic::{Arguments, Completion, Trial};
use marker::Selection;
use session::{Owed, Session};
use stage::Run;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tally::Tally;
use verdict::Verdict;

/// See [`Project::root`].
const PROJECT_VARIABLE: &str = "SHAKEDOWN_PROJECT";

/// The package whose scenarios these are. [`main!`](crate::main) knows it.
#[derive(Clone, Copy, Debug)]
pub struct Project {
    /// The directory of its `Cargo.toml` when it was compiled.
    pub directory: &'static str,
    /// The text of its `Cargo.toml`: in the binary, so that the binary can travel.
    pub manifest: &'static str,
    /// The test, as `cargo test --test` calls it.
    pub test: &'static str,
}

impl Project {
    /// Where its `notes/` and fixtures are: `SHAKEDOWN_PROJECT`, else the package, or the current
    /// directory on a host that does not have it.
    ///
    /// # Errors
    /// When there is none, or the variable names none.
    pub fn root(&self) -> Result<PathBuf> {
        if let Some(directory) = std::env::var_os(PROJECT_VARIABLE).filter(|value| !value.is_empty()) {
            return std::fs::canonicalize(&directory).ok().filter(|path| path.is_dir()).with_context(|| {
                let directory = PathBuf::from(&directory);
                Fault::host(format!("{PROJECT_VARIABLE}={} is no directory", directory.display()))
            });
        }
        let compiled = PathBuf::from(self.directory);
        if compiled.is_dir() {
            return Ok(compiled);
        }
        std::env::current_dir().context(Fault::host("there is no current directory"))
    }
}

/// The `main` of a test with `harness = false`.
///
/// ```no_run
/// use shakedown::prelude::*;
///
/// #[scenario]
/// fn the_host_has_a_kernel() -> Result<()> {
///     ensure!(std::path::Path::new("/proc/version").exists(), "no /proc");
///     Ok(())
/// }
///
/// shakedown::main!();
/// ```
#[macro_export]
macro_rules! main {
    () => {
        fn main() -> ::std::process::ExitCode {
            $crate::harness::main($crate::harness::Project {
                directory: ::core::env!("CARGO_MANIFEST_DIR"),
                manifest: ::core::include_str!(::core::concat!(
                    ::core::env!("CARGO_MANIFEST_DIR"),
                    "/Cargo.toml"
                )),
                test: ::core::env!("CARGO_CRATE_NAME"),
            })
        }
    };
}

/// Runs the scenarios of this binary as its command line says. See the [module](self) for the exit
/// status.
pub fn main(project: Project) -> ExitCode {
    match run(project, std::env::args_os(), &SCENARIOS) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", verdict::explain(&error));
            ExitCode::from(2)
        }
    }
}

/// Lists `count` made-up scenarios into the file `list`, by the code that lists real ones, and says
/// how long it took. For `shakedown bench list`.
///
/// # Errors
/// When the harness refuses its own scenarios.
#[doc(hidden)]
pub fn bench_list(count: usize, list: &Path) -> Result<Duration> {
    let made_up = |n: usize| Scenario {
        name: format!("group_{}::scenario_{n}", n % 10).leak(),
        markers: if n.is_multiple_of(2) { &["vm", "slow"] } else { &[] },
        machine: None,
        timeout: None,
        ignore: None,
        file: file!(),
        line: line!(),
        body: Body::Plain(|| Ok(())),
    };
    let scenarios: &'static [Scenario] = (0..count).map(made_up).collect::<Vec<_>>().leak();
    let arguments = ["bench", "-m", "any(vm, not(slow))", "--list", "--logfile"];
    let arguments = arguments.iter().map(OsString::from).chain([list.into()]);
    let project = Project { directory: env!("CARGO_MANIFEST_DIR"), manifest: "", test: "bench" };
    let begun = Instant::now();
    run(project, arguments, scenarios)?;
    Ok(begun.elapsed())
}

/// How a scenario went that ran outside of a test binary.
#[derive(Debug)]
pub struct Performance {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, for every outcome but `passed`.
    pub message: String,
    /// Where its evidence is; `None` when it could not be begun.
    pub evidence: Option<PathBuf>,
    /// What was measured.
    pub timings: Timings,
}

/// Runs one scenario without a test binary: what `shakedown demo` and `bench` do. `watcher` is told
/// what happens.
pub fn perform(
    environment: Environment,
    settings: Settings,
    scenario: &'static Scenario,
    watcher: Events,
) -> Performance {
    let run = Arc::new(Run::new(environment, settings, watcher));
    let (verdict, evidence) = trial::execute(&run, scenario);
    Performance {
        outcome: verdict.outcome,
        message: verdict.message,
        timings: evidence.as_ref().map(|evidence| evidence.metadata().timings).unwrap_or_default(),
        evidence: evidence.map(|evidence| evidence.directory().to_owned()),
    }
}

fn run(
    project: Project,
    arguments: impl IntoIterator<Item = OsString>,
    scenarios: &'static [Scenario],
) -> Result<ExitCode> {
    let environment = Environment::read(&project.root()?)?;
    let settings = Settings::parse(project.manifest)?;
    let known = named::only(checked(scenarios, &settings)?)?;
    let CommandLine { arguments, selection, deferred } = command_line::parse(arguments, &settings.markers)?;
    let queue = Queue::in_log_root(&environment.log_root);
    let owed = deferred.then(|| Owed::read(&queue, project.test, &known)).transpose()?;
    let mut scenarios = owed.as_ref().map_or_else(|| known.clone(), |owed| owed.scenarios.clone());
    let all = scenarios.len();
    if let Some(selection) = &selection {
        scenarios.retain(|scenario| selection.matches(scenario.markers));
    }
    let not_selected = all - scenarios.len();
    // What was deferred had been asked for.
    let ignored = |scenario| if deferred { None } else { ignored(scenario, &settings, selection.as_ref()) };
    let reasons: Vec<_> = scenarios.iter().map(|scenario| ignored(scenario)).collect();
    let scenarios: Vec<_> = scenarios.into_iter().zip(reasons).collect();
    if arguments.list {
        let trials = scenarios.into_iter().map(|(scenario, reason)| {
            Trial::test(scenario.name, || Ok(())).with_ignored_flag(reason.is_some())
        });
        return Ok(libtest_mimic::run(&arguments, trials.collect()).exit_code());
    }
    process::handle_signals()?;
    let debugger = Debugger::new(environment.debug)?;
    let run = Run::new(environment, settings, Events::to(progress::Lines::default()));
    let run = Arc::new(run.stopping(debugger));
    run.check(scenarios.iter().filter_map(|(scenario, _)| scenario.machine.as_ref()))?;
    if let Some(owed) = &owed {
        owed.forget_gone(&queue, project.test, &known)?;
    }
    let planned: Vec<_> = scenarios
        .iter()
        .filter(|(scenario, reason)| runs(&arguments, scenario, reason.is_some()))
        .map(|(scenario, _)| *scenario)
        .collect();
    let session = Arc::new(Session::plan(&run, project.test, &planned, arguments.test_threads)?);
    let tally = Arc::new(Tally::default());
    let trials = scenarios
        .into_iter()
        .map(|(scenario, reason)| trial(&run, &session, &tally, &arguments, scenario, reason))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Then it looks like one that was killed; what it has found stands.
    if let Err(error) = run.end() {
        eprintln!("note: {}", verdict::explain(&error));
    }
    if let Some(line) = tally.summary(&run, not_selected, selection.as_ref()) {
        eprintln!("{line}");
    }
    Ok(if process::interrupted() { ExitCode::from(130) } else { conclusion.exit_code() })
}

/// The scenarios by name, once it is certain that their names and markers are fine.
fn checked(scenarios: &'static [Scenario], settings: &Settings) -> Result<Vec<&'static Scenario>> {
    let mut scenarios: Vec<_> = scenarios.iter().collect();
    scenarios.sort_by_key(|scenario| scenario.name);
    for pair in scenarios.windows(2) {
        let [first, second] = pair else { continue };
        if first.name == second.name {
            bail!(
                "two scenarios are called `{}`: {}:{} and {}:{}",
                first.name,
                first.file,
                first.line,
                second.file,
                second.line
            );
        }
    }
    for scenario in &scenarios {
        let unknown = scenario.markers.iter().find(|marker| !settings.markers.has(marker));
        if let Some(marker) = unknown {
            let hint = settings.markers.hint(marker);
            let Scenario { name, file, line, .. } = scenario;
            return Err(Fault::host(format!("{file}:{line}: scenario `{name}` has the unknown marker `{marker}`{hint}"))
                .fix(format!("correct it, or declare it in Cargo.toml: [package.metadata.shakedown.markers] {marker} = \"what it means\""))
                .into());
        }
    }
    Ok(scenarios)
}

/// Why a scenario does not run unless it is asked for.
fn ignored(scenario: &Scenario, settings: &Settings, selection: Option<&Selection>) -> Option<String> {
    if let Some(reason) = scenario.ignore {
        return Some(reason.to_owned());
    }
    let asked_for = |marker: &str| selection.is_some_and(|selection| selection.asks_for(marker));
    let marker = settings
        .ignore
        .iter()
        .find(|marker| scenario.markers.contains(&marker.as_str()) && !asked_for(marker))?;
    Some(format!("the settings ignore marker `{marker}`; -m {marker} runs it"))
}

/// Whether libtest-mimic will run it.
fn runs(arguments: &Arguments, scenario: &Scenario, ignored: bool) -> bool {
    let trial = Trial::test(scenario.name, || Ok(())).with_ignored_flag(ignored);
    !arguments.is_filtered_out(&trial) && !arguments.is_ignored(&trial)
}

/// A trial for libtest-mimic. It prints the reason of what is ignored only when the trial itself
/// says so, so the flag is set only where `--ignored` filters by it.
fn trial(
    run: &Arc<Run>,
    session: &Arc<Session>,
    tally: &Arc<Tally>,
    arguments: &Arguments,
    scenario: &'static Scenario,
    ignored: Option<String>,
) -> Trial {
    let flag = arguments.ignored && ignored.is_some();
    let reason = ignored.filter(|_| !arguments.ignored && !arguments.include_ignored);
    let (run, session, tally) = (Arc::clone(run), Arc::clone(session), Arc::clone(tally));
    let body = move || {
        let verdict = match reason {
            Some(reason) => trial::unstarted(&run, scenario, Verdict::new(Outcome::Ignored, reason)),
            None => session
                .defers(scenario)
                .unwrap_or_else(|| session.done(scenario, trial::execute(&run, scenario).0)),
        };
        tally.count(verdict.outcome);
        match verdict.outcome {
            Outcome::Passed => Ok(Completion::Completed),
            Outcome::Ignored => Ok(Completion::ignored_with(verdict.message)),
            // Nextest takes what does not fail for passed, and this has not even run.
            Outcome::Deferred if !under_nextest() => {
                Ok(Completion::ignored_with(format!("deferred: {}", verdict.message)))
            }
            outcome => Err(format!("{outcome}: {}", verdict.message).into()),
        }
    };
    Trial::ignorable_test(scenario.name, body).with_ignored_flag(flag)
}

fn under_nextest() -> bool {
    std::env::var_os("NEXTEST").is_some()
}
