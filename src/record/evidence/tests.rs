use super::*;
use crate::record::event::Events;
use crate::record::{Environment, ledger};
use proptest::prelude::*;
use serde_json::Value;
use std::fs;

fn run(root: &Path) -> Run {
    let environment = Environment::from_vars([], root).expect("reads");
    Run::start_in(environment, None).expect("starts")
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

fn json(path: &Path) -> Value {
    files::read_json(path).expect("reads")
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn qemu_started() -> Event {
    Event::QemuStarting { command: vec!["qemu-system-x86_64".into(), "-m".into(), "a b".into()] }
}

#[test]
fn identity_is_on_disk_before_anything_happens() {
    let root = temp();
    let run = run(root.path());
    let evidence = run.scenario("storage::blank", &["vm", "slow"]).expect("begins");
    assert_eq!(evidence.directory(), run.directory().join("storage--blank"));
    let identity = json(&evidence.directory().join("scenario.json"));
    assert_eq!(identity["scenario"], "storage::blank");
    assert_eq!(identity["markers"], serde_json::json!(["vm", "slow"]));
    assert_eq!(identity["pid"], std::process::id());
    assert!(evidence.directory().join("logs/diagnostics").is_dir());
    assert!(!evidence.directory().join("record.json").exists());
}

#[test]
fn a_life_becomes_timings_logs_and_a_ledger_line() {
    let root = temp();
    let run = run(root.path());
    let evidence = run.scenario("boots", &["vm"]).expect("begins");
    let events = Events::to(evidence.clone());
    events.emit(Event::ImageReady { image: "debian".into(), seconds: 0.12349, cached: true });
    events.emit(qemu_started());
    events.emit(Event::LoginSeen);
    let timings = evidence.metadata().timings;
    assert_eq!(timings.build_seconds, Some(0.123));
    assert!(timings.boot_to_login_seconds.is_some() && timings.boot_to_ssh_seconds.is_none());
    let written: Metadata = files::read_json(&evidence.directory().join("metadata.json")).expect("reads");
    assert_eq!(written.timings, timings, "each step is written when it happens");
    assert_eq!(written.qemu.expect("started").command[0], "qemu-system-x86_64");
    events.emit(Event::SshReady);
    events.note("first line\nsecond line\x1b[2J");

    let record = evidence.finish(Outcome::Passed, None).expect("is recorded");
    assert!(record.timings.as_ref().is_some_and(|t| t.boot_to_ssh_seconds.is_some() && t.end.is_some()));
    assert_eq!(record.session_ceiling_exceeded, Some(false));
    let path = run.ledger().expect("is on");
    let lines: Vec<_> = ledger::read(path).expect("opens").map(|line| line.expect("sound")).collect();
    assert_eq!(lines, std::slice::from_ref(&record));
    assert_eq!(ledger::check(path).expect("opens"), []);
    let kept: Record = files::read_json(&evidence.directory().join("record.json")).expect("reads");
    assert_eq!(kept, record);

    let log = fs::read_to_string(evidence.directory().join("logs/harness.log")).expect("reads");
    assert!(log.contains("] starting QEMU\n    qemu-system-x86_64 -m 'a b'\n"), "{log}");
    assert!(log.contains("] first line\n    second line\\u{1b}[2J\n"), "{log}");
    let text = fs::read_to_string(evidence.directory().join("events.jsonl")).expect("reads");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(keys(&lines[0]), ["time", "elapsed_seconds", "event", "image", "seconds", "cached"]);
    assert_eq!(lines[2]["event"], "login_seen");
}

#[test]
fn the_shape_of_the_metadata_is_stable() {
    let root = temp();
    let evidence = run(root.path()).scenario("a", &["vm"]).expect("begins");
    evidence.observe(&qemu_started());
    evidence.finish(Outcome::Failed, Some("no prompt")).expect("is recorded");
    let text = fs::read_to_string(evidence.directory().join("metadata.json")).expect("reads");
    assert!(text.starts_with("{\n  \"schema_version\": 1,\n") && text.ends_with("}\n"), "indent 2, newline");
    let metadata = json(&evidence.directory().join("metadata.json"));
    #[rustfmt::skip]
    assert_eq!(keys(&metadata), [
        "schema_version", "generated_at", "run_id", "scenario", "attempt", "markers", "outcome", "reason", "boot",
        "logs", "qemu", "diagnostics", "timings", "session_ceiling_exceeded", "timeouts", "harness_args", "host",
        "git", "env",
    ]);
    assert_eq!(keys(&metadata["timings"]), ["start", "end", "total_seconds"]);
    assert_eq!(keys(&metadata["logs"]), ["harness", "serial"]);
    assert_eq!(keys(&metadata["diagnostics"]), ["directory", "artifacts"]);
    assert_eq!(metadata["timeouts"], serde_json::json!({"spawn_seconds": 900, "login_seconds": 300}));
}

#[test]
fn diagnostics_are_numbered_and_registered_once() {
    let root = temp();
    let evidence = run(root.path()).scenario("a", &[]).expect("begins");
    let dmesg = evidence.diagnostic("dmesg (post test)", "txt");
    let lost = evidence.diagnostic("Journal: sshd.service", "txt");
    assert_eq!(dmesg.file_name().and_then(|n| n.to_str()), Some("dmesg-post-test-01.txt"));
    assert_eq!(lost.file_name().and_then(|n| n.to_str()), Some("journal-sshd-service-02.txt"));
    fs::write(&dmesg, "").expect("writes");
    let record = evidence.finish(Outcome::Error, Some("broken")).expect("is recorded");
    assert_eq!(record.diagnostics, [Diagnostic { label: "dmesg (post test)".into(), path: dmesg }]);
}

#[test]
fn an_outcome_is_recorded_once() {
    let root = temp();
    let run = run(root.path());
    let evidence = run.scenario("a", &[]).expect("begins");
    evidence.finish(Outcome::Passed, None).expect("is recorded");
    let error = evidence.finish(Outcome::Failed, Some("late")).expect_err("again");
    assert!(error.to_string().contains("recorded already"), "{error}");
    assert_eq!(ledger::read(run.ledger().expect("is on")).expect("opens").count(), 1);
}

#[test]
fn a_ledger_that_cannot_be_written_is_an_error_and_loses_nothing() {
    let root = temp();
    let run = run(root.path());
    let evidence = run.scenario("a", &[]).expect("begins");
    let path = run.ledger().expect("is on");
    fs::create_dir(path).expect("makes a directory in its place");
    let error = evidence.finish(Outcome::Passed, None).expect_err("no ledger");
    assert!(format!("{error:#}").contains("cannot write the ledger"), "{error:#}");
    assert_eq!(json(&evidence.directory().join("record.json"))["outcome"], "passed");
    fs::remove_dir(path).expect("removes");
    let log_root = &run.environment().log_root;
    let added = files::eventually(|| super::super::sweep(log_root).expect("sweeps").added.pop());
    assert_eq!(added.outcome, Outcome::Passed, "the line is added later");
    assert_eq!(ledger::check(path).expect("opens"), []);
}

#[test]
fn without_a_ledger_the_evidence_is_complete() {
    let root = temp();
    let vars = [("BOOT_IMAGE_VM_DISABLE_LEDGER".into(), "yes".into())];
    let environment = Environment::from_vars(vars, root.path()).expect("reads");
    let run = Run::start_in(environment, None).expect("starts");
    let evidence = run.scenario("a", &[]).expect("begins");
    evidence.finish(Outcome::Passed, None).expect("is recorded");
    run.not_run(Outcome::Ignored, &[("b", &[], "reason")]).expect("is nothing");
    assert!(evidence.directory().join("record.json").exists());
    assert!(!root.path().join("notes/vm-run-ledger.jsonl").exists());
}

#[test]
fn attempts_have_directories_of_their_own() {
    let root = temp();
    let run = run(root.path());
    let attempts: Vec<_> = (0..3).map(|_| run.scenario("m::a", &[]).expect("begins")).collect();
    let names: Vec<_> = attempts.iter().filter_map(|e| e.directory().file_name()?.to_str()).collect();
    assert_eq!(names, ["m--a", "m--a.2", "m--a.3"]);
    assert_eq!(attempts[2].metadata().attempt, 3);
    for evidence in &attempts {
        evidence.finish(Outcome::Passed, None).expect("is recorded");
    }
    assert_eq!(ledger::check(run.ledger().expect("is on")).expect("opens"), []);
}

#[test]
fn names_of_directories_are_plain() {
    assert_eq!(directory_name("storage::raid::residue_1"), "storage--raid--residue_1");
    assert!(directory_name("../../etc").starts_with("etc."));
    assert!(directory_name("").starts_with("unnamed."));
    assert!(directory_name(&"long::".repeat(100)).len() < 100);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn directories_are_safe_and_do_not_collide(a in "[a-c:.~/-]{0,6}|.{0,120}", b in "[a-c:.~/-]{0,6}|.{0,120}") {
        let (x, y) = (directory_name(&a), directory_name(&b));
        prop_assert!(!x.is_empty() && x.len() < 100 && !x.starts_with(['.', '-']));
        prop_assert!(x.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)), "{}", x);
        prop_assert_eq!(a == b, x == y, "{} {}", x, y);
        prop_assert!(x.rsplit_once('.').is_none_or(|(_, end)| end.len() == 8), "not a number of an attempt");
    }
}
