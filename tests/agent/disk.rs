//! A disk that fills up under a job: all that is on it is on one small file system of the agent's own.

use crate::server::Result;
use crate::support::{Lab, Running, names_in, until};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An agent whose directories are on a file system of 16 MiB that it alone sees.
struct Small {
    lab: Lab,
    _agent: Running,
    /// That file system, seen from here.
    disk: PathBuf,
}

impl Small {
    fn new(commands: &str) -> Self {
        let mut lab = Lab::new(commands);
        let disk = lab.path("disk");
        std::fs::create_dir(&disk).expect("makes");
        let base = lab.dir.path().display().to_string();
        for dir in ["run", "logs", "results"] {
            lab.config = lab.config.replace(&format!("{base}/{dir}\n"), &format!("{base}/disk/{dir}\n"));
        }
        let config = lab.path("testflinger-agent.conf");
        std::fs::write(&config, &lab.config).expect("writes");
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            // Root there is this user here.
            command.arg("--map-root-user");
        }
        command.args(["--mount", "sh", "-euc", "mount -t tmpfs -o size=16m tmpfs \"$0\"; exec \"$@\""]);
        command.arg(&disk).arg(env!("CARGO_BIN_EXE_shakedown")).args(["agent", "--token-file", "none", "-c"]);
        let agent = Running::start({
            command.arg(config);
            command
        });
        let disk = Path::new("/proc")
            .join(agent.pid().to_string())
            .join("root")
            .join(disk.strip_prefix("/").expect("absolute"));
        let small = Self { lab, _agent: agent, disk };
        // Where none may be mounted, `unshare` or `mount` has said so above, and nothing comes.
        small
            .lab
            .server
            .until("an agent on a file system of its own (does this user have namespaces?)", |state| {
                (!state.agents.is_empty()).then_some(())
            });
        small
    }
}

/// Takes all the room there is, then talks.
const FILL: &str = "\
test_command: |
  echo before; mkdir artifacts; head -c 300000 /dev/urandom > artifacts/file
  cat /dev/zero > ../../fill 2>/dev/null
  seq 1000000; until [ -e ../../../go ]; do sleep 0.02; done; echo after
cleanup_command: touch ../../../cleaned; exit 3
";

fn talked() -> String {
    let numbers: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
    format!("before\n{numbers}after\n")
}

fn is_whole(result: &Result) {
    assert!(result.output("test").ends_with(&talked()), "{} bytes", result.output("test").len());
    let statuses: Vec<_> = result.status.iter().map(|(phase, status)| (phase.as_str(), *status)).collect();
    assert_eq!(statuses, [("cleanup", 3), ("test", 0)]);
    let numbers: Vec<_> = result.fragments.iter().map(|fragment| fragment.2).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>(), "in order, and each once");
}

#[test]
fn a_job_that_fills_the_disk_is_told_and_what_had_no_room_waits() {
    let small = Small::new(FILL);
    let server = &small.lab.server;
    std::fs::write(small.lab.path("go"), "").expect("writes");
    let job = small.lab.submit(json!({"job_status_webhook": "http://127.0.0.1:9/"}));
    let waiting = small.disk.join("results").join(&job);
    until("its results wait", || waiting.join(".shakedown/memo.json").exists());
    let result = server.state().results[&job].clone();
    is_whole(&result);
    assert_eq!(result.event_names().last().map(String::as_str), Some("job_end"));
    assert_eq!(
        (result.state.as_str(), &result.artifact),
        ("reserve", &None),
        "its artifacts could not be packed"
    );
    let next = small.lab.submit(json!({"test_data": null}));
    let seen = server.state().seen.len();
    server.until("it lives", |state| (state.seen.len() > seen + 9).then_some(()));
    assert_eq!(server.state().taken, [job.as_str()], "there is no room for another job");

    std::fs::remove_file(small.disk.join("fill")).expect("removes");
    let result = server.finished(&job);
    is_whole(&result);
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/file"]);
    let path = format!("/v1/result/{job}");
    let last =
        server.state().seen.iter().rev().find(|seen| seen.is("POST", &path)).map(|seen| seen.json.clone());
    let expected = json!({"status": {"test": 0, "cleanup": 3}, "job_state": "complete"});
    assert_eq!(last, Some(expected), "what was known at its end was kept");
    server.finished(&next);
    until("nothing waits", || names_in(&small.disk.join("results")).is_empty());
    small.lab.check();
}

#[test]
fn without_room_and_without_a_server_output_is_kept_in_memory() {
    let small = Small::new(FILL);
    let server = &small.lab.server;
    let job = small.lab.submit(json!({}));
    until("there is no room", || {
        std::fs::metadata(small.disk.join("fill")).is_ok_and(|fill| fill.len() > 14 << 20)
    });
    server.down();
    std::fs::write(small.lab.path("go"), "").expect("writes");
    until("all phases are over", || small.lab.path("cleaned").exists());
    std::fs::remove_file(small.disk.join("fill")).expect("removes");
    let waiting = small.disk.join("results").join(&job);
    until("its results wait", || waiting.join(".shakedown/memo.json").exists());
    server.up();
    let result = server.finished(&job);
    is_whole(&result);
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/file"]);
    small.lab.check();
}
