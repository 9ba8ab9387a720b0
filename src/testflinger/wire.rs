//! What goes over the wire: phases, jobs, agents, fragments of logs, outcomes.
//!
//! Owns names and shapes, as the server (1.5.0) validates them: it answers 422 to a field it does
//! not know. Reading is lenient, since servers grow fields.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;

/// A stage of a job, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // They are their names.
pub enum Phase {
    Setup,
    Provision,
    FirmwareUpdate,
    Test,
    Allocate,
    Reserve,
    Cleanup,
}

impl Phase {
    /// All of them; cleanup is last.
    pub const ALL: [Self; 7] = [
        Self::Setup,
        Self::Provision,
        Self::FirmwareUpdate,
        Self::Test,
        Self::Allocate,
        Self::Reserve,
        Self::Cleanup,
    ];

    /// Its name on the wire, in file names and in keys of configurations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Provision => "provision",
            Self::FirmwareUpdate => "firmware_update",
            Self::Test => "test",
            Self::Allocate => "allocate",
            Self::Reserve => "reserve",
            Self::Cleanup => "cleanup",
        }
    }

    /// True for the phases that run only when the job brings `{phase}_data`.
    pub const fn needs_data(self) -> bool {
        !matches!(self, Self::Setup | Self::Cleanup)
    }

    /// The phases whose data may announce attachments.
    pub const WITH_ATTACHMENTS: [Self; 3] = [Self::Provision, Self::FirmwareUpdate, Self::Test];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// States of a job that are no phase.
pub mod job_state {
    /// Someone cancelled it.
    pub const CANCELLED: &str = "cancelled";
    /// It has ended.
    pub const COMPLETE: &str = "complete";
    /// The phase of the same name is done, and the machine is its parent job's.
    pub const ALLOCATED: &str = "allocated";

    /// True when nothing more will happen to a job in this state.
    pub fn is_final(state: &str) -> bool {
        matches!(state, CANCELLED | COMPLETE | "completed")
    }
}

/// A job as the server hands it out: whatever was submitted, and what the server adds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Job(Map<String, Value>);

/// A job that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a job that makes no sense: {0}")]
pub struct WrongJob(String);

impl Job {
    /// Takes a job as the server gave it.
    ///
    /// # Errors
    /// When it is no object, or its id cannot be the name of a directory.
    pub fn new(value: Value) -> Result<Self, WrongJob> {
        let Value::Object(map) = value else { return Err(WrongJob("it is no object".into())) };
        let job = Self(map);
        match job.text("job_id") {
            Some(id) if is_id(id) => Ok(job),
            id => Err(WrongJob(format!("its `job_id` is {id:?}"))),
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.as_str()
    }

    fn seconds(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64()
    }

    /// Its id: letters, digits, `-` and `_`.
    pub fn id(&self) -> &str {
        self.text("job_id").unwrap_or_default()
    }

    /// The queue it came from.
    pub fn queue(&self) -> &str {
        self.text("job_queue").unwrap_or_default()
    }

    /// Where its events are sent, if anywhere.
    pub fn webhook(&self) -> Option<&str> {
        self.text("job_status_webhook").filter(|url| !url.is_empty())
    }

    /// The job that waits for this one.
    pub fn parent(&self) -> Option<&str> {
        self.text("parent_job_id").filter(|id| is_id(id))
    }

    /// Seconds the job may take.
    pub fn global_timeout(&self) -> Option<u64> {
        self.seconds("global_timeout")
    }

    /// Seconds its test may be silent.
    pub fn output_timeout(&self) -> Option<u64> {
        self.seconds("output_timeout")
    }

    /// Seconds it may stay allocated.
    pub fn allocation_timeout(&self) -> Option<u64> {
        self.seconds("allocation_timeout")
    }

    /// True when its attachments wait on the server.
    pub fn has_attachments(&self) -> bool {
        self.text("attachments_status") == Some("complete")
    }

    /// `{phase}_data`, where there is some.
    pub fn data(&self, phase: Phase) -> Option<&Map<String, Value>> {
        self.0.get(&format!("{phase}_data"))?.as_object().filter(|data| !data.is_empty())
    }

    /// True when the job asks for `phase`: its data are there and do not say `skip`.
    ///
    /// Data that consist of attachments alone ask for nothing: the attachments are unpacked before.
    pub fn asks_for(&self, phase: Phase) -> bool {
        if !phase.needs_data() {
            return true;
        }
        let attached = Phase::WITH_ATTACHMENTS.contains(&phase) && self.has_attachments();
        self.data(phase).is_some_and(|data| {
            let empty = attached && data.keys().all(|key| key == "attachments");
            !empty && data.get("skip") != Some(&Value::Bool(true))
        })
    }

    /// The first phase that wants attachments.
    pub fn first_attached(&self) -> Option<Phase> {
        Phase::WITH_ATTACHMENTS
            .into_iter()
            .find(|phase| self.data(*phase).is_some_and(|data| data.contains_key("attachments")))
    }

    /// The user on the machine under test.
    pub fn test_username(&self) -> Option<&str> {
        self.data(Phase::Test)?.get("test_username")?.as_str()
    }

    /// The secrets of the test phase, by the name of their variable. Those that the server could not
    /// read are empty.
    pub fn secrets(&self) -> BTreeMap<String, String> {
        let secrets = self.data(Phase::Test).and_then(|data| data.get("secrets")?.as_object());
        let text = |value: &Value| value.as_str().map(str::to_owned);
        secrets.into_iter().flatten().filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
    }
}

/// True for what can be an id and the name of a directory.
pub fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
}

/// What the server knows of an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentData {
    /// Its id.
    pub name: String,
    /// `waiting`, a phase, `offline`, `maintenance` or `restart`; empty when unknown.
    pub state: String,
    /// Why it is in that state.
    pub comment: String,
    /// The job it said it runs.
    pub job_id: String,
    /// When it last said anything.
    pub updated_at: String,
    /// Queues that are for some clients only, and for which.
    pub restricted_to: BTreeMap<String, Vec<String>>,
}

impl AgentData {
    /// Whether it takes jobs, as far as the server knows.
    pub fn works(&self) -> bool {
        !matches!(self.state.as_str(), "offline" | "maintenance")
    }
}

/// What an agent tells of itself; what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentUpdate {
    /// See [`AgentData::state`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// See [`AgentData::comment`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// See [`AgentData::job_id`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// Where the machine is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// The queues it takes jobs from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<Vec<String>>,
    /// How its machine is provisioned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provision_type: Option<String>,
    /// The machine's name in other systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identifier: Option<String>,
}

impl AgentUpdate {
    /// A state and why.
    pub fn state(state: impl Into<String>, comment: impl Into<String>) -> Self {
        Self { state: Some(state.into()), comment: Some(comment.into()), ..Self::default() }
    }

    /// The job that runs; empty for none.
    pub fn job(id: impl Into<String>) -> Self {
        Self { job_id: Some(id.into()), ..Self::default() }
    }
}

/// Exit statuses of phases.
pub type Statuses = BTreeMap<Phase, u8>;

/// What is posted of a job's result; what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResultUpdate {
    /// Exit statuses so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Statuses>,
    /// A phase, or one of [`job_state`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_state: Option<String>,
    /// What the device connector tells of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_info: Option<Value>,
}

impl ResultUpdate {
    /// A new state of the job.
    pub fn state(state: impl Into<String>) -> Self {
        Self { job_state: Some(state.into()), ..Self::default() }
    }
}

/// Which log a fragment belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Log {
    /// What the phase's command printed.
    Output,
    /// What the device connector saw on the serial console.
    Serial,
}

impl Log {
    /// Its name in paths.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Serial => "serial",
        }
    }
}

/// A piece of a log. Numbers count over all phases of a job, for each log by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // They are their names.
pub struct Fragment<'a> {
    pub fragment_number: u64,
    pub timestamp: &'a str,
    pub phase: Phase,
    pub log_data: &'a str,
}

/// Something that happened to a job, for who listens on its webhook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // They are their names.
pub struct Event {
    pub event_name: String,
    pub timestamp: String,
    pub detail: String,
}

/// How provisioning went, for the statistics of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // They are their names.
pub struct ProvisionLog {
    pub job_id: String,
    pub exit_code: u8,
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn job(mut value: Value) -> Job {
        value["job_id"] = "3b4cf884-c994-46c6-baf0-b56ebf12cd12".into();
        Job::new(value).expect("a job")
    }

    #[test]
    fn an_id_is_a_name_and_no_path() {
        for id in [json!("../x"), json!(""), json!(null), json!(7), json!("a/b"), json!(".")] {
            assert!(Job::new(json!({"job_id": id})).is_err(), "{id}");
        }
        assert!(Job::new(json!([])).is_err());
    }

    #[test]
    fn phases_are_skipped_as_their_data_say() {
        let job = job(json!({
            "attachments_status": "complete",
            "provision_data": null,
            "firmware_update_data": {"attachments": [{"agent": "x"}]},
            "test_data": {"test_cmds": "true", "attachments": []},
            "reserve_data": {"skip": true, "ssh_keys": []},
            "allocate_data": {},
        }));
        let asked: Vec<_> = Phase::ALL.into_iter().filter(|phase| job.asks_for(*phase)).collect();
        assert_eq!(asked, [Phase::Setup, Phase::Test, Phase::Cleanup]);
        assert_eq!(job.first_attached(), Some(Phase::FirmwareUpdate));
    }

    #[test]
    fn what_the_server_adds_is_kept_and_odd_times_do_no_harm() {
        let job = job(json!({"started_at": "2026-11-20T10:33:31+00:00Z", "new_field": [1]}));
        let written = serde_json::to_value(&job).expect("writes");
        assert_eq!(written["new_field"], json!([1]));
    }

    #[test]
    fn names_on_the_wire_are_those_of_the_phases() {
        for phase in Phase::ALL {
            assert_eq!(json!(phase), phase.name());
        }
        let statuses = Statuses::from([(Phase::Test, 3), (Phase::Setup, 0)]);
        let update = ResultUpdate { status: Some(statuses), ..ResultUpdate::default() };
        assert_eq!(json!(update), json!({"status": {"setup": 0, "test": 3}}));
    }
}
