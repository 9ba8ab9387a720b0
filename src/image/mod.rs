//! Something bootable, plus what is known about it.
//!
//! Owns recipes, prebuilt images and the content-addressed store; [`Images`] is the way in. Does
//! not boot anything.

mod debian;
pub(crate) mod digest;
pub mod iso;
mod nix;
pub mod prebuilt;
mod settings;
pub mod store;

pub use nix::Origin;

use crate::connection::KeyPair;
use crate::console::LoginProfile;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::record::event::{Event, Events};
use crate::record::{Environment, metadata};
use crate::vm::Firmware;
use crate::{host, nearest};
use anyhow::{Result, bail};
use once_cell::sync::OnceCell;
use prebuilt::Access;
use serde::{Deserialize, Serialize};
use settings::Source;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use store::{Entry, Kind, Store};
use toml::Table;

/// Uses this file in place of the project's default image.
pub const IMAGE_VARIABLE: &str = "SHAKEDOWN_IMAGE";
/// The images that every project has unless it gives their names another meaning; the first is the
/// default.
pub const BUILT_IN: [&str; 2] = ["debian", STORAGE];
/// The built-in image with the tools of [`crate::storage`]: LUKS, XFS, btrfs, bcache, thin pools.
pub const STORAGE: &str = "storage";
/// Root, its tar, its squashfs, the packages and the ISO, all at once for a moment.
const BUILD_BYTES: u64 = 1600 << 20;

/// A bootable image that is there, complete and checked.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name in the project's settings, or the file's name.
    pub name: String,
    /// How it was built; `None` for a prebuilt file.
    pub recipe: Option<String>,
    /// What identifies its content: `sha256:<hex>`.
    pub digest: String,
    /// The bootable file.
    pub file: PathBuf,
    /// What the file is.
    pub format: ImageFormat,
    /// For boots without boot loader.
    pub kernel: Option<KernelFiles>,
    /// Firmware under which it boots.
    pub firmware: Vec<Firmware>,
    /// How to get a root shell on its serial console.
    /// `None` where there is none: the machine is then handed out as soon as it is powered on.
    pub login: Option<LoginProfile>,
    /// How the SSH key gets in.
    pub key: KeyEntry,
    /// Of an image that a flake built.
    pub origin: Option<Origin>,
    /// Keeps it in the store for as long as this value or a clone of it lives.
    pub guard: Option<store::Guard>,
}

/// What an image's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// ISO 9660, possibly hybrid.
    Iso,
    /// A disk, byte for byte.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// Kernel and initramfs beside the image.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The kernel command line that finds the image.
    pub cmdline: String,
}

/// How the SSH key gets into the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyEntry {
    /// As the systemd credential `ssh.authorized_keys.root`, by SMBIOS: systemd 252 or later.
    #[default]
    Smbios,
    /// As a cloud-init NoCloud seed on a second CD-ROM.
    Nocloud,
    /// Typed on the console after login.
    Console,
    /// There is no SSH.
    None,
}

impl Image {
    /// The user whose account the SSH key opens.
    pub fn ssh_user(&self) -> &str {
        "root"
    }

    /// What a run's `metadata.json` says about the image.
    pub fn metadata(&self) -> metadata::Image {
        metadata::Image {
            name: self.name.clone(),
            recipe: self.recipe.clone(),
            digest: Some(self.digest.clone()),
        }
    }

    /// What a run's `metadata.json` says about its files, and about the key that opens it.
    pub fn artifact(&self, key: &KeyPair) -> metadata::Artifact {
        let own = || self.guard.as_ref().and_then(|_| self.file.parent()).map(Path::to_owned);
        let origin = self.origin.as_ref();
        metadata::Artifact {
            iso_path: self.file.clone(),
            store_path: origin.map(|origin| origin.store_path.clone()).or_else(own),
            deriver: origin.and_then(|origin| origin.deriver.clone()),
            nar_hash: origin.and_then(|origin| origin.nar_hash.clone()),
            root_key_fingerprint: (self.key != KeyEntry::None).then(|| key.fingerprint()),
        }
    }
}

/// What the manifest of an image that was built says, beyond what every manifest does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Built {
    /// The name of the recipe.
    pub recipe: String,
    /// `uname -r` of its kernel; empty where the recipe does not tell.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kernel_release: String,
    /// The kernel command line for a boot without boot loader, where that is possible.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Versions of the packages inside, as installed, where the recipe knows them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub packages: BTreeMap<String, String>,
    /// Of the `nix` recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

impl Kind for Built {
    const NAME: &'static str = "image";
    const DIGESTS: bool = true;

    fn started(name: &str, log: &Path) -> Event {
        Event::ImageBuildStarted { image: name.into(), log: log.display().to_string() }
    }

    fn ready(name: &str, seconds: f64, cached: bool) -> Event {
        Event::ImageReady { image: name.into(), seconds, cached }
    }
}

/// The images of a project.
#[derive(Clone, Debug)]
pub struct Images {
    cache: PathBuf,
    /// Opened when the first image of a recipe is asked for.
    store: OnceCell<Store<Built>>,
    project: PathBuf,
    default: String,
    /// In place of the default image.
    prebuilt: Option<PathBuf>,
    sources: BTreeMap<String, Source>,
    /// What flakes evaluated to: within a run they do not change.
    derivations: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Images {
    /// The images that `tables` describe, by name, and those that are built in. `default` is the one
    /// meant where none is named. Kept below `cache`, which is not looked at yet.
    ///
    /// # Errors
    /// A host [`Fault`] that names what is wrong in the settings.
    pub fn new(
        cache: PathBuf,
        environment: &Environment,
        default: &Option<String>,
        tables: &BTreeMap<String, Table>,
    ) -> Result<Self> {
        let built_in = [settings::Debian::default(), settings::Debian::storage()].map(Source::Debian);
        let mut sources: BTreeMap<_, _> = BUILT_IN.map(str::to_owned).into_iter().zip(built_in).collect();
        for (name, table) in tables {
            sources.insert(name.clone(), Source::read(name, table, &environment.project)?);
        }
        let default = default.clone().unwrap_or_else(|| BUILT_IN[0].into());
        let prebuilt = environment.overrides.get(IMAGE_VARIABLE).filter(|file| !file.is_empty());
        let images = Self {
            store: OnceCell::new(),
            cache,
            project: environment.project.clone(),
            prebuilt: prebuilt.map(|file| environment.project.join(file)),
            default,
            sources,
            derivations: Arc::default(),
        };
        images.check(None)?;
        Ok(images)
    }

    /// Whether there is an image of that name, or the default one.
    ///
    /// # Errors
    /// A host [`Fault`] with the nearest right name.
    pub fn check(&self, name: Option<&str>) -> Result<()> {
        self.source(name.unwrap_or(&self.default)).map(drop)
    }

    /// The store below `cache`, for its upkeep.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn store_in(cache: &Path) -> Result<Store<Built>> {
        Store::open(cache.join("images"), debian::sweep)
    }

    /// The names of all images.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sources.keys().map(String::as_str)
    }

    /// The image `name`, or the default one: from the store, built now, or from its file. A build
    /// that failed is not tried again in the same `run`; without one it always is.
    ///
    /// # Errors
    /// A host [`Fault`] that says which image, what is wrong and what to do.
    pub fn get(
        &self,
        name: Option<&str>,
        run: Option<&str>,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Image> {
        if let (None, Some(file)) = (name, &self.prebuilt) {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            return self.open(&name, file, &Table::new(), deadline, events).map_err(|error| {
                error.context(Fault::host(format!("{IMAGE_VARIABLE}={} is not usable", file.display())))
            });
        }
        let name = name.unwrap_or(&self.default);
        match self.source(name)? {
            Source::Debian(settings) => self.debian(name, settings, run, deadline, events),
            Source::Nix(settings) => self.nix(name, settings, run, deadline, events),
            Source::File { file, description } => self.open(name, file, description, deadline, events),
        }
    }

    fn source(&self, name: &str) -> Result<&Source> {
        match self.sources.get(name) {
            Some(source) => Ok(source),
            None => {
                let hint = nearest::hint(name, self.names());
                bail!(
                    Fault::host(format!("unknown image `{name}`{hint}")).fix(format!(
                        "describe it in Cargo.toml: [package.metadata.shakedown.images.{name}]"
                    ))
                )
            }
        }
    }

    fn open(
        &self,
        name: &str,
        file: &Path,
        table: &Table,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Image> {
        let started = Instant::now();
        let image = prebuilt::open(name, file, table, &self.project, &self.cache.join("digests"), deadline)?;
        let seconds = started.elapsed().as_secs_f64();
        events.emit(Event::ImageReady { image: name.into(), seconds, cached: true });
        Ok(image)
    }

    fn debian(
        &self,
        name: &str,
        settings: &settings::Debian,
        run: Option<&str>,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Image> {
        let plan = debian::Plan::new(settings, &self.cache.join("apt"), deadline)?;
        let entry = self.store()?.get(&plan.key, name, run, deadline, events, |dir, log| {
            let free = host::free_disk(dir)?;
            if free < BUILD_BYTES {
                bail!(Fault::host(format!("a build needs {} MiB, and {} has {}", BUILD_BYTES >> 20, dir.display(), free >> 20))
                    .fix("free some space (`shakedown image prune --older-than 0s`), or set SHAKEDOWN_CACHE to a place that has it"));
            }
            let built = plan.build(dir, log, deadline, events)?;
            check_built(&dir.join(ISO))?;
            Ok(Built {
                recipe: "debian".into(),
                kernel_release: built.kernel_release,
                cmdline: plan.cmdline(),
                packages: built.packages,
                origin: None,
            })
        })?;
        let access = Access {
            firmware: vec![Firmware::Bios, Firmware::Uefi],
            login: Some(LoginProfile::default()),
            key: KeyEntry::Smbios,
        };
        Ok(from_store(name, entry, access))
    }

    fn nix(
        &self,
        name: &str,
        settings: &settings::Nix,
        run: Option<&str>,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Image> {
        let plan = nix::Plan::new(settings, self.derivation(settings, deadline)?)?;
        let access = |iso: &Path| prebuilt::access(iso, &settings.description, &self.project);
        let entry = self.store()?.get(&plan.key, name, run, deadline, events, |dir, log| {
            let iso = dir.join(ISO);
            let origin = plan.build(&iso, log, deadline, events)?;
            access(&iso)?;
            Ok(Built { recipe: "nix".into(), origin: Some(origin), ..Built::default() })
        })?;
        let access = access(&entry.dir.join(ISO))?;
        Ok(from_store(name, entry, access))
    }

    /// Scenarios that want the same image at once wait for one evaluation.
    fn derivation(&self, settings: &settings::Nix, deadline: &Deadline) -> Result<String> {
        let mut known = self.derivations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(derivation) = known.get(&settings.installable()) {
            return Ok(derivation.clone());
        }
        let derivation = nix::evaluate(settings, deadline)?;
        known.insert(settings.installable(), derivation.clone());
        Ok(derivation)
    }

    fn store(&self) -> Result<&Store<Built>> {
        self.store.get_or_try_init(|| Self::store_in(&self.cache))
    }
}

const ISO: &str = "image.iso";
const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initrd";

fn from_store(name: &str, entry: Entry<Built>, access: Access) -> Image {
    let Entry { dir, manifest, guard } = entry;
    let Access { firmware, login, key } = access;
    let kernel = manifest.files.contains_key(KERNEL).then(|| KernelFiles {
        kernel: dir.join(KERNEL),
        initrd: dir.join(INITRD),
        cmdline: manifest.facts.cmdline,
    });
    let digest = manifest.files.get(ISO).and_then(|file| file.sha256.as_deref()).unwrap_or_default();
    Image {
        name: name.to_owned(),
        recipe: Some(manifest.facts.recipe),
        digest: format!("sha256:{digest}"),
        file: dir.join(ISO),
        format: ImageFormat::Iso,
        kernel,
        firmware,
        login,
        key,
        origin: manifest.facts.origin,
        guard: Some(guard),
    }
}

/// Refuses an ISO of ours that could not boot, before it is published.
fn check_built(path: &Path) -> Result<()> {
    let broken = |what: String| Fault::host(format!("the finished image {} {what}", path.display()));
    let mut iso = iso::Iso::open(path)?;
    let entries = iso.boot_entries()?;
    for platform in [iso::Platform::Bios, iso::Platform::Efi] {
        if !entries.iter().any(|entry| entry.platform == platform) {
            bail!(broken(format!("has no El Torito entry for {platform:?}")));
        }
    }
    for file in ["live/vmlinuz", "live/initrd", "live/root.squashfs"] {
        if iso.find(file)?.is_none_or(|extent| extent.bytes == 0) {
            bail!(broken(format!("has no {file}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn images(
        default: Option<&str>,
        tables: &str,
        variables: &[(&str, &str)],
    ) -> Result<(tempfile::TempDir, Images)> {
        let project = tempfile::tempdir().expect("temp dir");
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
        let environment = Environment::from_vars(variables, project.path()).expect("reads");
        let tables = toml::from_str(tables).expect("TOML");
        let images =
            Images::new(project.path().join("cache"), &environment, &default.map(Into::into), &tables)?;
        Ok((project, images))
    }

    fn get(images: &Images, name: Option<&str>) -> Result<Image> {
        images.get(name, None, &Deadline::after(Duration::from_secs(60), "test"), &Events::silent())
    }

    #[test]
    fn an_unknown_image_has_the_nearest_name() {
        let (_project, images) = images(None, "vendor.file = 'x.iso'", &[]).expect("right");
        let text = format!("{:#}", get(&images, Some("vednor")).expect_err("unknown"));
        assert!(text.contains("did you mean `vendor`?") && text.contains("images.vednor"), "{text}");
        assert_eq!(images.names().collect::<Vec<_>>(), ["debian", "storage", "vendor"]);
    }

    #[test]
    fn a_default_that_does_not_exist_is_refused_at_once() {
        let text = format!("{:#}", images(Some("mine"), "", &[]).expect_err("unknown"));
        assert!(text.contains("unknown image `mine`"), "{text}");
    }

    #[test]
    fn the_variable_replaces_the_default_image_only() {
        let (project, images) =
            images(None, "other.file = 'other.img'", &[(IMAGE_VARIABLE, "own.img")]).expect("right");
        let text = format!("{:#}", get(&images, None).expect_err("is not there"));
        assert!(text.contains("SHAKEDOWN_IMAGE=") && text.contains("own.img"), "{text}");
        let mut disk = vec![0; 1024];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        for file in ["own.img", "other.img"] {
            std::fs::write(project.path().join(file), &disk).expect("written");
        }
        assert_eq!(get(&images, None).expect("is there now").name, "own.img");
        let other = get(&images, Some("other")).expect("is there too");
        assert_eq!((other.name.as_str(), other.format), ("other", ImageFormat::Raw));
    }
}
