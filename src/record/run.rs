//! One invocation: its run directory, its identity in `run.json`, and what all its scenarios share.
//!
//! The processes of one `cargo nextest run` are one run. Does not decide what runs.

use super::ledger::{self, Record};
use super::metadata::{
    BootKind, Git, Host, Metadata, Outcome, SCHEMA_VERSION, SESSION_CEILING_SECONDS, Timeouts, Timings, Utc,
};
use super::{Environment, Evidence, files};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process;
use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A run, from the point of view of one of its processes.
#[derive(Debug)]
pub struct Run {
    directory: PathBuf,
    environment: Environment,
    harness_args: Vec<String>,
    file: RunFile,
    joined: bool,
}

/// `run.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct RunFile {
    pub schema_version: u32,
    pub run_id: String,
    /// Of the process that began the run.
    pub argv: Vec<String>,
    pub cwd: PathBuf,
    /// The directory of the project's `Cargo.toml`.
    pub project: PathBuf,
    pub started_at: Utc,
    pub host: Host,
    pub git: Option<Git>,
    pub env: BTreeMap<String, String>,
    pub shakedown_version: String,
    /// What processes of the same run know it by: nextest's own id of it, or the name of a run of jobs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nextest_run_id: Option<String>,
    /// When the last of its processes so far ended; absent where that was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Utc>,
    /// By then it had lasted [`SESSION_CEILING_SECONDS`] or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_ceiling_exceeded: Option<bool>,
}

impl Run {
    /// Begins a run, or joins the one of which this process is a part (`NEXTEST_RUN_ID`). Writes
    /// to the disk and asks git, so not for a mere list of scenarios.
    ///
    /// # Errors
    /// A host [`Fault`] when the run directory cannot be made.
    pub fn start(environment: Environment) -> Result<Self> {
        // nextest documents it as the same UUID in all processes of one run.
        let shared = std::env::var("NEXTEST_RUN_ID").ok().filter(|id| !id.is_empty());
        Self::start_in(environment, shared)
    }

    /// Begins the run of this name, or goes on with it: for what outlives the process that began it.
    ///
    /// # Errors
    /// As [`Run::start`].
    pub fn named(environment: Environment, name: &str) -> Result<Self> {
        Self::start_in(environment, Some(name.to_owned()))
    }

    /// Goes on with the run of this id, whose process is gone.
    ///
    /// # Errors
    /// A host [`Fault`] when there is none.
    pub fn reopen(environment: Environment, id: &str) -> Result<Self> {
        let is_name = Path::new(id).components().eq([Component::Normal(id.as_ref())]);
        let directory = environment.log_root.join(id);
        if !is_name || !directory.join("run.json").exists() {
            let roots = environment.log_root.display();
            bail!(
                Fault::host(format!("there is no run `{id}`"))
                    .fix(format!("its id is a directory's name in {roots}"))
            );
        }
        // Not the name of a link to it.
        let directory = fs::canonicalize(&directory).with_context(|| files::cannot("find", &directory))?;
        let file = files::read_json(&directory.join("run.json"))?;
        let harness_args = arguments().into_iter().skip(1).collect();
        Ok(Self { directory, environment, harness_args, file, joined: true })
    }

    pub(super) fn start_in(environment: Environment, shared: Option<String>) -> Result<Self> {
        let log_root = &environment.log_root;
        fs::create_dir_all(log_root).with_context(|| files::cannot("make", log_root))?;
        let mut argv = arguments();
        let lock = RootLock::take(log_root)?;
        let joined = match &shared {
            Some(shared) => find(log_root, &shared_id(shared))?,
            None => None,
        };
        let (directory, file, joined) = match joined {
            Some(directory) => {
                let file = files::read_json(&directory.join("run.json"))?;
                (directory, file, true)
            }
            None => {
                let (directory, file) = begin(&environment, argv.clone(), shared)?;
                (directory, file, false)
            }
        };
        drop(lock);
        let harness_args = argv.split_off(argv.len().min(1));
        Ok(Self { directory, environment, harness_args, file, joined })
    }

    /// Its id: the name of its directory, which no other run in this log root has.
    pub fn id(&self) -> &str {
        &self.file.run_id
    }

    /// Whether another process began it.
    pub fn joined(&self) -> bool {
        self.joined
    }

    /// Writes into `run.json` that this process is done with it.
    ///
    /// # Errors
    /// A host [`Fault`] when the file cannot be written.
    pub fn end(&self) -> Result<()> {
        let path = self.directory.join("run.json");
        let _lock = RootLock::take(&self.environment.log_root)?;
        let mut file: RunFile = files::read_json(&path)?;
        let now = Utc::now();
        file.ended_at = Some(now);
        file.session_ceiling_exceeded = Some(now.seconds_since(file.started_at) >= SESSION_CEILING_SECONDS);
        files::write_json(&path, &file)
    }

    /// When its first process began it.
    pub fn started_at(&self) -> Timestamp {
        self.file.started_at.into()
    }

    /// The run directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The settings from the environment.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The ledger; `None` when it is turned off.
    pub fn ledger(&self) -> Option<&Path> {
        self.environment.ledger.as_deref()
    }

    /// Begins an execution of a scenario: its identity is on disk when this returns.
    ///
    /// # Errors
    /// A host [`Fault`] when its directory cannot be made.
    pub fn scenario(&self, name: &str, markers: &[&str]) -> Result<Evidence> {
        Evidence::create(self, &self.environment.log_root, self.metadata(name, markers), self.ledger())
    }

    /// As [`Run::scenario`] for something that is no scenario and has no ledger line: the boot of a
    /// machine that scenarios shall fork from.
    ///
    /// # Errors
    /// As [`Run::scenario`].
    pub fn aside(&self, name: &str) -> Result<Evidence> {
        Evidence::create(self, &self.environment.log_root, self.metadata(name, &[]), None)
    }

    /// Records scenarios that did not run (`ignored`, `deferred`): ledger lines and nothing else,
    /// all in one write. Each is (name, markers, reason).
    ///
    /// # Errors
    /// A host [`Fault`] when the ledger cannot be written.
    pub fn not_run(&self, outcome: Outcome, scenarios: &[(&str, &[&str], &str)]) -> Result<()> {
        let Some(ledger) = self.ledger() else { return Ok(()) };
        let record = |(name, markers, reason): &(&str, &[&str], &str)| {
            let mut metadata = self.metadata(name, markers);
            metadata.outcome = Some(outcome);
            metadata.reason = Some((*reason).to_owned());
            Record::of(&metadata, None)
        };
        ledger::append(ledger, &scenarios.iter().map(record).collect::<Vec<_>>())
    }

    /// All that is known before a scenario begins.
    fn metadata(&self, name: &str, markers: &[&str]) -> Metadata {
        Metadata {
            schema_version: SCHEMA_VERSION,
            generated_at: Utc::now(),
            run_id: self.file.run_id.clone(),
            scenario: name.to_owned(),
            attempt: 1,
            markers: markers.iter().map(|marker| (*marker).to_owned()).collect(),
            outcome: None,
            reason: None,
            boot: BootKind::None,
            accelerator: None,
            firmware: None,
            image: None,
            artifact: None,
            logs: None,
            qemu: None,
            ssh: None,
            diagnostics: None,
            timings: Timings::default(),
            session_ceiling_exceeded: None,
            timeouts: Timeouts {
                spawn_seconds: self.environment.spawn_timeout.as_secs(),
                login_seconds: self.environment.login_timeout.as_secs(),
            },
            harness_args: self.harness_args.clone(),
            host: self.file.host.clone(),
            git: self.file.git.clone(),
            env: self.environment.overrides.clone(),
        }
    }
}

/// The command line of this process, as it may be written down and shown: without the logins that
/// addresses of servers may have.
pub fn arguments() -> Vec<String> {
    without_logins(std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()))
}

fn without_logins(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    const SERVER: &str = "--server";
    let mut is_server = false;
    let hide = |argument: String| {
        let was_server = std::mem::replace(&mut is_server, argument == SERVER);
        let value = argument.strip_prefix(SERVER).and_then(|rest| rest.strip_prefix('='));
        let scheme = argument.find("://").map(|at| at + "://".len());
        let start = scheme.or(value.map(|value| argument.len() - value.len())).or(was_server.then_some(0));
        let Some(start) = start else { return argument };
        let end = argument[start..].find(['/', '?', '#']).map_or(argument.len(), |length| start + length);
        match argument[start..end].rfind('@') {
            Some(at) => format!("{}{}", &argument[..start], &argument[start + at + 1..]),
            None => argument,
        }
    };
    arguments.into_iter().map(hide).collect()
}

/// Makes the run directory; the caller holds the lock of the log root.
fn begin(environment: &Environment, argv: Vec<String>, shared: Option<String>) -> Result<(PathBuf, RunFile)> {
    let log_root = &environment.log_root;
    let started_at = Utc::now();
    let id = shared.as_deref().map_or_else(random_id, shared_id);
    let run_id = format!("{}-{id}", started_at.compact());
    let directory = log_root.join(&run_id);
    let file = RunFile {
        schema_version: SCHEMA_VERSION,
        run_id: run_id.clone(),
        argv,
        cwd: std::env::current_dir().unwrap_or_default(),
        project: environment.project.clone(),
        started_at,
        host: host(),
        git: git(&environment.project),
        env: environment.overrides.clone(),
        shakedown_version: env!("CARGO_PKG_VERSION").to_owned(),
        nextest_run_id: shared,
        ended_at: None,
        session_ceiling_exceeded: None,
    };
    files::private_dir(&directory).with_context(|| files::cannot("make", &directory))?;
    files::write_json(&directory.join("run.json"), &file)?;
    point_latest(log_root, &run_id)?;
    Ok((directory, file))
}

/// The run directory with this id that another process of the run has made.
fn find(log_root: &Path, id: &str) -> Result<Option<PathBuf>> {
    let suffix = format!("-{id}");
    for entry in fs::read_dir(log_root).with_context(|| files::cannot("read", log_root))? {
        let entry = entry.with_context(|| files::cannot("read", log_root))?;
        if entry.file_name().to_string_lossy().ends_with(&suffix) && entry.path().join("run.json").exists() {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Replaces the `latest` link in one step.
fn point_latest(log_root: &Path, run_id: &str) -> Result<()> {
    let (new, latest) = (log_root.join(".latest-new"), log_root.join("latest"));
    files::remove(&new)?;
    symlink(run_id, &new).and_then(|()| fs::rename(&new, &latest)).with_context(|| {
        files::cannot("replace the link", &latest).fix(format!("remove {}", latest.display()))
    })
}

fn random_id() -> String {
    // The standard library's only source of randomness: a fresh `RandomState` hashes differently.
    let random = std::hash::RandomState::new().build_hasher().finish();
    format!("{:08x}", random as u32)
}

/// Hashed, because some kinds of UUID begin with the time.
fn shared_id(shared: &str) -> String {
    Sha256::digest(shared).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn host() -> Host {
    let info = rustix::system::sysinfo();
    Host {
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory: info.totalram as u64 * u64::from(info.mem_unit),
    }
}

/// Commit and cleanliness by one call of git, a few milliseconds; `None` without git or checkout.
fn git(project: &Path) -> Option<Git> {
    let mut command = Command::new("git");
    command.arg("-C").arg(project).args(["--no-optional-locks", "status", "--porcelain=v2", "--branch"]);
    command.arg("--untracked-files=no");
    let text = process::output(command, &Deadline::after(Duration::from_secs(2), "git status")).ok()?;
    let commit = text.lines().find_map(|line| line.strip_prefix("# branch.oid "))?;
    let dirty = text.lines().any(|line| !line.starts_with('#'));
    (commit != "(initial)").then(|| Git { commit: commit.to_owned(), dirty })
}

/// The lock under which run directories and markers appear and are swept; held for milliseconds.
pub(super) struct RootLock {
    _file: File,
}

impl RootLock {
    pub(super) fn take(log_root: &Path) -> Result<Self> {
        let path = log_root.join(".lock");
        let open = || -> io::Result<File> { files::lock_file(&path) };
        let file = open().with_context(|| files::cannot("lock", &path))?;
        files::lock(&file, &path)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests;
