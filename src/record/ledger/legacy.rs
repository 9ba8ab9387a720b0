//! Lines that the original project wrote.

use super::Record;
use crate::record::metadata::{BootKind, Diagnostic, Host, Outcome, Qemu, Ssh, Timeouts, Timings, Utc};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A line without `schema_version`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Legacy {
    timestamp: Utc,
    metadata: PathBuf,
    harness_log: PathBuf,
    serial_log: PathBuf,
    ssh: Ssh,
    qemu: Qemu,
    pytest_args: Vec<String>,
    timeouts: Timeouts,
    outcome: LegacyOutcome,
    timings: Option<Timings>,
    session_ceiling_exceeded: Option<bool>,
    #[serde(default)]
    diagnostics: Vec<Diagnostic>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum LegacyOutcome {
    Passed,
    Failed,
    Error,
    Unknown,
}

/// The fields that every such line has, for [`super::check`].
pub(super) const SAMPLE: &str = r#"{
    "timestamp": "1970-01-01T00:00:00Z", "metadata": "", "harness_log": "", "serial_log": "",
    "ssh": {"host": "", "port": 0}, "qemu": {"command": [], "version": null}, "pytest_args": [],
    "timeouts": {"spawn_seconds": 0, "login_seconds": 0}, "outcome": "passed"
}"#;

impl From<Legacy> for Record {
    fn from(old: Legacy) -> Self {
        let (outcome, reason) = match old.outcome {
            LegacyOutcome::Passed => (Outcome::Passed, None),
            LegacyOutcome::Failed => (Outcome::Failed, None),
            LegacyOutcome::Error => (Outcome::Error, None),
            LegacyOutcome::Unknown => (Outcome::Error, Some("recorded as unknown".to_owned())),
        };
        Self {
            schema_version: 0,
            timestamp: old.timestamp,
            run_id: String::new(),
            scenario: String::new(),
            attempt: 1,
            markers: Vec::new(),
            outcome,
            reason,
            duration_seconds: old.timings.as_ref().and_then(|t| t.total_seconds).unwrap_or(0.0),
            boot: BootKind::Cold,
            accelerator: None,
            firmware: None,
            image: None,
            timings: old.timings,
            session_ceiling_exceeded: old.session_ceiling_exceeded,
            timeouts: old.timeouts,
            ssh: Some(old.ssh),
            qemu: Some(old.qemu),
            metadata: Some(old.metadata),
            harness_log: Some(old.harness_log),
            serial_log: Some(old.serial_log),
            diagnostics: old.diagnostics,
            harness_args: old.pytest_args,
            host: Host::default(),
            git: None,
            env: BTreeMap::new(),
        }
    }
}
