//! Packages by apt: whether its lists are usable, and installing what is missing.
//!
//! Owns the command lines. What is missing is [`super::check::Report`]'s to say; whether the user
//! agrees is the command's to ask.

use super::check::{Check, State};
use super::tools::{Part, Search};
use super::{is_root, os};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

/// Lists older than this are fetched anew before an installation; mirrors drop old packages.
const LISTS_AGE: Duration = Duration::from_secs(24 * 3600);
/// apt prints nothing during a download, and we let it wait 300 s for the lock.
const STALL: Duration = Duration::from_secs(900);
const LISTS: &str = "/var/lib/apt/lists";

/// Whether apt has package lists: a build installs the image's packages from the same sources.
pub fn check() -> Check {
    let check = Check::new("apt sources", Part::Image, "bring the image's packages");
    if Search::from_env().find("apt-get").is_none() {
        let fix = "Build the image on Debian or Ubuntu, or give a prebuilt one by SHAKEDOWN_IMAGE=FILE";
        return check.bad(State::Missing, "this host has no apt", fix);
    }
    match present_lists() {
        Ok(0) => check.bad(State::Missing, "no package lists", update_fix()),
        Ok(count) => check.ok(format!("{count} package list{}", if count == 1 { "" } else { "s" })),
        Err(error) => check.bad(
            State::Unfit,
            super::check::one_line(&error),
            "Repair /etc/apt until `apt-get check` is quiet",
        ),
    }
}

fn update_fix() -> String {
    let sudo = if is_root() { "" } else { "sudo " };
    format!("Fetch them with `{sudo}apt-get update`, or run `shakedown doctor --install`")
}

/// How many `Packages` lists of the configured sources have been fetched.
fn present_lists() -> Result<usize> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(FILENAME)", "Created-By: Packages"]);
    let text = process::output(command, &Deadline::after(Duration::from_secs(60), "apt check"))?;
    Ok(text.lines().filter(|file| Path::new(file).is_file()).count())
}

/// What an installation will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Fetch the lists first.
    pub update: bool,
    /// What to install or upgrade.
    pub packages: Vec<String>,
}

impl Plan {
    /// The way to have `packages`; `None` when there is nothing to do.
    ///
    /// # Errors
    /// On a host that is not of Debian's family, a fault that names the packages.
    pub fn new(packages: Vec<String>) -> Result<Option<Self>> {
        let apt = Search::from_env().find("apt-get").is_some();
        if !os().debian || !apt {
            if packages.is_empty() {
                return Ok(None);
            }
            return Err(Fault::host(format!("cannot install packages on {}", os().name))
                .fix(format!("Install by hand what Debian has in these packages: {}", packages.join(" ")))
                .into());
        }
        let have_lists = present_lists()? > 0;
        let update = !have_lists || (!packages.is_empty() && (lists_are_old() || !all_known(&packages)));
        Ok((update || !packages.is_empty()).then_some(Self { update, packages }))
    }

    fn commands(&self, prefix: &[&str]) -> Vec<Command> {
        let mut commands = Vec::new();
        if self.update {
            commands.push(apt_get(prefix, &["update"]));
        }
        if !self.packages.is_empty() {
            let mut install = apt_get(prefix, &["install", "-y", "--no-install-recommends"]);
            install.args(&self.packages);
            commands.push(install);
        }
        commands
    }

    /// All of it as one line for a person's shell.
    pub fn line(&self, root: bool) -> String {
        let prefix: &[&str] = if root { &[] } else { &["sudo"] };
        self.commands(prefix).iter().map(process::display).collect::<Vec<_>>().join(" && ")
    }

    /// Does it. Output goes to `log` and line by line to `on_line`. Not root: `sudo` must not ask.
    ///
    /// # Errors
    /// A host fault with the last lines of the command that failed; nothing is tried twice.
    pub fn run(&self, log: &Path, deadline: &Deadline, mut on_line: impl FnMut(&str)) -> Result<()> {
        let prefix: &[&str] = if is_root() { &[] } else { &["sudo", "-n"] };
        for command in self.commands(prefix) {
            process::stream(command, log, STALL, deadline, &mut on_line).with_context(|| {
                Fault::host("apt-get did not succeed").fix(
                    "See its last lines. What an interruption left half done, \
                     `dpkg --configure -a` as root repairs",
                )
            })?;
            // A failed fetch is a mere warning to apt, and then every package is unknown.
            if present_lists()? == 0 {
                return Err(Fault::host("`apt-get update` fetched no package list")
                    .fix("See its last lines; check the network and /etc/apt/sources.list")
                    .into());
            }
        }
        Ok(())
    }
}

/// Whether this can be a package's name, and nothing that apt takes for an option, a version or a
/// removal (Debian Policy 5.6.1).
pub fn is_package_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(plain)
        && !name.ends_with('-')
}

fn apt_get(prefix: &[&str], args: &[&str]) -> Command {
    // `env` and not `Command::env`, so that the variable passes sudo and is in the line shown.
    let mut words = prefix.iter().chain(&["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    let mut command = Command::new(words.next().copied().unwrap_or("env"));
    command.args(words).args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]).args(args);
    command
}

fn lists_are_old() -> bool {
    let modified = Path::new(LISTS).metadata().and_then(|meta| meta.modified());
    // A time in the future is a clock that was set; the lists are young then.
    modified.is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|age| age > LISTS_AGE))
}

fn all_known(packages: &[String]) -> bool {
    let mut command = Command::new("apt-cache");
    command.arg("policy").args(packages).env("LC_ALL", "C");
    let text = process::output(command, &Deadline::after(Duration::from_secs(60), "apt check"));
    text.is_ok_and(|text| candidates(&text) == packages.len())
}

/// How many packages of `apt-cache policy`'s answer can be installed.
fn candidates(policy: &str) -> usize {
    policy
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|v| *v != "(none)")
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_shown_is_the_line_run() {
        let plan = Plan { update: true, packages: vec!["ovmf".into(), "xorriso".into()] };
        let apt = "env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0";
        assert_eq!(
            plan.line(true),
            format!("{apt} update && {apt} install -y --no-install-recommends ovmf xorriso")
        );
        let plan = Plan { update: false, packages: vec!["ovmf".into()] };
        assert_eq!(plan.line(false), format!("sudo {apt} install -y --no-install-recommends ovmf"));
        assert_eq!(Plan { update: true, packages: Vec::new() }.line(true), format!("{apt} update"));
    }

    #[test]
    fn packages_without_candidate_are_unknown() {
        let policy = "qemu-utils:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7+deb12u18\n  Version table:\n\
                      ovmf:\n  Installed: (none)\n  Candidate: (none)\n";
        assert_eq!(candidates(policy), 1);
        assert_eq!(candidates(""), 0);
    }
}
