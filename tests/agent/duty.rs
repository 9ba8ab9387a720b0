//! Between jobs: tokens, registration, admins, signals, and the exit status.

use crate::server::{Fault, Server};
use crate::support::{AGENT, COMMANDS, Lab, QUEUE, job};
use rustix::process::Signal;
use serde_json::json;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn asked_for_work(lab: &Lab) -> usize {
    lab.server.state().seen.iter().filter(|seen| seen.is("GET", "/v1/job") && seen.status < 300).count()
}

fn until_asked_again(lab: &Lab) {
    let before = asked_for_work(lab);
    lab.server.until("it asks for work", |state| {
        let asked = state.seen.iter().filter(|seen| seen.is("GET", "/v1/job") && seen.status < 300).count();
        (asked > before).then_some(())
    });
}

#[test]
fn a_start_before_the_server_registers_when_it_comes() {
    let mut lab = Lab::with(Server::start_down(), AGENT, COMMANDS);
    lab.config.push_str(
        "location: here\nadvertised_queues: {q-a1: text}\nadvertised_images: {q-a1: {i: 'distro: x'}}\n",
    );
    lab.script("true");
    lab.server.expire_tokens();
    let _agent = lab.start_with(&["--token-file", &lab.token_file()]);
    crate::support::until("it has tried", || lab.log().contains("not to be had"));
    lab.server.up();
    let job = lab.submit(json!({}));
    lab.server.finished(&job);
    let state = lab.server.state();
    let data = &state.agents[AGENT];
    assert_eq!((&data["queues"], &data["location"]), (&json!([QUEUE]), &json!("here")));
    assert_eq!(state.queues[QUEUE], "text");
    assert_eq!(state.images[QUEUE], json!({"i": "distro: x"}));
    drop(state);
    lab.check();
}

#[test]
fn an_idle_cycle_is_two_requests() {
    let lab = Lab::new("advertised_queues: {q-a1: text}\n");
    let _agent = lab.start();
    until_asked_again(&lab);
    let before = lab.server.state().seen.len();
    for _ in 0..3 {
        until_asked_again(&lab);
    }
    let seen = lab.server.state().seen[before..].to_vec();
    let paths: Vec<_> = seen.iter().map(|seen| seen.path.split('?').next().expect("a path")).collect();
    assert_eq!(paths, ["/v1/agents/data/a1", "/v1/job"].repeat(3));
}

#[test]
fn a_failed_refresh_is_not_the_end() {
    let lab = Lab::new(COMMANDS);
    lab.script("true");
    lab.server.expire_tokens();
    let _agent = lab.start_with(&["--token-file", &lab.token_file()]);
    until_asked_again(&lab);
    let failures = AtomicU32::new(0);
    lab.server.misbehave(move |seen| {
        let refresh = seen.path == "/v1/oauth2/refresh" && failures.fetch_add(1, Ordering::Relaxed) < 3;
        refresh.then_some(Fault::Status(503))
    });
    lab.server.expire_tokens();
    let job = lab.submit(json!({}));
    lab.server.finished(&job);
    let state = lab.server.state();
    assert!(state.seen.iter().any(|seen| seen.status == 401), "the token had expired");
    assert!(state.seen.iter().any(|seen| seen.status == 503), "and could not be refreshed at first");
    drop(state);
    lab.check();
}

#[test]
fn a_token_that_comes_late_is_used() {
    let lab = Lab::new(COMMANDS);
    lab.server.expire_tokens();
    let path = lab.path("refresh_token");
    let _agent = lab.start_with(&["--token-file", path.to_str().expect("UTF-8")]);
    lab.server.until("it is refused", |state| state.seen.iter().any(|seen| seen.status == 403).then_some(()));
    lab.token_file();
    until_asked_again(&lab);
}

#[test]
fn offline_lasts_over_a_restart_and_ends_with_online() {
    for state in ["offline", "maintenance"] {
        let lab = Lab::new("");
        lab.server.set_agent(AGENT, state, "admin says so");
        let agent = lab.start();
        lab.server.until("it registers", |state| state.agents[AGENT].contains_key("queues").then_some(()));
        drop(agent);
        let _agent = lab.start();
        lab.server.until("it looks at its state", |state| {
            (state.seen.iter().filter(|s| s.is("GET", "/v1/agents/data/a1")).count() >= 4).then_some(())
        });
        let data = lab.server.state().agents[AGENT].clone();
        assert_eq!((&data["state"], &data["comment"]), (&json!(state), &json!("admin says so")));
        assert_eq!(asked_for_work(&lab), 0);
        lab.server.set_agent(AGENT, "waiting", "");
        until_asked_again(&lab);
    }
}

#[test]
fn what_the_original_left_offline_by_its_restart_works_again() {
    let lab = Lab::new("");
    lab.server.set_agent(AGENT, "offline", "Restart signal detected from supervisor process");
    let _agent = lab.start();
    until_asked_again(&lab);
    assert_eq!(lab.server.state().agents[AGENT]["state"], "waiting");
}

#[test]
fn restricted_queues_are_asked_alone() {
    let mut lab = Lab::new("");
    lab.config = lab.config.replace("[q-a1]", "[q-a1, q-b, 'q c']");
    let _agent = lab.start();
    let last = |lab: &Lab| {
        until_asked_again(lab);
        lab.server.state().seen.iter().rev().find(|s| s.is("GET", "/v1/job")).map(|s| s.path.clone())
    };
    assert_eq!(last(&lab).as_deref(), Some("/v1/job?queue=q-a1&queue=q-b&queue=q%20c"));
    let restricted = json!({"q-b": ["someone"], "q-a1": []});
    lab.server.state().agents.get_mut(AGENT).expect("an agent").insert("restricted_to".into(), restricted);
    until_asked_again(&lab);
    assert_eq!(last(&lab).as_deref(), Some("/v1/job?queue=q-b"));
}

#[test]
fn an_agent_that_was_silent_for_a_day_says_something() {
    let lab = Lab::new("");
    let _agent = lab.start();
    until_asked_again(&lab);
    let before = lab.server.state().seen.len();
    let old = json!("2026-01-01T00:00:00Z");
    lab.server.state().agents.get_mut(AGENT).expect("an agent").insert("updated_at".into(), old);
    lab.server.until("it says that it is there", |state| {
        state.seen[before..]
            .iter()
            .any(|s| s.json == json!({"state": "waiting", "comment": ""}))
            .then_some(())
    });
}

#[test]
fn a_lost_answer_strands_no_second_job() {
    let lab = Lab::new(COMMANDS);
    lab.script("true");
    let lost = AtomicU32::new(0);
    lab.server.misbehave(move |seen| {
        (seen.is("GET", "/v1/job") && lost.fetch_add(1, Ordering::Relaxed) == 0).then_some(Fault::Lose)
    });
    let jobs = [lab.submit(json!({})), lab.submit(json!({})), lab.submit(json!({}))];
    let _agent = lab.start();
    for job in &jobs[1..] {
        lab.server.finished(job);
    }
    assert_eq!(lab.server.state().taken, jobs, "each was taken once");
}

#[test]
fn sigterm_waits_for_the_job_and_ends_an_idle_agent_at_once() {
    let lab = Lab::new(COMMANDS);
    lab.script("until [ -e ../../go ]; do sleep 0.02; done; echo whole");
    let mut agent = lab.start();
    let job_id = lab.submit(json!({}));
    lab.server.until("the test runs", |state| (state.agents.get(AGENT)?["state"] == "test").then_some(()));
    agent.signal(Signal::TERM);
    lab.server.submit(job(json!({})));
    std::fs::write(lab.path("go"), "").expect("writes");
    assert_eq!(agent.ended(), 143);
    let state = lab.server.state();
    assert!(state.results[&job_id].output("test").ends_with("whole\n"));
    assert_eq!(
        (state.results[&job_id].state.as_str(), state.jobs.len()),
        ("complete", 1),
        "it took no other"
    );
    drop(state);
    let idle = Lab::new("");
    let mut agent = idle.start();
    until_asked_again(&idle);
    let begun = Instant::now();
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended(), 143);
    assert!(begun.elapsed() < Duration::from_millis(900), "it does not sleep its interval out");
}

#[test]
fn a_second_sigterm_ends_it_now_and_the_next_start_cleans_up() {
    let lab = Lab::new(COMMANDS);
    lab.script("setsid sleep 1234503 & sleep 1234503");
    let job = lab.submit(json!({}));
    let mut agent = lab.start();
    crate::support::until("the test runs", || crate::support::process_with("1234503"));
    agent.signal(Signal::TERM);
    crate::support::until("it has heard", || {
        agent.signal(Signal::TERM);
        !crate::support::process_with("1234503")
    });
    assert_eq!(agent.ended(), 143);
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert_eq!((result.status["test"], result.status["cleanup"]), (100, 0));
}

#[test]
fn usr1_restarts_an_idle_agent() {
    let lab = Lab::new("");
    let mut agent = lab.start();
    until_asked_again(&lab);
    agent.signal(Signal::USR1);
    assert_eq!(agent.ended(), 1);
    assert_eq!(lab.server.state().agents[AGENT]["state"], "restart");
}

#[test]
fn wrong_configurations_and_taken_ports_are_no_success() {
    let mut lab = Lab::new("test_comand: x\n");
    assert_eq!(lab.start().ended(), 2);
    lab.config = lab.config.replace("test_comand", "test_command");
    let taken = std::net::TcpListener::bind("0.0.0.0:0").expect("binds");
    let port = taken.local_addr().expect("an address").port().to_string();
    assert_eq!(lab.start_with(&["-p", &port]).ended(), 70);
    assert_eq!(lab.start_with(&["--nonsense"]).ended(), 2);
    let _one = lab.start();
    until_asked_again(&lab);
    assert_eq!(lab.start().ended(), 70, "two agents of one name");
}
