//! Stopping at a failure: on a terminal of its own, by script(1).

use super::support::{Place, boot_sector, finish};
use shakedown::process;
use shakedown::vm::register;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

/// A machine without login, whose scenario fails.
fn failing(place: &Place) -> Command {
    boot_sector(&place.path("disk.img"), "Loading...\r\n");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let mut command = place.command("machines", &["--exact", "body_panics"]);
    command.env("SHAKEDOWN_IMAGE", place.path("disk.img")).env("SHAKEDOWN_DEBUG", "1");
    command
}

/// Starts it on a terminal, and reads what it says until it has stopped.
fn stopped(command: &Command) -> (Child, String) {
    let mut script = Command::new("script");
    script.args(["-qefc", &process::display(command), "/dev/null"]);
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    let mut child = script.spawn().expect("script(1) starts");
    let (mut text, mut buffer) = (Vec::new(), [0; 1024]);
    let stdout = child.stdout.as_mut().expect("piped");
    while !String::from_utf8_lossy(&text).contains("vm kill ") {
        let count = stdout.read(&mut buffer).expect("reads");
        assert!(count > 0, "it did not stop: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..count]);
    }
    (child, String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn it_stops_with_the_machine_alive_until_enter() {
    let place = Place::new();
    let (mut child, text) = stopped(&failing(&place));
    for words in ["failed: the machine still runs", "this image has no SSH", "/body_panics\r\n"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let running = register::list(&place.path("cache")).expect("reads");
    assert_eq!(running.len(), 1, "{running:?}");
    assert_eq!((running[0].scenario.as_str(), &running[0].ssh), ("body_panics", &None));
    assert!(!place.path("ledger.jsonl").exists(), "the outcome is still open");
    child.stdin.as_mut().expect("piped").write_all(b"\n").expect("writes");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(101), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(place.outcomes(), ["body_panics: failed"]);
    place.is_deserted();
    place.is_tidy();
}

#[test]
fn a_machine_that_is_killed_from_elsewhere_ends_the_stop() {
    let place = Place::new();
    let (child, text) = stopped(&failing(&place));
    let running = register::list(&place.path("cache")).expect("reads").pop().expect("one runs");
    assert!(text.contains(&running.scenario), "{text}");
    assert!(running.kill().expect("is ours"));
    assert_eq!(child.wait_with_output().expect("ends").status.code(), Some(101));
    assert_eq!(place.outcomes(), ["body_panics: failed"]);
    place.is_tidy();
}

#[test]
fn without_a_terminal_it_does_not_begin() {
    let place = Place::new();
    let run = finish(failing(&place));
    assert_eq!(run.code, Some(2), "{run:?}");
    assert!(run.err.contains("needs a terminal") && run.out.is_empty(), "{run:?}");
    assert!(!place.path("notes").exists());
}
