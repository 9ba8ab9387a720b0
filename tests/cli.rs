//! The `shakedown` command as a shell sees it: exit statuses, both streams, JSON.

use assert_cmd::Command;
use rustix::process::{Pid, Signal};
use serde_json::Value;
use shakedown::deadline::Deadline;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// The command with a cache of its own and nothing of the caller's settings.
fn shakedown(cache: &Path) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("shakedown"));
    for name in ["SHAKEDOWN_ACCEL", "SHAKEDOWN_IMAGE", "BOOT_IMAGE_VM_LOG_ROOT", "NO_COLOR"] {
        command.env_remove(name);
    }
    command.env("SHAKEDOWN_CACHE", cache);
    command
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

fn doctor_json(command: &mut Command) -> (Option<i32>, Value) {
    let output = command.args(["doctor", "--json"]).output().expect("runs");
    let json = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), json)
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("a list of checks");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name} in {report}"))
}

fn fake(dir: &Path, name: &str, body: &str) {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("writes");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("is executable");
}

#[test]
fn the_exit_status_says_whether_the_job_can_run() {
    let cache = dir();
    let (status, report) = doctor_json(&mut shakedown(cache.path()));
    let checks = report["checks"].as_array().expect("checks");
    let all_ok = checks.iter().all(|check| check["state"] == "ok");
    assert_eq!(report["ok"], all_ok);
    assert_eq!(status, Some(if all_ok { 0 } else { 1 }), "{report}");
    for check in checks.iter().filter(|check| check["state"] != "ok") {
        assert!(check["fix"].is_string(), "a problem without a fix: {check}");
    }
    assert_eq!(report["schema_version"], 1);
    let accelerator = &report["accelerator"];
    assert!(["kvm", "tcg"].iter().any(|kind| accelerator["kind"] == *kind), "{accelerator}");
    assert!(accelerator["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{accelerator}");
}

#[test]
fn a_host_without_tools_is_told_which_packages_it_lacks() {
    let (cache, empty) = (dir(), dir());
    let (status, report) = doctor_json(shakedown(cache.path()).env("PATH", empty.path()));
    assert_eq!(status, Some(1));
    let qemu = check(&report, "qemu-system-x86_64");
    assert_eq!((&qemu["state"], &qemu["packages"][0]), (&"missing".into(), &"qemu-system-x86".into()));
    let output = shakedown(cache.path()).env("PATH", empty.path()).arg("doctor").output().expect("runs");
    let text = String::from_utf8(output.stdout).expect("is text");
    assert!(text.contains("Not ready") && text.contains("qemu-utils"), "{text}");
    assert!(!text.contains('\x1b'), "no colours in a pipe: {text:?}");
}

#[test]
fn an_old_qemu_is_named_with_its_version() {
    let (cache, path) = (dir(), dir());
    fake(path.path(), "qemu-system-x86_64", "echo 'QEMU emulator version 6.2.0 (Debian 1:6.2+dfsg-2)'");
    let (status, report) = doctor_json(shakedown(cache.path()).env("PATH", path.path()));
    assert_eq!(status, Some(1));
    let qemu = check(&report, "qemu-system-x86_64");
    assert_eq!(qemu["state"], "old");
    assert_eq!((&qemu["version"], &qemu["minimum"]), (&"6.2.0".into(), &"7.1".into()));
}

#[test]
fn a_prebuilt_image_needs_no_build_tools() {
    let cache = dir();
    let mut command = shakedown(cache.path());
    let (_, report) = doctor_json(command.env("SHAKEDOWN_IMAGE", "some.iso").current_dir(cache.path()));
    let parts = report["checks"].as_array().expect("checks").iter().map(|check| &check["part"]);
    assert!(parts.into_iter().all(|part| part == "machines"), "{report}");
}

#[test]
fn a_project_adds_its_tools() {
    let (cache, project) = (dir(), dir());
    let settings = "[package.metadata.shakedown.tools]\nsh = 'dash'\nno-such-tool = 'no-such-package'\n";
    std::fs::write(project.path().join("Cargo.toml"), settings).expect("writes");
    // From any directory of it.
    let below = project.path().join("src");
    std::fs::create_dir(&below).expect("makes");
    let (status, report) = doctor_json(shakedown(cache.path()).current_dir(below));
    assert_eq!(status, Some(1));
    assert_eq!(
        (&check(&report, "sh")["part"], &check(&report, "sh")["state"]),
        (&"project".into(), &"ok".into())
    );
    let missing = check(&report, "no-such-tool");
    assert_eq!((&missing["state"], &missing["packages"][0]), (&"missing".into(), &"no-such-package".into()));
}

#[test]
fn the_override_is_obeyed_and_said() {
    let cache = dir();
    let (_, report) = doctor_json(shakedown(cache.path()).env("SHAKEDOWN_ACCEL", "tcg"));
    assert_eq!(report["accelerator"]["kind"], "tcg");
    assert_eq!(report["accelerator"]["reason"], "SHAKEDOWN_ACCEL=tcg");
}

#[test]
fn usage_and_settings_that_make_no_sense_exit_with_2() {
    let cache = dir();
    let fails = |command: &mut Command, words: &str| {
        let output = command.output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{text}");
    };
    fails(shakedown(cache.path()).arg("doctr"), "'doctor'");
    fails(shakedown(cache.path()).args(["doctor", "--yes"]), "--install");
    let bad = "SHAKEDOWN_ACCEL=hvf is not usable: it wants tcg or kvm";
    fails(shakedown(cache.path()).arg("doctor").env("SHAKEDOWN_ACCEL", "hvf"), bad);
    fails(shakedown(Path::new("relative")).arg("doctor"), "SHAKEDOWN_CACHE=relative");
    for (name, value, words) in [
        ("BOOT_IMAGE_VM_LOGIN_TIMEOUT", "5m", "BOOT_IMAGE_VM_LOGIN_TIMEOUT=5m is not usable"),
        ("SHAKEDOWN_VMS", "many", "SHAKEDOWN_VMS=many is not usable"),
    ] {
        let mut command = shakedown(cache.path());
        fails(command.current_dir(cache.path()).args(["vm", "run", "--", "true"]).env(name, value), words);
    }
    for command in [
        &["vm", "list"][..],
        &["vm", "kill", "--all"],
        &["template", "list"],
        &["image", "prune"],
        &["plan", "list"],
        &["doctor"],
    ] {
        let typo = "did you mean SHAKEDOWN_CACHE?";
        fails(shakedown(cache.path()).args(command).env("SHAKEDOWN_CAHCE", "/"), typo);
    }
}

#[test]
fn an_unusable_cache_is_an_error_with_a_fix() {
    let dir = dir();
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("writes");
    let output = shakedown(&file.join("cache")).arg("doctor").output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("cannot be written to") && text.contains("fix: "), "{text}");
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let cache = dir();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin!("shakedown"))
        .args(["doctor", "--json"])
        .env("SHAKEDOWN_CACHE", cache.path())
        .stdout(writer)
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "nothing to say about it");
}

#[test]
fn help_names_the_environment() {
    let cache = dir();
    let output = shakedown(cache.path()).arg("--help").output().expect("runs");
    let text = String::from_utf8(output.stdout).expect("is text");
    let variables = shakedown::record::environment::VARIABLES.map(|variable| variable.name);
    for name in variables.iter().chain(&["Exit status", "Examples"]) {
        assert!(text.contains(name), "{name} in {text}");
    }
}

#[test]
fn ctrl_c_ends_it_and_its_children_with_130() {
    let (cache, path) = (dir(), dir());
    let pid_file = path.path().join("pid");
    let body = format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000", pid_file.display());
    fake(path.path(), "mmdebstrap", &body);
    let doctor = std::process::Command::new(assert_cmd::cargo::cargo_bin!("shakedown"))
        .arg("doctor")
        .env("SHAKEDOWN_CACHE", cache.path())
        .env("PATH", format!("{}:/usr/bin:/bin", path.path().display()))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let deadline = Deadline::after(Duration::from_secs(60), "test");
    let child = loop {
        match std::fs::read_to_string(&pid_file) {
            Ok(pid) => break pid.trim().to_owned(),
            Err(_) => deadline.check().expect("the tool is asked for its version"),
        }
        std::thread::yield_now();
    };
    // `timeout` sends two on each other's heels, which is not a person's impatience.
    for signal in [Signal::INT, Signal::TERM] {
        rustix::process::kill_process(Pid::from_child(&doctor), signal).expect("is sent");
    }
    let ended = doctor.wait_with_output().expect("ends");
    assert_eq!(ended.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "interrupted\n", "it came to its end by itself");
    assert!(!Path::new("/proc").join(child).exists(), "the child is gone");
}

#[test]
fn an_empty_store_of_templates_is_an_empty_list() {
    let cache = dir();
    let json = |arguments: &[&str]| {
        let output = shakedown(cache.path()).arg("template").args(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    assert_eq!(json(&["list", "--json"]), Value::Array(Vec::new()));
    let prune = ["prune", "--older-than", "7d", "--max-size", "4G", "--json"];
    assert_eq!(json(&prune), Value::Array(Vec::new()));
    let output = shakedown(cache.path()).args(["template", "rm", "debian"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("no template `debian` in the store"), "{text}");
}

#[test]
fn a_command_that_could_not_run_is_told_from_one_that_failed() {
    let (cache, project) = (dir(), dir());
    let run = |arguments: &[&str]| {
        let mut command = shakedown(cache.path());
        let output = command.current_dir(project.path()).args(["vm", "run"]).args(arguments).output();
        let output = output.expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, text) = run(&["--image", "vendor.iso", "--", "true"]);
    assert_eq!(status, Some(125), "{text}");
    assert!(text.contains("unknown image `vendor.iso`"), "{text}");
    assert!(!project.path().join("notes").exists(), "nothing was begun");
    let (status, text) = run(&["--image", "./vendor.iso", "--", "true"]);
    assert_eq!(status, Some(125), "{text}");
    assert!(text.contains("there is no image") && text.contains("evidence: notes/"), "{text}");
    for wrong in ["--disk=0", "--cpus=256", "--firmware=bois", "--memory=1500K", "--timeout=0s"] {
        let (status, text) = run(&[wrong, "--", "true"]);
        assert_eq!(status, Some(2), "{wrong}: {text}");
        assert!(text.contains("invalid value"), "{wrong}: {text}");
    }
    assert_eq!(run(&["--"]).0, Some(2), "no command");
}

#[test]
fn what_needs_a_terminal_says_so_and_what_else_there_is() {
    let (cache, here) = (dir(), dir());
    for (arguments, words) in [
        (&["vm", "shell"][..], &["needs a terminal", "fix: without one: shakedown vm run"][..]),
        (&["vm", "debug", "scenario"], &["needs a terminal", "fix: without one"]),
    ] {
        let output = shakedown(cache.path()).current_dir(here.path()).args(arguments).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(words.iter().all(|words| text.contains(words)), "{text}");
    }
    assert_eq!(std::fs::read_dir(here.path()).expect("reads").count(), 0, "nothing was begun");
}

#[test]
fn a_host_on_which_no_machine_runs() {
    let cache = dir();
    let run = |arguments: &[&str]| shakedown(cache.path()).arg("vm").args(arguments).output().expect("runs");
    let list = run(&["list", "--json"]);
    assert_eq!((list.status.code(), &list.stdout[..]), (Some(0), &b"[]\n"[..]));
    assert_eq!(run(&["kill", "--all"]).status.code(), Some(0));
    // A process that is there, and no machine.
    let us = std::process::id().to_string();
    let kill = run(&["kill", &us]);
    let text = String::from_utf8_lossy(&kill.stderr).into_owned();
    assert_eq!(kill.status.code(), Some(1));
    assert!(text.contains(&format!("no machine {us} runs")), "{text}");
    for wrong in [&["kill"][..], &["kill", "--all", "1"], &["kill", "one"]] {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn plans_are_shown_for_the_disks_that_they_get() {
    let cache = dir();
    let plan = |arguments: &[&str]| {
        let output = shakedown(cache.path()).arg("plan").args(arguments).output().expect("runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let (status, text) = plan(&["list", "--json"]);
    let layouts: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((status, &layouts[0]["name"]), (Some(0), &Value::from("raid1-lvm")));
    let (_, text) = plan(&["raid1-lvm", "seed", "--format", "json", "--disks", "/dev/sdx,/dev/sdy"]);
    let seed: Value = serde_json::from_str(&text).expect("JSON");
    let create = seed["steps"][1]["run"].as_str().expect("a line");
    assert!(create.contains("--create /dev/md127") && create.ends_with("/dev/sdx /dev/sdy"), "{create}");
    for (arguments, word) in [
        (&["raid1-lmv", "seed"][..], "did you mean `raid1-lvm`?"),
        (&["raid1-lvm", "seed", "--disks", "/dev/sdx"], "needs 2 disks, and 1 are given"),
        (&["swap", "seed", "--disks", "/dev/sdx; reboot"], "is not the path of a disk"),
        (&["run", "swap", "--on", "moon"], "--on is `vm` or"),
    ] {
        let (status, text) = plan(arguments);
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains(word), "{text}");
    }
}
