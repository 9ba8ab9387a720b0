//! A project outside of this one: builds against the library alone, with its own markers and image.

use std::path::Path;
use std::process::Command;

/// Runs the scenarios of `fixtures/outside`; both streams and the exit status.
fn outside(arguments: &[&str]) -> (String, Option<i32>) {
    // Our own target directory: what we have built already is not built again for it.
    let this = std::env::current_exe().expect("this test");
    let target = this.ancestors().nth(3).expect("target/debug/deps/this");
    let evidence = tempfile::tempdir().expect("temp dir");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["test", "--quiet", "--test", "scenarios", "--"])
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/outside"))
        .env("CARGO_TARGET_DIR", target)
        .env("BOOT_IMAGE_VM_LOG_ROOT", evidence.path().join("notes"))
        .env("BOOT_IMAGE_VM_LEDGER_PATH", evidence.path().join("ledger.jsonl"))
        .env_remove("SHAKEDOWN_MARKERS")
        .output()
        .expect("cargo runs");
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.code())
}

#[test]
fn its_scenarios_are_listed_and_run() {
    let (list, _) = outside(&["--list"]);
    assert!(list.contains("extra_disks_are_blank: test\nthe_manifest_has_a_version: test\n"), "{list}");
    let (run, code) = outside(&["-m", "not(vm)"]);
    assert_eq!(code, Some(0), "{run}");
    assert!(run.contains("1 passed") && run.contains("1 not selected"), "{run}");
}

#[test]
fn its_own_markers_are_known_and_ours_are_too() {
    let (list, _) = outside(&["--list", "-m", "all(storage, vm)"]);
    assert!(list.contains("extra_disks_are_blank: test\n"), "{list}");
    let (text, code) = outside(&["-m", "broken"]);
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("unknown marker `broken`; known are") && text.contains("`storage`"), "{text}");
}

/// On a terminal, by script(1): it wants one.
#[test]
fn a_scenario_to_debug_is_found_by_its_name() {
    let this = std::env::current_exe().expect("this test");
    let target = this.ancestors().nth(3).expect("target/debug/deps/this");
    let evidence = tempfile::tempdir().expect("temp dir");
    let debug = |scenario: &str| {
        let line = format!("{} vm debug {scenario}", env!("CARGO_BIN_EXE_shakedown"));
        let output = Command::new("script")
            .args(["-qefc", &line, "/dev/null"])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/outside"))
            .env("CARGO_TARGET_DIR", target)
            .env("BOOT_IMAGE_VM_LOG_ROOT", evidence.path().join("notes"))
            .env("BOOT_IMAGE_VM_LEDGER_PATH", evidence.path().join("ledger.jsonl"))
            .output()
            .expect("script(1) runs");
        (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
    };
    let (text, code) = debug("the_manifest_has_no_version");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("did you mean `the_manifest_has_a_version`?"), "{text}");
    // One that passes has nothing to stop at.
    let (text, code) = debug("the_manifest_has_a_version");
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("1 passed") && evidence.path().join("ledger.jsonl").exists(), "{text}");
}
