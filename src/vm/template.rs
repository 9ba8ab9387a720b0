//! A booted, settled, frozen machine on disk: what forks continue from.
//!
//! Owns what makes one valid (its key), how a machine is frozen, and how one is thawed. The guest's
//! memory is a file that forks map privately, so that a fork costs what it changes. Measured: 0.1 s
//! from QEMU's start to a machine that runs.

use super::Vm;
use super::machine::{Launch, Stopped, Workspace};
use super::qmp::{Qmp, QmpError};
use super::spec::Memory;
use crate::deadline::Deadline;
use crate::fault::{Blame, Fault, blame};
use crate::image::digest;
use crate::image::store::{self, Entry, Guard, Kind, Store};
use crate::record::event::{Event, Events};
use crate::record::{Evidence, Outcome, Scratch};
use anyhow::{Context, Result, bail};
use qapi::qmp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Raised when templates of an older version must not be used any more.
const FORMAT: u32 = 1;
/// Beside the machine's own files.
const RAM: &str = "ram";
const STATE: &str = "state";
/// A guest that is never idle is frozen as it is.
pub(crate) const SETTLE_TIME: Duration = Duration::from_secs(40);
/// Templates that were not used for so long go when a new one is made, and then those last used
/// longest ago until the rest takes no more than this. One takes a quarter of a GiB.
const KEPT_UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);
const KEPT_BYTES: u64 = 6 << 30;
/// The device state is half a MiB; without shared memory it is all of the memory.
pub(crate) const FREEZE_TIME: Duration = Duration::from_secs(120);
/// QEMU answers at once; it closes the file afterwards.
const CANCEL_TIME: Duration = Duration::from_secs(5);

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
    /// The names of the drives' files that are overlays; the others are raw.
    pub overlays: Vec<String>,
}

impl Frozen {
    /// What is known before the machine runs.
    pub(super) fn of(launch: &Launch) -> Self {
        Self {
            image: format!("{} {}", launch.image.name, launch.image.digest),
            accelerator: launch.host.accelerator.to_string(),
            qemu: String::new(),
            memory_mib: launch.needs.memory_mib,
            boot_seconds: None,
            copied: false,
            agent: false,
            shell: None,
            overlays: Vec::new(),
        }
    }
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
    _hold: Hold,
}

/// What keeps a template's files while forks of it run.
#[derive(Clone, Debug)]
#[allow(dead_code, reason = "held, not read")]
enum Hold {
    /// It is in the store.
    Store(Guard),
    /// It is a scenario's own, on top of the template that its machine came from.
    Checkpoint(Arc<Scratch>, Option<Box<Template>>),
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
    /// processes that want it, one boots; if that fails, it fails for all of that `run`.
    ///
    /// # Errors
    /// What the boot gives.
    pub fn get(
        store: &Store<Frozen>,
        launch: &Launch,
        run: &str,
        evidence: impl FnOnce() -> Result<Evidence>,
        deadline: &Deadline,
        events: &Events,
    ) -> Result<Self> {
        let key = key(launch)?;
        let name = launch.image.name.as_str();
        let entry = store.get(&key, name, Some(run), deadline, events, |dir, log| {
            // A change of image, QEMU or crate leaves templates that nobody will ask for again.
            if let Err(error) = store.prune(Some(KEPT_UNUSED), Some(KEPT_BYTES)) {
                events.note(format!("old templates cannot be removed: {error:#}"));
            }
            freeze(launch, dir, log, evidence()?, deadline)
        })?;
        let Entry { dir, manifest, guard } = entry;
        Ok(Self { dir, frozen: manifest.facts, _hold: Hold::Store(guard) })
    }

    /// QEMU does not take it: whoever wants it next makes it anew.
    pub(super) fn condemn(&self) {
        if let Hold::Store(_) = self._hold {
            let _ = store::condemn(&self.dir);
        }
    }

    /// Where a fork maps its memory from.
    pub(super) fn memory(&self) -> Memory {
        if self.frozen.copied { Memory::Own } else { Memory::Private(self.dir.join(RAM)) }
    }

    /// Loads the device state into a QEMU that waits for it. The guest stands still afterwards.
    pub(super) fn load(&self, qmp: &mut Qmp, deadline: &Deadline) -> Result<(), QmpError> {
        if !self.frozen.copied {
            share_memory(qmp, true, deadline)?;
        }
        let state = crate::process::quote(&self.dir.join(STATE).to_string_lossy());
        let incoming = qmp::migrate_incoming {
            channels: None,
            exit_on_error: None,
            uri: Some(format!("exec:cat {state}")),
        };
        qmp.execute(&incoming, deadline)?;
        while let qmp::RunState::inmigrate = qmp.execute(&qmp::query_status {}, deadline)?.status {
            std::thread::sleep(deadline.slice(Duration::from_millis(3)));
        }
        Ok(())
    }
}

/// In a template's directory: how much memory its forks had to themselves, in MiB, at the most.
const PRIVATE: &str = "private-mib";

impl Template {
    /// The memory that a fork of this launch will probably have to itself, in MiB, as measured on
    /// earlier ones; `None` while there is no template or no measurement.
    ///
    /// # Errors
    /// When the launch cannot be planned.
    pub fn expected_private_mib(cache: &Path, launch: &Launch) -> Result<Option<u32>> {
        let file = cache.join("templates").join(key(launch)?).join(PRIVATE);
        Ok(std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()))
    }

    /// Remembers what a fork had to itself at its end.
    pub(super) fn learn(&self, private: u64) {
        let mib = u32::try_from(private >> 20).unwrap_or(u32::MAX);
        let file = self.dir.join(PRIVATE);
        let known = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u32>().ok());
        if known.is_none_or(|known| known < mib) {
            // An estimate: a lost one costs nothing, a torn one is no number.
            let _ = std::fs::write(&file, format!("{mib}\n"));
        }
    }
}

/// A template that a scenario took of its machine in mid-run, to fork variations from. It is the
/// scenario's own and gone with the last value that refers to it.
#[derive(Clone)]
pub struct Checkpoint {
    name: String,
    template: Template,
    launch: Launch,
    deadline: Deadline,
    forks: Arc<AtomicUsize>,
}

impl Checkpoint {
    pub(super) fn new(name: &str, template: Template, launch: Launch, deadline: Deadline) -> Self {
        Self { name: name.to_owned(), template, launch, deadline, forks: Arc::default() }
    }

    /// A new machine that continues from here. Several may run at once; all of them count as the one
    /// machine that the scenario declared, so mind the host's memory.
    ///
    /// Its evidence is in a directory of its own below the scenario's.
    ///
    /// # Errors
    /// As [`Vm::fork`].
    pub fn fork(&self) -> Result<Vm> {
        let number = self.forks.fetch_add(1, Ordering::Relaxed) + 1;
        let evidence = self.launch.evidence.child(&format!("{}-{number}", self.name))?;
        Vm::fork(Launch { evidence, ..self.launch.clone() }, self.template.clone(), &self.deadline)
    }
}

impl Template {
    /// The machine behind `qmp` as it stands still now, whose own files are in `files`.
    pub(super) fn of_running(
        qmp: &mut Qmp,
        launch: &Launch,
        files: &Path,
        mut frozen: Frozen,
        parent: Option<Template>,
        deadline: &Deadline,
    ) -> Result<Self> {
        let scratch = Scratch::under(&launch.machines)?;
        let dir = scratch.path().to_owned();
        // Its memory is not in a file that others could map, so all of it goes into the state ...
        let whole = share_memory(qmp, false, deadline);
        whole.context(Fault::host("QEMU cannot save a machine with its memory"))?;
        migrate_to(qmp, &dir.join(STATE), deadline)?;
        frozen.copied = true;
        launch.plan(files)?.copy_files(files, &dir, deadline)?;
        let mut template = Self {
            dir: dir.clone(),
            frozen,
            _hold: Hold::Checkpoint(Arc::new(scratch), parent.map(Box::new)),
        };
        // ... and from there, once, into such a file: each fork then costs what it changes.
        template.spread(launch, deadline)?;
        Ok(template)
    }

    /// Turns a state with all the memory in it into one beside the memory.
    fn spread(&mut self, launch: &Launch, deadline: &Deadline) -> Result<()> {
        let evidence = launch.evidence.child("checkpoint")?;
        let launch = Launch { evidence, ..launch.clone() };
        let memory = Memory::Shared(self.dir.join(RAM));
        let mut stopped = Vm::load(launch, self, memory, deadline)?;
        let state = self.dir.join("state-beside");
        self.frozen.copied = save(&mut stopped, &state, deadline)?;
        std::fs::rename(&state, self.dir.join(STATE))
            .with_context(|| Fault::host(format!("cannot replace the state in {}", self.dir.display())))
    }
}

/// All that makes a template valid, in one number. Paths of the machine's own files do not count.
fn key(launch: &Launch) -> Result<String> {
    let place = Path::new("/template");
    let Launch { needs, image, host, .. } = launch;
    let mut plan = launch.plan(place)?;
    plan.spec.memory = Memory::Shared(place.join(RAM));
    let qemu = host.qemu.metadata().context(Fault::host("cannot look at QEMU"))?;
    let disks: Vec<_> = needs.disks.iter().map(|disk| disk.bytes).collect();
    let whole = format!(
        "{FORMAT}\n{}\n{}\n{}\n{:?}\n{:?}\n{}\n{}",
        image.digest,
        // It may be in a seed or typed in, and so not on the command line.
        launch.key.public_line(),
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

fn freeze(
    launch: &Launch,
    dir: &Path,
    log: &Path,
    evidence: Evidence,
    deadline: &Deadline,
) -> Result<Frozen> {
    let where_to = evidence.directory().display().to_string();
    std::fs::write(log, format!("{where_to}\n"))
        .with_context(|| Fault::host(format!("cannot write {}", log.display())))?;
    let launch = Launch { evidence: evidence.clone(), ..launch.clone() };
    let result = boot_and_freeze(launch, dir, deadline);
    let (outcome, reason) = match &result {
        Ok(_) => (Outcome::Passed, None),
        Err(error) => {
            let failed = blame(error) == Some(Blame::Machine);
            (if failed { Outcome::Failed } else { Outcome::Error }, Some(format!("{error:#}")))
        }
    };
    evidence.finish(outcome, reason.as_deref())?;
    result.with_context(|| format!("booting the machine to fork from; its evidence is in {where_to}"))
}

fn boot_and_freeze(launch: Launch, dir: &Path, deadline: &Deadline) -> Result<Frozen> {
    let mut frozen = Frozen::of(&launch);
    let evidence = launch.evidence.clone();
    let memory = Memory::Shared(dir.join(RAM));
    let mut vm = Vm::start_in(launch, Workspace::Template(dir.to_owned()), memory, deadline)?;
    vm.settle(&mut frozen, &deadline.within(SETTLE_TIME, "the guest's coming to rest"))?;
    let mut stopped = vm.stop(deadline)?;
    frozen.qemu = stopped.qmp().version().to_owned();
    frozen.overlays = stopped.overlays();
    let deadline = deadline.within(FREEZE_TIME, "saving the machine's state");
    frozen.copied = save(&mut stopped, &dir.join(STATE), &deadline)?;
    frozen.boot_seconds = evidence.metadata().timings.boot_to_ssh_seconds;
    Ok(frozen)
}

/// Saves the state of a machine that stands still. True when the memory had to go into
/// the state, because this QEMU cannot leave it where it is.
fn save(machine: &mut Stopped, state: &Path, deadline: &Deadline) -> Result<bool> {
    let qmp = machine.qmp();
    let copied = match share_memory(qmp, true, deadline) {
        Ok(()) => false,
        Err(QmpError::Refused { .. }) => true,
        Err(error) => return Err(error).context(Fault::host("cannot prepare the freezing")),
    };
    migrate_to(qmp, state, deadline)?;
    Ok(copied)
}

/// Writes the state of a machine that stands still to a file.
fn migrate_to(qmp: &mut Qmp, state: &Path, deadline: &Deadline) -> Result<()> {
    let to = crate::process::quote(&state.to_string_lossy());
    let migrate =
        qmp::migrate { channels: None, detach: None, resume: None, uri: Some(format!("exec:cat >{to}")) };
    let cannot = || Fault::host(format!("cannot save the machine's state to {}", state.display()));
    // QEMU spares networks: without this it writes 128 MiB a second.
    let unlimited = qmp::MigrateSetParameters { max_bandwidth: Some(1 << 40), ..Default::default() };
    qmp.execute(&qmp::migrate_set_parameters(unlimited), deadline).with_context(cannot)?;
    qmp.execute(&migrate, deadline).with_context(cannot)?;
    loop {
        let info = qmp.execute(&qmp::query_migrate {}, deadline).with_context(cannot)?;
        match info.status {
            Some(qmp::MigrationStatus::completed) => return Ok(()),
            Some(qmp::MigrationStatus::failed) => {
                let why = info.error_desc.unwrap_or_else(|| "QEMU does not say why".into());
                let fix = "see that the disk has room and that no device of the machine is one that QEMU cannot save";
                bail!(cannot().fix(fix).because(anyhow::anyhow!(why)));
            }
            _ => {
                if let Err(stop) = deadline.check() {
                    let end = Deadline::after(CANCEL_TIME, "giving up on saving the machine's state");
                    qmp.execute(&qmp::migrate_cancel {}, &end).with_context(cannot)?;
                    return Err(stop).with_context(cannot);
                }
                std::thread::sleep(deadline.slice(Duration::from_millis(5)));
            }
        }
    }
}

/// Leaves the memory out of the state, where it is in a file already, or not.
fn share_memory(qmp: &mut Qmp, state: bool, deadline: &Deadline) -> Result<(), QmpError> {
    let capability =
        qmp::MigrationCapabilityStatus { capability: qmp::MigrationCapability::x_ignore_shared, state };
    qmp.execute(&qmp::migrate_set_capabilities { capabilities: vec![capability] }, deadline).map(drop)
}
