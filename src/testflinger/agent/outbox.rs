//! Tells the server of a job, in order, without the job waiting: one thread sends what is in the spool.
//!
//! The job goes on when the server does not answer. What was not delivered by its end stays in the
//! spool, which goes to the results that wait.

use super::influx::Influx;
use super::log::Log as AgentLog;
use super::spool::{Cursor, Post, Record, Spool, now};
use crate::testflinger::client::{Client, Error};
use crate::testflinger::wire::{AgentData, AgentUpdate, Fragment, Job, Log, Phase, ResultUpdate, job_state};
use anyhow::{Context, Result};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Output that comes in drops is sent this often.
const PACE: Duration = Duration::from_secs(1);
/// Between two fragments, while nobody waits for them: the CPU is for the command that prints them.
const BREATH: Duration = Duration::from_millis(100);
/// A fragment is no larger. The server takes less than 16 MiB in one request.
const LARGEST: usize = 512 << 10;
/// Between two tries: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A webhook that takes longer is spared until the job ends.
const SLOW: Duration = Duration::from_secs(3);

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

/// What is sent next.
enum Work {
    Post(Post, u64),
    Text(Batch),
    /// Ask whether the job was cancelled.
    Glance,
}

struct Batch {
    log: Log,
    phase: Phase,
    at: String,
    text: String,
    end: u64,
}

struct Sender {
    line: Line,
    shared: Arc<Shared>,
    last_text: Option<Instant>,
    last_glance: Instant,
    /// The webhook failed: only the last event is worth another try, and it carries them all.
    spare_webhook: bool,
    /// How often the last event was refused.
    refused: u32,
    /// It is not known whether the fragment that is to be sent has arrived already.
    ambiguous: bool,
}

impl Drop for Sender {
    /// However its thread ends, nobody waits for it.
    fn drop(&mut self) {
        self.shared.lock().abandoned = true;
        self.shared.news.notify_all();
    }
}

impl Sender {
    fn new(line: Line, shared: Arc<Shared>) -> Self {
        let ambiguous = shared.lock().spool.cursor.sending.is_some();
        let last_glance = Instant::now();
        Self { line, shared, last_text: None, last_glance, spare_webhook: false, refused: 0, ambiguous }
    }

    fn run(mut self) {
        while let Some(work) = self.next() {
            match work {
                Work::Glance => {
                    self.last_glance = Instant::now();
                    let outcome = self.look_for_cancel();
                    self.note(outcome.as_ref().map(drop));
                }
                Work::Post(post, end) => {
                    if !self.insist(|sender| sender.deliver(&post)) {
                        return;
                    }
                    self.done(end, None);
                }
                Work::Text(batch) => {
                    let number = self.begin(&batch);
                    if !self.insist(|sender| sender.deliver_text(&batch, number)) {
                        return;
                    }
                    self.last_text = Some(Instant::now());
                    self.done(batch.end, Some(batch.log));
                    self.shared.breathe();
                }
            }
        }
    }

    /// Waits for something to do; `None` when there is nothing more.
    fn next(&mut self) -> Option<Work> {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        loop {
            if state.abandoned {
                return None;
            }
            let mut pause = Duration::from_secs(3600);
            if state.watched && !state.cancelled {
                let due = self.line.glance.saturating_sub(self.last_glance.elapsed());
                if due.is_zero() {
                    return Some(Work::Glance);
                }
                pause = pause.min(due);
            }
            let at = state.spool.cursor.start;
            if state.spool.ends_at(at) {
                state.idle = true;
                shared.news.notify_all();
                if state.closed {
                    return None;
                }
            } else {
                let early = PACE.saturating_sub(self.last_text.map_or(PACE, |last| last.elapsed()));
                match self.gather(&mut state, early) {
                    Ok(Some(work)) => return Some(work),
                    Ok(None) => pause = pause.min(early),
                    Err(error) => {
                        self.line.log.error(format!("The spool of the job cannot be read: {error:#}"));
                        return None;
                    }
                }
            }
            state = shared.wait(state, pause);
        }
    }

    /// The next post, or all text that belongs together; `None` while text should wait for more,
    /// as it may for `early`.
    fn gather(&self, state: &mut State, early: Duration) -> Result<Option<Work>> {
        let start = state.spool.cursor.start;
        if let Some((Record::Text { size, .. }, end)) = state.spool.read(start)?
            && !early.is_zero()
            && state.hurry == 0
            && size < LARGEST / 2
            && state.spool.ends_at(end)
        {
            return Ok(None);
        }
        let Some((record, mut end)) = state.spool.next()? else { return Ok(None) };
        let (log, phase, at, mut text) = match record {
            Record::Post(post) => return Ok(Some(Work::Post(post, end))),
            Record::Text { log, phase, at, text, .. } => (log, phase, at, text),
        };
        // The rest of a fragment that was being sent when we crashed keeps its bounds.
        let bound = state.spool.cursor.sending.as_ref().map(|(end, _)| *end).filter(|_| self.ambiguous);
        while bound.is_none_or(|bound| end < bound)
            && let Some((Record::Text { log: l, phase: p, size, text: more, .. }, next)) =
                state.spool.read(end)?
            && (l, p) == (log, phase)
            && text.len() + size <= LARGEST
        {
            text.push_str(&more);
            end = next;
        }
        Ok(Some(Work::Text(Batch { log, phase, at, text, end })))
    }

    /// Notes on disk that `batch` may arrive from now on.
    fn begin(&self, batch: &Batch) -> u64 {
        let mut state = self.shared.lock();
        let number = *state.spool.cursor.number(batch.log);
        state.spool.cursor.sending = Some((batch.end, batch.log));
        state.spool.save();
        number
    }

    fn done(&mut self, end: u64, log: Option<Log>) {
        let mut state = self.shared.lock();
        state.spool.delivered(end);
        let cursor: &mut Cursor = &mut state.spool.cursor;
        cursor.sending = None;
        if let Some(log) = log {
            *cursor.number(log) += 1;
        }
        self.ambiguous = false;
        state.spool.save();
    }

    /// Tries until it is done or makes no sense; false when it was abandoned before.
    fn insist(&mut self, mut deliver: impl FnMut(&mut Self) -> Result<(), Error>) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            let outcome = deliver(self);
            self.note(outcome.as_ref().copied());
            match outcome {
                Err(error) if error.is_outage() => {}
                _ => return true,
            }
            let begun = Instant::now();
            let mut state = self.shared.lock();
            while begun.elapsed() < pause {
                if state.abandoned {
                    return false;
                }
                state = self.shared.wait(state, pause.saturating_sub(begun.elapsed()));
            }
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    fn note(&self, outcome: Result<(), &Error>) {
        let mut state = self.shared.lock();
        let outage = outcome.err().filter(|error| error.is_outage());
        match (outage, state.outage) {
            (Some(error), false) => {
                self.line
                    .log
                    .warning(format!("The server is not to be had, and is asked again: {}", chain(error)));
            }
            (None, true) => self.line.log.info("The server is back"),
            _ => {}
        }
        if let Err(error) = outcome
            && !error.is_outage()
        {
            self.line.log.error(format!("The server refused: {}", chain(error)));
        }
        state.outage = outage.is_some();
        self.shared.news.notify_all();
    }

    fn look_for_cancel(&self) -> Result<bool, Error> {
        let state = self.line.client.job_state(self.line.job.id())?;
        let cancelled = state.as_deref() == Some(job_state::CANCELLED);
        if cancelled {
            self.shared.lock().cancelled = true;
        }
        Ok(cancelled)
    }

    fn deliver(&mut self, post: &Post) -> Result<(), Error> {
        let Line { client, agent, job, .. } = &self.line;
        match post {
            Post::Result(update) => client.update_result(job.id(), update),
            Post::Agent(update) => {
                client.update_agent(agent, update)?;
                update.state.iter().for_each(|state| self.line.influx.tell(state, None));
                Ok(())
            }
            Post::Provision(log) => client.post_provision_log(agent, log),
            Post::Events(events) => {
                let last = events.last().is_some_and(|event| event.event_name == "job_end");
                if self.spare_webhook && !last {
                    return Ok(());
                }
                let begun = Instant::now();
                let outcome = client.post_events(job, agent, events);
                match outcome {
                    // The answer is the webhook's: it may be down while the server is well.
                    Err(error @ Error::Refused { .. }) => {
                        self.refused += u32::from(last);
                        if matches!(error.status(), Some(502..=504)) && (1..3).contains(&self.refused) {
                            return Err(error);
                        }
                        self.spare_webhook = true;
                        self.line.log.warning(format!("The webhook did not take events: {}", chain(&error)));
                        Ok(())
                    }
                    outcome => {
                        self.spare_webhook |= begun.elapsed() > SLOW;
                        outcome
                    }
                }
            }
            Post::Enter(phase) => {
                let admin = client.agent_data(agent)?.filter(is_of_admin);
                let comment = {
                    let mut state = self.shared.lock();
                    if let Some(data) = admin {
                        state.comment.clone_from(&data.comment);
                        state.admin = Some(data);
                    }
                    state.comment.clone()
                };
                // The last thing before the post that would undo it.
                if self.look_for_cancel()? {
                    return Ok(());
                }
                client.update_result(job.id(), &ResultUpdate::state(phase.name()))?;
                client.update_agent(agent, &AgentUpdate::state(phase.name(), comment))?;
                self.line.influx.tell(phase.name(), None);
                Ok(())
            }
        }
    }

    fn deliver_text(&mut self, batch: &Batch, number: u64) -> Result<(), Error> {
        let Line { client, job, .. } = &self.line;
        // The server would store it twice.
        if !self.ambiguous || !self.has_arrived(batch)? {
            let fragment = Fragment {
                fragment_number: number,
                timestamp: &batch.at,
                phase: batch.phase,
                log_data: &batch.text,
            };
            let outcome = client.post_fragment(job.id(), batch.log, &fragment);
            self.ambiguous = outcome.as_ref().is_err_and(Error::is_ambiguous);
            outcome?;
        }
        *self.shared.lock().spool.cursor.told(batch.log, batch.phase) += batch.text.len() as u64;
        Ok(())
    }

    fn has_arrived(&self, batch: &Batch) -> Result<bool, Error> {
        let Batch { log, phase, text, .. } = batch;
        let told = *self.shared.lock().spool.cursor.told(*log, *phase);
        match self.line.client.has_text(self.line.job.id(), *log, *phase, told, text) {
            // Twice is better than never.
            Err(error) if !error.is_outage() => Ok(false),
            other => other,
        }
    }
}

/// True for a state that an agent with a job does not give itself. `waiting` is an admin's word that
/// takes back another.
fn is_of_admin(data: &AgentData) -> bool {
    matches!(data.state.as_str(), "offline" | "maintenance" | "restart" | "waiting")
}

/// An error with all that led to it.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
