//! A directory as a user of the job client has it, and the command.

use crate::server::Server;
use rustix::process::Signal;
use serde_json::{Value, json};
use shakedown::deadline::Deadline;
use shakedown::process;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

pub(crate) const TEMPLATE: &str = "\
job_queue: $CANONICAL_ID
provision_data:
  distro: jammy
test_data:
  attachments:
    - local: hwctl
      agent: hwctl
  test_cmds: |
    run hwctl on $CANONICAL_ID
";

/// What a job is like that passed.
pub(crate) fn passed() -> (&'static str, Value) {
    let output = "starting\n{\n  \"status\":\n    \"Certified\"\n}\n";
    ("complete", json!({"provision_status": 0, "test_status": 0, "test_output": output, "cleanup_status": 3}))
}

pub(crate) struct Desk {
    pub(crate) server: Server,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) env: Vec<(&'static str, String)>,
}

impl Desk {
    /// Machines that all have a queue, and what becomes of their jobs.
    pub(crate) fn new(machines: &[(&str, &[(&str, Value)])]) -> Self {
        let desk =
            Self { server: Server::start(), dir: tempfile::tempdir().expect("temp dir"), env: Vec::new() };
        let names: Vec<_> = machines.iter().map(|(name, _)| *name).collect();
        desk.write("machines.txt", &names.join("\n"));
        desk.write("tf-job.yaml", TEMPLATE);
        desk.write("hwctl", "a program");
        for (name, fates) in machines {
            desk.server.queue(name, fates);
        }
        desk
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("makes");
        fs::write(path, text).expect("writes");
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
        command.current_dir(self.dir.path()).arg("jobs").args(["--poll-interval", "0.1"]).args(args);
        if !args.contains(&"--server") {
            command.env("TESTFLINGER_SERVER", self.server.address());
        }
        for name in ["TESTFLINGER_CLIENT_ID", "TESTFLINGER_SECRET_KEY", "BOOT_IMAGE_VM_LEDGER_PATH"] {
            command.env_remove(name);
        }
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    pub(crate) fn start(&self, args: &[&str]) -> Running {
        Running::start(self.command(args))
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        self.start(args).ended()
    }

    /// As [`Self::run`]: the rows of `--json`, by machine.
    pub(crate) fn json(&self, status: i32, args: &[&str]) -> Value {
        let ended = self.run(&[args, &["--json"]].concat());
        assert_eq!(ended.status, status, "{}\n{}", ended.stdout, ended.stderr);
        let mut answer: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        let jobs = answer["jobs"].as_array().expect("rows").clone();
        let by_machine =
            jobs.into_iter().map(|job| (job["machine"].as_str().expect("a name").to_owned(), job));
        answer["jobs"] = by_machine.collect::<serde_json::Map<_, _>>().into();
        answer
    }

    /// Scenario and outcome of every line of the ledger, in the order of names.
    pub(crate) fn ledger(&self) -> Vec<(String, String)> {
        let path = self.path("notes/vm-run-ledger.jsonl");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let text_of = |line: &Value, field: &str| line[field].as_str().expect("a text").to_owned();
        let mut lines: Vec<_> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
            .map(|line| (text_of(&line, "scenario"), text_of(&line, "outcome")))
            .collect();
        lines.sort();
        if !lines.is_empty() {
            let problems = shakedown::record::ledger::check(&path).expect("checks");
            assert!(problems.is_empty(), "{problems:?}");
        }
        lines
    }

    /// Nothing was submitted twice, no request was wrong, and every id is where it belongs.
    pub(crate) fn check(&self) {
        self.server.check();
        let jobs: Vec<_> = self.server.state().jobs.clone();
        for job in jobs {
            let known = self.read(&format!("job_outputs/{}/job.json", job.queue()));
            assert!(known.contains(&job.id), "{} was lost:\n{known}", job.id);
        }
    }
}

pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn is(&self, status: i32) -> &Self {
        assert_eq!(self.status, status, "{}\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub(crate) fn says(&self, text: &str) -> &Self {
        let all = format!("{}\n{}", self.stdout, self.stderr);
        assert!(all.contains(text), "no {text:?} in\n{all}");
        self
    }
}

/// A running command; it does not survive the test.
pub(crate) struct Running {
    child: process::Child,
    streams: [tempfile::NamedTempFile; 2],
}

impl Running {
    fn start(mut command: Command) -> Self {
        let streams = [(); 2].map(|()| tempfile::NamedTempFile::new().expect("a file"));
        let [out, err] = &streams;
        command
            .stdin(Stdio::null())
            .stdout(out.reopen().expect("opens"))
            .stderr(err.reopen().expect("opens"));
        Self { child: process::spawn(command).expect("starts"), streams }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.child.signal(signal);
    }

    /// `kill -9`.
    pub(crate) fn crash(mut self) {
        self.child.kill();
    }

    pub(crate) fn ended(mut self) -> Ended {
        let deadline = Deadline::after(Duration::from_secs(90), "test");
        let status = self.child.wait(&deadline).expect("it ends");
        self.after(status)
    }

    /// What it came to; itself while it runs.
    pub(crate) fn try_ended(mut self) -> Result<Ended, Self> {
        match self.child.try_wait().expect("asks") {
            Some(status) => Ok(self.after(status)),
            None => Err(self),
        }
    }

    fn after(self, status: std::process::ExitStatus) -> Ended {
        let status = status.code().or_else(|| Some(128 + status.signal()?)).expect("an end");
        let [stdout, stderr] = self.streams.map(|file| fs::read_to_string(file.path()).expect("reads"));
        Ended { status, stdout, stderr }
    }
}
