//! Machines that continue from others: templates, forks, checkpoints.

use super::{AGENT, AgentPort, CHECKPOINT, Launch, THAW, Vm, Workspace};
use crate::connection::Cmd;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::record::Scratch;
use crate::record::event::Event;
use crate::vm::identity;
use crate::vm::qmp::{Qmp, QmpError};
use crate::vm::spec::{DriveFormat, Memory};
use crate::vm::template::{Checkpoint, Frozen, Template};
use anyhow::{Context, Result};
use qapi::qmp;
use std::time::{Duration, Instant, SystemTime};

/// What it takes to let a machine go on that could not be saved.
const GO_ON: Duration = Duration::from_secs(10);

impl Vm {
    /// Starts a machine that continues from `template`: in a fraction of a second, and with nothing
    /// that any other fork did.
    ///
    /// Its clock is set and its random pool reseeded. MAC address and boot id are the template's, and so
    /// are hostname and machine id unless the scenario needs its own.
    ///
    /// # Errors
    /// A host [`Fault`] when QEMU does not take the state, a machine [`Fault`] when the guest does
    /// not answer afterwards.
    pub fn fork(launch: Launch, template: Template, deadline: &Deadline) -> Result<Self> {
        let begun = Instant::now();
        let workspace = Workspace::Scratch(Scratch::under(&launch.machines)?);
        let mut plan = launch.plan(workspace.path())?;
        plan.make_from(&template.dir, &template.frozen.overlays, workspace.path(), &launch.host, deadline)?;
        plan.spec.memory = template.memory();
        plan.spec.incoming = true;
        let mut vm = Self::run(launch, plan.spec, workspace, Some(template.clone()), deadline)?;
        match vm.thaw(&template, &deadline.within(THAW, "the start of a fork")) {
            Ok(()) => {
                vm.launch.evidence.events().emit(Event::Forked { seconds: begun.elapsed().as_secs_f64() });
                Ok(vm)
            }
            Err(error) => {
                vm.collect(false);
                Err(error)
            }
        }
    }

    /// A machine that has a template's state in it and stands still.
    pub(in crate::vm) fn load(
        launch: Launch,
        template: &Template,
        memory: Memory,
        deadline: &Deadline,
    ) -> Result<Stopped> {
        let workspace = Workspace::Template(template.dir.clone());
        let mut spec = launch.plan(workspace.path())?.spec;
        for drive in &mut spec.drives {
            let name = drive.file.file_name().unwrap_or_default().to_string_lossy();
            if template.frozen.overlays.iter().any(|overlay| *overlay == name) {
                drive.format = DriveFormat::Qcow2;
            }
        }
        spec.memory = memory;
        spec.incoming = true;
        let mut vm = Self::run(launch, spec, workspace, None, deadline)?;
        template.load(&mut vm.qmp, deadline).map_err(|error| vm.add_obituary(error.into()))?;
        Ok(Stopped { vm })
    }

    /// Takes a template of this machine as it is now: its memory, its disks, its running programs.
    /// The machine goes on afterwards.
    ///
    /// SSH connections of this machine are closed for it, since no fork could answer on them.
    ///
    /// # Errors
    /// A host [`Fault`] when the state cannot be saved: NVMe disks cannot, and disks may be full.
    pub fn checkpoint(&mut self, name: &str) -> Result<Checkpoint> {
        let deadline = self.deadline.within(CHECKPOINT, "a checkpoint");
        let mut frozen = match &self.template {
            Some(template) => template.frozen.clone(),
            None => Frozen::of(&self.launch),
        };
        self.finish_thaw()?;
        self.choose_channel(&mut frozen, &deadline)?;
        frozen.overlays = self.spec.overlays();
        self.qmp.execute(&qmp::stop {}, &deadline).context(Fault::host("QEMU cannot stop the machine"))?;
        let parent = self.template.clone();
        let template = Template::of_running(
            &mut self.qmp,
            &self.launch,
            self.workspace.path(),
            frozen,
            parent,
            &deadline,
        );
        let goes_on = self.qmp.execute(&qmp::cont {}, &Deadline::after(GO_ON, "the machine's going on"));
        let template = template?;
        goes_on.context(Fault::host("QEMU cannot go on"))?;
        Ok(Checkpoint::new(name, template, self.launch.clone(), self.deadline.clone()))
    }

    /// Where this fork continues from, to make more machines like it: each is as this one was when
    /// the scenario began. `None` for a machine that was booted.
    pub fn origin(&self) -> Option<Checkpoint> {
        let template = self.template.clone()?;
        Some(Checkpoint::new("sibling", template, self.launch.clone(), self.deadline.clone()))
    }

    /// Bytes of memory that are this machine's alone: what it does not share with its template.
    /// Counts QEMU itself and its translated code.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn private_memory(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text =
            std::fs::read_to_string(&path).with_context(|| Fault::host(format!("cannot read {path}")))?;
        let kib = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss_Anon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.map(|kib| kib * 1024).with_context(|| Fault::host(format!("{path} does not tell Pss_Anon")))
    }

    fn thaw(&mut self, template: &Template, deadline: &Deadline) -> Result<()> {
        let loaded = template.load(&mut self.qmp, deadline);
        if let Err(error) = loaded.and_then(|()| self.qmp.execute(&qmp::cont {}, deadline).map(drop)) {
            let mut fault =
                Fault::host(format!("QEMU does not take the template {}", template.dir.display()));
            if !matches!(error, QmpError::Stopped { .. }) {
                template.condemn();
                fault = fault.fix("start again: the template is made anew now");
            }
            return Err(self.add_obituary(anyhow::Error::new(error).context(fault)));
        }
        if let Some(token) = &template.frozen.shell {
            let shell = self.console.resume(token, deadline);
            self.shell = Some(shell.map_err(|error| self.add_obituary(error))?);
        }
        // The guest's clock stands where the template was frozen.
        let identity = identity::script(&self.launch.needs);
        if identity.is_none()
            && let Some(agent) = self.agent(deadline)
        {
            agent.prelude(set_clock);
            return Ok(());
        }
        self.tell(set_clock() + "\n" + &identity.unwrap_or_default(), deadline)
    }

    /// Runs a script of ours, which must not fail.
    pub(super) fn tell(&mut self, script: String, deadline: &Deadline) -> Result<()> {
        match self.ask(Cmd::new(script), deadline) {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => {
                Err(self.explain(error, "the machine does not do what it is told at its start"))
            }
            None => Err(Fault::host("a machine without agent, SSH and login cannot be told anything")
                .fix("do without `hostname` and `fresh_machine_id`")
                .into()),
        }
    }

    /// Does at the latest now what the first command in a fork does: sets its clock.
    pub(super) fn finish_thaw(&mut self) -> Result<()> {
        match &self.agent {
            AgentPort::Ready(agent) if agent.has_prelude() => self.shell()?.run(":").map(drop),
            _ => Ok(()),
        }
    }

    /// Waits until the guest has come to rest, and finds the channel that its forks will use.
    pub(in crate::vm) fn settle(&mut self, frozen: &mut Frozen, deadline: &Deadline) -> Result<()> {
        let started = "command -v systemctl >/dev/null || exit 0; systemctl is-system-running --wait";
        let patience = deadline.remaining() / 2;
        match self.ssh()?.run(Cmd::new(started).allow_failure().timeout(patience)) {
            Ok(state) if state.success() => {}
            Ok(state) => self.note(format!("the template's system is {}", state.trimmed())),
            Err(error) => self.note(format!("the template's units are not all started: {error:#}")),
        }
        self.choose_channel(frozen, deadline)?;
        // What every fork will do first, so that it finds its pages warm.
        self.shell()?.run("date -u -s @$(date +%s) >/dev/null; echo warm | cat")?;
        self.qemu.wait_idle(deadline)
    }

    /// Finds the channel that forks will use, and ends the SSH session: its peer would be gone in
    /// every fork.
    fn choose_channel(&mut self, frozen: &mut Frozen, deadline: &Deadline) -> Result<()> {
        frozen.agent = self.agent(&deadline.within(AGENT, "the guest agent's first answer")).is_some();
        if !frozen.agent {
            self.log_in(deadline)?;
        }
        // Whoever is logged in is so in all forks.
        frozen.shell = self.shell.as_ref().map(|shell| shell.token().to_owned());
        self.ssh = None;
        Ok(())
    }

    /// Stops the guest for good.
    pub(in crate::vm) fn stop(mut self, deadline: &Deadline) -> Result<Stopped> {
        self.qmp.execute(&qmp::stop {}, deadline).context(Fault::host("QEMU cannot stop the machine"))?;
        Ok(Stopped { vm: self })
    }
}

/// A machine that stands still and is about to be saved.
pub(in crate::vm) struct Stopped {
    vm: Vm,
}

impl Stopped {
    pub(in crate::vm) fn qmp(&mut self) -> &mut Qmp {
        &mut self.vm.qmp
    }

    pub(in crate::vm) fn overlays(&self) -> Vec<String> {
        self.vm.spec.overlays()
    }
}

/// The command that sets a guest's clock to this host's, as it is now.
fn set_clock() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("date -u -s @{}.{:09} >/dev/null", now.as_secs(), now.subsec_nanos())
}
