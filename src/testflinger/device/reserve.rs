//! `reserve`: lets people in, and keeps the machine for them until the time is up.

use super::serial::Serial;
use super::{Site, request, say};
use crate::connection::ssh::Target;
use crate::connection::{Cmd, Connection, KeyPair, Ssh};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::process::quote;
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result, bail};
use jiff::{SignedDuration, Timestamp};
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

/// The first command over SSH takes a second or two.
const LET_IN: Duration = Duration::from_secs(60);
/// How often the machine is looked at.
const GLANCE: Duration = Duration::from_millis(500);

/// Returns when the time is up. A cancelled job ends it by a signal.
///
/// # Errors
/// When a key is not known, or the machine ends before its time.
pub(super) fn reserve(site: &Site) -> Result<()> {
    let keys = request::keys(&site.job, &site.config.ssh_keys)?;
    let limit = request::reservation(&site.job);
    let machine = site.machine(Phase::Reserve)?;
    let way = machine.way.context(Fault::host("the keeper does not tell the way into the machine"))?;
    let mut serial = Serial::follow(&way.serial, &site.rundir, Phase::Reserve);
    if !keys.is_empty() {
        let key = KeyPair::load_or_create(&site.cache.join("keys"))?;
        let target = Target::new(SocketAddrV4::new(way.ip, way.port).into(), &way.user, key);
        let deadline = Deadline::after(LET_IN, "letting the reservation's keys in");
        let script = "umask 077; mkdir -p ~/.ssh && cat >>~/.ssh/authorized_keys";
        let lines = keys.join("\n") + "\n";
        let let_in = Ssh::open(target, &deadline)
            .and_then(|mut ssh| ssh.run(Cmd::new(script).stdin(lines), &deadline).map(drop));
        let_in.context(Fault::machine("the keys of the reservation cannot be let in"))?;
    }
    let until =
        SignedDuration::try_from(limit).ok().and_then(|limit| Timestamp::now().checked_add(limit).ok());
    say("*** TESTFLINGER SYSTEM RESERVED ***");
    say(format!("On the agent's host: cd {} && {}", quote(&site.rundir.to_string_lossy()), way.command()));
    say(format!("From elsewhere:      {}", way.command_from_afar()));
    if let Some(until) = until {
        say(format!("It ends at {until:.0}, after {} seconds.", limit.as_secs()));
    }
    say(format!("To end it sooner:    testflinger-cli cancel {}", site.job.id()));
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if let Err(error) = site.living(Phase::Reserve) {
            bail!(error.context("the reservation ends early"));
        }
        std::thread::sleep(GLANCE.min(limit.saturating_sub(begun.elapsed())));
        serial.copy();
    }
    Ok(())
}
