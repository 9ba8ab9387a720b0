//! Storage residue: what cleaners leave behind, and that we see it.
//!
//! All share the machine of `shakedown::storage::matrix`, and so one template.

use shakedown::prelude::*;
use shakedown::record::Outcome;
use shakedown::storage::matrix::{self, Case, Placed};
use shakedown::storage::{
    self, Action, CANONICAL, CLEANER, Cleaner, Dev, LAYOUTS, Layer, Layout, Level, layout_named,
};

fn ours() -> Cleaner {
    Cleaner::Command(CLEANER.into())
}

/// Stops arrays before it removes what is on them.
fn faulty() -> Cleaner {
    Cleaner::Script(include_str!("../../fixtures/storage/array-first").into())
}

fn run(vm: &Vm, layouts: &[&'static Layout], actions: &[Action], cleaner: &Cleaner) -> Result<Vec<Case>> {
    let origin = vm.origin().context("not a fork")?;
    matrix::run_all(&origin, layouts, actions, cleaner, 2)
}

fn named(names: &[&str]) -> Result<Vec<&'static Layout>> {
    names.iter().map(|name| layout_named(name)).collect()
}

fn all_pass(cases: &[Case], count: usize) -> Result<()> {
    ensure!(cases.len() == count, "{} cases, not {count}", cases.len());
    match cases.iter().find(|case| case.verdict.outcome != Outcome::Passed) {
        None => Ok(()),
        Some(case) => bail!("{}", serde_json::to_string_pretty(case)?),
    }
}

/// The faulty cleaner must fail where something stands on an array, at one level, and nowhere else.
fn caught(cases: &[Case]) -> Result<()> {
    for Case { layout, action, verdict } in cases {
        let at_fault = layout_named(layout)?.hides_behind_array()
            && *action == Action::WipeSignatures
            && verdict.level == Level::NotResurrectable;
        let expected = if at_fault { Outcome::Failed } else { Outcome::Passed };
        ensure!(verdict.outcome == expected, "{layout}, {action}, {}: {verdict:?}", verdict.level);
    }
    Ok(())
}

#[scenario(markers = [vm], image = "storage", memory = "512M", cpus = 1, timeout = "15m",
    disks = ["64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "80M"])]
fn our_cleaner_leaves_nothing(vm: &mut Vm) -> Result<()> {
    let layouts = named(&[CANONICAL, "partitions"])?;
    let cases = run(vm, &layouts, &Action::ALL, &ours())?;
    all_pass(&cases, layouts.len() * 9)
}

#[scenario(markers = [vm], image = "storage", memory = "512M", cpus = 1, timeout = "15m",
    disks = ["64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "80M"])]
fn an_array_stopped_too_early_is_seen(vm: &mut Vm) -> Result<()> {
    let layouts = named(&[CANONICAL, "lvm-linear"])?;
    let cases = run(vm, &layouts, &[Action::WipeSignatures], &faulty())?;
    caught(&cases)?;
    let seen = cases.iter().find(|case| case.verdict.outcome == Outcome::Failed).context("none failed")?;
    let reason = seen.verdict.reason.as_deref().unwrap_or_default();
    for word in ["mdadm --create /dev/md227", "vg_residue", "residue-marker"] {
        ensure!(reason.contains(word), "no {word:?} in what a person gets to see:\n{reason}");
    }
    Ok(())
}

/// It makes a group and then more of a volume than that has room for.
static IMPOSSIBLE: Layout = Layout {
    name: "impossible",
    about: "a volume that is too large",
    layers: &[
        Layer::Vg { name: "vg_impossible", on: &[Dev::Disk(0)] },
        Layer::Lv { vg: "vg_impossible", name: "lv", how: "-L 10G" },
        Layer::Raw { on: Dev::Lv("vg_impossible", "lv") },
    ],
};

#[scenario(markers = [vm], image = "storage", memory = "512M", cpus = 1, timeout = "10m",
    disks = ["64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "80M"])]
fn a_seed_is_repeated_over_anything_and_a_broken_one_is_our_error(vm: &mut Vm) -> Result<()> {
    let disks = Placed::alone(layout_named(CANONICAL)?).disks();
    // What is there is in use; nothing asks whether to go on.
    for name in [CANONICAL, CANONICAL, "raid0-ext4"] {
        storage::seed(&mut vm.shell()?, layout_named(name)?, &disks)?;
    }
    let error = storage::seed(&mut vm.shell()?, &IMPOSSIBLE, &disks[..1]).err().context("it was made")?;
    let text = format!("{error:#}");
    ensure!(text.contains("impossible cannot be made") && text.contains("lvcreate"), "{text}");
    ensure!(shakedown::fault::blame(&error) == Some(shakedown::fault::Blame::Host), "it is ours: {text}");
    let left = vm.shell()?.run(format!("wipefs -n --noheadings {}; vgs --noheadings", disks[0]))?;
    ensure!(left.trimmed().is_empty(), "it left {}", left.text());
    // The plan's own steps, in the order of the machine's graph, over what is left of the other disk.
    let canonical = layout_named(CANONICAL)?;
    storage::seed(&mut vm.shell()?, canonical, &disks)?;
    let cleaned = storage::clean(&mut vm.shell()?, &disks, Action::Discard, &Cleaner::Plan)?;
    let (verdicts, _) = storage::verify(&mut vm.shell()?, canonical, &disks, &cleaned)?;
    ensure!(verdicts.iter().all(|verdict| verdict.outcome == Outcome::Passed), "{verdicts:?}");
    Ok(())
}

#[scenario(markers = [vm, slow, nightly], image = "storage", memory = "512M", cpus = 1, timeout = "60m",
    disks = ["64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "80M"])]
fn our_cleaner_leaves_nothing_of_any_layout(vm: &mut Vm) -> Result<()> {
    let layouts: Vec<_> = LAYOUTS.iter().collect();
    let cases = run(vm, &layouts, &Action::ALL, &ours())?;
    all_pass(&cases, layouts.len() * 9)
}

#[scenario(markers = [vm, slow, nightly], image = "storage", memory = "512M", cpus = 1, timeout = "60m",
    disks = ["64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "64M", "80M"])]
fn the_faulty_cleaner_is_caught_where_it_is_faulty(vm: &mut Vm) -> Result<()> {
    let layouts: Vec<_> = LAYOUTS.iter().collect();
    caught(&run(vm, &layouts, &Action::ALL, &faulty())?)
}
