//! Hosts that take jobs from the fake server and run their scripts.

use crate::server::{Job, Server, State};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

pub(crate) const QUEUE: &str = "fleet";

/// What a host does with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// As it should.
    Works,
    /// Runs it, and dies when the first scenario is on record: nothing comes back but what was said.
    DiesAfterOne,
    /// Has none of the libraries that the test binary needs.
    CannotStart,
    /// Never gets as far as a test.
    CannotProvision,
    /// Runs it, and brings back what is none of its business.
    Lies,
    /// Keeps it for ever.
    Holds,
}

/// The executable of an example.
pub(crate) fn example(name: &str) -> &'static Path {
    static EXAMPLES: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    let examples = EXAMPLES.get_or_init(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args(["build", "--examples", "--message-format", "json-render-diagnostics"]);
        let built = cargo.output().expect("cargo runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let executable = |line: &str| {
            let message: Value = serde_json::from_str(line).ok()?;
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, PathBuf::from(message["executable"].as_str()?)))
        };
        String::from_utf8_lossy(&built.stdout).lines().filter_map(executable).collect()
    });
    &examples[name]
}

/// A server, hosts, and a project whose scenarios they run.
pub(crate) struct Lab {
    pub(crate) server: Server,
    pub(crate) dir: tempfile::TempDir,
    /// The test binary.
    pub(crate) binary: PathBuf,
    stop: Arc<AtomicBool>,
    hosts: Vec<std::thread::JoinHandle<()>>,
}

impl Lab {
    /// With these hosts, which are called `host0` and so on.
    pub(crate) fn new(manners: &[Manner]) -> Self {
        let (server, dir) = (Server::start(), tempfile::tempdir().expect("temp dir"));
        let agents = (0..manners.len()).map(|n| json!({"name": format!("host{n}"), "state": "waiting"}));
        server.state().queues.insert(QUEUE.into(), agents.collect());
        let stop = Arc::new(AtomicBool::new(false));
        std::fs::write(dir.path().join("Cargo.toml"), "[package]\nname = \"p\"\nversion = \"0.1.0\"\n")
            .expect("writes");
        let hosts = manners
            .iter()
            .enumerate()
            .map(|(number, manner)| {
                let host = Host {
                    name: format!("host{number}"),
                    manner: *manner,
                    server: server.clone(),
                    stop: Arc::clone(&stop),
                    dir: dir.path().join(format!("host{number}")),
                };
                std::thread::spawn(move || host.work())
            })
            .collect();
        // What travels is small, since the hosts are this one.
        let binary = dir.path().join("scenarios.sh");
        let script = format!("#!/bin/sh\nexec '{}' \"$@\"\n", example("selftest").display());
        std::fs::write(&binary, script).expect("writes");
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("sets");
        Self { server, dir, binary, stop, hosts }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.bare_command();
        command.args(["--queue", QUEUE, "--binary"]).arg(&self.binary).args(arguments);
        command
    }

    /// One that goes on with a run, which says what it is about.
    pub(crate) fn resume(&self, run: &str) -> Command {
        let mut command = self.bare_command();
        command.args(["--resume", run]);
        command
    }

    fn bare_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
        command.args(["fleet", "run", "--json", "--server", &self.server.address()]);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["SHAKEDOWN_", "BOOT_IMAGE_VM_", "TESTFLINGER_", "NEXTEST"].iter().any(|p| text.starts_with(p))
            {
                command.env_remove(&name);
            }
        }
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(self.command(arguments).output().expect("runs"))
    }

    /// The jobs that were submitted.
    pub(crate) fn jobs(&self) -> Vec<Job> {
        self.server.state().jobs.clone()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.server.change(|_| self.stop.store(true, Ordering::SeqCst));
        self.hosts.drain(..).for_each(|host| drop(host.join()));
        self.server.check();
    }
}

/// How a run ended, and what it said.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) report: Value,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            report: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The verdicts by scenario; each has one.
    pub(crate) fn verdicts(&self) -> Vec<(&str, &str)> {
        let rows = self.report["scenarios"].as_array().unwrap_or_else(|| panic!("no report:\n{}", self.err));
        let text = |row: &'_ Value, key: &str| row[key].as_str().map(str::to_owned).expect("text");
        let names: BTreeSet<_> = rows.iter().map(|row| text(row, "scenario")).collect();
        assert_eq!(names.len(), rows.len(), "one verdict each");
        rows.iter()
            .map(|row| (row["scenario"].as_str().unwrap_or(""), row["outcome"].as_str().unwrap_or("")))
            .collect()
    }

    pub(crate) fn reason(&self, scenario: &str) -> &str {
        let rows = self.report["scenarios"].as_array().expect("scenarios");
        let row = rows.iter().find(|row| row["scenario"] == scenario);
        row.and_then(|row| row["reason"].as_str()).unwrap_or_default()
    }
}

struct Host {
    name: String,
    manner: Manner,
    server: Server,
    stop: Arc<AtomicBool>,
    dir: PathBuf,
}

impl Host {
    fn work(&self) {
        // Until there is news of a job, or of the end of the test.
        let next = |state: &mut State| match self.stop.load(Ordering::SeqCst) {
            true => Some(None),
            false => self.take(state).map(Some),
        };
        while let Some(job) = self.server.wait(next) {
            self.perform(&job);
        }
    }

    fn take(&self, state: &mut State) -> Option<Job> {
        let excluded = |job: &Job| {
            job.data["exclude_agents"]
                .as_array()
                .is_some_and(|names| names.iter().any(|name| *name == *self.name))
        };
        let job = state
            .jobs
            .iter_mut()
            .find(|job| job.state == "waiting" && !job.waits_for_attachments && !excluded(job))?;
        job.state = "running".into();
        Some(job.clone())
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Job)) {
        self.server.change(|state| {
            let job = state.jobs.iter_mut().find(|job| job.id == id).expect("the job");
            if job.state != "cancelled" {
                change(job);
            }
        });
    }

    fn say(&self, id: &str, phase: &str, text: &str) {
        self.change(id, |job| {
            let number = job.fragments.len() as u64;
            job.fragments.push((phase.into(), number, text.into()));
        });
    }

    fn end(&self, id: &str, result: &Value, artifacts: Option<Vec<u8>>) {
        self.change(id, |job| {
            job.artifacts = artifacts;
            job.result = result.as_object().expect("an object").clone();
            job.state = "complete".into();
        });
    }

    fn perform(&self, job: &Job) {
        let banner = |phase: &str| format!("* Starting testflinger {phase} phase on {} *\n", self.name);
        if self.manner == Manner::CannotProvision {
            self.say(&job.id, "provision", &banner("provision"));
            return self.end(&job.id, &json!({"provision_status": 1}), None);
        }
        self.change(&job.id, |job| job.state = "test".into());
        self.say(&job.id, "test", &banner("test"));
        if self.manner == Manner::Holds {
            return;
        }
        let rundir = self.dir.join(&job.id);
        for (name, content) in job.unpacked() {
            let path = rundir.join("attachments").join(&name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
            std::fs::write(&path, content).expect("writes");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("sets");
        }
        if self.manner == Manner::CannotStart {
            let binary = rundir.join("attachments/test/shakedown/scenarios");
            let loader = "#!/bin/sh\necho \"$0: version GLIBC_9.9 not found\" >&2\nexit 127\n";
            std::fs::write(binary, loader).expect("writes");
        }
        let script = job.data["test_data"]["test_cmds"].as_str().expect("a script");
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir(&rundir).env("SHAKEDOWN_JOB", &job.id);
        let output = shell.stderr(Stdio::null()).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if self.manner == Manner::DiesAfterOne {
            let first = text.lines().find(|line| line.starts_with("shakedown-record: ")).expect("a record");
            self.say(&job.id, "test", &format!("{first}\nshakedown-rec"));
            return self.end(&job.id, &json!({"test_status": 247}), None);
        }
        self.say(&job.id, "test", &text);
        if self.manner == Manner::Lies {
            lie(&rundir.join("artifacts/shakedown/notes/vm-run-ledger.jsonl"));
        }
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        builder.follow_symlinks(false);
        builder.append_dir_all("artifacts", rundir.join("artifacts")).expect("packs");
        let packed = builder.into_inner().expect("ends").finish().expect("ends");
        self.end(&job.id, &json!({"test_status": output.status.code()}), Some(packed));
    }
}

/// Each line says once more that its scenario failed, and another one is about a stranger.
fn lie(ledger: &Path) {
    let text = std::fs::read_to_string(ledger).expect("a ledger");
    let stranger = text.lines().next().expect("a line").replace("passes", "stranger");
    std::fs::write(ledger, format!("{stranger}\nrubbish\n{text}{text}")).expect("writes");
}
