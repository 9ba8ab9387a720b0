//! The server or the agent dies at every step of a job, disks fill, and nothing is lost, told twice or
//! left behind.

use crate::server::{Fault, Result};
use crate::support::{AGENT, COMMANDS, Lab, Running, names_in, process_with, until};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const SCRIPT: &str = "echo one; sleep 0.05; echo two; mkdir artifacts; echo x > artifacts/x";

fn lab() -> Lab {
    let lab = Lab::new(COMMANDS);
    lab.script(SCRIPT);
    lab
}

fn is_whole(result: &Result, what: &str) {
    assert_eq!(result.state, "complete", "{what}");
    let statuses: Vec<_> = result.status.iter().map(|(phase, status)| (phase.as_str(), *status)).collect();
    assert_eq!(statuses, [("cleanup", 0), ("provision", 0), ("setup", 0), ("test", 0)], "{what}");
    assert!(result.output("test").ends_with("*\none\ntwo\n"), "{what}: {:?}", result.output("test"));
    assert!(result.output("cleanup").ends_with("*\nCLEANUP\n"), "{what}");
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/x"], "{what}");
    each_once(result, what);
    let names = result.event_names();
    assert_eq!(names.first().map(String::as_str), Some("job_start"), "{what}");
    assert_eq!(names.last().map(String::as_str), Some("job_end"), "{what}: {names:?}");
}

fn each_once(result: &Result, what: &str) {
    let numbers: Vec<_> = result.fragments.iter().map(|fragment| fragment.2).collect();
    assert_eq!(
        numbers,
        (0..numbers.len() as u64).collect::<Vec<_>>(),
        "{what}: fragments in order, each once"
    );
}

fn whole_job() -> serde_json::Value {
    json!({"provision_data": {"distro": "x"}, "job_status_webhook": "http://127.0.0.1:9/"})
}

/// Every so many requests one fails.
const STRIDE: usize = 7;

/// Runs jobs, the first with `fault` at its first request and every seventh after that, the second at
/// its second, and so on: each step of a job meets it.
fn at_every_step(fault: Fault) {
    let lab = lab();
    // With a token an agent is an agent alone, and may ask less than who has none.
    lab.server.expire_tokens();
    let jobs: Vec<_> = (0..STRIDE).map(|_| lab.submit(whole_job())).collect();
    let (of_hook, reached) = (jobs.clone(), Arc::new(AtomicU32::new(0)));
    let count = Arc::clone(&reached);
    let (mut current, mut seen_of_it) = (None, 0);
    lab.server.misbehave(move |seen| {
        let named =
            of_hook.iter().position(|id| seen.path.contains(id) || seen.json["job_id"] == *id.as_str());
        if named.is_some() && named != current {
            (current, seen_of_it) = (named, 0);
        }
        seen_of_it += 1;
        let faulty = current.is_some_and(|job| seen_of_it % STRIDE == job) && !seen.is("GET", "/v1/job");
        count.fetch_add(u32::from(faulty), Ordering::SeqCst);
        faulty.then_some(fault)
    });
    let _agent = lab.start_with(&["--token-file", &lab.token_file()]);
    for (number, job) in jobs.iter().enumerate() {
        is_whole(&lab.server.finished(job), &format!("{fault:?}, job {number}"));
    }
    assert!(reached.load(Ordering::SeqCst) > 40, "{reached:?} steps are no whole job");
    lab.server.behave();
    until("nothing waits", || names_in(&lab.results()).is_empty());
    lab.check();
}

#[test]
fn a_connection_breaks_at_every_step() {
    at_every_step(Fault::Drop);
}

#[test]
fn an_answer_is_lost_at_every_step() {
    at_every_step(Fault::Lose);
}

#[test]
fn the_server_fails_at_every_step() {
    at_every_step(Fault::Status(503));
}

#[test]
fn the_server_dies_and_comes_back_in_every_phase() {
    let lab = lab();
    let _agent = lab.start();
    for phase in ["setup", "provision", "firmware_update", "test", "allocate", "reserve"] {
        let job = lab.submit(whole_job());
        lab.server.until(phase, |state| state.results[&job].states.iter().any(|s| s == phase).then_some(()));
        let complaints = || lab.log().matches("no answer from").count();
        let before = complaints();
        lab.server.down();
        until("the agent has noticed", || complaints() > before);
        lab.server.up();
        is_whole(&lab.server.finished(&job), phase);
    }
    lab.check();
}

#[test]
fn the_agent_is_killed_at_every_step() {
    let lab = Lab::new(COMMANDS);
    lab.script("setsid sleep 1234505 & echo one; sleep 0.05; echo two");
    let mut steps = 0;
    for step in 1.. {
        let job = lab.submit(whole_job());
        let agent = lab.start();
        let told = lab.server.until("the step", |state| {
            let of_job = |path: &str| path.contains(&job);
            let begun = state.seen.iter().position(|s| of_job(&s.path))?;
            let over = state.results[&job].states.last().is_some_and(|state| state == "complete");
            (state.seen.len() - begun >= step || over).then_some(over)
        });
        agent.crash();
        if told {
            steps = step;
            break;
        }
        let again = lab.start();
        let result = lab.server.finished(&job);
        let what = format!("killed at step {step}: {result:?}\n{}", lab.log());
        assert_eq!(result.state, "complete", "{what}");
        assert!(result.status.contains_key("cleanup"), "{what}");
        assert!(result.output("cleanup").ends_with("*\nCLEANUP\n"), "{what}");
        each_once(&result, &what);
        assert!(!process_with("1234505"), "a process survived; {what}");
        lab.server.until("it works again", |state| (state.agents[AGENT]["state"] == "waiting").then_some(()));
        drop(again);
    }
    assert!(steps > 30, "{steps} steps are no whole job");
    lab.check();
}

#[test]
fn a_full_disk_loses_no_output() {
    let lab = Lab::new("cleanup_command: echo CLEANUP\ntest_command: seq 20000\n");
    let job = lab.submit(json!({}));
    let config = lab.path("testflinger-agent.conf");
    std::fs::write(&config, &lab.config).expect("writes");
    // No file grows over 16 KiB: what a full disk looks like to who writes.
    let mut command = Command::new("sh");
    command.arg("-c").arg("trap '' XFSZ; ulimit -f 32; exec \"$0\" agent -c \"$1\" --token-file none");
    command.arg(env!("CARGO_BIN_EXE_shakedown")).arg(config);
    let _agent = Running::start(command);
    let result = lab.server.finished(&job);
    let numbers: String = (1..=20000).map(|n| format!("{n}\n")).collect();
    assert!(result.output("test").ends_with(&numbers), "{} bytes", result.output("test").len());
    assert_eq!((result.status["test"], result.status["cleanup"]), (0, 0));
    each_once(&result, "full disk");
    lab.check();
}

#[test]
fn an_agent_without_room_takes_no_job() {
    let lab = Lab::new(COMMANDS);
    lab.script("true");
    let job = lab.submit(json!({}));
    let agent = lab.start();
    lab.server.finished(&job);
    drop(agent);
    let config = lab.path("testflinger-agent.conf");
    let mut command = Command::new("sh");
    command.arg("-c").arg("trap '' XFSZ; ulimit -f 1; exec \"$0\" agent -c \"$1\" --token-file none");
    command.arg(env!("CARGO_BIN_EXE_shakedown")).arg(config);
    let agent = Running::start(command);
    let before = lab.server.state().taken.len();
    let job = lab.submit(json!({}));
    let asked = lab.server.state().seen.len();
    lab.server.until("it lives", |state| (state.seen.len() > asked + 5).then_some(()));
    assert_eq!(lab.server.state().taken.len(), before, "a job that is taken is gone");
    drop(agent);
    let _agent = lab.start();
    lab.server.finished(&job);
}

#[test]
fn many_jobs_leave_nothing_behind() {
    leaves_nothing_behind(150);
}

#[test]
#[ignore = "takes a quarter of an hour; run it by its name after a change of what an agent keeps"]
fn ten_thousand_jobs_leave_nothing_behind() {
    leaves_nothing_behind(10_000);
}

/// What an agent takes of its host.
#[derive(Debug)]
struct Footprint {
    kib: u64,
    threads: u64,
    open: usize,
    /// In all its directories.
    files: Vec<String>,
    log: u64,
}

impl Footprint {
    fn of(agent: &Running, lab: &Lab) -> Self {
        let process = Path::new("/proc").join(agent.pid().to_string());
        let status = std::fs::read_to_string(process.join("status")).expect("reads");
        let number = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
            line.split_whitespace().next().expect("a number").parse().expect("a number")
        };
        let mut files: Vec<_> = ["run", "run/.shakedown", "results", "logs"]
            .into_iter()
            .flat_map(|dir| names_in(&lab.path(dir)).into_iter().map(move |name| format!("{dir}/{name}")))
            .collect();
        files.sort();
        Self {
            kib: number("VmRSS:"),
            threads: number("Threads:"),
            open: std::fs::read_dir(process.join("fd")).expect("reads").count(),
            files,
            log: std::fs::metadata(lab.path("logs/testflinger-agent.log")).expect("is there").len(),
        }
    }
}

/// Runs `count` jobs in a row, after some that warm up.
fn leaves_nothing_behind(count: u64) {
    let mut lab = Lab::new("test_command: echo x; mkdir artifacts; echo x > artifacts/x\n");
    lab.config = lab.config.replace("DEBUG", "INFO");
    let agent = lab.start();
    let run = |count: u64| {
        // A queue of some, so that the server need not remember all that was asked.
        for begun in (0..count).step_by(100) {
            let jobs: Vec<_> = (begun..count.min(begun + 100)).map(|_| lab.submit(json!({}))).collect();
            for job in &jobs {
                assert_eq!(lab.server.finished(job).status["test"], 0);
            }
            let mut state = lab.server.state();
            state.seen.clear();
            jobs.iter().for_each(|job| drop(state.results.remove(job)));
        }
        lab.server.until("it is idle", |state| state.seen.iter().any(|s| s.status == 204).then_some(()));
        Footprint::of(&agent, &lab)
    };
    let first = run(50);
    let last = run(count);
    println!("after 50 jobs {first:?}\nafter {count} more {last:?}");
    assert!(last.kib < first.kib + 1024, "memory grew from {} to {} kB", first.kib, last.kib);
    assert!(last.threads <= first.threads + 1 && last.open <= first.open + 2, "{first:?} {last:?}");
    assert_eq!(last.files, ["logs/testflinger-agent.log", "run/.shakedown", "run/.shakedown/a1.lock"]);
    let per_job = (last.log - first.log) / count;
    assert!(per_job < 500, "{per_job} bytes of log for a job");
    lab.check();
}
