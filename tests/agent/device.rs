//! `shakedown device` where no machine is needed: what it refuses, what it says, and the files that make
//! a host a queue. With a machine it is in tests/scenarios.

use crate::support::until;
use rustix::process::Signal;
use serde_json::{Value, json};
use shakedown::process;
use shakedown::testflinger::agent::config::Config as AgentConfig;
use shakedown::testflinger::device::config::Config as DeviceConfig;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A job's run directory, and beside it a cache of its own.
struct Host {
    dir: tempfile::TempDir,
    rundir: PathBuf,
}

impl Host {
    fn new(config: &str, job: Value) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let rundir = dir.path().join("run/j1");
        std::fs::create_dir_all(&rundir).expect("makes");
        std::fs::write(dir.path().join("device.yaml"), config).expect("writes");
        let mut whole = json!({"job_id": "j1"});
        whole.as_object_mut().expect("an object").extend(job.as_object().expect("an object").clone());
        std::fs::write(rundir.join("testflinger.json"), whole.to_string()).expect("writes");
        // As agents make it.
        std::fs::write(rundir.join("device-connector-error.json"), "").expect("writes");
        Self { dir, rundir }
    }

    fn command(&self, stage: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
        command.args(["device", stage, "-c", "../../device.yaml", "testflinger.json"]);
        command.current_dir(&self.rundir).stdin(Stdio::null());
        command.env("SHAKEDOWN_CACHE", self.dir.path().join("cache")).env("agent_id", "a1");
        // As our agent calls it.
        command.env("SHAKEDOWN_JOB", "j1/test").env_remove("SHAKEDOWN_IMAGE");
        command
    }

    fn call(&self, stage: &str) -> (Option<i32>, String) {
        said(&self.command(stage).output().expect("runs"))
    }

    /// What the agent reads of a failed phase.
    fn error(&self, phase: &str) -> Value {
        let text = std::fs::read(self.rundir.join("device-connector-error.json")).expect("reads");
        let errors: Value = serde_json::from_slice(&text).expect("JSON");
        errors[format!("{phase}_exception_info")].clone()
    }
}

fn said(output: &Output) -> (Option<i32>, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

#[test]
fn a_job_that_asks_for_what_cannot_be_does_not_take_the_agent_offline() {
    for (data, words) in [
        (json!({"distro": "debain"}), "did you mean `debian`?"),
        (json!({"url": "http://127.0.0.1/x"}), "nothing is downloaded"),
        (json!({"distro": "/etc/hostname"}), "hostname"),
    ] {
        let host = Host::new("", json!({"provision_data": data}));
        let (code, said) = host.call("provision");
        assert!(code == Some(1) && said.contains(words), "{code:?} {said}");
        let error = host.error("provision");
        assert_eq!(error["exception_name"], "ProvisioningError");
        assert!(error["exception_cause"].as_str().is_some_and(|cause| cause.contains(words)), "{error}");
        assert!(!host.rundir.join("device-info.json").exists());
    }
}

/// A project whose one image is no image.
const BROKEN: &str = "[package]\nname = \"p\"\nversion = \"0.1.0\"\n\
    [package.metadata.shakedown.images]\nbroken = { file = \"broken.iso\" }\n";

#[test]
fn an_image_that_cannot_be_had_is_the_affair_of_who_chose_it() {
    for (config, data, expected) in [
        ("project: project", json!({"distro": "broken"}), 1),
        ("{project: project, image: broken}", json!({"ephemeral": true}), 46),
    ] {
        let host = Host::new(config, json!({"provision_data": data}));
        let project = host.dir.path().join("project");
        std::fs::create_dir(&project).expect("makes");
        std::fs::write(project.join("Cargo.toml"), BROKEN).expect("writes");
        std::fs::write(project.join("broken.iso"), "no image").expect("writes");
        let (code, said) = host.call("provision");
        assert!(code == Some(expected) && said.contains("broken.iso"), "{config}: {code:?} {said}");
    }
}

#[test]
fn what_every_job_would_meet_takes_the_agent_offline() {
    let job = json!({"provision_data": {"distro": "debian"}});
    for (config, words) in [("imgae: debian", "did you mean `image`?"), ("image: debain", "`debian`?")] {
        let host = Host::new(config, json!({"provision_data": {"ephemeral": true}}));
        let (code, said) = host.call("provision");
        assert!(code == Some(46) && said.contains(words), "{code:?} {said}");
        assert_eq!(host.error("provision")["exception_name"], "RecoveryError");
    }
    // A host without QEMU, whatever the image: that is seen by the keeper, which has ended then.
    let host = Host::new("", job);
    let (code, said) = said(&host.command("provision").env("PATH", "/nowhere").output().expect("runs"));
    assert!(
        code == Some(46) && said.contains("qemu-system-x86_64") && said.contains("fix: "),
        "{code:?} {said}"
    );
    let left = std::fs::read_dir(host.dir.path().join("cache/devices")).expect("made").count();
    assert_eq!(left, 0, "no record is left of what never ran");
}

#[test]
fn a_script_runs_beside_no_machine_where_the_job_wants_none() {
    let script = "echo $AGENT_NAME ip=$DEVICE_IP $TOKEN; pwd; exit 7";
    let data = json!({"test_cmds": script, "secrets": {"TOKEN": "s3cret"}});
    let host = Host::new("", json!({"test_data": data}));
    let (code, said) = host.call("runtest");
    assert!(code == Some(7) && said.contains("there is no machine"), "{code:?} {said}");
    assert!(said.contains(&format!("a1 ip= s3cret\n{}\n", host.rundir.display())), "{said}");
    let host = Host::new("", json!({"test_data": {"test_username": "me"}}));
    assert_eq!(host.call("runtest").0, Some(0), "nothing to run");
}

#[test]
fn phases_that_need_a_machine_say_when_there_is_none() {
    let data = json!({"test_cmds": "echo never", "ssh_keys": []});
    let job =
        json!({"provision_data": {"distro": "debian"}, "test_data": data, "reserve_data": {"timeout": 1}});
    let host = Host::new("", job);
    for (stage, phase) in [("runtest", "test"), ("allocate", "allocate"), ("reserve", "reserve")] {
        let (code, said) = host.call(stage);
        assert!(code == Some(1) && said.contains("there is no machine"), "{stage}: {code:?} {said}");
        assert_eq!(host.error(phase)["exception_name"], "DeviceError");
    }
    for _ in 0..2 {
        assert_eq!(host.call("cleanup"), (Some(0), "There is no machine to end.\n".into()));
    }
}

#[test]
fn firmware_and_unknown_keys_are_refused() {
    let host = Host::new("", json!({"firmware_update_data": {"version": "latest"}}));
    let (code, said) = host.call("firmware_update");
    assert!(code == Some(1) && said.contains("cannot be updated"), "{code:?} {said}");
    let host = Host::new("", json!({"firmware_update_data": {"ignore_failure": true}}));
    assert_eq!(host.call("firmware_update").0, Some(0));
    let host = Host::new("", json!({"reserve_data": {"ssh_keys": ["lp:me"]}}));
    let (code, said) = host.call("reserve");
    assert!(code == Some(1) && said.contains("`lp:me: ssh-ed25519 AAAA...`"), "{code:?} {said}");
}

#[test]
fn a_wrong_call_is_wrong_usage() {
    let host = Host::new("", json!({}));
    for arguments in [&["device", "provision"][..], &["device", "provison", "-c", "x"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_shakedown")).args(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(2));
    }
    let nobody = said(&host.command("cleanup").env_remove("agent_id").output().expect("runs"));
    assert!(nobody.0 == Some(46) && nobody.1.contains("`agent_name`"), "{nobody:?}");
    std::fs::write(host.rundir.join("testflinger.json"), "{").expect("writes");
    let (code, said) = host.call("runtest");
    assert!(code == Some(1) && said.contains("testflinger.json"), "{said}");
    assert_eq!(host.call("cleanup").0, Some(0), "a script may have removed it");
}

#[test]
fn a_script_that_is_told_to_end_may_do_it_in_its_own_way() {
    let script = "trap 'echo >ended; exit 9' TERM; echo >begun; while :; do sleep 0.01; done";
    let host = Host::new("", json!({"test_data": {"test_cmds": script}}));
    let mut child = process::spawn(host.command("runtest")).expect("starts");
    until("it has begun", || host.rundir.join("begun").exists());
    child.signal(Signal::TERM);
    let deadline = shakedown::deadline::Deadline::after(std::time::Duration::from_secs(60), "test");
    let status = child.wait(&deadline).expect("ends");
    assert_eq!((status.code(), status.signal()), (Some(9), None));
    assert!(host.rundir.join("ended").exists());
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/testflinger").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(fixture(name)).expect("reads")
}

#[test]
fn the_files_that_make_a_host_a_queue_are_right() {
    use shakedown::testflinger::wire::Phase;
    let agent = AgentConfig::parse(&read("testflinger-agent.conf")).expect("is right");
    for phase in Phase::ALL.into_iter().filter(|phase| *phase != Phase::Setup) {
        let stage = if phase == Phase::Test { "runtest" } else { phase.name() };
        let line = format!("shakedown device {stage} -c /etc/shakedown/device.yaml testflinger.json");
        assert_eq!(agent.command(phase), Some(line.as_str()));
    }
    // What is commented out in it is right as well.
    let device = read("device.yaml");
    let whole: Vec<_> = device.lines().skip(1).map(|line| line.strip_prefix("# ").unwrap_or(line)).collect();
    for text in [device.clone(), whole.join("\n")] {
        DeviceConfig::parse(&text, Path::new("/etc/shakedown")).expect(&text);
    }
    let job: Value = serde_saphyr::from_str(&read("job.yaml")).expect("YAML");
    assert_eq!(job["job_queue"], agent.job_queues[0].as_str());
    assert_eq!(job["provision_data"], json!({"distro": "debian"}));
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let unit = read("shakedown-agent.service");
    let start = "ExecStart=/usr/local/bin/shakedown agent -c /etc/shakedown/testflinger-agent.conf ";
    assert!(unit.contains(start));
    // The program is not installed here.
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("shakedown-agent.service");
    std::fs::write(&path, unit.replace("/usr/local/bin/shakedown", "/bin/true")).expect("writes");
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no"]).arg(&path);
    let output = verify.output().expect("`shakedown doctor --install` installs systemd-analyze");
    let (code, said) = said(&output);
    assert!(code == Some(0) && said.is_empty(), "{code:?} {said}");
}
