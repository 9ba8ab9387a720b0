//! `device.yaml`: the machine that a queue offers.
//!
//! ```yaml
//! agent_name: host-1           # where no agent calls, which gives its own name
//! project: /srv/images         # a directory whose Cargo.toml describes more images
//! image: debian                # of jobs that name none: a name, or a path
//! user: ubuntu                 # an account with root's rights, for jobs that name none
//! cpus: 2
//! memory: 1G
//! disks: [4G, 1500M]           # blank ones, beside the image
//! firmware: bios               # or uefi
//! ssh_keys:                    # whose key is what: reservations name them
//!   lp:name: ssh-ed25519 AAAA... name@host
//! ```
//!
//! All of it can be left out. Relative paths start at the file.

use super::request::is_account;
use crate::fault::Fault;
use crate::nearest;
use crate::vm::{Bus, DiskNeed, Firmware, Needs, size};
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const KEYS: [&str; 9] =
    ["agent_name", "project", "image", "user", "cpus", "memory", "disks", "firmware", "ssh_keys"];

/// The account that jobs of Testflinger expect.
const USER: &str = "ubuntu";

/// A configuration that makes no sense: no job can be served until the operator has corrected it.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the configuration of the device is wrong")]
pub struct WrongConfig;

/// A configuration file, read and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    agent_name: Option<String>,
    /// Whose `Cargo.toml` describes images.
    pub project: Option<PathBuf>,
    /// The image of jobs that name none: a name, or an absolute path.
    pub image: Option<String>,
    /// The account of jobs that name none.
    pub user: String,
    /// What a machine is made of.
    pub needs: Needs,
    /// Public keys by the names that reservations have for them.
    pub ssh_keys: BTreeMap<String, String>,
}

/// As the file has it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Raw {
    agent_name: Option<String>,
    project: Option<PathBuf>,
    image: Option<String>,
    user: Option<String>,
    cpus: Option<u32>,
    memory: Option<String>,
    disks: Vec<String>,
    firmware: Option<String>,
    ssh_keys: BTreeMap<String, String>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`WrongConfig`] in the chain when there is none, or it makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let text = std::fs::read_to_string(path)?;
            let path = std::path::absolute(path)?;
            Self::parse(&text, path.parent().unwrap_or(Path::new("/")))
        };
        read().context(WrongConfig).with_context(|| Fault::host(format!("cannot use {}", path.display())))
    }

    /// Reads the text of a file in `directory`.
    ///
    /// # Errors
    /// When it is no YAML, has an unknown key, or a value that makes no sense.
    pub fn parse(text: &str, directory: &Path) -> Result<Self> {
        let options = serde_saphyr::options! {
            // `user: off` is a boolean for who reads YAML 1.1.
            no_schema: true,
        };
        let keys: Option<BTreeMap<String, Value>> =
            serde_saphyr::from_str_with_options(text, options.clone())?;
        let unknown = keys.iter().flatten().find(|(key, _)| !KEYS.contains(&key.as_str()));
        if let Some((key, _)) = unknown {
            bail!("unknown key `{key}`{}", nearest::hint(key, KEYS));
        }
        let raw: Option<Raw> = serde_saphyr::from_str_with_options(text, options)?;
        raw.unwrap_or_default().check(directory)
    }

    /// The agent that the device belongs to: the one that calls, else the one in the file. So several
    /// agents can share a file.
    ///
    /// # Errors
    /// [`WrongConfig`] in the chain when neither says it.
    pub fn agent_name(&self) -> Result<String> {
        let calling = std::env::var("agent_id").ok().filter(|name| !name.is_empty());
        calling.or_else(|| self.agent_name.clone()).filter(|name| !name.is_empty()).ok_or_else(|| {
            let fault = Fault::host("nobody says which agent the device belongs to");
            anyhow::Error::new(fault.fix("set `agent_name` in the configuration of the device"))
                .context(WrongConfig)
        })
    }
}

impl Raw {
    fn check(self, directory: &Path) -> Result<Config> {
        let user = self.user.unwrap_or_else(|| USER.into());
        ensure!(is_account(&user), "`user` is {user:?}, which is no name of an account");
        let mut needs = Needs { reboots: true, ..Needs::DEFAULT };
        if let Some(cpus) = self.cpus {
            ensure!((1..=255).contains(&cpus), "`cpus` is {cpus}: a machine has 1 to 255");
            needs.cpus = cpus;
        }
        if let Some(memory) = self.memory {
            needs.memory_mib = size::memory(&memory).with_context(|| format!("`memory` is {memory:?}"))?;
        }
        let disk = |text: &String| -> Result<DiskNeed> {
            let bytes = size::disk(text).with_context(|| format!("`disks` has {text:?}"))?;
            Ok(DiskNeed { bytes, bus: Bus::Virtio })
        };
        // Needs are made for statics; these live as long as the process, too.
        needs.disks = self.disks.iter().map(disk).collect::<Result<Vec<_>>>()?.leak();
        needs.firmware = match self.firmware.as_deref() {
            None | Some("bios") => Firmware::Bios,
            Some("uefi") => Firmware::Uefi,
            Some(other) => bail!("`firmware` is {other:?}; write `bios` or `uefi`"),
        };
        for (name, key) in &self.ssh_keys {
            ensure!(is_public_key(key), "`ssh_keys` has no public key for `{name}`: {key:?}");
        }
        let path = |text: String| directory.join(text).to_string_lossy().into_owned();
        Ok(Config {
            agent_name: self.agent_name,
            project: self.project.map(|project| directory.join(project)),
            image: self.image.map(|image| if image.contains('/') { path(image) } else { image }),
            user,
            needs,
            ssh_keys: self.ssh_keys,
        })
    }
}

/// A line that authorized_keys(5) takes, without options: these could run commands.
pub(super) fn is_public_key(line: &str) -> bool {
    let mut words = line.split(' ');
    let kind = words.next().unwrap_or_default();
    let data = words.next().unwrap_or_default();
    (kind.starts_with("ssh-") || kind.starts_with("ecdsa-") || kind.starts_with("sk-"))
        && data.starts_with("AAAA")
        && !line.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("/etc/shakedown"))
    }

    #[test]
    fn nothing_is_required() {
        for nothing in ["", "# a comment\n", "{}"] {
            let config = parse(nothing).expect(nothing);
            assert_eq!(
                (config.user.as_str(), config.needs.cpus, config.needs.memory_mib),
                ("ubuntu", 2, 1024)
            );
            assert!(config.needs.reboots, "users restart their machines");
        }
    }

    #[test]
    fn every_key_is_known() {
        let config = parse(
            "agent_name: a1\nproject: images\nimage: ./own.iso\nuser: root\ncpus: 4\nmemory: 2G\n\
             disks: [4G, 1500M]\nfirmware: uefi\nssh_keys:\n  lp:me: ssh-ed25519 AAAAC3 me@here\n",
        )
        .expect("is right");
        assert_eq!(config.agent_name().expect("is told"), "a1");
        assert_eq!(config.project.as_deref(), Some(Path::new("/etc/shakedown/images")));
        assert_eq!(config.image.as_deref(), Some("/etc/shakedown/./own.iso"));
        assert_eq!((config.needs.cpus, config.needs.memory_mib), (4, 2048));
        assert_eq!(
            config.needs.disks.iter().map(|disk| disk.bytes).collect::<Vec<_>>(),
            [4 << 30, 1500 << 20]
        );
        assert_eq!(config.needs.firmware, Firmware::Uefi);
        assert_eq!(config.ssh_keys["lp:me"], "ssh-ed25519 AAAAC3 me@here");
    }

    #[test]
    fn mistakes_are_refused_with_the_right_word() {
        for (text, words) in [
            ("imgae: debian", "did you mean `image`?"),
            ("user: 'a b'", "no name of an account"),
            ("user: off", "user"),
            ("cpus: 0", "1 to 255"),
            ("cpus: two", "cpus"),
            ("memory: 1000K", "`memory`"),
            ("disks: [4x]", "`disks`"),
            ("firmware: efi", "`bios` or `uefi`"),
            ("ssh_keys: {lp:me: me}", "`lp:me`"),
            ("ssh_keys: {lp:me: 'command=\"x\" ssh-ed25519 AAAA'}", "`lp:me`"),
            ("- a", ""),
        ] {
            let error = format!("{:#}", parse(text).expect_err(text));
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
