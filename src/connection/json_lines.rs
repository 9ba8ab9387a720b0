//! One JSON value a line over a socket, with a deadline on every wait: the framing that QMP and the
//! guest agent share.

use crate::deadline::{Deadline, Stop};
use crate::process::wait_readable;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The guest agent's longest answer is two streams of 16 MiB in base64.
const LONGEST_LINE: usize = 64 << 20;

/// A socket that speaks JSON lines.
#[derive(Debug)]
pub(crate) struct JsonLines {
    stream: UnixStream,
    received: Vec<u8>,
}

/// Why there is no next value.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinesError {
    #[error("the other end has closed")]
    Closed,
    #[error("not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    #[error(transparent)]
    Stopped(#[from] Stop),
    #[error("the socket broke: {0}")]
    Io(#[from] io::Error),
}

impl JsonLines {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new() })
    }

    pub(crate) fn send(&mut self, value: &Value, deadline: &Deadline) -> Result<(), LinesError> {
        let mut line = value.to_string();
        line.push('\n');
        self.send_bytes(line.as_bytes(), deadline)
    }

    pub(crate) fn send_bytes(&mut self, mut bytes: &[u8], deadline: &Deadline) -> Result<(), LinesError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        deadline.check()?;
                        // The other end is slow to read; nothing but time tells when it goes on.
                        std::thread::sleep(deadline.slice(Duration::from_millis(2)));
                    }
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::BrokenPipe => return Err(LinesError::Closed),
                    _ => return Err(error.into()),
                },
            }
        }
        Ok(())
    }

    /// The next line as a value. What precedes a byte 0xFF in it is dropped: with that the guest
    /// agent marks the end of what an earlier client was still owed.
    pub(crate) fn receive(&mut self, deadline: &Deadline) -> Result<Value, LinesError> {
        let mut seen = 0;
        loop {
            if self.received.len() > LONGEST_LINE {
                return Err(io::Error::other("a line is longer than any answer").into());
            }
            // Also while there is something to read: a guest may never stop to talk.
            deadline.check()?;
            if let Some(end) = self.received[seen..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=seen + end).collect();
                let fresh = line.iter().rposition(|b| *b == 0xff).map_or(0, |mark| mark + 1);
                return Ok(serde_json::from_slice(&line[fresh..])?);
            }
            seen = self.received.len();
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(LinesError::Closed),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        deadline.check()?;
                        let slice = deadline.slice(Duration::from_millis(200));
                        wait_readable(&self.stream, slice).map_err(io::Error::other)?;
                    }
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(LinesError::Closed),
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline() -> Deadline {
        Deadline::after(Duration::from_secs(10), "test")
    }

    #[test]
    fn values_may_come_in_pieces_and_several_at_once() {
        let (ours, mut theirs) = UnixStream::pair().expect("socketpair");
        let mut lines = JsonLines::new(ours).expect("non-blocking");
        theirs.write_all(b"{\"a\":1}\r\n{\"b\"").expect("writes");
        assert_eq!(lines.receive(&deadline()).expect("whole")["a"], 1);
        theirs.write_all(b":2}\n").expect("writes");
        assert_eq!(lines.receive(&deadline()).expect("whole")["b"], 2);
        drop(theirs);
        assert!(matches!(lines.receive(&deadline()), Err(LinesError::Closed)));
    }

    #[test]
    fn what_an_earlier_client_was_owed_is_dropped() {
        let (ours, mut theirs) = UnixStream::pair().expect("socketpair");
        let mut lines = JsonLines::new(ours).expect("non-blocking");
        theirs.write_all(b"{\"half\":\xff{\"return\":7}\n").expect("writes");
        assert_eq!(lines.receive(&deadline()).expect("whole")["return"], 7);
    }
}
