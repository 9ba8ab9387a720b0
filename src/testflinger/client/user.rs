//! What a user asks of the server: one method per endpoint.

use super::{Client, Error, FILES, LOGS, Payload, Result, USUAL, endless, escape, result};
use crate::testflinger::wire::{AgentData, Log, Phase};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use ureq::http::{Method, StatusCode};

/// A job as a search finds it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Found {
    /// Its id.
    pub job_id: String,
    /// Its state, as in [`JobResult::state`](super::JobResult::state).
    #[serde(rename = "job_state")]
    pub state: String,
}

/// A phase's part of a log, from some fragment on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct LogPart {
    /// The number of the last fragment that is in it; -1 for none.
    #[serde(rename = "last_fragment_number")]
    pub last: i64,
    /// The text of the fragments.
    #[serde(rename = "log_data")]
    pub text: String,
}

impl Client {
    /// Submits a job and gives its id.
    ///
    /// The server takes the `job_id` that the job brings, and takes it twice if it is submitted twice:
    /// after an answer that was lost, [`Self::job`] tells whether it has it.
    ///
    /// # Errors
    /// As of every request: [`Error`]; 422 for a job that it does not like.
    pub fn submit(&self, job: &Map<String, Value>) -> Result<String> {
        #[derive(Deserialize)]
        struct Answer {
            job_id: String,
        }
        let path = "/v1/job";
        let body = serde_json::to_vec(job).map_err(|error| self.garbled(path, error))?;
        let mut response = self.call(Method::POST, path, Payload::Json(&body), USUAL)?;
        let answer: Answer =
            self.json(path, &mut response)?.ok_or_else(|| self.garbled(path, "no id of a job"))?;
        Ok(answer.job_id)
    }

    /// A job as it was submitted; `None` when the server does not have it.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn job(&self, job: &str) -> Result<Option<Map<String, Value>>> {
        self.get_optional(&format!("/v1/job/{}", escape(job)))
    }

    /// Uploads the attachments of a job, a gzipped tar: no agent gets the job before. Again does no harm.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn send_attachments(&self, job: &str, archive: &Path) -> Result<()> {
        let path = format!("/v1/job/{}/attachments", escape(job));
        self.call(Method::POST, &path, Payload::File(archive), FILES).map(drop)
    }

    /// The jobs that have all of `tags`, in one request. The server forgets a job after seven days.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn search<'a>(&self, tags: impl IntoIterator<Item = &'a str>) -> Result<Vec<Found>> {
        let tags: String = tags.into_iter().map(|tag| format!("&tags={}", escape(tag))).collect();
        self.get(&format!("/v1/job/search?match=all{tags}"))
    }

    /// What became of a job so far, with at most `largest` bytes of its logs together; `None` when the server
    /// does not have it.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn result(&self, job: &str, largest: u64) -> Result<Option<super::JobResult>> {
        let path = format!("/v1/result/{}", escape(job));
        let mut response = self.call(Method::GET, &path, Payload::None, FILES)?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        result::read(endless(&mut response), largest).map(Some).map_err(|error| self.broken(&path, error))
    }

    /// The log of a job by phase, from fragment `start` on; 32 MiB at most. Fragments are counted over
    /// all phases: the next part starts one after the largest [`LogPart::last`].
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn log(&self, job: &str, log: Log, start: u64) -> Result<BTreeMap<Phase, LogPart>> {
        let path = format!("/v1/result/{}/log/{}?start_fragment={start}", escape(job), log.name());
        let mut response = self.call(Method::GET, &path, Payload::None, LOGS)?;
        let answer: Option<BTreeMap<String, BTreeMap<Phase, LogPart>>> = self.json(&path, &mut response)?;
        Ok(answer.unwrap_or_default().remove(log.name()).unwrap_or_default())
    }

    /// Writes a job's artifacts, a gzipped tar of at most `limit` bytes, to `file`; false when there
    /// are none.
    ///
    /// # Errors
    /// As of every request: [`Error`]; [`Error::Garbled`] for more than `limit`.
    pub fn fetch_artifacts(&self, job: &str, file: &mut File, limit: u64) -> Result<bool> {
        self.download(&format!("/v1/result/{}/artifact", escape(job)), file, limit)
    }

    /// Cancels a job; false when it has ended already, or is not known.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn cancel(&self, job: &str) -> Result<bool> {
        let path = format!("/v1/job/{}/action", escape(job));
        match self.post(&path, &json!({"action": "cancel"}), USUAL) {
            Err(Error::Refused { status: 400, message, .. }) if message.contains("already") => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// The agents that take jobs from `queue`; `None` when the server never heard of the queue.
    ///
    /// # Errors
    /// As of every request: [`Error`].
    pub fn agents_of(&self, queue: &str) -> Result<Option<Vec<AgentData>>> {
        match self.get_optional(&format!("/v1/queues/{}/agents", escape(queue))) {
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            other => other.map(|agents| Some(agents.unwrap_or_default())),
        }
    }
}
