//! An agent in a directory of its own, as a supervisor would run it.

use crate::server::Server;
use rustix::process::Signal;
use serde_json::{Value, json};
use shakedown::deadline::Deadline;
use shakedown::process;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(crate) const AGENT: &str = "a1";
pub(crate) const QUEUE: &str = "q-a1";

/// The commands that most jobs here need.
pub(crate) const COMMANDS: &str = "\
setup_command: echo SETUP
provision_command: echo PROVISION
test_command: sh $PWD/../../test.sh
cleanup_command: echo CLEANUP
";

pub(crate) struct Lab {
    pub(crate) server: Server,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: String,
}

impl Lab {
    pub(crate) fn new(commands: &str) -> Self {
        Self::with(Server::start(), AGENT, commands)
    }

    pub(crate) fn with(server: Server, agent: &str, commands: &str) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let base = dir.path().display();
        let config = format!(
            "agent_id: {agent}\nserver_address: {}\njob_queues: [q-{agent}]\npolling_interval: 1\n\
             execution_basedir: {base}/run\nlogging_basedir: {base}/logs\nresults_basedir: {base}/results\n\
             logging_level: DEBUG\nlogging_quiet: true\n{commands}",
            server.address
        );
        Self { server, dir, config }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn rundir(&self, job: &str) -> PathBuf {
        self.path("run").join(job)
    }

    pub(crate) fn results(&self) -> PathBuf {
        self.path("results")
    }

    /// What `test_command` runs.
    pub(crate) fn script(&self, script: &str) {
        std::fs::write(self.path("test.sh"), script).expect("writes");
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("logs/testflinger-agent.log")).unwrap_or_default()
    }

    pub(crate) fn start(&self) -> Running {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, args: &[&str]) -> Running {
        Running::start(self.command(args))
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let config = self.path("testflinger-agent.conf");
        std::fs::write(&config, &self.config).expect("writes");
        let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
        command.arg("agent").arg("-c").arg(config).args(args);
        if !args.contains(&"--token-file") {
            command.arg("--token-file").arg(self.path("no-token"));
        }
        command.env_remove("INFLUX_HOST");
        command
    }

    /// A token, as the charm writes it.
    pub(crate) fn token_file(&self) -> String {
        let path = self.path("refresh_token");
        let content = json!({"refresh_token": "REFRESH", "obtained_at": "2026-11-20T10:00:00"});
        std::fs::write(&path, content.to_string()).expect("writes");
        path.to_str().expect("UTF-8").to_owned()
    }

    /// Submits a job with a test and gives its id.
    pub(crate) fn submit(&self, more: Value) -> String {
        let job = job(more);
        let id = job["job_id"].as_str().expect("an id").to_owned();
        self.server.submit(job);
        id
    }

    /// No request was wrong.
    pub(crate) fn check(&self) {
        assert_eq!(self.server.state().violations, Vec::<String>::new(), "\n{}", self.log());
    }
}

/// A job as the server hands it out, with these fields.
pub(crate) fn job(more: Value) -> Value {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let id = format!("00000000-0000-4000-8000-{:012}", NEXT.fetch_add(1, Ordering::Relaxed));
    let mut job = json!({
        "job_id": id,
        "job_queue": QUEUE,
        "exclude_agents": [],
        "started_at": "2026-11-20T10:33:31+00:00Z",
        "test_data": {"test_cmds": "in test.sh"},
    });
    job.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    job
}

/// A running agent; it does not survive the test.
pub(crate) struct Running {
    child: process::Child,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        Self { child: process::spawn(command).expect("starts") }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.child.signal(signal);
    }

    /// `kill -9`.
    pub(crate) fn crash(mut self) {
        self.child.kill();
    }

    /// How it ended by itself.
    pub(crate) fn ended(&mut self) -> i32 {
        let deadline = Deadline::after(Duration::from_secs(60), "test");
        let status = self.child.wait(&deadline).expect("the agent ends");
        status.code().or_else(|| Some(128 + status.signal()?)).expect("an end")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// True while a process has this among its arguments.
pub(crate) fn process_with(argument: &str) -> bool {
    let processes = std::fs::read_dir("/proc").expect("reads").flatten();
    processes.map(|process| process.path().join("cmdline")).any(|path| {
        std::fs::read(path).is_ok_and(|line| line.split(|b| *b == 0).any(|word| word == argument.as_bytes()))
    })
}

/// Waits until `ready`.
pub(crate) fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(40), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
