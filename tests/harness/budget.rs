//! The session budget: what is deferred, that it is not lost, and what a run says of its length.

use super::support::{Ended, Place, finish};
use shakedown::record::deferred::{Deferred, Queue};
use shakedown::record::ledger::{self, Record};
use shakedown::record::metadata::{SCHEMA_VERSION, Utc};
use shakedown::record::{Outcome, run::RunFile};

const SLOWLY: &str = "group::passes_slowly";

/// Runs the scenarios without machines, one after the other.
fn run(place: &Place, arguments: &[&str], budget: &str) -> Ended {
    let arguments = [arguments, &["--test-threads", "1"]].concat();
    place.run("selftest", &arguments, &[("SHAKEDOWN_SESSION_BUDGET", budget)])
}

fn queue(place: &Place) -> Queue {
    Queue::in_log_root(place.path("notes"))
}

fn queued(place: &Place) -> Vec<String> {
    queue(place).read().expect("sound").into_iter().map(|entry| entry.scenario).collect()
}

/// Puts scenarios into the queue as if a run had deferred them.
fn owe(place: &Place, test: &str, scenarios: &[&str]) {
    let entry = |scenario: &&str| Deferred {
        schema_version: SCHEMA_VERSION,
        test: test.into(),
        scenario: (*scenario).into(),
        run_id: "2026-01-31T120000Z-1a2b3c4d".into(),
        deferred_at: Utc::now(),
        estimate_seconds: None,
        reason: "the budget".into(),
    };
    queue(place).add(scenarios.iter().map(entry)).expect("adds");
}

/// A place whose ledger says that scenarios took so many seconds.
fn with_history(history: &[(&str, f64, Outcome)]) -> Place {
    let place = Place::new();
    assert_eq!(run(&place, &["--exact", "passes"], "3000").code, Some(0));
    let sample = place.records().pop().expect("a record");
    std::fs::remove_file(place.path("ledger.jsonl")).expect("removes");
    let line = |(number, (scenario, seconds, outcome)): (usize, &(&str, f64, Outcome))| Record {
        run_id: format!("earlier-{number}"),
        scenario: (*scenario).into(),
        duration_seconds: *seconds,
        outcome: *outcome,
        reason: Some("because".into()),
        ..sample.clone()
    };
    let lines: Vec<_> = history.iter().enumerate().map(line).collect();
    ledger::append(&place.path("ledger.jsonl"), &lines).expect("appends");
    place
}

/// What this run, and not the made-up ones before it, put on record.
fn outcomes(place: &Place) -> Vec<String> {
    let records = place.records();
    let ours = records.iter().filter(|record| !record.run_id.starts_with("earlier"));
    ours.map(|record| format!("{}: {}", record.scenario, record.outcome)).collect()
}

#[test]
fn what_would_end_too_late_is_deferred_and_runs_when_asked_for() {
    use Outcome::{Failed, Passed};
    let place = with_history(&[
        (SLOWLY, 60.0, Passed),
        ("passes", 50.0, Passed),
        // Neither what failed nor what took longer once counts.
        ("passes", 1.0, Failed),
        ("passes", 50.0, Passed),
        ("passes", 900.0, Passed),
    ]);
    let selected = ["-m", "not(broken)", "passes"];
    let first = run(&place, &selected, "100");
    assert_eq!(first.code, Some(0), "{first:?}");
    let notice = "by the ledger's medians, and its budget is 100 s (SHAKEDOWN_SESSION_BUDGET): 1 of 2 scenarios are deferred";
    assert!(first.err.contains(notice), "{first:?}");
    assert!(
        first.out.contains("passes               ... ignored (deferred: it would end 111 s into"),
        "{first:?}"
    );
    assert!(first.err.contains("scenarios: 1 passed, 1 deferred (run them with --deferred)"), "{first:?}");
    assert_eq!(outcomes(&place), [format!("{SLOWLY}: passed"), "passes: deferred".into()]);
    let entry = queue(&place).read().expect("sound").pop().expect("an entry");
    assert!(entry.is("selftest", "passes") && entry.estimate_seconds == Some(50.0), "{entry:?}");

    let list = run(&place, &["--deferred", "--list", "--format", "terse"], "100");
    assert_eq!((list.code, list.out.as_str()), (Some(0), "passes: test\n"));
    let again = run(&place, &["--deferred"], "100");
    assert_eq!(again.code, Some(0), "{again:?}");
    assert!(again.out.contains("passes ... ok") && again.out.contains("1 passed; 0 failed"), "{again:?}");
    assert!(!queue(&place).path().exists(), "what is done is removed");
    let empty = run(&place, &["--deferred"], "100");
    assert!(empty.code == Some(0) && empty.out.contains("running 0 tests"), "{empty:?}");
}

#[test]
fn two_at_once_fit_where_one_after_the_other_does_not() {
    let place = with_history(&[(SLOWLY, 60.0, Outcome::Passed), ("passes", 50.0, Outcome::Passed)]);
    let selected = ["-m", "not(broken)", "passes", "--test-threads", "2"];
    let run = place.run("selftest", &selected, &[("SHAKEDOWN_SESSION_BUDGET", "100")]);
    assert_eq!((run.code, queued(&place).len()), (Some(0), 0), "{run:?}");
    assert!(!run.err.contains("deferred"), "{run:?}");
}

#[test]
fn a_filter_leaves_only_what_it_selects_to_be_counted() {
    let place = with_history(&[(SLOWLY, 60.0, Outcome::Passed), ("passes", 50.0, Outcome::Passed)]);
    for arguments in [&["--exact", "passes"][..], &["passes", "--skip", "slowly"], &["-m", "slow"]] {
        let run = run(&place, arguments, "100");
        assert!(run.code == Some(0) && !run.err.contains("deferred"), "{run:?}");
    }
}

#[test]
fn what_is_longer_than_the_budget_runs_in_a_run_of_its_own() {
    let place = with_history(&[("passes", 5000.0, Outcome::Passed), (SLOWLY, 1.0, Outcome::Passed)]);
    let both = run(&place, &["-m", "not(broken)", "passes"], "100");
    assert!(both.code == Some(0) && both.out.contains("1 passed; 0 failed; 1 ignored"), "{both:?}");
    assert_eq!(queued(&place), ["passes"]);
    assert!(run(&place, &["--deferred"], "100").out.contains("passes ... ok"));
    assert!(queued(&place).is_empty());
}

#[test]
fn the_queue_is_worked_off_oldest_first_whatever_the_settings_ignore() {
    let place = Place::new();
    owe(&place, "selftest", &["passes", "ignored_by_marker", "fails", "host_breaks"]);
    owe(&place, "another", &["passes"]);
    let run = run(&place, &["--deferred"], "3000");
    assert_eq!(run.code, Some(101), "{run:?}");
    let begun: Vec<_> =
        run.out.lines().filter(|line| line.starts_with("test ") && line.contains(" ... ")).collect();
    let names: Vec<_> = begun.iter().filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(names, ["passes", "ignored_by_marker", "fails", "host_breaks"]);
    assert!(run.out.contains("ignored_by_marker ... ok"), "{run:?}");
    // What broke on our side is still owed, and so is what another test binary has.
    let left: Vec<_> =
        queue(&place).read().expect("sound").into_iter().map(|e| (e.test, e.scenario)).collect();
    let expected =
        [("selftest", "host_breaks"), ("another", "passes")].map(|(t, s)| (t.to_owned(), s.to_owned()));
    assert_eq!(left, expected);
}

#[test]
fn a_scenario_that_is_gone_is_dropped_with_a_note() {
    let place = Place::new();
    owe(&place, "selftest", &["pases", "passes"]);
    assert!(run(&place, &["--deferred", "--list"], "3000").err.is_empty());
    assert_eq!(queued(&place).len(), 2, "a list changes nothing");
    let run = run(&place, &["--deferred"], "3000");
    assert_eq!(run.code, Some(0), "{run:?}");
    let note = "note: `pases` was deferred and does not exist any more, so it is no longer queued; is it `passes` now?";
    assert!(run.err.contains(note), "{run:?}");
    assert!(queued(&place).is_empty());
}

#[test]
fn a_queue_that_cannot_be_read_ends_the_run_before_it_begins() {
    let place = Place::new();
    owe(&place, "selftest", &["passes"]);
    let path = queue(&place).path();
    let text = std::fs::read_to_string(&path).expect("reads") + "not JSON\n";
    std::fs::write(&path, &text).expect("writes");
    for arguments in [&["passes"][..], &["--deferred"]] {
        let run = run(&place, arguments, "3000");
        assert_eq!((run.code, run.out.as_str()), (Some(2), ""), "{run:?}");
        assert!(run.err.contains("line 2 of ") && run.err.contains("deferred.jsonl"), "{run:?}");
    }
    assert!(!place.path("ledger.jsonl").exists());
    assert_eq!(std::fs::read_to_string(&path).expect("reads"), text);
}

/// No process sees the whole there, so the clock of the run decides.
#[test]
fn under_nextest_what_comes_too_late_does_not_count_as_passed() {
    let place = Place::new();
    let nextest = |name: &str, budget: &str| {
        let mut command = place.command("selftest", &["--exact", name, "--nocapture"]);
        command.env("NEXTEST", "1").env("NEXTEST_RUN_ID", "7c9e6679-7425-40de-944b-e07fc1f90ae7");
        command.env("SHAKEDOWN_SESSION_BUDGET", budget);
        finish(command)
    };
    let run_file = || place.path("notes/latest/run.json");
    let read =
        || -> RunFile { serde_json::from_slice(&std::fs::read(run_file()).expect("reads")).expect("sound") };
    assert_eq!(nextest("passes", "3000").code, Some(0));
    let mut file = read();
    assert!(file.ended_at.is_some() && file.session_ceiling_exceeded == Some(false), "{file:?}");
    file.started_at = "2026-01-31T12:00:00Z".parse::<jiff::Timestamp>().expect("a time").into();
    std::fs::write(run_file(), serde_json::to_vec(&file).expect("writes")).expect("writes");

    let late = nextest(SLOWLY, "3000");
    assert_eq!(late.code, Some(101), "{late:?}");
    assert!(
        late.out.contains("deferred: the run has taken ") && late.out.contains("budget is 50 min"),
        "{late:?}"
    );
    assert_eq!(queued(&place), [SLOWLY]);

    // With time enough it runs, is no longer owed, and says that the session was long.
    assert_eq!(nextest(SLOWLY, "4000000000").code, Some(0));
    assert!(queued(&place).is_empty());
    let records = place.records();
    let said: Vec<_> = records.iter().map(|r| (r.outcome, r.session_ceiling_exceeded)).collect();
    let expected = [(Outcome::Deferred, None), (Outcome::Passed, Some(true)), (Outcome::Passed, Some(false))];
    assert_eq!(said, expected);
    assert!(records[1].duration_seconds < 3600.0, "it is about the run, not about the scenario");
    assert_eq!(read().session_ceiling_exceeded, Some(true));
}
