//! What a scenario needs of its machine: the one declaration from which the VM is built.
//!
//! Plain constant data, so that `#[scenario]` can put it into a static.

/// A machine, as a scenario declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The image's name in the project's settings; `None` is the project's default image.
    pub image: Option<&'static str>,
    /// Cold, or a fork of a booted machine.
    pub boot: Boot,
    /// What the image is presented as.
    pub medium: Medium,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// Blank disks, in order; the first is `vda` where all are virtio.
    pub disks: &'static [DiskNeed],
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The name that it gets instead of its image's, before the scenario begins; see [`is_hostname`].
    pub hostname: Option<&'static str>,
    /// It gets a machine id of its own (machine-id(5)) instead of its image's or its template's.
    pub fresh_machine_id: bool,
    /// It may restart, as an installer does at its end. Any other machine that restarts has failed.
    pub reboots: bool,
}

/// How the machine gets to its running state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Boot {
    /// From a template when one can be had, which costs a fraction of a second.
    #[default]
    Fork,
    /// Power-on, firmware, boot loader, kernel: for scenarios that are about booting.
    Cold,
}

/// How the image meets the firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Medium {
    /// Kernel and initramfs are handed to QEMU where the image has them apart, else as `Cdrom` or
    /// `Disk`, by the image's format. The fastest.
    #[default]
    Kernel,
    /// The ISO in a CD-ROM drive.
    Cdrom,
    /// The image as the first disk.
    Disk,
}

/// Which firmware starts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF, with a variable store of the machine's own.
    Uefi,
}

impl std::fmt::Display for Firmware {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        })
    }
}

/// One blank disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskNeed {
    /// Size in bytes.
    pub bytes: u64,
    /// How it is attached.
    pub bus: Bus,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Bus {
    /// virtio-blk: `vda`, `vdb`, ...
    #[default]
    Virtio,
    /// NVMe: `nvme0n1`, ...
    Nvme,
    /// AHCI: `sda`, ...
    Ahci,
}

impl Needs {
    /// The default image, a fork, 1 GiB, two CPUs, no disks.
    pub const DEFAULT: Self = Self {
        image: None,
        boot: Boot::Fork,
        medium: Medium::Kernel,
        firmware: Firmware::Bios,
        disks: &[],
        memory_mib: 1024,
        cpus: 2,
        hostname: None,
        fresh_machine_id: false,
        reboots: false,
    };
}

/// Whether a machine can be called so: one label of RFC 1123, section 2.1.
pub fn is_hostname(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}
