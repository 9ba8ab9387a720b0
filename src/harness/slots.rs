//! How many machines run at once, across the processes that share a cache, first come first served.
//!
//! A queue of tickets in a directory: one file per machine that waits or runs, numbered in the
//! order of arrival, locked by its owner. **A machine may run when it fits together with all those
//! ahead of it**, whether they run or wait. So nothing is overtaken, a large machine is not starved
//! by small ones, and no state says who runs. A dead owner's lock is gone, and so is its ticket.
//!
//! Does not start machines and does not count what they really use.

use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::setting::Invalid;
use crate::record::event::{Event, Events};
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Sets how many machines may run at once.
pub const LIMIT_VARIABLE: &str = "SHAKEDOWN_VMS";
/// How often the queue is looked at: two directory reads in a tenth of a second cost nothing.
const POLL: Duration = Duration::from_millis(50);

/// The queue of all who use this directory.
#[derive(Clone, Debug)]
pub struct Slots {
    directory: PathBuf,
    machines: usize,
    /// `None`: measured when a queue begins.
    memory_mib: Option<u64>,
}

/// The right to run one machine, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Slot {
    path: PathBuf,
    /// Its lock is what makes the ticket count.
    _ticket: File,
}

/// As `SHAKEDOWN_VMS` says, else as many as there are cores.
///
/// # Errors
/// When the variable is no number above zero.
pub fn machines_at_once() -> Result<usize, Invalid> {
    match std::env::var(LIMIT_VARIABLE) {
        Ok(value) if !value.is_empty() => {
            value.parse().ok().filter(|number| *number > 0).ok_or_else(|| Invalid::Value {
                name: LIMIT_VARIABLE,
                value,
                wants: "a whole number of machines above zero (default: the number of cores)".into(),
            })
        }
        _ => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// What a ticket says about its owner.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Ticket {
    memory_mib: u64,
    /// The host's limit when this queue began.
    limit_mib: u64,
}

impl Slots {
    /// The queue in `directory`, which is made when the first slot is asked for. As many machines
    /// as the host has cores, or as `SHAKEDOWN_VMS` says; three quarters of the available memory.
    ///
    /// # Errors
    /// When the variable is no number above zero.
    pub fn in_directory(directory: impl Into<PathBuf>) -> Result<Self> {
        Ok(Self { directory: directory.into(), machines: machines_at_once()?, memory_mib: None })
    }

    /// A queue with limits of its own.
    pub fn with_limits(directory: impl Into<PathBuf>, machines: usize, memory_mib: u64) -> Self {
        Self { directory: directory.into(), machines, memory_mib: Some(memory_mib) }
    }

    /// Waits until a machine with this much memory may run.
    ///
    /// # Errors
    /// A host [`Fault`] when it is more than the host can ever give, or the directory cannot be
    /// used; [`Stop`](crate::deadline::Stop) in the chain when the wait must end.
    pub fn acquire(&self, memory_mib: u32, deadline: &Deadline, events: &Events) -> Result<Slot> {
        let (number, slot) = self.queue_up(memory_mib.into(), deadline)?;
        let mut waiting = false;
        loop {
            let mut ahead = self.survey(&self.lock(deadline)?)?;
            ahead.retain(|(other, _)| *other <= number);
            let memory: u64 = ahead.iter().map(|(_, ticket)| ticket.memory_mib).sum();
            let limit = ahead.last().map_or(u64::MAX, |(_, own)| own.limit_mib);
            if ahead.len() <= self.machines && memory <= limit {
                return Ok(slot);
            }
            if !waiting {
                events.emit(Event::SlotWait { limit: self.machines });
                waiting = true;
            }
            deadline.check().with_context(|| {
                Fault::host(format!("no free slot: {} machines are ahead of this one", ahead.len() - 1))
                    .fix("`shakedown vm list` shows the machines that run, `shakedown vm kill ID` ends one")
            })?;
            std::thread::sleep(deadline.slice(POLL));
        }
    }

    /// Takes a number. All of it under the lock: nobody sees a ticket that is not locked yet.
    fn queue_up(&self, memory_mib: u64, deadline: &Deadline) -> Result<(u64, Slot)> {
        let lock = self.lock(deadline)?;
        let queue = self.survey(&lock)?;
        // What is available now already lacks what the machines ahead use, so the limit is
        // measured when there are none, and handed on.
        let limit_mib = match (self.memory_mib, queue.last()) {
            (Some(limit), _) => limit,
            (None, Some((_, last))) => last.limit_mib,
            (None, None) => available_mib()? * 3 / 4,
        };
        if memory_mib > limit_mib {
            let message = format!(
                "a machine with {memory_mib} MiB does not fit this host, which can give {limit_mib} MiB to machines"
            );
            return Err(Fault::host(message).fix("ask for less `memory`, or free some").into());
        }
        let number = queue.last().map_or(1, |(last, _)| last + 1);
        let path = self.directory.join(format!("{number}.ticket"));
        let write = || -> io::Result<File> {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            file.write_all(&serde_json::to_vec(&Ticket { memory_mib, limit_mib })?)?;
            Ok(file)
        };
        let file = write().with_context(|| {
            let _ = std::fs::remove_file(&path);
            Fault::host(format!("cannot write {}", path.display()))
        })?;
        drop(lock);
        Ok((number, Slot { path, _ticket: file }))
    }

    /// The lock of the queue, held for moments only.
    fn lock(&self, deadline: &Deadline) -> Result<QueueLock> {
        let path = self.directory.join("queue.lock");
        let open = || -> io::Result<File> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)
        };
        let file = open().with_context(|| Fault::host(format!("cannot open {}", path.display())))?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(QueueLock(file)),
                Err(Errno::AGAIN | Errno::INTR) => {
                    deadline.check().with_context(|| {
                        Fault::host(format!("another process keeps {} locked", path.display()))
                    })?;
                    std::thread::sleep(deadline.slice(Duration::from_millis(1)));
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| Fault::host(format!("cannot lock {}", path.display())));
                }
            }
        }
    }

    /// The living tickets in order; dead ones are removed.
    fn survey(&self, _: &QueueLock) -> Result<Vec<(u64, Ticket)>> {
        let unreadable = || Fault::host(format!("cannot read {}", self.directory.display()));
        let mut tickets = Vec::new();
        for entry in std::fs::read_dir(&self.directory).with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            let Some(number) = number(&path) else { continue };
            match living(&path) {
                Ok(Some(ticket)) => tickets.push((number, ticket)),
                Ok(None) => {}
                // Its owner gave it back between the listing and the look.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| Fault::host(format!("cannot read {}", path.display())));
                }
            }
        }
        tickets.sort_by_key(|(number, _)| *number);
        Ok(tickets)
    }
}

/// Held while tickets are made, read or found dead.
struct QueueLock(#[expect(dead_code, reason = "its lock goes with it")] File);

fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_suffix(".ticket")?.parse().ok()
}

/// What a ticket says, or `None` after removing one whose owner is dead.
fn living(path: &Path) -> io::Result<Option<Ticket>> {
    let mut file = File::open(path)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        std::fs::remove_file(path)?;
        return Ok(None);
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(Some(serde_json::from_str(&text)?))
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Before the lock goes with the file: as long as a locked ticket is there, its number is taken.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Memory that can be had without swapping, by the kernel's own estimate (proc(5), `MemAvailable`).
fn available_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context(Fault::host("cannot read /proc/meminfo"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kib| kib / 1024)
        .ok_or_else(|| Fault::host("/proc/meminfo has no MemAvailable").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use std::io::BufRead;
    use std::process::{Command, Stdio};
    use std::sync::mpsc;

    fn ample() -> Deadline {
        Deadline::after(Duration::from_secs(60), "test")
    }

    fn now() -> Deadline {
        Deadline::after(Duration::ZERO, "test")
    }

    fn acquire(slots: &Slots, memory_mib: u32, deadline: &Deadline) -> Result<Slot> {
        slots.acquire(memory_mib, deadline, &Events::silent())
    }

    /// A queue in a directory of its own.
    fn queue(machines: usize, memory_mib: u64) -> (tempfile::TempDir, Slots) {
        let directory = tempfile::tempdir().expect("temp dir");
        let slots = Slots::with_limits(directory.path().join("slots"), machines, memory_mib);
        (directory, slots)
    }

    #[test]
    fn number_and_memory_limit_each_other_and_come_back() {
        let (_directory, slots) = queue(2, 3000);
        let first = acquire(&slots, 1000, &now()).expect("fits");
        let error = acquire(&slots, 2500, &now()).expect_err("memory");
        let text = format!("{error:#}");
        assert!(text.contains("1 machines are ahead") && text.contains("Fix: `shakedown vm list`"), "{text}");
        let second = acquire(&slots, 1000, &now()).expect("fits");
        acquire(&slots, 100, &now()).expect_err("number");
        drop(first);
        let third = acquire(&slots, 2000, &now()).expect("fits now");
        drop((second, third));
        assert_eq!(std::fs::read_dir(&slots.directory).expect("reads").count(), 1, "only the lock is left");
    }

    #[test]
    fn what_can_never_fit_is_refused_with_both_numbers() {
        let (_directory, slots) = queue(1, 3000);
        let text = format!("{:#}", acquire(&slots, 4096, &ample()).expect_err("too large"));
        assert!(text.contains("4096 MiB") && text.contains("3000 MiB") && text.contains("Fix:"), "{text}");
    }

    #[test]
    fn the_measured_limit_is_handed_on_while_the_queue_lasts() {
        let (_directory, mut slots) = queue(9, 3000);
        let _first = acquire(&slots, 1000, &now()).expect("fits");
        slots.memory_mib = None;
        let text = format!("{:#}", acquire(&slots, 3001, &now()).expect_err("limit of the first"));
        assert!(text.contains("can give 3000 MiB"), "{text}");
    }

    /// Waits in a thread of its own; says so, and then what it got.
    fn waiter(slots: &Slots, memory_mib: u32) -> (mpsc::Receiver<Result<Slot>>, impl Fn()) {
        struct Tell(std::sync::Mutex<mpsc::Sender<()>>);
        impl crate::record::event::Observer for Tell {
            fn observe(&self, event: &Event) {
                assert!(matches!(event, Event::SlotWait { .. }), "{event:?}");
                self.0.lock().expect("not poisoned").send(()).expect("heard");
            }
        }
        let (told, waits) = mpsc::channel();
        let (result, got) = mpsc::channel();
        let slots = slots.clone();
        std::thread::spawn(move || {
            let events = Events::to(Tell(told.into()));
            let _ = result.send(slots.acquire(memory_mib, &ample(), &events));
        });
        (got, move || waits.recv_timeout(Duration::from_secs(60)).expect("it waits"))
    }

    #[test]
    fn a_large_machine_is_not_overtaken_by_small_ones() {
        let (_directory, slots) = queue(9, 3000);
        let first = acquire(&slots, 1000, &now()).expect("fits");
        let (large, large_waits) = waiter(&slots, 3000);
        large_waits();
        // It would fit beside the first, but came after the large one.
        acquire(&slots, 1000, &now()).expect_err("behind the large one");
        let (small, small_waits) = waiter(&slots, 1000);
        small_waits();
        drop(first);
        let large = large.recv_timeout(Duration::from_secs(60)).expect("answers").expect("is next");
        assert!(small.try_recv().is_err(), "the small one waits for the large one");
        drop(large);
        small.recv_timeout(Duration::from_secs(60)).expect("answers").expect("is last");
    }

    #[test]
    fn tickets_of_a_killed_process_are_void() {
        let (_directory, slots) = queue(1, 3000);
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command
            .args(["--exact", "harness::slots::tests::holder", "--ignored", "--nocapture"])
            .env("SLOTS_TEST_DIRECTORY", &slots.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut holder = process::spawn(command).expect("starts");
        let (_stdin, stdout, _) = holder.pipes();
        let lines = io::BufReader::new(stdout.expect("piped")).lines();
        let held = lines.map(|line| line.expect("text")).any(|line| line.ends_with("holding"));
        assert!(held, "the other process got the slot");
        acquire(&slots, 1000, &now()).expect_err("the other process has it");
        let (got, waits) = waiter(&slots, 1000);
        waits();
        holder.kill();
        got.recv_timeout(Duration::from_secs(60)).expect("answers").expect("the dead one's slot");
    }

    /// The other process of the test above: takes the slot and keeps it until it is killed.
    #[test]
    #[ignore = "started by the test above it"]
    fn holder() {
        let Some(directory) = std::env::var_os("SLOTS_TEST_DIRECTORY") else { return };
        let _slot = acquire(&Slots::with_limits(directory, 1, 3000), 1000, &ample()).expect("free");
        println!("\nholding");
        let _ = io::stdin().read(&mut [0]);
    }
}
