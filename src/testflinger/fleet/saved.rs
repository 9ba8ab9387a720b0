//! What of a run is on disk, in its run directory, so that another process can go on with it.
//!
//! `fleet.json` has the plan and the books, `verdicts.jsonl` a line for each scenario that has its
//! verdict, `shard.tar.gz` what travels with each shard. Each is written before what follows from it is
//! done, but for a verdict: that is in the ledger first, which is looked at as well.

use super::job::Common;
use super::shards::{Shard, Shards, State};
use super::show::Row;
use super::split::Index;
use crate::fault::Fault;
use crate::record::{Run, files, ledger};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const FLEET: &str = "fleet.json";
const VERDICTS: &str = "verdicts.jsonl";
const LOCK: &str = "fleet.lock";
const ARCHIVE: &str = "shard.tar.gz";

/// What a run is about. It does not change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Where its jobs are: scheme and host.
    pub server: String,
    /// What all jobs have in common.
    #[serde(flatten)]
    pub common: Common,
    /// The names of all scenarios.
    pub scenarios: Vec<String>,
}

/// `fleet.json`.
#[derive(Serialize, Deserialize)]
struct Content<P> {
    schema_version: u32,
    #[serde(flatten)]
    plan: P,
    shards: Vec<SavedShard>,
}

#[derive(Serialize, Deserialize)]
struct SavedShard {
    job_id: String,
    state: SavedState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost_because: Option<String>,
    agent: Option<String>,
    scenarios: Vec<String>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SavedState {
    /// The server may have heard of it.
    New,
    Waiting,
    Running,
    Ended,
    Lost,
    Cancelled,
}

/// A line of `verdicts.jsonl`.
#[derive(Serialize, Deserialize)]
struct Line<S> {
    scenario: S,
    #[serde(flatten)]
    row: Row,
}

/// The files of a run, which is this process's alone as long as this exists.
#[derive(Debug)]
pub struct Saved {
    directory: PathBuf,
    pub(super) plan: Plan,
    pub(super) index: HashMap<String, Index>,
    /// What `fleet.json` holds.
    written: Vec<u8>,
    verdicts: File,
    _lock: File,
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub struct Left {
    /// All shards there were, as far as it knew.
    pub shards: Vec<Shard>,
    /// The scenarios that have a verdict.
    pub rows: BTreeMap<Index, Row>,
}

impl Saved {
    /// Of a run that begins, and whose archive is made.
    ///
    /// # Errors
    /// A host [`Fault`] when its files cannot be written.
    pub fn begin(directory: &Path, plan: Plan) -> Result<Self> {
        let lock = lock(directory)?;
        let mut saved = Self::of(directory, plan, lock)?;
        saved.write(&[])?;
        Ok(saved)
    }

    /// Of a run that an earlier process began.
    ///
    /// # Errors
    /// A host [`Fault`] when that process still works on it, when it is no run of a fleet, when nothing
    /// is left to do, or when a file is damaged.
    pub fn resume(run: &Run) -> Result<(Self, Left)> {
        let directory = run.directory();
        let path = directory.join(FLEET);
        let fault = |what: &str| Fault::host(format!("run {} {what}", run.id()));
        if !path.exists() {
            bail!(fault("is none of a fleet, or submitted nothing").fix("start it anew"));
        }
        let lock = lock(directory)?;
        let content: Content<Plan> = files::read_json(&path)?;
        ensure!(
            content.schema_version == VERSION,
            fault(&format!("was written as version {}; this is {VERSION}", content.schema_version))
                .fix("use the shakedown that began it")
        );
        ensure!(directory.join(ARCHIVE).exists(), fault("has ended").fix("start it anew"));
        let mut saved = Self::of(directory, content.plan, lock)?;
        let index = saved.index.clone();
        let shard = |saved: SavedShard| Shard {
            scenarios: saved.scenarios.iter().filter_map(|name| index.get(name).copied()).collect(),
            job: saved.job_id,
            state: match saved.state {
                SavedState::New => State::New,
                SavedState::Waiting | SavedState::Running => State::Waiting,
                SavedState::Ended => State::Ended,
                SavedState::Lost => State::Lost(saved.lost_because.unwrap_or_default()),
                SavedState::Cancelled => State::Dropped,
            },
            agent: saved.agent,
        };
        let shards = content.shards.into_iter().map(shard).collect();
        let rows = saved.rows(run)?;
        Ok((saved, Left { shards, rows }))
    }

    fn of(directory: &Path, plan: Plan, lock: File) -> Result<Self> {
        let path = directory.join(VERDICTS);
        let verdicts = File::options().create(true).append(true).mode(0o600).open(&path);
        let verdicts = verdicts.with_context(|| files::cannot("write", &path))?;
        let index = plan.scenarios.iter().enumerate().map(|(index, name)| (name.clone(), index)).collect();
        Ok(Self { directory: directory.to_owned(), plan, index, written: Vec::new(), verdicts, _lock: lock })
    }

    /// The verdicts there are, those included that the ledger has and this does not.
    fn rows(&mut self, run: &Run) -> Result<BTreeMap<Index, Row>> {
        let path = self.directory.join(VERDICTS);
        let text = fs::read(&path).with_context(|| files::cannot("read", &path))?;
        if text.last().is_some_and(|byte| *byte != b'\n') {
            // The process died in the middle of a line.
            self.verdicts.write_all(b"\n").with_context(|| files::cannot("write", &path))?;
        }
        let lines = text.split(|byte| *byte == b'\n');
        let row = |line: Line<String>| Some((*self.index.get(&line.scenario)?, line.row));
        let mut rows: BTreeMap<_, _> =
            lines.filter_map(|line| serde_json::from_slice(line).ok()).filter_map(row).collect();
        if let Some(path) = run.ledger().filter(|path| path.exists()) {
            for record in ledger::read(path)?.flatten().filter(|record| record.run_id == run.id()) {
                let Some(index) = self.index.get(&record.scenario).copied() else { continue };
                if let std::collections::btree_map::Entry::Vacant(place) = rows.entry(index) {
                    let row = place.insert(Row::of(record, None)).clone();
                    self.keep(index, &row)?;
                }
            }
        }
        Ok(rows)
    }

    /// What travels with each shard.
    pub fn archive(directory: &Path) -> PathBuf {
        directory.join(ARCHIVE)
    }

    /// The directory of the run.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the run is about.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Writes the books down.
    pub(super) fn save(&mut self, shards: &Shards) -> Result<()> {
        self.write(shards.all())
    }

    fn write(&mut self, shards: &[Shard]) -> Result<()> {
        let shard = |shard: &Shard| SavedShard {
            job_id: shard.job.clone(),
            state: match shard.state {
                State::New => SavedState::New,
                State::Waiting => SavedState::Waiting,
                State::Running { .. } => SavedState::Running,
                State::Ended => SavedState::Ended,
                State::Lost(_) => SavedState::Lost,
                State::Dropped => SavedState::Cancelled,
            },
            lost_because: match &shard.state {
                State::Lost(why) => Some(why.clone()),
                _ => None,
            },
            agent: shard.agent.clone(),
            scenarios: shard.scenarios.iter().map(|index| self.plan.scenarios[*index].clone()).collect(),
        };
        let shards = shards.iter().map(shard).collect();
        let path = self.directory.join(FLEET);
        let content = Content { schema_version: VERSION, plan: &self.plan, shards };
        let text = serde_json::to_vec(&content).with_context(|| files::cannot("write", &path))?;
        if text != self.written {
            files::replace(&path, &text)?;
            self.written = text;
        }
        Ok(())
    }

    /// Writes a verdict down.
    pub(super) fn keep(&mut self, scenario: Index, row: &Row) -> Result<()> {
        let path = || self.directory.join(VERDICTS);
        let line = Line { scenario: &self.plan.scenarios[scenario], row: row.clone() };
        let mut line = serde_json::to_vec(&line).with_context(|| files::cannot("write", &path()))?;
        line.push(b'\n');
        self.verdicts.write_all(&line).with_context(|| files::cannot("write", &path()))
    }
}

/// Whether the run in this directory is one of a fleet that was killed: nobody works on it, and it has
/// not ended.
pub fn was_killed(directory: &Path) -> bool {
    let is_left = directory.join(FLEET).exists() && directory.join(ARCHIVE).exists();
    is_left && lock(directory).is_ok()
}

fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    let lock = files::lock_file(&path).with_context(|| files::cannot("lock", &path))?;
    if !files::try_lock(&lock).with_context(|| files::cannot("lock", &path))? {
        bail!(
            Fault::host(format!("another process works on the run in {}", directory.display()))
                .fix("wait for its end")
        );
    }
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Environment, Outcome};
    use std::time::Duration;

    fn plan() -> Plan {
        let common =
            Common { queue: "q".into(), tag: "t".into(), markers: Some("vm".into()), ..Common::default() };
        Plan { server: "http://h".into(), common, scenarios: ["a", "b", "c"].map(String::from).into() }
    }

    fn run(root: &Path) -> Run {
        let vars = [("BOOT_IMAGE_VM_LOG_ROOT".into(), root.join("notes").into_os_string())];
        let environment = Environment::from_vars(vars, root).expect("an environment");
        Run::start(Environment { ledger: Some(root.join("ledger.jsonl")), ..environment }).expect("a run")
    }

    fn row(outcome: Outcome) -> Row {
        Row { outcome, seconds: 1.5, host: "rack1".into(), reason: None }
    }

    #[test]
    fn what_a_process_leaves_the_next_one_finds() {
        let dir = tempfile::tempdir().expect("dir");
        let run = run(dir.path());
        Saved::resume(&run).expect_err("nothing is there yet");
        fs::write(Saved::archive(run.directory()), "x").expect("writes");
        let mut saved = Saved::begin(run.directory(), plan()).expect("begins");
        let shard = |scenarios: &[Index], state| Shard {
            scenarios: scenarios.into(),
            job: format!("job{}", scenarios.len()),
            state,
            agent: Some("rack1".into()),
        };
        let running =
            State::Running { since: Duration::ZERO, heard: Duration::ZERO, testing: true, over: false };
        let all =
            [shard(&[0, 1], State::Lost("it died".into())), shard(&[1], State::New), shard(&[], running)];
        saved.write(&all).expect("writes");
        saved.keep(0, &row(Outcome::Failed)).expect("writes");
        run.not_run(Outcome::Ignored, &[("c", &[], "why"), ("of another plan", &[], "")]).expect("writes");
        saved.verdicts.write_all(b"{\"scenario\":\"b\",").expect("writes"); // and dies
        assert!(!was_killed(run.directory()), "it is being worked on");
        assert!(Saved::resume(&run).expect_err("so it is").to_string().contains("another process"));
        drop(saved);
        assert!(was_killed(run.directory()));
        for _ in 0..2 {
            let (saved, left) = Saved::resume(&run).expect("goes on");
            assert_eq!(saved.plan().common.markers.as_deref(), Some("vm"));
            let states: Vec<_> = left.shards.iter().map(|shard| shard.state.clone()).collect();
            assert_eq!(states, [State::Lost("it died".into()), State::New, State::Waiting]);
            assert_eq!(left.shards[0].scenarios, [0, 1]);
            let outcomes: Vec<_> = left.rows.iter().map(|(index, row)| (*index, row.outcome)).collect();
            assert_eq!(outcomes, [(0, Outcome::Failed), (2, Outcome::Ignored)]);
            assert_eq!(left.rows[&0], row(Outcome::Failed));
        }
        fs::remove_file(Saved::archive(run.directory())).expect("removes");
        assert!(Saved::resume(&run).expect_err("it has ended").to_string().contains("has ended"));
    }
}
