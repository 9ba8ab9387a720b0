//! What is known about one scenario execution: the types of `metadata.json` and, in part, of the ledger.
//!
//! Field names are those of the original project's files, so that its readers keep working.

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// The version of both formats, raised whenever an old reader would misread a new file.
pub const SCHEMA_VERSION: u32 = 1;

/// How a scenario execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It ran to its end and found nothing wrong.
    Passed,
    /// The machine under test misbehaved.
    Failed,
    /// We or the host failed.
    Error,
    /// It was not asked for; the reason says why.
    Ignored,
    /// It was put off to a later run; the reason says why.
    Deferred,
    /// Ctrl-C, or the process died.
    Interrupted,
}

/// How the machine came to its running state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootKind {
    /// Power-on, firmware, kernel.
    Cold,
    /// From a template.
    Fork,
    /// There was no machine.
    #[default]
    None,
}

/// A point in time: RFC 3339 in UTC, with milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Utc(Timestamp);

/// `metadata.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Metadata {
    pub schema_version: u32,
    /// When this file was last written.
    pub generated_at: Utc,
    pub run_id: String,
    /// The scenario's full name.
    pub scenario: String,
    /// 1 for the first execution of this scenario in this run.
    pub attempt: u32,
    pub markers: Vec<String>,
    /// Absent while the scenario runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Why, for every outcome but `passed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub boot: BootKind,
    /// `kvm` or `tcg`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// `bios` or `uefi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logs: Option<Logs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<Qemu>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<Ssh>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diagnostics: Option<Diagnostics>,
    pub timings: Timings,
    /// At the end of this execution the whole run, builds included, had lasted
    /// [`SESSION_CEILING_SECONDS`] or more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_ceiling_exceeded: Option<bool>,
    pub timeouts: Timeouts,
    /// The command line of the test binary, without its name.
    pub harness_args: Vec<String>,
    pub host: Host,
    /// `null` when the project is not in a git checkout.
    pub git: Option<Git>,
    /// The environment variables of ours that were set.
    pub env: BTreeMap<String, String>,
}

/// A run of an hour or more may have hit the limit of whatever started it.
pub const SESSION_CEILING_SECONDS: f64 = 3600.0;

/// The image that was booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Image {
    pub name: String,
    /// `null` for a prebuilt file.
    pub recipe: Option<String>,
    pub digest: Option<String>,
}

/// The files of the image, and how the key got in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Artifact {
    pub iso_path: PathBuf,
    /// The image's directory in the store (of Nix, for its recipe).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_path: Option<PathBuf>,
    /// Nix only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deriver: Option<String>,
    /// Nix only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nar_hash: Option<String>,
    /// As `ssh-keygen -lf` prints it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_key_fingerprint: Option<String>,
}

/// Where the logs are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Logs {
    pub harness: PathBuf,
    pub serial: PathBuf,
}

/// The QEMU that ran the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Qemu {
    pub command: Vec<String>,
    /// The first line of `--version`.
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_image: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_disks: Vec<PathBuf>,
}

/// Where the machine's SSH server was reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Ssh {
    pub host: String,
    pub port: u16,
    /// The SSH client's program; absent where the client is a library.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub executable: Option<String>,
}

/// What was collected beyond the logs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Diagnostics {
    pub directory: PathBuf,
    pub artifacts: Vec<Diagnostic>,
}

/// One collected file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Diagnostic {
    pub label: String,
    pub path: PathBuf,
}

/// How long things took, in seconds with three decimals.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Timings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<Utc>,
    /// Making the image, or finding it in the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_seconds: Option<f64>,
    /// From the start of QEMU to a login prompt, or a shell that asks for none, on the serial console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_to_login_seconds: Option<f64>,
    /// From the start of QEMU to the end of the first command over SSH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_to_ssh_seconds: Option<f64>,
    /// The whole execution, an image's build included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_seconds: Option<f64>,
}

/// The limits in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Timeouts {
    pub spawn_seconds: u64,
    pub login_seconds: u64,
}

/// The computer that ran it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Host {
    pub hostname: String,
    pub cpus: usize,
    /// In bytes.
    pub memory: u64,
}

/// The state of the project's checkout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold
pub struct Git {
    pub commit: String,
    /// A tracked file differs from the commit.
    pub dirty: bool,
}

impl Utc {
    /// Now, to the millisecond.
    pub fn now() -> Self {
        Self::from(Timestamp::now())
    }

    /// Seconds from `earlier` to here, with three decimals; zero when the clock was set back.
    pub fn seconds_since(self, earlier: Self) -> f64 {
        millis(self.0.duration_since(earlier.0).as_secs_f64())
    }

    /// As the name of a run directory has it: `2026-01-31T120000Z`.
    pub(crate) fn compact(self) -> String {
        self.0.strftime("%Y-%m-%dT%H%M%SZ").to_string()
    }
}

/// Seconds, rounded to three decimals; what cannot be a duration becomes zero.
pub(crate) fn millis(seconds: f64) -> f64 {
    if seconds.is_finite() { (seconds.max(0.0) * 1000.0).round() / 1000.0 } else { 0.0 }
}

impl From<Timestamp> for Utc {
    fn from(time: Timestamp) -> Self {
        // Rounding can only fail past the year 9999.
        Self(Timestamp::from_millisecond(time.as_millisecond()).unwrap_or(time))
    }
}

impl From<Utc> for Timestamp {
    fn from(time: Utc) -> Self {
        time.0
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Utc {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Utc {
    /// Takes RFC 3339 with `Z` or a zero offset only; [`Timestamp`] alone is more lenient.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let strict =
            text.as_bytes().get(10) == Some(&b'T') && (text.ends_with('Z') || text.ends_with("+00:00"));
        match text.parse::<Timestamp>() {
            Ok(time) if strict => Ok(Self(time)),
            _ => Err(de::Error::custom(format!("{text:?} is not an RFC 3339 time in UTC"))),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Error => "error",
            Self::Ignored => "ignored",
            Self::Deferred => "deferred",
            Self::Interrupted => "interrupted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc_and_nothing_else() {
        let time: Utc =
            serde_json::from_str(r#""2025-12-25T23:41:40.123456+00:00""#).expect("the original's form");
        assert_eq!(time.to_string(), "2025-12-25T23:41:40.123Z");
        for wrong in
            ["2025-12-25 23:41:40Z", "2025-12-25T23:41:40", "2025-12-25T23:41:40+02:00", "yesterday", ""]
        {
            let error = serde_json::from_value::<Utc>(wrong.into()).expect_err("refused");
            assert!(error.to_string().contains("RFC 3339"), "{wrong}: {error}");
        }
    }

    #[test]
    fn seconds_have_three_decimals_and_are_never_negative() {
        assert_eq!(millis(1.23456), 1.235);
        assert_eq!(millis(-1.0), 0.0);
        assert_eq!(millis(f64::NAN), 0.0);
    }

    #[test]
    fn outcomes_are_written_as_they_are_shown() {
        for outcome in [Outcome::Passed, Outcome::Interrupted, Outcome::Error] {
            assert_eq!(serde_json::json!(outcome), outcome.to_string());
        }
    }
}
