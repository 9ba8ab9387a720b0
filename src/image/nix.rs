//! The `nix` recipe: an ISO that a flake builds.
//!
//! Owns the calls of `nix` and what its errors mean. What is built is the flake's business; where
//! the result lies is [`store`](super::store)'s, under the derivation that nix names for it, so an
//! unchanged flake is found again by an evaluation alone. The ISO is copied there: what nix has, it
//! may collect as garbage.
//!
//! Works with nix 2.4 and newer: results are read from `--json`, whose shapes differ by version.

mod diagnose;
mod result;

use super::digest;
use super::settings::Nix;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::{self, is_root, tools};
use crate::process;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Packing a large root file system is silent, and slow on a busy host.
const STALL: Duration = Duration::from_secs(1800);

/// Where an image comes from, as nix says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What was built.
    pub derivation: String,
    /// The result in nix's own store, for as long as that keeps it.
    pub store_path: PathBuf,
    /// What nix remembers as its derivation; `None` where it remembers nothing.
    pub deriver: Option<String>,
    /// The hash of the result.
    pub nar_hash: Option<String>,
}

/// A flake's image, evaluated.
#[derive(Debug)]
pub(super) struct Plan {
    /// SHA-256 of what identifies it.
    pub(super) key: String,
    nix: PathBuf,
    installable: String,
    derivation: String,
}

/// What identifies an image, for its flake as it is now. With nixpkgs this takes seconds, unless
/// nix has it in its evaluation cache.
///
/// # Errors
/// A host [`Fault`] when there is no flake, or nix cannot evaluate it.
pub(super) fn evaluate(settings: &Nix, deadline: &Deadline) -> Result<String> {
    let file = settings.directory.join("flake.nix");
    if !file.is_file() {
        return Err(Fault::host(format!("there is no {}", file.display()))
            .fix("set `flake` of the image to the directory of a flake.nix")
            .into());
    }
    let mut command = nix(&tools::require("nix")?);
    command.args(["eval", "--raw", &format!("{}.drvPath", settings.installable())]);
    let said = process::output(command, deadline).map_err(|error| {
        diagnose::explain(error, &format!("nix cannot evaluate {}", settings.installable()))
    })?;
    let derivation = said.trim();
    if !derivation.ends_with(".drv") {
        bail!(Fault::host(format!("{} is no derivation, but {derivation:?}", settings.installable())));
    }
    Ok(derivation.to_owned())
}

impl Plan {
    /// How to build what [`evaluate`] named.
    ///
    /// # Errors
    /// A host [`Fault`] without nix.
    pub(super) fn new(settings: &Nix, derivation: String) -> Result<Self> {
        let key = digest::hex(&Sha256::digest(format!("recipe nix\0{derivation}")));
        Ok(Self { key, nix: tools::require("nix")?, installable: settings.installable(), derivation })
    }

    /// Has nix build it, and copies the ISO to `iso`. The output of nix goes to `log`.
    ///
    /// # Errors
    /// A host [`Fault`] that says what nix lacks where that is known, with its last lines.
    pub(super) fn build(
        &self,
        iso: &Path,
        log: &Path,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Origin> {
        let answer = iso.with_extension("json");
        let mut command = Command::new("/bin/sh");
        // What it builds and what it says about that are two streams.
        command.args(["-c", r#"out=$1; shift; exec "$@" >"$out""#, "sh"]).arg(&answer);
        let build = {
            let mut build = nix(&self.nix);
            build.args(["build", &self.installable, "--no-link", "--json", "--print-build-logs"]);
            build
        };
        command.arg(build.get_program()).args(build.get_args());
        if let Some(directory) = temporary(std::env::var_os("TMPDIR").map(PathBuf::from), is_root()) {
            events
                .note(format!("nix builds in {}: its build users cannot enter TMPDIR", directory.display()));
            command.env("TMPDIR", directory);
        }
        process::stream(command, log, STALL, deadline, |line| {
            if let Some(phase) = phase(line) {
                events.emit(Event::ImageBuildProgress { phase, percent: None });
            }
        })
        .map_err(|error| diagnose::explain(error, &format!("nix cannot build {}", self.installable)))?;
        let text = fs::read_to_string(&answer)
            .with_context(|| Fault::host(format!("cannot read {}", answer.display())))?;
        fs::remove_file(&answer)
            .with_context(|| Fault::host(format!("cannot remove {}", answer.display())))?;
        let built = result::built(&text)?;
        if built.derivation != self.derivation {
            bail!(
                Fault::host(format!(
                    "{} changed while it was built: it was {}, and is {} now",
                    self.installable, self.derivation, built.derivation
                ))
                .fix("start again")
            );
        }
        let (deriver, nar_hash) = self.path_info(&built.path, deadline, events);
        copy(&result::find_iso(&built.path)?, iso)?;
        Ok(Origin { derivation: self.derivation.clone(), store_path: built.path, deriver, nar_hash })
    }

    /// Deriver and NAR hash. An image can do without.
    fn path_info(
        &self,
        path: &Path,
        deadline: &Deadline,
        events: &Events,
    ) -> (Option<String>, Option<String>) {
        let mut command = nix(&self.nix);
        command.args(["path-info", "--json"]).arg(path);
        let info = match process::output(command, deadline) {
            Ok(text) => result::path_info(&text, path),
            Err(error) => {
                events.note(format!("nix does not tell where {} comes from: {error:#}", path.display()));
                (None, None)
            }
        };
        if info == (None, None) {
            events.note(format!("nix knows neither deriver nor NAR hash of {}", path.display()));
        }
        info
    }
}

/// With what the recipe rests on, whatever nix.conf says.
fn nix(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--extra-experimental-features", "nix-command flakes"]);
    command
}

/// A directory for builds in place of `TMPDIR`. Where root has nix's own users build, and they
/// cannot enter it, a build fails in ways that do not say why.
fn temporary(tmpdir: Option<PathBuf>, root: bool) -> Option<PathBuf> {
    const SHARED: &str = "/tmp";
    let enterable = |path: &Path| {
        let mode = |path: &Path| path.metadata().map_or(0, |meta| meta.mode());
        path.ancestors().all(|directory| mode(directory) & 0o001 != 0)
    };
    let tmpdir = tmpdir.filter(|path| !path.as_os_str().is_empty())?;
    (root && !enterable(&tmpdir) && enterable(Path::new(SHARED))).then(|| SHARED.into())
}

/// What a line of nix's own says about how far it is.
fn phase(line: &str) -> Option<String> {
    let (verb, rest) = if let Some(rest) = line.strip_prefix("building '") {
        ("building", rest)
    } else {
        ("fetching", line.strip_prefix("copying path '")?)
    };
    let path = rest.split('\'').next()?;
    // What follows the hash.
    let name = Path::new(path).file_name()?.to_str()?.split_once('-')?.1;
    Some(format!("{verb} {}", name.strip_suffix(".drv").unwrap_or(name)))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let cannot = || Fault::host(format!("cannot copy {} to {}", from.display(), to.display()));
    let size = from.metadata().with_context(cannot)?.len();
    let free = host::free_disk(to.parent().unwrap_or(to))?;
    if free < size {
        bail!(cannot().fix(format!(
            "it needs {} MiB and there are {}: free some (`shakedown image prune --older-than 0s`), or set SHAKEDOWN_CACHE to a place that has it",
            size >> 20,
            free >> 20
        )));
    }
    fs::copy(from, to).map(drop).with_context(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn progress_is_told_by_the_names_of_what_is_built() {
        for (line, told) in [
            (
                "building '/nix/store/i1yni2zkhdcdk5lvlff5877p4l4smpid-boot-image.drv'...",
                "building boot-image",
            ),
            (
                "copying path '/nix/store/n958fnygiq2350ym1li6cz832kaz8cbj-zlib-1.3' from 'https://cache.nixos.org'...",
                "fetching zlib-1.3",
            ),
        ] {
            assert_eq!(phase(line).as_deref(), Some(told));
        }
        for line in ["boot-image> building 'x'", "building '", "copying path 'x'", ""] {
            assert_eq!(phase(line), None, "{line}");
        }
    }

    #[test]
    fn builds_of_root_get_a_directory_that_others_can_enter() {
        let private = tempfile::tempdir().expect("temp dir");
        let below = private.path().join("below");
        fs::create_dir(&below).expect("makes");
        fs::set_permissions(private.path(), PermissionsExt::from_mode(0o700)).expect("sets");
        assert_eq!(temporary(Some(below.clone()), true).as_deref(), Some(Path::new("/tmp")));
        assert_eq!(temporary(Some("/tmp".into()), true), None);
        assert_eq!(temporary(Some(below), false), None, "builds are the user's own");
        assert_eq!((temporary(None, true), temporary(Some("".into()), true)), (None, None));
    }
}
