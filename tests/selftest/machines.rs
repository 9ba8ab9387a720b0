//! Machines that go wrong, and some that do not. `tests/harness/` runs this binary and checks what it
//! says; it is an example, not a test, because most of it fails on purpose.
//!
//! Which image they boot is the caller's choice: `SHAKEDOWN_IMAGE`.

use rustix::process::{Pid, Signal, kill_process};
use shakedown::prelude::*;

/// Passes on any machine.
#[scenario(boot = cold)]
fn boots(vm: &mut Vm) -> Result<()> {
    ensure!(!vm.ended(), "QEMU has ended");
    Ok(())
}

/// Of the image that only a flake builds.
#[scenario(image = "flake", boot = cold, medium = cdrom, timeout = "5m")]
fn a_flake_made_it(vm: &mut Vm) -> Result<()> {
    let said = vm.ssh()?.run("cat /run/shakedown/image/flake")?;
    ensure!(said.trimmed() == "built by a flake", "the ISO says {:?}", said.text());
    Ok(())
}

#[scenario]
fn answers(vm: &mut Vm) -> Result<()> {
    ensure!(vm.ssh()?.run("echo answer")?.trimmed() == "answer", "another answer");
    Ok(())
}

#[scenario(markers = [broken])]
fn qemu_is_killed(vm: &mut Vm) -> Result<()> {
    let qemu = i32::try_from(vm.pid()).ok().and_then(Pid::from_raw).context("a process")?;
    // In the middle of a command, as seen by its first output.
    let kill = move |_, _: &[u8]| kill_process(qemu, Signal::KILL).expect("QEMU runs");
    vm.ssh()?.run(Cmd::new("echo begun; sleep 1000").on_output(kill))?;
    Ok(())
}

#[scenario(markers = [broken])]
fn command_hangs(vm: &mut Vm) -> Result<()> {
    let mut ssh = vm.ssh()?;
    let hung = ssh.run(Cmd::new("sleep 1000").timeout(Duration::from_secs(2)));
    ensure!(ssh.run("echo next")?.trimmed() == "next", "the next command does not work");
    hung.map(drop)
}

#[scenario(markers = [broken], timeout = "20s")]
fn time_is_up(vm: &mut Vm) -> Result<()> {
    vm.wait_for_console("what is never printed", Duration::from_secs(1000))?;
    Ok(())
}

#[scenario(markers = [broken])]
fn body_panics(vm: &mut Vm) {
    assert!(vm.ended(), "the machine still runs");
}

#[scenario(markers = [broken], disks = ["4G", "1536M", "1536M"])]
fn disk_is_filled(vm: &mut Vm) -> Result<()> {
    vm.ssh()?.run("dd if=/dev/urandom of=/dev/vda bs=1M count=256 oflag=direct")?;
    Ok(())
}

#[scenario(markers = [broken])]
fn lost_by_restart(vm: &mut Vm) -> Result<()> {
    vm.shell()?.run("echo b >/proc/sysrq-trigger; sleep 1000").map(drop)
}

#[scenario(markers = [broken])]
fn lost_with_sshd(vm: &mut Vm) -> Result<()> {
    vm.ssh()?.run("pkill -9 sshd; sleep 1000").map(drop)
}

#[scenario(markers = [broken], timeout = "30s")]
fn lost_with_agent(vm: &mut Vm) -> Result<()> {
    vm.ssh()?.run("systemctl kill --signal=STOP qemu-guest-agent")?;
    vm.shell()?.run("true").map(drop)
}

#[scenario(markers = [broken])]
fn sibling_powers_off(vm: &mut Vm) -> Result<()> {
    let mut sibling = vm.origin().context("a fork")?.fork()?;
    sibling.ssh()?.run("poweroff -f; sleep 1000").map(drop)
}

#[scenario(markers = [broken])]
fn sibling_fails(vm: &mut Vm) -> Result<()> {
    vm.origin().context("a fork")?.fork()?.shell()?.run("exit 3").map(drop)
}

/// Looks at neither deadline nor machine.
#[scenario(markers = [broken], boot = cold, timeout = "5s")]
fn body_hangs(_: &mut Vm) {
    loop {
        std::thread::park();
    }
}

/// Keeps its machine until it is told to end.
#[scenario(markers = [nightly], boot = cold)]
fn waits(vm: &mut Vm) -> Result<()> {
    vm.wait_for_console("what is never printed", Duration::from_secs(1000))?;
    Ok(())
}

shakedown::main!();
