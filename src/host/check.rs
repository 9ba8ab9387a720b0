//! What was looked at, what was found, and what to do about it.
//!
//! Owns the report of this host that `shakedown doctor` prints. Each [`Check`] is one line of it.

use super::tools::Part;
use super::{MIB, Version, apt, existing_part, firmware, free_disk, is_root, memory, os, tools};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Root tarball, squashfs and ISO of one build, with room to spare.
const CACHE_DISK_MIB: u64 = 3 * 1024;
/// Evidence of some runs, and the overlays of machines in flight.
const LOG_DISK_MIB: u64 = 1024;
/// One machine of 1 GiB and QEMU itself.
const MEMORY_MIB: u64 = 1280;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Good.
    Ok,
    /// Not there.
    Missing,
    /// There, of too low a version.
    Old,
    /// There, and of no use as it is; or too little of it.
    Unfit,
}

/// One thing that the job needs.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The tool or the resource.
    pub name: String,
    /// How it went.
    pub state: State,
    /// What was found: a version, an amount, or what is wrong.
    pub found: String,
    /// What it is for.
    pub why: &'static str,
    /// Which part of the job needs it.
    pub part: Part,
    /// Packages that bring it, as Debian names them.
    pub packages: Vec<String>,
    /// Its version, where it tells one.
    pub version: Option<String>,
    /// The lowest version that will do.
    pub minimum: Option<&'static str>,
    /// Where it is.
    pub path: Option<PathBuf>,
    /// What to do when it is not good.
    pub fix: Option<String>,
}

impl Check {
    /// A check of `name`; it still has to be told how it went.
    pub(super) fn new(name: impl Into<String>, part: Part, why: &'static str) -> Self {
        Self {
            name: name.into(),
            state: State::Unfit,
            found: String::new(),
            why,
            part,
            packages: Vec::new(),
            version: None,
            minimum: None,
            path: None,
            fix: None,
        }
    }

    pub(super) fn package(mut self, package: impl Into<String>) -> Self {
        self.packages = vec![package.into()];
        self
    }

    pub(super) fn version(mut self, version: Option<&Version>, minimum: Option<&'static str>) -> Self {
        self.version = version.map(ToString::to_string);
        self.minimum = minimum;
        self
    }

    pub(super) fn path(mut self, path: &Path) -> Self {
        self.path = Some(path.into());
        self
    }

    pub(super) fn ok(mut self, found: impl Into<String>) -> Self {
        (self.state, self.found) = (State::Ok, found.into());
        self
    }

    pub(super) fn bad(mut self, state: State, found: impl Into<String>, fix: impl Into<String>) -> Self {
        (self.state, self.found, self.fix) = (state, found.into(), Some(fix.into()));
        self
    }

    /// The error of whoever cannot go on without it.
    pub fn fault(&self) -> Fault {
        let fault = Fault::host(format!("{} {}: it {}", self.name, self.found, self.why));
        match &self.fix {
            Some(fix) => fault.fix(fix),
            None => fault,
        }
    }
}

/// All checks of this host.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The operating system, for a person.
    pub os: String,
    /// The kernel's release.
    pub kernel: String,
    /// In the order of [`tools::TOOLS`], then the rest.
    pub checks: Vec<Check>,
}

impl Report {
    /// Looks at everything that the `parts` of the job need, and at the tools that a `project` adds,
    /// with their packages. `cache` and `logs` need not exist yet.
    pub fn collect(parts: &[Part], project: &BTreeMap<String, String>, cache: &Path, logs: &Path) -> Self {
        let mut checks = tools::check_all();
        checks.extend(tools::check_project(project));
        checks.push(firmware::check());
        checks.push(apt::check());
        if !is_root() {
            checks.push(check_namespaces());
        }
        checks.push(check_memory());
        checks.push(check_disk("cache disk", "holds images and templates", cache, CACHE_DISK_MIB));
        checks.push(check_disk("log disk", "holds the evidence of runs", logs, LOG_DISK_MIB));
        checks.retain(|check| check.part == Part::Project || parts.contains(&check.part));
        Self { os: os().name, kernel: super::kernel_release(), checks }
    }

    /// True when those parts of the job can run.
    pub fn ok(&self) -> bool {
        self.problems().next().is_none()
    }

    /// The checks that did not go well.
    pub fn problems(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.state != State::Ok)
    }

    /// The packages that would bring what is missing, too old or broken.
    pub fn missing_packages(&self) -> Vec<String> {
        packages(self.problems())
    }
}

/// The packages of some checks, sorted, each once.
pub fn packages<'a>(checks: impl Iterator<Item = &'a Check>) -> Vec<String> {
    let mut packages: Vec<_> = checks.flat_map(|check| check.packages.iter().cloned()).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// The innermost cause of an error on one line, for a cell of a table.
pub(super) fn one_line(error: &anyhow::Error) -> String {
    let text = error.root_cause().to_string();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}

fn check_memory() -> Check {
    let check = Check::new("memory", Part::Machines, "holds one machine at least");
    match memory() {
        Ok(memory) => {
            let found = format!("{} MiB free of {}", memory.available / MIB, memory.total / MIB);
            if memory.available / MIB >= MEMORY_MIB {
                check.ok(found)
            } else {
                let fix = format!("End other programs: {MEMORY_MIB} MiB are needed");
                check.bad(State::Unfit, found, fix)
            }
        }
        Err(error) => check.bad(State::Unfit, error.to_string(), "Mount /proc"),
    }
}

fn check_disk(name: &str, why: &'static str, dir: &Path, needed_mib: u64) -> Check {
    let check = Check::new(name, Part::Machines, why).path(dir);
    let fix = || format!("Make {} a directory that you can write to", dir.display());
    let place = existing_part(dir);
    if rustix::fs::access(&place, rustix::fs::Access::WRITE_OK).is_err() {
        return check.bad(State::Unfit, format!("{} is not writable", place.display()), fix());
    }
    match free_disk(dir).map(|bytes| bytes / MIB) {
        Ok(free) if free >= needed_mib => check.ok(format!("{free} MiB free")),
        Ok(free) => check.bad(
            State::Unfit,
            format!("{free} MiB free, {needed_mib} MiB are needed"),
            format!("Free space on the file system of {}", dir.display()),
        ),
        Err(error) => check.bad(State::Unfit, one_line(&error), fix()),
    }
}

/// Whether a build can be root in a user namespace of its own.
fn check_namespaces() -> Check {
    let check = Check::new("user namespaces", Part::Image, "let you build the image without root");
    let uid = rustix::process::getuid().as_raw().to_string();
    let user = std::fs::read_to_string("/etc/passwd").ok().and_then(|text| user_name(&text, &uid));
    let user = user.unwrap_or_else(|| uid.clone());
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if !has_range(&text, &[&user, &uid]) {
            let fix = format!(
                "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {}",
                process::quote(&user)
            );
            return check.bad(State::Missing, format!("{file} has no range of 65536 for {user}"), fix);
        }
    }
    let search = tools::Search::from_env();
    if search.find("newuidmap").is_none() {
        return check.bad(State::Unfit, "cannot be tried without newuidmap", tools::install_fix("uidmap"));
    }
    let Some(mmdebstrap) = search.find("mmdebstrap") else {
        return check.bad(
            State::Unfit,
            "cannot be tried without mmdebstrap",
            tools::install_fix("mmdebstrap"),
        );
    };
    // Exactly what a build does, so that every way of forbidding it is seen.
    let mut command = Command::new(mmdebstrap);
    command.args(["--unshare-helper", "true"]);
    match process::output(command, &Deadline::after(Duration::from_secs(20), "namespace check")) {
        Ok(_) => check.ok("allowed"),
        Err(error) => check.bad(
            State::Unfit,
            format!("not allowed: {}", one_line(&error)),
            "Allow them (`sysctl kernel.unprivileged_userns_clone=1`, on Ubuntu \
             `sysctl kernel.apparmor_restrict_unprivileged_userns=0`), or build the image as root and `chown -R` the cache to you",
        ),
    }
}

fn user_name(passwd: &str, uid: &str) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

/// True when `subuid(5)` text gives one of the owners 65536 ids in one piece.
fn has_range(text: &str, owners: &[&str]) -> bool {
    text.lines().any(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().unwrap_or_default();
        let count = fields.nth(1).and_then(|count| count.parse::<u64>().ok());
        owners.contains(&owner) && count.is_some_and(|count| count >= 65_536)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(checks: Vec<Check>) -> Report {
        Report { os: "os".into(), kernel: "kernel".into(), checks }
    }

    #[test]
    fn packages_of_problems_come_once_and_sorted() {
        let check = |name: &str, package: &str| Check::new(name, Part::Image, "does").package(package);
        let report = report(vec![
            check("a", "zeta").bad(State::Missing, "not found", "fix"),
            check("b", "alpha").bad(State::Old, "1.0", "fix"),
            check("c", "zeta").bad(State::Missing, "not found", "fix"),
            check("d", "fine").ok("2.0"),
        ]);
        assert!(!report.ok());
        assert_eq!(report.missing_packages(), ["alpha", "zeta"]);
    }

    #[test]
    fn too_little_disk_is_said_with_numbers() {
        let dir = tempfile::tempdir().expect("temp dir");
        let check = check_disk("cache disk", "holds", dir.path(), u64::MAX / MIB);
        assert_eq!(check.state, State::Unfit);
        assert!(check.found.contains("MiB are needed"), "{check:?}");
        assert_eq!(check_disk("cache disk", "holds", dir.path(), 0).state, State::Ok);
    }

    #[test]
    fn ranges_are_for_the_owner_and_large_enough() {
        let text = "alice:100000:65536\nbob:165536:1000\n1003:200000:70000\n";
        assert!(has_range(text, &["alice", "1001"]));
        assert!(!has_range(text, &["bob", "1002"]), "too small");
        assert!(has_range(text, &["carol", "1003"]), "by number");
        assert!(!has_range(text, &["dave", "1004"]));
        assert!(!has_range("alice:x\n:::\n\n", &["alice"]));
    }

    #[test]
    fn user_names_come_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nalice:x:1001:1001::/home/alice:/bin/sh\n";
        assert_eq!(user_name(passwd, "1001").as_deref(), Some("alice"));
        assert_eq!(user_name(passwd, "7"), None);
    }
}
