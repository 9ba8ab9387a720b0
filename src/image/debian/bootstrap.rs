//! Packages to a tar of a root file system: mmdebstrap.
//!
//! Works as root, and as an ordinary user by user namespaces. Whatever mmdebstrap starts is in its
//! process group, and a watcher ends that group when we die, however we die.

use super::apt::Sources;
use super::files;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::{is_root, tools};
use crate::process;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use std::io::PipeWriter;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A download or a package's script may say nothing for this long.
const STALL: Duration = Duration::from_secs(120);

/// What goes into a root.
pub(super) struct Root<'a> {
    pub(super) sources: &'a Sources,
    /// An `apt.conf` with proxies and certificates.
    pub(super) transport: &'a str,
    pub(super) packages: &'a [String],
    /// A tar, laid over the packages.
    pub(super) overlay: &'a Path,
}

/// Makes `tar`. `scratch` is a directory that we own; `temp` one in which mmdebstrap may make the
/// tree, and which its user namespace can reach.
///
/// # Errors
/// A host [`Fault`] with mmdebstrap's last lines.
pub(super) fn bootstrap(
    root: &Root<'_>,
    tar: &Path,
    scratch: &Path,
    temp: &Path,
    log: &Path,
    deadline: &Deadline,
    events: &Events,
) -> Result<()> {
    let sources = scratch.join("sources.list");
    let transport = scratch.join("apt.conf");
    // A file, since a proxy's password has no place on a command line.
    for (file, text) in [(&sources, &root.sources.list[..]), (&transport, root.transport)] {
        std::fs::write(file, text)
            .with_context(|| Fault::host(format!("cannot write {}", file.display())))?;
    }
    let mut command = mmdebstrap(deadline)?;
    command
        .arg(if is_root() { "--mode=root" } else { "--mode=unshare" })
        .args(["--verbose", "--variant=apt", "--format=tar", "--aptopt=Acquire::Languages \"none\""])
        .arg(format!("--include={}", root.packages.join(",")));
    if Path::new(MERGED_USR).is_dir() {
        command.arg(format!("--hook-dir={MERGED_USR}"));
    }
    for pattern in files::excludes() {
        command.arg(match pattern.strip_prefix('!') {
            Some(pattern) => format!("--dpkgopt=path-include={pattern}"),
            None => format!("--dpkgopt=path-exclude={pattern}"),
        });
    }
    let shell_word = |path: &Path| process::quote(&path.to_string_lossy());
    command
        .arg(format!("--setup-hook=upload {} {TRANSPORT}", shell_word(&transport)))
        .arg(format!("--customize-hook=tar-in {} /", shell_word(root.overlay)))
        .arg(format!("--customize-hook={}", files::CUSTOMIZE))
        .arg(format!("--customize-hook=rm -f \"$1\"{TRANSPORT}"))
        .args(["".as_ref(), tar.as_os_str(), sources.as_os_str()]);
    let script = scratch.join("mmdebstrap.sh");
    let (mut command, _life) = with_watcher(&command, &script)?;
    // The script goes, the log stays.
    std::fs::copy(&script, log).with_context(|| Fault::host(format!("cannot write {}", log.display())))?;
    command
        .env("LC_ALL", "C.UTF-8")
        .env("TMPDIR", temp)
        .env("SOURCE_DATE_EPOCH", super::SOURCE_DATE_EPOCH.to_string());
    let mut progress = Progress::default();
    process::stream(command, log, STALL, deadline, |line| {
        if let Some((phase, percent)) = progress.read(line) {
            events.emit(Event::ImageBuildProgress { phase: phase.into(), percent });
        }
    })
    .map_err(explain)
}

/// Root's mounts below the tree go into a mount namespace, and so go away with their processes.
/// An ordinary user's mmdebstrap makes its own; where root may not make one, it may not mount either.
fn mmdebstrap(deadline: &Deadline) -> Result<Command> {
    let program = tools::require("mmdebstrap")?;
    let namespace = || {
        let mut command = Command::new("unshare");
        command.arg("--mount");
        command
    };
    let mut attempt = namespace();
    attempt.arg("true");
    if !is_root() || process::output(attempt, deadline).is_err() {
        return Ok(Command::new(program));
    }
    let mut command = namespace();
    command.arg(program);
    Ok(command)
}

/// mmdebstrap's own: `/bin` and its like are links, so that no package has to move files later.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/merged-usr";
/// Where the host's way to the mirrors lies in the root while packages are fetched.
const TRANSPORT: &str = "/etc/apt/apt.conf.d/90shakedown-transport";

/// Puts a process beside `command`, in its group, that kills the group once our end of a pipe is
/// closed. The death signal of [`process::spawn`] reaches only the direct child, and mmdebstrap's
/// children would go on without it. The command becomes the script `script`, as its line is longer
/// than any message should be.
fn with_watcher(command: &Command, script: &Path) -> Result<(Command, PipeWriter)> {
    const WATCHER: &str = "{ read -r _ <&3; kill -KILL 0; } </dev/null >/dev/null 2>&1 &";
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| process::quote(&word.to_string_lossy()))
        .collect();
    std::fs::write(script, format!("{WATCHER}\nexec {} 3<&-\n", words.join(" \\\n    ")))
        .with_context(|| Fault::host(format!("cannot write {}", script.display())))?;
    let (reader, writer) = std::io::pipe().context(Fault::host("cannot make a pipe"))?;
    let mut watched = Command::new("/bin/sh");
    watched
        .arg(script)
        .fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(reader), child_fd: 3 }])
        .context(Fault::host("cannot hand a pipe to a child"))?;
    Ok((watched, writer))
}

/// The usual reasons, with their fixes.
fn explain(error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let known: [(&[&str], &str, &str); 5] = [
        (
            &["No space left on device"],
            "the disk is full",
            "free some 2 GB, or set SHAKEDOWN_CACHE and TMPDIR to places that have them",
        ),
        (
            &[
                "Temporary failure resolving",
                "Could not resolve",
                "Could not connect",
                "Connection failed",
                "Unable to connect",
                "Failed to fetch",
            ],
            "the packages cannot be fetched",
            "check that `apt-get update` works here: the build uses the same sources and proxies",
        ),
        (
            &["Unable to locate package"],
            "a package does not exist",
            "correct `packages` in the image's settings",
        ),
        (
            &["invalid idmap", "/etc/subuid", "newuidmap", "unshare() failed", "unshare mode"],
            "this user may not make user namespaces",
            "run `shakedown doctor`, which tells what forbids it, or build the image as root",
        ),
        (
            &["NO_PUBKEY", "not signed"],
            "the sources' signatures are not trusted",
            "install the distribution's keyring package",
        ),
    ];
    let found = known.iter().find(|(signs, ..)| signs.iter().any(|sign| text.contains(sign)));
    match found {
        Some((_, what, fix)) => error.context(Fault::host(format!("no root file system: {what}")).fix(*fix)),
        None => error.context(Fault::host("no root file system: mmdebstrap did not succeed")),
    }
}

/// Where mmdebstrap is, read from its lines.
#[derive(Debug, Default)]
struct Progress {
    phase: &'static str,
    /// Of the current apt run: packages to install, and lines of dpkg seen. dpkg has two per package.
    total: u32,
    seen: u32,
    percent: Option<u8>,
}

impl Progress {
    /// The phase and its percentage, when either changed.
    fn read(&mut self, line: &str) -> Option<(&'static str, Option<u8>)> {
        let before = (self.phase, self.percent);
        if let Some(said) = line.trim_start().strip_prefix("I: ") {
            let starts = |start: &str| said.starts_with(start);
            let phase = match () {
                () if starts("running apt-get update") => "fetching package lists",
                () if starts("downloading packages") => "downloading base packages",
                () if starts("extracting archives") => "unpacking base packages",
                () if starts("installing essential") => "installing base packages",
                () if starts("installing remaining") => "installing packages",
                () if starts("running --customize-hook") || starts("running special hook: tar-in") => {
                    "configuring"
                }
                () if starts("creating tarball") => "collecting the root file system",
                () => self.phase,
            };
            if phase != self.phase {
                *self = Self { phase, ..Self::default() };
            }
        } else if let Some((_, rest)) = line.split_once(" upgraded, ") {
            self.total = rest.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0);
            self.seen = 0;
        } else if self.total > 0
            && ["Get:", "Unpacking ", "Setting up "].iter().any(|start| line.starts_with(start))
        {
            self.seen += 1;
            // The downloading phase has one line per package, the others three or two.
            let lines = if self.phase.starts_with("downloading") { self.total } else { self.total * 3 };
            self.percent = u8::try_from((self.seen * 100 / lines).min(100)).ok();
        }
        (before != (self.phase, self.percent)).then_some((self.phase, self.percent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    #[test]
    fn progress_follows_mmdebstrap() {
        let mut progress = Progress::default();
        let mut seen = Vec::new();
        let log = "I: running apt-get update...\nGet:1 http://x InRelease [151 kB]\nI: downloading packages with apt...\n\
            0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.\nGet:1 a\nGet:2 b\n\
            I: extracting archives...\nI: installing remaining packages inside the chroot...\n\
            0 upgraded, 1 newly installed, 0 to remove\nGet:1 c\nUnpacking c (1) ...\nSetting up c (1) ...\nI: done";
        for line in log.lines() {
            seen.extend(progress.read(line));
        }
        assert_eq!(
            seen,
            [
                ("fetching package lists", None),
                ("downloading base packages", None),
                ("downloading base packages", Some(50)),
                ("downloading base packages", Some(100)),
                ("unpacking base packages", None),
                ("installing packages", None),
                ("installing packages", Some(33)),
                ("installing packages", Some(66)),
                ("installing packages", Some(100)),
            ]
        );
    }

    #[test]
    fn the_usual_reasons_have_a_fix() {
        for (said, fix) in [
            ("E: Temporary failure resolving 'deb.debian.org'", "apt-get update"),
            ("write error: No space left on device", "SHAKEDOWN_CACHE"),
            ("E: Unable to locate package opensh", "packages"),
            ("E: invalid idmap", "shakedown doctor"),
        ] {
            let text = format!("{:#}", explain(Fault::host(said).into()));
            assert!(text.contains(fix) && text.contains(said), "{text}");
        }
    }

    #[test]
    fn the_watcher_ends_the_group_when_our_end_of_the_pipe_goes() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "sleep 1000 & echo $!; wait"]);
        let dir = tempfile::tempdir().expect("temp dir");
        let (mut command, life) = with_watcher(&command, &dir.path().join("script")).expect("prepared");
        command.stdout(Stdio::piped());
        let mut child = process::spawn(command).expect("starts");
        let (_, stdout, _) = child.pipes();
        let mut lines = BufReader::new(stdout.expect("piped"));
        let mut pid = String::new();
        lines.read_line(&mut pid).expect("says its grandchild");
        drop(life);
        let deadline = Deadline::after(Duration::from_secs(20), "test");
        child.wait(&deadline).expect("ends although nobody waits for it to");
        // The grandchild holds the pipe for as long as it lives.
        assert_eq!(lines.read_line(&mut pid).expect("reads"), 0);
    }
}
