//! What is to be told to the server of one job, on disk and in order, until the server has it.
//!
//! Owns two files: the records, and a cursor that says how far delivery is. The cursor is written
//! before each delivery, so that after a crash it is known what may have arrived already.

use crate::record::files;
use crate::testflinger::wire::{AgentUpdate, Event, Log, Phase, ProvisionLog, ResultUpdate};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What is posted as one request, or a few that belong together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Post {
    /// A phase begins: unless the job is cancelled, its state and the agent's.
    Enter(Phase),
    Result(ResultUpdate),
    Agent(AgentUpdate),
    Provision(ProvisionLog),
    /// All events so far.
    Events(Vec<Event>),
}

/// One record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record {
    Post(Post),
    /// A piece of a log; its text follows the record.
    Text {
        log: Log,
        phase: Phase,
        at: String,
        size: usize,
        #[serde(skip)]
        text: String,
    },
}

impl Record {
    /// The length of its text.
    fn size(&self) -> usize {
        match self {
            Self::Text { text, .. } => text.len(),
            Self::Post(_) => 0,
        }
    }
}

/// How far delivery is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// All before this byte is delivered.
    pub(super) start: u64,
    /// The number of the next fragment of each log.
    pub(super) output: u64,
    pub(super) serial: u64,
    /// How many bytes of each log were delivered.
    #[serde(default)]
    pub(super) told: BTreeMap<Phase, [u64; 2]>,
    /// What was being sent when this was written: up to which byte, as which fragment.
    pub(super) sending: Option<(u64, Log)>,
}

impl Cursor {
    /// For a job of which another agent has told something already, nobody knows how many fragments:
    /// who follows a log asks for what comes after the last one.
    pub(super) fn after_another(dir: &Path) -> Result<()> {
        let cursor = Self { output: BEYOND, serial: BEYOND, ..Self::default() };
        files::write_json(&dir.join(CURSOR), &cursor)
    }

    pub(super) fn number(&mut self, log: Log) -> &mut u64 {
        match log {
            Log::Output => &mut self.output,
            Log::Serial => &mut self.serial,
        }
    }

    /// How many bytes of a phase's log were delivered.
    pub(super) fn told(&mut self, log: Log, phase: Phase) -> &mut u64 {
        &mut self.told.entry(phase).or_default()[usize::from(log == Log::Serial)]
    }
}

/// How much is kept in memory when the disk is full.
const MOST_IN_MEMORY: usize = 16 << 20;
/// More fragments than the original makes of any job: it has one for ten seconds of output.
const BEYOND: u64 = 1_000_000;
/// A file that was delivered is cut when it is larger than this.
const CUT: u64 = 8 << 20;

#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    file: File,
    length: u64,
    /// What the disk had no room for; it comes after the file.
    memory: VecDeque<Record>,
    in_memory: usize,
    /// Bytes of text that had no room at all.
    lost: usize,
    pub(super) cursor: Cursor,
}

const RECORDS: &str = "spool";
const CURSOR: &str = "cursor.json";

impl Spool {
    /// Opens the spool in `dir`, or makes one.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORDS);
        let open = || -> io::Result<(File, u64)> {
            let file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        let (file, length) = open().with_context(|| files::cannot("open", &path))?;
        let cursor = dir.join(CURSOR);
        let mut cursor: Cursor = if cursor.exists() { files::read_json(&cursor)? } else { Cursor::default() };
        if cursor.start > length {
            // The file was cut, and then came the crash.
            cursor.start = 0;
        }
        let mut spool = Self {
            dir: dir.to_owned(),
            file,
            length,
            memory: VecDeque::new(),
            in_memory: 0,
            lost: 0,
            cursor,
        };
        spool.length = spool.whole()?;
        Ok(spool)
    }

    /// The end of the last whole record: a crash may have left a part of one.
    fn whole(&self) -> Result<u64> {
        let mut at = self.cursor.start;
        while let Some((_, end)) = self.read(at)? {
            at = end;
        }
        Ok(at)
    }

    /// Appends a record; never fails, but what has no room anywhere is lost, and that is said.
    pub(super) fn append(&mut self, record: Record) {
        if self.flush() && self.write(&record).is_ok() {
            return;
        }
        let size = record.size();
        if self.in_memory + size > MOST_IN_MEMORY {
            self.lost += size;
            return;
        }
        self.in_memory += size;
        self.memory.push_back(record);
    }

    /// Writes what is in memory to the disk, as far as there is room now; true when all of it is there.
    pub(super) fn flush(&mut self) -> bool {
        self.note_loss();
        while let Some(record) = self.memory.pop_front() {
            if self.write(&record).is_err() {
                self.memory.push_front(record);
                return false;
            }
            self.in_memory -= record.size();
            self.note_loss();
        }
        true
    }

    /// Says what was lost, behind all that was not.
    fn note_loss(&mut self) {
        if self.lost > 0 && self.memory.is_empty() {
            let lost = std::mem::take(&mut self.lost);
            let text = format!("\n[{lost} bytes of output were lost: the disk of the agent is full]\n");
            self.in_memory += text.len();
            let (log, phase) = (Log::Output, Phase::Cleanup);
            self.memory.push_back(Record::Text { log, phase, at: now(), size: text.len(), text });
        }
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut head = serde_json::to_vec(record)?;
        head.push(b'\n');
        let text = if let Record::Text { text, .. } = record { text.as_str() } else { "" };
        let behind = self.length + head.len() as u64;
        let written = self.file.write_all_at(&head, self.length);
        if let Err(error) = written.and_then(|()| self.file.write_all_at(text.as_bytes(), behind)) {
            // A part helps nobody, and has taken the last of the room.
            let _ = self.file.set_len(self.length);
            return Err(error);
        }
        self.length = behind + text.len() as u64;
        Ok(())
    }

    /// The record at `at` and where it ends.
    pub(super) fn read(&self, at: u64) -> Result<Option<(Record, u64)>> {
        let path = self.dir.join(RECORDS);
        let mut head = Vec::new();
        let mut chunk = [0; 512];
        let line = loop {
            let from = at + head.len() as u64;
            let room =
                usize::try_from(self.length.saturating_sub(from)).unwrap_or(chunk.len()).min(chunk.len());
            let size =
                self.file.read_at(&mut chunk[..room], from).with_context(|| files::cannot("read", &path))?;
            if size == 0 {
                return Ok(None);
            }
            let end = chunk[..size].iter().position(|b| *b == b'\n');
            head.extend_from_slice(&chunk[..end.unwrap_or(size)]);
            if end.is_some() {
                break head.len() as u64 + 1;
            }
        };
        let Ok(mut record) = serde_json::from_slice::<Record>(&head) else { return Ok(None) };
        let mut end = at + line;
        if let Record::Text { size, text, .. } = &mut record {
            if end + *size as u64 > self.length {
                return Ok(None);
            }
            let mut bytes = vec![0; *size];
            self.file.read_exact_at(&mut bytes, end).with_context(|| files::cannot("read", &path))?;
            *text = String::from_utf8_lossy(&bytes).into_owned();
            end += *size as u64;
        }
        Ok(Some((record, end)))
    }

    /// What is to be delivered next, and where it ends; those in memory have no place.
    pub(super) fn next(&mut self) -> Result<Option<(Record, u64)>> {
        let start = self.cursor.start;
        if let Some(found) = self.read(start)? {
            return Ok(Some(found));
        }
        self.note_loss();
        Ok(self.memory.front().map(|record| (record.clone(), start)))
    }

    /// What [`Self::next`] gave, up to `end`, is delivered.
    pub(super) fn delivered(&mut self, end: u64) {
        let start = self.cursor.start;
        if end > start {
            self.cursor.start = end;
        } else if let Ok(Some((_, end))) = self.read(start) {
            // It was in memory, and has found room since.
            self.cursor.start = end;
        } else if let Some(record) = self.memory.pop_front() {
            self.in_memory -= record.size();
        }
    }

    /// True when all up to `at` is all there is.
    pub(super) fn ends_at(&self, at: u64) -> bool {
        at >= self.length && self.memory.is_empty() && self.lost == 0
    }

    /// Writes the cursor. Failing is no fault: something may be sent twice after a crash.
    pub(super) fn save(&mut self) {
        if self.cursor.start >= CUT {
            self.cut();
        }
        let _ = files::write_json(&self.dir.join(CURSOR), &self.cursor);
    }

    /// Gives back the room of what was delivered, when that is all there is.
    pub(super) fn cut(&mut self) {
        if self.cursor.start == self.length && self.file.set_len(0).is_ok() {
            self.length = 0;
            self.cursor.start = 0;
        }
    }
}

/// The time, as the server wants it.
pub(super) fn now() -> String {
    let now = jiff::Timestamp::now();
    format!("{}+00:00", now.strftime("%Y-%m-%dT%H:%M:%S%.6f"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Record {
        let (at, size, text) = ("now".into(), text.len(), text.into());
        Record::Text { log: Log::Output, phase: Phase::Test, at, size, text }
    }

    fn all(spool: &mut Spool) -> Vec<Record> {
        let mut records = Vec::new();
        while let Some((record, end)) = spool.next().expect("reads") {
            records.push(record);
            spool.delivered(end);
        }
        records
    }

    #[test]
    fn records_survive_and_a_torn_one_is_left_out() {
        let dir = tempfile::tempdir().expect("temp dir");
        let records = [text("a\nb"), Record::Post(Post::Enter(Phase::Test)), text("")];
        let mut spool = Spool::open(dir.path()).expect("opens");
        records.iter().cloned().for_each(|record| spool.append(record));
        spool.append(text("torn"));
        let file = File::options().write(true).open(dir.path().join(RECORDS)).expect("opens");
        file.set_len(spool.length - 1).expect("cuts");
        let mut again = Spool::open(dir.path()).expect("opens");
        assert_eq!(all(&mut again), records);
        again.append(text("more"));
        assert_eq!(all(&mut again).last(), Some(&text("more")), "the torn part is written over");
    }

    #[test]
    fn what_was_delivered_is_not_read_again_and_takes_no_room() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut spool = Spool::open(dir.path()).expect("opens");
        spool.append(text(&"x".repeat(9 << 20)));
        spool.cursor.start = spool.length;
        spool.cursor.output = 7;
        spool.save();
        assert_eq!(std::fs::metadata(dir.path().join(RECORDS)).expect("is there").len(), 0);
        spool.append(text("next"));
        let mut again = Spool::open(dir.path()).expect("opens");
        assert_eq!((all(&mut again), again.cursor.output), (vec![text("next")], 7));
    }

    #[test]
    fn a_full_disk_loses_nothing_that_memory_can_hold_and_says_what_it_cannot() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut spool = Spool::open(dir.path()).expect("opens");
        spool.append(text("on disk"));
        // Writing to it fails from now on.
        let file = std::mem::replace(&mut spool.file, File::open(dir.path().join(RECORDS)).expect("opens"));
        spool.append(text("in memory"));
        spool.append(text(&"x".repeat(MOST_IN_MEMORY)));
        assert!(!spool.flush());
        for expected in ["on disk", "in memory"] {
            let (record, end) = spool.next().expect("reads").expect(expected);
            assert_eq!(record, text(expected));
            if expected == "in memory" {
                // While it is being sent there is room again.
                spool.file = file.try_clone().expect("clones");
                assert!(spool.flush());
            }
            spool.delivered(end);
        }
        let note = "\n[16777216 bytes of output were lost: the disk of the agent is full]\n";
        let texts = |records: Vec<Record>| -> Vec<String> {
            let text = |record| if let Record::Text { text, .. } = record { Some(text) } else { None };
            records.into_iter().filter_map(text).collect()
        };
        assert_eq!(texts(all(&mut spool)), [note]);
        assert!(spool.ends_at(spool.length));
        let mut again = Spool::open(dir.path()).expect("opens");
        assert_eq!(texts(all(&mut again)), ["on disk", "in memory", note]);
    }

    #[test]
    fn times_are_as_in_python() {
        let shape = regex::Regex::new(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00$").expect("a regex");
        assert!(shape.is_match(&now()), "{}", now());
    }
}
