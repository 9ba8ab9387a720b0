//! Something bootable, plus what is known about it.
//!
//! Owns recipes, prebuilt images and the content-addressed store. Does not boot anything.

mod debian;
pub(crate) mod digest;
mod settings;

use crate::vm::Firmware;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    pub login: Option<crate::console::LoginProfile>,
    /// How the SSH key gets in.
    pub key: KeyEntry,
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
/// TEMP
#[allow(missing_docs)]
pub mod prebuilt { pub fn nocloud_seed(_: &str, _: &std::path::Path, _: &crate::deadline::Deadline) -> anyhow::Result<()> { anyhow::bail!("x") } }
/// TEMP
#[allow(missing_docs)]
pub struct Images;
#[allow(missing_docs)]
impl Images {
    pub fn new(_: PathBuf, _: &crate::record::Environment, _: &Option<String>, _: &std::collections::BTreeMap<String, toml::Table>) -> anyhow::Result<Self> { Ok(Self) }
    pub fn get(&self, name: Option<&str>, _: &crate::deadline::Deadline, events: &crate::record::event::Events) -> anyhow::Result<Image> {
        events.emit(crate::record::event::Event::ImageReady { image: "x".into(), seconds: 0.0, cached: true });
        if name == Some("grub-rescue") {
            return Ok(Image { name: "grub-rescue".into(), recipe: None, digest: "x".into(), file: "/usr/lib/grub-rescue/grub-rescue-cdrom.iso".into(), format: ImageFormat::Iso, kernel: None, firmware: vec![Firmware::Bios], login: None, key: KeyEntry::None });
        }
        let d = PathBuf::from("/work/proto-image/out");
        let id = std::fs::read_to_string(d.join("id"))?;
        Ok(Image { name: "debian".into(), recipe: Some("debian".into()), digest: "x".into(), file: d.join("image.iso"), format: ImageFormat::Iso,
         kernel: Some(KernelFiles { kernel: d.join("vmlinuz"), initrd: d.join("initrd"), cmdline: format!("shakedown.image={} console=tty0 console=ttyS0,115200", id.trim()) }),
         firmware: vec![Firmware::Bios, Firmware::Uefi], login: Some(Default::default()), key: KeyEntry::Smbios })
    }
}
#[allow(missing_docs)]
impl Image {
    pub fn ssh_user(&self) -> &str { "root" }
    pub fn metadata(&self) -> crate::record::metadata::Image { crate::record::metadata::Image { name: self.name.clone(), recipe: self.recipe.clone(), digest: Some(self.digest.clone()) } }
    pub fn artifact(&self, key: &crate::connection::KeyPair) -> crate::record::metadata::Artifact { crate::record::metadata::Artifact { iso_path: self.file.clone(), store_path: None, deriver: None, nar_hash: None, root_key_fingerprint: Some(key.fingerprint()) } }
}
#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    #[ignore = "real"]
    fn real() {
        let cache = std::path::PathBuf::from(std::env::var("REAL").unwrap());
        let d = crate::deadline::Deadline::after(std::time::Duration::from_secs(600), "t");
        let t = std::time::Instant::now();
        let plan = debian::Plan::new(&settings::Debian::default(), &cache.join("resolved"), &d).unwrap();
        println!("key {} {:?}", plan.key, t.elapsed());
        let dir = cache.join("x");
        std::fs::create_dir_all(&dir).unwrap();
        struct O(std::time::Instant);
        impl crate::record::event::Observer for O { fn observe(&self, e: &crate::record::event::Event) { println!("{:?} {e:?}", self.0.elapsed()); } }
        let b = plan.build(&dir, &cache.join("log"), &d, &crate::record::event::Events::to(O(t)));
        match b { Ok(b) => println!("{} {}", b.kernel_release, b.packages.len()), Err(e) => println!("{e:?}") }
        std::fs::write(dir.join("id"), &plan.key[..16]).unwrap();
        println!("{:?} {}", t.elapsed(), plan.cmdline());
    }
}
