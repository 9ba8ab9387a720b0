//! `provision`: has a keeper make a machine, and waits until it can be used.

use super::keeper::{NOTES, Word, rebuild};
use super::machine::Machine;
use super::{Site, say, serial};
use crate::deadline::Stop;
use crate::fault::{Fault, visible};
use crate::process;
use crate::record::files;
use crate::testflinger::agent::append;
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result};
use rustix::process::Signal;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// In the run directory: what a keeper says that ends in a way that nobody foresaw.
const LOG: &str = "device.log";

/// Makes the machine of a job, after whatever a job before it left here.
///
/// # Errors
/// Why there is none.
pub(super) fn provision(site: &Site, keeper: Command) -> Result<()> {
    process::handle_signals()?;
    end_with_parent()?;
    // Before anything is started: most mistakes of jobs are seen here.
    site.wish()?;
    if let Some(job) = Machine::end(&site.cache, &site.agent)? {
        say(format!("The machine of job {job}, which nobody had cleaned up, has ended."));
    }
    let begun = Instant::now();
    let mut keeper = start(site, keeper)?;
    let made = listen(site, &mut keeper);
    serial::copy_all(&site.rundir.join(NOTES), &site.rundir, Phase::Provision);
    if let Err(error) = made {
        // Not that of another job, which may be why there is none.
        if Machine::find(&site.cache, &site.agent).is_some_and(|machine| machine.keeper.id == keeper.id()) {
            Machine::end(&site.cache, &site.agent)?;
        }
        return Err(error);
    }
    let machine = site.machine(Phase::Provision)?;
    let way = machine.way.context(Fault::host("the keeper does not tell the way into the machine"))?;
    say(format!(
        "The machine is ready after {:.1} s: {}@{} port {}",
        begun.elapsed().as_secs_f64(),
        way.user,
        way.ip,
        way.port
    ));
    say(format!("In the test: {}", way.command()));
    if way.address().is_none() {
        say(format!(
            "DEVICE_IP is not set in the test, since port 22 of {} is this host's own SSH server. Where \
             that listens on certain addresses only (`ListenAddress`), the machine gets the port.",
            way.ip
        ));
    }
    Ok(())
}

/// Ends with the shell that started us: an agent may kill that and nothing else.
pub(super) fn end_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .context(Fault::host("cannot be told of the end of the agent's shell"))
}

fn start(site: &Site, mut keeper: Command) -> Result<Child> {
    let log = site.rundir.join(LOG);
    let log = append(&log).with_context(|| files::cannot("write", &log))?;
    // Not `process::spawn`: it is to outlive us.
    keeper.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    keeper.spawn().context(Fault::host("cannot start the keeper of the machine"))
}

/// Waits for a keeper's last word.
fn listen(site: &Site, child: &mut Child) -> Result<()> {
    let stdout = child.stdout.take().context(Fault::host("the keeper has no output"))?;
    let (words, inbox) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if words.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        let line = match inbox.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) if process::interrupted() => return Err(Stop::Interrupted.into()),
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => {
                let end = child.wait().map_or_else(|error| error.to_string(), process::describe);
                return Err(Fault::host(format!("the keeper of the machine ended with {end}"))
                    .fix(format!("see {}", site.rundir.join(LOG).display()))
                    .into());
            }
        };
        match serde_json::from_str(&line) {
            Ok(Word::Note(text)) => say(visible(&text)),
            Ok(Word::Ready) => return Ok(()),
            Ok(Word::Failed { code, chain }) => return Err(rebuild(code, chain)),
            Err(_) => say(visible(&line)),
        }
    }
}
