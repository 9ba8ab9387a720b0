//! `shakedown fleet`: the project's scenarios on the hosts of a Testflinger queue.

mod view;

use super::binaries::{self, Binary};
use super::project::Project;
use super::terminal;
use super::{INTERRUPTED, Verdict};
use anyhow::{Context, Result, bail, ensure};
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::harness::Settings;
use shakedown::process;
use shakedown::record::history::History;
use shakedown::record::{Environment, Outcome, Run};
use shakedown::testflinger::client::{Client, Login};
use shakedown::testflinger::fleet::job::{self, Common, Luggage};
use shakedown::testflinger::fleet::lab::Trouble;
use shakedown::testflinger::fleet::run;
use shakedown::testflinger::fleet::saved::{self, Left, Plan, Saved};
use shakedown::testflinger::fleet::server::{self, ServerLab};
use shakedown::testflinger::fleet::show::{Notice, Row};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use view::Show;

/// Stripping takes seconds.
const STRIP: Duration = Duration::from_secs(120);

/// Run scenarios on many hosts.
#[derive(clap::Args)]
pub(super) struct Fleet {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    Run(RunArgs),
}

/// Run the scenarios of this project on the hosts of a Testflinger queue, as one run.
///
/// They are split into shards by the medians of the ledger. Each shard is a job; what it leaves behind
/// comes back as the job's artifacts, into one run directory and one ledger. What a host does not
/// bring back goes to another one. Exit status 0 when nothing failed, 1 otherwise. Ctrl-C cancels all
/// jobs of the run. With one that was killed, `--resume` goes on: nothing is submitted twice, and what is
/// finished stays so.
///
/// The hosts run the test binary as it was built here: they need this processor, a C library that is
/// not older than this host's, and what the scenarios need, such as QEMU.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  shakedown fleet run --server tf.example:8000 --queue qemu --release
  shakedown fleet run --queue qemu -m 'not(slow)' disks::
  shakedown fleet run --queue bare --template job.yaml --with fixtures
  shakedown fleet run --resume latest")]
struct RunArgs {
    /// The Testflinger server
    #[arg(long, env = "TESTFLINGER_SERVER", required_unless_present = "resume")]
    server: Option<String>,
    /// The queue whose agents run the scenarios
    #[arg(long, required_unless_present = "resume")]
    queue: Option<String>,
    /// Go on with a run that was killed: the name of its run directory, or `latest`
    #[arg(long, value_name = "RUN", conflicts_with_all = [
        "queue", "test", "binary", "release", "with", "template", "filter"
    ])]
    resume: Option<String>,
    /// How many jobs there are at once [default: one for each agent, and a few that wait]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    shards: Option<u16>,
    /// Scenarios with these markers, as in `cargo test -- -m`
    #[arg(short = 'm', long, value_name = "EXPRESSION", env = "SHAKEDOWN_MARKERS")]
    markers: Option<String>,
    /// The test, as `cargo test --test` calls it
    #[arg(long, value_name = "NAME", default_value = "scenarios")]
    test: String,
    /// A test binary that is built already, in the place of one that cargo builds
    #[arg(long, value_name = "FILE", conflicts_with_all = ["test", "release"])]
    binary: Option<PathBuf>,
    /// Build with optimizations; such a binary is also smaller
    #[arg(long)]
    release: bool,
    /// A file or directory of the project that scenarios need; those of its images go anyway
    #[arg(long, value_name = "PATH")]
    with: Vec<PathBuf>,
    /// A job in YAML, for what else the queue needs: provision_data and its attachments,
    /// test_data.test_username
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Print one JSON object in the place of the table
    #[arg(long)]
    json: bool,
    /// Only scenarios whose names have this in them
    filter: Option<String>,
}

impl Fleet {
    pub(super) fn run(self) -> Result<Verdict> {
        let Action::Run(run) = self.action;
        run.run()
    }
}

/// A run that is to be done.
struct Work {
    client: Client,
    run: Run,
    saved: Saved,
    left: Left,
}

impl RunArgs {
    fn run(self) -> Result<Verdict> {
        let Work { client, run, saved, left } = match &self.resume {
            Some(id) => self.resume(id)?,
            None => self.begin()?,
        };
        let names = saved.plan().scenarios.clone();
        let expected = expected(run.ledger(), &names)?;
        let show = Show::new(names.len());
        let watcher = |notice: Notice<'_>| show.notice(&notice);
        let mut lab = ServerLab::new(client, &run, saved, &watcher);
        let mut shards = lab.go_on(left, expected);
        let result = run::run(&mut lab, &mut shards, self.shards.map(usize::from));
        show.finish();
        let rows: Vec<_> = lab.rows().collect();
        if rows.len() == names.len() {
            // Large, and of no use any more. Without all verdicts on record the run can still be resumed.
            let _ = std::fs::remove_file(Saved::archive(run.directory()));
        }
        run.end()?;
        view::print(&rows, &run, &shards, self.json)?;
        match result {
            Ok(()) => {}
            Err(Trouble::Interrupted) => return Ok(Verdict::Status(INTERRUPTED)),
            Err(Trouble::Fatal(error)) => return Err(error.context("the run ended early")),
            Err(Trouble::Away(why)) => return Err(Fault::host(why).into()),
        }
        let fine =
            |row: &Row| !matches!(row.outcome, Outcome::Failed | Outcome::Error | Outcome::Interrupted);
        Ok(if rows.iter().all(|(_, row)| fine(row)) { Verdict::Fine } else { Verdict::NotFine })
    }

    fn begin(&self) -> Result<Work> {
        let template = self.template.as_deref().map(job::read_template).transpose()?;
        let (template, attachments) = template.unwrap_or_default();
        let queue = self.queue.clone().unwrap_or_default();
        let mut common = Common { queue, tag: String::new(), markers: self.markers.clone(), template };
        common.check()?;
        let client = Client::for_user(self.server.as_deref().unwrap_or_default(), Login::from_environment()?);
        server::check_queue(&client, &common.queue)?;
        let binary = self.binary()?;
        let environment = Environment::read(&binary.directory)?;
        let scenarios = self.names(&binary)?;
        ensure!(
            !scenarios.is_empty(),
            Fault::host("no scenario is selected").fix("`cargo test -- --list` shows them")
        );
        let with = self.with(&binary.directory)?;
        tell_of_a_killed_one(&environment);
        let run = Run::start(environment)?;
        common.tag = run.id().to_owned();
        let stripped = stripped(&binary.program, &run.directory().join("stripped"));
        let luggage = Luggage {
            binary: stripped.as_deref().unwrap_or(&binary.program),
            project: &binary.directory,
            with: &with,
            attachments: &attachments,
        };
        luggage.pack(&Saved::archive(run.directory()))?;
        let _ = stripped.map(std::fs::remove_file);
        let plan = Plan { server: client.base().to_owned(), common, scenarios };
        let saved = Saved::begin(run.directory(), plan)?;
        Ok(Work { client, run, saved, left: Left::default() })
    }

    fn resume(&self, id: &str) -> Result<Work> {
        let run = Run::reopen(Project::here()?.environment, id)?;
        let (saved, left) = Saved::resume(&run)?;
        let at = &saved.plan().server;
        let login = Login::from_environment()?;
        match &self.server {
            Some(server) if Client::for_user(server, None).base() != at => {
                let base = Client::for_user(server, None).base().to_owned();
                let what = format!("the jobs of run {} are at {at}, not at {base}", run.id());
                bail!(Fault::host(what).fix(format!("give `--server {at}`")));
            }
            // A file is not who we give a secret to.
            None if login.is_some() => {
                let what = format!("the jobs of run {} are at {at}", run.id());
                bail!(Fault::host(what).fix(format!("give `--server {at}` if that is to have your login")));
            }
            _ => {}
        }
        // Who we are to it may be in what was given, and is in no file.
        let client = Client::for_user(self.server.as_ref().unwrap_or(at), login);
        // What would be refused must not end the run: nothing is on record yet. An outage is waited for.
        match client.search([run.id()]) {
            Err(error) if !error.is_passing() => {
                let fix = "mend that and resume once more: the run is as it was";
                return Err(error).context(Fault::host(format!("run {} is not resumed", run.id())).fix(fix));
            }
            _ => {}
        }
        terminal::say(&format!(
            "run {}: {} of {} scenarios have a verdict",
            run.id(),
            left.rows.len(),
            saved.plan().scenarios.len()
        ));
        Ok(Work { client, run, saved, left })
    }

    fn binary(&self) -> Result<Binary> {
        if let Some(program) = &self.binary {
            let program = std::fs::canonicalize(program)
                .with_context(|| Fault::host(format!("there is no test binary {}", program.display())))?;
            return Ok(Binary { program, directory: Project::here()?.environment.project });
        }
        let mut which = vec!["--test", &self.test];
        which.extend(self.release.then_some("--release"));
        let built = binaries::build(&which)?.pop();
        built.with_context(|| Fault::host(format!("cargo built no test binary for `{}`", self.test)))
    }

    fn names(&self, binary: &Binary) -> Result<Vec<String>> {
        let mut arguments = Vec::new();
        if let Some(markers) = &self.markers {
            arguments.extend(["-m", markers]);
        }
        arguments.extend(self.filter.as_deref());
        binaries::names(binary, &arguments)
    }

    /// What goes along: what was said, and what the images of the project are made of.
    fn with(&self, project: &Path) -> Result<Vec<PathBuf>> {
        let mut with = self.with.clone();
        let manifest = std::fs::read_to_string(project.join("Cargo.toml")).unwrap_or_default();
        for table in Settings::parse(&manifest)?.images.values() {
            for key in ["files", "file", "flake"] {
                let Some(path) = table.get(key).and_then(|path| path.as_str()) else { continue };
                let path = path.strip_prefix("path:").unwrap_or(path);
                let description = format!("{path}.toml");
                let here = |path: &str| Path::new(path).is_relative() && project.join(path).exists();
                let paths = [path, &description].into_iter().filter(|path| here(path));
                with.extend(paths.map(PathBuf::from));
            }
        }
        with.sort();
        with.dedup();
        Ok(with)
    }
}

/// The run before this one may have been killed, and its jobs hold hosts.
fn tell_of_a_killed_one(environment: &Environment) {
    let latest = environment.log_root.join("latest");
    if saved::was_killed(&latest) {
        let run = std::fs::read_link(&latest).unwrap_or_default();
        terminal::say(&format!(
            "run {0} was killed, and its jobs go on: `shakedown fleet run --resume {0}` goes on with it",
            run.display()
        ));
    }
}

/// What each scenario is expected to take: its median, or what the others usually do.
fn expected(ledger: Option<&Path>, names: &[String]) -> Result<Vec<Duration>> {
    let history = ledger.map(History::read_all).transpose()?.unwrap_or_default();
    let mut known: Vec<_> = names.iter().filter_map(|name| history.median(name)).collect();
    known.sort_unstable();
    let usual = known.get(known.len() / 2).copied().unwrap_or(Duration::from_secs(10));
    Ok(names.iter().map(|name| history.median(name).unwrap_or(usual)).collect())
}

/// The binary without what only debuggers read, where this host has `strip`: it travels with each
/// shard, and is a tenth as large.
fn stripped(binary: &Path, to: &Path) -> Option<PathBuf> {
    let mut command = Command::new("strip");
    command.arg("--strip-debug").arg("-o").arg(to).arg(binary);
    process::output(command, &Deadline::after(STRIP, "strip")).ok().map(|_| to.to_owned())
}
