//! Machines that go wrong: the outcome, who is blamed, what is left as evidence, and that it takes
//! seconds.

use super::support::{Ended, Place, boot_sector, debian, ended, signal, wait};
use rustix::process::Signal;
use shakedown::image::iso::Iso;
use shakedown::record::ledger::Record;
use shakedown::record::{Outcome, metadata::Metadata};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Runs one scenario on `image`, in a place without a cache.
fn boot(place: &Place, scenario: &str, image: &Path, variables: &[(&str, &str)]) -> Ended {
    let image = image.to_str().expect("UTF-8");
    place.run("machines", &["--exact", scenario], &[&[("SHAKEDOWN_IMAGE", image)], variables].concat())
}

/// The record of the only scenario that ran; ledger, metadata and files must agree with each other.
fn verdict(place: &Place, run: &Ended, outcome: Outcome) -> Record {
    let mut records = place.records();
    let record = records.pop().expect("a record");
    assert_eq!((record.outcome, records.len()), (outcome, 0), "{run:?}");
    let code = if outcome == Outcome::Interrupted { 130 } else { 101 };
    assert_eq!(run.code, Some(code), "{run:?}");
    let file =
        |path: &Path| std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let path = record.metadata.as_deref().expect("a path");
    let metadata: Metadata = serde_json::from_slice(&file(path)).expect("valid");
    assert_eq!((metadata.outcome, &metadata.reason), (Some(outcome), &record.reason));
    let kept: Record = serde_json::from_slice(&file(&path.with_file_name("record.json"))).expect("valid");
    assert_eq!(kept, record);
    for diagnostic in &record.diagnostics {
        file(&diagnostic.path);
    }
    file(record.harness_log.as_deref().expect("a log"));
    place.is_deserted();
    record
}

fn reason(record: &Record) -> &str {
    record.reason.as_deref().expect("a reason")
}

/// Fails unless there is a diagnostic with each of these labels.
fn has_evidence(record: &Record, labels: &[&str]) {
    let found: Vec<_> = record.diagnostics.iter().map(|diagnostic| diagnostic.label.as_str()).collect();
    assert!(labels.iter().all(|label| found.contains(label)), "{found:?}");
}

/// What a machine that lives can tell.
const ALL_EVIDENCE: &[&str] =
    &["screenshot", "dmesg", "journal", "failed-units", "jobs", "lsblk", "mdadm", "lvm", "network"];

#[test]
fn a_missing_tool_is_an_error_that_is_the_fix() {
    let place = Place::new();
    boot_sector(&place.path("disk.img"), "");
    let empty = place.path("tmp").display().to_string();
    let run = boot(&place, "boots", &place.path("disk.img"), &[("PATH", &empty), ("SHAKEDOWN_ACCEL", "tcg")]);
    let record = verdict(&place, &run, Outcome::Error);
    for words in ["qemu-system-x86_64 not found", "Fix: Install", "qemu-system-x86"] {
        assert!(reason(&record).contains(words), "{}", reason(&record));
    }
}

#[test]
fn a_guest_that_says_nothing_has_failed() {
    let place = Place::new();
    boot_sector(&place.path("disk.img"), "");
    let run = boot(&place, "boots", &place.path("disk.img"), &[("BOOT_IMAGE_VM_SPAWN_TIMEOUT", "2")]);
    let record = verdict(&place, &run, Outcome::Failed);
    for words in ["nothing on the serial console", "no answer within 2 s (BOOT_IMAGE_VM_SPAWN_TIMEOUT)"] {
        assert!(reason(&record).contains(words), "{}", reason(&record));
    }
    has_evidence(&record, &["screenshot"]);
}

#[test]
fn a_guest_that_never_lets_us_in_has_failed() {
    let place = Place::new();
    boot_sector(&place.path("disk.img"), "Loading...\r\n");
    let run = boot(&place, "boots", &place.path("disk.img"), &[("BOOT_IMAGE_VM_LOGIN_TIMEOUT", "2")]);
    let record = verdict(&place, &run, Outcome::Failed);
    for words in ["no SSH", "  | Loading...", "(BOOT_IMAGE_VM_LOGIN_TIMEOUT)"] {
        assert!(reason(&record).contains(words), "{}", reason(&record));
    }
    has_evidence(&record, &["screenshot"]);
}

#[test]
fn ctrl_c_in_the_middle_of_a_boot_leaves_nothing_running() {
    let place = Place::new();
    boot_sector(&place.path("disk.img"), "Loading...\r\n");
    let mut command = place.command("machines", &["--exact", "boots"]);
    let child = command.env("SHAKEDOWN_IMAGE", place.path("disk.img")).spawn().expect("starts");
    let log = place.path("notes/latest/boots/logs/harness.log");
    wait("the guest speaks", || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("first output on the console"))
    });
    signal(&child, Signal::INT);
    let run = ended(child.wait_with_output().expect("ends"));
    verdict(&place, &run, Outcome::Interrupted);
    place.is_tidy();
}

#[test]
fn a_body_that_hangs_loses_its_machine() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "Loading...\r\n");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let run = boot(&place, "body_hangs", &image, &[]);
    let record = verdict(&place, &run, Outcome::Failed);
    assert!(reason(&record).contains("no answer within 5 s (scenario timeout)"), "{}", reason(&record));
    let log = std::fs::read_to_string(record.harness_log.expect("a log")).expect("reads");
    assert!(log.contains("the machine is killed: "), "{log}");
}

#[test]
fn a_machine_without_login_panics_with_a_picture() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "Loading...\r\n");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let run = boot(&place, "body_panics", &image, &[]);
    let record = verdict(&place, &run, Outcome::Failed);
    let text = reason(&record);
    assert!(text.starts_with("the machine still runs\n  at tests/selftest/machines.rs:"), "{text}");
    has_evidence(&record, &["screenshot"]);
    place.is_tidy();
}

#[test]
fn a_truncated_image_is_refused_before_it_boots() {
    let place = Place::new();
    let image = place.path("short.iso");
    std::fs::copy(debian().file, &image).expect("copies");
    std::fs::File::options().write(true).open(&image).and_then(|file| file.set_len(1 << 20)).expect("cuts");
    let run = boot(&place, "boots", &image, &[]);
    let record = verdict(&place, &run, Outcome::Error);
    let text = reason(&record);
    assert!(text.contains("short.iso") && text.contains("it is truncated: "), "{text}");
}

#[test]
fn an_image_whose_root_is_broken_fails_as_soon_as_it_says_so() {
    let place = Place::new();
    let (debian, image) = (debian(), place.path("broken.iso"));
    let root = Iso::open(&debian.file).expect("an ISO").find("live/root.squashfs").expect("sound");
    std::fs::copy(&debian.file, &image).expect("copies");
    let mut file = std::fs::File::options().write(true).open(&image).expect("opens");
    file.seek(SeekFrom::Start(root.expect("a root").offset)).expect("seeks");
    file.write_all(&[0; 4096]).expect("breaks the superblock");
    let run = boot(&place, "boots", &image, &[]);
    let record = verdict(&place, &run, Outcome::Failed);
    for words in ["the machine powered itself off", "shakedown-init: FAILED: live/root.squashfs of image"] {
        assert!(reason(&record).contains(words), "{}", reason(&record));
    }
}

#[test]
fn a_qemu_that_is_killed_is_an_error_at_once() {
    let place = Place::with_images();
    let run = place.run("machines", &["qemu_is_killed"], &[]);
    let record = verdict(&place, &run, Outcome::Error);
    assert!(reason(&record).starts_with("QEMU ended with signal 9"), "{}", reason(&record));
    assert!(record.duration_seconds < 500.0, "it did not wait for the command");
    let metadata = record.metadata.as_deref().expect("a path");
    assert!(metadata.with_file_name("logs/qemu.stderr").exists());
}

#[test]
fn a_command_that_hangs_fails_and_spoils_nothing() {
    let place = Place::with_images();
    let run = place.run("machines", &["command_hangs"], &[]);
    let record = verdict(&place, &run, Outcome::Failed);
    let text = reason(&record);
    assert!(text.contains("`sleep 1000`") && text.contains("no answer within 2 s"), "{text}");
    has_evidence(&record, ALL_EVIDENCE);
}

#[test]
fn a_machine_that_is_lost_has_failed_and_says_how() {
    let place = Place::with_images();
    let run = place.run("machines", &["lost_"], &[]);
    let records = place.records();
    let [restart, agent, sshd] = &records[..] else { panic!("three records: {run:?}") };
    assert!(records.iter().all(|record| record.outcome == Outcome::Failed), "{run:?}");
    assert!(reason(restart).starts_with("the machine restarted by itself"), "{}", reason(restart));
    assert!(reason(sshd).starts_with("the machine broke the connection; the last lines"), "{}", reason(sshd));
    assert!(reason(agent).starts_with("the machine does not answer; the last lines"), "{}", reason(agent));
    has_evidence(sshd, ALL_EVIDENCE);
    has_evidence(agent, ALL_EVIDENCE);
    place.is_deserted();
}

#[test]
fn a_fork_that_its_scenario_made_says_how_it_ended() {
    let place = Place::with_images();
    let run = place.run("machines", &["sibling_"], &[]);
    let records = place.records();
    let [fails, off] = &records[..] else { panic!("two records: {run:?}") };
    assert_eq!((fails.outcome, off.outcome), (Outcome::Failed, Outcome::Failed), "{run:?}");
    assert!(reason(off).starts_with("the machine powered itself off\nseen as: "), "{}", reason(off));
    let scenario = fails.metadata.as_deref().and_then(Path::parent).expect("a directory");
    for file in ["dmesg-02.txt", "lsblk-06.txt"] {
        assert!(scenario.join("sibling-1/logs/diagnostics").join(file).exists(), "no {file}");
    }
    place.is_deserted();
}

#[test]
fn a_template_that_does_not_boot_is_booted_once_in_a_run() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "Loading...\r\n");
    let image = image.to_str().expect("UTF-8");
    let variables = [("SHAKEDOWN_IMAGE", image), ("BOOT_IMAGE_VM_LOGIN_TIMEOUT", "1")];
    // answers, body_panics, command_hangs.
    let run = place.run("machines", &["an", "--skip", "body_hangs"], &variables);
    let records = place.records();
    assert!(records.iter().all(|record| record.outcome == Outcome::Failed), "{run:?}");
    let again = records.iter().filter(|record| reason(record).contains("before in this run")).count();
    assert_eq!((records.len(), again), (3, 2), "{run:?}");
    assert!(records.iter().all(|record| reason(record).contains("/template-disk-img")), "{run:?}");
    let latest = std::fs::read_dir(place.path("notes/latest")).expect("reads").flatten();
    let boots = latest.filter(|entry| entry.file_name().to_string_lossy().starts_with("template-")).count();
    assert_eq!(boots, 1, "{run:?}");
}

#[test]
fn what_never_comes_is_waited_for_until_the_scenario_s_time_is_up() {
    let place = Place::with_images();
    let run = place.run("machines", &["time_is_up"], &[]);
    let record = verdict(&place, &run, Outcome::Failed);
    let text = reason(&record);
    assert!(text.contains("`what is never printed` did not come"), "{text}");
    assert!(text.contains("no answer within 20 s (scenario timeout)"), "{text}");
    has_evidence(&record, ALL_EVIDENCE);
}
