//! `shakedown vm` on real machines.

use shakedown::prelude::*;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

const SHAKEDOWN: &str = env!("CARGO_BIN_EXE_shakedown");

/// The command in an empty directory, where it leaves its evidence.
fn shakedown(here: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(SHAKEDOWN);
    command.args(arguments).current_dir(here).stdin(Stdio::null());
    for variable in ["BOOT_IMAGE_VM_LOG_ROOT", "BOOT_IMAGE_VM_LEDGER_PATH", "SHAKEDOWN_DEBUG"] {
        command.env_remove(variable);
    }
    command
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[scenario(markers = [vm], timeout = "10m")]
fn a_command_on_a_machine_is_as_one_here() -> Result<()> {
    let here = tempfile::tempdir()?;
    for channel in [&[][..], &["--ssh"]] {
        let line = ["--disk", "64M", "--", "cat; lsblk -dnbo SIZE /dev/vda; echo e >&2; kill -TERM $$"];
        let mut command = shakedown(here.path(), &[&["vm", "run"][..], channel, &line].concat());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("piped")?.write_all(b"from here\n")?;
        let (status, out, err) = said(&child.wait_with_output()?);
        // The first use may have told that it boots a template.
        let last = err.lines().last().unwrap_or_default();
        let found = (status, out.as_str(), last);
        ensure!(found == (Some(143), "from here\n67108864\n", "e"), "{channel:?}: {found:?} {err}");
    }
    ensure!(here.path().join("notes/latest/vm-run/record.json").exists(), "no evidence");
    ensure!(!here.path().join("notes/vm-run-ledger.jsonl").exists(), "it is no scenario");
    Ok(())
}

#[scenario(markers = [vm], timeout = "10m")]
fn a_machine_is_listed_and_killed_from_elsewhere() -> Result<()> {
    let here = tempfile::tempdir()?;
    let mut run = shakedown(here.path(), &["vm", "run", "--ssh", "--", "echo begun; sleep 1000"]);
    let mut run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut begun = [0; 6];
    run.stdout.as_mut().context("piped")?.read_exact(&mut begun)?;
    let (_, list, _) = said(&shakedown(here.path(), &["vm", "list"]).output()?);
    let ours = here.path().canonicalize()?.display().to_string();
    let line =
        list.lines().find(|line| line.contains(&ours)).with_context(|| format!("not listed: {list}"))?;
    let id = line.split_whitespace().next().context("an id")?;
    let (status, out, err) = said(&shakedown(here.path(), &["vm", "kill", id]).output()?);
    ensure!((status, out) == (Some(0), format!("ended {id} (vm-run)\n")), "kill: {status:?} {err}");
    let (status, _, err) = said(&run.wait_with_output()?);
    ensure!(status == Some(125) && err.contains("QEMU ended with signal 9"), "run: {status:?} {err}");
    let (_, list, _) = said(&shakedown(here.path(), &["vm", "list"]).output()?);
    ensure!(!list.contains(&ours), "still listed: {list}");
    Ok(())
}

/// By script(1), which gives it a terminal and says how that is set afterwards.
#[scenario(markers = [vm], timeout = "10m")]
fn a_shell_is_left_by_its_key_and_gives_the_terminal_back() -> Result<()> {
    let here = tempfile::tempdir()?;
    let line = format!("stty rows 33 cols 101; {SHAKEDOWN} vm shell --hostname node-1; stty -a");
    let mut script = Command::new("script");
    script.args(["-qefc", &line, "/dev/null"]).current_dir(here.path());
    script.env_remove("BOOT_IMAGE_VM_LOG_ROOT").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut script = script.spawn().context("script(1)")?;
    let mut keys = script.stdin.take().context("piped")?;
    let mut screen = script.stdout.take().context("piped")?;
    let mut shown = String::new();
    let mut until = |words: &str| -> Result<()> {
        let mut buffer = [0; 4096];
        while !shown.contains(words) {
            let count = screen.read(&mut buffer)?;
            ensure!(count > 0, "{words:?} did not come: {shown}");
            shown += &String::from_utf8_lossy(&buffer[..count]);
        }
        Ok(())
    };
    until("# ")?;
    keys.write_all(b"echo $(hostname) $(stty size) $((6 * 7))\r")?;
    until("node-1 33 101 42")?;
    keys.write_all(b"\x1d")?;
    until(" -parenb")?;
    until("icrnl")?;
    drop(keys);
    let mut rest = String::new();
    screen.read_to_string(&mut rest)?;
    shown += &rest;
    let cooked = [" icanon", " echo ", " opost"].iter().all(|mode| shown.contains(mode));
    ensure!(cooked && script.wait()?.success(), "the terminal is not as it was: {shown}");
    Ok(())
}
