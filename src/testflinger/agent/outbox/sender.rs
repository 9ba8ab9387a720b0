//! The thread that sends what is in the spool, one request after the other.

use super::{Line, Shared, State, chain};
use crate::testflinger::agent::spool::{Cursor, Post, Record};
use crate::testflinger::client::Error;
use crate::testflinger::wire::{AgentData, AgentUpdate, Fragment, Log, Phase, ResultUpdate, job_state};
use anyhow::Result;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Output that comes in drops is sent this often.
const PACE: Duration = Duration::from_secs(1);
/// A fragment is no larger. The server takes less than 16 MiB in one request.
const LARGEST: usize = 512 << 10;
/// Between two tries: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// A webhook that takes longer is spared until the job ends.
const SLOW: Duration = Duration::from_secs(3);

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

pub(super) struct Sender {
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
    pub(super) fn new(line: Line, shared: Arc<Shared>) -> Self {
        let ambiguous = shared.lock().spool.cursor.sending.is_some();
        let last_glance = Instant::now();
        Self { line, shared, last_text: None, last_glance, spare_webhook: false, refused: 0, ambiguous }
    }

    pub(super) fn run(mut self) {
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
