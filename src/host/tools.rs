//! The programs and data files we need of the host: one table, and how to look things up in it.
//!
//! A missing tool is a host fault whose fix is the command that installs it. Installing is
//! [`super::apt`]'s.

use super::check::{Check, State, one_line};
use super::{Version, is_root, os};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process;
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

/// Which part of the job needs a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Running machines.
    Machines,
    /// Building the `debian` image.
    Image,
    /// Building images of the `nix` recipe.
    Nix,
    /// The scenarios of the project in the current directory.
    Project,
}

/// One line of the table.
#[derive(Debug)]
pub struct Tool {
    /// The program, or a name for a set of files.
    pub name: &'static str,
    /// Which part of the job needs it.
    pub part: Part,
    /// What it does for us, as a phrase.
    pub why: &'static str,
    /// The package that has it, in Debian and Ubuntu.
    pub package: &'static str,
    kind: Kind,
    /// Only needed by users who are not root.
    unprivileged: bool,
}

#[derive(Debug)]
enum Kind {
    /// A program. `ask` makes it print its version; empty where it cannot.
    Program { ask: &'static [&'static str], minimum: Option<&'static str> },
    /// Files that must all exist.
    Files(&'static [&'static str]),
}

impl Tool {
    const fn program(name: &'static str, part: Part, why: &'static str, package: &'static str) -> Self {
        Self::new(name, part, why, package, Kind::Program { ask: &["--version"], minimum: None })
    }

    const fn files(
        name: &'static str,
        part: Part,
        why: &'static str,
        package: &'static str,
        files: &'static [&'static str],
    ) -> Self {
        Self::new(name, part, why, package, Kind::Files(files))
    }

    const fn new(
        name: &'static str,
        part: Part,
        why: &'static str,
        package: &'static str,
        kind: Kind,
    ) -> Self {
        Self { name, part, why, package, kind, unprivileged: false }
    }

    const fn version(mut self, ask: &'static [&'static str], minimum: Option<&'static str>) -> Self {
        self.kind = Kind::Program { ask, minimum };
        self
    }

    const fn unprivileged(mut self) -> Self {
        self.unprivileged = true;
        self
    }
}

/// Everything we need. To add a tool, add a line.
pub const TOOLS: &[Tool] = &[
    // 7.1 brought PNG screenshots (QMP `screendump` with `format`).
    Tool::program("qemu-system-x86_64", Part::Machines, "runs the machines", "qemu-system-x86")
        .version(&["--version"], Some("7.1")),
    Tool::program("qemu-img", Part::Machines, "makes disk overlays, checks disk images", "qemu-utils"),
    Tool::program("mmdebstrap", Part::Image, "puts the image's packages together", "mmdebstrap"),
    // 4.5 brought sqfstar.
    Tool::program("sqfstar", Part::Image, "packs the image's root file system", "squashfs-tools")
        .version(&["-version"], Some("4.5")),
    Tool::program("xorriso", Part::Image, "writes and checks the ISO", "xorriso")
        .version(&["-version"], None),
    Tool::program("mformat", Part::Image, "makes the ISO's EFI partition", "mtools"),
    Tool::program("grub-mkimage", Part::Image, "makes the ISO's boot loaders", "grub-common"),
    Tool::files(
        "GRUB for BIOS",
        Part::Image,
        "boots the ISO under BIOS",
        "grub-pc-bin",
        &["/usr/lib/grub/i386-pc/cdboot.img", "/usr/lib/grub/i386-pc/boot_hybrid.img"],
    ),
    Tool::files(
        "GRUB for UEFI",
        Part::Image,
        "boots the ISO under UEFI",
        "grub-efi-amd64-bin",
        &["/usr/lib/grub/x86_64-efi/moddep.lst"],
    ),
    // 2.4 brought flakes and what we ask of the new command line.
    Tool::program("nix", Part::Nix, "builds the images of flakes", "nix-bin")
        .version(&["--version"], Some("2.4")),
    Tool::program("newuidmap", Part::Image, "lets you build the image without root", "uidmap")
        .version(&[], None)
        .unprivileged(),
];

/// The path of a program of the table, once it is known to be there and new enough.
///
/// # Errors
/// A host fault with the command that installs or upgrades it.
pub fn require(program: &str) -> Result<PathBuf> {
    static FOUND: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);
    if let Some(path) = FOUND.lock().unwrap_or_else(PoisonError::into_inner).get(program) {
        return Ok(path.clone());
    }
    let path = Search::from_env().require(program)?;
    FOUND.lock().unwrap_or_else(PoisonError::into_inner).insert(program.into(), path.clone());
    Ok(path)
}

/// Where programs are looked for.
#[derive(Clone, Debug)]
pub struct Search(Vec<PathBuf>);

impl Search {
    /// `PATH`, then the system directories that Debian leaves out of a user's `PATH`.
    pub fn from_env() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        Self(std::env::split_paths(&path).filter(|dir| dir.is_absolute()).chain(system).collect())
    }

    /// The first executable file of that name.
    pub fn find(&self, program: &str) -> Option<PathBuf> {
        self.0
            .iter()
            .map(|dir| dir.join(program))
            .find(|path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok())
    }

    fn require(&self, program: &str) -> Result<PathBuf> {
        let tool = TOOLS.iter().find(|tool| tool.name == program).with_context(|| {
            Fault::host(format!("`{program}` is asked for, but not in the table of host::tools"))
        })?;
        // The version costs a start of the program; most tools are as good as any other version.
        let ask = matches!(tool.kind, Kind::Program { minimum: Some(_), .. });
        let check = self.look(tool, ask);
        match (check.state, &check.path) {
            (State::Ok, Some(path)) => Ok(path.clone()),
            _ => Err(check.fault().into()),
        }
    }

    /// What is there of one tool.
    pub fn check(&self, tool: &Tool) -> Check {
        self.look(tool, true)
    }

    fn look(&self, tool: &Tool, with_version: bool) -> Check {
        let check = Check::new(tool.name, tool.part, tool.why).package(tool.package);
        let (ask, minimum) = match tool.kind {
            Kind::Files(files) => return look_for_files(check, files),
            Kind::Program { ask, minimum } => (ask, minimum),
        };
        let Some(path) = self.find(tool.name) else {
            return check.bad(State::Missing, "not found", install_fix(tool.package));
        };
        let check = check.path(&path);
        if !with_version || ask.is_empty() {
            return check.ok("present");
        }
        let mut command = Command::new(&path);
        command.args(ask).env("LC_ALL", "C");
        let said = process::output(command, &Deadline::after(Duration::from_secs(20), "version check"));
        let version = match &said {
            Ok(text) => Version::find(text),
            Err(error) => {
                let text = format!("does not run: {}", one_line(error));
                return check.bad(State::Unfit, text, install_fix(tool.package));
            }
        };
        let least: Option<Version> = minimum.and_then(|text| text.parse().ok());
        let check = check.version(version.as_ref(), minimum);
        match (version, least) {
            (Some(version), Some(least)) if version < least => check.bad(
                State::Old,
                format!("{version} is too old, {least} or newer is needed"),
                format!(
                    "Upgrade the package {}. Debian 12 and Ubuntu 24.04 have a version that will do",
                    tool.package
                ),
            ),
            (None, Some(least)) => check.bad(
                State::Unfit,
                format!("does not tell its version, {least} or newer is needed"),
                install_fix(tool.package),
            ),
            (Some(version), _) => check.ok(version.to_string()),
            (None, None) => check.ok("present"),
        }
    }
}

fn look_for_files(check: Check, files: &[&str]) -> Check {
    match files.iter().find(|file| !Path::new(file).is_file()) {
        None => check.path(Path::new(files[0])).ok("present"),
        Some(missing) => {
            let fix = install_fix(&check.packages.join(" "));
            check.bad(State::Missing, format!("no {missing}"), fix)
        }
    }
}

/// The checks of all tools that this user needs.
pub fn check_all() -> Vec<Check> {
    let search = Search::from_env();
    TOOLS.iter().filter(|tool| !tool.unprivileged || !is_root()).map(|tool| search.check(tool)).collect()
}

/// The checks of what a project's settings ask for: programs by name, files by absolute path, each
/// with its package.
pub fn check_project(tools: &BTreeMap<String, String>) -> Vec<Check> {
    let search = Search::from_env();
    let look = |(name, package): (&String, &String)| {
        let check = Check::new(name, Part::Project, "serves this project's tests").package(package);
        let place = if name.starts_with('/') {
            Some(PathBuf::from(name)).filter(|path| path.exists())
        } else {
            search.find(name)
        };
        match place {
            Some(path) => check.path(&path).ok("present"),
            None => check.bad(State::Missing, "not found", install_fix(package)),
        }
    };
    tools.iter().map(look).collect()
}

/// How to get packages (names with spaces between), as a sentence.
pub fn install_fix(packages: &str) -> String {
    if os().debian {
        let sudo = if is_root() { "" } else { "sudo " };
        format!("Install it with `{sudo}apt-get install {packages}`, or run `shakedown doctor --install`")
    } else {
        format!("Install what Debian has as {packages}")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Writes an executable shell script: a stand-in for a tool.
    pub(crate) fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("writes a script");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("makes it executable");
        path
    }

    fn with(name: &str, body: &str) -> (tempfile::TempDir, Search) {
        let dir = tempfile::tempdir().expect("temp dir");
        script(dir.path(), name, body);
        let search = Search(vec![dir.path().into()]);
        (dir, search)
    }

    #[test]
    fn a_missing_tool_is_an_error_that_is_the_fix() {
        let error = Search(Vec::new()).require("qemu-img").expect_err("nowhere to be found");
        let text = format!("{error:#}");
        assert!(text.starts_with("qemu-img not found: it makes disk overlays"), "{text}");
        assert!(text.contains("\nFix: Install") && text.contains("qemu-utils"), "{text}");
    }

    #[test]
    fn an_old_qemu_is_told_apart_from_a_missing_one() {
        let old = "echo 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6.24)'";
        let (_dir, search) = with("qemu-system-x86_64", old);
        let text = format!("{:#}", search.require("qemu-system-x86_64").expect_err("too old"));
        assert!(text.contains("6.2.0 is too old, 7.1 or newer is needed"), "{text}");
        let check = search.check(&TOOLS[0]);
        assert_eq!((check.state, check.minimum), (State::Old, Some("7.1")));
    }

    #[test]
    fn a_good_qemu_passes_with_its_version() {
        let (dir, search) = with("qemu-system-x86_64", "echo 'QEMU emulator version 7.2.22 (Debian)'");
        let path = search.require("qemu-system-x86_64").expect("is good");
        assert_eq!(path, dir.path().join("qemu-system-x86_64"));
        assert_eq!(search.check(&TOOLS[0]).found, "7.2.22");
    }

    #[test]
    fn a_tool_that_does_not_run_is_unfit() {
        let (_dir, search) = with("qemu-system-x86_64", "echo no such library >&2; exit 127");
        let check = search.check(&TOOLS[0]);
        assert_eq!(check.state, State::Unfit);
        assert!(check.found.contains("no such library"), "{check:?}");
        let (_dir, search) = with("qemu-system-x86_64", "echo hello");
        assert_eq!(search.check(&TOOLS[0]).state, State::Unfit, "no version");
    }

    #[test]
    fn what_is_not_executable_or_not_in_the_table_is_not_found() {
        let (dir, search) = with("xorriso", "");
        assert_eq!(search.find("xorriso"), Some(dir.path().join("xorriso")));
        std::fs::set_permissions(dir.path().join("xorriso"), PermissionsExt::from_mode(0o644)).expect("set");
        assert_eq!(search.find("xorriso"), None);
        let error = search.require("frobnicate").expect_err("unknown").to_string();
        assert!(error.contains("not in the table"), "{error}");
    }

    #[test]
    fn data_files_must_all_be_there() {
        let check = Check::new("files", Part::Image, "does").package("grub-pc-bin");
        let missing = look_for_files(check.clone(), &["/proc/self/stat", "/nowhere/cdboot.img"]);
        assert_eq!((missing.state, missing.found.as_str()), (State::Missing, "no /nowhere/cdboot.img"));
        assert_eq!(look_for_files(check, &["/proc/self/stat"]).state, State::Ok);
    }

    #[test]
    fn a_project_s_tools_are_programs_and_files() {
        let tools =
            [("sh", "dash"), ("/proc/self/stat", "linux"), ("no-such-tool", "mine"), ("/no/file", "x")];
        let tools = tools.map(|(name, package)| (name.to_owned(), package.to_owned()));
        let checks = check_project(&tools.into());
        let found: Vec<_> = checks.iter().map(|check| (check.name.as_str(), check.state)).collect();
        let (missing, ok) = (State::Missing, State::Ok);
        assert_eq!(
            found,
            [("/no/file", missing), ("/proc/self/stat", ok), ("no-such-tool", missing), ("sh", ok)]
        );
        assert!(checks[2].fix.as_ref().is_some_and(|fix| fix.contains("mine")), "{checks:?}");
    }

    #[test]
    fn the_table_is_sound() {
        for tool in TOOLS {
            assert!(!tool.why.is_empty() && !tool.package.is_empty(), "{tool:?}");
            if let Kind::Program { minimum: Some(minimum), .. } = tool.kind {
                minimum.parse::<Version>().expect("a minimum is a version");
            }
        }
        let mut names: Vec<_> = TOOLS.iter().map(|tool| tool.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TOOLS.len(), "each name once");
    }
}
