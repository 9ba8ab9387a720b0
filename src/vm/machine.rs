//! A running machine, as a scenario holds it.
//!
//! Owns the order of a life: power-on or fork, first console output, login prompt, SSH, work,
//! power-off, evidence, end. Every wait in it ends when QEMU does.

use super::assemble::{self, HostParts, Plan};
use super::herd::Herd;
use super::identity;
use super::needs::Needs;
use super::qemu::{Qemu, Watch};
use super::qmp::Qmp;
use super::register::{Entry, Running};
use super::screen;
use super::spec::{MachineSpec, Memory};
use super::template::Template;
use crate::connection::ssh::Target;
use crate::connection::{Agent, Cmd, KeyPair, Session, Ssh, Witness};
use crate::console::{Console, LoginProfile, Regex, Shell, WaitError};
use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use crate::image::{Image, KeyEntry};
use crate::record::event::Event;
use crate::record::{Evidence, Scratch, metadata};
use anyhow::{Context, Result};
use qapi::qmp;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod end;
mod fork;
mod forward;

pub(crate) use end::Death;
pub(super) use fork::Stopped;

/// In the guest.
const SSH_PORT: u16 = 22;
/// QEMU must be up and have greeted us in this time; it needs a tenth of a second.
const QEMU_START: Duration = Duration::from_secs(30);
/// A clean power-off under emulation takes two to five seconds.
const POWER_OFF: Duration = Duration::from_secs(60);

/// From a broken connection to the end of QEMU that broke it.
pub(crate) const LAST_MOMENTS: Duration = Duration::from_secs(1);
/// From the state to the guest's first answer; it takes half a second.
const THAW: Duration = Duration::from_secs(30);
/// An agent that runs answers in milliseconds; one that is still starting needs a few seconds.
const AGENT: Duration = Duration::from_secs(10);

/// All of the memory is written and read once; a GiB takes a few seconds.
const CHECKPOINT: Duration = Duration::from_secs(120);

/// What a machine is started with and where its evidence goes.
#[derive(Clone)]
pub struct Launch {
    /// Shown in process lists.
    pub name: String,
    /// What the scenario declared.
    pub needs: Needs,
    /// What it boots.
    pub image: Image,
    /// What of this host it is made with.
    pub host: HostParts,
    /// Opens root's account.
    pub key: KeyPair,
    /// From QEMU's start to the first console output: `BOOT_IMAGE_VM_SPAWN_TIMEOUT`.
    pub spawn_timeout: Duration,
    /// From there to the end of the first SSH command: `BOOT_IMAGE_VM_LOGIN_TIMEOUT`.
    pub login_timeout: Duration,
    /// Receives what the machine leaves behind.
    pub evidence: Evidence,
    /// Below this directory the machine has one for its own files, while it runs.
    pub machines: PathBuf,
    /// The machine joins it as soon as QEMU runs, so that its boot can be ended too.
    pub herd: Arc<Herd>,
}

/// Where a machine's own files are.
#[derive(Debug)]
pub(super) enum Workspace {
    /// Gone with the machine.
    Scratch(Scratch),
    /// They stay, and become a template.
    Template(PathBuf),
}

impl Workspace {
    fn path(&self) -> &Path {
        match self {
            Self::Scratch(scratch) => scratch.path(),
            Self::Template(dir) => dir,
        }
    }
}

/// A running machine. Dropping it ends it.
pub struct Vm {
    // Connections first: they hang on the process.
    ssh: Option<Ssh>,
    shell: Option<Shell>,
    console: Console,
    agent: AgentPort,
    qmp: Qmp,
    qemu: Qemu,
    spec: MachineSpec,
    launch: Launch,
    deadline: Deadline,
    workspace: Workspace,
    /// By [`Vm::power_off`].
    powered_off: bool,
    entry: Entry,
    /// What it continues from, which must stay while it runs.
    template: Option<Template>,
    /// Something did not go as asked: its evidence is wanted.
    trouble: AtomicBool,
    /// Its evidence is filed.
    collected: bool,
}

/// Our end of the guest agent's port. It is kept open also where nobody uses it: a port on which
/// nobody listens reads as closed to the guest.
#[derive(Debug)]
enum AgentPort {
    /// Not tried yet.
    Open(UnixStream),
    /// An agent answered.
    Ready(Agent),
    /// None answered.
    Silent,
}

impl Vm {
    /// Starts a machine and waits until it can be used: the first console output, then SSH where
    /// the image takes a key.
    ///
    /// # Errors
    /// A machine [`Fault`] when the guest does not get that far, with the last lines of its
    /// console; a host [`Fault`] when QEMU cannot be started or is killed. The evidence is
    /// collected before the error is returned.
    pub fn start(launch: Launch, deadline: &Deadline) -> Result<Self> {
        let workspace = Workspace::Scratch(Scratch::under(&launch.machines)?);
        let identity = identity::script(&launch.needs);
        let mut vm = Self::start_in(launch, workspace, Memory::Own, deadline)?;
        match identity.map_or(Ok(()), |script| vm.tell(script, deadline)) {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.collect(false);
                Err(error)
            }
        }
    }

    pub(super) fn start_in(
        launch: Launch,
        workspace: Workspace,
        memory: Memory,
        deadline: &Deadline,
    ) -> Result<Self> {
        let mut plan = launch.plan(workspace.path())?;
        plan.make(workspace.path(), &launch.host, deadline)?;
        plan.spec.memory = memory;
        let spawn = launch.spawn_timeout;
        let mut vm = Self::run(launch, plan.spec, workspace, None, deadline)?;
        let usable = vm.hear(&deadline.within(spawn, "BOOT_IMAGE_VM_SPAWN_TIMEOUT"));
        match usable.and_then(|()| vm.become_usable()) {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.collect(false);
                Err(error)
            }
        }
    }

    fn run(
        launch: Launch,
        spec: MachineSpec,
        workspace: Workspace,
        template: Option<Template>,
        deadline: &Deadline,
    ) -> Result<Self> {
        let events = launch.evidence.events();
        let logs = launch.evidence.logs();
        let start = deadline.within(QEMU_START, "QEMU's own start");
        let (mut qemu, channels) = Qemu::start(&spec, &logs.join("qemu.stderr"), &events)?;
        launch.herd.join(qemu.watch()?);
        let console = Console::attach(channels.console, &logs, events)?;
        let greeted = Qmp::open(channels.qmp, &start)
            .and_then(|mut qmp| qmp.forwarded_port(SSH_PORT, &start).map(|port| (qmp, port)));
        let (mut qmp, port) = greeted.map_err(|error| {
            let fault = Fault::host(format!("{}\nCommand: {}", qemu.obituary(), spec.command_line()));
            anyhow::Error::new(error).context(fault)
        })?;
        launch.evidence.update(|metadata| {
            metadata.qemu.get_or_insert_default().version = Some(qmp.version().to_owned());
        })?;
        if !launch.needs.reboots {
            // Not on the command line, since machines of both kinds continue from the same templates.
            let action = qmp::set_action {
                reboot: Some(qmp::RebootAction::shutdown),
                panic: None,
                shutdown: None,
                watchdog: None,
            };
            qmp.execute(&action, &start).context(Fault::host("QEMU cannot be told what a restart means"))?;
        }
        let port = port.filter(|_| launch.image.key != KeyEntry::None);
        let entry = Entry::new(&launch, qemu.id(), port)?;
        Ok(Self {
            ssh: None,
            shell: None,
            console,
            agent: AgentPort::Open(channels.agent),
            qmp,
            qemu,
            spec,
            launch,
            deadline: deadline.clone(),
            workspace,
            powered_off: false,
            entry,
            template,
            trouble: AtomicBool::default(),
            collected: false,
        })
    }

    /// Waits for a sign of life, from an image that gives one.
    fn hear(&mut self, deadline: &Deadline) -> Result<()> {
        if self.launch.image.login.is_none() {
            return Ok(());
        }
        let heard = self.console.first_output(deadline);
        heard.map_err(|error| self.explain(error, "nothing on the serial console"))
    }

    fn become_usable(&mut self) -> Result<()> {
        let login = self.deadline.within(self.launch.login_timeout, "BOOT_IMAGE_VM_LOGIN_TIMEOUT");
        match self.launch.image.key {
            KeyEntry::None => Ok(()),
            KeyEntry::Console => {
                let line = self.launch.key.public_line();
                self.log_in(&login)?;
                let mut shell = self.session_on_console(&login)?;
                shell.run(format!(
                    "umask 077 && mkdir -p ~root/.ssh && echo '{line}' >> ~root/.ssh/authorized_keys"
                ))?;
                self.connect(&login)
            }
            KeyEntry::Smbios | KeyEntry::Nocloud => self.connect(&login),
        }
    }

    /// Waits for SSH; meanwhile the moment of the login prompt is noted.
    fn connect(&mut self, deadline: &Deadline) -> Result<()> {
        let port = self.entry.running.ssh.as_ref().map(|ssh| ssh.port);
        let port = port.context(Fault::host("QEMU does not tell the SSH port"))?;
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let user = self.launch.image.ssh_user().to_owned();
        let watch = self.qemu.watch()?;
        let target = Target::new(addr, user, self.launch.key.clone()).until(move || watch.gone());
        let connected = AtomicBool::new(false);
        let (mut console, evidence) = (self.console.reader(), &self.launch.evidence);
        let prompt = self.launch.image.login.as_ref().map(LoginProfile::prompt).transpose()?;
        let result = std::thread::scope(|scope| {
            if let Some(prompt) = &prompt {
                scope.spawn(|| note_prompt(&mut console, prompt, &connected, evidence, deadline));
            }
            let result = Ssh::open(target, deadline);
            connected.store(true, Ordering::SeqCst);
            result
        });
        match result {
            Ok(ssh) => {
                let reached =
                    Some(metadata::Ssh { host: addr.ip().to_string(), port: addr.port(), executable: None });
                self.launch.evidence.update(|metadata| metadata.ssh = reached)?;
                self.launch.evidence.events().emit(Event::SshReady);
                self.ssh = Some(ssh);
                Ok(())
            }
            Err(error) => Err(self.explain(error, "no SSH")),
        }
    }

    /// The machine over SSH, as root. Commands end with the scenario's deadline. A fork connects at
    /// the first call.
    ///
    /// # Errors
    /// A host [`Fault`] when the image has no SSH, a machine [`Fault`] when it does not answer.
    pub fn ssh(&mut self) -> Result<Session<'_>> {
        if self.launch.image.key == KeyEntry::None {
            return Err(Fault::host(format!("image `{}` has no way in by SSH", self.launch.image.name))
                .fix("use vm.console(), or set `key` in the image's settings")
                .into());
        }
        self.finish_thaw()?;
        if self.ssh.is_none() {
            self.connect(&self.deadline.within(self.launch.login_timeout, "BOOT_IMAGE_VM_LOGIN_TIMEOUT"))?;
        }
        let ssh = self.ssh.as_mut().context(Fault::host("there is no SSH connection"))?;
        let session = Session::new(ssh, self.deadline.clone(), self.launch.evidence.events());
        Ok(session.with_machine(&self.trouble, &self.console))
    }

    /// The machine over its fastest channel: the guest agent where the image has it, else the serial
    /// console. Needs neither network nor sshd, and says nothing about them.
    ///
    /// # Errors
    /// A machine [`Fault`] when there is no agent and the login on the console does not succeed.
    pub fn shell(&mut self) -> Result<Session<'_>> {
        let deadline = self.deadline.within(AGENT, "the guest agent's first answer");
        if self.agent(&deadline).is_none() {
            return self.console();
        }
        let AgentPort::Ready(agent) = &mut self.agent else {
            return Err(Fault::host("the guest agent is gone").into());
        };
        let session = Session::new(agent, self.deadline.clone(), self.launch.evidence.events());
        Ok(session.with_machine(&self.trouble, &self.console))
    }

    /// The guest agent, if one answers in time; it is asked once.
    fn agent(&mut self, deadline: &Deadline) -> Option<&mut Agent> {
        if let AgentPort::Open(_) = self.agent
            && let AgentPort::Open(port) = std::mem::replace(&mut self.agent, AgentPort::Silent)
        {
            self.agent = Agent::open(port, deadline).map_or(AgentPort::Silent, AgentPort::Ready);
        }
        match &mut self.agent {
            AgentPort::Ready(agent) => Some(agent),
            _ => None,
        }
    }

    /// The machine over its serial console, logged in as root. The first call logs in.
    ///
    /// # Errors
    /// A machine [`Fault`] when the login does not succeed.
    pub fn console(&mut self) -> Result<Session<'_>> {
        self.finish_thaw()?;
        let deadline = self.deadline.clone();
        self.log_in(&deadline.within(self.launch.login_timeout, "BOOT_IMAGE_VM_LOGIN_TIMEOUT"))?;
        self.session_on_console(&deadline)
    }

    fn session_on_console(&mut self, deadline: &Deadline) -> Result<Session<'_>> {
        let shell = self.shell.as_mut().context(Fault::host("not logged in on the console"))?;
        let session = Session::new(shell, deadline.clone(), self.launch.evidence.events());
        Ok(session.with_machine(&self.trouble, &self.console))
    }

    fn log_in(&mut self, deadline: &Deadline) -> Result<()> {
        if self.shell.is_none() {
            let profile = self.launch.image.login.clone().ok_or_else(|| {
                Fault::host(format!("image `{}` has no login on its serial console", self.launch.image.name))
            })?;
            let shell = self.console.login(&profile, deadline);
            self.shell = Some(shell.map_err(|error| self.add_obituary(error))?);
        }
        Ok(())
    }

    /// Logs in on the serial console and tells it the size of a terminal, in rows and columns.
    /// Does nothing where the image lets nobody in there.
    ///
    /// # Errors
    /// A machine [`Fault`] when the login does not succeed.
    pub fn fit_console(&mut self, rows: u16, columns: u16) -> Result<()> {
        if self.launch.image.login.is_none() {
            return Ok(());
        }
        let fit = format!("stty -F /dev/ttyS0 rows {rows} cols {columns}");
        self.console()?.run(Cmd::new(fit).allow_failure()).map(drop)
    }

    /// Gives the serial console to a person, until they leave by Ctrl-] or the machine ends. Where
    /// somebody is logged in, they get that login shell.
    ///
    /// # Errors
    /// What [`Console::bridge`] gives.
    pub fn interact(&mut self, keys: impl Read + AsFd, screen: impl Write + Send + 'static) -> Result<()> {
        let begin = self.shell.take().map_or("", Shell::leave);
        self.console.bridge(begin, keys, screen, &self.deadline)
    }

    /// Waits for a pattern in what the serial console prints, control sequences taken out, and
    /// gives the text that matched.
    ///
    /// # Errors
    /// A machine [`Fault`] when the pattern does not come in time or the machine ends.
    pub fn wait_for_console(&mut self, pattern: &str, timeout: Duration) -> Result<String> {
        let regex =
            Regex::new(pattern).context(Fault::host(format!("`{pattern}` is not a regular expression")))?;
        self.finish_thaw()?;
        let deadline = self.deadline.within(timeout, "the wait for a line on the console");
        let found = self.console.wait_for(&regex, &deadline);
        found.map_err(|error| self.explain(error, &format!("`{pattern}` did not come on the serial console")))
    }

    /// Everything that the serial console printed so far, control sequences taken out.
    pub fn console_text(&self) -> String {
        self.console.text()
    }

    /// Powers off as a person would, by the ACPI button, and waits until QEMU has ended.
    ///
    /// # Errors
    /// A machine [`Fault`] when the guest does not power off in a minute; it is killed then.
    pub fn power_off(&mut self) -> Result<()> {
        let deadline = self.deadline.within(POWER_OFF, "a clean power-off");
        self.powered_off = true;
        self.launch.evidence.events().emit(Event::PowerOffRequested);
        let status = match self.press_until_off(&deadline) {
            Ok(status) => status,
            Err(error) => {
                let screen = self.console.tail(10);
                self.qemu.kill();
                return Err(error.context(Fault::machine(format!(
                    "the machine did not power off; the last of its console:\n{}",
                    indent(&screen)
                ))));
            }
        };
        let _ = self.console.wait_closed(&deadline);
        if status.success() {
            return Ok(());
        }
        Err(Fault::host(self.qemu.obituary()).into())
    }

    /// A guest that is still starting hears nothing of its button: it is pressed again.
    fn press_until_off(&mut self, deadline: &Deadline) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.qemu.ended() {
                return Ok(status);
            }
            let pressed = self.qmp.execute(&qmp::system_powerdown {}, deadline);
            let attempt = deadline.within(Duration::from_secs(10), "one press of the power button");
            match (self.qemu.wait(&attempt), pressed) {
                (Ok(status), _) => return Ok(status),
                (Err(error), Ok(_)) if deadline.check().is_err() => return Err(error),
                (Err(_), Ok(_)) => {}
                (Err(_), Err(error)) => {
                    return Err(anyhow::Error::new(error).context(Fault::host("QEMU has no power button")));
                }
            }
        }
    }

    /// True once QEMU has ended, for whatever reason.
    pub fn ended(&mut self) -> bool {
        self.qemu.ended().is_some()
    }

    /// Takes a picture of the screen into the evidence and says where it is.
    ///
    /// # Errors
    /// A host [`Fault`] when QEMU cannot.
    pub fn screenshot(&mut self, label: &str) -> Result<PathBuf> {
        let deadline = self.deadline.within(Duration::from_secs(10), "a screenshot");
        self.take_screenshot(label, &deadline)
    }

    fn take_screenshot(&mut self, label: &str, deadline: &Deadline) -> Result<PathBuf> {
        let file = self.launch.evidence.diagnostic(label, "png");
        let command = qmp::screendump {
            device: None,
            head: None,
            format: Some(qmp::ImageFormat::png),
            filename: file.to_string_lossy().into_owned(),
        };
        self.qmp.execute(&command, deadline).context(Fault::host("QEMU cannot take a screenshot"))?;
        Ok(file)
    }

    /// Waits for a pattern on the screen, while that is in VGA text mode, and gives the screen.
    ///
    /// # Errors
    /// A machine [`Fault`] when the pattern does not come in time or the machine ends.
    pub fn wait_for_screen(&mut self, pattern: &str, timeout: Duration) -> Result<String> {
        let regex = Regex::new(pattern)
            .with_context(|| Fault::host(format!("`{pattern}` is not a regular expression")))?;
        self.finish_thaw()?;
        let deadline = self.deadline.within(timeout, "the wait for a text on the screen");
        loop {
            let screen = screen::text(&mut self.qmp, self.workspace.path(), &deadline)
                .map_err(|error| self.add_obituary(error))?;
            if regex.is_match(screen.as_bytes()) {
                return Ok(screen);
            }
            if let Err(stop) = deadline.check() {
                let shown = indent(&screen);
                return Err(anyhow::Error::new(stop).context(Fault::machine(format!(
                    "`{pattern}` did not come on the screen, which shows:\n{shown}"
                ))));
            }
            // The screen gives no sign of change; a look costs QEMU half a millisecond.
            std::thread::sleep(deadline.slice(Duration::from_millis(50)));
        }
    }

    /// The machine, as QEMU was told it.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// What others see of it, with the way in.
    pub fn running(&self) -> &Running {
        &self.entry.running
    }

    /// The process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// The deadline of the scenario that holds this machine.
    pub fn deadline(&self) -> &Deadline {
        &self.deadline
    }

    /// A handle with which another thread can end the machine, so that all waits on it end.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn watch(&self) -> Result<Watch> {
        self.qemu.watch()
    }
}

impl Launch {
    pub(super) fn plan(&self, dir: &Path) -> Result<Plan> {
        assemble::plan(&self.name, &self.needs, &self.image, &self.host, &self.key.public_line(), dir)
    }
}

/// Tells the moment of the login prompt without typing anything.
fn note_prompt(
    console: &mut Console,
    prompt: &Regex,
    connected: &AtomicBool,
    evidence: &Evidence,
    deadline: &Deadline,
) {
    loop {
        // Asked before the look, so that one look follows the connection.
        let last = connected.load(Ordering::SeqCst);
        match console
            .wait_for(prompt, &deadline.within(Duration::from_millis(100), "one look at the console"))
        {
            Ok(_) => return evidence.events().emit(Event::LoginSeen),
            Err(WaitError::Stopped(Stop::Expired { .. })) if !last && !deadline.expired() => {}
            Err(_) => return,
        }
    }
}

impl Witness for Console {
    fn last_words(&self) -> String {
        format!("the last lines of the serial console:\n{}", indent(&self.tail(15)))
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}
