//! What a job asks of the device, and what of that is refused.
//!
//! A server checks `provision_data` strictly, so it has keys of other connectors: `distro` and
//! `ephemeral` are MAAS's, `use_attachment` is muxpi's.

use super::config::is_public_key;
use crate::fault::Fault;
use crate::nearest;
use crate::testflinger::wire::{Job, Phase};
use anyhow::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// The job asks for what cannot be: others can be served.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the job cannot be done as it is")]
pub(super) struct Refused;

/// Whatever went wrong may be the fault of an image that the job chose: others need not choose it.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the image is of the job's own choice")]
pub(super) struct OwnImage;

/// What is booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// What the device offers to those that choose nothing.
    Default,
    /// An image by its name.
    Named(String),
    /// A file of this host.
    File(PathBuf),
    /// A file that came with the job.
    Attached(PathBuf),
}

impl Choice {
    /// Whether it is the job's, and not what the device offers, as `default`, to those that choose nothing.
    pub(super) fn is_own(&self, default: Option<&str>) -> bool {
        match self {
            Self::Default => false,
            Self::Named(name) => default != Some(name),
            Self::File(_) | Self::Attached(_) => true,
        }
    }
}

/// A reservation without a limit of its own lasts so long, as with other connectors.
const RESERVED: u64 = 3600;

/// The keys that mean something here, or nothing at all.
const KEYS: [&str; 5] = ["distro", "use_attachment", "attachments", "ephemeral", "skip"];

/// The image that a job wants; `attachments` is where its own are.
///
/// # Errors
/// [`Refused`] in the chain.
pub(super) fn image(job: &Job, attachments: &Path) -> Result<Choice> {
    let nothing = Map::new();
    let data = job.data(Phase::Provision).unwrap_or(&nothing);
    if data.contains_key("url") || data.contains_key("urls") {
        return Err(refuse(
            "`provision_data` has a URL, and nothing is downloaded here",
            "name an image of the device by `distro`, or send one along: `use_attachment` and `attachments`",
        ));
    }
    if let Some(key) = data.keys().find(|key| !KEYS.contains(&key.as_str())) {
        let hint = nearest::hint(key, KEYS);
        return Err(refuse(
            format!("`provision_data` has `{key}`, which means nothing to this device{hint}"),
            "leave it out",
        ));
    }
    if data.get("ephemeral") == Some(&Value::Bool(false)) {
        return Err(refuse("no machine of this device lasts longer than its job", "leave `ephemeral` out"));
    }
    let text = |key: &str| data.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    match (text("distro"), text("use_attachment")) {
        (Some(_), Some(_)) => Err(refuse(
            "`provision_data` has both `distro` and `use_attachment`",
            "leave out the one that is not meant",
        )),
        (Some(path), None) if path.contains('/') => {
            let file = PathBuf::from(path);
            match file.is_absolute() && file.is_file() {
                true => Ok(Choice::File(file)),
                false => Err(refuse(
                    format!("`distro` is {path:?}, and that is no file of this host"),
                    "give the absolute path of an image on the agent's host, or an image's name",
                )),
            }
        }
        (Some(name), None) => Ok(Choice::Named(name.into())),
        (None, Some(name)) => attached(name, attachments),
        (None, None) => Ok(Choice::Default),
    }
}

fn attached(name: &str, attachments: &Path) -> Result<Choice> {
    let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    let file = attachments.join(name);
    if plain && file.is_file() {
        return Ok(Choice::Attached(file));
    }
    Err(refuse(
        format!("`use_attachment` is {name:?}, and no such file came with the job"),
        format!("add it to `attachments` of `provision_data`, as `agent: {name}`"),
    ))
}

/// The account that a job works with, if it names one.
///
/// # Errors
/// [`Refused`] in the chain.
pub(super) fn user<'a>(job: &'a Job, otherwise: &'a str) -> Result<&'a str> {
    let user = job.test_username().filter(|user| !user.is_empty()).unwrap_or(otherwise);
    match is_account(user) {
        true => Ok(user),
        false => Err(refuse(
            format!("`test_username` is {user:?}, which is no name of an account"),
            "use small letters, digits, `-` and `_`",
        )),
    }
}

/// The public keys that a reservation is for.
///
/// # Errors
/// [`Refused`] in the chain for one that is not known.
pub(super) fn keys(job: &Job, known: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let nothing = Vec::new();
    let names = job.data(Phase::Reserve).and_then(|data| data.get("ssh_keys")?.as_array());
    let key = |name: &Value| {
        let name = name.as_str().unwrap_or_default();
        match known.get(name) {
            Some(key) => Ok(key.clone()),
            None if is_public_key(name) => Ok(name.to_owned()),
            None => Err(refuse(
                format!("the key `{name}` is not known here, and keys are not fetched from the internet"),
                format!("the operator adds it to `ssh_keys` of the device: `{name}: ssh-ed25519 AAAA...`"),
            )),
        }
    };
    names.unwrap_or(&nothing).iter().map(key).collect()
}

/// How long a reservation lasts.
pub(super) fn reservation(job: &Job) -> Duration {
    let timeout = job.data(Phase::Reserve).and_then(|data| data.get("timeout"));
    // The server makes seconds of what people write.
    let seconds = timeout.and_then(|timeout| timeout.as_u64().or_else(|| timeout.as_str()?.parse().ok()));
    Duration::from_secs(seconds.unwrap_or(RESERVED))
}

/// What useradd(8) takes: it becomes a part of scripts and configurations.
pub(super) fn is_account(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_lowercase() || c == '_';
    (1..=32).contains(&name.len())
        && name.starts_with(letter)
        && name.chars().all(|c| letter(c) || c.is_ascii_digit() || c == '-')
}

fn refuse(message: impl Into<String>, fix: impl Into<String>) -> Error {
    Error::new(Fault::host(message).fix(fix)).context(Refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn job(more: Value) -> Job {
        let mut job = json!({"job_id": "j1"});
        job.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        Job::new(job).expect("a job")
    }

    fn choice(data: Value) -> Result<Choice> {
        let attachments = tempfile::tempdir().expect("temp dir");
        std::fs::write(attachments.path().join("own.iso"), "x").expect("writes");
        image(&job(json!({"provision_data": data})), attachments.path())
    }

    #[test]
    fn images_are_named_or_sent_along() {
        assert_eq!(choice(json!(null)).expect("is right"), Choice::Default);
        assert_eq!(choice(json!({"ephemeral": true})).expect("is right"), Choice::Default);
        assert_eq!(choice(json!({"distro": "debian"})).expect("is right"), Choice::Named("debian".into()));
        assert_eq!(choice(json!({"distro": "/bin/sh"})).expect("is right"), Choice::File("/bin/sh".into()));
        let own = choice(json!({"use_attachment": "own.iso", "attachments": [{"agent": "own.iso"}]}));
        assert!(matches!(own.expect("is right"), Choice::Attached(file) if file.ends_with("own.iso")));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_way_out() {
        for (data, words) in [
            (json!({"url": "http://127.0.0.1/x.img"}), "`use_attachment`"),
            (json!({"distro": "/no/such/file"}), "no file of this host"),
            (json!({"distro": "relative/path"}), "absolute path"),
            (json!({"distro": "a", "use_attachment": "own.iso"}), "both"),
            (json!({"use_attachment": "other.iso"}), "no such file came"),
            (json!({"use_attachment": "../own.iso"}), "no such file came"),
            (json!({"use_attachment": "/etc/passwd"}), "no such file came"),
            (json!({"ephemeral": false}), "longer than its job"),
            (json!({"dsitro": "debian"}), "did you mean `distro`?"),
            (json!({"kernel": "hwe"}), "`kernel`"),
        ] {
            let error = choice(data).expect_err(words);
            assert!(error.is::<Refused>() && format!("{error:#}").contains(words), "{error:#}");
        }
    }

    #[test]
    fn a_reservation_is_for_known_keys() {
        let known = [("lp:me".to_owned(), "ssh-ed25519 AAAAme".to_owned())].into();
        let ask = |names: Value| keys(&job(json!({"reserve_data": {"ssh_keys": names}})), &known);
        let literal = "ssh-rsa AAAAB3 me@here";
        assert_eq!(ask(json!(["lp:me", literal])).expect("known"), ["ssh-ed25519 AAAAme", literal]);
        assert!(keys(&job(json!({})), &known).expect("nobody's").is_empty());
        for unknown in [json!(["gh:me"]), json!([7]), json!(["ssh-rsa AAAA\ncommand=\"x\""])] {
            assert!(ask(unknown).expect_err("unknown").is::<Refused>());
        }
        assert_eq!(reservation(&job(json!({"reserve_data": {"timeout": 90}}))), Duration::from_secs(90));
        assert_eq!(reservation(&job(json!({}))), Duration::from_secs(3600));
    }

    #[test]
    fn accounts_are_the_job_s_or_the_device_s() {
        let named = |name: &str| job(json!({"test_data": {"test_username": name}}));
        assert_eq!(user(&named("me"), "ubuntu").expect("is one"), "me");
        assert_eq!(user(&named(""), "ubuntu").expect("is one"), "ubuntu");
        assert!(user(&named("a'; reboot"), "ubuntu").expect_err("is none").is::<Refused>());
    }

    proptest! {
        #[test]
        fn an_account_needs_no_quotes(name in ".*") {
            prop_assert!(!is_account(&name) || crate::process::quote(&name) == name);
        }

        #[test]
        fn an_attachment_never_leaves_its_directory(name in "[./a-z]{0,12}") {
            if let Ok(Choice::Attached(file)) = attached(&name, Path::new("/nowhere")) {
                prop_assert!(file.starts_with("/nowhere"));
            }
        }
    }
}
