//! What an agent asks of the server: one method per endpoint.

use super::{Client, EVENTS, Error, FILES, LOGS, Payload, Result, USUAL, endless, escape, result};
use crate::testflinger::wire::{
    AgentData, AgentUpdate, Event, Fragment, Job, Log, Phase, ProvisionLog, ResultUpdate,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use ureq::http::{Method, StatusCode};

/// What is read for nothing, to keep a connection.
const LITTLE: u64 = 64 << 10;

impl Client {
    /// What the server knows of `agent`; `None` when it does not know it.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn agent_data(&self, agent: &str) -> Result<Option<AgentData>> {
        match self.get(&format!("/v1/agents/data/{}", escape(agent))) {
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            other => other,
        }
    }

    /// Tells the server of `agent`.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn update_agent(&self, agent: &str, update: &AgentUpdate) -> Result<()> {
        self.post(&format!("/v1/agents/data/{}", escape(agent)), update, USUAL)
    }

    /// Says what queues are for.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn advertise_queues(&self, queues: &BTreeMap<String, String>) -> Result<()> {
        self.post("/v1/agents/queues", queues, USUAL)
    }

    /// Says which images the queues have.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn advertise_images(&self, images: &BTreeMap<String, BTreeMap<String, String>>) -> Result<()> {
        self.post("/v1/agents/images", images, USUAL)
    }

    /// Takes a job from one of `queues`. It is ours then, whether or not the answer arrives: a job whose
    /// answer is lost stays `running`, since the server lets no agent ask which jobs a queue has.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn take_job<'a>(&self, queues: impl IntoIterator<Item = &'a str>) -> Result<Option<Job>> {
        let mut path = "/v1/job".to_owned();
        for (index, queue) in queues.into_iter().enumerate() {
            path.push(if index == 0 { '?' } else { '&' });
            path.push_str("queue=");
            path.push_str(&escape(queue));
        }
        Ok(self.get_optional::<Value>(&path)?.map(Job::new).transpose()?)
    }

    /// The state of a job, without loading its logs; `None` when the server knows none.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn job_state(&self, job: &str) -> Result<Option<String>> {
        let path = format!("/v1/result/{}", escape(job));
        let mut response = self.call(Method::GET, &path, Payload::None, LOGS)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let mut reader = endless(&mut response);
        let state = result::state(&mut reader).map_err(|error| self.broken(&path, error));
        // The connection can be used again if there is little left, as for most of a job's life.
        let _ = io::copy(&mut reader.take(LITTLE), &mut io::sink());
        state
    }

    /// Posts news of a job's result.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn update_result(&self, job: &str, update: &ResultUpdate) -> Result<()> {
        self.post(&format!("/v1/result/{}", escape(job)), update, USUAL)
    }

    /// Appends to a log. The server stores what it is sent as often as it is sent.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn post_fragment(&self, job: &str, log: Log, fragment: &Fragment<'_>) -> Result<()> {
        self.post(&format!("/v1/result/{}/log/{}", escape(job), log.name()), fragment, LOGS)
    }

    /// Whether the server has `text` as what follows the first `told` bytes of a phase's log.
    ///
    /// Reads the whole result: the server lets no agent ask for fragments.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn has_text(&self, job: &str, log: Log, phase: Phase, told: u64, text: &str) -> Result<bool> {
        let path = format!("/v1/result/{}", escape(job));
        let mut response = self.call(Method::GET, &path, Payload::None, FILES)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(false);
        }
        result::has_text(endless(&mut response), (phase, log), told, text)
            .map_err(|error| self.broken(&path, error))
    }

    /// Tells the job's webhook, through the server, all that happened so far.
    ///
    /// # Errors
    /// As of every request: [`Error`]; what the webhook answers is in it too.
    pub fn post_events(&self, job: &Job, agent: &str, events: &[Event]) -> Result<()> {
        let body = serde_json::json!({
            "agent_id": agent,
            "job_queue": job.queue(),
            "job_status_webhook": job.webhook(),
            "events": events,
        });
        self.post(&format!("/v1/job/{}/events", escape(job.id())), &body, EVENTS)
    }

    /// Tells how provisioning went.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn post_provision_log(&self, agent: &str, log: &ProvisionLog) -> Result<()> {
        self.post(&format!("/v1/agents/provision_logs/{}", escape(agent)), log, USUAL)
    }

    /// Writes the job's attachments, a gzipped tar, to `file`; false when there are none.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn fetch_attachments(&self, job: &str, file: &mut File) -> Result<bool> {
        self.download(&format!("/v1/job/{}/attachments", escape(job)), file, u64::MAX)
    }

    /// Uploads a job's artifacts, a gzipped tar.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn send_artifacts(&self, job: &str, archive: &Path) -> Result<()> {
        let path = format!("/v1/result/{}/artifact", escape(job));
        let mut response = self.call(Method::POST, &path, Payload::File(archive), FILES)?;
        let _ = io::copy(&mut endless(&mut response).take(LITTLE), &mut io::sink());
        Ok(())
    }
}
