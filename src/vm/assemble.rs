//! From what a scenario needs and what an image offers to a machine that can be started.
//!
//! Owns the files a machine writes to: blank disks, overlays, the UEFI variable store, the
//! cloud-init seed. They live in the machine's own directory and die with it. `plan` decides and
//! touches nothing; `Plan::make` makes the files.

use super::accel;
use super::needs::{Bus, Firmware, Medium, Needs};
use super::spec::{Attach, Drive, DriveFormat, KernelBoot, MachineSpec, Memory};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::firmware;
use crate::image::{Image, ImageFormat, KeyEntry, prebuilt};
use crate::process;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
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

/// A machine that is decided, and the files that it still lacks.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) spec: MachineSpec,
    files: Vec<Own>,
}

/// A file of the machine's own, in its directory.
#[derive(Clone, Debug)]
struct Own {
    name: String,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// So many bytes that read as zeros.
    Blank(u64),
    /// A copy.
    Copy(PathBuf),
    /// Writes go here, reads of the rest to the base.
    Overlay(PathBuf, DriveFormat),
    /// A cloud-init seed with this key.
    Seed(String),
}

/// Decides a machine whose files are in `dir`.
///
/// `key` is the public key line that shall open root's account, where the image takes it at boot.
///
/// # Errors
/// A host [`Fault`] when the host lacks a part, and when the image does not boot the way that
/// `needs` asks for.
pub(crate) fn plan(
    name: &str,
    needs: &Needs,
    image: &Image,
    host: &HostParts,
    key: &str,
    dir: &Path,
) -> Result<Plan> {
    let mut plan = Plan {
        spec: MachineSpec {
            name: name.to_owned(),
            qemu: host.qemu.clone(),
            accelerator: host.accelerator,
            memory_mib: needs.memory_mib,
            memory: Memory::Own,
            cpus: needs.cpus,
            uefi: None,
            kernel: None,
            drives: Vec::new(),
            credentials: Vec::new(),
            mac: MAC,
            incoming: false,
        },
        files: Vec::new(),
    };
    plan.firmware(needs, image, dir)?;
    let medium = medium(needs, image)?;
    if let (Medium::Kernel, Some(files)) = (medium, &image.kernel) {
        plan.spec.kernel = Some(KernelBoot {
            kernel: files.kernel.clone(),
            initrd: files.initrd.clone(),
            cmdline: files.cmdline.clone(),
        });
    }
    plan.image(medium, image, dir);
    for (index, need) in needs.disks.iter().enumerate() {
        let file = plan.own(dir, format!("disk{index}.raw"), Content::Blank(need.bytes));
        plan.spec.drives.push(Drive {
            file,
            format: DriveFormat::Raw,
            attach: Attach::Disk(need.bus),
            serial: format!("disk{index}"),
            read_only: false,
            boot: false,
        });
    }
    match image.key {
        KeyEntry::Smbios => {
            plan.spec.credentials.push(("ssh.authorized_keys.root".into(), key.as_bytes().to_vec()));
        }
        KeyEntry::Nocloud => {
            let file = plan.own(dir, "seed.iso".into(), Content::Seed(key.to_owned()));
            plan.spec.drives.push(Drive {
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
    Ok(plan)
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

impl Plan {
    fn own(&mut self, dir: &Path, name: String, content: Content) -> PathBuf {
        let path = dir.join(&name);
        self.files.push(Own { name, content });
        path
    }

    fn firmware(&mut self, needs: &Needs, image: &Image, dir: &Path) -> Result<()> {
        if !image.firmware.contains(&needs.firmware) {
            return Err(Fault::host(format!(
                "image `{}` does not boot under {}",
                image.name, needs.firmware
            ))
            .fix("change the scenario's `firmware`, or `firmware` in the image's settings")
            .into());
        }
        if needs.firmware == Firmware::Uefi {
            let firmware::Ovmf { code, vars: template } = firmware::require()?;
            let path = self.own(dir, "uefi-vars.fd".into(), Content::Copy(template.path));
            let vars = firmware::Flash { path, format: template.format };
            self.spec.uefi = Some(firmware::Ovmf { code, vars });
        }
        Ok(())
    }

    fn image(&mut self, medium: Medium, image: &Image, dir: &Path) {
        let (attach, boot) = match medium {
            Medium::Kernel => (Attach::Cdrom, false),
            Medium::Cdrom => (Attach::Cdrom, true),
            Medium::Disk => (Attach::Disk(Bus::Virtio), true),
        };
        let (file, format, read_only) = if image.format == ImageFormat::Iso {
            (image.file.clone(), DriveFormat::Raw, true)
        } else {
            let format =
                if image.format == ImageFormat::Qcow2 { DriveFormat::Qcow2 } else { DriveFormat::Raw };
            let content = Content::Overlay(image.file.clone(), format);
            (self.own(dir, "image.qcow2".into(), content), DriveFormat::Qcow2, false)
        };
        self.spec.drives.push(Drive { file, format, attach, serial: "image".into(), read_only, boot });
    }

    /// Makes the files in `dir`.
    ///
    /// # Errors
    /// A host [`Fault`] that names the file.
    pub(crate) fn make(&self, dir: &Path, host: &HostParts, deadline: &Deadline) -> Result<()> {
        for Own { name, content } in &self.files {
            let path = dir.join(name);
            match content {
                Content::Blank(bytes) => blank(&path, *bytes)?,
                Content::Copy(from) => copy(from, &path)?,
                Content::Overlay(base, format) => overlay(base, *format, &path, host, deadline)?,
                Content::Seed(key) => prebuilt::nocloud_seed(key, &path, deadline)?,
            }
        }
        Ok(())
    }

    /// Copies the files of a machine that stands still from `from` to `dir`.
    ///
    /// # Errors
    /// A host [`Fault`] that names the file.
    pub(crate) fn copy_files(&self, from: &Path, dir: &Path, deadline: &Deadline) -> Result<()> {
        for Own { name, .. } in &self.files {
            let mut command = Command::new("cp");
            // Holes stay holes, and where the file system can share blocks nothing is copied at all.
            command.args(["--reflink=auto", "--sparse=always"]).arg(from.join(name)).arg(dir);
            process::output(command, deadline)
                .with_context(|| Fault::host(format!("cannot copy {name} of a machine")))?;
        }
        Ok(())
    }

    /// Makes the files in `dir` as a machine left them in `origin`: what it wrote stays below, and
    /// cannot be changed from here. `overlays` names those of them that are overlays.
    ///
    /// # Errors
    /// A host [`Fault`] that names the file.
    pub(crate) fn make_from(
        &mut self,
        origin: &Path,
        overlays: &[String],
        dir: &Path,
        host: &HostParts,
        deadline: &Deadline,
    ) -> Result<()> {
        for Own { name, content } in &self.files {
            let (path, left) = (dir.join(name), origin.join(name));
            let below = match content {
                Content::Blank(bytes) if is_untouched(&left)? => {
                    blank(&path, *bytes)?;
                    continue;
                }
                Content::Blank(_) | Content::Overlay(..) if overlays.contains(name) => DriveFormat::Qcow2,
                Content::Blank(_) | Content::Overlay(..) => DriveFormat::Raw,
                Content::Copy(_) | Content::Seed(_) => {
                    copy(&left, &path)?;
                    continue;
                }
            };
            overlay(&left, below, &path, host, deadline)?;
            let drive = self.spec.drives.iter_mut().find(|drive| drive.file == path);
            if let Some(drive) = drive {
                drive.format = DriveFormat::Qcow2;
            }
        }
        Ok(())
    }
}

/// A sparse file to which nothing was ever written: a new one is the same, and cheaper than an overlay.
fn is_untouched(file: &Path) -> Result<bool> {
    let blocks =
        file.metadata().with_context(|| Fault::host(format!("cannot look at {}", file.display())))?;
    Ok(blocks.blocks() == 0)
}

/// A sparse file that reads as zeros.
fn blank(file: &Path, bytes: u64) -> Result<()> {
    File::create_new(file)
        .and_then(|f| f.set_len(bytes))
        .with_context(|| Fault::host(format!("cannot make a disk of {bytes} bytes at {}", file.display())))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to)
        .map(drop)
        .with_context(|| Fault::host(format!("cannot copy {} to {}", from.display(), to.display())))
}

/// Writes go to `file`; `base` stays as it is.
fn overlay(
    base: &Path,
    format: DriveFormat,
    file: &Path,
    host: &HostParts,
    deadline: &Deadline,
) -> Result<()> {
    let format = format.as_str();
    let mut command = Command::new(&host.qemu_img);
    command.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).arg(base).arg(file);
    process::output(command, deadline)
        .with_context(|| Fault::host(format!("cannot make an overlay of {}", base.display())))?;
    Ok(())
}
