//! What this host has: tools, firmware files, packages, memory, disk space, and our cache directory.
//!
//! Owns the questions and the fixes. Does not know what a machine or an image is; the accelerator,
//! which takes a machine to find out, is [`crate::vm::accel`]'s.

pub mod apt;
pub mod check;
pub mod firmware;
pub mod setting;
pub mod tools;
mod version;

pub use check::{Check, Report, State};
pub use version::Version;

use crate::fault::Fault;
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// Where images, templates and cached answers live: `SHAKEDOWN_CACHE`, else
/// `$XDG_CACHE_HOME/shakedown`, else `$HOME/.cache/shakedown`. Made with mode 0700 when missing.
///
/// # Errors
/// A host fault when the path is relative, cannot be made or cannot be written to.
pub fn cache_dir() -> Result<PathBuf> {
    let dir = cache_location()?;
    make_private_dir(&dir).with_context(|| {
        Fault::host(format!("the cache directory {} cannot be written to", dir.display()))
            .fix("Make it writable for you, or set SHAKEDOWN_CACHE to a directory that is")
    })?;
    Ok(dir)
}

/// As [`cache_dir`], without making it.
///
/// # Errors
/// When the path is relative, or nothing says where.
pub fn cache_location() -> Result<PathBuf> {
    cache_path(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
}

fn cache_path(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    let (name, value, below) = if let Some(value) = variable("SHAKEDOWN_CACHE") {
        ("SHAKEDOWN_CACHE", value, "")
    } else if let Some(value) = variable("XDG_CACHE_HOME") {
        ("XDG_CACHE_HOME", value, "shakedown")
    } else if let Some(value) = variable("HOME") {
        ("HOME", value, ".cache/shakedown")
    } else {
        return Err(Fault::host("there is no place for a cache: HOME is not set")
            .fix("Set SHAKEDOWN_CACHE to an absolute path")
            .into());
    };
    let base = PathBuf::from(value);
    if base.is_relative() {
        return Err(setting::Invalid::Value {
            name,
            value: base.display().to_string(),
            wants: "an absolute path".into(),
        }
        .into());
    }
    Ok(if below.is_empty() { base } else { base.join(below) })
}

fn make_private_dir(dir: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    Ok(rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)?)
}

/// True for the superuser.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The release of the running kernel, as `uname -r` says it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total: u64,
    /// What new processes can have without swapping.
    pub available: u64,
}

/// This host's memory, from `/proc/meminfo`.
///
/// # Errors
/// When the file cannot be read or says nothing of memory.
pub fn memory() -> Result<Memory> {
    let text = std::fs::read_to_string("/proc/meminfo").context(Fault::host("cannot read /proc/meminfo"))?;
    parse_meminfo(&text).ok_or_else(|| Fault::host("/proc/meminfo does not tell the memory").into())
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    };
    Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// The nearest of `path` and its parents that exists.
pub fn existing_part(path: &Path) -> PathBuf {
    let places = path.ancestors().filter(|place| !place.as_os_str().is_empty());
    places.into_iter().find(|place| place.exists()).unwrap_or(Path::new(".")).into()
}

/// Bytes that a user may still write where `path` is, or will be once it is made.
///
/// # Errors
/// When the file system does not answer.
pub fn free_disk(path: &Path) -> Result<u64> {
    let place = existing_part(path);
    let stat = rustix::fs::statvfs(&place)
        .with_context(|| Fault::host(format!("cannot ask the free space of {}", place.display())))?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// What `/etc/os-release` says of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Os {
    /// For a person: `Debian GNU/Linux 12 (bookworm)`.
    pub name: String,
    /// Debian, Ubuntu or one that says it is like them.
    pub debian: bool,
}

/// The operating system of this host.
pub fn os() -> Os {
    let read = |path| std::fs::read_to_string(path).ok();
    parse_os_release(&read("/etc/os-release").or_else(|| read("/usr/lib/os-release")).unwrap_or_default())
}

fn parse_os_release(text: &str) -> Os {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
    };
    let family = format!("{} {}", field("ID"), field("ID_LIKE"));
    let name = match field("PRETTY_NAME") {
        name if name.is_empty() => "an unknown Linux".into(),
        name => name,
    };
    Os { name, debian: family.split_whitespace().any(|id| matches!(id, "debian" | "ubuntu")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::os::unix::fs::PermissionsExt;

    fn path_with(variables: &[(&str, &str)]) -> Result<PathBuf> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        cache_path(|name| variables.get(name).map(OsString::from))
    }

    #[test]
    fn the_nearest_variable_names_the_cache() {
        let path = |variables: &[_]| path_with(variables).expect("a path");
        let home = ("HOME", "/home/u");
        assert_eq!(path(&[home]), Path::new("/home/u/.cache/shakedown"));
        assert_eq!(path(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/shakedown"));
        let all = [home, ("XDG_CACHE_HOME", "/x"), ("SHAKEDOWN_CACHE", "/c")];
        assert_eq!(path(&all), Path::new("/c"));
    }

    #[test]
    fn a_relative_or_absent_cache_is_an_error_with_the_way_out() {
        let text = format!("{:#}", path_with(&[("SHAKEDOWN_CACHE", "c")]).expect_err("relative"));
        assert!(text.contains("SHAKEDOWN_CACHE=c") && text.contains("an absolute path"), "{text}");
        let text = format!("{:#}", path_with(&[]).expect_err("nothing"));
        assert!(text.contains("Fix: Set SHAKEDOWN_CACHE"), "{text}");
    }

    #[test]
    fn a_new_directory_is_private() {
        let dir = tempfile::tempdir().expect("temp dir");
        let cache = dir.path().join("a/b");
        make_private_dir(&cache).expect("is made");
        assert_eq!(cache.metadata().expect("exists").permissions().mode() & 0o777, 0o700);
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("writes");
        make_private_dir(&file.join("c")).expect_err("a file is in the way");
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\n";
        assert_eq!(parse_meminfo(text), Some(Memory { total: 8_192_000_000, available: 5_120_000 }));
        assert_eq!(parse_meminfo("MemTotal: lots\n"), None);
    }

    #[test]
    fn free_space_is_asked_of_the_nearest_parent_that_exists() {
        let dir = tempfile::tempdir().expect("temp dir");
        assert_eq!(existing_part(&dir.path().join("not/yet/made")), dir.path());
        assert_eq!(existing_part(Path::new("relative/not/made")), Path::new("."));
        assert!(free_disk(Path::new("relative/not/made")).expect("an answer") > 0);
    }

    #[test]
    fn families_of_distributions() {
        let ubuntu = parse_os_release("PRETTY_NAME=\"Ubuntu 24.04.1 LTS\"\nID=ubuntu\nID_LIKE=debian\n");
        assert_eq!(ubuntu, Os { name: "Ubuntu 24.04.1 LTS".into(), debian: true });
        assert!(parse_os_release("ID=debian\n").debian);
        assert!(parse_os_release("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n").debian);
        assert!(!parse_os_release("NAME=\"Fedora Linux\"\nID=fedora\n").debian);
        assert_eq!(parse_os_release("").name, "an unknown Linux");
    }
}
