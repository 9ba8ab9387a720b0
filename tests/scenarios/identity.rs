//! A machine is who its scenario says.

use shakedown::prelude::*;

const WHO: &str =
    "hostname; cat /etc/hostname /etc/machine-id; journalctl -b -q --no-pager | head -n 1 | wc -l";

/// Checks name and journal, and gives the machine id.
fn id(vm: &mut Vm, name: &str) -> Result<String> {
    let answer = vm.shell()?.run(WHO)?.lines();
    let [first, second, id, journal] = &answer[..] else { bail!("four answers, not {answer:?}") };
    ensure!(first == name && second == name, "called {first} and {second}, not {name}");
    ensure!(id.len() == 32, "{id:?} is no machine id");
    ensure!(journal == "1", "the journal of before is lost");
    Ok(id.clone())
}

#[scenario(markers = [vm, fork], hostname = "node-1", fresh_machine_id, timeout = "5m")]
fn forks_have_the_name_and_the_id_that_they_need(vm: &mut Vm) -> Result<()> {
    let own = id(vm, "node-1")?;
    let mut sibling = vm.origin().context("a fork")?.fork()?;
    ensure!(id(&mut sibling, "node-1")? != own, "two machines have the same id");
    Ok(())
}

#[scenario(markers = [vm, fork], timeout = "5m")]
fn forks_that_need_no_identity_have_their_templates(vm: &mut Vm) -> Result<()> {
    let own = id(vm, "shakedown")?;
    let mut sibling = vm.origin().context("a fork")?.fork()?;
    ensure!(id(&mut sibling, "shakedown")? == own, "the ids differ without need");
    Ok(())
}

#[scenario(markers = [vm], boot = cold, hostname = "node-2", fresh_machine_id, timeout = "5m")]
fn booted_machines_have_the_name_that_they_need(vm: &mut Vm) -> Result<()> {
    id(vm, "node-2").map(drop)
}
