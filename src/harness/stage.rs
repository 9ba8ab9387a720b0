//! The seam between a trial and the floors below: its evidence, its slot, its machine.
//!
//! Everything the harness needs of `record` and `vm` goes through here and nowhere else.

use super::debug::Debugger;
use super::scenario::Scenario;
use super::settings::Settings;
use super::slots::{self, Slot, Slots};
use super::verdict::{self, Verdict};
use crate::connection::KeyPair;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::{self, tools};
use crate::image::{Image, Images, KeyEntry};
use crate::record::deferred::{Deferred, Queue};
use crate::record::event::Events;
use crate::record::metadata::{SCHEMA_VERSION, Utc, millis};
use crate::record::{self, BootKind, Environment, Evidence, Outcome, scratch};
use crate::vm::assemble::HostParts;
use crate::vm::{Boot, Bus, Death, Herd, LAST_MOMENTS, Launch, Needs, Template, Vm, accel, template};
use anyhow::{Context, Result};
use jiff::Timestamp;
use once_cell::sync::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Building a Debian image from nothing takes one to two minutes, a NixOS one was seen to take 35; a
/// slow network some more.
const PREPARATION: Duration = Duration::from_secs(2 * 3600);
/// A scenario may use more memory than those before it did.
const FORK_MARGIN_MIB: u32 = 64;
/// What diagnostics and power-off may take, which bound themselves, before the machine is killed.
const SETTLING: Duration = Duration::from_secs(180);
/// How long a machine may wait for others to end. Each of them has a deadline of its own, so this
/// is reached only where something outside of us keeps slots.
const SLOT_WAIT: Duration = Duration::from_secs(3600);

/// One invocation of the test binary.
pub(super) struct Run {
    environment: Environment,
    settings: Settings,
    /// Made when the first scenario needs it: a name filter that matches nothing leaves no trace.
    record: OnceCell<record::Run>,
    /// Made when the first machine needs it.
    images: OnceCell<Images>,
    /// Files of machines whose process died are gone.
    swept: OnceCell<()>,
    /// Shows progress to whoever started the run.
    watcher: Events,
    debugger: Debugger,
}

/// What one execution of a scenario stands on.
pub(super) struct Stage {
    run: Arc<Run>,
    evidence: Evidence,
    events: Events,
    prepared: Mutex<Option<Prepared>>,
    herd: Arc<Herd>,
}

/// What a machine is made of, at hand.
struct Prepared {
    host: HostParts,
    image: Image,
    key: KeyPair,
    template: Option<Template>,
    machines: PathBuf,
    /// Held while the machine runs.
    slot: Option<Slot>,
}

impl Run {
    pub(super) fn new(environment: Environment, settings: Settings, watcher: Events) -> Self {
        let (record, images, swept) = (OnceCell::new(), OnceCell::new(), OnceCell::new());
        Self { environment, settings, record, images, swept, watcher, debugger: Debugger::off() }
    }

    /// The same, but it stops where `debugger` wants.
    pub(super) fn stopping(self, debugger: Debugger) -> Self {
        Self { debugger, ..self }
    }

    fn record(&self) -> Result<&record::Run> {
        self.record.get_or_try_init(|| {
            let swept = record::sweep(&self.environment.log_root)?;
            for dead in swept.added {
                eprintln!("note: `{}` of run {} died and is now on record", dead.scenario, dead.run_id);
            }
            let run = record::Run::start(self.environment.clone())?;
            // Under nextest by the first process alone.
            if let [(marker, error), others @ ..] = &swept.left[..]
                && !run.joined()
            {
                eprintln!(
                    "warning: scenarios that died before this run could not be put on record: {} in all. \
                     Removing {} gives the first of them up\n{}",
                    others.len() + 1,
                    marker.display(),
                    verdict::explain(error)
                );
            }
            Ok(run)
        })
    }

    /// Where the evidence of this run is, once there is any.
    pub(super) fn evidence(&self) -> Option<&Path> {
        self.record.get().map(record::Run::directory)
    }

    /// Since its first process began, builds and waits included.
    ///
    /// # Errors
    /// When there can be no run directory.
    pub(super) fn elapsed(&self) -> Result<Duration> {
        let elapsed = Timestamp::now().duration_since(self.record()?.started_at());
        Ok(Duration::try_from(elapsed).unwrap_or_default())
    }

    /// Whether another process began it, so that something else has run or runs.
    pub(super) fn joined(&self) -> bool {
        self.record.get().is_some_and(record::Run::joined)
    }

    /// What it may take; `None` where it is not for us to say.
    pub(super) fn session_budget(&self) -> Option<Duration> {
        (!self.environment.debug).then_some(self.environment.session_budget)
    }

    pub(super) fn ledger(&self) -> Option<&Path> {
        self.environment.ledger.as_deref()
    }

    /// What was put off, in this run and before.
    pub(super) fn queue(&self) -> Queue {
        Queue::in_log_root(&self.environment.log_root)
    }

    /// Puts scenarios on record that are put off, and into the queue: each with the reason and what
    /// it was expected to take.
    pub(super) fn defer(&self, test: &str, scenarios: &[(&Scenario, &str, Option<Duration>)]) -> Result<()> {
        let record = self.record()?;
        let lines: Vec<_> = scenarios
            .iter()
            .map(|(scenario, reason, _)| (scenario.name, scenario.markers, *reason))
            .collect();
        record.not_run(Outcome::Deferred, &lines)?;
        self.queue().add(scenarios.iter().map(|(scenario, reason, estimate)| Deferred {
            schema_version: SCHEMA_VERSION,
            test: test.to_owned(),
            scenario: scenario.name.to_owned(),
            run_id: record.id().to_owned(),
            deferred_at: Utc::now(),
            estimate_seconds: estimate.map(|estimate| millis(estimate.as_secs_f64())),
            reason: (*reason).to_owned(),
        }))
    }

    /// Writes down that this process is done.
    pub(super) fn end(&self) -> Result<()> {
        self.record.get().map_or(Ok(()), record::Run::end)
    }

    /// Puts a scenario on record that did not run: ignored, or not started.
    pub(super) fn record_unstarted(&self, scenario: &Scenario, verdict: &Verdict) -> Result<()> {
        self.record()?.not_run(verdict.outcome, &[(scenario.name, scenario.markers, &verdict.message)])
    }

    /// Writes down that a scenario begins, before it does.
    pub(super) fn open(self: &Arc<Self>, scenario: &Scenario) -> Result<Stage> {
        Ok(self.stage(self.record()?.scenario(scenario.name, scenario.markers)?))
    }

    /// As [`Run::open`] for something that is no scenario: it gets no ledger line.
    pub(super) fn open_aside(self: &Arc<Self>, name: &str) -> Result<Stage> {
        Ok(self.stage(self.record()?.aside(name)?))
    }

    fn stage(self: &Arc<Self>, evidence: Evidence) -> Stage {
        evidence.watched_by(self.watcher.clone());
        Stage {
            run: Arc::clone(self),
            events: evidence.events(),
            evidence,
            prepared: Mutex::new(None),
            herd: Arc::default(),
        }
    }

    /// Refuses settings with which none of these machines could be had: before anything runs, as an
    /// image may take minutes.
    ///
    /// # Errors
    /// Names the setting or the image.
    pub(super) fn check<'a>(&self, machines: impl IntoIterator<Item = &'a Needs>) -> Result<()> {
        for needs in machines {
            accel::chosen()?;
            slots::machines_at_once()?;
            self.images()?.check(needs.image)?;
        }
        Ok(())
    }

    fn images(&self) -> Result<&Images> {
        self.images.get_or_try_init(|| {
            let Settings { image, images, .. } = &self.settings;
            Images::new(host::cache_location()?, &self.environment, image, images)
        })
    }
}

/// Where the files of machines live while these run.
fn machines() -> Result<PathBuf> {
    Ok(host::cache_dir()?.join("machines"))
}

impl Stage {
    /// Gets what a machine needs before its own time begins to count: the image, built where it is
    /// not in the store yet, a slot among the machines of this host, and the template to fork from.
    pub(super) fn prepare(&self, needs: &Needs) -> Result<()> {
        self.run.swept.get_or_try_init(|| scratch::sweep_under(&machines()?).map(drop))?;
        let wait = Deadline::after(PREPARATION, "building the image");
        let accelerator = accel::detect(&wait)?;
        let host = HostParts {
            qemu: tools::require("qemu-system-x86_64")?,
            qemu_img: tools::require("qemu-img")?,
            accelerator: accelerator.kind,
        };
        let image =
            self.run.images()?.get(needs.image, Some(self.run.record()?.id()), &wait, &self.events)?;
        let key = KeyPair::load_or_create(&host::cache_dir()?.join("keys"))?;
        let forks = needs.boot == Boot::Fork && self.can_fork(needs, &image);
        self.evidence.update(|metadata| {
            metadata.boot = if forks { BootKind::Fork } else { BootKind::Cold };
            metadata.accelerator = Some(accelerator.kind.to_string());
            metadata.firmware = Some(needs.firmware.to_string());
            metadata.image = Some(image.metadata());
            metadata.artifact = Some(image.artifact(&key));
        })?;
        let mut prepared = Prepared { host, image, key, template: None, machines: machines()?, slot: None };
        let mut memory = needs.memory_mib;
        if forks {
            let launch = self.launch(&prepared, needs);
            if let Some(private) = Template::expected_private_mib(&host::cache_dir()?, &launch)? {
                // What it does not share; the rest is its template's, once for all.
                memory = memory.min(private + private / 4 + FORK_MARGIN_MIB);
            }
        }
        let slots = Slots::in_directory(host::cache_dir()?.join("slots"))?;
        let wait = Deadline::after(SLOT_WAIT, "waiting for other machines to end");
        prepared.slot = Some(slots.acquire(memory, &wait, &self.events)?);
        if forks {
            prepared.template = Some(self.template(&prepared, needs)?);
        }
        *lock(&self.prepared) = Some(prepared);
        Ok(())
    }

    /// Whether such a machine can be frozen at all; why not goes into the log.
    fn can_fork(&self, needs: &Needs, image: &Image) -> bool {
        let obstacle = if image.login.is_none() || image.key == KeyEntry::None {
            "nobody can tell when a machine without login has settled"
        } else if needs.disks.iter().any(|disk| disk.bus == Bus::Nvme) {
            "QEMU cannot save the state of an NVMe disk"
        } else {
            return true;
        };
        self.events.note(format!("this machine boots cold: {obstacle}"));
        false
    }

    fn template(&self, prepared: &Prepared, needs: &Needs) -> Result<Template> {
        let Environment { spawn_timeout, login_timeout, .. } = self.run.environment;
        let limit = spawn_timeout + login_timeout + template::SETTLE_TIME + template::FREEZE_TIME;
        let deadline = Deadline::after(limit, "booting the machine to fork from");
        let evidence = || {
            let evidence = self.run.record()?.aside(&format!("template-{}", prepared.image.name))?;
            evidence.update(|metadata| {
                let own = self.evidence.metadata();
                metadata.boot = BootKind::Cold;
                metadata.accelerator = own.accelerator;
                metadata.firmware = own.firmware;
                metadata.image = own.image;
                metadata.artifact = own.artifact;
            })?;
            Ok(evidence)
        };
        let store = template::store_in(&host::cache_dir()?)?;
        let run = self.run.record()?.id();
        Template::get(&store, &self.launch(prepared, needs), run, evidence, &deadline, &self.events)
    }

    fn launch(&self, prepared: &Prepared, needs: &Needs) -> Launch {
        let environment = &self.run.environment;
        Launch {
            name: "shakedown".into(),
            needs: needs.clone(),
            image: prepared.image.clone(),
            host: prepared.host.clone(),
            key: prepared.key.clone(),
            spawn_timeout: environment.spawn_timeout,
            login_timeout: environment.login_timeout,
            evidence: self.evidence.clone(),
            machines: prepared.machines.clone(),
            herd: Arc::clone(&self.herd),
        }
    }

    /// Boots or forks the machine.
    pub(super) fn boot(&self, needs: &Needs, deadline: &Deadline) -> Result<Vm> {
        let (launch, template) = {
            let prepared = lock(&self.prepared);
            let prepared = prepared.as_ref().context(Fault::host("nothing is prepared"))?;
            (self.launch(prepared, needs), prepared.template.clone())
        };
        match template {
            Some(template) => Vm::fork(launch, template, deadline),
            None => Vm::start(launch, deadline),
        }
    }

    /// Ends the machine at once, from another thread than the one that drives it, so that all its
    /// waits end.
    pub(super) fn kill_machine(&self) {
        if self.herd.kill() {
            self.events.note("the machine is killed: its scenario did not let go of it in time");
        }
    }

    /// How the machine, or one that the scenario made of it, died under its scenario, if it did.
    pub(super) fn death(&self, vm: &mut Vm, verdict: &Verdict) -> Option<Death> {
        let patience = if verdict.outcome == Outcome::Passed { Duration::ZERO } else { LAST_MOMENTS };
        vm.death(patience).or_else(|| self.herd.death())
    }

    /// Lets a person look into a failure, where they asked for it.
    pub(super) fn debug(&self, vm: &mut Vm, verdict: &Verdict) {
        self.run.debugger.stop_at(vm, verdict, self.evidence.directory());
    }

    /// How long the machine may take to be put away.
    pub(super) fn settling(&self) -> Duration {
        if self.run.environment.debug { Duration::MAX } else { SETTLING }
    }

    /// Collects diagnostics and destroys the machine.
    pub(super) fn settle(&self, vm: Vm, verdict: &Verdict) {
        vm.finish(verdict.outcome == Outcome::Passed);
    }

    /// What this execution leaves behind.
    pub(super) fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// Gives the slot back and writes the outcome down.
    pub(super) fn close(&self, verdict: &Verdict) -> Result<()> {
        lock(&self.prepared).take();
        let reason = (verdict.outcome != Outcome::Passed).then_some(verdict.message.as_str());
        self.evidence.finish(verdict.outcome, reason).map(drop)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
