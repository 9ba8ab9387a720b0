//! `shakedown fleet`: the project's scenarios on the hosts of a Testflinger queue.

use super::binaries::{self, Binary};
use super::project::Project;
use super::table::{Cell, Table};
use super::terminal::{self, Colour, Paint};
use super::{INTERRUPTED, Verdict};
use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use shakedown::deadline::Deadline;
use shakedown::fault::{Fault, visible};
use shakedown::harness::Settings;
use shakedown::process;
use shakedown::record::history::History;
use shakedown::record::{Environment, Outcome, Run};
use shakedown::testflinger::client::{Client, Login};
use shakedown::testflinger::fleet::job::{self, Common};
use shakedown::testflinger::fleet::lab::{self, Notice, Row, ServerLab};
use shakedown::testflinger::fleet::run::{self, Trouble};
use shakedown::testflinger::fleet::shards::Shards;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

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
/// jobs of the run.
///
/// The hosts run the test binary as it was built here: they need this processor, a C library that is
/// not older than this host's, and what the scenarios need, such as QEMU.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  shakedown fleet run --server tf.example:8000 --queue qemu --release
  shakedown fleet run --queue qemu -m 'not(slow)' disks::
  shakedown fleet run --queue bare --template job.yaml --with fixtures")]
struct RunArgs {
    /// The Testflinger server
    #[arg(long, env = "TESTFLINGER_SERVER")]
    server: String,
    /// The queue whose agents run the scenarios
    #[arg(long)]
    queue: String,
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
    /// A job in YAML, for what else the queue needs: provision_data, test_data.test_username
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

impl RunArgs {
    fn run(self) -> Result<Verdict> {
        let template = self.template.as_deref().map(template).transpose()?.unwrap_or_default();
        let login = Login::from_environment()?;
        let mut common =
            Common { queue: self.queue.clone(), tag: String::new(), markers: self.markers.clone(), template };
        common.check()?;
        let client = Client::for_user(&self.server, login);
        lab::check_queue(&client, &self.queue)?;
        let binary = self.binary()?;
        let environment = Environment::read(&binary.directory)?;
        let names = self.names(&binary)?;
        ensure!(
            !names.is_empty(),
            Fault::host("no scenario is selected").fix("`cargo test -- --list` shows them")
        );
        let expected = expected(environment.ledger.as_deref(), &names)?;
        let with = self.with(&binary.directory)?;

        let run = Run::start(environment)?;
        common.tag = run.id().to_owned();
        let archive = run.directory().join("shard.tar.gz");
        let stripped = stripped(&binary.program, &run.directory().join("stripped"));
        job::pack(&archive, stripped.as_deref().unwrap_or(&binary.program), &binary.directory, &with)?;
        let _ = stripped.map(std::fs::remove_file);
        let show = Show::new(names.len());
        let watcher = |notice: Notice<'_>| show.notice(&notice);
        let mut lab = ServerLab::new(client, common, &run, names, archive.clone(), &watcher);
        let mut shards = Shards::new(expected);
        let result = run::run(&mut lab, &mut shards, self.shards.map(usize::from));
        show.finish();
        // It can be made again, and is large.
        let _ = std::fs::remove_file(archive);
        run.end()?;
        let rows: Vec<_> = lab.rows().collect();
        let lost = shards.all().iter().filter(|shard| is_lost(shard)).count();
        self.print(&rows, &run, shards.all().len(), lost)?;
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

    fn print(&self, rows: &[(&str, &Row)], run: &Run, shards: usize, lost: usize) -> Result<()> {
        let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
        rows.iter().for_each(|(_, row)| *counts.entry(row.outcome).or_default() += 1);
        if self.json {
            let scenario = |(name, row): &(&str, &Row)| {
                json!({
                    "scenario": name, "outcome": row.outcome, "seconds": row.seconds, "host": row.host,
                    "reason": row.reason,
                })
            };
            let counts: Map<String, Value> =
                counts.iter().map(|(outcome, count)| (outcome.to_string(), json!(count))).collect();
            return terminal::print_json(&json!({
                "run_id": run.id(), "evidence": run.directory(), "shards": shards, "lost_shards": lost,
                "outcomes": counts, "scenarios": rows.iter().map(scenario).collect::<Vec<_>>(),
            }));
        }
        let mut table = Table::new(["SCENARIO", "OUTCOME", "SECONDS", "HOST", "WHY"]);
        for (name, row) in rows {
            let reason = visible(row.reason.as_deref().unwrap_or_default());
            let colour = match row.outcome {
                Outcome::Passed => Colour::Green,
                Outcome::Ignored | Outcome::Deferred => Colour::Dim,
                _ => Colour::Red,
            };
            table.row([
                visible(name).into(),
                Cell::coloured(row.outcome.to_string(), colour),
                format!("{:.1}", row.seconds).into(),
                visible(&row.host).into(),
                reason.lines().next().unwrap_or_default().into(),
            ]);
        }
        terminal::print(&table.render(Paint::of(&io::stdout())))?;
        let counts: Vec<_> = counts.iter().map(|(outcome, count)| format!("{count} {outcome}")).collect();
        let lost = if lost == 0 { String::new() } else { format!(", {lost} of them lost") };
        terminal::say(&format!(
            "scenarios: {}; {shards} {}{lost}; evidence in {}",
            counts.join(", "),
            if shards == 1 { "shard" } else { "shards" },
            run.directory().display()
        ));
        Ok(())
    }
}

/// Taken by an agent, and not brought back.
fn is_lost(shard: &shakedown::testflinger::fleet::shards::Shard) -> bool {
    use shakedown::testflinger::fleet::shards::State;
    matches!(shard.state, State::Lost(_)) && shard.agent.is_some()
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

fn template(file: &Path) -> Result<Map<String, Value>> {
    let cannot = || Fault::host(format!("cannot use the template {}", file.display()));
    let text = std::fs::read_to_string(file).with_context(cannot)?;
    let value: Value = serde_saphyr::from_str(&text).map_err(|error| cannot().because(error.to_string()))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(cannot().because("it is no mapping of keys to values").into()),
    }
}

/// What is seen while it runs: a line for each verdict, and on a terminal how far it is.
struct Show {
    bar: Option<ProgressBar>,
    paint: Paint,
    all: usize,
}

impl Show {
    fn new(all: usize) -> Self {
        Self { bar: super::progress::spinner(), paint: Paint::of(&io::stderr()), all }
    }

    fn notice(&self, notice: &Notice<'_>) {
        match notice {
            Notice::Line(text) => self.line(text),
            Notice::Verdict(name, row) => {
                let outcome = row.outcome.to_string();
                let outcome = match row.outcome {
                    Outcome::Passed => self.paint.paint(Colour::Green, &outcome),
                    Outcome::Ignored | Outcome::Deferred => outcome,
                    _ => self.paint.paint(Colour::Red, &outcome),
                };
                self.line(&format!("{} ... {outcome} {}", visible(name), visible(&row.host)));
            }
            Notice::Progress(progress) => {
                if let Some(bar) = &self.bar {
                    bar.set_message(format!(
                        "{} of {} scenarios done, {} shards run, {} wait",
                        self.all - progress.scenarios_owed,
                        self.all,
                        progress.running,
                        progress.waiting
                    ));
                }
            }
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| terminal::say(text)),
            None => terminal::say(text),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
