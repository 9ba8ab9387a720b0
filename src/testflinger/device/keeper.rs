//! The process that a machine belongs to, from its provisioning to its end.
//!
//! `provision` starts it and listens to its standard output until the machine can be used or cannot
//! be had. From then on the two know of each other by the machine's record alone.

use super::failure::{self, RECOVERY};
use super::machine::Machine;
use super::request::{self, Choice, OwnImage, Refused};
use super::ssh_agent::SshAgent;
use super::{Call, Owner, Site, door};
use crate::connection::KeyPair;
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::harness::{Errand, Settings, slots};
use crate::host::{firmware, tools};
use crate::image::{IMAGE_VARIABLE, Images};
use crate::process::{self, Other};
use crate::record::event::{Event, Events, Observer};
use crate::record::{Environment, Scratch};
use crate::testflinger::wire::Phase;
use crate::vm::{Boot, Firmware, Needs, Vm, accel};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// A job's limits are the agent's business.
const LIFE: Duration = Duration::MAX;
/// How often the keeper looks whether its job is still there. The machine's end wakes it at once.
const GLANCE: Duration = Duration::from_secs(1);

/// In the run directory: the evidence of the machine, as of any run.
pub(super) const NOTES: &str = "notes";

/// What a keeper says, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Word {
    /// What takes its time.
    Note(String),
    /// The machine can be used.
    Ready,
    /// There is none.
    Failed {
        /// The exit status of the phase.
        code: u8,
        /// The links of the error, outermost first.
        chain: Vec<String>,
    },
}

/// Makes a machine for the job and keeps it until it is told to end, by SIGTERM, or the job is gone.
/// Its standard output is for the process that started it.
///
/// # Errors
/// The error that it has told already.
pub fn keep(call: &Call) -> Result<()> {
    process::handle_signals()?;
    let kept = Owner::of(call).and_then(|owner| owner.site(call)).and_then(|site| site.keep());
    if let Err(error) = &kept {
        let chain = error.chain().map(ToString::to_string).collect();
        let _ = tell(&Word::Failed { code: failure::code(Phase::Provision, error), chain });
    }
    kept
}

fn tell(word: &Word) -> Result<()> {
    let mut line = serde_json::to_vec(word).context("cannot write JSON")?;
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).context(Fault::host("nobody waits for the machine"))
}

/// What a job wants.
pub(super) struct Wish {
    choice: Choice,
    environment: Environment,
    settings: Settings,
    needs: Needs,
}

/// Passes on what one waits for so long that one wants to know why.
struct Herald;

impl Observer for Herald {
    fn observe(&self, event: &Event) {
        let long = matches!(
            event,
            Event::ImageBuildStarted { .. } | Event::TemplateStarted { .. } | Event::SlotWait { .. }
        );
        if long {
            let text = event.to_string();
            // Who waits no more is missed when the machine is there.
            let _ = tell(&Word::Note(text.lines().next().unwrap_or_default().to_owned()));
        }
    }
}

impl Site {
    fn keep(&self) -> Result<()> {
        let keeper = Other::with_id(std::process::id()).context(Fault::host("cannot look at /proc"))?;
        let mut machine = Machine { job: self.job.id().to_owned(), keeper, way: None, died: None };
        // Before the act: whoever ends the job must find us.
        machine.enter(&self.cache, &self.agent)?;
        let kept = self.keep_machine(&mut machine);
        // One that died by itself stays on record, so that the job learns why.
        if kept.is_err() || machine.died.is_none() {
            machine.leave(&self.cache, &self.agent)?;
        }
        kept
    }

    fn keep_machine(&self, machine: &mut Machine) -> Result<()> {
        let user = request::user(&self.job, &self.config.user)?;
        let Wish { choice, environment, settings, needs } = self.wish()?;
        check_host(&needs)?;
        let scratch = Scratch::under(&self.cache.join("machines"))?;
        let key = KeyPair::load_or_create(&self.cache.join("keys"))?;
        let ssh_agent = SshAgent::start(scratch.path(), &key)?;
        if ssh_agent.is_none() {
            let why =
                "no SSH_AUTH_SOCK: it takes ssh-agent, ssh-add and setpriv, and a short path of the cache";
            tell(&Word::Note(why.into()))?;
        }
        let errand = Errand { name: "device", needs, timeout: LIFE };
        let kept = errand.run(environment, settings, Events::to(Herald), |vm| {
            let socket = ssh_agent.as_ref().map(|agent| agent.socket.clone());
            machine.way = Some(door::open(vm, user, socket)?);
            machine.save(&self.cache, &self.agent)?;
            tell(&Word::Ready)?;
            machine.died = stay(vm, &self.rundir)?;
            machine.save(&self.cache, &self.agent)
        });
        if choice.is_own(self.config.image.as_deref()) { kept.context(OwnImage) } else { kept }
    }

    /// The machine that the job asks for, and where its image comes from.
    ///
    /// # Errors
    /// [`Refused`] in the chain when it is the job that makes no sense.
    pub(super) fn wish(&self) -> Result<Wish> {
        let choice = request::image(&self.job, &self.rundir.join("attachments/provision"))?;
        let project = self.config.project.as_deref();
        let settings = project.map_or(Ok(Settings::default()), read_settings)?;
        let mut environment = Environment::read(project.unwrap_or(&self.rundir))?;
        // Gone with the job.
        environment.log_root = self.rundir.join(NOTES);
        let mut needs = self.config.needs.clone();
        let mut file = |file: &Path| {
            environment.overrides.insert(IMAGE_VARIABLE.into(), file.to_string_lossy().into_owned());
        };
        match (&choice, self.config.image.as_deref()) {
            (Choice::File(path), _) => file(path),
            (Choice::Attached(path), _) => {
                file(path);
                // Nobody will fork it again.
                needs.boot = Boot::Cold;
            }
            (Choice::Default, Some(path)) if path.contains('/') => file(Path::new(path)),
            (Choice::Default, Some(name)) => needs.image = Some(name.to_owned().leak()),
            (Choice::Default, None) => {}
            (Choice::Named(name), _) => needs.image = Some(name.clone().leak()),
        }
        let images = Images::new(self.cache.clone(), &environment, &settings.image, &settings.images)?;
        let known = match &choice {
            // What the operator chose is wrong for every job.
            Choice::Default => images.check(needs.image),
            Choice::Named(_) => images.check(needs.image).context(Refused),
            Choice::File(_) | Choice::Attached(_) => {
                let deadline = Deadline::after(Duration::from_secs(600), "reading the image of the job");
                images.get(None, None, &deadline, &Events::silent()).map(drop).context(Refused)
            }
        };
        known.map(|()| Wish { choice, environment, settings, needs })
    }
}

/// Looks for what no machine of this device can do without, whatever its image.
fn check_host(needs: &Needs) -> Result<()> {
    slots::machines_at_once()?;
    accel::detect(&Deadline::after(Duration::from_secs(60), "looking for an accelerator"))?;
    for program in ["qemu-system-x86_64", "qemu-img"] {
        tools::require(program)?;
    }
    if needs.firmware == Firmware::Uefi {
        firmware::require()?;
    }
    Ok(())
}

fn read_settings(project: &Path) -> Result<Settings> {
    let manifest = project.join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest)
        .with_context(|| Fault::host(format!("cannot read {}", manifest.display())))?;
    Settings::parse(&text).with_context(|| Fault::host(format!("cannot use {}", manifest.display())))
}

/// Waits for the end; why, where nobody asked for it.
fn stay(vm: &mut Vm, rundir: &Path) -> Result<Option<String>> {
    let qemu = vm.watch()?;
    while !process::interrupted() {
        if qemu.wait(GLANCE)? && !process::interrupted() {
            let death = vm.death(Duration::ZERO).map(|death| death.to_string());
            return Ok(Some(death.unwrap_or_else(|| "it was powered off".into())));
        }
        if !rundir.exists() {
            break;
        }
    }
    Ok(None)
}

/// The error of a keeper, with what its exit status follows from.
pub(super) fn rebuild(code: u8, chain: Vec<String>) -> anyhow::Error {
    let mut links = chain.into_iter().rev();
    let root = links.next().unwrap_or_default();
    let error = if code == RECOVERY { Fault::host(root).into() } else { anyhow::Error::msg(root) };
    links.fold(error, anyhow::Error::context)
}
