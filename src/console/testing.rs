//! Guests without a machine: real shells on a real terminal, and a line that injects noise.

use super::Console;
use crate::process::{self, Child};
use crate::record::event::Events;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use tempfile::TempDir;

/// A console with a shell on a terminal behind it.
pub(crate) struct Guest {
    pub(crate) console: Console,
    pub(crate) logs: TempDir,
    _child: Child,
}

/// Starts `command` on a terminal of its own, by script(1), and attaches a console to it. `$DIR` is a
/// directory that goes with the guest.
pub(crate) fn guest(command: &str) -> Guest {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    guest_on(command, ours, theirs)
}

/// As [`guest`]; `noise(n)` is injected after the guest's `n`-th byte where it gives something.
pub(crate) fn noisy_guest(command: &str, noise: impl Fn(u64) -> Option<Vec<u8>> + Send + 'static) -> Guest {
    let (ours, near) = UnixStream::pair().expect("a socket pair");
    let (far, theirs) = UnixStream::pair().expect("a socket pair");
    let (mut from, mut to) = (far.try_clone().expect("clones"), near.try_clone().expect("clones"));
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut count = 0;
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let mut out = Vec::with_capacity(length);
            for &byte in &buffer[..length] {
                out.push(byte);
                count += 1;
                out.extend(noise(count).unwrap_or_default());
            }
            if to.write_all(&out).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (near, far);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    guest_on(command, ours, theirs)
}

fn guest_on(command: &str, ours: UnixStream, theirs: UnixStream) -> Guest {
    let logs = tempfile::tempdir().expect("temp dir");
    let mut script = Command::new("script");
    script
        .args(["-qfc", command, "/dev/null"])
        .env("PS1", "root@guest:~# ")
        .env("TERM", "vt100")
        .env("DIR", logs.path());
    let output = theirs.try_clone().expect("clones");
    script.stdin(OwnedFd::from(theirs)).stdout(OwnedFd::from(output));
    let child = process::spawn(script).expect("script(1) starts");
    let console = Console::attach(ours, logs.path(), Events::silent()).expect("attaches");
    Guest { console, logs, _child: child }
}

/// A console whose other end the test holds.
pub(crate) fn wire() -> (Console, UnixStream, TempDir) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let logs = tempfile::tempdir().expect("temp dir");
    let console = Console::attach(ours, logs.path(), Events::silent()).expect("attaches");
    (console, theirs, logs)
}
