//! Bad input and bad hosts: each a clear error that names the thing and the fix; nothing is published
//! by halves, nothing is left running.

use super::support::{Ended, Place, boot_sector, ended, finish, programs};
use std::path::Path;
use std::process::{Command, Stdio};

/// Fails unless the run ended with this status and said all of this.
fn says(run: &Ended, code: i32, words: &[&str]) {
    let text = format!("{}{}", run.out, run.err);
    assert_eq!(run.code, Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in\n{text}");
    }
}

#[test]
fn wrong_variables_end_a_run_before_it_begins() {
    for (variable, value, words) in [
        (
            "SHAKEDOWN_ACCELL",
            "tcg",
            ["unknown environment variable SHAKEDOWN_ACCELL", "mean SHAKEDOWN_ACCEL?"],
        ),
        ("SHAKEDOWN_ACCEL", "hvf", ["SHAKEDOWN_ACCEL=hvf is not usable", "tcg or kvm"]),
        ("SHAKEDOWN_VMS", "many", ["SHAKEDOWN_VMS=many is not usable", "a whole number of machines"]),
        ("SHAKEDOWN_CACHE", "here", ["SHAKEDOWN_CACHE=here is not usable", "an absolute path"]),
        ("SHAKEDOWN_MARKERS", "slwo", ["unknown marker `slwo`", "did you mean `slow`?"]),
        ("BOOT_IMAGE_VM_SPAWN_TIMEOUT", "5m", ["SPAWN_TIMEOUT=5m is not usable", "default: 900"]),
        ("BOOT_IMAGE_VM_LOGIN_TIMEOUT", "0", ["LOGIN_TIMEOUT=0 is not usable", "default: 300"]),
        ("SHAKEDOWN_SESSION_BUDGET", "0", ["SESSION_BUDGET=0 is not usable", "default: 3000"]),
        ("SHAKEDOWN_SESSION_BUDGET", "50m", ["SESSION_BUDGET=50m is not usable", "above zero"]),
        (
            "BOOT_IMAGE_VM_DISABLE_LEDGER",
            "on",
            ["DISABLE_LEDGER=on is not usable", "1, true, yes, 0, false, no"],
        ),
    ] {
        let place = Place::new();
        let run = place.run("machines", &["boots"], &[(variable, value)]);
        says(&run, 2, &words);
        assert_eq!(run.out, "", "nothing ran");
        assert!(!place.path("notes").exists() && !place.path("ledger.jsonl").exists());
    }
}

#[test]
fn files_that_are_no_images_are_named() {
    let place = Place::new();
    let write = |name: &str, bytes: &[u8]| std::fs::write(place.path(name), bytes).expect("writes");
    write("text.iso", b"not an image");
    write("packed.iso", b"\x1f\x8b\x08 and so on");
    write("empty.iso", b"");
    let mut corrupt = vec![0; 40 << 10];
    corrupt[32768..32775].copy_from_slice(b"\x01CD001\x01");
    write("corrupt.iso", &corrupt);
    boot_sector(&place.path("disk.img"), "");
    write("disk.img.toml", b"usr = 'root'");
    for (file, words) in [
        ("missing.iso", ["there is no image", "Fix: correct the path"]),
        ("text.iso", ["neither ISO 9660, qcow2 nor a disk", "text"]),
        ("packed.iso", ["a gzip file", "unpack it first"]),
        ("empty.iso", ["cannot be used as an image", "it is empty"]),
        ("corrupt.iso", ["cannot be used as an image", "it is corrupt"]),
        ("disk.img", ["disk.img.toml is wrong", "unknown key `usr`; did you mean `user`?"]),
    ] {
        let image = place.path(file).display().to_string();
        let run = place.run("machines", &["--exact", "boots"], &[("SHAKEDOWN_IMAGE", &image)]);
        says(
            &run,
            101,
            &[&["1 error", &*format!("SHAKEDOWN_IMAGE={image} is not usable")], &words[..]].concat(),
        );
    }
    place.is_deserted();
}

#[test]
fn a_wrong_cargo_toml_is_refused_by_the_command() {
    for (settings, words) in [
        ("ignored = []", &["unknown key `ignored`; did you mean `ignore`?"][..]),
        ("ignore = ['slo']", &["`ignore` names the unknown marker `slo`; did you mean `slow`?"]),
        ("tools.sshd = '--purge'", &["`tools.sshd` has \"--purge\"", "no package's name"]),
    ] {
        let place = Place::new();
        let manifest = format!("[package]\nname = 'x'\n[package.metadata.shakedown]\n{settings}\n");
        std::fs::write(place.path("Cargo.toml"), manifest).expect("writes");
        let mut doctor = Command::new(assert_cmd::cargo::cargo_bin!("shakedown"));
        doctor.arg("doctor").current_dir(place.path("")).envs(place.environment());
        let run = finish(doctor);
        says(&run, 2, &[&["[package.metadata.shakedown] of Cargo.toml"], words].concat());
    }
}

#[test]
fn an_old_qemu_is_an_error_that_says_which_will_do() {
    let place = Place::new();
    boot_sector(&place.path("disk.img"), "");
    let old = [("qemu-system-x86_64", "echo 'QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)'")];
    let path = programs(&place.path("bin"), &old);
    let mut command = place.command("machines", &["--exact", "boots"]);
    let image = ("SHAKEDOWN_IMAGE", place.path("disk.img").into_os_string());
    let run = finish({
        command.envs([("PATH", path), ("SHAKEDOWN_ACCEL", "tcg".into()), image]);
        command
    });
    says(
        &run,
        101,
        &["1 error", "qemu-system-x86_64 5.2.0 is too old, 7.1 or newer is needed", "Fix: Upgrade"],
    );
}

#[test]
fn two_processes_at_once_share_slots_and_ledger() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let children: Vec<_> = (0..2)
        .map(|_| {
            let mut command = place.command("machines", &["--exact", "boots"]);
            command.env("SHAKEDOWN_IMAGE", &image).env("SHAKEDOWN_VMS", "1");
            command.spawn().expect("starts")
        })
        .collect();
    for child in children {
        says(&ended(child.wait_with_output().expect("ends")), 0, &["1 passed"]);
    }
    assert_eq!(place.outcomes(), ["boots: passed", "boots: passed"]);
    let lives: Vec<_> = place
        .records()
        .iter()
        .map(|record| life(&record.metadata.as_ref().expect("a path").with_file_name("events.jsonl")))
        .collect();
    let [(a_start, a_end), (b_start, b_end)] = &lives[..] else { panic!("two records") };
    assert!(a_end <= b_start || b_end <= a_start, "both machines ran at once, with one slot: {lives:?}");
}

/// When a machine's QEMU started and ended.
fn life(events: &Path) -> (String, String) {
    let text = std::fs::read_to_string(events).expect("reads");
    let time = |event: &str| {
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        let line = lines.into_iter().find(|line| line["event"] == event).expect(event);
        line["time"].as_str().expect("a time").to_owned()
    };
    (time("qemu_started"), time("qemu_exited"))
}

/// A command in namespaces of its own: `script` prepares them, then `exec "$@"` is the command.
fn unshared(flags: &[&str], script: &str, command: &Command) -> Command {
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        // Root there is this user here.
        unshare.arg("--map-root-user");
    }
    unshare
        .args(flags)
        .args(["sh", "-euc", script, "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => unshare.env(name, value),
            None => unshare.env_remove(name),
        };
    }
    unshare.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    unshare
}

/// A file system of `size` at `$SMALL`, of which a copy is left at `$COPY`.
fn on_small_disk(size: &str, meanwhile: &str, small: &Path, copy: &Path, command: &Command) -> Ended {
    std::fs::create_dir_all(small).expect("makes");
    let script = format!(
        "mount -t tmpfs -o size={size} tmpfs \"$SMALL\"; {meanwhile} status=0; \"$@\" || status=$?; \
         cp -a \"$SMALL\" \"$COPY\"; exit $status"
    );
    let mut command = unshared(&["--mount"], &script, command);
    command.env("SMALL", small).env("COPY", copy);
    finish(command)
}

/// The names in the store that stand for an image, whole or half.
fn images(cache: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(cache.join("images")).expect("a store").flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.contains('.')).collect()
}

#[test]
fn a_cache_too_small_for_a_build_is_said_before_the_build() {
    let place = Place::new();
    let command = place.command("machines", &["--exact", "boots"]);
    let run = on_small_disk("64m", "", &place.path("cache"), &place.path("copy"), &command);
    says(&run, 101, &["1 error", "a build needs 1600 MiB", "image prune", "SHAKEDOWN_CACHE"]);
    assert_eq!(images(&place.path("copy")), [""; 0]);
    place.is_deserted();
}

#[test]
fn a_disk_that_fills_up_during_a_build_publishes_nothing() {
    let place = Place::new();
    let command = place.command("machines", &["--exact", "boots"]);
    // Once the build has found enough room, there is none.
    let shrink = "(until [ -e \"$SMALL\"/images/tmp-*/work ]; do sleep 0.02; done; \
                  used() { df --output=used -k \"$SMALL\" | tail -n 1; }; \
                  until mount -n -o remount,size=$(($(used) + 64))k tmpfs \"$SMALL\"; do sleep 0.02; done) & ";
    let run = on_small_disk("2g", shrink, &place.path("cache"), &place.path("copy"), &command);
    says(&run, 101, &["1 error", "No space left on device"]);
    assert_eq!(images(&place.path("copy")), [""; 0]);
    place.is_deserted();
}

#[test]
fn a_disk_that_fills_up_under_a_machine_is_an_error_of_this_host() {
    let place = Place::with_images();
    let command = place.command("machines", &["--exact", "disk_is_filled"]);
    let machines = shakedown::host::cache_dir().expect("a cache").join("machines");
    let run = on_small_disk("64m", "", &machines, &place.path("copy"), &command);
    says(&run, 101, &["1 error", "a broken disk: write of drive", "No space left on device", "seen as: "]);
    place.is_deserted();
}

#[test]
fn a_full_disk_under_the_evidence_is_an_error() {
    let place = Place::new();
    let image = place.path("disk.img");
    boot_sector(&image, "");
    std::fs::write(place.path("disk.img.toml"), "login = false").expect("writes");
    let mut command = place.command("machines", &["--exact", "boots"]);
    command.env("SHAKEDOWN_IMAGE", &image);
    // Room for the identity of the run, of the scenario, and for the beginning of its logs.
    let sizes = ["4k", "8k", "24k"];
    for size in sizes {
        let run = on_small_disk(size, "", &place.path("notes"), &place.path(size), &command);
        says(&run, 101, &["1 error", "No space left on device", "Fix: free space"]);
        place.is_deserted();
    }
    assert_eq!(place.outcomes(), sizes.map(|_| "boots: error"), "the ledger is elsewhere");
}

#[test]
fn a_ledger_that_cannot_be_written_is_an_error_that_keeps_the_evidence() {
    let place = Place::new();
    let run = place.run("selftest", &["--exact", "passes"], &[("BOOT_IMAGE_VM_LEDGER_PATH", "/dev/full")]);
    says(&run, 101, &["1 error", "/dev/full", "BOOT_IMAGE_VM_DISABLE_LEDGER=1"]);
    assert!(place.path("notes/latest/passes/record.json").exists());
}

#[test]
fn a_build_without_network_says_so() {
    let place = Place::new();
    let command = place.command("machines", &["--exact", "boots"]);
    let run = finish(unshared(&["--net"], "exec \"$@\"", &command));
    says(&run, 101, &["1 error", "mmdebstrap", "Fix: "]);
    assert_eq!(images(&place.path("cache")), [""; 0]);
    place.is_deserted();
}
