//! The one who decides: what is done next for which machine, what an answer means, and when it is over.

use super::crew::{self, Done, Task, WORKERS};
use super::plan::{self, Machine, Plan, Step};
use super::record::Recorder;
use super::retry::Retry;
use super::store::{Ended, Job, Stage};
use super::work::{Shop, expired, lost, refusal};
use super::{News, Options, Outcome, Report, Row, Trouble};
use crate::deadline::Stop;
use crate::fault::Fault;
use crate::process;
use crate::testflinger::client::{Error, Found};
use crate::testflinger::wire::job_state;
use anyhow::Result;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Does what `options` say, telling of it.
///
/// # Errors
/// [`WrongInput`](super::WrongInput) for a machines file or a template that makes no sense;
/// [`Stop::Interrupted`]; a server that cannot be reached or refuses us; a host [`Fault`] when the
/// output directory cannot be written. The jobs run on, and the same call goes on with them.
pub fn run(options: &Options, tell: &mut dyn FnMut(News)) -> Result<Report> {
    let Plan { shop, run, machines, is_resumed } = plan::make(options)?;
    let rows = machines.iter().map(|machine| machine.row(&shop.store)).collect();
    tell(News::Begun { rows, resumed: is_resumed.then_some(run.started_at) });
    let shop = Arc::new(shop);
    let (tasks, done) = crew::employ(&shop)?;
    let recorder = Recorder::new(options.environment.clone(), &run.tag);
    let mut drive = Drive {
        options,
        tell,
        shop,
        recorder,
        tag: run.tag,
        machines,
        tasks,
        under_way: 0,
        search: Retry::now(),
        searching: false,
        last_contact: None,
        in_trouble: false,
        problem: None,
    };
    drive.catch_up()?;
    let result = drive.go_on(&done);
    let ended = drive.recorder.end();
    result?;
    drive.problem = drive.problem.or(ended.err());
    let rows = drive.machines.iter().map(|machine| machine.row(&drive.shop.store)).collect();
    Ok(Report { run: drive.tag, server: run.server, rows, problem: drive.problem })
}

struct Drive<'a> {
    options: &'a Options,
    tell: &'a mut dyn FnMut(News),
    shop: Arc<Shop>,
    recorder: Recorder,
    tag: String,
    machines: Vec<Machine>,
    tasks: Sender<Task>,
    under_way: usize,
    search: Retry,
    searching: bool,
    /// When the server last answered.
    last_contact: Option<Instant>,
    /// What was said of an outage still holds.
    in_trouble: bool,
    /// The first thing that could not be recorded.
    problem: Option<anyhow::Error>,
}

impl Drive<'_> {
    fn go_on(&mut self, done: &Receiver<Done>) -> Result<()> {
        let mut ticked = Instant::now();
        while self.machines.iter().any(|machine| machine.step != Step::Over) {
            if process::interrupted() {
                return Err(Stop::Interrupted.into());
            }
            self.dispatch();
            // The signal handler does not end a wait.
            if let Ok(done) = done.recv_timeout(Duration::from_millis(50)) {
                self.under_way -= 1;
                self.handle(done)?;
            }
            if ticked.elapsed() >= Duration::from_secs(1) {
                ticked = Instant::now();
                (self.tell)(News::Tick);
            }
        }
        Ok(())
    }

    /// Gives workers what is due.
    fn dispatch(&mut self) {
        let waits = self.machines.iter().any(|machine| machine.step == Step::Watch);
        if !self.searching && self.search.is_due() && (waits || self.last_contact.is_none()) {
            self.searching = true;
            self.assign(Task::Search(self.tag.clone()));
        }
        // One request tells whether the server is there and lets us in.
        if self.last_contact.is_none() {
            return;
        }
        for index in 0..self.machines.len() {
            if self.under_way >= WORKERS {
                return;
            }
            let machine = &mut self.machines[index];
            if machine.busy || !machine.retry.is_due() {
                continue;
            }
            let job = || Box::new(machine.job.clone());
            let task = match machine.step {
                Step::Send => Task::Send(index, job()),
                Step::Ask => Task::Ask(index, job()),
                Step::Collect => Task::Collect(index, job()),
                Step::Watch | Step::Over => continue,
            };
            machine.busy = true;
            self.assign(task);
        }
    }

    fn assign(&mut self, task: Task) {
        // Workers live as long as we do.
        if self.tasks.send(task).is_ok() {
            self.under_way += 1;
        }
    }

    fn handle(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Found(result) => {
                self.searching = false;
                self.found(result)
            }
            Done::Sent(index, job, result) => {
                self.machines[index].busy = false;
                self.sent(index, *job, result)
            }
            Done::Asked(index, result) => {
                self.machines[index].busy = false;
                match self.settle(index, result, "cannot ask for the job")? {
                    Some(Ok(Some(state))) => self.in_state(index, &state),
                    Some(Ok(None)) => self.finish(index, expired())?,
                    Some(Err(error)) => self.finish(index, lost(&error))?,
                    None => {}
                }
                Ok(())
            }
            Done::Collected(index, result) => {
                self.machines[index].busy = false;
                match self.settle(index, result, "cannot fetch the result")? {
                    Some(Ok(Some(ended))) => self.finish(index, ended)?,
                    Some(Ok(None)) => self.machines[index].step = Step::Watch,
                    Some(Err(error)) => self.finish(index, lost(&error))?,
                    None => {}
                }
                Ok(())
            }
        }
    }

    fn found(&mut self, result: Result<Vec<Found>, Error>) -> Result<()> {
        let found = match result {
            Ok(found) => found,
            // A server that knows no search: each job is asked for.
            Err(error) if matches!(error.status(), Some(404 | 405)) => Vec::new(),
            Err(error) if error.is_passing() => {
                let error = anyhow::Error::new(error);
                let Some(wait) = self.search.failed(self.last_contact.is_some()) else {
                    return Err(self.away(error));
                };
                self.say_trouble(|| format!("cannot ask for the states of the jobs: {error:#}"), wait);
                return Ok(());
            }
            Err(error) => return Err(refusal(error)),
        };
        self.heard();
        self.search.worked(self.options.poll_interval);
        let states: HashMap<_, _> = found.into_iter().map(|found| (found.job_id, found.state)).collect();
        for index in 0..self.machines.len() {
            if self.machines[index].step != Step::Watch {
                continue;
            }
            match states.get(&self.machines[index].job.job_id) {
                Some(state) => self.in_state(index, state),
                // Of another program, submitted meanwhile, or gone.
                None => self.machines[index].step = Step::Ask,
            }
        }
        Ok(())
    }

    fn sent(&mut self, index: usize, job: Job, result: Result<(), Trouble>) -> Result<()> {
        self.machines[index].job = job;
        match self.settle(index, result, "cannot submit the job")? {
            None => {}
            Some(Ok(())) => match self.machines[index].job.ended.take() {
                Some(ended) => self.finish(index, ended)?,
                None => {
                    self.machines[index].step = if self.options.watch { Step::Watch } else { Step::Over };
                    self.changed(index);
                }
            },
            Some(Err(error)) => {
                let machine = &mut self.machines[index];
                let what = match (machine.job.stage, machine.job.attempt) {
                    (Stage::Planned, 1) => "not submitted".to_owned(),
                    (Stage::Planned, _) => "another job was not submitted".into(),
                    // It stays on disk, so that the next process finds out.
                    _ => format!("perhaps submitted, as job {}", machine.job.job_id),
                };
                machine.refused = Some(format!("{what}: {error:#}").replace("\nFix: ", "; "));
                // What was known before the refusal is so again.
                let before = machine.job.before.take().filter(|before| before.run == self.tag);
                if let (Some(before), Stage::Planned) = (before, machine.job.stage) {
                    machine.job = *before;
                    machine.job.retry = false;
                    self.shop.store.save(&machine.job)?;
                }
                machine.step = Step::Over;
                self.changed(index);
            }
        }
        Ok(())
    }

    /// What a try came to that need not be tried again; `None` when it is.
    fn settle<T>(
        &mut self,
        index: usize,
        result: Result<T, Trouble>,
        what: &str,
    ) -> Result<Option<Result<T, anyhow::Error>>> {
        let machine = &mut self.machines[index];
        match result {
            Ok(value) => {
                machine.retry = Retry::now();
                self.heard();
                Ok(Some(Ok(value)))
            }
            Err(Trouble::Lasting(error)) => Ok(Some(Err(error))),
            Err(Trouble::Here(error)) => Err(error),
            Err(Trouble::Passing(error)) => {
                let Some(wait) = machine.retry.failed(true) else {
                    // Where others get answers, it is about this job.
                    let is_away = self.last_contact.is_none_or(|at| at.elapsed() > Duration::from_secs(300));
                    return if is_away { Err(self.away(error)) } else { Ok(Some(Err(error))) };
                };
                let name = machine.name.clone();
                self.say_trouble(|| format!("{name}: {what}: {error:#}"), wait);
                Ok(None)
            }
        }
    }

    fn heard(&mut self) {
        self.last_contact = Some(Instant::now());
        self.in_trouble = false;
    }

    /// The server does not come back: the jobs go on, and so does the same command later.
    fn away(&self, error: anyhow::Error) -> anyhow::Error {
        let fault = Fault::host(format!("the server {} does not answer", self.shop.client.base()));
        error.context(fault.fix("check `--server`; the same command goes on later"))
    }

    /// Once for an outage, not once for each machine and try.
    fn say_trouble(&mut self, what: impl FnOnce() -> String, wait: Duration) {
        if !self.in_trouble {
            self.in_trouble = true;
            (self.tell)(News::Trouble { what: what(), wait });
        }
    }

    fn in_state(&mut self, index: usize, state: &str) {
        let machine = &mut self.machines[index];
        machine.step = if job_state::is_final(state) { Step::Collect } else { Step::Watch };
        if machine.state.as_deref() != Some(state) {
            machine.state = Some(state.to_owned());
            // Of its end more is told at once.
            if machine.step == Step::Watch {
                self.changed(index);
            }
        }
    }

    /// The job of a machine has ended: that is on disk first, then in the ledger.
    fn finish(&mut self, index: usize, ended: Ended) -> Result<()> {
        let machine = &mut self.machines[index];
        let retry =
            ended.outcome == Outcome::ProvisionFailed && machine.job.attempt <= self.options.retry_provision;
        machine.job.ended = Some(ended);
        machine.job.retry = retry;
        self.shop.store.save(&machine.job)?;
        machine.step = Step::Over;
        self.changed(index);
        self.record(index)?;
        self.again(index);
        Ok(())
    }

    /// Begins another attempt where one was decided on.
    fn again(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        if machine.job.retry {
            machine.job = Job::planned(&machine.name, &self.tag, Some(machine.job.clone()));
            machine.state = None;
            machine.retry = Retry::now();
            machine.step = Step::Send;
        }
    }

    /// What an earlier process saw end, and left at that.
    fn catch_up(&mut self) -> Result<()> {
        for index in 0..self.machines.len() {
            self.record(index)?;
            self.again(index);
        }
        Ok(())
    }

    /// A ledger that cannot be written must not cost the watch over the other jobs.
    fn record(&mut self, index: usize) -> Result<()> {
        let job = &mut self.machines[index].job;
        let Some(ended) = job.ended.as_ref().filter(|_| !job.recorded) else { return Ok(()) };
        match self.recorder.record(job, ended) {
            Ok(()) => {
                job.recorded = true;
                self.shop.store.save(job)
            }
            Err(error) => {
                self.problem.get_or_insert(error);
                Ok(())
            }
        }
    }

    fn changed(&mut self, index: usize) {
        let row: Row = self.machines[index].row(&self.shop.store);
        (self.tell)(News::Changed(row));
    }
}
