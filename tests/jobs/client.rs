//! The client of a user: what it sends, and what it makes of answers.

use crate::http::Fault;
use crate::server::Server;
use serde_json::{Map, Value, json};
use shakedown::testflinger::client::{Client, Login};
use shakedown::testflinger::wire::{Log, Phase};
use std::io::{Read, Seek};

const ID: &str = "3b4cf884-c994-46c6-baf0-b56ebf12cd12";

fn map(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

fn job() -> Map<String, Value> {
    map(
        json!({"job_id": ID, "job_queue": "q1", "tags": ["t 1", "other"], "test_data": {"test_cmds": "true"}}),
    )
}

fn client(server: &Server) -> Client {
    Client::for_user(&server.address(), None)
}

#[test]
fn a_job_is_submitted_found_followed_and_cancelled() {
    let server = Server::start();
    let client = client(&server);
    assert_eq!(client.job(ID).expect("asks"), None);
    assert_eq!(client.submit(&job()).expect("submits"), ID);
    assert_eq!(client.job(ID).expect("asks").expect("there")["job_queue"], "q1");
    assert_eq!(client.search(["t 1", "another"]).expect("searches"), []);
    let found = client.search(["t 1"]).expect("searches");
    assert_eq!((found.len(), found[0].job_id.as_str(), found[0].state.as_str()), (1, ID, "waiting"));
    server.state().jobs[0].fragments = vec![
        ("setup".into(), 0, "S".into()),
        ("test".into(), 1, "T1".into()),
        ("test".into(), 2, "T2".into()),
    ];
    let log = client.log(ID, Log::Output, 1).expect("reads");
    assert_eq!((log[&Phase::Test].last, log[&Phase::Test].text.as_str()), (2, "T1T2"));
    assert_eq!((log[&Phase::Setup].last, log[&Phase::Setup].text.as_str()), (-1, ""));
    assert!(client.cancel(ID).expect("cancels"));
    assert!(!client.cancel(ID).expect("asks"), "it has ended");
    let result = client.result(ID, 100).expect("reads").expect("there");
    assert_eq!(result.state, "cancelled");
    server.check();
}

#[test]
fn what_the_server_does_not_have_is_none_and_no_error() {
    let server = Server::start();
    let client = client(&server);
    assert_eq!(client.result(ID, 100).expect("reads"), None);
    assert_eq!(client.agents_of("nowhere").expect("asks"), None);
    server.state().queues.insert("empty".into(), Vec::new());
    assert_eq!(client.agents_of("empty").expect("asks"), Some(Vec::new()));
    server
        .state()
        .queues
        .insert("q".into(), vec![json!({"name": "a1", "state": "offline", "queues": ["q"]})]);
    let agents = client.agents_of("q").expect("asks").expect("known");
    assert_eq!((agents[0].name.as_str(), agents[0].state.as_str()), ("a1", "offline"));
    let mut file = tempfile::tempfile().expect("a file");
    assert!(!client.fetch_artifacts(ID, &mut file, 100).expect("asks"));
}

#[test]
fn artifacts_stream_into_a_file_up_to_a_limit() {
    let server = Server::start();
    let client = client(&server);
    client.submit(&job()).expect("submits");
    server.state().jobs[0].artifacts = Some(vec![7; 300_000]);
    let mut file = tempfile::tempfile().expect("a file");
    assert!(client.fetch_artifacts(ID, &mut file, 300_000).expect("fetches"));
    file.rewind().expect("rewinds");
    let mut read = Vec::new();
    file.read_to_end(&mut read).expect("reads");
    assert!(read == vec![7; 300_000]);
    let error = client.fetch_artifacts(ID, &mut file, 299_999).expect_err("too large");
    assert!(error.to_string().contains("299999") && !error.is_passing(), "{error}");
    server.misbehave(|_| Some(Fault::Cut));
    let error = client.fetch_artifacts(ID, &mut file, 300_000).expect_err("half of it");
    assert!(error.is_passing(), "{error}");
}

#[test]
fn attachments_are_one_form_and_may_be_sent_again() {
    let server = Server::start();
    let client = client(&server);
    let mut job = job();
    job["test_data"]["attachments"] = json!([{"agent": "x"}]);
    client.submit(&job).expect("submits");
    let archive = tempfile::NamedTempFile::new().expect("a file");
    let tar =
        tar::Builder::new(flate2::write::GzEncoder::new(archive.as_file(), flate2::Compression::fast()));
    tar.into_inner().expect("a tar").finish().expect("a gzip");
    for _ in 0..2 {
        client.send_attachments(ID, archive.path()).expect("uploads");
    }
    assert!(!server.state().jobs[0].waits_for_attachments);
    server.check();
}

#[test]
fn a_login_gives_a_token_that_is_renewed_when_it_expires() {
    let server = Server::start();
    server.wants_login("me", "sesame");
    let login = |key| Login::new("me", key).expect("valid");
    let client = Client::for_user(&server.address(), Some(login("sesame")));
    client.submit(&job()).expect("submits");
    server.expire_tokens();
    client.result(ID, 100).expect("the token is renewed");
    server.expire_tokens();
    server.revoke_refresh_tokens();
    client.result(ID, 100).expect("logs in again");
    let told = (server.count("POST", "/v1/oauth2/token"), server.count("POST", "/v1/oauth2/refresh"));
    assert_eq!(told, (2, 2));
    let error = Client::for_user(&server.address(), Some(login("wrong"))).job(ID).expect_err("refused");
    assert!(!error.is_passing(), "a wrong key stays wrong: {error}");
    let error = Client::for_user(&server.address(), None).job(ID).expect_err("refused");
    assert!(!error.is_passing(), "{error}");
}

#[test]
fn a_lost_answer_is_told_from_a_refusal() {
    let server = Server::start();
    let client = client(&server);
    server.misbehave(|_| Some(Fault::Lose));
    let error = client.submit(&job()).expect_err("lost");
    assert!(error.is_ambiguous() && error.is_passing(), "{error}");
    server.behave();
    assert!(client.job(ID).expect("asks").is_some(), "it has it all the same");
    let error = client.submit(&map(json!({"job_queue": "q", "typo": 1}))).expect_err("422");
    assert!(!error.is_ambiguous() && !error.is_passing(), "{error}");
    assert!(error.to_string().contains("Unknown field"), "{error}");
}
