//! The NixOS image of `nix/`.

use shakedown::prelude::*;

#[scenario(
    markers = [vm, slow],
    image = "nixos",
    boot = cold,
    medium = cdrom,
    memory = "2G",
    timeout = "20m",
    ignore = "builds NixOS, which takes nixpkgs from the network and half an hour"
)]
fn nixos_lets_root_in_and_has_the_tools(vm: &mut Vm) -> Result<()> {
    let user = vm.console()?.run("id -un")?;
    ensure!(user.trimmed() == "root", "the console says {:?}", user.text());
    let mut ssh = vm.ssh()?;
    ssh.run("command -v mdadm pvcreate wipefs sgdisk /usr/local/sbin/storage-cleanup")?;
    ssh.run("systemctl is-active qemu-guest-agent")?;
    Ok(())
}
