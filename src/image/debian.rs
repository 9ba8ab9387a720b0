//! The `debian` recipe: from the host's apt sources to a bootable hybrid ISO, kernel and initramfs.
//!
//! Owns the order of the steps and what makes two builds differ. Each step is a file of its own:
//! [`apt`] asks, [`bootstrap`] installs, [`tree`] takes out what boots, [`initramfs`] and
//! [`bootable`] write it. Where the result lies is [`store`](super::store)'s.

mod apt;
mod bootable;
mod bootstrap;
mod files;
mod initramfs;
mod tree;

use super::digest;
use super::settings::Debian;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::{is_root, tools};
use crate::process;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use apt::{Sources, Vendor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// All files of an image have this time (2023-11-14), so that equal builds give equal files.
const SOURCE_DATE_EPOCH: u64 = 1_700_000_000;
/// The steps of a build are inputs too: a change of them must not find the images of before it.
const STEPS: [(&str, &str); 5] = [
    ("debian.rs", include_str!("debian.rs")),
    ("bootable.rs", include_str!("debian/bootable.rs")),
    ("bootstrap.rs", include_str!("debian/bootstrap.rs")),
    ("initramfs.rs", include_str!("debian/initramfs.rs")),
    ("tree.rs", include_str!("debian/tree.rs")),
];
const STALL: Duration = Duration::from_secs(120);

/// A build that is fully determined, but for what a mirror does meanwhile.
#[derive(Debug)]
pub(super) struct Plan {
    /// SHA-256 of all that goes in.
    pub(super) key: String,
    packages: Vec<String>,
    cmdline: String,
    own: Vec<OwnFile>,
}

/// What a build tells besides its files.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) kernel_release: String,
    /// Versions by package, as installed.
    pub(super) packages: BTreeMap<String, String>,
}

/// apt's answer, kept until apt's files change.
#[derive(Serialize, Deserialize)]
struct Resolved {
    vendor: Vendor,
    versions: Vec<String>,
}

impl Plan {
    /// Finds out what would be built; `cache` keeps apt's answers.
    ///
    /// # Errors
    /// A host [`Fault`] when apt cannot answer, or a file of the settings cannot be read.
    pub(super) fn new(settings: &Debian, cache: &Path, deadline: &Deadline) -> Result<Self> {
        if std::env::consts::ARCH != "x86_64" {
            return Err(Fault::host(format!(
                "the `debian` recipe builds on x86-64, and this is {}",
                std::env::consts::ARCH
            ))
            .fix("use a prebuilt image: SHAKEDOWN_IMAGE=FILE")
            .into());
        }
        let mut own = settings.files.as_deref().map(OwnFile::below).transpose()?.unwrap_or_default();
        own.extend(settings.programs.iter().map(|&(path, text)| OwnFile::program(path, text)));
        let resolved = resolve(&settings.packages, cache, deadline)?;
        let packages = packages(resolved.vendor, &settings.packages);
        let cmdline = [files::CMDLINE.trim(), settings.cmdline.trim()].join(" ").trim().to_owned();
        let key = key(&packages, &cmdline, &own, &resolved.versions);
        Ok(Self { key, packages, cmdline, own })
    }

    /// Ties kernel and initramfs to the ISO they were built with.
    fn id(&self) -> &str {
        &self.key[..16]
    }

    /// The kernel command line with which the image boots without its boot loader.
    pub(super) fn cmdline(&self) -> String {
        format!("shakedown.image={} {}", self.id(), self.cmdline)
    }

    /// Makes `image.iso`, `vmlinuz` and `initrd` in `dir`, which is empty and stays private to us.
    ///
    /// # Errors
    /// A host [`Fault`] that names the step, with the last lines of the tool that failed.
    pub(super) fn build(
        &self,
        dir: &Path,
        log: &Path,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Built> {
        // Found now and not after a minute.
        for tool in ["mmdebstrap", "sqfstar", "xorriso", "grub-mkimage", "mformat"] {
            tools::require(tool)?;
        }
        let work = dir.join("work");
        let iso_tree = work.join("iso");
        fs::create_dir_all(iso_tree.join("live"))
            .with_context(|| Fault::host(format!("cannot write to {}", dir.display())))?;
        let phase =
            |phase: &str| events.emit(Event::ImageBuildProgress { phase: phase.into(), percent: None });

        phase("preparing");
        let overlay = work.join("overlay.tar");
        tree::write_overlay(&overlay, &self.own)?;
        let sources = Sources::of_host(deadline)?;
        let transport = apt::transport_options(deadline)?;
        let root = bootstrap::Root {
            sources: &sources,
            transport: &transport,
            packages: &self.packages,
            overlay: &overlay,
        };
        let tar = work.join("root.tar");
        let temp = TempRoot::new(dir)?;
        bootstrap::bootstrap(&root, &tar, &work, temp.path(), log, deadline, events)?;

        phase("packing the root file system, making boot files");
        let (squashed, boot) = std::thread::scope(|scope| {
            let squash = scope.spawn(|| squash(&tar, &iso_tree.join("live/root.squashfs"), log, deadline));
            let boot = self.boot_files(&tar, dir, &iso_tree, deadline);
            (squash.join(), boot)
        });
        squashed.map_err(|_| anyhow::anyhow!("the packing thread panicked"))??;
        let (built, loaders) = boot?;
        phase("writing the ISO");
        fs::remove_file(&tar).with_context(|| Fault::host(format!("cannot remove {}", tar.display())))?;
        bootable::iso(&iso_tree, &loaders, &dir.join("image.iso"), log, deadline)?;
        fs::remove_dir_all(&work)
            .with_context(|| Fault::host(format!("cannot remove {}", work.display())))?;
        Ok(built)
    }

    fn boot_files(
        &self,
        tar: &Path,
        dir: &Path,
        iso_tree: &Path,
        deadline: &Deadline,
    ) -> Result<(Built, bootable::Loaders)> {
        let scratch = dir.join("work");
        let loaders = bootable::loaders(self.id(), &self.cmdline, iso_tree, &scratch, deadline)?;
        let tree = tree::Tree::read(tar)?;
        let dependencies = tree.dependencies(files::modules())?;
        let mut modules = tree.modules(tar, dependencies.keys())?;
        for (name, bytes) in &mut modules {
            *bytes = tree::uncompressed(name, std::mem::take(bytes), &scratch, deadline)?;
        }
        let (kernel, initrd) = (dir.join("vmlinuz"), dir.join("initrd"));
        fs::write(&kernel, &tree.kernel)
            .with_context(|| Fault::host(format!("cannot write {}", kernel.display())))?;
        initramfs::Initramfs {
            init: files::INIT,
            busybox: &tree.busybox,
            release: &tree.release,
            modules: &modules,
            dependencies: &dependencies,
        }
        .write(&initrd)?;
        let live = iso_tree.join("live");
        fs::hard_link(&kernel, live.join("vmlinuz"))
            .and_then(|()| fs::hard_link(&initrd, live.join("initrd")))
            .and_then(|()| fs::write(live.join(format!("{}.id", self.id())), self.id()))
            .with_context(|| Fault::host(format!("cannot write to {}", live.display())))?;
        Ok((Built { kernel_release: tree.release, packages: tree.packages }, loaders))
    }
}

fn packages(vendor: Vendor, own: &[String]) -> Vec<String> {
    let kernel = match vendor {
        Vendor::Debian => "linux-image-amd64",
        Vendor::Ubuntu => "linux-image-generic",
    };
    let mut packages: Vec<String> = files::packages()
        .map(|name| if name == "linux-image-amd64" { kernel } else { name }.to_owned())
        .chain(own.iter().cloned())
        .collect();
    packages.sort();
    packages.dedup();
    packages
}

fn key(packages: &[String], cmdline: &str, own: &[OwnFile], versions: &[String]) -> String {
    let mut hash = Sha256::new();
    // Each part with its length, so that no two inputs run into the same bytes.
    let mut part = |name: &str, text: &[u8]| {
        for bytes in [name.as_bytes(), text] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    };
    part("recipe", b"debian amd64");
    for (name, text) in STEPS.into_iter().chain(files::all()) {
        part(name, text.as_bytes());
    }
    part("packages", packages.join(" ").as_bytes());
    part("cmdline", cmdline.as_bytes());
    for file in own {
        part("file", file.identity().as_bytes());
    }
    part("versions", versions.join(" ").as_bytes());
    digest::hex(&hash.finalize())
}

fn resolve(own: &[String], cache: &Path, deadline: &Deadline) -> Result<Resolved> {
    let mut asked = Sha256::new();
    asked.update(apt::fingerprint());
    // The recipe's own names differ by vendor, which is not known yet: Debian's stand for them.
    asked.update(packages(Vendor::Debian, own).join(" "));
    let memory = cache.join(format!("{}.json", digest::hex(&asked.finalize())));
    if let Ok(text) = fs::read(&memory)
        && let Ok(known) = serde_json::from_slice(&text)
    {
        return Ok(known);
    }
    fs::create_dir_all(cache).with_context(|| Fault::host(format!("cannot make {}", cache.display())))?;
    let sources = Sources::of_host(deadline)?;
    let versions = apt::resolve(&sources, &packages(sources.vendor, own), cache, deadline)?;
    let resolved = Resolved { vendor: sources.vendor, versions };
    // Only a memory: a torn file is no JSON, and apt is asked again.
    if let Ok(text) = serde_json::to_vec(&resolved) {
        let _ = fs::write(&memory, text);
    }
    Ok(resolved)
}

fn squash(tar: &Path, out: &Path, log: &Path, deadline: &Deadline) -> Result<()> {
    let sqfstar = tools::require("sqfstar")?;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"tar=$1; shift; exec "$@" <"$tar""#, "sh"]).arg(tar).arg(sqfstar);
    // LZ4 is what an emulated CPU unpacks fastest. The boot loader has the kernel elsewhere.
    // The tar has no entry for the root directory itself.
    command.args(["-comp", "lz4", "-root-uid", "0", "-root-gid", "0", "-root-mode", "0755"]);
    command.args(["-no-progress", "-quiet"]).arg(out).arg("boot/vmlinuz*");
    process::stream(command, log, STALL, deadline, |_| {})
        .context(Fault::host("the root file system cannot be packed"))
}

/// A file of the project's own, to be laid over the root.
#[derive(Debug)]
struct OwnFile {
    /// Relative to the root directory.
    path: String,
    mode: u32,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    Link(PathBuf),
}

impl OwnFile {
    fn program(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), mode: 0o755, content: Content::Bytes(text.into()) }
    }

    /// All files and links below `dir`, sorted by path.
    fn below(dir: &Path) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        collect(dir, "", &mut found)
            .with_context(|| Fault::host(format!("cannot read the image's `files` in {}", dir.display())))?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    fn identity(&self) -> String {
        let content = match &self.content {
            Content::Bytes(bytes) => digest::hex(&Sha256::digest(bytes)),
            Content::Link(target) => format!("link {}", target.display()),
        };
        format!("{} {:o} {content}", self.path, self.mode)
    }

    fn append(&self, tar: &mut tar::Builder<impl io::Write>) -> io::Result<()> {
        match &self.content {
            Content::Bytes(bytes) => {
                let mut header = tree::header(tar::EntryType::Regular, self.mode, bytes.len() as u64);
                tar.append_data(&mut header, &self.path, &bytes[..])
            }
            Content::Link(target) => {
                tar.append_link(&mut tree::header(tar::EntryType::Symlink, self.mode, 0), &self.path, target)
            }
        }
    }
}

fn collect(dir: &Path, below: &str, found: &mut Vec<OwnFile>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().with_context(|| format!("{} is not UTF-8", entry.path().display()))?;
        let path = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&entry.path(), &path, found)?;
        } else if kind.is_symlink() {
            found.push(OwnFile { path, mode: 0o777, content: Content::Link(fs::read_link(entry.path())?) });
        } else if kind.is_file() {
            use std::os::unix::fs::PermissionsExt;
            let content =
                fs::read(entry.path()).with_context(|| format!("reading {}", entry.path().display()))?;
            // What a umask adds for the group must not change the image.
            let mode = entry.metadata()?.permissions().mode() & 0o755;
            found.push(OwnFile { path, mode, content: Content::Bytes(content) });
        } else {
            anyhow::bail!("{} is neither a file, a link nor a directory", entry.path().display());
        }
    }
    Ok(())
}

/// Where mmdebstrap unpacks. As root that is below the build's directory. An ordinary user's
/// namespace cannot enter the private cache, and owns what it leaves behind: then it is a directory
/// in `TMPDIR` that the build's directory has a link to, so that [`sweep`] finds it.
struct TempRoot {
    path: PathBuf,
    link: Option<PathBuf>,
}

const TEMP_LINK: &str = "unpacking-in";

impl TempRoot {
    fn new(dir: &Path) -> Result<Self> {
        if is_root() {
            let path = dir.join("work/root");
            fs::create_dir(&path).with_context(|| Fault::host(format!("cannot make {}", path.display())))?;
            return Ok(Self { path, link: None });
        }
        use std::os::unix::fs::PermissionsExt;
        let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let link = dir.join(TEMP_LINK);
        let path = base.join(format!("shakedown-build-{}", std::process::id()));
        std::os::unix::fs::symlink(&path, &link)
            .and_then(|()| fs::create_dir(&path))
            // The namespace's users must be able to pass.
            .and_then(|()| fs::set_permissions(&path, PermissionsExt::from_mode(0o755)))
            .with_context(|| Fault::host(format!("cannot make {}", path.display())))?;
        Ok(Self { path, link: Some(link) })
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempRoot {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            remove_temp_root(&self.path);
            let _ = fs::remove_file(link);
        }
    }
}

/// Clears what a build that was killed left outside of `dir`, its directory.
pub(super) fn sweep(dir: &Path) {
    if let Ok(path) = fs::read_link(dir.join(TEMP_LINK)) {
        remove_temp_root(&path);
    }
}

fn remove_temp_root(path: &Path) {
    // Refuses anything but a directory of ours, as the path came from a file.
    let ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("shakedown-build-"));
    if ours && fs::remove_dir_all(path).is_err() && path.exists() {
        let deadline = Deadline::after(STALL, "removal of a build's files");
        let mut command = Command::new("mmdebstrap");
        command.args(["--unshare-helper", "find"]).arg(path).args(["-mindepth", "1", "-delete"]);
        let _ = process::output(command, &deadline);
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn any_input_changes_the_key() {
        let file = |path: &str, mode, content: &[u8]| OwnFile {
            path: path.into(),
            mode,
            content: Content::Bytes(content.into()),
        };
        let link = OwnFile { path: "a".into(), mode: 0o777, content: Content::Link("b".into()) };
        let versions = strings(&["bash=5", "libc6=2.36"]);
        let mut keys = vec![
            key(&strings(&["bash"]), "quiet", &[], &versions),
            key(&strings(&["bash", "zsh"]), "quiet", &[], &versions),
            key(&strings(&["bash"]), "quiet a=1", &[], &versions),
            key(&strings(&["bash"]), "quiet", &[], &strings(&["bash=5", "libc6=2.37"])),
            key(&strings(&["bash"]), "quiet", &[file("a", 0o644, b"b")], &versions),
            key(&strings(&["bash"]), "quiet", &[file("a", 0o755, b"b")], &versions),
            key(&strings(&["bash"]), "quiet", &[file("a", 0o644, b"c")], &versions),
            key(&strings(&["bash"]), "quiet", &[file("b", 0o644, b"b")], &versions),
            key(&strings(&["bash"]), "quiet", &[link], &versions),
        ];
        assert_eq!(keys[0], key(&strings(&["bash"]), "quiet", &[], &versions), "nothing changed");
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }

    #[test]
    fn packages_are_a_set_and_the_kernel_is_the_vendor_s() {
        let own = |words: &[&str]| packages(Vendor::Debian, &strings(words));
        assert_eq!(own(&["zsh", "nvme-cli"]), own(&["nvme-cli", "zsh", "openssh-server"]));
        assert!(own(&[]).iter().any(|name| name == "linux-image-amd64"));
        let ubuntu = packages(Vendor::Ubuntu, &[]);
        assert!(ubuntu.iter().any(|name| name == "linux-image-generic"), "{ubuntu:?}");
        assert!(!ubuntu.iter().any(|name| name == "linux-image-amd64"), "{ubuntu:?}");
    }

    #[test]
    fn own_files_keep_their_mode_but_not_what_a_umask_adds() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temp dir");
        fs::create_dir_all(dir.path().join("etc/x")).expect("made");
        for (path, mode) in [("etc/x/run", 0o775), ("etc/secret", 0o600), ("etc/plain", 0o664)] {
            let path = dir.path().join(path);
            fs::write(&path, "text").expect("written");
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("set");
        }
        std::os::unix::fs::symlink("/run/x", dir.path().join("etc/link")).expect("made");
        let found: Vec<_> =
            OwnFile::below(dir.path()).expect("reads").iter().map(|f| (f.path.clone(), f.mode)).collect();
        let expected =
            [("etc/link", 0o777), ("etc/plain", 0o644), ("etc/secret", 0o600), ("etc/x/run", 0o755)];
        assert_eq!(found, expected.map(|(path, mode)| (path.to_owned(), mode)));
        let error = OwnFile::below(&dir.path().join("nowhere")).expect_err("is not there");
        assert!(format!("{error:#}").contains("nowhere"), "{error:#}");
    }
}
