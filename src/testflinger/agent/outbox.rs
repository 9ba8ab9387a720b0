//! Tells the server of a job, in order, without the job waiting: one thread sends what is in the spool.
//!
//! The job goes on when the server does not answer. What was not delivered by its end stays in the
//! spool, which goes to the results that wait.

mod sender;

use super::influx::Influx;
use super::log::Log as AgentLog;
use super::spool::{Post, Record, Spool, now};
use crate::testflinger::client::Client;
use crate::testflinger::wire::{AgentData, Job, Log, Phase};
use anyhow::{Context, Result};
use sender::Sender;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two fragments, while nobody waits for them: the CPU is for the command that prints them.
const BREATH: Duration = Duration::from_millis(100);

/// Who speaks, to whom, of which job.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) client: Arc<Client>,
    pub(super) agent: String,
    pub(super) job: Job,
    pub(super) log: Arc<AgentLog>,
    pub(super) influx: Influx,
    /// How often it is asked whether the job was cancelled.
    pub(super) glance: Duration,
}

#[derive(Debug)]
pub(super) struct Outbox {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
    /// Somebody waits for all to be delivered.
    haste: Condvar,
}

#[derive(Debug)]
struct State {
    spool: Spool,
    idle: bool,
    /// The last request had no answer, or one that says to try again.
    outage: bool,
    /// Somebody waits for all to be delivered.
    hurry: usize,
    watched: bool,
    cancelled: bool,
    /// What an admin asked of the agent meanwhile.
    admin: Option<AgentData>,
    /// What is said with the agent's states: why it will not go on after this job.
    comment: String,
    /// Nothing more comes.
    closed: bool,
    /// Nothing more is sent.
    abandoned: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hurry(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.hurry += 1;
        self.wake();
        state
    }

    fn wake(&self) {
        self.news.notify_all();
        self.haste.notify_all();
    }

    /// Leaves the CPU to others for a while, unless somebody waits.
    fn breathe(&self) {
        let idle = |state: &mut State| state.hurry == 0 && !state.abandoned;
        let _ = self.haste.wait_timeout_while(self.lock(), BREATH, idle);
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        self.news.wait_timeout(state, most).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Outbox {
    /// Starts to send what is and comes into the spool in `dir`.
    pub(super) fn start(dir: &Path, line: Line) -> Result<Self> {
        let state = State {
            spool: Spool::open(dir)?,
            idle: false,
            outage: false,
            hurry: 0,
            watched: false,
            cancelled: false,
            admin: None,
            comment: String::new(),
            closed: false,
            abandoned: false,
        };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), news: Condvar::new(), haste: Condvar::new() });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("outbox".into())
            .stack_size(512 << 10)
            .spawn(move || Sender::new(line, for_thread).run())
            .context("cannot start a thread")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn post(&self, post: Post) {
        self.append(Record::Post(post));
    }

    /// Appends to a log.
    pub(super) fn text(&self, log: Log, phase: Phase, text: String) {
        if !text.is_empty() {
            self.append(Record::Text { log, phase, at: now(), size: text.len(), text });
        }
    }

    fn append(&self, record: Record) {
        let mut state = self.shared.lock();
        state.spool.append(record);
        state.idle = false;
        self.shared.news.notify_all();
    }

    /// Waits until all is delivered, or cannot be for now; true in the first case.
    pub(super) fn settle(&self) -> bool {
        let mut state = self.shared.hurry();
        while !state.idle && !state.outage && !state.abandoned {
            state = self.shared.wait(state, Duration::from_secs(60));
        }
        state.hurry -= 1;
        state.idle
    }

    /// Whether to ask the server now and then if the job was cancelled.
    pub(super) fn watch(&self, watched: bool) {
        self.shared.lock().watched = watched;
        self.shared.news.notify_all();
    }

    /// Says why the agent will not go on after this job.
    pub(super) fn comment(&self, comment: &str) {
        comment.clone_into(&mut self.shared.lock().comment);
    }

    /// True once the server was seen to say so.
    pub(super) fn cancelled(&self) -> bool {
        self.shared.lock().cancelled
    }

    /// What an admin asked of the agent since this was asked last.
    pub(super) fn admin(&self) -> Option<AgentData> {
        self.shared.lock().admin.take()
    }

    /// Waits until all is delivered or on disk. A server that is not there is waited for as long as
    /// `patience`, and longer while there is no room on the disk either.
    pub(super) fn secure(&self, patience: Duration) {
        let begun = Instant::now();
        let mut state = self.shared.hurry();
        while !state.idle && !state.abandoned {
            if state.outage && begun.elapsed() >= patience && state.spool.flush() {
                break;
            }
            state = self.shared.wait(state, Duration::from_millis(100));
        }
        state.hurry -= 1;
    }

    /// Ends: waits until all is delivered, but not for a server that is not there. True when all is
    /// delivered.
    pub(super) fn finish(mut self) -> bool {
        let mut state = self.shared.hurry();
        state.closed = true;
        state.watched = false;
        while !state.idle && !state.abandoned && !state.outage {
            state = self.shared.wait(state, Duration::from_secs(60));
        }
        state.abandoned = true;
        let delivered = state.idle;
        drop(state);
        self.join();
        if delivered {
            // The end of a job may need the room.
            let spool = &mut self.shared.lock().spool;
            spool.cut();
            spool.save();
        }
        delivered
    }

    fn join(&mut self) {
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.shared.lock().abandoned = true;
        self.join();
    }
}

/// An error with all that led to it.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
