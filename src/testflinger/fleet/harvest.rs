//! What comes back of a shard: the lines of its log, and its artifacts. Other hosts wrote all of it, so
//! nothing of it is trusted.

use super::lab::Ended;
use crate::record::ledger;
use crate::record::{Record, files};
use crate::testflinger::archive::{Limits, make_parents, members};
use anyhow::{Context, Result, bail};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use tar::EntryType;

/// Before a ledger line in a shard's log.
pub(super) const RECORD: &str = "shakedown-record: ";
/// Before the exit status of the test binary in a shard's log.
pub(super) const ENDED: &str = "shakedown-ended: ";
/// How many files the evidence of a shard may have.
const MOST_MEMBERS: usize = 100_000;
/// Evidence has `notes/RUN/SCENARIO/logs/diagnostics/FILE`, and a machine below a scenario once more.
const DEEPEST: usize = 12;
/// A ledger line with the longest reason there is.
const LONGEST_LINE: usize = 4 << 20;
/// What is kept in memory of the records in a shard's log: a thousand of them have a tenth of it.
const MOST_HEARD: usize = 32 << 20;
/// What is read into memory of its files, and what one that is read whole may have.
const LARGEST_TEXT: u64 = 64 << 20;
const LARGEST_JSON: u64 = 4 << 20;
/// How much of what a shard said last is kept, to explain its end.
const LAST_WORDS: usize = 2000;

/// What a shard says while it runs.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// A line whose end has not come yet.
    partial: String,
    /// Of the lines of all records.
    heard: usize,
    pub(super) records: Vec<Record>,
    pub(super) agent: Option<String>,
    pub(super) is_over: bool,
    /// The end of what it said that is none of the above.
    pub(super) last_words: String,
}

impl Log {
    /// Takes more of it.
    pub(super) fn hear(&mut self, text: &str) {
        self.partial.push_str(text);
        let text = std::mem::take(&mut self.partial);
        for line in text.split_inclusive('\n') {
            if line.ends_with('\n') { self.line(line.trim_end()) } else { self.partial = line.to_owned() }
        }
        if self.partial.len() > LONGEST_LINE {
            self.partial.clear();
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(record) = line.strip_prefix(RECORD) {
            self.heard = self.heard.saturating_add(record.len());
            // A line that is broken, or too much, is in the artifacts once more.
            if self.heard <= MOST_HEARD {
                self.records.extend(ledger::parse_line(record.as_bytes()));
            }
        } else if line.starts_with(ENDED) {
            self.is_over = true;
        } else if let Some(agent) = banner(line) {
            // The first is the agent's; a test may print what it likes.
            self.agent.get_or_insert_with(|| agent.to_owned());
        } else if !line.starts_with("scenarios on record: ") {
            self.last_words.push_str(line);
            self.last_words.push('\n');
            let surplus = self.last_words.len().saturating_sub(LAST_WORDS);
            let surplus = (surplus..).find(|at| self.last_words.is_char_boundary(*at)).unwrap_or(0);
            self.last_words.drain(..surplus);
        }
    }
}

/// The name of the agent in the line with which agents of either make begin a phase.
fn banner(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("* Starting testflinger ")?;
    let (_, agent) = rest.split_once(" phase on ")?;
    let agent = agent.strip_suffix('*')?.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!agent.is_empty() && agent.len() <= 200 && agent.chars().all(plain)).then_some(agent)
}

/// A shard's artifacts, unpacked.
#[derive(Debug, Default)]
pub(super) struct Artifacts {
    pub(super) ended: Option<Ended>,
    /// Each with the directory of its evidence, if that came along.
    pub(super) records: Vec<(Record, Option<PathBuf>)>,
}

/// Unpacks a shard's artifacts into the directory `into`, which it makes, and reads them. They may be
/// of `most` bytes.
///
/// # Errors
/// When it is no archive, or too large; what had come before that is lost.
pub(super) fn unpack(archive: impl Read, into: &Path, most: u64) -> Result<Artifacts> {
    let limits = Limits { bytes: most, members: MOST_MEMBERS };
    files::private_dir(into).with_context(|| files::cannot("make", into))?;
    let unpacked = members(archive, limits, |entry| {
        // Links are none of ours; nothing is ever written through one, since none is made.
        let files = [EntryType::Regular, EntryType::Continuous, EntryType::GNUSparse];
        let is_file = files.contains(&entry.header().entry_type());
        let Some(name) = wanted(&entry.path_bytes()).filter(|_| is_file) else { return Ok(()) };
        let is_read_whole = name.ends_with("metadata.json") || name.ends_with("record.json");
        if is_read_whole && entry.size() > LARGEST_JSON {
            bail!("{} is too large", name.display());
        }
        make_parents(into, &name, 0o700)?;
        let path = into.join(&name);
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let mut file = file.with_context(|| files::cannot("make", &path))?;
        io::copy(entry, &mut file).map(drop).with_context(|| files::cannot("unpack", &path))
    });
    unpacked.context("its artifacts are not what they should be")?;
    Ok(read(into))
}

/// The name of a member below what is ours; `None` for all else.
fn wanted(name: &[u8]) -> Option<PathBuf> {
    let name = Path::new(std::str::from_utf8(name).ok()?);
    let mut parts = name.components().filter(|part| *part != Component::CurDir);
    let ours = ["artifacts", "shakedown"].map(|part| Some(Component::Normal(part.as_ref())));
    if [parts.next(), parts.next()] != ours {
        return None;
    }
    let rest: Vec<_> = parts.collect();
    let plain = rest.iter().all(|part| matches!(part, Component::Normal(_)));
    (plain && (1..=DEEPEST).contains(&rest.len())).then(|| rest.into_iter().collect())
}

fn read(directory: &Path) -> Artifacts {
    let text = |name: &str| {
        let mut text = Vec::new();
        let file = File::open(directory.join(name));
        let _ = file.and_then(|file| file.take(LARGEST_TEXT).read_to_end(&mut text));
        text
    };
    // Each has its own, or none.
    let mut taken = HashSet::new();
    let records = text("notes/vm-run-ledger.jsonl")
        .split(|byte| *byte == b'\n')
        .filter(|line| line.len() <= LONGEST_LINE)
        .filter_map(|line| ledger::parse_line(line).ok())
        .map(|record| {
            let evidence = evidence(directory, &record).filter(|path| taken.insert(path.clone()));
            (record, evidence)
        })
        .collect();
    Artifacts { ended: ended(&text("ended"), &text("output.txt")), records }
}

/// `STATUS SECONDS`.
fn ended(text: &[u8], output: &[u8]) -> Option<Ended> {
    let text = std::str::from_utf8(text).ok()?;
    let (status, seconds) = text.trim().split_once(' ')?;
    let (status, took) = (status.parse::<u8>().ok()?, seconds.parse::<u32>().ok()?);
    // As the harness says that it will not run like this: wrong settings, markers or names.
    let hopeless = (status == 2).then(|| {
        let output = &output[output.len().saturating_sub(LAST_WORDS)..];
        format!("the test binary refused to run on its host: {}", String::from_utf8_lossy(output).trim())
    });
    let last = String::from_utf8_lossy(&output[output.len().saturating_sub(LAST_WORDS)..]).into_owned();
    let last = crate::fault::visible(last.trim_end().lines().last().unwrap_or_default());
    let how = format!("exit status {status}: {last}");
    Some(Ended { hopeless, how, took: Duration::from_secs(took.into()) })
}

/// Where the evidence of a record is now: its path there ends in `notes/RUN/SCENARIO/metadata.json`.
fn evidence(directory: &Path, record: &Record) -> Option<PathBuf> {
    let old = record.metadata.as_deref()?.parent()?;
    let mut parts = old.components().rev();
    let (Some(Component::Normal(scenario)), Some(Component::Normal(run))) = (parts.next(), parts.next())
    else {
        return None;
    };
    let path = directory.join("notes").join(run).join(scenario);
    let whole = path.join("record.json").is_file() && !path.join("metadata.json").is_dir();
    whole.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use std::fs;
    use tar::{Builder, Header};

    fn line(scenario: &str, outcome: &str) -> String {
        serde_json::json!({
            "schema_version": 1, "timestamp": "2026-01-01T00:00:00Z", "run_id": "far", "scenario": scenario,
            "attempt": 1, "markers": [], "outcome": outcome, "reason": "r", "duration_seconds": 1.0,
            "boot": "none", "timeouts": {"spawn_seconds": 1, "login_seconds": 1}, "harness_args": [],
            "host": {"hostname": "h", "cpus": 1, "memory": 1}, "git": null, "env": {},
            "metadata": format!("/far/notes/run/{scenario}/metadata.json"),
        })
        .to_string()
    }

    fn archive(members: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (name, kind, content) in members {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o777);
            let content = if *kind == EntryType::Regular { *content } else { "" };
            if *kind == EntryType::Symlink {
                header.as_old_mut().linkname[..4].copy_from_slice(b"/etc");
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content.as_bytes()).expect("appends");
        }
        builder.into_inner().expect("ends").finish().expect("ends")
    }

    fn unpacked(members: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, Result<Artifacts>) {
        let dir = tempfile::tempdir().expect("dir");
        let artifacts = unpack(&archive(members)[..], &dir.path().join("in"), MOST);
        (dir, artifacts)
    }

    const FILE: EntryType = EntryType::Regular;
    const MOST: u64 = 1 << 30;

    #[test]
    fn records_come_with_their_evidence() {
        let ledger = format!("{}\nrubbish\n{}\n", line("a", "passed"), line("b", "failed"));
        let (_dir, artifacts) = unpacked(&[
            ("artifacts/", EntryType::Directory, ""),
            ("artifacts/shakedown/notes/vm-run-ledger.jsonl", FILE, &ledger),
            ("artifacts/shakedown/notes/run/a/record.json", FILE, "{}"),
            ("artifacts/shakedown/notes/latest", EntryType::Symlink, ""),
            ("artifacts/shakedown/ended", FILE, "101 12\n"),
            ("artifacts/other/thing", FILE, "x"),
        ]);
        let artifacts = artifacts.expect("unpacks");
        let how = "exit status 101: ".to_owned();
        assert_eq!(artifacts.ended, Some(Ended { hopeless: None, how, took: Duration::from_secs(12) }));
        let found: Vec<_> = artifacts
            .records
            .iter()
            .map(|(record, place)| (record.scenario.as_str(), place.is_some()))
            .collect();
        assert_eq!(found, [("a", true), ("b", false)]);
    }

    #[test]
    fn nothing_leaves_the_directory_and_no_link_is_made() {
        for name in
            ["artifacts/shakedown/../../x", "artifacts/shakedown/../x", "/artifacts/shakedown/x", "../x"]
        {
            let (dir, artifacts) = unpacked(&[(name, FILE, "x")]);
            artifacts.expect("is passed over");
            assert_eq!(fs::read_dir(dir.path()).expect("reads").count(), 1, "{name}");
            assert_eq!(fs::read_dir(dir.path().join("in")).expect("reads").count(), 0, "{name}");
        }
        let through =
            [("artifacts/shakedown/l", EntryType::Symlink, ""), ("artifacts/shakedown/l/passwd", FILE, "x")];
        let (dir, artifacts) = unpacked(&through);
        artifacts.expect("the link is passed over");
        assert!(dir.path().join("in/l").symlink_metadata().expect("is there").is_dir());
    }

    #[test]
    fn evidence_is_one_records_alone() {
        let ledger = format!("{0}\n{0}\n", line("a", "passed"));
        let (_dir, artifacts) = unpacked(&[
            ("artifacts/shakedown/notes/vm-run-ledger.jsonl", FILE, &ledger),
            ("artifacts/shakedown/notes/run/a/record.json", FILE, "{}"),
        ]);
        let found = artifacts.expect("unpacks").records;
        assert_eq!(found.iter().map(|(_, place)| place.is_some()).collect::<Vec<_>>(), [true, false]);
        let (_dir, artifacts) = unpacked(&[
            ("artifacts/shakedown/notes/vm-run-ledger.jsonl", FILE, &line("a", "passed")),
            ("artifacts/shakedown/notes/run/a/record.json", FILE, "{}"),
            ("artifacts/shakedown/notes/run/a/metadata.json/x", FILE, "{}"),
        ]);
        assert_eq!(artifacts.expect("unpacks").records[0].1, None, "no file can be put there");
    }

    #[test]
    fn a_log_of_many_lines_is_heard_in_pieces_and_no_test_is_the_agent() {
        let mut log = Log::default();
        log.hear("* Starting testflinger test phase on a1 *\n* Starting testflinger test ph");
        log.hear("ase on a2 *\n");
        log.hear(&"\n".repeat(4 << 20));
        log.hear(&format!("{RECORD}{}\n", line("a", "passed").replace("1.0", "1.8e19")));
        assert_eq!((log.agent.as_deref(), log.records.len()), (Some("a1"), 0), "nothing takes so long");
        log.hear(&format!("{RECORD}{}\nlast", line("a", "passed")));
        assert_eq!(log.records.len(), 1);
    }

    #[test]
    fn a_log_of_records_alone_does_not_fill_the_memory() {
        let mut log = Log::default();
        let record = line("a", "passed").replace("\"r\"", &format!("\"{}\"", "r".repeat(1 << 20)));
        for _ in 0..64 {
            log.hear(&format!("{RECORD}{record}\n"));
        }
        assert!((1..=32).contains(&log.records.len()), "{}", log.records.len());
    }

    #[test]
    fn a_member_that_comes_twice_and_half_an_archive_are_errors() {
        let twice = ("artifacts/shakedown/x", FILE, "x");
        unpacked(&[twice, twice]).1.expect_err("refused");
        let dir = tempfile::tempdir().expect("dir");
        let whole = archive(&[twice]);
        unpack(&whole[..whole.len() / 2], &dir.path().join("in"), MOST).expect_err("refused");
    }

    #[test]
    fn a_test_binary_that_refused_says_why() {
        let refused = ended(b"2 0\n", b"error: unknown marker\n").expect("ended").hopeless.expect("hopeless");
        assert!(refused.ends_with("unknown marker"), "{refused}");
        for odd in ["", "x", "1", "1 2 3", "-1 2", "300 1"] {
            assert_eq!(ended(odd.as_bytes(), b""), None, "{odd}");
        }
    }

    #[test]
    fn a_log_tells_of_records_agent_and_end_however_it_is_cut() {
        let text = format!(
            "****\n* Starting testflinger test phase on rack-1 *\n****\n{RECORD}{}\nscenarios on record: 1\n\
             {RECORD}{{}}\nlast\n{ENDED}0\n",
            line("a", "passed")
        );
        for size in [1, 7, 4096] {
            let mut log = Log::default();
            for piece in text.as_bytes().chunks(size) {
                log.hear(std::str::from_utf8(piece).expect("ASCII"));
            }
            assert_eq!((log.records.len(), log.agent.as_deref(), log.is_over), (1, Some("rack-1"), true));
            assert_eq!(log.last_words, "****\n****\nlast\n");
        }
        assert_eq!(banner("* Starting testflinger test phase on a b; rm *"), None);
    }

    proptest! {
        #[test]
        fn any_log_is_survived(pieces in prop::collection::vec(".{0,40}", 0..20)) {
            let mut log = Log::default();
            pieces.iter().for_each(|piece| log.hear(&format!("{RECORD}{piece}\n{piece}é")));
            prop_assert!(log.records.is_empty());
            prop_assert!(log.last_words.len() <= LAST_WORDS);
        }

        #[test]
        fn any_archive_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..300), name in ".{0,60}") {
            let dir = tempfile::tempdir().expect("dir");
            let _ = unpack(&bytes[..], &dir.path().join("in"), MOST);
            if let Some(path) = wanted(name.as_bytes()) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
