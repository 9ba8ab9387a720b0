//! What a Testflinger agent costs: memory, start, a job without work, and output.
//!
//! The server is a stub that says yes to everything; it takes some of the time that is measured.

use super::Samples;
use crate::cli::terminal;
use anyhow::{Context, Result, bail};
use serde_json::json;
use shakedown::deadline::Deadline;
use shakedown::fault::Fault;
use shakedown::process::{self, Child};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Agents beside the first one, when the cost of a further one is measured.
const FURTHER: usize = 10;
/// About 100 MB, and it adds its own duration to a file that it is given.
const TALK: &str = "begin=$(date +%s%N); seq 12500000; end=$(date +%s%N); echo $((end - begin)) >> ";
/// How often both readers have their turn.
const PAIRS: usize = 11;
/// How often the command talks in a turn: once takes a fifth of a second, in which a host has its moods.
const TALKS: usize = 4;
const NO_WORK: &str =
    "setup_command: 'true'\nprovision_command: 'true'\ntest_command: 'true'\ncleanup_command: 'true'\n";
const PATIENCE: Duration = Duration::from_secs(300);

pub(super) fn measure(runs: u32) -> Result<Samples> {
    let mut samples: Samples =
        ["rss_mib", "extra_agent_mib", "start_ms", "noop_job_seconds", "output_slowdown_percent"]
            .map(|figure| (figure, Vec::new()))
            .into();
    for _ in 0..runs {
        let one = Lab::new(1, NO_WORK)?;
        let many = Lab::new(1 + FURTHER, NO_WORK)?;
        let figures = [
            one.idle_mib()?,
            (many.idle_mib()? - one.idle_mib()?) / FURTHER as f64,
            one.start_ms()?,
            one.job_seconds()?,
        ];
        for ((name, all), figure) in samples.iter_mut().zip(figures) {
            terminal::say(&format!("{name}: {figure:.3}"));
            all.push(figure);
        }
    }
    if let Some((name, all)) = samples.last_mut() {
        let talk = Talk::new()?;
        for pair in 0..PAIRS * runs as usize {
            // In turns (A B, B A): what drifts hits both alike.
            let (alone, agent) = if pair % 2 == 0 {
                let alone = talk.alone()?;
                (alone, talk.agent()?)
            } else {
                let agent = talk.agent()?;
                (talk.alone()?, agent)
            };
            let figure = (agent / alone - 1.0) * 100.0;
            terminal::say(&format!("{name}: {figure:.1} ({alone:.3} s alone, {agent:.3} s)"));
            all.push(figure);
        }
    }
    Ok(samples)
}

/// A command that talks a lot: how long it takes under the agent, and with a reader that throws its
/// output away.
struct Talk {
    lab: Lab,
    _agent: Child,
}

impl Talk {
    fn new() -> Result<Self> {
        let lab = Lab::new(1, "test_command: sh ../../talk\n")?;
        let script = format!("{TALK}{}\n", lab.dir.path().join("time").display());
        std::fs::write(lab.dir.path().join("talk"), script)?;
        let agent = lab.start()?;
        Ok(Self { lab, _agent: agent })
    }

    fn alone(&self) -> Result<f64> {
        rustix::fs::sync();
        (0..TALKS).try_for_each(|_| self.talk())?;
        self.seconds()
    }

    fn talk(&self) -> Result<()> {
        let mut command = Command::new("/bin/sh");
        command.arg(self.lab.dir.path().join("talk")).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = process::spawn(command)?;
        if let (_, Some(mut output), _) = child.pipes() {
            let mut buffer = vec![0; 64 << 10];
            while output.read(&mut buffer)? > 0 {}
        }
        child.wait(&Deadline::after(PATIENCE, "bench agent")).map(drop)
    }

    fn agent(&self) -> Result<f64> {
        rustix::fs::sync();
        self.lab.run_jobs(TALKS)?;
        self.seconds()
    }

    /// What the command said of its time in this turn.
    fn seconds(&self) -> Result<f64> {
        let file = self.lab.dir.path().join("time");
        let text = std::fs::read_to_string(&file).context("the command did not tell its time")?;
        std::fs::remove_file(&file)?;
        let times: Vec<f64> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
        if times.len() != TALKS {
            bail!("the command told its time {} times, not {TALKS}", times.len());
        }
        Ok(times.iter().sum::<f64>() / 1e9)
    }
}

/// A stub server, and the configurations of agents for it.
struct Lab {
    dir: tempfile::TempDir,
    stub: Arc<Stub>,
    agents: usize,
}

impl Lab {
    fn new(agents: usize, commands: &str) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a directory for agents")?;
        let stub = Stub::start()?;
        let base = dir.path().display();
        for number in 0..agents {
            let config = format!(
                "agent_id: bench{number}\nserver_address: {}\njob_queues: [bench]\npolling_interval: 1\n\
                 execution_basedir: {base}/run\nlogging_basedir: {base}/logs{number}\n\
                 results_basedir: {base}/results\nlogging_quiet: true\n{commands}",
                stub.address
            );
            std::fs::write(dir.path().join(format!("{number}.conf")), config)?;
        }
        Ok(Self { dir, stub, agents })
    }

    fn start(&self) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe().context("cannot tell our own path")?);
        command.arg("agent").arg("--token-file").arg(self.dir.path().join("none"));
        for number in 0..self.agents {
            command.arg("-c").arg(self.dir.path().join(format!("{number}.conf")));
        }
        command.stdin(Stdio::null());
        self.stub.lock().seen = 0;
        process::spawn(command)
    }

    /// Memory of a process whose agents have all asked for work a few times.
    fn idle_mib(&self) -> Result<f64> {
        let agent = self.start()?;
        let enough = self.agents * 10;
        self.stub.until("the agents ask for work", |state| (state.seen > enough).then_some(()))?;
        let status = std::fs::read_to_string(Path::new("/proc").join(agent.id().to_string()).join("status"))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        Ok(kib.context("no memory in /proc")?.parse::<f64>()? / 1024.0)
    }

    /// From the start of the process to its first request.
    fn start_ms(&self) -> Result<f64> {
        self.stub.lock().first = None;
        let begun = Instant::now();
        let _agent = self.start()?;
        let first = self.stub.until("the agent asks something", |state| state.first)?;
        Ok((first - begun).as_secs_f64() * 1000.0)
    }

    /// From the moment a job is handed out to its outcome.
    fn job_seconds(&self) -> Result<f64> {
        let _agent = self.start()?;
        self.run_jobs(1)
    }

    /// The same of some jobs in a row, when an agent runs.
    fn run_jobs(&self, count: usize) -> Result<f64> {
        {
            let mut state = self.stub.lock();
            (state.taken, state.complete) = (None, Vec::new());
            for number in 0..count {
                let id = format!("bench-{}-{number}", state.seen);
                let job = json!({"job_id": id, "job_queue": "bench", "provision_data": {"distro": "none"},
                    "test_data": {"test_cmds": "none"}});
                state.jobs.push_back(job.to_string());
            }
        }
        let all = |state: &State| Some((state.taken?, *state.complete.get(count - 1)?));
        let (taken, complete) = self.stub.until("all jobs are complete", all)?;
        Ok((complete - taken).as_secs_f64())
    }
}

struct Stub {
    address: SocketAddr,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<String>,
    seen: usize,
    first: Option<Instant>,
    taken: Option<Instant>,
    complete: Vec<Instant>,
}

impl Stub {
    fn start() -> Result<Arc<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0").context(Fault::host("cannot listen"))?;
        let address = listener.local_addr()?;
        let stub = Arc::new(Self { address, state: Mutex::default(), news: Condvar::new() });
        let accepting = Arc::clone(&stub);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let stub = Arc::clone(&accepting);
                std::thread::spawn(move || stub.converse(stream));
            }
        });
        Ok(stub)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until<T>(&self, what: &str, mut ready: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&state) {
                return Ok(found);
            }
            if begun.elapsed() > PATIENCE || process::interrupted() {
                bail!("waited in vain until {what}");
            }
            state = self
                .news
                .wait_timeout(state, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn converse(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::with_capacity(64 << 10, stream.try_clone().ok()?);
        let mut stream = stream;
        loop {
            let (mut line, mut length) = (String::new(), 0);
            reader.read_line(&mut line).ok()?;
            let path = line.split_whitespace().nth(1)?.to_owned();
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).ok()?;
                let Some((name, value)) = header.split_once(':') else { break };
                if name.eq_ignore_ascii_case("content-length") {
                    length = value.trim().parse().ok()?;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            let answer = self.answer(&path, &line, &body);
            let status = if answer.is_empty() { "204 No Content" } else { "200 OK" };
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
            stream.write_all(answer.as_bytes()).ok()?;
        }
    }

    fn answer(&self, path: &str, line: &str, body: &[u8]) -> String {
        let now = Instant::now();
        let mut state = self.lock();
        state.seen += 1;
        state.first.get_or_insert(now);
        let answer = if path.starts_with("/v1/job?") {
            let job = state.jobs.pop_front();
            if job.is_some() {
                state.taken.get_or_insert(now);
            }
            job.unwrap_or_default()
        } else if line.starts_with("GET") {
            r#"{"state": "waiting", "job_state": "test"}"#.into()
        } else {
            if path.starts_with("/v1/result/") && body.ends_with(br#""job_state":"complete"}"#) {
                state.complete.push(now);
            }
            "OK".into()
        };
        drop(state);
        self.news.notify_all();
        answer
    }
}
