//! Whatever goes wrong: nothing is submitted twice, no id is lost, no wait is without end.

use crate::http::{Fault, Request};
use crate::support::{Desk, Running, passed};
use rustix::process::Signal;
use serde_json::json;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

/// Misbehaves at the first request that fits.
fn once(
    fault: Fault,
    fits: impl Fn(&Request) -> bool + Send + Sync + 'static,
) -> impl Fn(&Request) -> Option<Fault> {
    let done = AtomicBool::new(false);
    move |request| (fits(request) && !done.swap(true, Ordering::SeqCst)).then_some(fault)
}

#[test]
fn a_lost_answer_at_any_request_changes_nothing() {
    let faults =
        [Fault::Drop, Fault::Lose, Fault::Cut, Fault::Status(500), Fault::Status(503), Fault::Status(429)];
    let places = ["POST /v1/job", "attachments", "search", "agents", "/v1/result/"];
    // Most of the time is waits before tries.
    std::thread::scope(|scope| {
        for fault in faults {
            scope.spawn(move || places.map(|place| lost_answer(fault, place)));
        }
    });
}

fn lost_answer(fault: Fault, place: &'static str) {
    let desk = Desk::new(&[("m1", &[passed()])]);
    desk.server.misbehave(once(fault, move |request| {
        let line = format!("{} {}", request.method, request.path);
        if place.starts_with("POST") { line == place } else { line.contains(place) }
    }));
    let ended = desk.run(&[]);
    assert_eq!(ended.status, 0, "{fault:?} at {place}: {}\n{}", ended.stdout, ended.stderr);
    assert_eq!(desk.server.state().jobs.len(), 1, "{fault:?} at {place}");
    assert_eq!(desk.ledger().len(), 1);
    desk.check();
}

/// Kills the command at its request number `at`, before or after the server acts; false when there is
/// no such request.
fn killed_at(desk: &Desk, at: usize, before: bool) -> bool {
    let (reached, kill) = mpsc::channel();
    let (killed, resume) = mpsc::channel::<()>();
    let count = AtomicUsize::new(0);
    let sync = Mutex::new((reached, resume));
    let server = desk.server.clone();
    desk.server.misbehave(move |request| {
        if count.fetch_add(1, Ordering::SeqCst) != at {
            return None;
        }
        if !before {
            server.act_now(request);
        }
        let sync = sync.lock().expect("lock");
        let _ = sync.0.send(());
        let _ = sync.1.recv();
        Some(Fault::Drop)
    });
    let running = desk.start(&["--retry-provision", "1"]);
    let reached = watch(running, &kill);
    desk.server.behave();
    drop(killed);
    reached
}

/// True when it was killed; false when it ended first.
fn watch(running: Running, kill: &mpsc::Receiver<()>) -> bool {
    let mut running = running;
    loop {
        if kill.recv_timeout(std::time::Duration::from_millis(20)).is_ok() {
            running.crash();
            return true;
        }
        match running.try_ended() {
            Ok(ended) => {
                ended.is(0);
                return false;
            }
            Err(still) => running = still,
        }
    }
}

#[test]
fn killed_at_any_request_it_goes_on_as_if_nothing_had_been() {
    for before in [true, false] {
        for at in 0.. {
            let no_power = ("complete", json!({"provision_status": 1}));
            let desk = Desk::new(&[("m1", &[passed()]), ("m2", &[no_power, passed()])]);
            let killed = killed_at(&desk, at, before);
            let mode = if killed { "--retry-provision=1" } else { "--check-status" };
            let answer = desk.json(0, &[mode]);
            assert_eq!(answer["passed"], 2, "killed at request {at}");
            assert_eq!(desk.server.state().jobs.len(), 3, "killed at request {at}, before: {before}");
            for machine in ["m1", "m2"] {
                let id = desk.read(&format!("job_outputs/{machine}/tf_job_id.txt"));
                assert_eq!(id, desk.server.job(machine).id);
                assert_eq!(desk.read(&format!("job_outputs/{machine}/hw_status.txt")), "Certified");
            }
            assert_eq!(desk.ledger().len(), 3, "killed at request {at}");
            desk.check();
            if !killed {
                assert!(at > 12, "there are more requests than {at}");
                break;
            }
        }
    }
}

#[test]
fn killed_between_the_ledger_and_the_note_of_it_no_line_is_written_twice() {
    let desk = Desk::new(&[("m1", &[passed()])]);
    desk.run(&[]).is(0);
    let known = desk.read("job_outputs/m1/job.json");
    desk.write("job_outputs/m1/job.json", &known.replace("\"recorded\": true", "\"recorded\": false"));
    desk.run(&["--check-status"]).is(0);
    assert_eq!(desk.read("job_outputs/m1/job.json"), known);
    assert_eq!(desk.ledger().len(), 1);
}

#[test]
fn killed_before_a_second_attempt_both_have_their_lines() {
    let desk = Desk::new(&[("m1", &[("complete", json!({"provision_status": 1})), passed()])]);
    desk.run(&[]).is(1);
    let known = desk.read("job_outputs/m1/job.json");
    let known = known.replace("\"recorded\": true", "\"recorded\": false");
    desk.write("job_outputs/m1/job.json", &known.replace("\"retry\": false", "\"retry\": true"));
    std::fs::remove_file(desk.path("notes/vm-run-ledger.jsonl")).expect("removes");
    desk.run(&["--retry-provision=1"]).is(0);
    assert_eq!(desk.ledger().iter().map(|line| line.1.as_str()).collect::<Vec<_>>(), ["error", "passed"]);
    desk.check();
}

#[test]
fn ctrl_c_leaves_the_jobs_running_and_says_how_to_go_on() {
    let desk = Desk::new(&[("m1", &[]), ("m2", &[])]);
    let running = desk.start(&[]);
    desk.server.until("both are watched", |state| {
        let last = state.seen.iter().rposition(|(request, _)| request.path.ends_with("/attachments"))?;
        let searched =
            state.seen[last..].iter().filter(|(request, _)| request.path.ends_with("/search")).count();
        (state.jobs.len() == 2 && searched >= 2).then_some(())
    });
    running.signal(Signal::INT);
    running
        .ended()
        .is(130)
        .says("2 jobs go on without us")
        .says("jobs --poll-interval 0.1")
        .says("interrupted");
    assert!(desk.server.state().jobs.iter().all(|job| job.state == "waiting"), "none was cancelled");
    for machine in ["m1", "m2"] {
        desk.server.queue(machine, &[passed()]);
    }
    desk.run(&[]).is(0).says("of 2 machines, 2 have a job, 0 of them ended");
    assert_eq!(desk.server.state().jobs.len(), 2);
    desk.check();
}

#[test]
fn ctrl_c_is_heard_while_the_server_is_silent() {
    let desk = Desk::new(&[("m1", &[])]);
    let (end, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    desk.server.misbehave(move |request| {
        if request.is("POST", "/v1/job") {
            let _ = wait.lock().expect("lock").recv();
        }
        None
    });
    let running = desk.start(&[]);
    desk.server.until("it is about to submit", |_| desk.exists("job_outputs/m1/job.json").then_some(()));
    running.signal(Signal::INT);
    running.ended().is(130).says("No job was submitted");
    drop(end);
}

#[test]
fn an_outage_in_between_is_waited_for() {
    let desk = Desk::new(&[("m1", &[]), ("m2", &[])]);
    let running = desk.start(&[]);
    desk.server.until("both are submitted", |state| {
        (state.jobs.len() == 2 && state.jobs.iter().all(|job| !job.waits_for_attachments)).then_some(())
    });
    desk.server.down();
    for machine in ["m1", "m2"] {
        desk.server.queue(machine, &[passed()]);
    }
    desk.server.up();
    running.ended().is(0);
    desk.check();
}

#[test]
fn a_server_that_was_never_there_is_an_error_soon() {
    let desk = Desk::new(&[("m1", &[])]);
    desk.server.down();
    let ended = desk.run(&[]);
    ended.is(1).says("does not answer").says("next try in 0.50 s").says("--server");
    desk.server.up();
    desk.server.queue("m1", &[passed()]);
    desk.run(&[]).is(0);
}

#[test]
fn what_the_server_refuses_ends_the_wait_of_that_machine_alone() {
    let desk = Desk::new(&[("m1", &[passed()]), ("m-off", &[]), ("m-bad", &[passed()])]);
    desk.write("machines.txt", "m1\nm-unknown\nm-off\nm-bad\n");
    desk.server.state().queues.insert("m-off".into(), vec![json!({"name": "a", "state": "offline"})]);
    desk.server.misbehave(|request| {
        (request.is("POST", "/v1/job") && request.json["job_queue"] == "m-bad").then_some(Fault::Status(422))
    });
    let answer = desk.json(1, &[]);
    let row = |machine: &str| answer["jobs"][machine].clone();
    assert_eq!(row("m1")["outcome"], "passed");
    for (machine, why) in [("m-unknown", "no queue m-unknown"), ("m-off", "is online"), ("m-bad", "422")] {
        let reason = row(machine)["reason"].as_str().expect("a reason").to_owned();
        assert!(reason.starts_with("not submitted") && reason.contains(why), "{reason}");
        assert_eq!((&row(machine)["outcome"], &row(machine)["job_id"]), (&json!("error"), &json!(null)));
    }
    // Once that is mended, the same command submits what is missing, and nothing else.
    desk.server.behave();
    desk.server.queue("m-unknown", &[passed()]);
    desk.server.queue("m-off", &[passed()]);
    desk.server.state().queues.insert("m-off".into(), Vec::new());
    desk.run(&[]).is(1).says("no agent of the queue m-off is online");
    desk.run(&["--wait-for-available-agents"]).is(0);
    assert_eq!(desk.server.state().jobs.len(), 4);
    assert_eq!(desk.ledger().len(), 4);
}

#[test]
fn attachments_that_are_refused_cancel_the_job() {
    let desk = Desk::new(&[("m1", &[])]);
    desk.server.misbehave(|request| request.path.ends_with("/attachments").then_some(Fault::Status(413)));
    desk.run(&[]).is(1).says("attachments could not be uploaded; the job was cancelled").says("413");
    assert_eq!(desk.server.job("m1").state, "cancelled");
    desk.check();
}

#[test]
fn jobs_that_the_server_forgot_and_results_that_it_refuses_end_the_wait() {
    let desk = Desk::new(&[("m1", &[]), ("m2", &[("complete", json!({}))])]);
    desk.run(&["--send-jobs"]).is(0);
    desk.server.state().jobs.retain(|job| job.queue() != "m1");
    let m1 = desk.read("job_outputs/m1/tf_job_id.txt");
    desk.server.misbehave(move |request| {
        (request.path.starts_with("/v1/result/") && !request.path.ends_with(&m1))
            .then_some(Fault::Status(400))
    });
    let answer = desk.json(1, &["--check-status"]);
    assert_eq!(answer["jobs"]["m1"]["outcome"], "expired");
    assert_eq!(answer["jobs"]["m2"]["outcome"], "error");
    assert!(answer["jobs"]["m2"]["reason"].as_str().expect("a reason").contains("400"));
}

#[test]
fn a_server_that_knows_no_search_is_asked_for_each_job() {
    let desk = Desk::new(&[("m1", &[passed()])]);
    desk.run(&["--send-jobs"]).is(0);
    desk.server.misbehave(|request| request.path.ends_with("/search").then_some(Fault::Status(404)));
    {
        let mut state = desk.server.state();
        state.jobs[0].state = "complete".into();
        state.jobs[0].result = passed().1.as_object().expect("an object").clone();
    }
    desk.run(&["--check-status"]).is(0);
}

#[test]
fn input_that_makes_no_sense_is_named_and_nothing_is_sent() {
    let desk = Desk::new(&[("m1", &[])]);
    let ended = |machines: &str, template: &str| {
        desk.write("machines.txt", machines);
        desk.write("tf-job.yaml", template);
        desk.run(&[])
    };
    ended("m1\n../x\nm1\n", "job_queue: $CANONICAL_ID")
        .is(2)
        .says("line 2: \"../x\"")
        .says("line 3: m1 again, as in line 1");
    ended("m1\nm2\n", "job_queue: q").is(2).says("the same job for all").says("$CANONICAL_ID");
    ended("m1\n202101\n", "job_queue: $CANONICAL_ID").is(2).says("for 202101").says("in quotes");
    ended("m1\n", "job_queue: [").is(2).says("tf-job.yaml");
    ended("m1\n", "job_queue: q\ntest_data: {attachments: [{local: none}]}").is(2).says("there is no");
    desk.run(&["--machines-file", "none"]).is(1).says("cannot read the machines file none");
    desk.run(&["--template-file", "none"]).is(1).says("cannot read the template none");
    assert!(desk.server.state().seen.is_empty() && !desk.exists("job_outputs"));
}

#[test]
fn two_at_once_in_one_directory_are_one_too_many() {
    let desk = Desk::new(&[("m1", &[])]);
    let running = desk.start(&[]);
    desk.server.until("it is submitted", |state| state.jobs.first().map(drop));
    desk.run(&[]).is(1).says("another `shakedown jobs` works in job_outputs");
    running.crash();
    assert_eq!(desk.server.state().jobs.len(), 1);
}

#[test]
fn jobs_stay_where_they_were_sent() {
    let desk = Desk::new(&[("m1", &[passed()])]);
    desk.run(&["--send-jobs"]).is(0);
    desk.run(&["--server", "http://127.0.0.1:1"])
        .is(1)
        .says("the jobs in job_outputs")
        .says("not at http://127.0.0.1:1");
    // Where nothing was submitted there is nothing to stay with.
    desk.write("machines.txt", "m-unknown\n");
    desk.run(&["--output-dir", "none"]).is(1).says("no queue m-unknown");
    desk.run(&["--output-dir", "none", "--server", "http://127.0.0.1:1"]).is(1).says("does not answer");
    // What a run was sent to counts more than what the environment says now.
    let mut elsewhere = desk;
    elsewhere.env = vec![("TESTFLINGER_SERVER", "http://127.0.0.1:1".into())];
    elsewhere.run(&["--check-status"]).is(0);
}

#[test]
fn a_ledger_that_cannot_be_written_costs_no_result() {
    let mut desk = Desk::new(&[("m1", &[passed()])]);
    desk.write("file", "");
    desk.env = vec![("BOOT_IMAGE_VM_LEDGER_PATH", "file/ledger.jsonl".into())];
    desk.run(&[]).is(1).says("passed").says("not all could be recorded");
    assert_eq!(desk.read("job_outputs/m1/hw_status.txt"), "Certified");
    desk.env.clear();
    desk.run(&["--check-status"]).is(0);
    assert_eq!(desk.ledger().len(), 1, "recorded now");
}
