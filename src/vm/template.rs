//! A booted, settled, frozen machine on disk: what forks continue from.
//!
//! Owns what makes one valid (its key), how a machine is frozen, and how one is thawed. The guest's
//! memory is a file that forks map privately, so that a fork costs what it changes. Measured: 0.1 s
//! from QEMU's start to a machine that runs.

use super::Vm;
use super::assemble;
use super::machine::{Launch, Workspace};
use super::qmp::{Qmp, QmpError};
use super::spec::Memory;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::image::digest;
use crate::image::store::{Entry, Guard, Kind, Store};
use crate::record::event::{Event, Events};
use crate::record::Evidence;
use anyhow::{Context, Result, bail};
use qapi::qmp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Raised when templates of an older version must not be used any more.
const FORMAT: u32 = 1;
/// Beside the machine's own files.
const RAM: &str = "ram";
const STATE: &str = "state";
/// A guest that is never idle is frozen as it is.
const SETTLE_TIME: Duration = Duration::from_secs(60);
/// The device state is half a MiB; without shared memory it is all of the memory.
const FREEZE_TIME: Duration = Duration::from_secs(120);

/// What a template's manifest says beyond what every manifest does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// The image's name and digest.
    pub image: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The QEMU that froze it.
    pub qemu: String,
    /// The machine's memory, in MiB.
    pub memory_mib: u32,
    /// From power-on to the end of the first SSH command.
    pub boot_seconds: Option<f64>,
    /// The memory is in the state, not in a file of its own: each fork reads all of it.
    pub copied: bool,
    /// The guest agent answered.
    pub agent: bool,
    /// A shell that is logged in on the serial console, where there is no agent.
    pub shell: Option<String>,
}

impl Kind for Frozen {
    const NAME: &'static str = "template";
    // A gigabyte of memory would take longer to digest than the machine to boot.
    const DIGESTS: bool = false;

    fn started(name: &str, log: &Path) -> Event {
        Event::TemplateStarted { name: name.into(), log: log.display().to_string() }
    }

    fn ready(name: &str, seconds: f64, cached: bool) -> Event {
        Event::TemplateReady { name: name.into(), seconds, cached }
    }
}

/// A machine that forks can continue from.
#[derive(Clone, Debug)]
pub struct Template {
    pub(super) dir: PathBuf,
    pub(super) frozen: Frozen,
    /// Keeps it in the store while forks of it run.
    _guard: Guard,
}

/// The templates below `cache`.
///
/// # Errors
/// When the store cannot be made or read.
pub fn store_in(cache: &Path) -> Result<Store<Frozen>> {
    Store::open(cache.join("templates"), |_| ())
}

impl Template {
    /// The template for such a machine, from the store, or booted and frozen now. Of several
    /// processes that want it, one boots; if that fails it fails for all of them.
    ///
    /// # Errors
    /// What the boot gives.
    pub fn get(
        store: &Store<Frozen>,
        launch: &Launch<'_>,
        evidence: impl FnOnce() -> Result<Evidence>,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Self> {
        let key = key(launch)?;
        let name = launch.image.name.as_str();
        let entry = store.get(&key, name, deadline, events, |dir, log| freeze(launch, dir, log, evidence()?, deadline))?;
        let Entry { dir, manifest, guard } = entry;
        Ok(Self { dir, frozen: manifest.facts, _guard: guard })
    }

    /// Where a fork maps its memory from.
    pub(super) fn memory(&self) -> Memory {
        if self.frozen.copied { Memory::Own } else { Memory::Private(self.dir.join(RAM)) }
    }

    /// Loads the device state into a QEMU that waits for it.
    pub(super) fn thaw(&self, qmp: &mut Qmp, deadline: &Deadline) -> Result<(), QmpError> {
        if !self.frozen.copied {
            share_memory(qmp, deadline)?;
        }
        let state = crate::process::quote(&self.dir.join(STATE).to_string_lossy());
        let incoming =
            qmp::migrate_incoming { channels: None, exit_on_error: None, uri: Some(format!("exec:cat {state}")) };
        qmp.execute(&incoming, deadline)?;
        loop {
            match qmp.execute(&qmp::query_status {}, deadline)?.status {
                qmp::RunState::inmigrate => std::thread::sleep(deadline.slice(Duration::from_millis(3))),
                _ => break,
            }
        }
        qmp.execute(&qmp::cont {}, deadline).map(drop)
    }
}

/// All that makes a template valid, in one number. Paths of the machine's own files do not count.
fn key(launch: &Launch<'_>) -> Result<String> {
    let place = Path::new("/template");
    let Launch { name, needs, image, host, key, .. } = launch;
    let mut plan = assemble::plan(name, needs, image, host, &key.public_line(), place)?;
    plan.spec.memory = Memory::Shared(place.join(RAM));
    let qemu = host.qemu.metadata().context(Fault::host("cannot look at QEMU"))?;
    let disks: Vec<_> = needs.disks.iter().map(|disk| disk.bytes).collect();
    let whole = format!(
        "{FORMAT}\n{}\n{}\n{:?}\n{:?}\n{}\n{}",
        image.digest,
        plan.spec.command_line(),
        (qemu.dev(), qemu.ino(), qemu.size(), qemu.mtime(), qemu.mtime_nsec()),
        disks,
        processor(),
        env!("CARGO_PKG_VERSION"),
    );
    Ok(digest::hex(&Sha256::digest(whole)))
}

/// What of the host's processor a guest may have seen.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let tells = |line: &&str| ["model name", "flags", "microcode"].iter().any(|name| line.starts_with(name));
    first.lines().filter(tells).collect::<Vec<_>>().join("\n")
}

fn freeze(launch: &Launch<'_>, dir: &Path, log: &Path, evidence: Evidence, deadline: &Deadline) -> Result<Frozen> {
    let where_to = evidence.directory().display().to_string();
    std::fs::write(log, format!("{where_to}\n")).with_context(|| Fault::host(format!("cannot write {}", log.display())))?;
    let launch = Launch { evidence: evidence.clone(), ..launch.clone() };
    let result = boot_and_freeze(launch, dir, deadline);
    let (outcome, reason) = match &result {
        Ok(_) => (crate::record::Outcome::Passed, None),
        Err(error) => (crate::record::Outcome::Error, Some(format!("{error:#}"))),
    };
    evidence.finish(outcome, reason.as_deref())?;
    result.with_context(|| format!("booting the machine to fork from; its evidence is in {where_to}"))
}

fn boot_and_freeze(launch: Launch<'_>, dir: &Path, deadline: &Deadline) -> Result<Frozen> {
    let mut frozen = Frozen {
        image: format!("{} {}", launch.image.name, launch.image.digest),
        accelerator: launch.host.accelerator.to_string(),
        qemu: String::new(),
        memory_mib: launch.needs.memory_mib,
        boot_seconds: None,
        copied: false,
        agent: false,
        shell: None,
    };
    let evidence = launch.evidence.clone();
    let memory = Memory::Shared(dir.join(RAM));
    let mut vm = Vm::start_in(launch, Workspace::Template(dir.to_owned()), memory, deadline)?;
    vm.settle(&mut frozen, &deadline.within(SETTLE_TIME, "the guest's coming to rest"))?;
    let (qmp, version) = vm.into_frozen_state(deadline)?;
    frozen.qemu = version;
    let deadline = deadline.within(FREEZE_TIME, "saving the machine's state");
    frozen.copied = save(qmp, &dir.join(STATE), &deadline)?;
    frozen.boot_seconds = evidence.metadata().timings.boot_to_ssh_seconds;
    Ok(frozen)
}

/// Saves the state of a machine that stands still, and ends it. True when the memory had to go into
/// the state, because this QEMU cannot leave it where it is.
fn save(mut machine: impl AsMut<Qmp>, state: &Path, deadline: &Deadline) -> Result<bool> {
    let qmp = machine.as_mut();
    let copied = match share_memory(qmp, deadline) {
        Ok(()) => false,
        Err(QmpError::Refused { .. }) => true,
        Err(error) => return Err(error).context(Fault::host("cannot prepare the freezing")),
    };
    let to = crate::process::quote(&state.to_string_lossy());
    let migrate =
        qmp::migrate { channels: None, detach: None, resume: None, uri: Some(format!("exec:cat >{to}")) };
    let cannot = || Fault::host(format!("cannot save the machine's state to {}", state.display()));
    qmp.execute(&migrate, deadline).with_context(cannot)?;
    loop {
        let info = qmp.execute(&qmp::query_migrate {}, deadline).with_context(cannot)?;
        match info.status {
            Some(qmp::MigrationStatus::completed) => break,
            Some(qmp::MigrationStatus::failed) => {
                let why = info.error_desc.unwrap_or_else(|| "QEMU does not say why".into());
                let fault = cannot();
                let device = "a device of this machine may not be one that can be frozen (9p, virtiofs), or the disk is full";
                bail!(fault.fix(device).because(anyhow::anyhow!(why)));
            }
            _ => std::thread::sleep(deadline.slice(Duration::from_millis(5))),
        }
    }
    Ok(copied)
}

/// Leaves the memory out of the state: it is in its file already.
fn share_memory(qmp: &mut Qmp, deadline: &Deadline) -> Result<(), QmpError> {
    let capability =
        qmp::MigrationCapabilityStatus { capability: qmp::MigrationCapability::x_ignore_shared, state: true };
    qmp.execute(&qmp::migrate_set_capabilities { capabilities: vec![capability] }, deadline).map(drop)
}
