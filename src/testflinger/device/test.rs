//! `runtest`: runs the script of a job on this host, beside the machine.

use super::machine::Machine;
use super::provision::end_with_parent;
use super::serial::Serial;
use super::{Site, failure, say};
use crate::fault::Fault;
use crate::process;
use crate::record::files;
use crate::testflinger::agent::{append, can_be_variable};
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// In the run directory, under the name that scripts may know.
const SCRIPT: &str = "tf_cmd_script";
/// How often the console is looked at; the script's end wakes us at once.
const GLANCE: Duration = Duration::from_millis(200);
/// How long a script may take to end after SIGTERM: as long as an agent waits.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the script to its end and gives its exit status.
///
/// # Errors
/// When there is no script, or the machine has ended before it could run.
pub(super) fn test(site: &Site) -> Result<u8> {
    let Some(script) = script(site)? else {
        say("The job has no `test_cmds`: there is nothing to run.");
        return Ok(0);
    };
    let mut command = command(&site.rundir, &script)?;
    command.stdin(Stdio::null()).env("AGENT_NAME", &site.agent);
    let secrets = site.job.secrets();
    command.envs(secrets.iter().filter(|(name, value)| can_be_variable(name, value)));
    let mut serial = None;
    // A job without a machine is one that works on the host.
    if site.job.asks_for(Phase::Provision) {
        let machine = site.machine(Phase::Test)?;
        if let Some(way) = &machine.way {
            command.envs(way.environment(&site.rundir));
            serial = Some(Serial::follow(&way.serial, &site.rundir, Phase::Test));
        }
    } else {
        say("The job has no `provision_data`: there is no machine.");
    }
    let told = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&told))
            .context(Fault::host("cannot install signal handlers"))?;
    }
    end_with_parent()?;
    let status = watch(command, &told, || serial.iter_mut().for_each(Serial::copy))?;
    let died = Machine::find(&site.cache, &site.agent).and_then(|machine| machine.died);
    if let Some(why) = died.filter(|_| serial.is_some()) {
        say(format!("The machine has ended meanwhile: {why}"));
    }
    Ok(code(status))
}

fn script(site: &Site) -> Result<Option<String>> {
    match site.job.data(Phase::Test).and_then(|data| data.get("test_cmds")) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(script)) => Ok((!script.trim().is_empty()).then(|| script.clone())),
        Some(_) => bail!(Fault::host("`test_cmds` is no text").fix("write it as one block: `test_cmds: |`")),
    }
}

/// Writes the script down. One that names no interpreter is for bash; and so that such a one needs no
/// file system on which programs may be run, bash is given it.
fn command(rundir: &Path, script: &str) -> Result<Command> {
    let path = rundir.join(SCRIPT);
    // Not through whatever is there.
    files::remove(&path)?;
    let write = || -> std::io::Result<()> {
        let mut file = append(&path)?;
        file.write_all(script.as_bytes())?;
        file.set_permissions(fs::Permissions::from_mode(0o700))
    };
    write().with_context(|| files::cannot("write", &path))?;
    if script.starts_with("#!") {
        return Ok(Command::new(path));
    }
    let bash = PathBuf::from("/bin/bash");
    let mut command = Command::new(if bash.exists() { bash } else { "/bin/sh".into() });
    command.arg(path);
    Ok(command)
}

/// Runs the command to its end. Once we are `told` to end, it is, and may do it in its own way; what it
/// leaves in the background may serve a later phase.
fn watch(command: Command, told: &AtomicBool, mut look: impl FnMut()) -> Result<ExitStatus> {
    let mut child = process::spawn(command)?;
    let mut ending: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait_alone()? {
            look();
            return Ok(status);
        }
        match ending {
            None if told.load(Ordering::SeqCst) => {
                child.signal(Signal::TERM);
                ending = Some(Instant::now());
            }
            Some(since) if since.elapsed() > GRACE => {
                child.signal(Signal::KILL);
            }
            _ => {}
        }
        process::wait_readable(child.pidfd(), GLANCE)?;
        look();
    }
}

/// As a shell says it. A script cannot say that its host is broken: the machine was made for it alone.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(1);
    match u8::try_from(code).unwrap_or(1) {
        failure::RECOVERY => {
            say("The script exited with 46, by which agents go offline. It is passed on as 1.");
            1
        }
        code => code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> (u8, String) {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut command = command(dir.path(), script).expect("writes");
        command.current_dir(dir.path()).stdout(fs::File::create(dir.path().join("out")).expect("makes"));
        let status = watch(command, &AtomicBool::new(false), || ()).expect("runs");
        (code(status), fs::read_to_string(dir.path().join("out")).expect("reads"))
    }

    #[test]
    fn a_script_runs_in_its_interpreter_and_its_status_is_the_phase_s() {
        assert_eq!(run("[[ a == a ]] && echo bash\nexit 7"), (7, "bash\n".into()));
        assert_eq!(run("#!/bin/cat\ntext\n"), (0, "#!/bin/cat\ntext\n".into()));
        assert_eq!(run("kill -9 $$").0, 137);
        assert_eq!(run("exit 46").0, 1, "a job must not take an agent offline");
    }

    #[test]
    fn what_stays_in_the_background_does_not_hold_the_phase() {
        let dir = tempfile::tempdir().expect("temp dir");
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 >/dev/null & echo $! >{}", pid.display());
        assert_eq!(run(&script).0, 0);
        let pid: u32 = fs::read_to_string(pid).expect("reads").trim().parse().expect("a number");
        let other = process::Other::with_id(pid).expect("it runs");
        assert!(other.kill().expect("ends"));
    }
}
