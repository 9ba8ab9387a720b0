//! How well a run on many hosts is spread, in a simulation: no server, no socket, no waiting.

use crate::cli::{Verdict, terminal};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use shakedown::testflinger::fleet::simulation::{self, Model, Report};

/// 10,000 scenarios on 1,000 simulated hosts of which 10 die, by the code that `fleet run` runs by.
///
/// `makespan_ratio` is the length of the run beside its lower bound, which the documentation of
/// `shakedown::testflinger::fleet::simulation` defines, with the model; `lost` are scenarios without a
/// verdict from a host, and `requests_per_second` what the run asks of the server, beside what its
/// agents ask. With several runs, each has a seed of its own and the figures are the worst ones.
#[derive(clap::Args)]
pub(super) struct Fleet {
    /// How many scenarios
    #[arg(long, default_value_t = 10_000, value_parser = positive)]
    scenarios: usize,
    /// How many hosts
    #[arg(long, default_value_t = 1_000, value_parser = positive)]
    hosts: usize,
    /// How many of the hosts die [default: one in a hundred]
    #[arg(long)]
    dying: Option<usize>,
    /// How many times as long scenarios take as those of Shakedown itself: a server boots in five
    /// minutes where QEMU does in fifteen seconds
    #[arg(long, default_value_t = 20.0, value_parser = factor)]
    scale: f64,
    /// By how much scenarios miss their medians: the standard deviation of the logarithm
    #[arg(long, default_value_t = 0.2, value_parser = factor)]
    noise: f64,
    /// How many runs
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Of the first run; each further one has the next
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "a whole number above zero".into())
}

fn factor(text: &str) -> Result<f64, String> {
    let usable = |number: &f64| (0.0..=10_000.0).contains(number);
    text.parse().ok().filter(usable).ok_or_else(|| "a number from 0 to 10000".into())
}

impl Fleet {
    pub(super) fn run(self) -> Result<Verdict> {
        let Self { scenarios, hosts, scale, noise, .. } = self;
        let dying = self.dying.unwrap_or(hosts / 100).min(hosts.saturating_sub(1));
        let model = |seed| Model { scenarios, hosts, dying, scale, noise, seed };
        let seeds = self.seed..self.seed.saturating_add(self.runs);
        let reports: Vec<_> = seeds.map(|seed| simulation::simulate(&model(seed))).collect::<Result<_>>()?;
        let worst = |figure: &dyn Fn(&Report) -> f64| reports.iter().map(figure).fold(0.0, f64::max);
        let most = |figure: &dyn Fn(&Report) -> usize| reports.iter().map(figure).max().unwrap_or_default();
        let first = reports.first().context("nothing ran")?;
        let figures = [
            ("makespan_ratio", json!(round(worst(&Report::makespan_ratio)))),
            ("requests_per_second", json!(round(worst(&Report::requests_per_second)))),
            ("lost", json!(most(&|report| report.lost + report.given_up))),
            ("doubled", json!(most(&|report| report.doubled))),
            ("repeated", json!(most(&|report| report.repeated))),
            ("shards", json!(most(&|report| report.shards))),
            ("lost_shards", json!(most(&|report| report.lost_shards))),
            ("foreseen_ratio", json!(round(worst(&|r| r.makespan / r.foreseen_bound)))),
            ("peak_requests_per_second", json!(round(worst(&|report| report.peak_requests_per_second)))),
            (
                "agent_requests_per_second",
                json!(round(worst(&|report| report.agent_requests as f64 / report.makespan))),
            ),
            ("makespan_seconds", json!(round(first.makespan))),
            ("lower_bound_seconds", json!(round(first.lower_bound))),
            ("foreseen_bound_seconds", json!(round(first.foreseen_bound))),
            ("longest_scenario_seconds", json!(round(first.longest_scenario))),
            ("work_seconds", json!(round(first.total_work))),
        ];
        if !self.json {
            for (name, value) in &figures {
                terminal::print(&format!("{name:<28} {:>12}\n", value.to_string()))?;
            }
            return Ok(Verdict::Fine);
        }
        let mut result = serde_json::Map::new();
        result.insert("bench".into(), "fleet".into());
        result.insert("schema_version".into(), 1.into());
        result.extend(figures.map(|(name, value)| (name.to_owned(), value)));
        let ratios = |figure: &dyn Fn(&Report) -> f64| -> Vec<f64> {
            reports.iter().map(|report| round(figure(report))).collect()
        };
        result.insert(
            "samples".into(),
            json!({
                "makespan_ratio": ratios(&Report::makespan_ratio),
                "foreseen_ratio": ratios(&|r| r.makespan / r.foreseen_bound),
                "requests_per_second": ratios(&Report::requests_per_second),
            }),
        );
        result.insert(
            "model".into(),
            json!({
                "scenarios": scenarios, "hosts": hosts, "dying": dying, "scale": scale, "noise": noise,
                "first_seed": self.seed, "poll_seconds": simulation::POLL, "setup_seconds": simulation::SETUP,
                "finish_seconds": simulation::FINISH, "submission_seconds": simulation::SUBMISSION,
            }),
        );
        result.insert("runs".into(), self.runs.into());
        result.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        terminal::print_json(&Value::Object(result))?;
        Ok(Verdict::Fine)
    }
}

fn round(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}
