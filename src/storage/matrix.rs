//! The matrix: layouts, actions and levels, on machines of our own, with any cleaner.
//!
//! Several layouts stand side by side on one machine, each on disks of its own: emulated machines
//! get faster the longer they run, and a fork starts cold. They are seeded once; each action then
//! gets a fork of the machine with all of them. Raw disks are searched after the machine is off.

use super::layout::Layout;
use super::plan::{Evidence, Plan};
use super::scan;
use super::teardown::{Action, CLEANER};
use super::verify::{self, Level};
use super::{DISK_BYTES, Phase};
use crate::connection::Cmd;
use crate::fault::{Blame, Fault, blame};
use crate::image::STORAGE;
use crate::record::Outcome;
use crate::vm::template::Checkpoint;
use crate::vm::{Bus, DiskNeed, Needs, Vm};
use anyhow::{Context, Result};
use serde::Serialize;
use std::sync::{Condvar, Mutex, PoisonError};

const DISK: DiskNeed = DiskNeed { bytes: DISK_BYTES, bus: Bus::Virtio };
/// Disks for layouts; the first disk, `vda`, belongs to none and must stay as it is.
const DISKS: usize = 12;

/// The machine of all of this: with the image [`STORAGE`], and one shape, so that all share a template.
pub const MACHINE: Needs =
    Needs { image: Some(STORAGE), memory_mib: 512, disks: &[DISK; DISKS + 1], ..Needs::DEFAULT };

/// What cleans.
#[derive(Clone, Debug)]
pub enum Cleaner {
    /// The image's own `storage-cleanup`.
    Ours,
    /// A command line of the machine. It gets `--action ACTION DISK...`.
    Command(String),
    /// A POSIX script, given to the machine's `sh`, with the same arguments.
    Script(String),
}

/// One cell of the matrix.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The layout's name.
    pub layout: &'static str,
    /// What the cleaner was to do.
    pub action: Action,
    /// What was looked at.
    pub level: Level,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not pass; for a pass, what was found although nothing had to be gone.
    pub reason: Option<String>,
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
        let mut used = DISKS;
        for layout in layouts {
            if used + layout.disks() > DISKS {
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

    fn case(&self, action: Action, level: Level, outcome: Outcome, reason: Option<String>) -> Case {
        Case { layout: self.layout.name, action, level, outcome, reason }
    }

    fn all_cases(&self, action: Action, outcome: Outcome, reason: &str) -> impl Iterator<Item = Case> {
        Level::ALL.map(|level| self.case(action, level, outcome, Some(reason.to_owned()))).into_iter()
    }
}

/// On the first disk; belongs to nobody that is cleaned.
const BYSTANDER: &str = "this disk is not yours";

/// Makes a layout on a machine.
///
/// # Errors
/// A host [`Fault`] when it cannot be made: nothing is said of any cleaner then. What was begun is
/// cleaned.
pub fn seed(vm: &mut Vm, placed: &Placed) -> Result<()> {
    let disks = placed.disks();
    let plan = placed.layout.seed(&disks);
    let evidence = run(vm, &plan)?;
    let Some(failure) = evidence.failure() else { return Ok(()) };
    let swept = clean(vm, placed, Action::WipeSignatures, &Cleaner::Ours);
    let swept = swept.err().map(|error| format!("\nIts beginnings were not cleaned: {error:#}"));
    let name = placed.layout.name;
    Err(Fault::host(format!("the layout {name} cannot be made: {failure}{}", swept.unwrap_or_default()))
        .into())
}

/// Has a cleaner clean the disks of a layout.
///
/// # Errors
/// A machine [`Fault`] when it fails or hangs.
pub fn clean(vm: &mut Vm, placed: &Placed, action: Action, cleaner: &Cleaner) -> Result<()> {
    let arguments = format!("--action {action} {}", placed.disks().join(" "));
    let cmd = match cleaner {
        Cleaner::Ours => Cmd::new(format!("{CLEANER} {arguments}")),
        Cleaner::Command(line) => Cmd::new(format!("{line} {arguments}")),
        Cleaner::Script(text) => Cmd::new(format!("sh -s -- {arguments}")).stdin(text.as_bytes()),
    };
    let output = vm.shell()?.run(cmd.allow_failure())?;
    let said = [&output.stdout[..], &output.stderr].concat();
    let label = format!("{}-{action}-cleaner", placed.layout.name);
    vm.file(&label, "txt", &said);
    if output.success() {
        return Ok(());
    }
    Err(Fault::machine(format!(
        "the cleaner ended with {}:\n{}",
        output.exit,
        String::from_utf8_lossy(&said).trim_end()
    ))
    .into())
}

/// The levels that need a running machine.
fn verify(vm: &mut Vm, placed: &Placed, action: Action, cleaned: Result<()>) -> Result<[Case; 2]> {
    let disks = placed.disks();
    let case = |level, reason: Option<String>| {
        let outcome = if reason.is_some() { Outcome::Failed } else { Outcome::Passed };
        placed.case(action, level, outcome, reason)
    };
    let look = |steps| Plan { layout: placed.layout.name, phase: Phase::Verify, disks: disks.clone(), steps };
    let gone = run(vm, &look(verify::gone(placed.layout, &disks)))?;
    let mut found = gone.residue();
    found.extend(gone.failure());
    found.extend(cleaned.err().map(|error| format!("{error:#}")));
    let gone = case(Level::Gone, joined(found));
    let again = run(vm, &look(verify::resurrect(placed.layout, &disks)))?;
    let back = match (again.residue(), again.failure()) {
        (found, _) if !found.is_empty() => {
            let how = again.made().join("\n");
            case(Level::NotResurrectable, joined([vec![how], found].concat()))
        }
        (_, None) => case(Level::NotResurrectable, None),
        // Where something is left, it may be in the way.
        (_, Some(failure)) if gone.outcome == Outcome::Failed => case(Level::NotResurrectable, Some(failure)),
        (_, Some(failure)) => placed.case(action, Level::NotResurrectable, Outcome::Error, Some(failure)),
    };
    Ok([gone, back])
}

fn joined(lines: Vec<String>) -> Option<String> {
    (!lines.is_empty()).then(|| lines.join("\n"))
}

fn run(vm: &mut Vm, plan: &Plan) -> Result<Evidence> {
    let evidence = plan.run(&mut vm.shell()?)?;
    let label = format!("{}-{:?}", plan.layout, plan.phase).to_lowercase();
    let json = serde_json::to_vec_pretty(&evidence).context("evidence is no JSON")?;
    vm.file(&label, "json", &json);
    Ok(evidence)
}

/// Cleans the layouts that a machine has, and looks at all levels. The machine is gone afterwards.
///
/// # Errors
/// When the machine fails us, not when a cleaner does.
pub fn prove(mut vm: Vm, batch: &[Placed], action: Action, cleaner: &Cleaner) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for placed in batch {
        let cleaned = clean(&mut vm, placed, action, cleaner);
        if let Err(error) = &cleaned
            && blame(error) != Some(Blame::Machine)
        {
            return cleaned.map(|()| cases);
        }
        cases.extend(verify(&mut vm, placed, action, cleaned)?);
    }
    vm.shell()?.run("sync")?;
    vm.cut_power()?;
    let bystander = vm.raw_disk(0, |image| Ok(std::fs::read(image)?.starts_with(BYSTANDER.as_bytes())))?;
    for placed in batch {
        let mut found = Vec::new();
        for number in placed.numbers() {
            let deadline = vm.deadline().clone();
            let finds = vm.raw_disk(number, |image| scan::scan(image, &deadline))?;
            found.extend(
                finds.iter().map(|find| format!("{}: {find}", placed.disks()[number - placed.first])),
            );
        }
        let clean = found.is_empty() || !action.erases();
        let outcome = if clean && bystander { Outcome::Passed } else { Outcome::Failed };
        if !bystander {
            found.insert(0, "/dev/vda was not to be cleaned, and was".into());
        }
        cases.push(placed.case(action, Level::Erased, outcome, joined(found)));
    }
    vm.finish(cases.iter().all(|case| case.outcome == Outcome::Passed));
    Ok(cases)
}

/// Something to do on a machine.
enum Job {
    Seed(Vec<Placed>),
    Prove(Checkpoint, Vec<Placed>, Action),
}

struct Queue {
    jobs: Vec<Job>,
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
            let Some(job) = state.jobs.pop() else {
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
    cases.sort_by_key(|case| (place(case.layout), case.action, case.level));
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
            let mut trouble = None;
            batch.retain(|placed| match seed(&mut vm, placed) {
                Ok(()) => true,
                Err(error) if error.is::<Fault>() => {
                    let reason = format!("{error:#}");
                    cases.extend(
                        actions.iter().flat_map(|action| placed.all_cases(*action, Outcome::Error, &reason)),
                    );
                    false
                }
                Err(error) => {
                    trouble = Some(error);
                    false
                }
            });
            if let Some(error) = trouble {
                return Err(error);
            }
            let checkpoint = vm.checkpoint("seeded")?;
            vm.finish(cases.is_empty());
            let jobs = actions.iter().map(|action| Job::Prove(checkpoint.clone(), batch.clone(), *action));
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
            assert!(disks.len() <= DISKS);
        }
        let first = &batches[0][0];
        assert_eq!(
            (first.layout.name, first.disks()),
            ("raid1-lvm", vec!["/dev/vdb".to_owned(), "/dev/vdc".to_owned()])
        );
    }
}
