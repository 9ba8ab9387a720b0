//! Something bootable, plus what is known about it.
//!
//! Owns recipes, prebuilt images and the content-addressed store. Does not boot anything.

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
