//! Scenarios without machines: how they end, how they are selected, what is printed.

use super::support::{Ended, Place, cargo, ended, finish, signal, wait};
use rustix::process::Signal;
use std::path::Path;
use std::process::Child;

struct Run {
    out: String,
    err: String,
    code: Option<i32>,
    place: Place,
}

/// Runs it to its end, with evidence in a directory of its own.
fn selftest(arguments: &[&str]) -> Run {
    selftest_with(arguments, &[])
}

fn selftest_with(arguments: &[&str], variables: &[(&str, &str)]) -> Run {
    let place = Place::new();
    let Ended { out, err, code } = place.run("selftest", arguments, variables);
    Run { out, err, code, place }
}

fn names(list: &str) -> Vec<&str> {
    list.lines().filter_map(|line| line.strip_suffix(": test")).collect()
}

#[test]
fn a_run_says_what_failed_what_broke_and_what_was_ignored() {
    let run = selftest(&[]);
    assert_eq!(run.code, Some(101), "{}{}", run.out, run.err);
    for text in [
        "passes               ... ok",
        "ignored_by_itself    ... ignored (the lab is closed)",
        "ignored_by_marker    ... ignored (the settings ignore marker `nightly`; -m nightly runs it)",
        "---- fails ----\nfailed: 3 disks expected, 2 found",
        "---- host_breaks ----\nerror: the tool is missing\ncaused by: No such file",
        "Fix: apt-get install tool",
        "---- panics ----\nfailed: assertion `left == right` failed: sums are off",
        "at tests/selftest/selftest.rs:",
        "---- hangs ----\nfailed: no answer within 0.20 s (scenario timeout)",
    ] {
        assert!(run.out.contains(text), "{text:?} is missing in\n{}", run.out);
    }
    let summary = "scenarios: 2 passed, 3 failed, 1 error, 4 ignored; evidence in ";
    assert!(run.err.starts_with(summary) && run.err.lines().count() == 1, "{}", run.err);
    let expected = [
        "fails: failed",
        "group::passes_slowly: passed",
        "hangs: failed",
        "host_breaks: error",
        "ignored_by_itself: ignored",
        "ignored_by_marker: ignored",
        "interrupted_a: ignored",
        "interrupted_b: ignored",
        "panics: failed",
        "passes: passed",
    ];
    assert_eq!(run.place.outcomes(), expected);
}

#[test]
fn a_backtrace_comes_only_when_asked_for() {
    let trace = |variables| selftest_with(&["panics"], variables).out.contains("selftest::panics");
    assert!(!trace(&[]) && trace(&[("RUST_BACKTRACE", "1")]));
}

#[test]
fn listing_leaves_no_trace_and_knows_what_is_ignored() {
    let list = selftest(&["--list", "--format", "terse"]);
    assert_eq!((list.code, list.err.as_str()), (Some(0), ""));
    assert_eq!(names(&list.out).len(), 10, "{}", list.out);
    assert!(list.out.contains("group::passes_slowly: test\n"), "{}", list.out);
    assert!(["notes", "ledger.jsonl", "cache"].iter().all(|name| !list.place.path(name).exists()));
    let ignored = selftest(&["--list", "--format", "terse", "--ignored"]);
    assert_eq!(
        names(&ignored.out),
        ["ignored_by_itself", "ignored_by_marker", "interrupted_a", "interrupted_b"]
    );
}

#[test]
fn markers_select_by_option_and_by_variable() {
    fn list(arguments: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
        let list = selftest_with(&[arguments, &["--list"]].concat(), variables);
        names(&list.out).into_iter().map(str::to_owned).collect()
    }
    const ALL: &str = "all(broken, not(slow))";
    const VARIABLE: [(&str, &str); 1] = [("SHAKEDOWN_MARKERS", ALL)];
    let broken = ["fails", "hangs", "host_breaks", "panics"];
    assert_eq!(list(&["-m", "slow"], &[]), ["group::passes_slowly"]);
    assert_eq!(list(&["--markers", ALL], &[]), broken);
    assert_eq!(list(&[], &VARIABLE), broken);
    assert_eq!(list(&["-m", "slow"], &VARIABLE), ["group::passes_slowly"], "-m wins");
}

#[test]
fn naming_an_ignored_marker_runs_its_scenarios() {
    let run = selftest(&["-m", "any(slow, nightly)"]);
    assert_eq!(run.code, Some(0), "{}", run.out);
    assert!(run.out.contains("test ignored_by_marker    ... ok"), "{}", run.out);
    assert!(run.err.contains("2 passed, 8 not selected by -m 'any(slow, nightly)'"), "{}", run.err);
    let run = selftest(&["-m", "not(broken)", "ignored_by"]);
    assert!(run.out.contains("0 passed; 0 failed; 2 ignored"), "{}", run.out);
}

#[test]
fn libtest_options_mean_what_they_mean_elsewhere() {
    for (arguments, result) in [
        (&["ignored_by", "--ignored"][..], "2 passed; 0 failed; 0 ignored; 0 measured; 8 filtered"),
        (&["ignored_by", "--include-ignored"], "2 passed; 0 failed; 0 ignored"),
        (&["--exact", "passes"], "1 passed; 0 failed; 0 ignored; 0 measured; 9 filtered"),
        (&["passes", "--skip", "slowly", "--test-threads", "1"], "1 passed; 0 failed"),
        (&["passes", "--nocapture", "-q"], "2 passed; 0 failed"),
    ] {
        let run = selftest(arguments);
        assert!(run.out.contains(result), "{arguments:?}: {}", run.out);
    }
}

#[test]
fn json_stays_json() {
    let run = selftest(&["--format", "json", "--skip", "hangs"]);
    let events: Vec<serde_json::Value> =
        run.out.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let event = |name: &str| {
        let of = |e: &&serde_json::Value| e["name"] == name && e["event"] != "started";
        events.iter().find(of).expect(name)["event"].clone()
    };
    assert_eq!(event("passes"), "ok");
    assert_eq!(event("host_breaks"), "failed");
    assert_eq!(event("ignored_by_itself"), "ignored");
}

#[test]
fn a_typo_ends_the_run_before_it_begins() {
    for (arguments, variables, message) in [
        (&["-m", "slwo"][..], &[][..], "error: -m 'slwo': unknown marker `slwo`; did you mean `slow`?"),
        (&[], &[("SHAKEDOWN_MARKERS", "nope")], "SHAKEDOWN_MARKERS='nope': unknown marker `nope`; known are"),
        (&["-m", "all(vm"], &[], "not a marker expression"),
        (&["--list"], &[("SHAKEDOWN_MARKER", "vm")], "SHAKEDOWN_MARKERS"),
    ] {
        let run = selftest_with(arguments, variables);
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{}", run.err);
        assert!(run.err.contains(message), "{}", run.err);
    }
}

#[test]
fn help_tells_of_markers() {
    let help = selftest(&["--help"]);
    assert_eq!(help.code, Some(0));
    for text in ["--markers <EXPRESSION>", "broken    fails on purpose", "--include-ignored"] {
        assert!(help.out.contains(text), "{text}: {}", help.out);
    }
}

/// Starts the two scenarios that wait for Ctrl-C, one after the other, and waits for the first.
fn start_interrupted(place: &Place) -> Child {
    start_interrupted_with(place, &place.path("ledger.jsonl"))
}

fn start_interrupted_with(place: &Place, ledger: &Path) -> Child {
    let flag = place.path("flag");
    let mut command = place.command("selftest", &["interrupted", "--include-ignored", "--test-threads", "1"]);
    command.env("BOOT_IMAGE_VM_LEDGER_PATH", ledger);
    let child = command.env("SELFTEST_FLAG", &flag).spawn().expect("starts");
    wait("the scenario begins", || flag.exists());
    child
}

#[test]
fn a_signal_ends_what_runs_and_what_has_not_begun() {
    // The last as `timeout` does it: the child and at once its group, which is the child again.
    for numbers in [&[Signal::INT][..], &[Signal::TERM], &[Signal::TERM, Signal::INT]] {
        let place = Place::new();
        let child = start_interrupted(&place);
        for number in numbers {
            signal(&child, *number);
        }
        let run = ended(child.wait_with_output().expect("ends"));
        assert_eq!(run.code, Some(130), "{run:?}");
        assert!(run.out.contains("---- interrupted_a ----\ninterrupted: interrupted"), "{}", run.out);
        assert!(run.out.contains("---- interrupted_b ----\ninterrupted: not started"), "{}", run.out);
        assert!(run.err.contains("2 interrupted"), "{}", run.err);
        assert_eq!(place.outcomes(), ["interrupted_a: interrupted", "interrupted_b: interrupted"]);
    }
}

#[test]
fn a_killed_run_is_on_record_after_the_next() {
    let place = Place::new();
    let mut child = start_interrupted(&place);
    child.kill().and_then(|()| child.wait()).expect("is killed");
    let run = place.run("selftest", &["passes"], &[]);
    assert!(run.err.contains("`interrupted_a` of run"), "{}", run.err);
    assert_eq!(
        place.outcomes(),
        ["group::passes_slowly: passed", "interrupted_a: interrupted", "passes: passed"]
    );
}

#[test]
fn a_killed_run_whose_ledger_is_gone_stops_no_other() {
    let place = Place::new();
    let lost = place.path("lost");
    let mut child = start_interrupted_with(&place, &lost.join("ledger.jsonl"));
    child.kill().and_then(|()| child.wait()).expect("is killed");
    std::fs::write(&lost, "no directory any more").expect("writes");
    for _ in 0..2 {
        let run = place.run("selftest", &["passes"], &[]);
        assert_eq!(run.code, Some(0), "{run:?}");
        assert_eq!(run.err.matches("could not be put on record: 1 in all").count(), 1, "{}", run.err);
    }
    assert_eq!(place.records().len(), 4, "both runs are in their own ledger");
}

/// What nextest does, without nextest: <https://nexte.st/docs/design/custom-test-harnesses/>.
#[test]
fn one_process_per_scenario_is_one_run() {
    let place = Place::new();
    let nextest = |arguments: &[&str]| {
        let mut command = place.command("selftest", arguments);
        command.env("NEXTEST", "1").env("NEXTEST_RUN_ID", "7c9e6679-7425-40de-944b-e07fc1f90ae7");
        finish(command)
    };
    let list = nextest(&["--list", "--format", "terse"]);
    let ignored = nextest(&["--list", "--format", "terse", "--ignored"]);
    let ignored = names(&ignored.out);
    let mut codes = Vec::new();
    for name in names(&list.out).into_iter().filter(|name| !ignored.contains(name)) {
        let run = nextest(&["--exact", name, "--nocapture"]);
        assert_eq!(run.err, "", "nextest says how it ended");
        codes.push((name.to_owned(), run.code));
    }
    let failed = |name: &str| (name.to_owned(), Some(101));
    let passed = |name: &str| (name.to_owned(), Some(0));
    let expected = [
        failed("fails"),
        passed("group::passes_slowly"),
        failed("hangs"),
        failed("host_breaks"),
        failed("panics"),
        passed("passes"),
    ];
    assert_eq!(codes, expected);
    let records = place.records();
    assert_eq!(records.len(), 6);
    assert!(records.iter().all(|record| record.run_id == records[0].run_id), "one run directory for all");
}

#[test]
#[ignore = "needs cargo-nextest; .ci/run runs it"]
fn nextest_lists_selects_and_runs() {
    let place = Place::new();
    let nextest = |arguments: &[&str], markers: &str| {
        let mut command = cargo();
        command
            .args(["nextest", "run", "--color", "never", "--no-fail-fast", "--example", "selftest"])
            .args(arguments)
            .env("SHAKEDOWN_MARKERS", markers)
            .envs(place.environment());
        let run = finish(command);
        (run.err, run.code)
    };
    let (text, code) = nextest(&[], "not(broken)");
    assert_eq!(code, Some(0), "{text}\nIs cargo-nextest missing? cargo install --locked cargo-nextest");
    assert!(text.contains("2 tests run: 2 passed, 4 skipped"), "{text}");
    let (text, code) = nextest(&[], "broken");
    assert_eq!(code, Some(100), "{text}");
    assert!(text.contains("4 tests run: 0 passed, 4 failed"), "{text}");
    assert!(text.contains("error: the tool is missing"), "{text}");
    let (text, code) = nextest(&["--run-ignored", "only", "ignored_by"], "");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("2 tests run: 2 passed"), "{text}");
}

#[test]
fn the_benchmark_lists_what_it_says() {
    let directory = tempfile::tempdir().expect("temp dir");
    let list = directory.path().join("list");
    let took = shakedown::harness::bench_list(1000, &list).expect("lists");
    println!("{took:?}");
    assert_eq!(names(&std::fs::read_to_string(list).expect("readable")).len(), 1000);
}
