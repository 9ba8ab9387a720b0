//! The result of a job, read as it arrives: it carries all of the job's logs, which may be large.

use crate::testflinger::gauge::{Gauge, Room};
use crate::testflinger::wire::{Log, Phase};
use std::collections::BTreeMap;
use std::io::{self, Read};
use struson::reader::{
    JsonReader, JsonStreamReader, JsonSyntaxError, ReaderError, SyntaxErrorKind, ValueType,
};

/// What became of a job so far. Neither serial logs nor what the agent tells of its machine: nobody
/// here asks for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobResult {
    /// `waiting`, `running`, a phase, or one of [`job_state`](crate::testflinger::wire::job_state).
    pub state: String,
    /// The phases of which anything is known.
    pub phases: BTreeMap<Phase, PhaseResult>,
}

/// What is read into memory of a field's name, a state or a number.
const LARGEST_NAME: u64 = 64 << 10;

/// What became of one phase of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PhaseResult {
    /// Its exit status; `None` as long as it has not ended.
    pub status: Option<i64>,
    /// What its command printed.
    pub output: String,
    /// True when there was too much of it: its start alone is here.
    pub is_cut: bool,
}

/// Reads a result up to its `job_state`; `None` where there is none.
pub(super) fn state(reader: impl Read) -> io::Result<Option<String>> {
    let mut json = JsonStreamReader::new(reader);
    seek(&mut json).map_err(error)
}

fn seek<R: Read>(json: &mut JsonStreamReader<R>) -> Result<Option<String>, ReaderError> {
    json.begin_object()?;
    while json.has_next()? {
        if json.next_name()? == "job_state" {
            return json.next_string().map(Some);
        }
        json.skip_value()?;
    }
    Ok(None)
}

/// Reads a result up to one log, and says whether `text` follows the first `skip` bytes of it.
pub(super) fn has_text(reader: impl Read, log: (Phase, Log), skip: u64, text: &str) -> io::Result<bool> {
    let mut json = JsonStreamReader::new(reader);
    json.begin_object().map_err(error)?;
    while json.has_next().map_err(error)? {
        let is_meant = matches!(part(json.next_name().map_err(error)?),
            Some((phase, Part::Log(name))) if (phase, name) == log);
        if is_meant {
            let mut reader = json.next_string_reader().map_err(error)?;
            io::copy(&mut reader.by_ref().take(skip), &mut io::sink()).map_err(inner)?;
            let mut follows = Vec::new();
            reader.take(text.len() as u64).read_to_end(&mut follows).map_err(inner)?;
            return Ok(follows == text.as_bytes());
        }
        json.skip_value().map_err(error)?;
    }
    Ok(false)
}

/// Reads a whole result. Of each log at most `largest` bytes are kept.
/// Nor is more kept of all of them together, whatever a server sends.
pub(super) fn read(reader: impl Read, largest: u64) -> io::Result<JobResult> {
    let room = Room::of(LARGEST_NAME);
    let mut json = JsonStreamReader::new(Gauge::new(reader, &room));
    let mut left = largest;
    let mut result = JobResult::default();
    json.begin_object().map_err(error)?;
    while json.has_next().map_err(error)? {
        room.set(LARGEST_NAME);
        let name = json.next_name_owned().map_err(error)?;
        match (name.as_str(), json.peek().map_err(error)?) {
            ("job_state", ValueType::String) => result.state = json.next_string().map_err(error)?,
            (name, kind) => match (part(name), kind) {
                (Some((phase, Part::Status)), ValueType::Number) => {
                    let status = json.next_number::<i64>().map_err(error)?;
                    let status =
                        status.map_err(|source| io::Error::new(io::ErrorKind::InvalidData, source))?;
                    result.phases.entry(phase).or_default().status = Some(status);
                }
                (Some((phase, Part::Log(Log::Output))), ValueType::String) => {
                    room.set(u64::MAX);
                    let (text, is_cut) = text(json.next_string_reader().map_err(error)?, left)?;
                    left -= text.len() as u64;
                    let phase = result.phases.entry(phase).or_default();
                    (phase.output, phase.is_cut) = (text, is_cut);
                }
                _ => {
                    room.set(u64::MAX);
                    json.skip_value().map_err(error)?;
                }
            },
        }
    }
    json.end_object().map_err(error)?;
    Ok(result)
}

enum Part {
    Status,
    Log(Log),
}

fn part(name: &str) -> Option<(Phase, Part)> {
    let (phase, part) = name.rsplit_once('_')?;
    let phase = Phase::ALL.into_iter().find(|known| known.name() == phase)?;
    match part {
        "status" => Some((phase, Part::Status)),
        "output" => Some((phase, Part::Log(Log::Output))),
        "serial" => Some((phase, Part::Log(Log::Serial))),
        _ => None,
    }
}

fn text(mut reader: impl Read, largest: u64) -> io::Result<(String, bool)> {
    let mut bytes = Vec::new();
    reader.by_ref().take(largest).read_to_end(&mut bytes).map_err(inner)?;
    let is_cut = io::copy(&mut reader, &mut io::sink()).map_err(inner)? > 0;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        // Only ever the character at the cut: the rest was checked as it was read.
        Err(error) => String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]).into(),
    };
    Ok((text, is_cut))
}

/// What makes no sense is told from what did not arrive.
fn error(error: ReaderError) -> io::Error {
    match error {
        ReaderError::IoError { error, .. } => error,
        ReaderError::SyntaxError(cause) => syntax(cause),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

fn syntax(cause: JsonSyntaxError) -> io::Error {
    let kind = match cause.kind {
        SyntaxErrorKind::IncompleteDocument => io::ErrorKind::UnexpectedEof,
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, cause)
}

/// What the reader of a string packs into an error of no kind.
fn inner(error: io::Error) -> io::Error {
    error.downcast::<JsonSyntaxError>().map_or_else(|error| error, syntax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    struct Never;
    impl Read for Never {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("read too far"))
        }
    }

    #[test]
    fn reading_stops_at_the_state() {
        let read = |text: &'static str| state(text.as_bytes());
        let broken_after = r#"{"allocate_output": "x", "job_state": "test", "test_output": "..."#;
        assert_eq!(read(broken_after).expect("found").as_deref(), Some("test"));
        assert_eq!(read("{}").expect("reads"), None);
        let kind = |text| read(text).map_err(|error| error.kind());
        assert_eq!(kind(r#"{"allocate_output": "x"#), Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(kind("[]"), Err(io::ErrorKind::InvalidData));
    }

    #[test]
    fn the_log_behind_the_state_is_not_loaded() {
        let start = br#"{"job_state": "cancelled", "#.chain(&[b' '; 8 << 10][..]).chain(Never);
        assert_eq!(state(start).expect("found").as_deref(), Some("cancelled"));
    }

    #[test]
    fn a_text_is_found_at_its_place_alone() {
        let result = json!({"test_output": "tick\ntick\n\u{e9}", "test_serial": "boot"}).to_string();
        let has =
            |log, skip, text| has_text(result.as_bytes(), (Phase::Test, log), skip, text).expect("reads");
        assert!(
            has(Log::Output, 0, "tick\n") && has(Log::Output, 5, "tick\n") && has(Log::Output, 10, "\u{e9}")
        );
        assert!(
            !has(Log::Output, 10, "tick\n") && !has(Log::Output, 99, "x") && !has(Log::Serial, 0, "tick\n")
        );
        let setup = has_text(result.as_bytes(), (Phase::Setup, Log::Output), 0, "tick\n");
        assert!(!setup.expect("reads"), "a log that nobody began");
    }

    #[test]
    fn a_result_has_statuses_and_logs_by_phase() {
        let text = json!({
            "device_info": {"device_ip": "10.1.1.1"}, "firmware_update_status": 3, "future": [{"x": 1}],
            "job_state": "complete", "test_output": "a\u{e9}\n", "test_serial": "boot", "test_status": -9,
            "unknown_status": 1,
        });
        let result = read(text.to_string().as_bytes(), 100).expect("reads");
        assert_eq!(result.state, "complete");
        let test = PhaseResult { status: Some(-9), output: "a\u{e9}\n".into(), is_cut: false };
        let firmware = PhaseResult { status: Some(3), ..PhaseResult::default() };
        assert_eq!(result.phases, BTreeMap::from([(Phase::FirmwareUpdate, firmware), (Phase::Test, test)]));
    }

    #[test]
    fn a_long_log_is_cut_at_a_character_and_what_follows_is_still_read() {
        let text = json!({"test_output": "\u{e9}".repeat(1 << 20), "test_status": 1}).to_string();
        let result = read(text.as_bytes(), 5).expect("reads");
        let test = &result.phases[&Phase::Test];
        assert_eq!((test.output.as_str(), test.status, test.is_cut), ("\u{e9}\u{e9}", Some(1), true));
    }

    #[test]
    fn all_logs_together_have_a_limit_and_names_have_one() {
        let long = "x".repeat(100);
        let text = json!({"provision_output": long, "setup_output": long, "setup_serial": long, "test_output": long});
        let result = read(text.to_string().as_bytes(), 150).expect("reads");
        let sizes: Vec<_> = result.phases.values().map(|phase| (phase.output.len(), phase.is_cut)).collect();
        assert_eq!(sizes.iter().map(|(size, _)| size).sum::<usize>(), 150, "{sizes:?}");
        assert_eq!(sizes.iter().filter(|(_, is_cut)| *is_cut).count(), 2, "{sizes:?}");
        for field in ["\"job_state\": \"", "\""] {
            let bomb = io::Cursor::new(format!("{{{field}")).chain(io::repeat(b'x'));
            let error = read(bomb, 100).expect_err("is refused before it is read");
            assert!(error.to_string().contains("too large"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_log_holds_its_start_is_kept(
            text in "[a\\\\\"\n\u{1b}\u{e9}\u{1f600}]{0,40}", largest in 0_u64..60, status in any::<i32>(),
        ) {
            let json = json!({"test_output": text, "test_status": status}).to_string();
            let result = read(json.as_bytes(), largest).expect("reads");
            let test = &result.phases[&Phase::Test];
            prop_assert!(text.starts_with(&test.output) && test.output.len() as u64 <= largest);
            prop_assert!(text.len() - test.output.len() < 4 || test.is_cut);
            prop_assert_eq!((test.is_cut, test.status), (text.len() as u64 > largest, Some(i64::from(status))));
        }

        #[test]
        fn nothing_makes_it_panic(json in "[{}\\[\\]\":,a-f_\\\\ 0-9]{0,60}") {
            let _ = read(json.as_bytes(), 10);
            let _ = state(json.as_bytes());
        }
    }

    #[test]
    fn half_a_result_is_none() {
        let half = read(br#"{"job_state": "complete", "test_output": "ab"#.as_slice(), 100);
        assert_eq!(half.map_err(|error| error.kind()), Err(io::ErrorKind::UnexpectedEof));
    }
}
