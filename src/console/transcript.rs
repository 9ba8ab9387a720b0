//! The evidence of a serial line: `serial.log` and `console.cast`.
//!
//! Both are written through as bytes come, without a buffer of our own: what was received before a
//! `kill -9` is in the files. Neither grows beyond its limit, whatever the guest prints. Only writes.

use crate::fault::Fault;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Shown in place of what must not be in a file.
const HIDDEN: &str = "********";

/// How large each file may become: a guest can print without end.
const MOST: u64 = 64 << 20;

/// The two files.
#[derive(Debug)]
pub(crate) struct Transcript {
    began: Instant,
    serial: Bounded,
    cast: Bounded,
    /// The beginning of a character whose end has not come yet.
    partial: Vec<u8>,
}

impl Transcript {
    /// Creates `serial.log` (the guest's bytes as they came) and `console.cast` (asciicast v2,
    /// <https://docs.asciinema.org/manual/asciicast/v2/>: `o` is from the guest, `i` to it).
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        Self::create_with(dir, MOST)
    }

    fn create_with(dir: &Path, most: u64) -> Result<Self> {
        let create = |name: &str| {
            let path = dir.join(name);
            Bounded::open(&path, most)
                .with_context(|| Fault::host(format!("cannot write {}", path.display())))
        };
        let (serial, mut cast) = (create("serial.log")?, create("console.cast")?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let header = json!({"version": 2, "width": 80, "height": 24, "timestamp": now});
        cast.write(format!("{header}\n").as_bytes(), str::to_owned)
            .context(Fault::host(format!("cannot write into {}", dir.display())))?;
        Ok(Self { began: Instant::now(), serial, cast, partial: Vec::new() })
    }

    /// Bytes from the guest.
    pub(crate) fn received(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.serial.write(bytes, |note| format!("\n{note}\n"))?;
        self.partial.extend_from_slice(bytes);
        let text = take_text(&mut self.partial);
        self.event("o", &text)
    }

    /// Text typed at the guest; a secret one leaves no trace but that it was typed.
    pub(crate) fn typed(&mut self, text: &str, secret: bool) -> io::Result<()> {
        self.event("i", if secret { HIDDEN } else { text })
    }

    fn event(&mut self, direction: &str, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let micros = self.began.elapsed().as_micros();
        let seconds = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
        let line = |text: &str| format!("[{seconds}, \"{direction}\", {}]\n", json!(text));
        self.cast.write(line(text).as_bytes(), |note| line(&format!("\r\n{note}\r\n")))
    }
}

/// A file that takes no more once it is full.
#[derive(Debug)]
struct Bounded {
    file: File,
    length: u64,
    most: u64,
    full: bool,
}

impl Bounded {
    fn open(path: &Path, most: u64) -> io::Result<Self> {
        let file = File::options().create(true).append(true).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length, most, full: length > most })
    }

    /// Writes all of `bytes`, or in their place, once, the note that this is the end of the file.
    fn write(&mut self, bytes: &[u8], note: impl FnOnce(&str) -> String) -> io::Result<()> {
        if self.full {
            return Ok(());
        }
        self.length += bytes.len() as u64;
        self.full = self.length > self.most;
        if self.full {
            let end = format!("[shakedown: this file has {} MiB; what comes is left out]", self.most >> 20);
            return self.file.write_all(note(&end).as_bytes());
        }
        self.file.write_all(bytes)
    }
}

/// Takes the whole characters out of `bytes` and leaves an unfinished one. What is no UTF-8 is
/// replaced.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // Of several faults only the last one can be unfinished.
        Err(_) => {
            let last = bytes.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
            let unfinished = std::str::from_utf8(last).is_err_and(|e| e.error_len().is_none());
            bytes.len() - if unfinished { last.len() } else { 0 }
        }
        Ok(_) => bytes.len(),
    };
    let rest = bytes.split_off(whole);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn both_files_have_what_came_and_what_was_typed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut transcript = Transcript::create(dir.path()).expect("creates");
        transcript.received(b"gr\xc3").expect("writes");
        transcript.received(b"\xbc\xc3\x9fe\xff\r\n").expect("writes");
        transcript.typed("root\n", false).expect("writes");
        transcript.typed("hunter2\n", true).expect("writes");
        // Read while the writer is alive: nothing may sit in a buffer.
        let serial = std::fs::read(dir.path().join("serial.log")).expect("reads");
        assert_eq!(serial, b"gr\xc3\xbc\xc3\x9fe\xff\r\n");
        let cast = std::fs::read_to_string(dir.path().join("console.cast")).expect("reads");
        let lines: Vec<Value> =
            cast.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect();
        assert_eq!(lines[0]["version"], 2);
        let output: String = lines.iter().filter(|l| l[1] == "o").filter_map(|l| l[2].as_str()).collect();
        assert_eq!(output, "grüße\u{fffd}\r\n");
        let typed: Vec<_> = lines.iter().filter(|l| l[1] == "i").filter_map(|l| l[2].as_str()).collect();
        assert_eq!(typed, ["root\n", HIDDEN]);
    }

    #[test]
    fn a_guest_that_prints_without_end_does_not_fill_the_disk() {
        let dir = tempfile::tempdir().expect("temp dir");
        let most = 1 << 20;
        let mut transcript = Transcript::create_with(dir.path(), most).expect("creates");
        for _ in 0..100 {
            transcript.received(&[0x1b; 64 << 10]).expect("writes");
            transcript.typed("\x03", false).expect("writes");
        }
        for name in ["serial.log", "console.cast"] {
            let text = std::fs::read_to_string(dir.path().join(name)).expect("reads");
            assert!((text.len() as u64) < most + 200, "{name}: {}", text.len());
            assert_eq!(text.matches("[shakedown: this file has 1 MiB").count(), 1, "{name}");
            if name == "console.cast" {
                assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn characters_survive_cuts(bytes: Vec<u8>, cut in 0usize..100) {
            let cut = cut.min(bytes.len());
            let mut pending = bytes[..cut].to_vec();
            let mut text = take_text(&mut pending);
            pending.extend(&bytes[cut..]);
            text += &take_text(&mut pending);
            text += &String::from_utf8_lossy(&pending);
            proptest::prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
