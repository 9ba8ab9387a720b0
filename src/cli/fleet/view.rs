//! What is seen of a run on many hosts: lines and a bar while it runs, a table or JSON at its end.

use crate::cli::table::{Cell, Table};
use crate::cli::terminal::{self, Colour, Paint};
use anyhow::Result;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use shakedown::fault::visible;
use shakedown::record::{Outcome, Run};
use shakedown::testflinger::fleet::shards::{Shard, Shards, State};
use shakedown::testflinger::fleet::show::{Notice, Row};
use std::collections::BTreeMap;
use std::io;

/// Prints the verdicts.
pub(super) fn print(rows: &[(&str, &Row)], run: &Run, shards: &Shards, as_json: bool) -> Result<()> {
    let lost = shards.all().iter().filter(|shard| is_lost(shard)).count();
    let shards = shards.all().len();
    let mut counts: BTreeMap<Outcome, usize> = BTreeMap::new();
    rows.iter().for_each(|(_, row)| *counts.entry(row.outcome).or_default() += 1);
    if as_json {
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

/// Taken by an agent, and not brought back.
fn is_lost(shard: &Shard) -> bool {
    matches!(shard.state, State::Lost(_)) && shard.agent.is_some()
}

/// What is seen while it runs: a line for each verdict, and on a terminal how far it is.
pub(super) struct Show {
    bar: Option<ProgressBar>,
    paint: Paint,
    all: usize,
}

impl Show {
    pub(super) fn new(all: usize) -> Self {
        Self { bar: crate::cli::progress::spinner(), paint: Paint::of(&io::stderr()), all }
    }

    pub(super) fn notice(&self, notice: &Notice<'_>) {
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

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
