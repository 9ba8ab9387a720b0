//! What is wrong with a ledger, line by line and field by field: the logic of `shakedown ledger check`.

use super::legacy::{self, Legacy};
use super::{MOST_SECONDS, Problem, Record, lines, parse};
use crate::record::metadata::{Outcome, SCHEMA_VERSION};
use anyhow::Result;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// The fields that every line has. A value is tried by putting it into this line.
const SAMPLE: &str = r#"{
    "schema_version": 1, "timestamp": "1970-01-01T00:00:00Z", "run_id": "", "scenario": "", "attempt": 1,
    "markers": [], "outcome": "passed", "duration_seconds": 0, "boot": "none",
    "timeouts": {"spawn_seconds": 0, "login_seconds": 0}, "harness_args": [],
    "host": {"hostname": "", "cpus": 0, "memory": 0}, "env": {}
}"#;

/// Finds every fault of a ledger. Whether the evidence it points to still exists is not looked at:
/// run directories may be removed, their lines stay true.
///
/// # Errors
/// A host [`Fault`](crate::fault::Fault) when the file cannot be opened.
pub fn check(path: &Path) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let mut seen = HashMap::new();
    for line in lines(path)? {
        let line = match line {
            Ok(line) => line,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let mut faults = match parse(&line.text) {
            Err(faults) => faults,
            Ok(record) if record.schema_version == 0 => Vec::new(),
            Ok(record) => {
                let mut faults = contradictions(&record);
                let ran = record.ran();
                let key = (record.run_id, record.scenario, record.attempt);
                if !ran {
                    // Put off as often as it was asked for.
                } else if let Some(first) = seen.get(&key) {
                    faults.push(format!("the same run_id, scenario and attempt as line {first}"));
                } else {
                    seen.insert(key, line.number);
                }
                faults
            }
        };
        if !line.whole {
            faults.push("torn line: it does not end in a newline".into());
        }
        problems.extend(faults.into_iter().map(|what| Problem { line: line.number, what }));
    }
    Ok(problems)
}

/// What no single field shows.
pub(super) fn contradictions(record: &Record) -> Vec<String> {
    let rules = [
        (record.run_id.is_empty(), "field `run_id`: empty"),
        (record.scenario.is_empty(), "field `scenario`: empty"),
        (record.attempt == 0, "field `attempt`: counts from 1"),
        (record.duration_seconds < 0.0, "field `duration_seconds`: negative"),
        (record.duration_seconds > MOST_SECONDS, "field `duration_seconds`: more than a year"),
        (
            record.outcome != Outcome::Passed && record.reason.as_deref().unwrap_or_default().is_empty(),
            "field `reason`: missing, although the outcome is not `passed`",
        ),
    ];
    rules.into_iter().filter(|(broken, _)| *broken).map(|(_, what)| what.to_owned()).collect()
}

/// For a line that is no [`Record`]: the record of a legacy line, or what is wrong.
pub(super) fn explain(line: &[u8], error: &serde_json::Error) -> Result<Record, Vec<String>> {
    if line.trim_ascii().is_empty() {
        return Err(vec!["empty line".into()]);
    }
    let object = match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => object,
        Ok(_) => return Err(vec!["not a JSON object".into()]),
        Err(error) if error.is_eof() => return Err(vec!["torn line: it ends in mid-record".into()]),
        Err(error) => return Err(vec![format!("not JSON: {error}")]),
    };
    let faults = match object.get("schema_version") {
        None => match serde_json::from_slice::<Legacy>(line) {
            Ok(legacy) => return Ok(legacy.into()),
            // A line of ours that lost its version is not mistaken for one of the original's.
            Err(_) if object.contains_key("run_id") => faults::<Record>(&object, SAMPLE),
            Err(_) => faults::<Legacy>(&object, legacy::SAMPLE),
        },
        Some(Value::Number(version)) if *version != SCHEMA_VERSION.into() => vec![foreign(version)],
        Some(_) => faults::<Record>(&object, SAMPLE),
    };
    // A field that occurs twice is a fault only of the text.
    Err(if faults.is_empty() { vec![error.to_string()] } else { faults })
}

/// Says that a line is of another version of the format.
pub(super) fn foreign(version: impl std::fmt::Display) -> String {
    format!("field `schema_version`: {version}, but this shakedown knows {SCHEMA_VERSION}")
}

/// Every field of `object` that is missing or that does not fit into a `T`.
fn faults<T: DeserializeOwned>(object: &Map<String, Value>, sample: &str) -> Vec<String> {
    let sample: Map<String, Value> = serde_json::from_str(sample).unwrap_or_default();
    let missing = sample.keys().filter(|name| !object.contains_key(*name));
    let mut faults: Vec<_> = missing.map(|name| format!("field `{name}`: missing")).collect();
    for (name, value) in object {
        let mut trial = sample.clone();
        trial.insert(name.clone(), value.clone());
        if let Err(error) = serde_json::from_value::<T>(Value::Object(trial)) {
            let text = error.to_string();
            let unknown = text.starts_with(&format!("unknown field `{name}`"));
            faults.push(format!("field `{name}`: {}", if unknown { "unknown" } else { &text }));
        }
    }
    faults
}
