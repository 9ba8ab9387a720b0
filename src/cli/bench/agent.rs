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
/// About 100 MB, and it writes its own duration to a file that it is given.
const TALK: &str = "begin=$(date +%s%N); seq 12500000; end=$(date +%s%N); echo $((end - begin)) > ";
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
            slowdown()?,
        ];
        for ((name, all), figure) in samples.iter_mut().zip(figures) {
            terminal::say(&format!("{name}: {figure:.3}"));
            all.push(figure);
        }
    }
    Ok(samples)
}

/// By how much a command that talks a lot is slower under the agent than with a reader that throws
/// its output away.
fn slowdown() -> Result<f64> {
    let lab = Lab::new(1, "test_command: sh ../../talk\n")?;
    let time = lab.dir.path().join("time");
    std::fs::write(lab.dir.path().join("talk"), format!("{TALK}{}\n", time.display()))?;
    let seconds = || -> Result<f64> {
        let text = std::fs::read_to_string(&time).context("the command did not tell its time")?;
        Ok(text.trim().parse::<f64>()? / 1e9)
    };
    let mut command = Command::new("/bin/sh");
    command.arg(lab.dir.path().join("talk")).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = process::spawn(command)?;
    if let (_, Some(mut output), _) = child.pipes() {
        std::io::copy(&mut output, &mut std::io::sink())?;
    }
    child.wait(&Deadline::after(PATIENCE, "bench agent"))?;
    let alone = seconds()?;
    lab.job_seconds()?;
    Ok((seconds()? / alone - 1.0) * 100.0)
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
        let id = format!("bench-{}", self.stub.lock().seen);
        let job = json!({"job_id": id, "job_queue": "bench", "provision_data": {"distro": "none"},
            "test_data": {"test_cmds": "none"}});
        {
            let mut state = self.stub.lock();
            (state.taken, state.complete) = (None, None);
            state.jobs.push_back(job.to_string());
        }
        let _agent = self.start()?;
        let (taken, complete) =
            self.stub.until("the job is complete", |state| Some((state.taken?, state.complete?)))?;
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
    complete: Option<Instant>,
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
                state.taken = Some(now);
            }
            job.unwrap_or_default()
        } else if line.starts_with("GET") {
            r#"{"state": "waiting", "job_state": "test"}"#.into()
        } else {
            if path.starts_with("/v1/result/") && body.ends_with(br#""job_state":"complete"}"#) {
                state.complete = Some(now);
            }
            "OK".into()
        };
        drop(state);
        self.news.notify_all();
        answer
    }
}
