//! `shakedown bench residue`: the matrix of layouts, actions and levels, and how long it takes.

use super::Verdict;
use super::plan::Choice;
use super::progress::Progress;
use super::project::Project;
use super::table::{Cell, Table};
use super::terminal::{self, Colour, Paint};
use anyhow::{Context, Result};
use serde_json::json;
use shakedown::harness::Errand;
use shakedown::record::Outcome;
use shakedown::record::event::Events;
use shakedown::storage::matrix::{self, Case};
use shakedown::storage::{Action, CLEANER, Cleaner, LAYOUTS, Layout, layout_named};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is run.
#[derive(clap::Args)]
pub(super) struct Residue {
    /// Only this layout; can be given several times [default: all]
    #[arg(long = "layout", value_name = "NAME")]
    layouts: Vec<String>,
    /// Only this action; can be given several times [default: all]
    #[arg(long = "action", value_enum, value_name = "ACTION")]
    actions: Vec<Choice>,
    /// A POSIX script that cleans, instead of the image's `storage-cleanup`; it gets `--action ACTION DISK...`
    #[arg(long, value_name = "FILE")]
    cleaner: Option<PathBuf>,
    /// How many machines run at once
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    machines: u8,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Five minutes where nothing else runs.
const TIMEOUT: Duration = Duration::from_secs(3600);

impl Residue {
    pub(super) fn run(self) -> Result<Verdict> {
        let layouts: Vec<&'static Layout> = match &self.layouts[..] {
            [] => LAYOUTS.iter().collect(),
            names => names.iter().map(|name| layout_named(name)).collect::<Result<_>>()?,
        };
        let actions = match &self.actions[..] {
            [] => Action::ALL.to_vec(),
            some => some.iter().map(|action| action.action()).collect(),
        };
        let cleaner = match &self.cleaner {
            None => Cleaner::Command(CLEANER.into()),
            Some(file) => Cleaner::Script(
                std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?,
            ),
        };
        let Project { environment, settings } = Project::here()?;
        let progress = Progress::brief();
        let errand = Errand { name: "residue", needs: matrix::MACHINE, timeout: TIMEOUT };
        let (cases, seconds) = errand.run(environment, settings, Events::to(progress.clone()), |vm| {
            let origin = vm.origin().context("this machine was not forked")?;
            // What comes before is the template's, once for all.
            let begun = Instant::now();
            let cases = matrix::run_all(&origin, &layouts, &actions, &cleaner, self.machines.into())?;
            Ok((cases, begun.elapsed().as_secs_f64()))
        })?;
        progress.finish();
        let count = |outcome| cases.iter().filter(|case| case.verdict.outcome == outcome).count();
        let (failed, errors) = (count(Outcome::Failed), count(Outcome::Error));
        if self.json {
            let bad: Vec<_> = cases.iter().filter(|case| case.verdict.outcome != Outcome::Passed).collect();
            terminal::print_json(&json!({
                "bench": "residue",
                "schema_version": 1,
                "layouts": layouts.len(),
                "cases": cases.len(),
                "failed": failed,
                "errors": errors,
                "seconds": (seconds * 1000.0).round() / 1000.0,
                "machines": self.machines,
                "not_passed": bad,
                "load_average": super::bench::load_average(),
                "version": env!("CARGO_PKG_VERSION"),
            }))?;
        } else {
            terminal::print(&text(&cases))?;
            terminal::print(&format!(
                "{} layouts, {} cases, {failed} failed, {errors} errors, {seconds:.1} s\n",
                layouts.len(),
                cases.len()
            ))?;
        }
        Ok(if failed + errors == 0 { Verdict::Fine } else { Verdict::NotFine })
    }
}

fn text(cases: &[Case]) -> String {
    let mut table = Table::new(["LAYOUT", "ACTION", "LEVEL", "OUTCOME"]);
    let mut reasons = String::new();
    for case in cases {
        let colour = if case.verdict.outcome == Outcome::Passed { Colour::Green } else { Colour::Red };
        table.row([
            case.layout.into(),
            case.action.as_str().into(),
            case.verdict.level.to_string().into(),
            Cell::coloured(case.verdict.outcome.to_string(), colour),
        ]);
        if case.verdict.outcome != Outcome::Passed {
            let reason = case.verdict.reason.as_deref().unwrap_or_default();
            reasons += &format!(
                "\n{}, {}, {}: {}\n{reason}\n",
                case.layout, case.action, case.verdict.level, case.verdict.outcome
            );
        }
    }
    format!("{}{reasons}\n", table.render(Paint::of(&io::stdout())))
}
