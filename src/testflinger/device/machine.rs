//! The machine of a job, as the phases find it: what the keeper wrote of it.
//!
//! Its record is below the cache directory, one for each agent, since jobs may remove what is in
//! their run directory.

use crate::fault::Fault;
use crate::process::Other;
use crate::record::{files, scratch};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::DirBuilder;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a keeper may take to end with its machine. It takes a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(10);

const SSH: u16 = 22;

/// For `ssh -F`, in the run directory.
const SSH_CONFIG: &str = "device-ssh-config";

/// A machine and its keeper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// The job that it is for.
    pub(super) job: String,
    pub(super) keeper: Other,
    /// `None` until it can be used.
    pub(super) way: Option<Way>,
    /// Why it has ended, when nobody asked it to.
    pub(super) died: Option<String>,
}

/// The way in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Way {
    pub(super) qemu: Other,
    /// On loopback.
    pub(super) ip: Ipv4Addr,
    pub(super) port: u16,
    /// An account with root's rights; root's own is there as well.
    pub(super) user: String,
    /// The private key that opens both.
    pub(super) key: PathBuf,
    /// The socket of an ssh-agent(1) that has the key.
    pub(super) ssh_agent: Option<PathBuf>,
    /// What the serial console prints.
    pub(super) serial: PathBuf,
}

impl Machine {
    /// The machine that an agent has, or had.
    pub(super) fn find(cache: &Path, agent: &str) -> Option<Self> {
        files::read_json(&file(cache, agent)).ok()
    }

    /// Enters it, as the one machine of its agent.
    ///
    /// # Errors
    /// When the agent has another one.
    pub(super) fn enter(&self, cache: &Path, agent: &str) -> Result<()> {
        let file = file(cache, agent);
        let directory = file.parent().unwrap_or(cache);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.with_context(|| files::cannot("make", directory))?;
        let enter = || -> Result<bool> {
            let mut new = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
            new.write_all(&serde_json::to_vec(self)?)?;
            match new.persist_noclobber(&file) {
                Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(false),
                other => Ok(other.map(|_| true)?),
            }
        };
        while !enter().with_context(|| files::cannot("write", &file))? {
            match Self::find(cache, agent).filter(|other| other.keeper.lives()) {
                // Two agents of one name, perhaps: no fault of the host.
                Some(other) => bail!("the agent `{agent}` has a machine already, that of job {}", other.job),
                None => files::remove(&file)?,
            }
        }
        Ok(())
    }

    /// Writes down what has changed.
    pub(super) fn save(&self, cache: &Path, agent: &str) -> Result<()> {
        files::write_json(&file(cache, agent), self)
    }

    /// Removes the record, if it is that of this machine.
    pub(super) fn leave(&self, cache: &Path, agent: &str) -> Result<()> {
        let ours = Self::find(cache, agent).is_some_and(|machine| machine.keeper == self.keeper);
        if ours { files::remove(&file(cache, agent)) } else { Ok(()) }
    }

    /// Ends the machine that an agent has, whatever it does, and says of which job it was.
    ///
    /// # Errors
    /// A host [`Fault`] when it does not end.
    pub(super) fn end(cache: &Path, agent: &str) -> Result<Option<String>> {
        let Some(machine) = Self::find(cache, agent) else { return Ok(None) };
        machine.keeper.end(PATIENCE).context(Fault::host("the keeper of a machine does not end"))?;
        machine.leave(cache, agent)?;
        // What a keeper leaves that was killed.
        scratch::sweep_under(&cache.join("machines"))?;
        Ok(Some(machine.job))
    }

    /// Why it is there no more.
    pub(super) fn ended(&self) -> Option<String> {
        let killed = || (!self.keeper.lives()).then(|| "its keeper was killed".to_owned());
        // Its keeper has not said why yet.
        let ended = || {
            let way = self.way.as_ref()?;
            (!way.qemu.lives()).then(|| "QEMU does not run any more".to_owned())
        };
        self.died.clone().or_else(killed).or_else(ended)
    }

    /// Writes down for the agent and for users how to reach it.
    pub(super) fn introduce(&self, agent: &str, rundir: &Path) -> Result<()> {
        let Some(way) = &self.way else { return Ok(()) };
        let info = way.info(agent, way.address());
        files::write_json(&rundir.join("device-info.json"), &json!({"device_info": info}))?;
        files::replace(&rundir.join(SSH_CONFIG), way.ssh_config().as_bytes())
    }
}

impl Way {
    fn ssh_config(&self) -> String {
        let Self { ip, port, user, key, .. } = self;
        // The host key is that of every fork, so it proves nothing; the connection stays on this host.
        format!(
            "Host device {ip}\n  HostName {ip}\n  Port {port}\n  User {user}\n  IdentityFile \"{}\"\n  \
             IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n",
            key.display()
        )
    }

    /// What the agent is told.
    fn info(&self, agent: &str, address: Option<Ipv4Addr>) -> Value {
        let mut info = json!({"device_port": self.port, "agent_name": agent});
        if let Some(address) = address {
            info["device_ip"] = json!(address);
        }
        info
    }

    /// What the script of a job finds in its environment.
    pub(super) fn environment(&self, rundir: &Path) -> Vec<(&'static str, String)> {
        self.variables(rundir, self.address())
    }

    fn variables(&self, rundir: &Path, address: Option<Ipv4Addr>) -> Vec<(&'static str, String)> {
        let mut variables = vec![
            ("DEVICE_PORT", self.port.to_string()),
            ("DEVICE_USER", self.user.clone()),
            ("DEVICE_SSH_CONFIG", rundir.join(SSH_CONFIG).to_string_lossy().into_owned()),
        ];
        variables.extend(address.map(|address| ("DEVICE_IP", address.to_string())));
        let socket = self.ssh_agent.as_ref().map(|socket| socket.to_string_lossy().into_owned());
        variables.extend(socket.map(|socket| ("SSH_AUTH_SOCK", socket)));
        variables
    }

    /// The address, for who uses it without the port. `None` where `ssh` would then reach somebody else:
    /// this host itself. A script that wipes its device would wipe the host.
    pub(super) fn address(&self) -> Option<Ipv4Addr> {
        self.address_at(SSH)
    }

    /// As [`Self::address`], where `usual` is the port of those who say none.
    fn address_at(&self, usual: u16) -> Option<Ipv4Addr> {
        let other = SocketAddrV4::new(self.ip, usual).into();
        let is_trap =
            self.port != usual && TcpStream::connect_timeout(&other, Duration::from_secs(1)).is_ok();
        (!is_trap).then_some(self.ip)
    }

    /// A command line that leads in, from the run directory.
    pub(super) fn command(&self) -> String {
        format!("ssh -F {SSH_CONFIG} device")
    }

    /// A command line that leads in from elsewhere, for those who can log in to this host.
    pub(super) fn command_from_afar(&self) -> String {
        let host = rustix::system::uname();
        format!("ssh -J {} -p {} {}@{}", host.nodename().to_string_lossy(), self.port, self.user, self.ip)
    }
}

fn file(cache: &Path, agent: &str) -> PathBuf {
    cache.join("devices").join(format!("{}.json", crate::testflinger::file_name(agent)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use std::process::Command;

    fn way() -> Way {
        Way {
            qemu: Other::with_id(std::process::id()).expect("this runs"),
            ip: Ipv4Addr::new(127, 64, 1, 2),
            port: 22,
            user: "ubuntu".into(),
            key: "/k y/id".into(),
            ssh_agent: None,
            serial: "/serial.log".into(),
        }
    }

    fn sleeper() -> (process::Child, Machine) {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let child = process::spawn(sleep).expect("starts");
        let keeper = Other::with_id(child.id()).expect("runs");
        (child, Machine { job: "j1".into(), keeper, way: Some(way()), died: None })
    }

    #[test]
    fn it_is_found_by_its_agent_and_ended_once() {
        let cache = tempfile::tempdir().expect("temp dir");
        let (_child, machine) = sleeper();
        assert_eq!(Machine::find(cache.path(), "a/1"), None);
        machine.enter(cache.path(), "a/1").expect("is the first");
        assert_eq!(Machine::find(cache.path(), "a/1"), Some(machine.clone()));
        assert_eq!((Machine::find(cache.path(), "a2"), machine.ended()), (None, None));
        let qemu = Other { start_ticks: 1, ..way().qemu };
        let dead = Machine { way: Some(Way { qemu, ..way() }), ..machine.clone() };
        assert_eq!(dead.ended().as_deref(), Some("QEMU does not run any more"));
        assert_eq!(Machine::end(cache.path(), "a/1").expect("ends").as_deref(), Some("j1"));
        assert_eq!(machine.ended().as_deref(), Some("its keeper was killed"));
        assert_eq!(Machine::end(cache.path(), "a/1").expect("nothing to do"), None);
        assert_eq!(std::fs::read_dir(cache.path().join("devices")).expect("reads").count(), 0);
    }

    #[test]
    fn an_agent_has_one_machine_at_a_time() {
        let cache = tempfile::tempdir().expect("temp dir");
        let ((child, first), (_child, second)) = (sleeper(), sleeper());
        first.enter(cache.path(), "a1").expect("is the first");
        assert!(second.enter(cache.path(), "a1").expect_err("is not").to_string().contains("of job j1"));
        second.enter(cache.path(), "a2").expect("is another agent's");
        second.leave(cache.path(), "a1").expect("nothing to do");
        assert_eq!(Machine::find(cache.path(), "a1"), Some(first));
        drop(child);
        second.enter(cache.path(), "a1").expect("after one whose keeper was killed");
        assert_eq!(Machine::find(cache.path(), "a1"), Some(second));
    }

    #[test]
    fn agents_and_users_read_the_way_in() {
        let rundir = tempfile::tempdir().expect("temp dir");
        let (_child, machine) = sleeper();
        machine.introduce("a1", rundir.path()).expect("writes");
        let read = |name: &str| std::fs::read_to_string(rundir.path().join(name)).expect("reads");
        let info: serde_json::Value = serde_json::from_str(&read("device-info.json")).expect("JSON");
        let expected = json!({"device_ip": "127.64.1.2", "device_port": 22, "agent_name": "a1"});
        assert_eq!(info, json!({"device_info": expected}));
        let config = read(SSH_CONFIG);
        assert!(
            config.contains("IdentityFile \"/k y/id\"") && config.starts_with("Host device 127.64.1.2\n")
        );
    }

    #[test]
    fn a_script_is_not_led_to_the_host_itself() {
        let way = Way { port: 4022, ip: Ipv4Addr::LOCALHOST, ..way() };
        // A server of this host, on what is its usual port.
        let server = std::net::TcpListener::bind((way.ip, 0)).expect("binds");
        let usual = server.local_addr().expect("an address").port();
        assert_eq!(way.address_at(usual), None);
        let own = Way { port: usual, ..way.clone() };
        assert_eq!(own.address_at(usual), Some(way.ip), "that is the machine");
        let free = Way { ip: Ipv4Addr::new(127, 64, 1, 3), ..way.clone() };
        assert_eq!(free.address_at(usual), Some(free.ip), "nobody is there");
        let names = |address| way.variables(Path::new("/r"), address).into_iter().map(|(name, _)| name);
        assert!(
            names(None).all(|name| name != "DEVICE_IP")
                && names(Some(way.ip)).any(|name| name == "DEVICE_IP")
        );
        assert_eq!(way.info("a1", None), json!({"device_port": 4022, "agent_name": "a1"}));
        assert_eq!(way.info("a1", Some(way.ip))["device_ip"], "127.0.0.1");
    }
}
