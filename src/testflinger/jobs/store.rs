//! The output directory: what is known of each machine's job, on disk before it is acted upon.
//!
//! `<machine>/tf_job_id.txt`, `output.txt` and `hw_status.txt` are as in the original script. What it
//! takes to go on after an interruption is in `<machine>/job.json` and `.run.json`.

use super::machines::is_machine;
use super::outcome::Outcome;
use crate::fault::Fault;
use crate::record::files;
use crate::record::metadata::Utc;
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const JOB: &str = "job.json";
const ID: &str = "tf_job_id.txt";
/// What the test printed.
pub(super) const OUTPUT: &str = "output.txt";
/// The status of the hardware that is in it.
pub(super) const HW_STATUS: &str = "hw_status.txt";

/// `.run.json`: the run that the output directory is about. A machine's name has no dot first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RunFile {
    pub(super) schema_version: u32,
    /// Of all jobs of the run, and of no others.
    pub(super) tag: String,
    pub(super) server: String,
    pub(super) started_at: Utc,
    pub(super) machines: Vec<String>,
}

impl RunFile {
    pub(super) fn new(server: &str, machines: Vec<String>) -> Self {
        let tag = format!("shakedown-{}", uuid::Uuid::new_v4());
        Self { schema_version: VERSION, tag, server: server.to_owned(), started_at: Utc::now(), machines }
    }
}

/// How far the submission of a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// Nothing was sent. Never on disk.
    Planned,
    /// It may be on the server.
    Intended,
    /// It is on the server; its attachments may not be.
    Submitted,
    /// All of it is on the server.
    Queued,
}

/// `job.json`: the job of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Job {
    schema_version: u32,
    pub(super) machine: String,
    /// The tag of the run; empty for a job of another program.
    pub(super) run: String,
    /// Chosen by us, before the submission.
    pub(super) job_id: String,
    /// 1 for the first job of the machine in this run.
    pub(super) attempt: u32,
    pub(super) stage: Stage,
    pub(super) asks_for_test: bool,
    pub(super) submitted_at: Utc,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ended: Option<Ended>,
    /// The ledger has it.
    #[serde(default)]
    pub(super) recorded: bool,
    /// Another attempt follows.
    #[serde(default)]
    pub(super) retry: bool,
    /// The ids of the machine's earlier jobs, so that none is lost.
    #[serde(default)]
    pub(super) previous: Vec<String>,
    /// What is true again if the server refuses this job: only as long as it may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) before: Option<Box<Job>>,
}

/// The end of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) at: Utc,
    pub(super) outcome: Outcome,
    pub(super) reason: Option<String>,
    #[serde(default)]
    pub(super) statuses: BTreeMap<Phase, i64>,
    /// The largest of those that count.
    pub(super) exit: Option<i64>,
    pub(super) hw_status: Option<String>,
}

impl Job {
    /// A job that nobody has submitted. It remembers the ids of the machine's job before it.
    pub(super) fn planned(machine: &str, run: &str, before: Option<Self>) -> Self {
        let attempt = before.as_ref().filter(|job| job.run == run).map_or(1, |job| job.attempt + 1);
        // Of an earlier run, what ended is in the ledger.
        let kept = before.as_ref().filter(|job| job.run == run || job.ended.is_none());
        let previous = kept.map(|job| [job.previous.as_slice(), std::slice::from_ref(&job.job_id)].concat());
        Self {
            schema_version: VERSION,
            machine: machine.to_owned(),
            run: run.to_owned(),
            job_id: uuid::Uuid::new_v4().to_string(),
            attempt,
            stage: Stage::Planned,
            asks_for_test: false,
            submitted_at: Utc::now(),
            ended: None,
            recorded: false,
            retry: false,
            previous: previous.unwrap_or_default(),
            before: before.map(Box::new),
        }
    }

    /// A job of which only the id is known: another program submitted it.
    fn foreign(machine: &str, job_id: &str, submitted_at: Utc) -> Self {
        let planned = Self::planned(machine, "", None);
        Self { job_id: job_id.to_owned(), stage: Stage::Queued, submitted_at, ..planned }
    }
}

/// The output directory, which is ours alone as long as this exists.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    _lock: File,
}

impl Store {
    /// Opens the directory, making it where it is missing.
    ///
    /// # Errors
    /// A host [`Fault`] when that cannot be, or another process works there.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        if !directory.is_dir() {
            let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
            parent
                .map_or(Ok(()), fs::create_dir_all)
                .and_then(|()| files::private_dir(directory))
                .with_context(|| files::cannot("make", directory))?;
        }
        let path = directory.join(".lock");
        let lock = files::lock_file(&path).with_context(|| files::cannot("lock", &path))?;
        let locked = files::try_lock(&lock).with_context(|| files::cannot("lock", &path))?;
        if !locked {
            return Err(Fault::host(format!("another `shakedown jobs` works in {}", directory.display()))
                .fix("wait for it, or give this one an `--output-dir` of its own")
                .into());
        }
        Ok(Self { directory: directory.to_owned(), _lock: lock })
    }

    fn run_path(&self) -> PathBuf {
        self.directory.join(".run.json")
    }

    pub(super) fn machine_dir(&self, machine: &str) -> PathBuf {
        self.directory.join(machine)
    }

    /// The run that the directory is about.
    pub(super) fn run(&self) -> Result<Option<RunFile>> {
        let run: Option<RunFile> = read(&self.run_path())?;
        if let Some(run) = &run {
            check_version(&self.run_path(), run.schema_version)?;
            ensure!(
                run.machines.iter().all(|machine| is_machine(machine)),
                Fault::host(format!("{} names machines that are none", self.run_path().display()))
            );
        }
        Ok(run)
    }

    pub(super) fn save_run(&self, run: &RunFile) -> Result<()> {
        files::write_json(&self.run_path(), run)
    }

    /// The job of a machine, ours or that of another program.
    pub(super) fn job(&self, machine: &str) -> Result<Option<Job>> {
        let path = self.machine_dir(machine).join(JOB);
        if let Some(job) = read::<Job>(&path)? {
            check_version(&path, job.schema_version)?;
            let id = &job.job_id;
            ensure!(
                job.machine == machine && uuid::Uuid::try_parse(id).is_ok(),
                Fault::host(format!("{} is not about {machine}, or its `job_id` is no UUID", path.display()))
            );
            return Ok(Some(job));
        }
        let path = self.machine_dir(machine).join(ID);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| files::cannot("read", &path)),
        };
        let id = uuid::Uuid::try_parse(text.trim()).with_context(|| {
            Fault::host(format!("{} has no id of a job", path.display())).fix("correct it, or remove it")
        })?;
        let modified = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
        let at =
            modified.and_then(|time| jiff::Timestamp::try_from(time).ok()).map_or_else(Utc::now, Utc::from);
        Ok(Some(Job::foreign(machine, &id.to_string(), at)))
    }

    /// Writes `job.json`; it is on disk before what it says is done.
    pub(super) fn save(&self, job: &Job) -> Result<()> {
        let directory = self.machine_dir(&job.machine);
        match files::private_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| files::cannot("make", &directory));
            }
            _ => {}
        }
        files::write_json(&directory.join(JOB), job)
    }

    /// The id where others look for it, without a newline.
    pub(super) fn write_id(&self, job: &Job) -> Result<()> {
        self.write(&job.machine, ID, &job.job_id)
    }

    pub(super) fn write(&self, machine: &str, name: &str, text: &str) -> Result<()> {
        files::replace(&self.machine_dir(machine).join(name), text.as_bytes())
    }

    /// Removes what an earlier job left: what is there then is of the job that follows.
    pub(super) fn clear(&self, machine: &str) -> Result<()> {
        let phases = Phase::ALL.map(log_of);
        for name in phases.iter().map(String::as_str).chain([ID, OUTPUT, HW_STATUS]) {
            files::remove(&self.machine_dir(machine).join(name))?;
        }
        Ok(())
    }

    /// Forgets a job that the server refused: what was known before is so again.
    pub(super) fn forget(&self, job: &Job) -> Result<()> {
        match &job.before {
            Some(before) if !before.run.is_empty() => self.save(before),
            _ => files::remove(&self.machine_dir(&job.machine).join(JOB)),
        }
    }

    /// The machines that have a job here, by name.
    pub(super) fn machines(&self) -> Result<Vec<String>> {
        let entries =
            fs::read_dir(&self.directory).with_context(|| files::cannot("read", &self.directory))?;
        let mut machines = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| files::cannot("read", &self.directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let has = |file| entry.path().join(file).exists();
            if is_machine(&name) && (has(JOB) || has(ID)) {
                machines.push(name);
            }
        }
        machines.sort();
        Ok(machines)
    }
}

/// Where the output of a phase goes that failed before the test.
pub(super) fn log_of(phase: Phase) -> String {
    format!("{phase}_output.txt")
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let fix =
        || Fault::host(format!("{} is damaged", path.display())).fix("move it away; ids of jobs are in it");
    files::read_json(path).map(Some).with_context(fix)
}

fn check_version(path: &Path, version: u32) -> Result<()> {
    ensure!(
        version == VERSION,
        Fault::host(format!("{} has version {version}; this shakedown knows {VERSION}", path.display()))
            .fix("use the shakedown that wrote it, or another `--output-dir`")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID_TEXT: &str = "3b4cf884-c994-46c6-baf0-b56ebf12cd12";

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("temp dir");
        let store = Store::open(&dir.path().join("deep/er")).expect("opens");
        (dir, store)
    }

    #[test]
    fn jobs_are_kept_and_their_ids_never_lost() {
        let (_dir, store) = store();
        assert_eq!(store.job("m1").expect("reads"), None);
        let first = Job::planned("m1", "tag", None);
        store.save(&first).expect("saves");
        assert_eq!(store.job("m1").expect("reads"), Some(first.clone()));
        let second = Job::planned("m1", "tag", Some(first.clone()));
        let third = Job::planned("m1", "tag", Some(second.clone()));
        assert_eq!((third.attempt, &third.previous), (3, &vec![first.job_id.clone(), second.job_id.clone()]));
        let other_run = Job::planned("m1", "other", Some(second.clone()));
        assert_eq!((other_run.attempt, other_run.previous.len()), (1, 2), "they may go on");
        store.save(&second).expect("saves");
        store.forget(&second).expect("forgets");
        assert_eq!(store.job("m1").expect("reads"), Some(first.clone()), "the server refused the second one");
        store.forget(&first).expect("forgets");
        assert_eq!(store.job("m1").expect("reads"), None);
    }

    #[test]
    fn jobs_of_the_original_script_are_known_by_their_id() {
        let (_dir, store) = store();
        for (machine, id) in [("m1", ID_TEXT), ("m2", "rm -rf /"), ("empty", "")] {
            fs::create_dir(store.machine_dir(machine)).expect("makes");
            if !id.is_empty() {
                fs::write(store.machine_dir(machine).join(ID), id).expect("writes");
            }
        }
        let job = store.job("m1").expect("reads").expect("there");
        assert_eq!((job.job_id.as_str(), job.run.as_str(), job.stage), (ID_TEXT, "", Stage::Queued));
        assert!(store.job("m2").is_err(), "no UUID");
        assert_eq!(store.machines().expect("lists"), ["m1", "m2"]);
    }

    #[test]
    fn two_at_once_are_refused() {
        let (dir, _store) = store();
        let error = Store::open(&dir.path().join("deep/er")).expect_err("locked");
        assert!(error.to_string().contains("another `shakedown jobs`"), "{error}");
    }

    #[test]
    fn what_is_damaged_or_newer_is_an_error_with_its_path() {
        let (_dir, store) = store();
        let job = Job::planned("m1", "tag", None);
        store.save(&Job { schema_version: 2, ..job.clone() }).expect("saves");
        assert!(format!("{:#}", store.job("m1").expect_err("newer")).contains("m1/job.json"));
        store.save(&Job { job_id: "../x".into(), ..job }).expect("saves");
        assert!(store.job("m1").is_err(), "no UUID");
        fs::write(store.run_path(), "{").expect("writes");
        assert!(format!("{:#}", store.run().expect_err("damaged")).contains(".run.json"));
    }
}
