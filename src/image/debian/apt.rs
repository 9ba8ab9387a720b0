//! What the host's apt knows: the distribution's sources, its options, and the versions they offer.
//!
//! Only asks; nothing here downloads, installs or writes below `/var`. Sources of others than Debian
//! and Ubuntu are left out, so that an image does not depend on what else a desk has.

use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whose packages the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Vendor {
    Debian,
    Ubuntu,
}

/// The distribution's apt sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sources {
    pub(super) vendor: Vendor,
    /// In the one-line format of `sources.list`.
    pub(super) list: String,
}

impl Sources {
    /// Those of this host.
    ///
    /// # Errors
    /// A host [`Fault`] when there is no apt, or none of its lists is of Debian or Ubuntu.
    pub(super) fn of_host(deadline: &Deadline) -> Result<Self> {
        let format = "$(ORIGIN)\t$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(ARCHITECTURE)";
        let mut command = apt("apt-get");
        command.args(["indextargets", "--format", format, "Created-By: Packages"]);
        let text = process::output(command, deadline).with_context(|| {
            Fault::host("apt does not tell its sources, and the `debian` recipe builds from them")
                .fix("build on Debian or Ubuntu, or use a prebuilt image: SHAKEDOWN_IMAGE=FILE")
        })?;
        Self::parse(&text)
    }

    fn parse(targets: &str) -> Result<Self> {
        let mut list = BTreeSet::new();
        let mut vendor = None;
        for target in targets.lines() {
            let [origin, uri, release, component, architecture] = target.split('\t').collect::<Vec<_>>()[..]
            else {
                continue;
            };
            let found = match origin {
                "Debian" => Vendor::Debian,
                "Ubuntu" => Vendor::Ubuntu,
                _ => continue,
            };
            if architecture == "amd64" && *vendor.get_or_insert(found) == found {
                list.insert(format!("deb {uri} {release} {component}\n"));
            }
        }
        match vendor {
            Some(vendor) if !list.is_empty() => Ok(Self { vendor, list: list.into_iter().collect() }),
            _ => Err(Fault::host("apt has no amd64 package lists of Debian or Ubuntu")
                .fix("fetch them: `apt-get update` as root, or `shakedown doctor --install`")
                .into()),
        }
    }
}

/// The options with which the host reaches its mirrors, as an `apt.conf`: proxies, certificates.
///
/// # Errors
/// When `apt-config` fails.
pub(super) fn transport_options(deadline: &Deadline) -> Result<String> {
    let mut command = apt("apt-config");
    command.arg("dump");
    Ok(keep_transport(&process::output(command, deadline)?))
}

fn keep_transport(dump: &str) -> String {
    const KEPT: [&str; 5] =
        ["acquire::http::", "acquire::https::", "acquire::ftp::", "acquire::check-", "acquire::retries"];
    dump.lines()
        .filter(|line| {
            let line = line.to_lowercase();
            KEPT.iter().any(|start| line.starts_with(start))
        })
        .map(|line| format!("{line}\n"))
        .collect()
}

/// The versions that an installation of `packages` on top of nothing would bring: `name=version`,
/// sorted.
///
/// # Errors
/// A host [`Fault`] that has apt's words, as for a package that does not exist.
pub(super) fn resolve(
    sources: &Sources,
    packages: &[String],
    scratch: &Path,
    deadline: &Deadline,
) -> Result<Vec<String>> {
    let list = tempfile::Builder::new()
        .suffix(".list")
        .tempfile_in(scratch)
        .and_then(|file| std::fs::write(file.path(), &sources.list).map(|()| file))
        .with_context(|| Fault::host(format!("cannot write to {}", scratch.display())))?;
    let mut command = apt("apt-get");
    // The host's own package cache is neither used (it has the host's state in it) nor replaced.
    // Nor are its pins, which a build does not have either.
    for option in [
        "Dir::State::status=/dev/null",
        "Dir::Etc::SourceParts=/dev/null",
        "Dir::Etc::Preferences=/dev/null",
        "Dir::Etc::PreferencesParts=/dev/null",
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
    ] {
        command.args(["-o", option]);
    }
    command.arg("-o").arg(format!("Dir::Etc::SourceList={}", list.path().display()));
    command.args(["--simulate", "--no-install-recommends", "install", "?essential", "apt"]).args(packages);
    let text = process::output(command, deadline).with_context(|| {
        Fault::host("apt cannot install the image's packages")
            .fix("see its words below: a package of the image's `packages` may be misspelt, or the lists old (`apt-get update`)")
    })?;
    let versions = parse_simulation(&text);
    if versions.is_empty() {
        return Err(Fault::host("apt would install nothing into an empty image")
            .fix("`apt-get update` as root")
            .into());
    }
    Ok(versions)
}

/// Takes `Inst libc6 (2.36-9 Debian:12/oldstable [amd64])` apart.
fn parse_simulation(text: &str) -> Vec<String> {
    let mut versions: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
            Some(format!("{name}={}", rest.split_whitespace().next()?))
        })
        .collect();
    versions.sort();
    versions
}

/// Changes whenever the answers of this module may change; costs no process.
///
/// Looks at apt's files where Debian and Ubuntu have them: their contents for the configuration,
/// names, sizes and times for the lists, which `apt-get update` replaces.
pub(super) fn fingerprint() -> String {
    fingerprint_of(Path::new("/"))
}

fn fingerprint_of(root: &Path) -> String {
    let mut hash = Sha256::new();
    for dir in ["etc/apt", "etc/apt/sources.list.d", "etc/apt/apt.conf.d"] {
        for file in files(&root.join(dir)) {
            hash.update(file.as_os_str().as_encoded_bytes());
            hash.update(std::fs::read(&file).map(Sha256::digest).unwrap_or_default());
        }
    }
    for file in files(&root.join("var/lib/apt/lists")) {
        if let Ok(meta) = file.metadata() {
            hash.update(file.as_os_str().as_encoded_bytes());
            hash.update(meta.len().to_le_bytes());
            hash.update(meta.mtime().to_le_bytes());
            hash.update(meta.mtime_nsec().to_le_bytes());
        }
    }
    crate::image::digest::hex(&hash.finalize())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

fn apt(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C.UTF-8");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_distribution_s_sources_are_taken() {
        let targets = "Debian\thttp://deb.debian.org/debian/\tbookworm\tmain\tamd64\n\
            Debian\thttp://deb.debian.org/debian/\tbookworm\tmain\ti386\n\
            Node Source\thttps://deb.example.org/node\tnodistro\tmain\tamd64\n\
            \thttps://example.org/x\tx\tmain\tamd64\n";
        let sources = Sources::parse(targets).expect("has Debian's");
        assert_eq!(sources.vendor, Vendor::Debian);
        assert_eq!(sources.list, "deb http://deb.debian.org/debian/ bookworm main\n");
    }

    #[test]
    fn no_lists_is_an_error_with_its_fix() {
        let error =
            Sources::parse("\thttp://deb.debian.org/debian/\tbookworm\tmain\tamd64\n").expect_err("no lists");
        assert!(format!("{error:#}").contains("apt-get update"), "{error:#}");
    }

    #[test]
    fn options_are_kept_when_they_are_about_the_way_to_the_mirror() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://proxy:3128\";\n\
            Acquire::https::CAInfo \"/etc/ssl/own.pem\";\nAcquire::Check-Valid-Until \"false\";\n\
            Acquire::Languages \"\";\n";
        let kept = keep_transport(dump);
        assert_eq!(kept.lines().count(), 3, "{kept}");
        assert!(!kept.contains("Languages"), "{kept}");
    }

    #[test]
    fn a_simulation_tells_versions() {
        let text = "Reading package lists...\nInst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64]) []\n\
            Inst adduser (3.134 Debian:12.15/oldstable [all])\nConf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])\n";
        assert_eq!(parse_simulation(text), ["adduser=3.134", "libc6=2.36-9+deb12u14"]);
    }

    #[test]
    fn the_fingerprint_follows_lists_and_sources() {
        let root = tempfile::tempdir().expect("temp dir");
        let lists = root.path().join("var/lib/apt/lists");
        let sources = root.path().join("etc/apt/sources.list.d");
        for dir in [&lists, &sources] {
            std::fs::create_dir_all(dir).expect("made");
        }
        let mut seen = vec![fingerprint_of(root.path())];
        std::fs::write(lists.join("x_InRelease"), "a").expect("written");
        seen.push(fingerprint_of(root.path()));
        std::fs::write(lists.join("x_InRelease"), "ab").expect("written");
        seen.push(fingerprint_of(root.path()));
        std::fs::write(sources.join("x.sources"), "Types: deb").expect("written");
        seen.push(fingerprint_of(root.path()));
        assert_eq!(fingerprint_of(root.path()), seen[3], "nothing changed");
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 4);
    }
}
