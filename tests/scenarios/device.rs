//! `shakedown device` with its machine, called as an agent calls it.

use shakedown::prelude::*;
use shakedown::process::Other;
use shakedown::vm::register::{self, Running};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// An agent's host: a run directory, and the cache that all machines here share.
struct Host {
    _dir: tempfile::TempDir,
    agent: String,
    rundir: PathBuf,
}

impl Host {
    fn new(test_cmds: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let rundir = dir.path().canonicalize()?.join("j1");
        std::fs::create_dir(&rundir)?;
        std::fs::write(rundir.join("../device.yaml"), "user: tester\n")?;
        let name = dir.path().file_name().context("a name")?.to_string_lossy().into_owned();
        let host = Self { agent: format!("scenario{name}"), rundir, _dir: dir };
        host.job(&format!(
            r#"{{"job_id": "j1", "provision_data": {{"distro": "debian"}},
                 "test_data": {{"test_cmds": "{test_cmds}"}}, "reserve_data": {{"timeout": 1, "ssh_keys": []}}}}"#
        ))?;
        Ok(host)
    }

    fn job(&self, job: &str) -> Result<()> {
        Ok(std::fs::write(self.rundir.join("testflinger.json"), job)?)
    }

    fn call(&self, stage: &str) -> Result<(Option<i32>, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
        command.args(["device", stage, "-c", "../device.yaml", "testflinger.json"]);
        command.current_dir(&self.rundir).env("agent_id", &self.agent).stdin(Stdio::null());
        command.env_remove("SHAKEDOWN_IMAGE").env_remove("SHAKEDOWN_DEBUG");
        let output = command.output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    }

    fn succeed(&self, stage: &str) -> Result<String> {
        let (code, said) = self.call(stage)?;
        ensure!(code == Some(0), "{stage} ended with {code:?}: {said}");
        Ok(said)
    }

    /// The machines that run for this host.
    fn machines(&self) -> Result<Vec<Running>> {
        let mut list = register::list(&shakedown::host::cache_dir()?)?;
        list.retain(|running| running.evidence.starts_with(&self.rundir));
        Ok(list)
    }

    fn wait(&self, whose: &str, ended: impl Fn() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !ended() {
            ensure!(begun.elapsed() < Duration::from_secs(60), "{whose} lives on");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn read(&self, name: &str) -> Result<String> {
        std::fs::read_to_string(self.rundir.join(name)).with_context(|| name.to_owned())
    }
}

/// True while a process has this among its arguments.
fn is_argument(word: &str) -> bool {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines.any(|line| line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes()))
}

/// Whatever a scenario does, its machine ends with it.
impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.call("cleanup");
    }
}

#[scenario(markers = [vm], timeout = "10m")]
fn a_fork_is_the_device_of_a_job() -> Result<()> {
    let host = Host::new(
        "ssh -F $DEVICE_SSH_CONFIG device 'id -u; echo on the console >/dev/ttyS0'; \
         ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
         -p $DEVICE_PORT tester@${DEVICE_IP:-127.0.0.1} 'id -u; exit 4'",
    )?;
    host.succeed("provision")?;
    ensure!(host.machines()?.len() == 1, "one machine runs: {:?}", host.machines()?);
    let info = host.read("device-info.json")?;
    ensure!(info.contains(&host.agent) && info.contains("\"device_ip\": \"127."), "{info}");
    let (code, said) = host.call("runtest")?;
    ensure!(code == Some(4) && said == "0\n0\n", "{code:?} {said}");
    ensure!(host.read("test-serial.log")?.contains("on the console"), "no console of the test");
    let said = host.succeed("reserve")?;
    ensure!(said.contains("SYSTEM RESERVED") && said.contains("after 1 seconds"), "{said}");
    ensure!(host.succeed("cleanup")? == "The machine of job j1 has ended.\n", "it is ended once");
    ensure!(host.machines()?.is_empty(), "nothing runs after it");
    ensure!(host.succeed("cleanup")? == "There is no machine to end.\n", "and not twice");
    Ok(())
}

#[scenario(markers = [vm], timeout = "10m")]
fn a_device_that_nobody_cleaned_up_ends_with_the_next_job_or_its_directory() -> Result<()> {
    let host = Host::new("echo $SSH_AUTH_SOCK")?;
    host.succeed("provision")?;
    let first = host.machines()?;
    ensure!(host.succeed("provision")?.contains("which nobody had cleaned up"), "the first one was left");
    let second = host.machines()?;
    ensure!(second.len() == 1 && first != second, "the first one has ended: {second:?}");
    // Nothing outlives a keeper, however that ends.
    let socket = host.succeed("runtest")?;
    ensure!(is_argument(socket.trim()), "an ssh-agent listens on {socket:?}");
    Other::with_id(second[0].owner).context("a keeper")?.kill()?;
    let (code, said) = host.call("runtest")?;
    ensure!(code == Some(1) && said.contains("its keeper was killed"), "{code:?} {said}");
    host.wait("QEMU", || !second[0].process.lives())?;
    host.wait("ssh-agent", || !is_argument(socket.trim()))?;
    host.succeed("provision")?;
    let third = host.machines()?;
    std::fs::rename(&host.rundir, host.rundir.with_extension("gone"))?;
    host.wait("QEMU", || !third.iter().any(|running| running.process.lives()))?;
    std::fs::rename(host.rundir.with_extension("gone"), &host.rundir)?;
    Ok(())
}
