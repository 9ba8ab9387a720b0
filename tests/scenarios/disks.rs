//! Disks show as declared, in order, and blank.

use shakedown::prelude::*;

const MIB: u64 = 1 << 20;

#[scenario(markers = [vm], disks = ["4G", "1536M", "1536M"], timeout = "5m")]
fn three_disks_have_their_sizes_and_are_blank(vm: &mut Vm) -> Result<()> {
    let mut ssh = vm.ssh()?;
    let listed = ssh.run("lsblk -dnbo NAME,SIZE,SERIAL /dev/vd?")?;
    let listed = listed.text();
    let listed: Vec<Vec<&str>> = listed.lines().map(|l| l.split_whitespace().collect()).collect();
    let sizes = [4096 * MIB, 1536 * MIB, 1536 * MIB].map(|b| b.to_string());
    let wanted: Vec<Vec<&str>> = vec![
        vec!["vda", &sizes[0], "disk0"],
        vec!["vdb", &sizes[1], "disk1"],
        vec!["vdc", &sizes[2], "disk2"],
    ];
    ensure!(listed == wanted, "lsblk lists {listed:?}");
    let signatures = ssh.run("wipefs --noheadings /dev/vda /dev/vdb /dev/vdc")?;
    ensure!(signatures.stdout.is_empty(), "signatures on blank disks: {}", signatures.text());
    // Signatures are not everything: the whole of the smallest disks is zeros.
    ssh.run("for d in vdb vdc; do cmp -n 1610612736 /dev/$d /dev/zero; done")?;
    Ok(())
}

#[scenario(markers = [vm], disks = [nvme("256M"), ahci("256M"), "256M"], timeout = "5m")]
fn every_bus_has_its_names(vm: &mut Vm) -> Result<()> {
    let names = vm.ssh()?.run("lsblk -dno NAME,SERIAL | sort")?;
    for (name, serial) in [("nvme0n1", "disk0"), ("sda", "disk1"), ("vda", "disk2")] {
        let found = names.text().lines().any(|l| l.split_whitespace().eq([name, serial]));
        ensure!(found, "no {name} with serial {serial} in:\n{}", names.text());
    }
    Ok(())
}

#[scenario(markers = [vm], disks = ["64M"], timeout = "5m")]
fn what_is_written_to_a_disk_is_read_back(vm: &mut Vm) -> Result<()> {
    let mut ssh = vm.ssh()?;
    ssh.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo kept > /mnt/file && umount /mnt")?;
    let read = ssh.run("mount /dev/vda /mnt && cat /mnt/file && umount /mnt")?;
    ensure!(read.text() == "kept\n", "read back {:?}", read.text());
    Ok(())
}
