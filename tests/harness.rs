//! The harness as its users meet it: what a test binary prints and how it exits.
//!
//! The binary is the example `selftest`. `cargo test --test harness` alone does not build examples,
//! so the first test that needs it does.

use assert_cmd::Command;
use shakedown::record::ledger;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn cargo() -> std::process::Command {
    let mut cargo = std::process::Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("SHAKEDOWN_MARKERS");
    cargo
}

fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let arguments = ["build", "--example", "selftest", "--message-format", "json-render-diagnostics"];
        let built = cargo().args(arguments).output().expect("cargo runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let executable = |line: &str| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            (message["target"]["name"] == "selftest")
                .then(|| message["executable"].as_str().map(PathBuf::from))?
        };
        let messages = String::from_utf8_lossy(&built.stdout);
        messages.lines().find_map(executable).expect("cargo names the executable")
    })
}

fn environment(directory: &Path) -> [(&'static str, PathBuf); 3] {
    [
        ("BOOT_IMAGE_VM_LOG_ROOT", directory.join("notes")),
        ("BOOT_IMAGE_VM_LEDGER_PATH", directory.join("ledger.jsonl")),
        ("SHAKEDOWN_CACHE", directory.join("cache")),
    ]
}

struct Ended {
    out: String,
    err: String,
    code: Option<i32>,
    directory: tempfile::TempDir,
}

impl Ended {
    /// The ledger as `name: outcome` in the order of the names.
    fn ledger(&self) -> Vec<String> {
        let records = ledger::read(&self.directory.path().join("ledger.jsonl")).expect("a ledger");
        let line = |record: ledger::Record| format!("{}: {}", record.scenario, record.outcome);
        let mut lines: Vec<_> = records.map(|record| line(record.expect("valid"))).collect();
        lines.sort();
        lines
    }
}

fn ended(output: Output, directory: tempfile::TempDir) -> Ended {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Ended { out: text(output.stdout), err: text(output.stderr), code: output.status.code(), directory }
}

/// Runs it to its end, with evidence in a directory of its own.
fn selftest(arguments: &[&str]) -> Ended {
    selftest_with(arguments, &[])
}

fn selftest_with(arguments: &[&str], variables: &[(&str, &str)]) -> Ended {
    let directory = tempfile::tempdir().expect("temp dir");
    let mut command = Command::new(binary());
    command
        .args(arguments)
        .env_remove("SHAKEDOWN_MARKERS")
        .env_remove("NEXTEST")
        .env_remove("NEXTEST_RUN_ID")
        .env_remove("RUST_BACKTRACE")
        .envs(environment(directory.path()))
        .envs(variables.iter().copied())
        .timeout(Duration::from_secs(120));
    ended(command.output().expect("runs"), directory)
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
    assert_eq!(run.ledger(), expected);
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
    assert_eq!(std::fs::read_dir(list.directory.path()).expect("reads").count(), 0);
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
fn start_interrupted(directory: &tempfile::TempDir, flag: &Path) -> std::process::Child {
    let child = std::process::Command::new(binary())
        .args(["interrupted", "--include-ignored", "--test-threads", "1"])
        .env_remove("NEXTEST")
        .env_remove("NEXTEST_RUN_ID")
        .env("SELFTEST_FLAG", flag)
        .envs(environment(directory.path()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let begun = Instant::now();
    while !flag.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the scenario never began");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

#[test]
fn a_signal_ends_what_runs_and_what_has_not_begun() {
    use rustix::process::{Pid, Signal, kill_process};
    for signal in [Signal::INT, Signal::TERM] {
        let directory = tempfile::tempdir().expect("temp dir");
        let flag = directory.path().join("flag");
        let child = start_interrupted(&directory, &flag);
        kill_process(Pid::from_child(&child), signal).expect("is alive");
        let run = ended(child.wait_with_output().expect("ends"), directory);
        assert_eq!(run.code, Some(130), "{}{}", run.out, run.err);
        assert!(run.out.contains("---- interrupted_a ----\ninterrupted: interrupted"), "{}", run.out);
        assert!(run.out.contains("---- interrupted_b ----\ninterrupted: not started"), "{}", run.out);
        assert!(run.err.contains("2 interrupted"), "{}", run.err);
        assert_eq!(run.ledger(), ["interrupted_a: interrupted", "interrupted_b: interrupted"]);
    }
}

#[test]
fn a_killed_run_is_on_record_after_the_next() {
    let directory = tempfile::tempdir().expect("temp dir");
    let flag = directory.path().join("flag");
    let mut child = start_interrupted(&directory, &flag);
    child.kill().and_then(|()| child.wait()).expect("is killed");
    let output = Command::new(binary()).arg("passes").envs(environment(directory.path())).output();
    let run = ended(output.expect("runs"), directory);
    assert!(run.err.contains("`interrupted_a` of run"), "{}", run.err);
    assert_eq!(
        run.ledger(),
        ["group::passes_slowly: passed", "interrupted_a: interrupted", "passes: passed"]
    );
}

#[test]
fn nextest_lists_selects_and_runs() {
    let have = cargo().args(["nextest", "--version"]).output();
    assert!(
        have.is_ok_and(|output| output.status.success()),
        "cargo-nextest is missing. Fix: cargo install --locked cargo-nextest"
    );
    let directory = tempfile::tempdir().expect("temp dir");
    let nextest = |arguments: &[&str], markers: &str| {
        let mut command = Command::from_std(cargo());
        command
            .args(["nextest", "run", "--color", "never", "--no-fail-fast", "--example", "selftest"])
            .args(arguments)
            .env("SHAKEDOWN_MARKERS", markers)
            .envs(environment(directory.path()))
            .timeout(Duration::from_secs(300));
        let output = command.output().expect("runs");
        (String::from_utf8_lossy(&output.stderr).into_owned(), output.status.code())
    };
    let (text, code) = nextest(&[], "not(broken)");
    assert_eq!(code, Some(0), "{text}");
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
