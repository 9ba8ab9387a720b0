//! What is sent at the end of a job, what waits when it cannot be, and what the original left.

use crate::server::{Fault, Server};
use crate::support::{AGENT, COMMANDS, Lab, QUEUE, job, names_in, until};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn lab(script: &str) -> Lab {
    let lab = Lab::new(COMMANDS);
    lab.script(script);
    lab
}

const WITH_ARTIFACTS: &str = "mkdir artifacts; echo content > artifacts/file; echo done";

/// Answers `status` to what ends in `end`, until it is told to stop.
fn refuse(server: &Server, end: &'static str, status: u16) -> Arc<AtomicBool> {
    let refusing = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&refusing);
    server.misbehave(move |seen| {
        (seen.method == "POST" && seen.path.ends_with(end) && asked.load(Ordering::Relaxed))
            .then_some(Fault::Status(status))
    });
    refusing
}

#[test]
fn artifacts_are_never_deleted_unsent() {
    let lab = lab(WITH_ARTIFACTS);
    let job = lab.submit(json!({}));
    let refusing = refuse(&lab.server, "/artifact", 503);
    let _agent = lab.start();
    let waiting = lab.results().join(&job);
    until("the results wait", || waiting.join(".shakedown/memo.json").exists());
    // In the shape that the original sends, too.
    assert!(waiting.join("testflinger.json").exists() && waiting.join("artifacts/file").exists());
    let outcome = std::fs::read_to_string(waiting.join("testflinger-outcome.json")).expect("reads");
    assert_eq!(outcome, r#"{"status": {"setup": 0, "test": 0, "cleanup": 0}}"#);
    assert!(!lab.rundir(&job).exists());
    refusing.store(false, Ordering::Relaxed);
    let result = lab.server.finished(&job);
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/file"]);
    until("nothing waits", || names_in(&lab.results()).is_empty());
    lab.check();
}

#[test]
fn artifacts_that_no_server_takes_are_kept_and_the_job_ends() {
    let lab = lab(WITH_ARTIFACTS);
    let job = lab.submit(json!({}));
    let _refusing = refuse(&lab.server, "/artifact", 413);
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert!(result.output("cleanup").contains("ERROR: The artifacts could not be stored"), "{result:?}");
    let kept = lab.results().join("quarantine").join(&job);
    until("they are kept", || kept.join("artifacts/file").exists());
    let next = lab.submit(json!({"test_data": null}));
    lab.server.finished(&next);
}

#[test]
fn a_lost_connection_while_uploading_is_tried_again() {
    let lab = lab(WITH_ARTIFACTS);
    let job = lab.submit(json!({}));
    let cut = AtomicBool::new(false);
    lab.server.misbehave(move |seen| {
        (seen.path.ends_with("/artifact") && !cut.swap(true, Ordering::Relaxed)).then_some(Fault::Drop)
    });
    let _agent = lab.start();
    assert_eq!(lab.server.finished(&job).artifact_names(), ["artifacts", "artifacts/file"]);
}

#[test]
fn a_job_ends_without_its_server_and_is_told_in_full_later() {
    let lab = lab(
        "echo begun; until [ -e ../../go ]; do sleep 0.02; done; seq 1000; mkdir artifacts; echo x > artifacts/x",
    );
    let job = lab.submit(json!({}));
    let agent = lab.start();
    lab.server
        .until("the test runs", |state| state.results[&job].output("test").contains("begun").then_some(()));
    lab.server.down();
    std::fs::write(lab.path("go"), "").expect("writes");
    let waiting = lab.results().join(&job);
    until("the results wait", || waiting.join(".shakedown/memo.json").exists());
    // Also over a restart.
    drop(agent);
    lab.server.up();
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    let numbers: String = (1..=1000).map(|n| format!("{n}\n")).collect();
    assert!(result.output("test").ends_with(&format!("begun\n{numbers}")), "{}", result.output("test"));
    assert!(result.output("cleanup").ends_with("CLEANUP\n"));
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/x"]);
    let numbers: Vec<_> = result.fragments.iter().map(|fragment| fragment.2).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>(), "in order, and each once");
    lab.check();
}

/// As the original leaves a job that it could not send, or was killed in.
fn left_by_the_original(dir: &Path, job: &serde_json::Value, outcome: &str) {
    std::fs::create_dir_all(dir.join("artifacts")).expect("makes");
    std::fs::write(dir.join("testflinger.json"), job.to_string()).expect("writes");
    std::fs::write(dir.join("testflinger-outcome.json"), outcome).expect("writes");
    std::fs::write(dir.join("artifacts/file"), "x").expect("writes");
}

#[test]
fn what_the_original_left_is_sent_and_what_is_broken_is_set_aside() {
    let lab = lab("true");
    let job = job(json!({}));
    let id = job["job_id"].as_str().expect("an id").to_owned();
    left_by_the_original(&lab.results().join(&id), &job, r#"{"status": {"setup": 0, "test": 3}}"#);
    let poison = lab.results().join("00000000-0000-4000-8000-00000000dead");
    std::fs::create_dir_all(&poison).expect("makes");
    std::fs::write(poison.join("testflinger.json"), "{\"job_id\": \"00").expect("writes");
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::open(&poison).and_then(|dir| dir.set_modified(old)).expect("ages");
    let _agent = lab.start();
    let result = lab.server.finished(&id);
    assert_eq!((result.status["test"], result.state.as_str()), (3, "complete"));
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/file"]);
    until("only the quarantine is left", || names_in(&lab.results()) == ["quarantine"]);
    assert_eq!(names_in(&lab.results().join("quarantine")), ["00000000-0000-4000-8000-00000000dead"]);
    let next = lab.submit(json!({}));
    lab.server.finished(&next);
    lab.check();
}

#[test]
fn a_job_in_which_the_original_was_killed_is_cleaned_up_and_told() {
    let lab = lab("echo never");
    let job = job(json!({}));
    let id = job["job_id"].as_str().expect("an id").to_owned();
    left_by_the_original(&lab.rundir(&id), &job, r#"{"status": {"setup": 0}}"#);
    {
        let mut state = lab.server.state();
        let data = json!({"name": AGENT, "state": "test", "comment": "", "job_id": id, "queues": [QUEUE]});
        state.agents.insert(AGENT.into(), data.as_object().expect("an object").clone());
        let result = state.results.entry(id.clone()).or_default();
        result.state = "test".into();
        result.fragments.push(("output".into(), "test".into(), 7, "theirs\n".into()));
    }
    // What it started runs on.
    let mut survivor = std::process::Command::new("sleep")
        .arg("1234504")
        .current_dir(lab.rundir(&id))
        .env("agent_id", AGENT)
        .spawn()
        .expect("starts");
    let _agent = lab.start();
    let result = lab.server.finished(&id);
    assert_eq!((result.status["setup"], result.status["test"], result.status["cleanup"]), (0, 100, 0));
    let output = result.output("test");
    assert!(output.starts_with("theirs\n\nERROR: The agent died during this phase"), "{output}");
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/file"]);
    assert!(!survivor.wait().expect("ends").success());
    lab.check();
}

#[test]
fn a_job_of_which_nothing_is_left_is_ended() {
    let lab = lab("true");
    let id = "00000000-0000-4000-8000-00000000beef";
    {
        let mut state = lab.server.state();
        let data =
            json!({"name": AGENT, "state": "provision", "comment": "", "job_id": id, "queues": [QUEUE]});
        state.agents.insert(AGENT.into(), data.as_object().expect("an object").clone());
        state.results.entry(id.into()).or_default().state = "provision".into();
    }
    let _agent = lab.start();
    let result = lab.server.finished(id);
    assert_eq!((result.state.as_str(), result.status["provision"]), ("complete", 100));
}
