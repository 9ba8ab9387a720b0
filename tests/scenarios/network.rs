//! The machine has an address and says so.

use shakedown::prelude::*;
use std::time::Duration;

/// Cold: the line is said once, when the first lease comes.
#[scenario(markers = [vm], boot = cold, timeout = "5m")]
fn ipv4_address_is_announced_on_the_serial_console(vm: &mut Vm) -> Result<()> {
    let addresses = vm.ssh()?.run("ip -4 -o addr show scope global")?;
    ensure!(addresses.text().contains("inet 10.0.2.15/24"), "addresses: {}", addresses.text());
    let line = vm.wait_for_console(r"LAN IPv4 address: \d+\.\d+\.\d+\.\d+", Duration::from_secs(30))?;
    ensure!(line == "LAN IPv4 address: 10.0.2.15", "the console says {line:?}");
    Ok(())
}

#[scenario(markers = [vm], timeout = "5m")]
fn files_go_there_and_back_by_ssh(vm: &mut Vm) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&there, &bytes)?;
    let mut ssh = vm.ssh()?;
    ssh.upload(&there, "/root/file", 0o640)?;
    ensure!(ssh.run("stat -c '%a %s' /root/file")?.trimmed() == "640 3000000", "mode or size is wrong");
    ssh.download("/root/file", &back)?;
    ensure!(std::fs::read(&back)? == bytes, "the file came back changed");
    Ok(())
}
