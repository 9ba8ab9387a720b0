//! The image boots by every firmware and from every medium, and lets root in.

use shakedown::prelude::*;

/// What a machine that came up properly answers.
fn is_up(vm: &mut Vm, firmware: &str) -> Result<()> {
    let mut ssh = vm.ssh()?;
    ensure!(ssh.run("id -un")?.trimmed() == "root", "SSH does not log in as root");
    let booted = if ssh.run(Cmd::new("test -d /sys/firmware/efi").allow_failure())?.success() {
        "uefi"
    } else {
        "bios"
    };
    ensure!(booted == firmware, "booted by {booted}, wanted {firmware}");
    // A unit may still be on its way when SSH answers.
    let state = ssh.run(Cmd::new("systemctl is-system-running --wait").allow_failure())?;
    let failed = ssh.run("systemctl list-units --failed --no-legend --plain")?;
    ensure!(state.trimmed() == "running", "the system is {}: {}", state.trimmed(), failed.text());
    Ok(())
}

#[scenario(markers = [vm, slow], boot = cold, medium = cdrom, timeout = "5m")]
fn iso_by_bios_from_cdrom(vm: &mut Vm) -> Result<()> {
    is_up(vm, "bios")
}

#[scenario(markers = [vm, slow], boot = cold, medium = cdrom, firmware = uefi, timeout = "5m")]
fn iso_by_uefi_from_cdrom(vm: &mut Vm) -> Result<()> {
    is_up(vm, "uefi")
}

#[scenario(markers = [vm, slow], boot = cold, medium = disk, firmware = uefi, timeout = "5m")]
fn iso_by_uefi_from_disk(vm: &mut Vm) -> Result<()> {
    is_up(vm, "uefi")
}

#[scenario(markers = [vm], boot = cold, timeout = "5m")]
fn kernel_without_boot_loader(vm: &mut Vm) -> Result<()> {
    is_up(vm, "bios")
}

#[scenario(markers = [vm], timeout = "5m")]
fn root_logs_in_on_the_serial_console_and_by_ssh(vm: &mut Vm) -> Result<()> {
    let user = vm.console()?.run("id -un")?;
    ensure!(user.trimmed() == "root", "the console says {:?}", user.text());
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let by_console = vm.console()?.run(boot)?.text().into_owned();
    let by_ssh = vm.ssh()?.run(boot)?.text().into_owned();
    ensure!(by_console == by_ssh, "console and SSH lead to different machines");
    Ok(())
}

#[scenario(markers = [vm], timeout = "5m")]
fn the_key_is_not_in_the_image(vm: &mut Vm) -> Result<()> {
    let keys = vm.ssh()?.run(
        "find /run/shakedown/image /lower /root/.ssh -xdev -name authorized_keys 2>/dev/null; mount -o ro -t squashfs -o loop \
         /run/shakedown/image/live/root.squashfs /mnt && find /mnt -name authorized_keys; ls /mnt/etc/ssh; umount /mnt",
    )?;
    let text = keys.text();
    ensure!(!text.contains("/mnt/") && !text.contains("ssh_host_"), "keys are baked into the image: {text}");
    Ok(())
}
