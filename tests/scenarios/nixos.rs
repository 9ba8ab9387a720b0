//! What goes into the NixOS image, and that image itself.

use shakedown::prelude::*;

const CLEANUP: &str = include_str!("../../nix/cleanup-storage.sh");

/// Runs on Debian as it would on NixOS.
#[scenario(markers = [vm], disks = ["256M", "256M", "256M"], timeout = "5m")]
fn the_cleanup_script_leaves_nothing_that_comes_back(vm: &mut Vm) -> Result<()> {
    let mut shell = vm.ssh()?;
    let create = "mdadm --create /dev/md127 --run --level=1 --metadata=1.2 --assume-clean --raid-devices=2 /dev/vda /dev/vdb";
    shell.run(create)?;
    shell.run("pvcreate -q /dev/md127 && vgcreate -q residue /dev/md127 && lvcreate -q -Wn -n volume -l 100%FREE residue")?;
    shell.run("mkfs.ext4 -q /dev/residue/volume && mount /dev/residue/volume /mnt")?;
    // A neighbour that is none of its business.
    shell.run("pvcreate -q /dev/vdc && vgcreate -q kept /dev/vdc")?;
    shell.run(Cmd::new("cat >/root/cleanup-storage").stdin(CLEANUP))?;
    let usage = shell.run(Cmd::new("bash /root/cleanup-storage").allow_failure())?;
    ensure!(!usage.success(), "it takes no disk for all disks");
    shell.run("bash /root/cleanup-storage /dev/vda /dev/vdb")?;
    let left = shell.run(
        "wipefs --noheadings /dev/vda /dev/vdb; lsblk --noheadings --raw --output NAME /dev/vda /dev/vdb",
    )?;
    ensure!(left.lines() == ["vda", "vdb"], "there is something left:\n{}", left.text());
    // The same array again shows what was hidden under it.
    shell.run(create)?;
    let signatures = shell.run("udevadm settle; wipefs --noheadings /dev/md127")?;
    ensure!(signatures.stdout.is_empty(), "the array brought back {}", signatures.text());
    let groups = shell.run("vgs --noheadings --options vg_name")?;
    ensure!(groups.trimmed() == "kept", "the volume groups are now {:?}", groups.text());
    // On blank disks it has nothing to do.
    shell.run("mdadm --stop /dev/md127 && mdadm --zero-superblock /dev/vda /dev/vdb && bash /root/cleanup-storage /dev/vda /dev/vdb")?;
    Ok(())
}

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
    ssh.run("command -v mdadm pvcreate wipefs sgdisk cleanup-storage")?;
    ssh.run("systemctl is-active qemu-guest-agent")?;
    Ok(())
}
