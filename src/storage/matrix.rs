//! The matrix: layouts, actions and levels, on machines of our own, with any cleaner.
//!
//! Several layouts stand side by side on one machine, each on disks of its own: emulated machines
//! get faster the longer they run, and a fork starts cold. They are seeded once; each action then
//! gets a fork of the machine with all of them. Raw disks are searched after the machine is off.

use super::conduct::{self, Cleaner, Verdict};
use super::layout::{DISK_BYTES, Layout};
use super::plan::Evidence;
use super::scan;
use super::teardown::Action;
use super::verify::Level;
use crate::image::STORAGE;
use crate::record::Outcome;
use crate::vm::template::Checkpoint;
use crate::vm::{Bus, DiskNeed, Needs, Vm};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

const fn disk(bytes: u64) -> DiskNeed {
    DiskNeed { bytes, bus: Bus::Virtio }
}

const DISK: DiskNeed = disk(DISK_BYTES);
/// Disks for layouts; the first disk, `vda`, belongs to none and must stay as it is. The last is
/// larger: what is copied of it is copied on write.
const DISKS: [DiskNeed; 13] =
    [DISK, DISK, DISK, DISK, DISK, DISK, DISK, DISK, DISK, DISK, DISK, DISK, disk(DISK_BYTES + (16 << 20))];
const FOR_LAYOUTS: usize = DISKS.len() - 1;

/// The machine of all of this: with the image [`STORAGE`], and one shape, so that all share a template.
/// Several run at once, and two emulated CPUs would wait for each other.
pub const MACHINE: Needs =
    Needs { image: Some(STORAGE), memory_mib: 512, cpus: 1, disks: &DISKS, ..Needs::DEFAULT };

/// One cell of the matrix.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The layout's name.
    pub layout: &'static str,
    /// What the cleaner was to do.
    pub action: Action,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// A layout on its disks.
#[derive(Clone, Debug)]
pub struct Placed {
    layout: &'static Layout,
    /// The number of its first disk among the machine's.
    first: usize,
}

impl Placed {
    /// From `vdb` on.
    pub fn alone(layout: &'static Layout) -> Self {
        Self { layout, first: 1 }
    }

    /// As many layouts to a machine as it has disks for, in their order.
    pub fn batches(layouts: &[&'static Layout]) -> Vec<Vec<Self>> {
        let mut batches: Vec<Vec<Self>> = Vec::new();
        let mut used = FOR_LAYOUTS;
        for layout in layouts {
            if used + layout.disks() > FOR_LAYOUTS {
                batches.push(Vec::new());
                used = 0;
            }
            let placed = Self { layout, first: 1 + used };
            used += layout.disks();
            if let Some(batch) = batches.last_mut() {
                batch.push(placed);
            }
        }
        batches
    }

    /// As the guest calls its disks.
    pub fn disks(&self) -> Vec<String> {
        self.numbers().map(|number| format!("/dev/vd{}", char::from(b'a' + number as u8))).collect()
    }

    fn numbers(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.layout.disks()
    }

    fn case(&self, action: Action, verdict: Verdict) -> Case {
        Case { layout: self.layout.name, action, verdict }
    }
}

/// On the first disk; belongs to nobody that is cleaned.
const BYSTANDER: &str = "this disk is not yours";

/// Makes a layout on a machine.
///
/// # Errors
/// As [`conduct::seed`].
pub fn seed(vm: &mut Vm, placed: &Placed) -> Result<()> {
    let seeded = conduct::seed(&mut vm.shell()?, placed.layout, &placed.disks())?;
    keep(vm, placed, "seed", &seeded)
}

fn keep(vm: &Vm, placed: &Placed, what: &str, evidence: &Evidence) -> Result<()> {
    let json = serde_json::to_vec_pretty(evidence).context("evidence is no JSON")?;
    vm.file(&format!("{}-{what}", placed.layout.name), "json", &json);
    Ok(())
}

/// Cleans the layouts that a machine has, and looks at all levels. The machine is gone afterwards.
///
/// # Errors
/// When the machine fails us, not when a cleaner does.
pub fn prove(mut vm: Vm, batch: &[Placed], action: Action, cleaner: &Cleaner) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for placed in batch {
        let disks = placed.disks();
        let cleaned = conduct::clean(&mut vm.shell()?, &disks, action, cleaner)?;
        keep(&vm, placed, "teardown", &cleaned)?;
        let (verdicts, evidence) = conduct::verify(&mut vm.shell()?, placed.layout, &disks, &cleaned)?;
        keep(&vm, placed, "verify", &evidence)?;
        cases.extend(verdicts.into_iter().map(|verdict| placed.case(action, verdict)));
    }
    let verdicts = search_raw(&mut vm, batch, action)?;
    cases.extend(batch.iter().zip(verdicts).map(|(placed, verdict)| placed.case(action, verdict)));
    vm.finish(cases.iter().all(|case| case.verdict.outcome == Outcome::Passed));
    Ok(cases)
}

/// Powers the machine off and searches the disks of layouts that were cleaned by `action`.
///
/// # Errors
/// When the machine fails us.
pub fn search_raw(vm: &mut Vm, batch: &[Placed], action: Action) -> Result<Vec<Verdict>> {
    vm.shell()?.run("sync")?;
    vm.cut_power()?;
    let untouched = vm.raw_disk(0, |image| Ok(std::fs::read(image)?.starts_with(BYSTANDER.as_bytes())))?;
    batch.iter().map(|placed| erased(vm, placed, action, untouched)).collect()
}

/// The level that needs the machine off.
fn erased(vm: &Vm, placed: &Placed, action: Action, untouched: bool) -> Result<Verdict> {
    let mut found = Vec::new();
    for (number, disk) in placed.numbers().zip(placed.disks()) {
        let finds = vm.raw_disk(number, |image| scan::scan(image, vm.deadline()))?;
        found.extend(finds.iter().map(|find| format!("{disk}: {find}")));
    }
    if !untouched {
        return Ok(Verdict::of(Level::Erased, vec!["/dev/vda was not to be cleaned, and was".into()]));
    }
    let verdict = Verdict::of(Level::Erased, found);
    Ok(if action.erases() { verdict } else { Verdict { outcome: Outcome::Passed, ..verdict } })
}

/// Something to do on a machine.
enum Job {
    Seed(Vec<Placed>),
    Prove(Box<Checkpoint>, Vec<Placed>, Action),
}

struct Queue {
    /// Seeds come first: what they bring is shorter, and ends the run evenly.
    jobs: VecDeque<Job>,
    /// Jobs that may bring more.
    busy: usize,
    cases: Vec<Case>,
    error: Option<anyhow::Error>,
}

/// Runs a cleaner over layouts, on forks of `origin`: the machine [`MACHINE`] as it booted.
/// `workers` machines run at once.
///
/// # Errors
/// When machines fail us. A layout that cannot be made is no error here, but its cases are.
pub fn run_all(
    origin: &Checkpoint,
    layouts: &[&'static Layout],
    actions: &[Action],
    cleaner: &Cleaner,
    workers: usize,
) -> Result<Vec<Case>> {
    let jobs = Placed::batches(layouts).into_iter().map(Job::Seed).collect();
    let queue = Mutex::new(Queue { jobs, busy: 0, cases: Vec::new(), error: None });
    let news = Condvar::new();
    let work = || {
        let mut state = queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.error.is_some() || (state.jobs.is_empty() && state.busy == 0) {
                return;
            }
            let Some(job) = state.jobs.pop_front() else {
                state = news.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy += 1;
            drop(state);
            let done = do_job(origin, job, actions, cleaner);
            state = queue.lock().unwrap_or_else(PoisonError::into_inner);
            state.busy -= 1;
            match done {
                Ok((cases, jobs)) => {
                    state.cases.extend(cases);
                    state.jobs.extend(jobs);
                }
                Err(error) => state.error = Some(error),
            }
            news.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(work);
        }
    });
    let Queue { mut cases, error, .. } = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = error {
        return Err(error);
    }
    let place = |name: &str| layouts.iter().position(|layout| layout.name == name);
    cases.sort_by_key(|case| (place(case.layout), case.action, case.verdict.level));
    Ok(cases)
}

fn do_job(
    origin: &Checkpoint,
    job: Job,
    actions: &[Action],
    cleaner: &Cleaner,
) -> Result<(Vec<Case>, Vec<Job>)> {
    match job {
        Job::Prove(checkpoint, batch, action) => {
            Ok((prove(checkpoint.fork()?, &batch, action, cleaner)?, Vec::new()))
        }
        Job::Seed(mut batch) => {
            let mut vm = origin.fork()?;
            mark_bystander(&mut vm)?;
            let mut cases = Vec::new();
            // What cannot be made is no error of the others.
            batch.retain(|placed| {
                let Err(error) = seed(&mut vm, placed) else { return true };
                for (action, level) in actions.iter().flat_map(|a| Level::ALL.map(|level| (*a, level))) {
                    let reason = Some(format!("{error:#}"));
                    cases.push(placed.case(action, Verdict { level, outcome: Outcome::Error, reason }));
                }
                false
            });
            let checkpoint = vm.checkpoint("seeded")?;
            vm.finish(cases.is_empty());
            let jobs =
                actions.iter().map(|action| Job::Prove(Box::new(checkpoint.clone()), batch.clone(), *action));
            Ok((cases, jobs.collect()))
        }
    }
}

/// Writes on the disk that nobody may touch.
///
/// # Errors
/// What the command gives.
pub fn mark_bystander(vm: &mut Vm) -> Result<()> {
    vm.shell()?.run(format!("printf '{BYSTANDER}' | dd of=/dev/vda conv=fsync status=none")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::LAYOUTS;

    #[test]
    fn batches_have_every_layout_once_on_disks_of_its_own() {
        let layouts: Vec<_> = LAYOUTS.iter().collect();
        let batches = Placed::batches(&layouts);
        assert_eq!(batches.iter().map(Vec::len).sum::<usize>(), LAYOUTS.len());
        for batch in &batches {
            let disks: Vec<_> = batch.iter().flat_map(Placed::numbers).collect();
            assert_eq!(disks, (1..=disks.len()).collect::<Vec<_>>());
            assert!(disks.len() <= FOR_LAYOUTS);
        }
        let first = &batches[0][0];
        assert_eq!(
            (first.layout.name, first.disks()),
            ("raid1-lvm", vec!["/dev/vdb".to_owned(), "/dev/vdc".to_owned()])
        );
    }
}
