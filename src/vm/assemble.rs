//! From what a scenario needs and what an image offers to a machine that can be started.
//!
//! Owns the files a machine writes to: blank disks, overlays, the UEFI variable store, the
//! cloud-init seed. They live in the machine's scratch directory and die with it.

use super::accel;
use super::needs::{Bus, Firmware, Medium, Needs};
use super::spec::{Attach, Drive, DriveFormat, KernelBoot, MachineSpec};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::firmware;
use crate::image::{Image, ImageFormat, KeyEntry};
use crate::process;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What of this host a machine is made with.
#[derive(Clone, Debug)]
pub struct HostParts {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// `qemu-img`, for overlays.
    pub qemu_img: PathBuf,
    /// What executes guest code.
    pub accelerator: accel::Kind,
}

/// QEMU's own default address, so that the guest sees what users of plain QEMU see.
const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// Makes the machine's files below `scratch` and says how to start it.
///
/// `key` is the public key line that shall open root's account, where the image takes it at boot.
///
/// # Errors
/// A host [`Fault`] when the host lacks a part or a file cannot be made, and when the image does
/// not boot the way that `needs` asks for.
pub fn assemble(
    name: &str,
    needs: &Needs,
    image: &Image,
    host: &HostParts,
    key: &str,
    scratch: &Path,
    deadline: &Deadline,
) -> Result<MachineSpec> {
    let mut spec = MachineSpec {
        name: name.to_owned(),
        qemu: host.qemu.clone(),
        accelerator: host.accelerator,
        memory_mib: needs.memory_mib,
        cpus: needs.cpus,
        uefi: uefi(needs, image, scratch)?,
        kernel: None,
        drives: Vec::new(),
        credentials: Vec::new(),
        mac: MAC,
    };
    let medium = medium(needs, image)?;
    if let (Medium::Kernel, Some(files)) = (medium, &image.kernel) {
        spec.kernel = Some(KernelBoot {
            kernel: files.kernel.clone(),
            initrd: files.initrd.clone(),
            cmdline: files.cmdline.clone(),
        });
    }
    spec.drives.push(image_drive(medium, image, host, scratch, deadline)?);
    for (index, need) in needs.disks.iter().enumerate() {
        let file = scratch.join(format!("disk{index}.raw"));
        blank(&file, need.bytes)?;
        spec.drives.push(Drive {
            file,
            format: DriveFormat::Raw,
            attach: Attach::Disk(need.bus),
            serial: format!("disk{index}"),
            read_only: false,
            boot: false,
        });
    }
    match image.key {
        KeyEntry::Smbios => spec.credentials.push(("ssh.authorized_keys.root".into(), key.as_bytes().to_vec())),
        KeyEntry::Nocloud => {
            let file = scratch.join("seed.iso");
            crate::image::prebuilt::nocloud_seed(key, &file, deadline)?;
            spec.drives.push(Drive {
                file,
                format: DriveFormat::Raw,
                attach: Attach::Cdrom,
                serial: "seed".into(),
                read_only: true,
                boot: false,
            });
        }
        KeyEntry::Console | KeyEntry::None => {}
    }
    Ok(spec)
}

fn medium(needs: &Needs, image: &Image) -> Result<Medium> {
    let whole = if image.format == ImageFormat::Iso { Medium::Cdrom } else { Medium::Disk };
    match needs.medium {
        // Firmware that was asked for by name must run; QEMU's own loader would bypass OVMF's boot manager.
        Medium::Kernel if image.kernel.is_none() || needs.firmware == Firmware::Uefi => Ok(whole),
        Medium::Cdrom if image.format != ImageFormat::Iso => Err(Fault::host(format!(
            "image `{}` is a disk image ({}) and cannot be put into a CD-ROM drive",
            image.name,
            image.file.display()
        ))
        .fix("ask for `medium = disk`, or use an ISO")
        .into()),
        asked => Ok(asked),
    }
}

fn uefi(needs: &Needs, image: &Image, scratch: &Path) -> Result<Option<firmware::Ovmf>> {
    if !image.firmware.contains(&needs.firmware) {
        return Err(Fault::host(format!("image `{}` does not boot under {:?}", image.name, needs.firmware))
            .fix("change the scenario's `firmware`, or `firmware` in the image's settings")
            .into());
    }
    if needs.firmware == Firmware::Bios {
        return Ok(None);
    }
    let firmware::Ovmf { code, vars: template } = firmware::require()?;
    let path = scratch.join("uefi-vars.fd");
    std::fs::copy(&template.path, &path)
        .with_context(|| Fault::host(format!("cannot copy {} to {}", template.path.display(), path.display())))?;
    Ok(Some(firmware::Ovmf { code, vars: firmware::Flash { path, format: template.format } }))
}

fn image_drive(
    medium: Medium,
    image: &Image,
    host: &HostParts,
    scratch: &Path,
    deadline: &Deadline,
) -> Result<Drive> {
    let (attach, boot) = match medium {
        Medium::Kernel => (Attach::Cdrom, false),
        Medium::Cdrom => (Attach::Cdrom, true),
        Medium::Disk => (Attach::Disk(Bus::Virtio), true),
    };
    let serial = "image".to_owned();
    if image.format == ImageFormat::Iso {
        return Ok(Drive { file: image.file.clone(), format: DriveFormat::Raw, attach, serial, read_only: true, boot });
    }
    let file = scratch.join("image.qcow2");
    overlay(&image.file, image.format, &file, host, deadline)?;
    Ok(Drive { file, format: DriveFormat::Qcow2, attach, serial, read_only: false, boot })
}

/// A sparse file that reads as zeros.
fn blank(file: &Path, bytes: u64) -> Result<()> {
    File::create_new(file)
        .and_then(|f| f.set_len(bytes))
        .with_context(|| Fault::host(format!("cannot make a disk of {bytes} bytes at {}", file.display())))
}

/// Writes go to `file`; `base` stays as it is.
fn overlay(base: &Path, format: ImageFormat, file: &Path, host: &HostParts, deadline: &Deadline) -> Result<()> {
    let format = if format == ImageFormat::Qcow2 { "qcow2" } else { "raw" };
    let mut command = Command::new(&host.qemu_img);
    command.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(base).arg(file);
    process::output(command, deadline)
        .with_context(|| Fault::host(format!("cannot make an overlay of {}", base.display())))?;
    Ok(())
}
