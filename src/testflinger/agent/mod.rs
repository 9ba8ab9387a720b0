//! The agent: takes jobs from queues of a Testflinger server, and runs them on the machine it is for.
//!
//! A drop-in for the original: the same configuration, directories, files, phases, statuses and
//! requests. Owns the life of a process with one agent or several, by a thread each: start, what is
//! asked of it by signals, and what its exit status means. `duty` is what an agent does between jobs,
//! `job` what it does in one.

mod artifacts;
mod attachments;
pub mod config;
mod control;
mod duty;
mod influx;
mod job;
mod log;
mod mask;
mod memory;
mod metrics;
mod outbox;
mod phase;
mod place;
mod release;
mod results;
mod runner;
mod spool;
mod survivors;

pub use control::TERMINATED;
pub(super) use phase::can_be_variable;
pub(super) use place::append;

use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::record::files;
use crate::testflinger::client::{Client, Error, TokenFile};
use anyhow::{Context, Result, bail};
use config::Config;
use control::Control;
use influx::Influx;
use log::{Level, Log};
use metrics::Metrics;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What the server shows while an agent restarts because of a signal. The original's words, since
/// either agent may find them.
const SIGNALLED: &str = "Restart signal detected from supervisor process";

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Configuration files: an agent each.
    pub configs: Vec<PathBuf>,
    /// Where to serve metrics, if at all.
    pub metrics_port: Option<u16>,
    /// Where the refresh token is.
    pub token_file: PathBuf,
}

/// Why all agents ended, when none failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// They were asked to end.
    Terminated,
    /// They were asked to restart: a supervisor starts them anew.
    Restart,
}

/// Runs agents until they are asked to end.
///
/// # Errors
/// [`config::WrongConfig`] in the chain for a configuration that makes no sense; otherwise what
/// keeps an agent from working at all. What an agent may recover from is logged and no error.
pub fn run(options: &Options) -> Result<End> {
    let configs: Vec<_> = options.configs.iter().map(|path| Config::read(path)).collect::<Result<_>>()?;
    let control = Control::default();
    control.obey_signals()?;
    let metrics = Metrics::default();
    if let Some(port) = options.metrics_port {
        metrics.serve(port)?;
    }
    let mut agents = Vec::new();
    for (config, path) in configs.into_iter().zip(&options.configs) {
        agents.push(Agent::new(config, path, options, &control, &metrics)?);
    }
    let [agent] = &mut agents[..] else { return run_all(agents, &control) };
    agent.work()
}

/// Each agent in its thread. One that an admin asks to restart begins anew, and lets the others work.
fn run_all(agents: Vec<Agent>, control: &Control) -> Result<End> {
    let mut threads = Vec::new();
    for mut agent in agents {
        let thread = std::thread::Builder::new().name(agent.config.agent_id.clone()).stack_size(1 << 20);
        let control = control.clone();
        let work = move || loop {
            match agent.work() {
                Ok(End::Restart) if !control.restarts() => agent.reload()?,
                other => return other,
            }
        };
        threads.push(thread.spawn(work).context(Fault::host("cannot start an agent's thread"))?);
    }
    let mut end = Ok(End::Terminated);
    for thread in threads {
        match thread.join() {
            Ok(Ok(End::Terminated)) => {}
            Ok(Ok(End::Restart)) => end = end.map(|_| End::Restart),
            Ok(Err(error)) => end = Err(error),
            Err(_) => end = Err(Fault::host("an agent panicked; its thread has said where").into()),
        }
    }
    end
}

/// One agent.
struct Agent {
    config: Config,
    /// Where the configuration came from.
    path: PathBuf,
    client: Arc<Client>,
    log: Arc<Log>,
    influx: Influx,
    metrics: Metrics,
    /// Whether anybody reads the metrics.
    is_measured: bool,
    control: Control,
    token_file: PathBuf,
    duty: duty::Duty,
    /// Held while it lives: two agents of one name would take each other's jobs for leftovers.
    _lock: File,
}

impl Agent {
    fn new(
        config: Config,
        path: &Path,
        options: &Options,
        control: &Control,
        metrics: &Metrics,
    ) -> Result<Self> {
        for dir in [&config.logging_basedir, &config.results_basedir, &config.execution_basedir] {
            fs::create_dir_all(dir).with_context(|| {
                files::cannot("make", dir).fix(format!("make it, or set another one in {}", path.display()))
            })?;
        }
        let lock = lock(&config)?;
        let level = Level::named(&config.logging_level);
        let log = Log::open(&config.logging_basedir, level, config.logging_quiet)
            .with_context(|| files::cannot("open the log in", &config.logging_basedir))?;
        let log = Arc::new(log);
        Ok(Self {
            influx: Influx::start(&config.agent_id, &log)?,
            client: Arc::new(client(&config, &options.token_file)),
            path: path.to_owned(),
            log,
            metrics: metrics.clone(),
            is_measured: options.metrics_port.is_some(),
            control: control.clone(),
            token_file: options.token_file.clone(),
            duty: duty::Duty::default(),
            config,
            _lock: lock,
        })
    }

    /// Begins anew with what the configuration says now.
    fn reload(&mut self) -> Result<()> {
        let config = Config::read(&self.path)?;
        if config.agent_id != self.config.agent_id
            || config.execution_basedir != self.config.execution_basedir
        {
            bail!(
                Fault::host(format!("{} is another agent's now", self.path.display()))
                    .fix("restart the process instead")
            );
        }
        self.client = Arc::new(client(&config, &self.token_file));
        self.config = config;
        self.duty = duty::Duty::default();
        Ok(())
    }

    /// Asks once, or insists.
    fn ask<T>(&self, insist: bool, mut ask: impl FnMut(&Client) -> Result<T, Error>) -> Result<T, Error> {
        if insist { self.insist(ask) } else { ask(&self.client) }
    }

    /// Asks a few times, as long as there is only an outage: about ten seconds.
    fn insist<T>(&self, mut ask: impl FnMut(&Client) -> Result<T, Error>) -> Result<T, Error> {
        let mut pause = Duration::from_millis(300);
        loop {
            match ask(&self.client) {
                Err(error)
                    if error.is_outage() && pause < Duration::from_secs(6) && !self.control.ends_now() =>
                {
                    self.control.sleep_unless_urgent(pause);
                    pause *= 2;
                }
                other => return other,
            }
        }
    }
}

fn client(config: &Config, token_file: &Path) -> Client {
    Client::new(&config.server_address, Some(TokenFile(token_file.to_owned()))).as_agent(&config.agent_id)
}

fn lock(config: &Config) -> Result<File> {
    let dir = config.execution_basedir.join(place::OURS);
    let made = || -> std::io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)
    };
    made().with_context(|| files::cannot("make", &dir))?;
    let path = dir.join(format!("{}.lock", super::file_name(&config.agent_id)));
    let file = files::lock_file(&path).with_context(|| files::cannot("open", &path))?;
    // An agent that is being replaced may need a moment to end.
    let deadline = Deadline::after(Duration::from_secs(5), "limit for the end of another agent of this name");
    while !files::try_lock(&file).with_context(|| files::cannot("lock", &path))? {
        if deadline.expired() {
            bail!(
                Fault::host(format!("an agent `{}` runs here already", config.agent_id))
                    .fix(format!("find it with `fuser -v {}`", path.display()))
            );
        }
        std::thread::sleep(deadline.slice(Duration::from_millis(20)));
    }
    Ok(file)
}
