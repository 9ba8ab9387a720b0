//! The recordings of idle agents whose token expires: what is asked with a token, and what without.
//!
//! Questions differ, since ours asks each thing once a cycle; what is refused, refreshed and asked again
//! does not.

use crate::server::{Fault, Seen, Server};
use crate::support::{Lab, Running};
use serde_json::Value;
use std::path::Path;

/// A request: what, whether with a token, and the status of its answer.
type Asked = (String, bool, u64);

fn asked(method: &str, path: &str, bearer: bool, status: u64) -> Option<Asked> {
    let path = path.split('?').next().expect("a path");
    // Whether the server is there, which ours learns from what it asks anyway.
    (path != "/v1").then(|| (format!("{method} {path}"), bearer, status))
}

fn recorded(name: &str) -> Vec<Asked> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/testflinger/{name}.jsonl"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let all = lines.filter_map(|line| {
        let bearer = line["bearer"].as_bool().expect("a flag");
        asked(line["method"].as_str()?, line["path"].as_str()?, bearer, line["status"].as_u64()?)
    });
    without_routine(all)
}

fn ours(seen: &[Seen]) -> Vec<Asked> {
    let all = seen.iter().filter_map(|seen| {
        let bearer = seen.headers.contains_key("authorization");
        asked(&seen.method, &seen.path, bearer, seen.status.into())
    });
    without_routine(all)
}

/// Leaves out what was asked, and answered in the same way, since the last refresh.
fn without_routine(all: impl Iterator<Item = Asked>) -> Vec<Asked> {
    let mut kept: Vec<Asked> = Vec::new();
    for one in all {
        let refresh = kept.iter().rposition(|(what, _, _)| what == REFRESH).unwrap_or(0);
        let is_report = one.0.starts_with("POST /v1/agents/data");
        if one.0 == REFRESH || is_report || !kept[refresh..].contains(&one) {
            kept.push(one);
        }
    }
    kept
}

const REFRESH: &str = "POST /v1/oauth2/refresh";

fn start(name: &str) -> (Lab, Running) {
    let server = Server::start();
    server.expire_tokens();
    let more = format!(
        "identifier: cid-{name}\nlocation: here\nprovision_type: noprovision\n\
         advertised_queues:\n  q-{name}: queue {name}\n"
    );
    let lab = Lab::with(server, name, &more);
    let agent = lab.start_with(&["--token-file", &lab.token_file()]);
    until_it_asked(&lab, 2);
    (lab, agent)
}

fn until_it_asked(lab: &Lab, times: usize) {
    lab.server.until("it asks for work", |state| {
        let answered = state.seen.iter().filter(|seen| seen.is("GET", "/v1/job") && seen.status == 204);
        (answered.count() >= times).then_some(())
    });
}

/// Ours looks first what an admin made of the agent while it was away, and knows then.
fn look_first(recorded: &mut Vec<Asked>, name: &str) {
    let question = format!("GET /v1/agents/data/{name}");
    recorded.insert(1, (question.clone(), true, 404));
    let post = format!("POST /v1/agents/data/{name}");
    let told = recorded.iter().rposition(|(what, _, _)| *what == post).expect("it tells who it is");
    assert_eq!(recorded[told + 1].0, question);
    let looked = recorded.remove(told + 1);
    // In its next cycle.
    recorded.insert(told + 2, looked);
}

#[test]
fn an_expired_token_is_refreshed_and_the_request_sent_again() {
    let (lab, _agent) = start("secret");
    let (server, mut expired) = (lab.server.clone(), false);
    lab.server.misbehave(move |seen| {
        if !expired && seen.is("GET", "/v1/agents/data/secret") {
            expired = true;
            server.expire_tokens();
        }
        None
    });
    let before = lab.server.state().seen.iter().filter(|seen| seen.is("GET", "/v1/job")).count();
    until_it_asked(&lab, before + 2);
    let mut expected = recorded("secret");
    let tail: Vec<_> = expected.iter().rev().take(5).rev().map(|(_, _, status)| *status).collect();
    assert_eq!(tail, [401, 200, 200, 200, 204], "{expected:?}");
    // It tells its queues every hour, not every cycle.
    let again = expected.iter().rposition(|(what, _, _)| what == "POST /v1/agents/queues").expect("there");
    expected.remove(again);
    look_first(&mut expected, "secret");
    assert_eq!(ours(&lab.server.state().seen), expected);
    lab.check();
}

#[test]
fn a_refresh_that_fails_is_tried_again_and_nobody_asks_without_a_token() {
    let (lab, _agent) = start("tok");
    let mut left = vec![Fault::Status(503), Fault::Status(401)];
    lab.server.misbehave(move |seen| {
        let is_next = match left.len() {
            2 => seen.is("GET", "/v1/agents/data/tok"),
            1 => seen.path == "/v1/oauth2/refresh",
            _ => false,
        };
        if is_next { left.pop() } else { None }
    });
    let before = lab.server.state().seen.iter().filter(|seen| seen.is("GET", "/v1/job")).count();
    until_it_asked(&lab, before + 2);
    let mut expected = recorded("tok");
    look_first(&mut expected, "tok");
    let failed = (REFRESH.to_owned(), false, 503);
    let end = expected.iter().position(|asked| *asked == failed).expect("it fails") + 1;
    let theirs = expected.split_off(end);
    // From here on the recorded agent is nobody, until it is restarted.
    assert!(theirs.iter().all(|(what, bearer, _)| what != REFRESH && !bearer), "{theirs:?}");
    assert!(theirs.contains(&("GET /v1/job".to_owned(), false, 403)), "{theirs:?}");
    expected.push((REFRESH.to_owned(), false, 200));
    expected.push(("GET /v1/agents/data/tok".to_owned(), true, 200));
    expected.push(("GET /v1/job".to_owned(), true, 204));
    assert_eq!(ours(&lab.server.state().seen), expected);
    lab.check();
}
