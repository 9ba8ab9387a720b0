//! A machine, fully decided, and the QEMU command line that is it.
//!
//! Owns the translation from typed parts to `argv`. Starts nothing and creates no file.

use super::accel;
use super::needs::Bus;
use crate::host::firmware::Ovmf;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

/// Where QEMU finds the connected sockets that we hand it.
pub(crate) const SERIAL_FD: RawFd = 10;
pub(crate) const QMP_FD: RawFd = 11;
pub(crate) const AGENT_FD: RawFd = 12;

/// Everything QEMU is told about a machine.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Shown in process lists and in the guest's DMI data.
    pub name: String,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// What executes guest code.
    pub accelerator: accel::Kind,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Where that memory is.
    pub memory: Memory,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The two flash chips of a UEFI machine, the variables its own; BIOS when absent.
    pub uefi: Option<Ovmf>,
    /// Kernel and initramfs for a boot without boot loader.
    pub kernel: Option<KernelBoot>,
    /// Media and disks in the order in which the guest should name them.
    pub drives: Vec<Drive>,
    /// systemd credentials for the guest, by name; they travel by SMBIOS.
    pub credentials: Vec<(String, Vec<u8>)>,
    /// The guest's only network card.
    pub mac: [u8; 6],
    /// It continues from a saved state instead of being powered on.
    pub incoming: bool,
}

/// Where a machine's memory is.
#[derive(Clone, Debug)]
pub enum Memory {
    /// QEMU's own, gone with it.
    Own,
    /// A file that stays: of a machine that shall be frozen.
    Shared(PathBuf),
    /// The same file, copy-on-write: of a fork. What it does not write it shares with all others.
    Private(PathBuf),
}

/// A kernel that QEMU loads itself.
#[derive(Clone, Debug)]
pub struct KernelBoot {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The kernel command line.
    pub cmdline: String,
}

/// What a drive's file contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DriveFormat {
    /// Bytes as they are; ISO files too.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl DriveFormat {
    /// As QEMU writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How a drive shows in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// A CD-ROM drive on AHCI: `sr0`.
    Cdrom,
    /// A disk.
    Disk(Bus),
}

/// One drive and its medium.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The file.
    pub file: PathBuf,
    /// How to read the file.
    pub format: DriveFormat,
    /// What the guest sees.
    pub attach: Attach,
    /// Serial number that the guest sees.
    pub serial: String,
    /// The guest cannot write. CD-ROMs always are.
    pub read_only: bool,
    /// Firmware boots from it.
    pub boot: bool,
}

impl MachineSpec {
    /// The command line, program first.
    pub fn argv(&self) -> Vec<OsString> {
        let mut a = Argv(vec![self.qemu.clone().into()]);
        a.flag("-nodefaults").flag("-no-user-config");
        a.opt("-name", format!("{0},process={0}", self.name));
        a.opt("-display", "none");
        a.opt("-machine", self.machine());
        a.opt("-accel", self.accelerator.as_str());
        a.opt("-cpu", self.accelerator.cpu());
        a.opt("-smp", self.cpus.to_string());
        a.opt("-m", format!("{}M", self.memory_mib));
        if let Some((file, share)) = match &self.memory {
            Memory::Own => None,
            Memory::Shared(file) => Some((file, "on")),
            Memory::Private(file) => Some((file, "off")),
        } {
            let (size, file) = (self.memory_mib, comma(file));
            a.opt(
                "-object",
                format!("memory-backend-file,id=ram,size={size}M,share={share},mem-path={file}"),
            );
        }
        if self.incoming {
            a.opt("-incoming", "defer");
        }
        self.firmware(&mut a);
        if let Some(boot) = &self.kernel {
            a.opt("-kernel", &boot.kernel).opt("-initrd", &boot.initrd).opt("-append", &boot.cmdline);
        }
        Self::channels(&mut a);
        self.devices(&mut a);
        let mut ahci_port = 0;
        for (index, drive) in self.drives.iter().enumerate() {
            drive.argv(index, &mut ahci_port, &mut a);
        }
        for (name, value) in &self.credentials {
            let value = BASE64.encode(value);
            a.opt("-smbios", format!("type=11,value=io.systemd.credential.binary:{name}={value}"));
        }
        a.0
    }

    /// The names of the drives' files that are overlays. Never asked of the files themselves: what is
    /// in a raw disk is the guest's to write, a qcow2 header that names a file of the host included.
    pub(super) fn overlays(&self) -> Vec<String> {
        let overlays = self.drives.iter().filter(|drive| drive.format == DriveFormat::Qcow2);
        overlays.filter_map(|drive| Some(drive.file.file_name()?.to_string_lossy().into_owned())).collect()
    }

    /// The command line as one would type it.
    pub fn command_line(&self) -> String {
        let words: Vec<_> = self.argv().iter().map(|w| crate::process::quote(&w.to_string_lossy())).collect();
        words.join(" ")
    }

    fn machine(&self) -> String {
        // No PS/2-over-VMware port; HPET costs timer exits and Linux has better clocks.
        let mut machine = String::from("q35,vmport=off,hpet=off");
        if !matches!(self.memory, Memory::Own) {
            machine.push_str(",memory-backend=ram");
        }
        if self.uefi.is_some() {
            machine.push_str(",pflash0=uefi-code,pflash1=uefi-vars");
        }
        machine
    }

    fn firmware(&self, a: &mut Argv) {
        let Some(uefi) = &self.uefi else { return };
        for (node, flash, read_only) in [("uefi-code", &uefi.code, "on"), ("uefi-vars", &uefi.vars, "off")] {
            let (format, file) = (flash.format.as_str(), comma(&flash.path));
            let file = format!("file.driver=file,file.filename={file}");
            a.opt("-blockdev", format!("driver={format},node-name={node},read-only={read_only},{file}"));
        }
    }

    /// Serial console, QMP and guest agent: sockets we are already connected to, so that there is
    /// no path to leak, no port to steal and no moment to wait for.
    fn channels(a: &mut Argv) {
        a.opt("-chardev", format!("socket,id=console,fd={SERIAL_FD}"));
        a.opt("-serial", "chardev:console");
        a.opt("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
        a.opt("-mon", "chardev=qmp,mode=control");
        a.opt("-device", "virtio-serial-pci");
        a.opt("-chardev", format!("socket,id=agent,fd={AGENT_FD}"));
        a.opt("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
    }

    fn devices(&self, a: &mut Argv) {
        // For screenshots; firmware and text consoles need one too.
        a.opt("-device", "VGA");
        a.opt("-device", "virtio-rng-pci");
        // Tells the guest that it is a copy, so that it reseeds its random pool.
        a.opt("-device", "vmgenid,guid=auto");
        // Port 0: the kernel chooses, QMP tells which; nobody can take it in between.
        a.opt("-netdev", "user,id=net0,hostfwd=tcp:127.0.0.1:0-:22");
        let mac = self.mac.map(|b| format!("{b:02x}")).join(":");
        // No option ROM: nothing here boots from the network, and loading it costs firmware time.
        a.opt("-device", format!("virtio-net-pci,netdev=net0,mac={mac},romfile="));
        if self.drives.iter().any(|d| d.boot) {
            a.opt("-boot", "menu=off,strict=on");
        }
    }
}

impl Drive {
    fn argv(&self, index: usize, ahci_port: &mut u8, a: &mut Argv) {
        let node = format!("drive{index}");
        let format = self.format.as_str();
        let read_only = if self.read_only || self.attach == Attach::Cdrom { "on" } else { "off" };
        // Unsafe caching: the files die with the machine, so the guest's flushes need not reach a disk.
        a.opt(
            "-blockdev",
            format!(
                "driver={format},node-name={node},read-only={read_only},discard=unmap,cache.no-flush=on,\
                 file.driver=file,file.cache.no-flush=on,file.discard=unmap,file.filename={}",
                comma(&self.file)
            ),
        );
        let boot = if self.boot { ",bootindex=0" } else { "" };
        let serial = &self.serial;
        let mut ahci = |kind| {
            let device = format!("{kind},bus=ide.{ahci_port}");
            *ahci_port += 1;
            device
        };
        // By default a machine stops without a word when the host's disk is full.
        let report = "werror=report";
        let device = match self.attach {
            Attach::Cdrom => ahci("ide-cd"),
            Attach::Disk(Bus::Ahci) => format!("{},{report}", ahci("ide-hd")),
            Attach::Disk(Bus::Virtio) => format!("virtio-blk-pci,{report}"),
            Attach::Disk(Bus::Nvme) => "nvme".to_owned(),
        };
        a.opt("-device", format!("{device},drive={node},serial={serial}{boot}"));
    }
}

struct Argv(Vec<OsString>);

impl Argv {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn opt(&mut self, flag: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(flag.into());
        self.0.push(value.into());
        self
    }
}

/// QEMU's option syntax doubles a comma that is part of a value.
fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::firmware::{Flash, Format};

    fn spec(drives: Vec<Drive>) -> MachineSpec {
        MachineSpec {
            name: "shakedown-test".into(),
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            accelerator: accel::Kind::Tcg,
            memory_mib: 1024,
            memory: Memory::Own,
            cpus: 2,
            uefi: None,
            kernel: None,
            drives,
            credentials: Vec::new(),
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            incoming: false,
        }
    }

    fn drive(attach: Attach) -> Drive {
        Drive {
            file: "/d/disk.img".into(),
            format: DriveFormat::Raw,
            attach,
            serial: "disk0".into(),
            read_only: false,
            boot: false,
        }
    }

    fn line(spec: &MachineSpec) -> String {
        spec.argv().iter().map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn no_default_device_and_only_loopback() {
        let line = line(&spec(Vec::new()));
        assert!(line.contains("-nodefaults") && line.contains("-no-user-config"));
        assert!(line.contains("hostfwd=tcp:127.0.0.1:0-:22"));
        assert!(!line.contains("fda") && !line.contains("pflash"));
    }

    #[test]
    fn ahci_devices_take_ports_of_their_own() {
        let drives = vec![
            drive(Attach::Cdrom),
            drive(Attach::Disk(Bus::Virtio)),
            drive(Attach::Disk(Bus::Ahci)),
            drive(Attach::Disk(Bus::Nvme)),
        ];
        let line = line(&spec(drives));
        assert!(line.contains("ide-cd,bus=ide.0,drive=drive0"), "{line}");
        assert!(line.contains("virtio-blk-pci,werror=report,drive=drive1"), "{line}");
        assert!(line.contains("ide-hd,bus=ide.1,werror=report,drive=drive2"), "{line}");
        assert!(line.contains("nvme,drive=drive3,serial=disk0"), "{line}");
    }

    #[test]
    fn a_cdrom_is_read_only_and_a_comma_in_a_path_is_not_an_option() {
        let mut cd = drive(Attach::Cdrom);
        cd.file = "/d/a,b.iso".into();
        cd.boot = true;
        let line = line(&spec(vec![cd]));
        assert!(line.contains("read-only=on"), "{line}");
        assert!(line.contains("file.filename=/d/a,,b.iso"), "{line}");
        assert!(line.contains("bootindex=0"), "{line}");
    }

    #[test]
    fn credentials_travel_as_base64_by_smbios() {
        let mut spec = spec(Vec::new());
        spec.credentials = vec![("ssh.authorized_keys.root".into(), b"ssh-ed25519 AAAA".to_vec())];
        let line = line(&spec);
        assert!(
            line.contains(
                "type=11,value=io.systemd.credential.binary:ssh.authorized_keys.root=c3NoLWVkMjU1MTkgQUFBQQ=="
            ),
            "{line}"
        );
    }

    #[test]
    fn a_fork_maps_the_memory_of_its_template_privately() {
        let mut spec = spec(Vec::new());
        spec.memory = Memory::Private("/t/ram".into());
        spec.incoming = true;
        let line = line(&spec);
        assert!(line.contains("memory-backend-file,id=ram,size=1024M,share=off,mem-path=/t/ram"), "{line}");
        assert!(line.contains(",memory-backend=ram") && line.contains("-incoming defer"), "{line}");
    }

    #[test]
    fn uefi_has_flash_and_bios_has_none() {
        let mut spec = spec(Vec::new());
        let flash = |path: &str| Flash { path: path.into(), format: Format::Raw };
        spec.uefi = Some(Ovmf { code: flash("/f/CODE.fd"), vars: flash("/s/VARS.fd") });
        let line = line(&spec);
        assert!(line.contains("pflash0=uefi-code,pflash1=uefi-vars"), "{line}");
        assert!(line.contains("node-name=uefi-vars,read-only=off"), "{line}");
    }
}
