//! The configuration of an agent: the keys and defaults of `testflinger-agent.conf`.
//!
//! Types are strict and unknown keys are refused, as the file of one who mistyped `test_command`
//! would otherwise run no test and report success.

use crate::fault::Fault;
use crate::nearest;
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A configuration file, read and checked. The fields are its keys.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[allow(missing_docs)] // They are described in the README of the agent they come from.
pub struct Config {
    pub agent_id: String,
    pub server_address: String,
    pub job_queues: Vec<String>,
    pub identifier: Option<String>,
    pub location: Option<String>,
    pub provision_type: Option<String>,
    #[serde(default = "polling_interval")]
    pub polling_interval: u64,
    #[serde(default = "execution_basedir")]
    pub execution_basedir: PathBuf,
    #[serde(default = "logging_basedir")]
    pub logging_basedir: PathBuf,
    #[serde(default = "results_basedir")]
    pub results_basedir: PathBuf,
    #[serde(default = "logging_level")]
    pub logging_level: String,
    #[serde(default)]
    pub logging_quiet: bool,
    #[serde(default)]
    pub setup_command: String,
    #[serde(default)]
    pub provision_command: String,
    #[serde(default)]
    pub firmware_update_command: String,
    #[serde(default)]
    pub test_command: String,
    #[serde(default)]
    pub allocate_command: String,
    #[serde(default)]
    pub reserve_command: String,
    #[serde(default)]
    pub cleanup_command: String,
    pub global_timeout: Option<u64>,
    pub output_timeout: Option<u64>,
    pub advertised_queues: Option<BTreeMap<String, String>>,
    pub advertised_images: Option<BTreeMap<String, Images>>,
    /// Accepted, and of no effect: output is never cut.
    #[serde(rename = "output_bytes")]
    _output_bytes: Option<u64>,
}

/// The images of a queue by their names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Images {
    /// As the server takes them.
    Map(BTreeMap<String, String>),
    /// As an example of the original has them.
    List(Vec<BTreeMap<String, String>>),
}

impl Images {
    /// As the server takes them.
    pub fn map(&self) -> BTreeMap<String, String> {
        match self {
            Self::Map(images) => images.clone(),
            Self::List(list) => {
                list.iter().flatten().map(|(name, text)| (name.clone(), text.clone())).collect()
            }
        }
    }
}

const KEYS: [&str; 24] = [
    "agent_id",
    "server_address",
    "job_queues",
    "identifier",
    "location",
    "provision_type",
    "polling_interval",
    "execution_basedir",
    "logging_basedir",
    "results_basedir",
    "logging_level",
    "logging_quiet",
    "setup_command",
    "provision_command",
    "firmware_update_command",
    "test_command",
    "allocate_command",
    "reserve_command",
    "cleanup_command",
    "global_timeout",
    "output_timeout",
    "advertised_queues",
    "advertised_images",
    "output_bytes",
];

/// The keys whose values are numbers or booleans.
const NUMBERS: [&str; 5] =
    ["polling_interval", "logging_quiet", "global_timeout", "output_timeout", "output_bytes"];

fn polling_interval() -> u64 {
    10
}

fn execution_basedir() -> PathBuf {
    "/tmp/testflinger/run".into()
}

fn logging_basedir() -> PathBuf {
    "/tmp/testflinger/logs".into()
}

fn results_basedir() -> PathBuf {
    "/tmp/testflinger/results".into()
}

fn logging_level() -> String {
    "INFO".into()
}

/// A configuration that makes no sense: the message names file, line and the nearest right word.
#[derive(Debug, thiserror::Error)]
#[error("the configuration of the agent is wrong")]
pub struct WrongConfig;

/// What a job may take at most, where neither it nor the configuration says less.
const GLOBAL_TIMEOUT: u64 = 4 * 3600;
/// How long a test may be silent, where neither it nor the configuration says less.
const OUTPUT_TIMEOUT: u64 = 15 * 60;

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`WrongConfig`] in the chain when there is none, or it makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .context(WrongConfig)
            .with_context(|| Fault::host(format!("cannot read {}", path.display())))?;
        Self::parse(&text).context(WrongConfig).with_context(|| Fault::host(format!("{}", path.display())))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// When it is no YAML, has an unknown key, lacks one, or a value has the wrong type.
    pub fn parse(text: &str) -> Result<Self> {
        let options = serde_saphyr::options! {
            // `agent_id: off` and `agent_id: 7` are a boolean and a number for who reads YAML 1.1.
            no_schema: true,
        };
        let values: BTreeMap<String, Value> = serde_saphyr::from_str_with_options(text, options.clone())?;
        let line =
            |key: &str| text.lines().position(|line| line.starts_with(key)).map_or(1, |index| index + 1);
        for key in values.keys() {
            if !KEYS.contains(&key.as_str()) {
                bail!("line {}: unknown key `{key}`{}", line(key), nearest::hint(key, KEYS));
            }
        }
        let config: Self = serde_saphyr::from_str_with_options(text, options)?;
        // A number in quotes is a number to the reader of the line above, and text to others.
        for (key, value) in values {
            if value.is_string() && NUMBERS.contains(&key.as_str()) {
                bail!("line {}: `{key}` is text; write it without quotes", line(&key));
            }
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        // It becomes a header, a part of paths and a word in the banner.
        if self.agent_id.is_empty() || self.agent_id.chars().any(|c| c.is_control() || c == ';') {
            bail!("`agent_id` is {:?}: it cannot be empty or have control characters or `;`", self.agent_id);
        }
        if self.server_address.trim().is_empty() {
            bail!("`server_address` is empty");
        }
        if self.job_queues.is_empty() {
            bail!("`job_queues` is empty: there is nothing to take jobs from");
        }
        Ok(())
    }

    /// The command of a phase; `None` where there is none.
    pub fn command(&self, phase: Phase) -> Option<&str> {
        let command = match phase {
            Phase::Setup => &self.setup_command,
            Phase::Provision => &self.provision_command,
            Phase::FirmwareUpdate => &self.firmware_update_command,
            Phase::Test => &self.test_command,
            Phase::Allocate => &self.allocate_command,
            Phase::Reserve => &self.reserve_command,
            Phase::Cleanup => &self.cleanup_command,
        };
        (!command.is_empty()).then_some(command)
    }

    /// What a job may take that asks for `job` seconds.
    pub fn global_limit(&self, job: Option<u64>) -> u64 {
        lower(job, self.global_timeout, GLOBAL_TIMEOUT)
    }

    /// How long the test of a job may be silent that asks for `job` seconds.
    pub fn output_limit(&self, job: Option<u64>) -> u64 {
        lower(job, self.output_timeout, OUTPUT_TIMEOUT)
    }

    /// Time between two questions for a job.
    pub fn polling_interval(&self) -> Duration {
        Duration::from_secs(self.polling_interval)
    }

    /// What commands find in their environment: every key whose value is a string.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut variables = vec![
            ("agent_id", self.agent_id.clone()),
            ("server_address", self.server_address.clone()),
            ("execution_basedir", path(&self.execution_basedir)),
            ("logging_basedir", path(&self.logging_basedir)),
            ("results_basedir", path(&self.results_basedir)),
            ("logging_level", self.logging_level.clone()),
            ("setup_command", self.setup_command.clone()),
            ("provision_command", self.provision_command.clone()),
            ("firmware_update_command", self.firmware_update_command.clone()),
            ("test_command", self.test_command.clone()),
            ("allocate_command", self.allocate_command.clone()),
            ("reserve_command", self.reserve_command.clone()),
            ("cleanup_command", self.cleanup_command.clone()),
        ];
        for (name, value) in [
            ("identifier", &self.identifier),
            ("location", &self.location),
            ("provision_type", &self.provision_type),
        ] {
            variables.extend(value.clone().map(|value| (name, value)));
        }
        variables
    }
}

fn lower(job: Option<u64>, config: Option<u64>, otherwise: u64) -> u64 {
    job.unwrap_or(otherwise).min(config.unwrap_or(otherwise))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "agent_id: a1\nserver_address: localhost:5000\njob_queues: [q]\n";

    fn with(lines: &str) -> Result<Config> {
        Config::parse(&format!("{LEAST}{lines}"))
    }

    fn refusal(lines: &str) -> String {
        format!("{:#}", with(lines).expect_err(lines))
    }

    #[test]
    fn defaults_are_those_of_the_original() {
        let config = with("").expect("is right");
        assert_eq!(config.polling_interval, 10);
        assert_eq!(config.execution_basedir, Path::new("/tmp/testflinger/run"));
        assert_eq!(config.logging_level, "INFO");
        assert!(Phase::ALL.into_iter().all(|phase| config.command(phase).is_none()));
        assert_eq!((config.global_limit(None), config.output_limit(None)), (14_400, 900));
    }

    #[test]
    fn every_key_is_known() {
        let config = with(
            "identifier: x\nlocation: here\nprovision_type: maas2\npolling_interval: 1\nexecution_basedir: /r\n\
             logging_basedir: /l\nresults_basedir: /s\nlogging_level: DEBUG\nlogging_quiet: true\n\
             setup_command: a\nprovision_command: b\nfirmware_update_command: c\ntest_command: d\n\
             allocate_command: e\nreserve_command: f\ncleanup_command: g\nglobal_timeout: 10\n\
             output_timeout: 5\nadvertised_queues:\n  q: text\nadvertised_images:\n  q:\n    img: 'distro: x'\n\
             output_bytes: 10485760\n",
        )
        .expect("is right");
        let commands: Vec<_> = Phase::ALL.into_iter().filter_map(|phase| config.command(phase)).collect();
        assert_eq!(commands, ["a", "b", "c", "d", "e", "f", "g"]);
        assert_eq!((config.global_limit(Some(99)), config.output_limit(Some(3))), (10, 3));
        let environment = config.environment();
        assert!(environment.contains(&("provision_type", "maas2".into())));
        assert!(!environment.iter().any(|(name, _)| *name == "polling_interval"));
    }

    #[test]
    fn mistakes_are_refused_with_the_right_word() {
        assert!(refusal("test_comand: x\n").contains("did you mean `test_command`"));
        assert!(
            refusal("polling_interval: ten\n").contains("line 4"),
            "{}",
            refusal("polling_interval: ten\n")
        );
        for lines in [
            "polling_interval: '10'\n",
            "location: 7\n",
            "location: off\n",
            "location: yes\n",
            "logging_quiet: 1\n",
            "job_queues: other\n",
            "advertised_images: {q: [x]}\n",
            "advertised_images: {q: {x: 7}}\n",
            "agent_id: twice\n",
        ] {
            refusal(lines);
        }
        assert!(Config::parse("agent_id: a\nserver_address: s\n").is_err(), "no queues");
        assert!(Config::parse("agent_id: off\nserver_address: s\njob_queues: [q]\n").is_err());
        assert!(Config::parse("agent_id: 7\nserver_address: s\njob_queues: [q]\n").is_err());
        assert!(Config::parse("").is_err());
        assert!(Config::parse("- a\n").is_err());
    }

    #[test]
    fn images_may_be_a_list_of_maps() {
        let config =
            with("advertised_images:\n  q:\n    - a: 'distro: a'\n    - b: 'distro: b'\n").expect("is right");
        let images = config.advertised_images.expect("there are some");
        assert_eq!(images["q"].map().len(), 2);
    }

    #[test]
    fn the_lower_limit_holds() {
        assert_eq!(lower(Some(20_000), None, 14_400), 14_400, "a job may not ask for more than the default");
        assert_eq!(lower(None, Some(20_000), 14_400), 14_400);
        assert_eq!(lower(Some(20_000), Some(30_000), 14_400), 20_000);
    }
}
