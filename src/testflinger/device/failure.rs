//! How a phase fails: its exit status, and what the agent reads of it.

use super::config::WrongConfig;
use super::request::{OwnImage, Refused};
use crate::deadline::Stop;
use crate::fault::{Blame, blame};
use crate::record::files;
use crate::testflinger::wire::Phase;
use anyhow::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// To the agent: no job can be served, which takes it offline.
pub(super) const RECOVERY: u8 = 46;

/// Beside the job: where agents look for what went wrong.
const ERRORS: &str = "device-connector-error.json";

/// A phase that failed.
#[derive(Debug)]
pub struct Failure {
    /// The exit status: 46 when nobody's job can be served, otherwise 1.
    pub code: u8,
    /// Why.
    pub error: Error,
}

impl Failure {
    pub(super) fn of(phase: Phase, error: Error) -> Self {
        let code = code(phase, &error);
        let failure = Self { code, error };
        if let Err(error) = failure.note(phase, Path::new(ERRORS)) {
            return Self { code, error: failure.error.context(format!("{error:#}")) };
        }
        failure
    }

    /// Puts it beside what other phases put there.
    fn note(&self, phase: Phase, path: &Path) -> Result<()> {
        let known = std::fs::read(path).unwrap_or_default();
        let mut errors: Map<String, Value> = serde_json::from_slice(&known).unwrap_or_default();
        errors.insert(format!("{phase}_exception_info"), self.describe(phase));
        files::replace(path, &serde_json::to_vec(&errors)?)
    }

    fn describe(&self, phase: Phase) -> Value {
        let name = match (self.code, phase) {
            (RECOVERY, _) => "RecoveryError",
            (_, Phase::Provision) => "ProvisioningError",
            _ => "DeviceError",
        };
        let mut links = self.error.chain().map(|link| link.to_string().replace("\nFix: ", "; fix: "));
        let message = links.next().unwrap_or_default();
        let cause = links.collect::<Vec<_>>().join(": ");
        json!({
            "exception_name": name,
            "exception_message": message,
            "exception_cause": (!cause.is_empty()).then_some(cause),
        })
    }
}

/// Only what stands in the way of every job is a failed recovery: a job must not be able to take an
/// agent offline.
pub(super) fn code(phase: Phase, error: &Error) -> u8 {
    let stopped = error.chain().any(|link| link.is::<Stop>());
    let ours = phase == Phase::Provision && blame(error) == Some(Blame::Host) && !stopped;
    let of_the_job = error.is::<Refused>() || error.is::<OwnImage>();
    if error.is::<WrongConfig>() || (ours && !of_the_job) { RECOVERY } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Fault;
    use anyhow::{Context, anyhow};

    fn host() -> Error {
        Fault::host("qemu-img not found").fix("install it").into()
    }

    #[test]
    fn only_what_every_job_would_meet_is_a_failed_recovery() {
        let expired = Stop::Expired { owner: "x".into(), budget: std::time::Duration::ZERO };
        for (phase, error, expected) in [
            (Phase::Provision, host(), 46),
            (Phase::Provision, host().context("booting"), 46),
            (Phase::Provision, host().context(Refused), 1),
            (Phase::Provision, host().context(Refused).context("the device ended early"), 1),
            (Phase::Provision, host().context(OwnImage), 1),
            (Phase::Provision, Fault::machine("no login").into(), 1),
            (Phase::Provision, Error::new(expired).context(Fault::host("no free slot")), 1),
            (Phase::Provision, Error::new(Stop::Interrupted).context(Fault::host("stopped")), 1),
            (Phase::Provision, anyhow!("odd"), 1),
            (Phase::Test, host(), 1),
            (Phase::Test, host().context(WrongConfig), 46),
        ] {
            assert_eq!(code(phase, &error), expected, "{phase} {error:#}");
        }
    }

    #[test]
    fn agents_read_it_beside_what_was_there() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join(ERRORS);
        std::fs::write(&path, "").expect("writes"); // as agents make it
        let failure = |error| Failure { code: 1, error };
        let error = Err::<(), _>(host()).context("no machine").expect_err("an error");
        failure(error).note(Phase::Provision, &path).expect("writes");
        failure(anyhow!("alone")).note(Phase::Cleanup, &path).expect("writes");
        let errors: Value = serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("JSON");
        assert_eq!(
            errors,
            json!({
                "provision_exception_info": {
                    "exception_name": "ProvisioningError",
                    "exception_message": "no machine",
                    "exception_cause": "qemu-img not found; fix: install it",
                },
                "cleanup_exception_info": {
                    "exception_name": "DeviceError", "exception_message": "alone", "exception_cause": null,
                },
            })
        );
    }
}
