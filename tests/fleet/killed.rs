//! A run that is killed at any point is one that another process goes on with.

use crate::host::{Ended, Lab, Manner};
use crate::http::Fault;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shakedown::record::ledger;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};

impl Lab {
    /// Kills a run at its request number `at`, before or after the server acts; false when it ends first.
    fn kill_at(&self, arguments: &[&str], at: usize, before: bool) -> bool {
        let (reached, kill) = mpsc::channel();
        let (killed, resume) = mpsc::channel::<()>();
        let (count, resume) = (AtomicUsize::new(0), Mutex::new(resume));
        let (server, news) = (self.server.clone(), reached.clone());
        self.server.misbehave(move |request| {
            if count.fetch_add(1, Ordering::SeqCst) != at {
                return None;
            }
            if !before {
                server.act_now(request);
            }
            let _ = news.send(true);
            // Until it is dead.
            let _ = resume.lock().expect("lock").recv();
            Some(Fault::Drop)
        });
        let mut child = self.command(arguments).spawn().expect("starts");
        let pid = Pid::from_child(&child);
        let (out, err) = (child.stdout.take(), child.stderr.take());
        // Its output ends with it.
        let readers = [
            std::thread::spawn(move || drop(std::io::copy(&mut out.expect("a pipe"), &mut std::io::sink()))),
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut err.expect("a pipe"), &mut std::io::sink());
                let _ = reached.send(false);
            }),
        ];
        let is_reached = kill.recv().expect("an answer");
        if is_reached {
            kill_process(pid, Signal::KILL).expect("kills");
        }
        wait(child);
        for reader in readers {
            reader.join().expect("reads");
        }
        self.server.behave();
        drop(killed);
        is_reached
    }

    fn run_directory(&self) -> PathBuf {
        self.dir.path().join("notes/latest")
    }

    /// What goes on where a killed run stopped, or begins where it had not begun.
    fn go_on(&self, arguments: &[&str]) -> Ended {
        let has_begun = self.run_directory().join("fleet.json").exists();
        if has_begun { self.resumed("latest") } else { self.run(arguments) }
    }

    fn resumed(&self, run: &str) -> Ended {
        Ended::of(self.resume(run).output().expect("runs"))
    }

    /// How often each scenario was sent out.
    fn sent(&self) -> BTreeMap<String, usize> {
        let mut sent = BTreeMap::new();
        for job in self.jobs() {
            let script = job.data["test_data"]["test_cmds"].as_str().expect("a script").to_owned();
            let names = script.split("END_OF_SCENARIOS").nth(1).expect("a list").lines();
            for name in names.filter(|name| !name.is_empty() && *name != "'") {
                *sent.entry(name.to_owned()).or_default() += 1;
            }
        }
        sent
    }

    fn lines_of(&self, run: &Value) -> Vec<String> {
        let path = self.dir.path().join("notes/vm-run-ledger.jsonl");
        let records = ledger::read(&path).expect("reads").map(|line| line.expect("a record"));
        let mut names: Vec<_> =
            records.filter(|record| record.run_id == *run).map(|record| record.scenario).collect();
        names.sort();
        names
    }
}

fn wait(mut child: Child) {
    child.wait().expect("ends");
}

const ARGUMENTS: [&str; 3] = ["pass", "--shards", "1"];
const NAMES: [&str; 2] = ["group::passes_slowly", "passes"];

#[test]
fn killed_at_any_request_it_goes_on_as_if_nothing_had_been() {
    let killed = |at: usize, before: bool| {
        let lab = Lab::new(&[Manner::Works]);
        let is_killed = lab.kill_at(&ARGUMENTS, at, before);
        if is_killed {
            let ended = lab.go_on(&ARGUMENTS);
            let place = format!("killed at request {at}, before: {before}\n{}", ended.err);
            assert_eq!(ended.verdicts(), NAMES.map(|name| (name, "passed")), "{place}");
            assert_eq!(ended.code, Some(0), "{place}");
            assert_eq!(lab.lines_of(&ended.report["run_id"]), NAMES, "{place}");
        }
        assert_eq!(lab.sent(), NAMES.map(|name| (name.to_owned(), 1)).into(), "killed at {at}, {before}");
        is_killed
    };
    // Most of the time is pauses between rounds.
    let reached: Vec<_> = std::thread::scope(|scope| {
        let points = (0..14).flat_map(|at| [true, false].map(|before| (at, before)));
        let running: Vec<_> =
            points.map(|(at, before)| scope.spawn(move || (at, killed(at, before)))).collect();
        running.into_iter().map(|thread| thread.join().expect("passes")).collect()
    });
    let last = reached.iter().filter(|(_, is_reached)| *is_reached).map(|(at, _)| *at).max();
    assert!(last.is_some_and(|last| last >= 6), "a run has more requests than {last:?}");
}

#[test]
fn a_shard_that_runs_is_neither_sent_again_nor_its_attachments() {
    let lab = Lab::new(&[Manner::Holds]);
    let mut child = lab.command(&ARGUMENTS).spawn().expect("starts");
    let id = lab.server.until("a host has it", |state| {
        state.jobs.iter().find(|job| job.state == "test").map(|job| job.id.clone())
    });
    lab.server.until("it is listened to", |state| {
        state.seen.iter().any(|(request, _)| request.path.ends_with("/log/output")).then_some(())
    });
    let refused = lab.resumed("latest");
    assert!(refused.err.contains("another process works on the run"), "{}", refused.err);
    child.kill().expect("kills");
    wait(child);
    // The next run says how to go on with this one.
    let mut other = lab.command(&ARGUMENTS).spawn().expect("starts");
    let mut lines = BufReader::new(other.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
    let hint = lines.find(|line| line.contains("was killed")).expect("a hint");
    lab.server.until("it has submitted", |state| (state.jobs.len() == 2).then_some(()));
    kill_process(Pid::from_child(&other), Signal::INT).expect("signals");
    lines.for_each(drop);
    wait(other);
    let run = hint.split("--resume ").nth(1).and_then(|rest| rest.split('`').next()).expect("an id");
    // A server that refuses us ends no run: what is on record stays as it is.
    lab.server.misbehave(|_| Some(Fault::Status(401)));
    let refused = lab.resumed(run);
    assert!(refused.code == Some(1) && refused.err.contains("resume once more"), "{}", refused.err);
    lab.server.behave();
    let count = lab.server.state().seen.len();
    let child = lab.resume(run).spawn().expect("starts");
    lab.server.until("it asks for the state of the job", |state| {
        state.seen[count..].iter().any(|(request, _)| request.path == "/v1/job/search").then_some(())
    });
    lab.server.change(|state| {
        let job = state.jobs.iter_mut().find(|job| job.id == id).expect("the job");
        job.result = json!({"provision_status": 1}).as_object().expect("an object").clone();
        job.state = "complete".into();
    });
    lab.server.until("it is sent elsewhere", |state| (state.jobs.len() > 2).then_some(()));
    kill_process(Pid::from_child(&child), Signal::INT).expect("signals");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let uploads = format!("/v1/job/{id}/attachments");
    assert_eq!(lab.server.count("POST", &uploads), 1);
    let jobs = lab.jobs();
    assert_eq!(jobs[0].state, "complete");
    assert!(jobs[1..].iter().all(|job| job.state == "cancelled"));
}

#[test]
fn what_is_no_killed_run_is_not_gone_on_with() {
    let lab = Lab::new(&[Manner::Works]);
    for id in ["latest", "no-such-run", "../notes", ""] {
        let ended = lab.resumed(id);
        assert!(ended.code == Some(1) && ended.err.contains("there is no run"), "{id}: {}", ended.err);
    }
    assert_eq!(lab.run(&ARGUMENTS).code, Some(0));
    let ended = lab.resumed("latest");
    assert!(ended.code == Some(1) && ended.err.contains("has ended"), "{}", ended.err);
    assert_eq!(lab.run(&["--resume", "latest"]).code, Some(2), "it says what it is about");
}
