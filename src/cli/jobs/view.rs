//! Jobs as they go: a table that moves on a terminal, plain lines elsewhere.

use super::{outcome, short};
use crate::cli::table::Table;
use crate::cli::terminal::{self, Paint};
use indicatif::{ProgressBar, ProgressStyle};
use shakedown::deadline::human;
use shakedown::testflinger::jobs::{News, Outcome, Row};
use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

/// A log in which nothing happens for longer looks dead to who watches it.
const SILENCE: Duration = Duration::from_secs(300);

/// Those that go on, and since when they are in their state.
pub(super) struct View {
    bar: Option<ProgressBar>,
    rows: Vec<(Row, Instant)>,
    said: Instant,
}

impl View {
    pub(super) fn new() -> Self {
        let bar = terminal::interactive().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {elapsed:>4} [{bar:20}] {pos}/{len} {msg}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, rows: Vec::new(), said: Instant::now() }
    }

    pub(super) fn show(&mut self, news: News) {
        match news {
            News::Begun { rows, resumed } => {
                if let Some(began) = resumed {
                    let ended = rows.iter().filter(|row| row.outcome.is_some()).count();
                    let submitted = rows.iter().filter(|row| row.job_id.is_some()).count();
                    let of = rows.len();
                    self.say(&format!(
                        "going on with the run of {began}: of {of} machines, {submitted} have a job, {ended} of them ended"
                    ));
                }
                self.rows = rows.into_iter().map(|row| (row, Instant::now())).collect();
            }
            News::Changed(row) => {
                // The table has the rest.
                if self.bar.is_none() || row.outcome.is_some() {
                    self.say(&line(&row));
                }
                if let Some(known) = self.rows.iter_mut().find(|(known, _)| known.machine == row.machine) {
                    *known = (row, Instant::now());
                }
            }
            News::Trouble { what, wait } => {
                self.say(&format!("{}; next try in {}", short_of(&what, 300), human(wait)));
            }
            News::Tick if self.bar.is_none() && self.said.elapsed() >= SILENCE => {
                let summary = self.summary();
                self.say(&summary);
            }
            News::Tick => {}
        }
        self.draw();
    }

    /// How many jobs are on the server and have not ended.
    pub(super) fn unfinished(&self) -> usize {
        self.rows.iter().filter(|(row, _)| row.job_id.is_some() && row.outcome.is_none()).count()
    }

    /// Takes the table away.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// How many are in which state.
    fn summary(&self) -> String {
        let mut states = BTreeMap::<_, usize>::new();
        for (row, _) in &self.rows {
            let state = row.outcome.map(|outcome| outcome.to_string()).or_else(|| row.state.clone());
            *states.entry(short(state.as_deref().unwrap_or("not submitted"))).or_default() += 1;
        }
        let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
        format!("{} machines: {}", self.rows.len(), states.join(", "))
    }

    fn say(&mut self, line: &str) {
        self.said = Instant::now();
        match &self.bar {
            Some(bar) => bar.println(line),
            None => terminal::say(line),
        }
    }

    fn draw(&self) {
        let Some(bar) = &self.bar else { return };
        bar.set_length(self.rows.len() as u64);
        bar.set_position(self.rows.iter().filter(|(row, _)| row.outcome.is_some()).count() as u64);
        let passed = self.rows.iter().filter(|(row, _)| row.outcome == Some(Outcome::Passed)).count();
        let going: Vec<_> = self.rows.iter().filter(|(row, _)| row.outcome.is_none()).collect();
        // The rest of the screen is for the lines above.
        let height = usize::from(rustix::termios::tcgetwinsize(io::stderr()).map_or(24, |size| size.ws_row));
        let most = (height / 2).max(3);
        let mut table = Table::new(["MACHINE", "JOB", "STATE", "SINCE"]);
        for (row, since) in going.iter().take(most) {
            let job = short(row.job_id.as_deref().unwrap_or("-"));
            let since = human(Duration::from_secs(since.elapsed().as_secs()));
            table.row([row.machine.clone().into(), job.into(), outcome(row), since.into()]);
        }
        let more = match going.len().saturating_sub(most) {
            0 => String::new(),
            more => format!("and {more} more\n"),
        };
        let table = if going.is_empty() { String::new() } else { table.render(Paint::of(&io::stderr())) };
        bar.set_message(format!("ended, {passed} passed\n{table}{more}"));
    }
}

/// What changed, in a line.
fn line(row: &Row) -> String {
    // At its beginning and its end: it is what one looks for in a log.
    let is_news = row.outcome.is_some() || row.state.as_deref() == Some("submitted");
    let job = row.job_id.as_deref().filter(|_| is_news).map(|job| format!(" (job {})", short(job)));
    let job = job.unwrap_or_default();
    let reason =
        row.reason.as_deref().map(|reason| format!(": {}", short_of(reason, 400))).unwrap_or_default();
    let state = match (row.outcome, &row.state) {
        (Some(outcome), _) => outcome.to_string(),
        (None, Some(state)) => short(state),
        (None, None) => "not submitted".into(),
    };
    format!("{}: {state}{job}{reason}", row.machine)
}

fn short_of(text: &str, longest: usize) -> String {
    let line = shakedown::fault::visible(text).replace(['\n', '\t'], " ");
    line.chars().take(longest).collect()
}
