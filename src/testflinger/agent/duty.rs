//! What an agent does between jobs: it registers, obeys admins, resends what waits, and asks for work.
//!
//! Nothing here gives up: what the server does not take is owed, and done when it is back.

use super::job::{After, resume, run};
use super::outbox::chain;
use super::place::{Place, check_room, left_by};
use super::survivors::Mark;
use super::{Agent, End, SIGNALLED, memory, results};
use crate::testflinger::client::Error;
use crate::testflinger::wire::{AgentData, AgentUpdate, Phase, is_id, job_state};
use anyhow::Result;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Queues are told again this often: the server forgets them after seven days.
const ADVERTISE: Duration = Duration::from_secs(3600);
/// The server forgets an agent that says nothing for seven days.
const HEARTBEAT: Duration = Duration::from_secs(24 * 3600);
/// The first pause of an agent whose server does not answer; later ones are longer.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// What is owed to the server, and to the admins.
#[derive(Debug, Default)]
pub(super) struct Duty {
    /// The server knows who we are since our start.
    registered: bool,
    advertised: Option<Instant>,
    /// A job has ended, and the server does not know it of us.
    after: Option<After>,
    /// Jobs of an earlier life were looked for on disk.
    swept: bool,
    /// The last state that kept us from work, to log each once.
    idle_for: Option<String>,
    outage: Option<Duration>,
    /// Nothing happened but polling since memory was given back.
    settled: bool,
}

/// What one cycle comes to.
enum Next {
    /// Ask again at once.
    Again,
    /// Ask again later.
    Later,
    End(End),
}

impl Agent {
    /// Works until it is asked to end.
    pub(super) fn work(&mut self) -> Result<End> {
        self.log.info(format!(
            "Agent {} takes jobs from {}",
            self.config.agent_id,
            self.config.job_queues.join(", ")
        ));
        loop {
            if self.control.drains() {
                self.log.info("Asked to end");
                return Ok(End::Terminated);
            }
            let next = match self.cycle() {
                Ok(next) => {
                    if self.duty.outage.take().is_some() {
                        self.log.info("The server is back");
                    }
                    next
                }
                Err(error) => {
                    self.lament(&error);
                    Next::Later
                }
            };
            match next {
                Next::Again => {}
                Next::End(end) => return Ok(end),
                Next::Later => {
                    // Whoever asked for a restart does not wait for a server that does not answer.
                    if self.duty.outage.is_some() && self.control.restarts() {
                        return Ok(End::Restart);
                    }
                    if !std::mem::replace(&mut self.duty.settled, true) {
                        memory::forget_code();
                    }
                    self.control.sleep(self.duty.outage.unwrap_or(self.config.polling_interval()));
                }
            }
        }
    }

    fn lament(&mut self, error: &Error) {
        let text = chain(error);
        match self.duty.outage {
            None => self.log.warning(format!("The server is not to be had, and is asked again: {text}")),
            Some(_) => self.log.debug(&text),
        }
        let longest = self.config.polling_interval().max(FIRST_PAUSE);
        self.duty.outage = Some(self.duty.outage.map_or(FIRST_PAUSE, |pause| pause * 2).min(longest));
    }

    fn cycle(&mut self) -> Result<Next, Error> {
        if !std::mem::replace(&mut self.duty.swept, true) {
            for place in left_by(&self.config.execution_basedir, &self.config.agent_id) {
                if !self.clear_up(place) {
                    return Ok(Next::Later);
                }
            }
        }
        if self.duty.after.is_some() {
            self.client.update_agent(&self.config.agent_id, &AgentUpdate::job(""))?;
        }
        let known = self.client.agent_data(&self.config.agent_id)?;
        let fresh = !self.duty.registered || known.is_none();
        let data = known.unwrap_or_default();
        if fresh {
            self.register(&data)?;
            if self.adopt(&data)? {
                return Ok(Next::Again);
            }
        }
        if let Some(next) = self.obey(&data, fresh)? {
            return Ok(next);
        }
        self.stay_known(&data)?;
        if let Err(error) = results::resend(self) {
            self.log.debug(format!("Results wait: {error:#}"));
        }
        if let Err(error) = check_room(&self.config.execution_basedir) {
            self.idle(&format!("{error:#}"));
            return Ok(Next::Later);
        }
        self.duty.idle_for = None;
        let job = match self.client.take_job(self.queues(&data)) {
            Err(error @ Error::WrongJob(_)) => {
                self.log.error(chain(&error));
                return Ok(Next::Later);
            }
            other => other?,
        };
        let Some(job) = job else { return Ok(Next::Later) };
        self.duty.settled = false;
        match run(self, job) {
            Ok(Some(after)) => self.duty.after = Some(after),
            Ok(None) => return Ok(Next::End(End::Terminated)),
            Err(error) => self.log.error(format!("{error:#}")),
        }
        Ok(Next::Again)
    }

    /// Finishes a job of an earlier life; false when the agent must end now.
    fn clear_up(&mut self, place: Place) -> bool {
        let name = place.rundir.display().to_string();
        match resume(self, place) {
            Ok(Some(after)) => self.duty.after = Some(after),
            Ok(None) => return false,
            Err(error) => self.log.error(format!("What is left in {name} cannot be cleared up: {error:#}")),
        }
        true
    }

    /// Tells who we are. An agent that an admin took offline stays there.
    fn register(&mut self, data: &AgentData) -> Result<(), Error> {
        let agent = self.config.agent_id.clone();
        if self.duty.after.is_none() && !stays(data) {
            self.tell("waiting", "")?;
        }
        self.advertise()?;
        let update = AgentUpdate {
            location: Some(self.config.location.clone().unwrap_or_default()),
            queues: Some(self.config.job_queues.clone()),
            provision_type: Some(self.config.provision_type.clone().unwrap_or_default()),
            identifier: self.config.identifier.clone(),
            ..AgentUpdate::default()
        };
        self.client.update_agent(&agent, &update)?;
        self.duty.registered = true;
        Ok(())
    }

    /// Tells in which state the agent is from now on.
    fn tell(&self, state: &str, comment: &str) -> Result<(), Error> {
        self.client.update_agent(&self.config.agent_id, &AgentUpdate::state(state, comment))?;
        self.influx.tell(state, None);
        Ok(())
    }

    fn advertise(&mut self) -> Result<(), Error> {
        let refused = |outcome: Result<(), Error>| match outcome {
            Err(error) if !error.is_outage() => {
                self.log.error(format!("The server does not take what is advertised: {}", chain(&error)));
                Ok(())
            }
            other => other,
        };
        if let Some(queues) = self.config.advertised_queues.as_ref().filter(|queues| !queues.is_empty()) {
            refused(self.client.advertise_queues(queues))?;
        }
        if let Some(images) = self.config.advertised_images.as_ref().filter(|images| !images.is_empty()) {
            let images: BTreeMap<_, _> =
                images.iter().map(|(queue, images)| (queue.clone(), images.map())).collect();
            refused(self.client.advertise_images(&images))?;
        }
        self.duty.advertised = Some(Instant::now());
        Ok(())
    }

    /// Finds the job that the server thinks we run: one that the original agent left when it died, or
    /// that was lost with its directory. True when there was one.
    fn adopt(&mut self, data: &AgentData) -> Result<bool, Error> {
        if self.duty.after.is_some() || !is_id(&data.job_id) {
            return Ok(false);
        }
        if self.config.results_basedir.join(&data.job_id).exists() {
            // It has ended, and its results wait.
            self.duty.after = Some(After::default());
            return Ok(true);
        }
        let place = Place::of(&self.config.execution_basedir, &data.job_id);
        let phase = Phase::ALL.into_iter().find(|phase| phase.name() == data.state);
        Mark::In(place.rundir.clone(), self.config.agent_id.clone()).end();
        match results::adopt(self, &place, phase) {
            Ok(()) => {
                self.clear_up(place);
            }
            Err(error) => {
                let state = self.client.job_state(&data.job_id)?;
                if state.is_some_and(|state| !job_state::is_final(&state)) {
                    self.log.error(format!("Job {} is lost: {error:#}", data.job_id));
                    results::tell_lost(self, &data.job_id, phase)?;
                }
                self.duty.after = Some(After::default());
            }
        }
        Ok(true)
    }

    /// Does what an admin or a supervisor asks, and says that a job has ended. `None` to go on.
    fn obey(&mut self, data: &AgentData, fresh: bool) -> Result<Option<Next>, Error> {
        let after = self.duty.after.clone();
        let told = after.clone().unwrap_or_default();
        let off = stays(data) || !fresh && data.state == "offline";
        let offline = if off { Some(data.comment.clone()) } else { told.offline };
        if let Some(comment) = offline {
            // What an admin calls maintenance stays that.
            if after.is_some() && data.state != "maintenance" {
                self.tell("offline", &comment)?;
            }
            self.duty.after = None;
            if self.control.restarts() {
                // The state stays what an admin made it.
                return Ok(Some(Next::End(End::Restart)));
            }
            self.stay_known(data)?;
            self.idle(&format!("offline: {comment}"));
            return Ok(Some(Next::Later));
        }
        let asked = (data.state == "restart" && !fresh).then(|| data.comment.clone());
        let signalled = self.control.restarts().then(|| SIGNALLED.to_owned());
        if let Some(comment) = told.restart.or(asked).or(signalled) {
            self.log.info(format!("Restart: {comment}"));
            self.tell("restart", &comment)?;
            self.duty.after = None;
            return Ok(Some(Next::End(End::Restart)));
        }
        if after.is_some() {
            self.tell("waiting", "")?;
            self.duty.after = None;
        }
        Ok(None)
    }

    /// Keeps the server from forgetting us and our queues.
    fn stay_known(&mut self, data: &AgentData) -> Result<(), Error> {
        if self.duty.advertised.is_some_and(|last| last.elapsed() > ADVERTISE) {
            self.advertise()?;
        }
        let silent =
            data.updated_at.parse::<Timestamp>().ok().map(|last| Timestamp::now().duration_since(last));
        if silent.is_some_and(|silent| silent >= HEARTBEAT.try_into().unwrap_or_default()) {
            let update = AgentUpdate::state(&*data.state, &*data.comment);
            self.client.update_agent(&self.config.agent_id, &update)?;
        }
        Ok(())
    }

    /// Queues that are for some clients only come before all others: they alone are asked then.
    fn queues<'a>(&'a self, data: &'a AgentData) -> Vec<&'a str> {
        let all = self.config.job_queues.iter().map(String::as_str);
        let restricted: Vec<_> = all
            .clone()
            .filter(|queue| data.restricted_to.get(*queue).is_some_and(|owners| !owners.is_empty()))
            .collect();
        if restricted.is_empty() { all.collect() } else { restricted }
    }

    fn idle(&mut self, why: &str) {
        if self.duty.idle_for.as_deref() != Some(why) {
            self.log.warning(format!("Takes no jobs: {why}"));
            self.duty.idle_for = Some(why.to_owned());
        }
    }
}

/// True for an agent that an admin took out of work. The original leaves agents offline that it
/// restarts, with a comment that is its own.
fn stays(data: &AgentData) -> bool {
    match data.state.as_str() {
        "maintenance" => true,
        "offline" => data.comment != SIGNALLED,
        _ => false,
    }
}
