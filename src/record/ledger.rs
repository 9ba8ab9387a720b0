//! The ledger: an append-only JSONL file with one record per scenario execution.
//!
//! Owns how a line is written and read. What a sound line is, says [`check`]; what the lines mean
//! together is for reports to say.

mod check;
mod legacy;

pub use check::check;

use super::files;
use super::metadata::{
    BootKind, Diagnostic, Git, Host, Image, Metadata, Outcome, Qemu, SCHEMA_VERSION, Ssh, Timeouts, Timings,
    Utc,
};
use crate::fault::Fault;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A year: nothing runs longer, and times are added up.
pub(super) const MOST_SECONDS: f64 = 31_536_000.0;

/// One line of the ledger.
///
/// A line of the original project, which has no `schema_version`, is read as a record of version 0
/// with an empty `run_id`, `scenario` and `host`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // the fields are named for what they hold, and described in `Metadata`
pub struct Record {
    pub schema_version: u32,
    /// When the scenario ended.
    pub timestamp: Utc,
    /// The name of the run directory.
    pub run_id: String,
    pub scenario: String,
    pub attempt: u32,
    pub markers: Vec<String>,
    pub outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The whole execution; zero where nothing ran.
    pub duration_seconds: f64,
    pub boot: BootKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<Image>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_ceiling_exceeded: Option<bool>,
    pub timeouts: Timeouts,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<Ssh>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<Qemu>,
    /// `metadata.json`; absent, like the logs, where nothing ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub harness_log: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_log: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Diagnostic>,
    pub harness_args: Vec<String>,
    pub host: Host,
    pub git: Option<Git>,
    pub env: BTreeMap<String, String>,
}

impl Record {
    /// The line for what `metadata` says, with its evidence in `directory` if there is any.
    ///
    /// Without an outcome it is `error`: whoever ends an execution has to say how.
    pub(crate) fn of(metadata: &Metadata, directory: Option<&Path>) -> Self {
        let m = metadata.clone();
        let ran = directory.is_some();
        let (harness_log, serial_log) = m.logs.map(|logs| (logs.harness, logs.serial)).unzip();
        Self {
            schema_version: m.schema_version,
            timestamp: m.timings.end.unwrap_or(m.generated_at),
            run_id: m.run_id,
            scenario: m.scenario,
            attempt: m.attempt,
            markers: m.markers,
            outcome: m.outcome.unwrap_or(Outcome::Error),
            reason: m.reason,
            duration_seconds: m.timings.total_seconds.unwrap_or(0.0),
            boot: m.boot,
            accelerator: m.accelerator,
            firmware: m.firmware,
            image: m.image,
            timings: ran.then_some(m.timings),
            session_ceiling_exceeded: m.session_ceiling_exceeded,
            timeouts: m.timeouts,
            ssh: m.ssh,
            qemu: m.qemu,
            metadata: directory.map(|directory| directory.join("metadata.json")),
            harness_log,
            serial_log,
            diagnostics: m.diagnostics.map(|d| d.artifacts).unwrap_or_default(),
            harness_args: m.harness_args,
            host: m.host,
            git: m.git,
            env: m.env,
        }
    }

    /// True when it is about an execution, and not about one that did not happen.
    pub fn ran(&self) -> bool {
        self.metadata.is_some()
    }

    /// True when both are about the same execution. Within a run, a scenario may be put off and
    /// executed after all: by a retry of nextest.
    pub fn same_execution(&self, other: &Self) -> bool {
        let id = |record: &Self| (record.ran(), record.attempt);
        (id(self), &self.run_id, &self.scenario) == (id(other), &other.run_id, &other.scenario)
    }
}

/// Appends lines in one write under a lock, and makes the file and its directory where missing.
///
/// What a writer that died left of its line is moved to `<ledger>.torn` first; a [`sweep`](super::sweep)
/// restores the record from its run directory.
///
/// # Errors
/// A host [`Fault`] when the ledger cannot be written; it is then as it was before.
pub fn append(path: &Path, records: &[Record]) -> Result<()> {
    let mut text = Vec::new();
    for record in records {
        serde_json::to_writer(&mut text, record).context(Fault::host("cannot write a ledger line"))?;
        text.push(b'\n');
    }
    write(path, text).with_context(|| {
        Fault::host(format!("cannot write the ledger {}", path.display()))
            .fix("make it writable, or set BOOT_IMAGE_VM_LEDGER_PATH, or BOOT_IMAGE_VM_DISABLE_LEDGER=1")
    })
}

fn write(path: &Path, mut text: Vec<u8>) -> Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut file = private().read(true).open(path)?;
    files::lock(&file, path)?;
    let mut length = file.metadata()?.len();
    if length > 0 {
        let mut last = [0];
        file.read_exact_at(&mut last, length - 1)?;
        if last != *b"\n" {
            let fragment = fragment(path)?;
            if parse(&fragment).is_ok() {
                text.insert(0, b'\n');
            } else {
                length -= fragment.len() as u64;
                set_aside(path, fragment)?;
                file.set_len(length)?;
            }
        }
    }
    let written = file.write(&text)?;
    if written < text.len() {
        file.set_len(length)?;
    }
    ensure!(
        written == text.len(),
        "only {written} of {} bytes could be written: the disk is full",
        text.len()
    );
    Ok(())
}

/// What follows the last newline. Rare enough to read the whole ledger for it.
fn fragment(path: &Path) -> Result<Vec<u8>> {
    let mut text = std::fs::read(path)?;
    let start = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    Ok(text.split_off(start))
}

/// Nothing that was ever written is thrown away. Killed in between, it is there twice.
fn set_aside(path: &Path, mut fragment: Vec<u8>) -> Result<()> {
    let mut torn = path.as_os_str().to_owned();
    torn.push(".torn");
    fragment.push(b'\n');
    private().open(torn)?.write_all(&fragment)?;
    Ok(())
}

/// To append to a file that, where we make it, is its owner's alone: reasons and command lines may
/// have what others must not read.
fn private() -> OpenOptions {
    let mut options = File::options();
    options.create(true).append(true).mode(0o600);
    options
}

/// True when the ledger has a sound line for the same execution as `record`.
pub(crate) fn has(path: &Path, record: &Record) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    for line in lines(path)? {
        let found = line.map_err(anyhow::Error::new)?;
        // Parsing every line of a long ledger would cost seconds; most are of other runs.
        let ours = contains(&found.text, record.run_id.as_bytes());
        if ours && parse(&found.text).is_ok_and(|other| other.same_execution(record)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len().max(1)).any(|window| window == needle)
}

/// Something wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problem {
    /// The line's number, from 1.
    pub line: usize,
    /// What is wrong, with the field's name.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// The records of a ledger in order. A line that is none is a [`Problem`] in its place.
///
/// # Errors
/// A host [`Fault`] when the file cannot be opened.
pub fn read(path: &Path) -> Result<impl Iterator<Item = Result<Record, Problem>> + use<>> {
    Ok(lines(path)?.map(|line| {
        let line = line?;
        parse(&line.text).map_err(|what| Problem { line: line.number, what: what.join("; ") })
    }))
}

/// A line as it is in the file.
struct Line {
    number: usize,
    /// Without its newline.
    text: Vec<u8>,
    /// It ends in a newline.
    whole: bool,
}

fn lines(path: &Path) -> Result<impl Iterator<Item = Result<Line, Problem>> + use<>> {
    let file = File::open(path).with_context(|| {
        files::cannot("read the ledger", path).fix("give the path of a ledger; each run appends to its own")
    })?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut number = 0;
    let mut done = false;
    Ok(std::iter::from_fn(move || {
        if done {
            return None;
        }
        number += 1;
        let mut text = Vec::new();
        match reader.read_until(b'\n', &mut text) {
            Ok(0) => None,
            Ok(_) => {
                let whole = text.last() == Some(&b'\n');
                text.truncate(text.len() - usize::from(whole));
                Some(Ok(Line { number, text, whole }))
            }
            Err(error) => {
                done = true;
                Some(Err(Problem { line: number, what: format!("cannot be read: {error}") }))
            }
        }
    }))
}

/// The record in one line that somebody else wrote: of this version, and sound in itself.
///
/// # Errors
/// What is wrong with it, with the names of the fields.
pub fn parse_line(line: &[u8]) -> Result<Record, String> {
    let record = parse(line).map_err(|what| what.join("; "))?;
    let mut what = check::contradictions(&record);
    if record.schema_version != SCHEMA_VERSION {
        what.push(check::foreign(record.schema_version));
    }
    if what.is_empty() { Ok(record) } else { Err(what.join("; ")) }
}

/// The record in one line, or all that is wrong with the line.
fn parse(line: &[u8]) -> Result<Record, Vec<String>> {
    match serde_json::from_slice::<Record>(line) {
        Ok(record) if record.schema_version == SCHEMA_VERSION => Ok(record),
        Ok(record) => Err(vec![check::foreign(record.schema_version)]),
        Err(error) => check::explain(line, &error),
    }
}

#[cfg(test)]
mod tests;
