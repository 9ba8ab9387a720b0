//! An ssh-agent(1) that has the machine's key: with it `ssh user@$DEVICE_IP` of a job's script needs no
//! option for the key, as on a machine of a lab.

use crate::connection::KeyPair;
use crate::deadline::Deadline;
use crate::host::tools::Search;
use crate::process::{self, Child};
use anyhow::{Context, Result};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// It takes milliseconds.
const START: Duration = Duration::from_secs(10);
/// A socket's path must fit into `sun_path`: unix(7).
const LONGEST: usize = 107;

/// Ends with this value.
pub(super) struct SshAgent {
    pub(super) socket: PathBuf,
    _child: Child,
}

impl SshAgent {
    /// Starts one with its socket in `directory`, which is the owner's alone. `None` where this host
    /// has no `ssh-agent`, or the path is too long for a socket.
    ///
    /// # Errors
    /// When it does not take the key.
    pub(super) fn start(directory: &Path, key: &KeyPair) -> Result<Option<Self>> {
        let socket = directory.join("ssh-agent");
        let Some(file) = key.file() else { return Ok(None) };
        let search = Search::from_env();
        let [Some(setpriv), Some(agent), Some(add)] =
            ["setpriv", "ssh-agent", "ssh-add"].map(|program| search.find(program))
        else {
            return Ok(None);
        };
        if socket.as_os_str().len() > LONGEST {
            return Ok(None);
        }
        let mut command = Command::new(setpriv);
        // It is setgid, by which it would lose its tie to our life: prctl(2), PR_SET_PDEATHSIG.
        command
            .arg("--no-new-privs")
            .arg(agent)
            .args(["-D", "-a"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = process::spawn(command)?;
        let (_, stdout, _) = child.pipes();
        // It says where it listens once it does.
        let mut line = String::new();
        BufReader::new(stdout.context("ssh-agent has no output")?).read_line(&mut line)?;
        let mut command = Command::new(add);
        command.arg("-q").arg(file).env("SSH_AUTH_SOCK", &socket);
        process::output(command, &Deadline::after(START, "giving the key to ssh-agent"))?;
        Ok(Some(Self { socket, _child: child }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_the_key_and_ends() {
        let dir = tempfile::tempdir().expect("temp dir");
        let key = KeyPair::load_or_create(&dir.path().join("keys")).expect("makes");
        let agent = SshAgent::start(dir.path(), &key).expect("starts").expect("openssh-client is here");
        let mut list = Command::new("ssh-add");
        list.arg("-L").env("SSH_AUTH_SOCK", &agent.socket);
        let deadline = Deadline::after(START, "test");
        let keys = process::output(list, &deadline).expect("lists");
        assert_eq!(keys.split(' ').nth(1), key.public_line().split(' ').nth(1));
        let socket = agent.socket.clone();
        drop(agent);
        assert!(std::os::unix::net::UnixStream::connect(socket).is_err());
    }

    #[test]
    fn where_a_socket_cannot_be_there_is_none() {
        let dir = tempfile::tempdir().expect("temp dir");
        let key = KeyPair::load_or_create(&dir.path().join("keys")).expect("makes");
        let deep = dir.path().join("x".repeat(120));
        assert!(SshAgent::start(&deep, &key).expect("is no error").is_none());
    }
}
