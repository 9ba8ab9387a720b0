//! `shakedown jobs`: a Testflinger job for each machine of a list.

mod view;

use super::Verdict;
use super::project::Project;
use super::table::{Cell, Table};
use super::terminal::{self, Colour, Paint};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use shakedown::deadline::{Stop, human};
use shakedown::fault::visible;
use shakedown::testflinger::client::Login;
use shakedown::testflinger::jobs::{self, Options, Outcome, Report, Row};
use shakedown::{process, record};
use std::io;
use std::path::PathBuf;
use std::time::Duration;
use view::View;

/// Run a Testflinger job on each machine of a list, and tell how each one ended.
///
/// Submits the template once for each machine, with `$CANONICAL_ID` replaced and its attachments, and
/// waits for the ends of all. For each machine there is a directory with `tf_job_id.txt`, `output.txt`
/// and `hw_status.txt`, and each job has its line in the ledger. However it is interrupted, the same
/// command goes on: nothing is submitted twice. Once all jobs have ended, it begins anew.
#[derive(clap::Args)]
#[command(after_help = MORE)]
pub(super) struct Jobs {
    /// Submit, and do not wait
    #[arg(long, conflicts_with = "check_status")]
    send_jobs: bool,
    /// Wait for jobs that were submitted before
    #[arg(long)]
    check_status: bool,
    /// One Canonical ID a line; `#` begins a comment
    #[arg(long, value_name = "FILE", default_value = "machines.txt")]
    machines_file: PathBuf,
    /// The job; paths of its attachments are relative to its directory
    #[arg(long, value_name = "FILE", default_value = "tf-job.yaml")]
    template_file: PathBuf,
    /// Where each machine gets a directory
    #[arg(long, value_name = "DIR", default_value = "job_outputs")]
    output_dir: PathBuf,
    /// Seconds between two questions for the states of all jobs
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    poll_interval: Duration,
    /// The server [default: TESTFLINGER_SERVER, or https://testflinger.canonical.com]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// Submit again, this often, where the machine could not be provisioned
    #[arg(long, value_name = "N", default_value_t = 0)]
    retry_provision: u32,
    /// Submit even where no agent of the queue is online
    #[arg(long)]
    wait_for_available_agents: bool,
    /// Submit to all machines, even where an earlier run was interrupted
    #[arg(long, conflicts_with = "check_status")]
    new_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const MORE: &str = "\
Environment variables:
  TESTFLINGER_SERVER                                the server
  TESTFLINGER_CLIENT_ID and TESTFLINGER_SECRET_KEY  who submits; anybody without them

Exit status:
  0    all jobs passed; with --send-jobs: all are submitted
  1    some did not, or an error
  2    wrong usage, or a machines file or template that makes no sense
  130  interrupted; the jobs go on";

const SERVER: &str = "TESTFLINGER_SERVER";
const DEFAULT_SERVER: &str = "https://testflinger.canonical.com";

impl Jobs {
    pub(super) fn run(self) -> Result<Verdict> {
        let default = std::env::var(SERVER).ok().filter(|server| !server.trim().is_empty());
        let options = Options {
            send: !self.check_status,
            watch: !self.send_jobs,
            machines_file: self.machines_file,
            template_file: self.template_file,
            output_dir: self.output_dir,
            poll_interval: self.poll_interval,
            server: self.server,
            default_server: default.unwrap_or_else(|| DEFAULT_SERVER.into()),
            login: Login::from_environment()?,
            retry_provision: self.retry_provision,
            wait_for_agents: self.wait_for_available_agents,
            new_run: self.new_run,
            environment: Project::here()?.environment,
        };
        let mut view = View::new();
        let result = jobs::run(&options, &mut |news| view.show(news));
        view.finish();
        let report = result.inspect_err(|error| {
            let interrupted = error.chain().any(|e| e.downcast_ref() == Some(&Stop::Interrupted));
            if interrupted || view.unfinished() > 0 {
                terminal::say(&farewell(&view));
            }
        })?;
        if self.json {
            terminal::print_json(&Json::of(&report))?;
        } else {
            terminal::print(&table(&report.rows, Paint::of(&io::stdout())))?;
        }
        if let Some(problem) = report.problem {
            return Err(problem.context("the jobs have ended, and not all could be recorded"));
        }
        let fine = |row: &Row| match options.watch {
            true => row.outcome == Some(Outcome::Passed),
            false => row.job_id.is_some() && row.outcome != Some(Outcome::Error),
        };
        Ok(if report.rows.iter().all(fine) { Verdict::Fine } else { Verdict::NotFine })
    }
}

/// What Ctrl-C, or a server that is away, leaves behind.
fn farewell(view: &View) -> String {
    let line: Vec<_> = record::arguments().iter().map(|word| process::quote(word)).collect();
    let jobs = match view.unfinished() {
        0 => "No job was submitted that goes on.".to_owned(),
        1 => "1 job goes on without us.".to_owned(),
        count => format!("{count} jobs go on without us."),
    };
    format!(
        "{jobs} The same command goes on where this one stopped:\n  {}",
        line.join(" ").replace(" --new-run", "")
    )
}

/// Whole ones as in the original, or parts of one.
fn seconds(text: &str) -> Result<Duration> {
    let seconds: f64 = text.parse().context("write a number of seconds, such as `30`")?;
    ensure!((0.05..=86400.0).contains(&seconds), "it must be between 0.05 and 86400 seconds");
    Ok(Duration::from_secs_f64(seconds))
}

fn table(rows: &[Row], paint: Paint) -> String {
    let mut table = Table::new(["MACHINE", "JOB", "OUTCOME", "EXIT", "HARDWARE", "TIME", "WHY"]);
    for row in rows {
        let text = |text: &Option<String>| short(text.as_deref().unwrap_or("-"));
        let attempt = if row.attempt > 1 { format!(" (attempt {})", row.attempt) } else { String::new() };
        table.row([
            row.machine.clone().into(),
            format!("{}{attempt}", text(&row.job_id)).into(),
            outcome(row),
            row.exit_status.map_or("-".to_owned(), |status| status.to_string()).into(),
            text(&row.hw_status).into(),
            row.seconds.map_or("-".to_owned(), |s| human(Duration::from_secs_f64(s.round()))).into(),
            visible(row.reason.as_deref().unwrap_or_default()).replace('\n', " ").into(),
        ]);
    }
    table.render(paint)
}

fn outcome(row: &Row) -> Cell {
    match row.outcome {
        Some(Outcome::Passed) => Cell::coloured("passed", Colour::Green),
        Some(outcome) => Cell::coloured(outcome.to_string(), Colour::Red),
        None => short(row.state.as_deref().unwrap_or("not submitted")).into(),
    }
}

/// One line that commands no terminal: it comes from machines.
fn short(text: &str) -> String {
    let line = visible(text).replace(['\n', '\t'], " ");
    let mut short: String = line.chars().take(60).collect();
    if short.len() < line.len() {
        short.push('…');
    }
    short
}

#[derive(Serialize)]
struct Json<'a> {
    run: &'a str,
    server: &'a str,
    passed: usize,
    total: usize,
    jobs: &'a [Row],
}

impl<'a> Json<'a> {
    fn of(report: &'a Report) -> Self {
        let Report { run, server, rows, .. } = report;
        let passed = rows.iter().filter(|row| row.outcome == Some(Outcome::Passed)).count();
        Self { run, server, passed, total: rows.len(), jobs: rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_as_in_the_original_or_finer() {
        assert_eq!(seconds("30").expect("reads"), Duration::from_secs(30));
        assert_eq!(seconds("0.5").expect("reads"), Duration::from_millis(500));
        assert!(["0", "-1", "x", "nan", "inf", "1e9"].iter().all(|text| seconds(text).is_err()));
    }

    #[test]
    fn what_machines_say_is_one_harmless_line() {
        assert_eq!(short("a\u{1b}[2J\nb"), "a\\u{1b}[2J b");
        assert_eq!(short(&"x".repeat(100)).chars().count(), 61);
    }
}
