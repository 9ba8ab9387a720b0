//! Whole runs.

use crate::host::{Lab, Manner, QUEUE, example};
use rustix::process::{Pid, Signal, kill_process};
use shakedown::record::{Outcome, ledger};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use Manner::{CannotProvision, CannotStart, DiesAfterOne, Holds, Lies, Works};

const PASSES: [(&str, &str); 2] = [("group::passes_slowly", "passed"), ("passes", "passed")];

impl Lab {
    fn ledger(&self) -> Vec<ledger::Record> {
        let path = self.dir.path().join("notes/vm-run-ledger.jsonl");
        assert_eq!(ledger::check(&path).expect("reads"), []);
        ledger::read(&path).expect("reads").map(|line| line.expect("a record")).collect()
    }
}

#[test]
fn hosts_of_a_queue_make_one_run() {
    let mut lab = Lab::new(&[Works, Works]);
    lab.binary = example("selftest").to_owned();
    let ended = lab.run(&["-m", "not(broken)"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let ignored = |name: &'static str| (name, "ignored");
    let mut expected = PASSES.to_vec();
    let others = ["ignored_by_itself", "ignored_by_marker", "interrupted_a", "interrupted_b"].map(ignored);
    expected.splice(1..1, others);
    assert_eq!(ended.verdicts(), expected);
    assert_eq!(ended.reason("ignored_by_itself"), "the lab is closed");
    let records = lab.ledger();
    assert_eq!(records.len(), 6);
    for record in &records {
        assert_eq!(Some(record.run_id.as_str()), ended.report["run_id"].as_str());
    }
    let ran: Vec<_> = records.iter().filter_map(|record| record.metadata.clone()).collect();
    assert_eq!(ran.len(), 2);
    let run = PathBuf::from(ended.report["evidence"].as_str().expect("a path"));
    for metadata in ran {
        assert!(metadata.starts_with(&run) && metadata.is_file(), "{metadata:?}");
        assert!(metadata.with_file_name("logs").join("harness.log").is_file());
    }
    assert!(!run.join(".incoming").exists() && !run.join("shard.tar.gz").exists());
}

#[test]
fn failed_and_error_stay_apart_and_decide_the_exit_status() {
    let lab = Lab::new(&[Works]);
    let failed = lab.run(&["fails"]);
    assert_eq!((failed.code, failed.verdicts()), (Some(1), vec![("fails", "failed")]));
    assert_eq!(failed.reason("fails"), "3 disks expected, 2 found");
    let error = lab.run(&["host_breaks"]);
    assert_eq!((error.code, error.verdicts()), (Some(1), vec![("host_breaks", "error")]));
}

#[test]
fn what_a_dead_host_has_finished_is_not_repeated() {
    // Each of its jobs puts one scenario on record, and dies before its artifacts are sent.
    let lab = Lab::new(&[DiesAfterOne]);
    let ended = lab.run(&["pass", "--shards", "1"]);
    assert_eq!((ended.code, ended.verdicts()), (Some(0), PASSES.to_vec()), "{}", ended.err);
    let scenarios = |job: &crate::server::Job| -> Vec<bool> {
        let script = job.data["test_data"]["test_cmds"].as_str().expect("a script");
        PASSES.iter().map(|(name, _)| script.lines().any(|line| line == *name)).collect()
    };
    let jobs = lab.jobs();
    assert_eq!(jobs.len(), 2);
    assert_eq!(scenarios(&jobs[0]), [true, true]);
    assert_eq!(scenarios(&jobs[1]).iter().filter(|has| **has).count(), 1, "the other one is done");
    let records = lab.ledger();
    assert_eq!(records.len(), 2);
    for record in records {
        // Its evidence died with its host, but not what is known of it.
        assert!(record.metadata.is_some_and(|metadata| metadata.is_file()) && record.harness_log.is_none());
    }
}

#[test]
fn a_host_that_cannot_provision_gets_no_second_shard() {
    let lab = Lab::new(&[CannotProvision]);
    lab.server
        .state()
        .queues
        .entry(QUEUE.into())
        .or_default()
        .push(serde_json::json!({"name": "another", "state": "waiting"}));
    let mut command = lab.command(&["passes", "--shards", "1"]);
    let child = command.spawn().expect("starts");
    // Nobody takes the second one: its host is excluded.
    lab.server.until("it is submitted again", |state| (state.jobs.len() == 2).then_some(()));
    let second = lab.server.until("it has attachments", |state| {
        state.jobs.get(1).filter(|job| !job.waits_for_attachments).cloned()
    });
    assert_eq!(second.data["exclude_agents"], serde_json::json!(["host0"]));
    kill_process(Pid::from_child(&child), Signal::INT).expect("signals");
    let output = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("shard 0 on host0 is lost: its provision phase ended with status 1"), "{said}");
    assert_eq!(lab.jobs()[1].state, "cancelled");
}

#[test]
fn a_host_on_which_nothing_starts_gets_no_second_shard_and_says_why() {
    let lab = Lab::new(&[CannotStart]);
    let ended = lab.run(&["passes", "--shards", "1"]);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains("shard 0 on host0 is lost: its test binary ran none"), "{}", ended.err);
    assert!(ended.reason("passes").contains("exit status 127"), "{}", ended.reason("passes"));
    assert!(ended.reason("passes").contains("GLIBC_9.9 not found"), "{}", ended.reason("passes"));
}

#[test]
fn what_never_comes_back_ends_in_error_with_the_reason() {
    let lab = Lab::new(&[CannotProvision]);
    let ended = lab.run(&["passes", "--shards", "1"]);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert_eq!(lab.jobs().len(), 3);
    assert_eq!(ended.verdicts(), [("group::passes_slowly", "error"), ("passes", "error")]);
    let reason = ended.reason("passes");
    assert!(reason.contains("3 times") && reason.contains("provision phase ended with status 1"), "{reason}");
}

#[test]
fn a_host_has_no_say_on_other_scenarios_and_none_twice() {
    let lab = Lab::new(&[Lies]);
    let ended = lab.run(&["pass"]);
    assert_eq!((ended.code, ended.verdicts()), (Some(0), PASSES.to_vec()), "{}", ended.err);
    assert_eq!(lab.ledger().len(), 2);
}

#[test]
fn ctrl_c_cancels_all_jobs_and_marks_what_is_not_finished() {
    let lab = Lab::new(&[Holds]);
    let child = lab.command(&["pass"]).spawn().expect("starts");
    lab.server.until("a host has it", |state| state.jobs.iter().any(|job| job.state == "test").then_some(()));
    kill_process(Pid::from_child(&child), Signal::INT).expect("signals");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(lab.jobs().iter().all(|job| job.state == "cancelled"));
    let outcomes: Vec<_> = lab.ledger().iter().map(|record| record.outcome).collect();
    assert_eq!(outcomes, [Outcome::Interrupted, Outcome::Interrupted]);
}

#[test]
fn ctrl_c_cancels_also_a_job_whose_submission_had_no_answer() {
    use crate::http::Fault;
    let lab = Lab::new(&[]);
    let agent = serde_json::json!({"name": "host0", "state": "waiting"});
    lab.server.state().queues.insert(QUEUE.into(), vec![agent]);
    lab.server.misbehave(|request| match request.method.as_str() {
        "POST" if request.path == "/v1/job" => Some(Fault::Lose),
        // Whether it is there is not said either.
        "GET" if request.path.starts_with("/v1/job/") => Some(Fault::Status(503)),
        _ => None,
    });
    let child = lab.command(&["passes", "--shards", "1"]).spawn().expect("starts");
    lab.server.until("it asks whether the job is there", |state| {
        let looked = state.seen.iter().any(|(_, status)| *status == 503);
        (looked && state.jobs.len() == 1).then_some(())
    });
    kill_process(Pid::from_child(&child), Signal::INT).expect("signals");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(lab.jobs()[0].state, "cancelled");
}

#[test]
fn files_of_the_template_travel_with_each_shard() {
    let lab = Lab::new(&[Works]);
    let path = |name: &str| lab.dir.path().join(name);
    std::fs::write(path("image.img"), "an image").expect("writes");
    let template =
        "provision_data:\n  distro: x\n  attachments:\n    - {local: image.img, agent: /boot/own.img}\n";
    std::fs::write(path("job.yaml"), template).expect("writes");
    let ended = lab.run(&["passes", "--template", "job.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for job in lab.jobs() {
        let provision = serde_json::json!({"distro": "x", "attachments": [{"agent": "boot/own.img"}]});
        assert_eq!(job.data["provision_data"], provision);
        assert_eq!(job.unpacked()["provision/boot/own.img"], b"an image");
    }
}

#[test]
fn an_outage_of_the_server_is_waited_for() {
    let lab = Lab::new(&[Holds]);
    let mut command = lab.command(&["pass", "--shards", "1"]);
    let child = command.spawn().expect("starts");
    lab.server.until("a host has it", |state| state.jobs.iter().any(|job| job.state == "test").then_some(()));
    lab.server.misbehave(|_| Some(crate::http::Fault::Status(503)));
    let before = lab.server.state().seen.len();
    lab.server.until("it asks in vain", |state| (state.seen.len() > before + 1).then_some(()));
    lab.server.behave();
    let after = lab.server.state().seen.len();
    lab.server.until("it asks again", |state| {
        state.seen[after..]
            .iter()
            .any(|(request, status)| request.path == "/v1/job/search" && *status == 200)
            .then_some(())
    });
    kill_process(Pid::from_child(&child), Signal::INT).expect("signals");
    let output = child.wait_with_output().expect("ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the server is away") && said.contains("the server is back"), "{said}");
    assert_eq!(lab.jobs().len(), 1, "nothing was lost");
}

#[test]
fn a_job_is_never_sent_twice_although_nobody_answers() {
    use crate::http::Fault;
    let lab = Lab::new(&[Works]);
    // The answer to its submission is lost, and so is the first answer to whether it is there.
    let (submitted, looked) = (AtomicBool::new(false), AtomicBool::new(false));
    lab.server.misbehave(move |request| {
        if request.is("POST", "/v1/job") {
            return (!submitted.swap(true, SeqCst)).then_some(Fault::Lose);
        }
        let id = request.path.strip_prefix("/v1/job/")?;
        let look = request.method == "GET" && id.len() == 36;
        (look && !looked.swap(true, SeqCst)).then_some(Fault::Status(503))
    });
    let ended = lab.run(&["passes", "--shards", "1"]);
    assert_eq!((ended.code, lab.jobs().len()), (Some(0), 1), "{}", ended.err);
    let submitted = |(request, _): &(crate::http::Request, u16)| request.is("POST", "/v1/job");
    assert_eq!(lab.server.state().seen.iter().filter(|seen| submitted(seen)).count(), 1);
}

#[test]
fn wrong_usage_is_said_before_anything_is_submitted() {
    let lab = Lab::new(&[]);
    let ended = lab.run(&["pass"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("no agent takes jobs from the queue `fleet`"), "{}", ended.err);
    let agent = serde_json::json!({"name": "host0", "state": "offline"});
    lab.server.state().queues.entry(QUEUE.into()).or_default().push(agent);
    let offline = lab.run(&["pass"]);
    assert!(offline.err.contains("all agents of the queue `fleet` are offline"), "{}", offline.err);
    lab.server.state().queues.remove(QUEUE);
    let unknown = lab.run(&["pass"]);
    assert!(unknown.err.contains("the server knows no queue `fleet`"), "{}", unknown.err);
    lab.server
        .state()
        .queues
        .insert(QUEUE.into(), vec![serde_json::json!({"name": "host0", "state": "waiting"})]);
    assert!(!lab.dir.path().join("notes").exists(), "nothing is on record");
    let none = lab.run(&["no_such_scenario"]);
    assert!(none.err.contains("no scenario is selected"), "{}", none.err);
    let template = lab.dir.path().join("job.yaml");
    std::fs::write(&template, "job_queue: other\n").expect("writes");
    let taken = lab.run(&["--template", "job.yaml"]);
    assert!(taken.err.contains("`job_queue`"), "{}", taken.err);
    let path = lab.run(&["--with", "../secret", "pass"]);
    assert!(path.err.contains("not below the project"), "{}", path.err);
    assert!(lab.jobs().is_empty());
}
