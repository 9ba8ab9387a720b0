//! Forks continue from one booted machine, see nothing of each other, and are no twins.

use shakedown::prelude::*;
use std::time::{Duration, SystemTime};

/// Leaves no stone on another in a fork; a fork that follows or runs beside it must not notice.
const RUIN: &str = "dd if=/dev/urandom of=/dev/vda bs=1M count=16 2>/dev/null; \
    dd if=/dev/zero of=/root/fill bs=1M 2>/dev/null; \
    rm -rf /etc/ssh /usr/lib/systemd /root/.ssh; echo ruined > /etc/hostname; hostname ruined; \
    systemctl kill --signal=KILL systemd-journald systemd-udevd; date -u -s 2001-01-01 >/dev/null; sync";

fn is_intact(vm: &mut Vm) -> Result<()> {
    let mut shell = vm.shell()?;
    let found = shell.run(
        "cat /etc/hostname; test -s /usr/lib/systemd/systemd && test -d /etc/ssh && test ! -e /root/fill && \
         cmp -n 16777216 /dev/vda /dev/zero && systemctl is-active systemd-journald",
    )?;
    ensure!(found.text() == "shakedown\nactive\n", "the fork is not intact: {}", found.text());
    let state = vm.ssh()?.run("id -un")?;
    ensure!(state.trimmed() == "root", "no SSH");
    Ok(())
}

#[scenario(markers = [vm, fork], disks = ["32M"], timeout = "5m")]
fn ruin_stays_in_its_fork(vm: &mut Vm) -> Result<()> {
    let before = vm.checkpoint("intact")?;
    let mut sibling = before.fork()?;
    vm.shell()?.run(Cmd::new(RUIN).allow_failure().timeout(Duration::from_secs(120)))?;
    is_intact(&mut sibling)?;
    is_intact(&mut before.fork()?)
}

#[scenario(markers = [vm, fork], timeout = "5m")]
fn forks_have_the_right_time_and_randomness_of_their_own(vm: &mut Vm) -> Result<()> {
    let twins = vm.checkpoint("twins")?;
    let mut random = Vec::new();
    for _ in 0..2 {
        let mut fork = twins.fork()?;
        let answer = fork.shell()?.run("head -c 32 /dev/urandom | od -An -tx1 -v; date +%s")?;
        let host = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let text = answer.text().into_owned();
        let (bytes, time) = text.trim().rsplit_once('\n').context("two answers")?;
        let off = time.trim().parse::<u64>()?.abs_diff(host);
        ensure!(off <= 2, "the clock of a fork is {off} s off");
        random.push(bytes.to_owned());
    }
    ensure!(random[0] != random[1], "two forks have the same random bytes: {}", random[0]);
    Ok(())
}

#[scenario(markers = [vm, fork], timeout = "5m")]
fn eight_forks_are_alive_at_once(vm: &mut Vm) -> Result<()> {
    let origin = vm.origin().context("this machine was not forked")?;
    let mut forks = (0..8).map(|_| origin.fork()).collect::<Result<Vec<_>>>()?;
    for (number, fork) in forks.iter_mut().enumerate() {
        fork.shell()?.run(format!("echo {number} > /root/number"))?;
    }
    for (number, fork) in forks.iter_mut().enumerate() {
        let found = fork.shell()?.run("cat /root/number")?;
        ensure!(found.trimmed() == number.to_string(), "fork {number} says {:?}", found.text());
    }
    Ok(())
}

/// What this process holds that a fork might leave behind: files and sockets, threads, mappings.
fn holdings() -> Result<[usize; 3]> {
    let count = |path: &str| -> Result<usize> { Ok(std::fs::read_dir(path)?.count()) };
    let maps = std::fs::read_to_string("/proc/self/maps")?.lines().filter(|line| line.contains('/')).count();
    Ok([count("/proc/self/fd")?, count("/proc/self/task")?, maps])
}

#[scenario(markers = [vm, fork, nightly], timeout = "20m")]
fn two_hundred_forks_leave_nothing_behind(vm: &mut Vm) -> Result<()> {
    let origin = vm.origin().context("this machine was not forked")?;
    origin.fork()?.shell()?.run("true")?;
    let before = holdings()?;
    for _ in 0..200 {
        origin.fork()?.shell()?.run("true")?;
    }
    let after = holdings()?;
    // Other scenarios of the same process come and go: not more than they can account for.
    for (what, before, after) in
        [("files", before[0], after[0]), ("threads", before[1], after[1]), ("mappings", before[2], after[2])]
    {
        ensure!(after < before + 40, "{after} {what} after 200 forks, {before} before");
    }
    Ok(())
}

#[scenario(markers = [vm, fork], disks = ["64M"], timeout = "5m")]
fn a_checkpoint_keeps_memory_and_disks_and_the_machine_goes_on(vm: &mut Vm) -> Result<()> {
    vm.shell()?.run(
        "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo seeded > /mnt/file && echo here > /run/memory && \
         sh -c 'while :; do date +%N > /run/alive; sleep 0.05; done' >/dev/null 2>&1 &",
    )?;
    vm.console()?.run("true")?;
    let seeded = vm.checkpoint("seeded")?;
    vm.shell()?.run("echo changed > /mnt/file; sync")?;
    for variation in ["one", "two"] {
        let mut fork = seeded.fork()?;
        let found = fork.shell()?.run(
            "cat /mnt/file /run/memory; a=$(cat /run/alive); sleep 0.5; [ \"$a\" != \"$(cat /run/alive)\" ] && echo alive",
        )?;
        ensure!(found.text() == "seeded\nhere\nalive\n", "fork {variation} has {:?}", found.text());
        fork.shell()?.run(format!("echo {variation} > /mnt/file; sync"))?;
        let same = fork.console()?.run("cat /mnt/file")?;
        ensure!(same.trimmed() == variation, "on the console it is {:?}", same.text());
    }
    vm.console()?.run("true")?;
    let own = vm.shell()?.run("cat /mnt/file")?;
    ensure!(own.trimmed() == "changed", "the machine itself has {:?}", own.text());
    Ok(())
}
