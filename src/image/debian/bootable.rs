//! Boot loaders and the hybrid ISO: one file that BIOS and UEFI boot from CD-ROM, disk and USB.
//!
//! GRUB is made here of the host's modules (`grub-mkimage`), with a script inside that finds the
//! image by the name of a file that only it has.

use super::{SOURCE_DATE_EPOCH, files};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::tools;
use crate::process;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const BIOS_DIR: &str = "/usr/lib/grub/i386-pc";
const MODULES: [&str; 11] = [
    "iso9660",
    "search",
    "search_fs_file",
    "configfile",
    "normal",
    "echo",
    "linux",
    "serial",
    "terminal",
    "part_gpt",
    "part_msdos",
];
/// xorriso tells its progress every second.
const STALL: Duration = Duration::from_secs(120);

/// What becomes of the boot loaders, below the ISO's directory tree and beside it.
pub(super) struct Loaders {
    efi_partition: PathBuf,
}

/// Makes the boot loaders of image `id` below `tree`.
///
/// # Errors
/// A host [`Fault`] that names the tool that failed.
pub(super) fn loaders(
    id: &str,
    cmdline: &str,
    tree: &Path,
    scratch: &Path,
    deadline: &Deadline,
) -> Result<Loaders> {
    let boot = tree.join("boot/grub");
    let early = scratch.join("early.cfg");
    fs::create_dir_all(&boot)
        .and_then(|()| fs::write(&early, fill(files::EARLY_CFG, id, cmdline)))
        .and_then(|()| fs::write(boot.join("grub.cfg"), fill(files::GRUB_CFG, id, cmdline)))
        .with_context(|| Fault::host(format!("cannot write to {}", tree.display())))?;
    let mkimage = |platform: &str, out: &Path, more: &str| -> Result<()> {
        let mut command = Command::new(tools::require("grub-mkimage")?);
        command.args(["-O", platform, "-p", "/boot/grub", "-c"]).arg(&early).arg("-o").arg(out);
        command.args(MODULES).arg(more);
        process::output(command, deadline).with_context(|| {
            Fault::host(format!("cannot make GRUB for {platform}")).fix("shakedown doctor --install")
        })?;
        Ok(())
    };
    let core = scratch.join("core.img");
    mkimage("i386-pc", &core, "biosdisk")?;
    concatenate(&[&Path::new(BIOS_DIR).join("cdboot.img"), &core], &boot.join("bios.img"))?;
    let efi = scratch.join("bootx64.efi");
    mkimage("x86_64-efi", &efi, "fat")?;
    let efi_partition = scratch.join("efi.img");
    efi_system_partition(&efi, &efi_partition, deadline)?;
    Ok(Loaders { efi_partition })
}

fn fill(template: &str, id: &str, cmdline: &str) -> String {
    template.replace("@ID@", id).replace("@CMDLINE@", cmdline)
}

fn concatenate(parts: &[&Path], out: &Path) -> Result<()> {
    let mut file =
        File::create(out).with_context(|| Fault::host(format!("cannot write {}", out.display())))?;
    for part in parts {
        File::open(part).and_then(|mut part| std::io::copy(&mut part, &mut file)).with_context(|| {
            Fault::host(format!("cannot copy {}", part.display())).fix("shakedown doctor --install")
        })?;
    }
    Ok(())
}

/// A FAT file system with the one file that firmware looks for on removable media.
fn efi_system_partition(loader: &Path, out: &Path, deadline: &Deadline) -> Result<()> {
    const FLOPPY: u64 = 1440 * 1024;
    let size = loader.metadata().map_or(0, |meta| meta.len());
    if size + (32 << 10) > FLOPPY {
        return Err(
            Fault::host(format!("GRUB for UEFI has {size} bytes, which do not fit on 1.44 MB")).into()
        );
    }
    File::create(out)
        .and_then(|file| file.set_len(FLOPPY))
        .with_context(|| Fault::host(format!("cannot write {}", out.display())))?;
    tools::require("mformat")?;
    let mtool = |name: &str, args: &[&str]| -> Result<()> {
        let mut command = Command::new(name);
        command.arg("-i").arg(out).args(args);
        process::output(command, deadline).map(drop)
    };
    // A fixed serial number, so that equal builds give equal files.
    mtool("mformat", &["-f", "1440", "-N", "53484b44", "::"])?;
    mtool("mmd", &["::EFI", "::EFI/BOOT"])?;
    let loader = loader.to_string_lossy();
    mtool("mcopy", &[&loader, "::EFI/BOOT/BOOTX64.EFI"])
}

/// Writes the ISO of `tree` to `out`.
///
/// # Errors
/// A host [`Fault`] with xorriso's last lines.
pub(super) fn iso(tree: &Path, loaders: &Loaders, out: &Path, log: &Path, deadline: &Deadline) -> Result<()> {
    let time = jiff::Timestamp::from_second(i64::try_from(SOURCE_DATE_EPOCH).unwrap_or(0))
        .map(|time| time.strftime("%Y%m%d%H%M%S00").to_string())
        .context("the fixed time is valid")?;
    let mut command = Command::new(tools::require("xorriso")?);
    command
        .args(["-as", "mkisofs", "-o"])
        .arg(out)
        .args(["-V", "SHAKEDOWN", "-R", "-J"])
        .arg(format!("--modification-date={time}"))
        // BIOS: El Torito from CD-ROM, an MBR that finds the same file from disk.
        .args([
            "-b",
            "boot/grub/bios.img",
            "-no-emul-boot",
            "-boot-load-size",
            "4",
            "-boot-info-table",
            "--grub2-boot-info",
        ])
        .args(["--grub2-mbr", &format!("{BIOS_DIR}/boot_hybrid.img")])
        // UEFI: one FAT file system, both a partition and an El Torito entry.
        .args(["-append_partition", "2", "0xef"])
        .arg(&loaders.efi_partition)
        .args([
            "-appended_part_as_gpt",
            "-eltorito-alt-boot",
            "-e",
            "--interval:appended_partition_2:all::",
            "-no-emul-boot",
        ])
        .arg(tree);
    command.env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH.to_string());
    process::stream(command, log, STALL, deadline, |_| {})
}
