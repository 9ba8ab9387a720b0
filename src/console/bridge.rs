//! A person at the serial console: bytes both ways, as they are.
//!
//! What the person types is not in the evidence, for it may be a password; what the guest shows is.
//! Knows nothing of the person's terminal, which its owner has put into raw mode.

use super::{Console, Keyboard, WaitError};
use crate::deadline::{Deadline, Stop};
use crate::process;
use anyhow::{Context, Result};
use std::fmt;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Ctrl-], as telnet(1) and virsh(1) have it: no program in the guest needs it much.
pub const ESCAPE: u8 = 0x1d;
/// How often Ctrl-C from outside, the deadline and the end of the line are looked for.
const SLICE: Duration = Duration::from_millis(100);
/// A guest that takes no input for so long loses it, so that its person can still leave.
const DEAF: Duration = Duration::from_secs(2);

/// Where the guest's bytes are shown besides.
#[derive(Default)]
pub(super) struct Screen(Mutex<Option<Box<dyn Write + Send>>>);

impl Screen {
    pub(super) fn show(&self, bytes: &[u8]) {
        if let Some(screen) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // A terminal that has gone also ends its keys, which ends the bridge.
            let _ = screen.write_all(bytes).and_then(|()| screen.flush());
        }
    }

    fn set(&self, screen: Option<Box<dyn Write + Send>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = screen;
    }
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Screen")
    }
}

impl Console {
    /// Joins the line with a person: `keys` are sent to the guest, and what it prints from now on is
    /// shown on `screen`. `begin` is sent first. Ends with [`ESCAPE`], the end of the keys, or the end
    /// of the machine.
    ///
    /// # Errors
    /// [`Stop`] when the time is up, and when the keys cannot be read.
    pub fn bridge(
        &self,
        begin: &str,
        mut keys: impl Read + AsFd,
        screen: impl Write + Send + 'static,
        deadline: &Deadline,
    ) -> Result<()> {
        self.line.screen.set(Some(Box::new(screen)));
        let result = self.pass_keys(begin, &mut keys, deadline);
        self.line.screen.set(None);
        result
    }

    fn pass_keys(&self, begin: &str, keys: &mut (impl Read + AsFd), deadline: &Deadline) -> Result<()> {
        let mut buffer = [0; 4096];
        let mut rest = begin.as_bytes().to_vec();
        loop {
            let deaf = deadline.within(DEAF, "a guest that takes no input");
            match Keyboard::new(&self.line, &deaf).put(&rest) {
                Ok(()) | Err(WaitError::Stopped(Stop::Expired { .. })) => {}
                Err(WaitError::Closed) => return Ok(()),
                Err(WaitError::Stopped(stop)) => return Err(stop.into()),
            }
            rest.clear();
            while !process::wait_readable(&*keys, deadline.slice(SLICE))? {
                deadline.check()?;
                if self.line.feed.is_closed() {
                    return Ok(());
                }
            }
            let count = keys.read(&mut buffer).context("cannot read the keyboard")?;
            let typed = &buffer[..count];
            let left = typed.iter().position(|byte| *byte == ESCAPE);
            rest.extend_from_slice(&typed[..left.unwrap_or(count)]);
            if count == 0 || left.is_some() {
                let _ = Keyboard::new(&self.line, &deaf).put(&rest);
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::wire;
    use super::*;
    use std::os::unix::net::UnixStream;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10), "test")
    }

    fn read(from: &mut impl Read, count: usize) -> String {
        let mut bytes = vec![0; count];
        from.read_exact(&mut bytes).expect("comes");
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn bytes_go_both_ways_until_the_escape() {
        let (console, mut guest, logs) = wire();
        guest.write_all(b"before ").expect("writes");
        console.first_output(&soon()).expect("heard");
        let (mut person, keys) = UnixStream::pair().expect("a socket pair");
        let (mut shown, screen) = UnixStream::pair().expect("a socket pair");
        let bridge = std::thread::spawn(move || console.bridge("\n", keys, screen, &soon()));
        assert_eq!(read(&mut guest, 1), "\n", "what comes first");
        guest.write_all(b"\x1b[1mlogin: ").expect("writes");
        assert_eq!(read(&mut shown, 11), "\x1b[1mlogin: ", "raw, and nothing of before");
        person.write_all(b"secret\x03\x1dnot this").expect("writes");
        assert_eq!(read(&mut guest, 7), "secret\x03");
        bridge.join().expect("joins").expect("ends well");
        assert_eq!(shown.read(&mut [0]).expect("closed"), 0, "nothing is shown any more");
        let cast = std::fs::read_to_string(logs.path().join("console.cast")).expect("reads");
        assert!(cast.contains("login: ") && !cast.contains("secret"), "{cast}");
    }

    #[test]
    fn it_ends_with_the_machine_with_the_keys_and_with_the_time() {
        let (console, guest, _logs) = wire();
        let (person, keys) = UnixStream::pair().expect("a socket pair");
        let again = keys.try_clone().expect("clones");
        let over = Deadline::after(Duration::ZERO, "test");
        let late = console.bridge("", again, std::io::sink(), &over).expect_err("no time");
        assert_eq!(late.downcast_ref(), Some(&over.expiry()));
        let again = keys.try_clone().expect("clones");
        person.shutdown(std::net::Shutdown::Both).expect("shuts");
        console.bridge("", again, std::io::sink(), &soon()).expect("the person has gone");
        let (_person, keys) = UnixStream::pair().expect("a socket pair");
        drop(guest);
        console.bridge("", keys, std::io::sink(), &soon()).expect("the machine has gone");
    }
}
