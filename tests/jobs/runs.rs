//! What a user sees: submission, watching, files, outcomes, exit statuses.

use crate::support::{Desk, passed};
use serde_json::json;
use std::sync::{Arc, Barrier};

#[test]
fn every_machine_gets_its_job_and_every_job_its_outcome() {
    let desk = Desk::new(&[
        ("m-pass", &[passed()]),
        (
            "m-fail",
            &[("complete", json!({"provision_status": 0, "test_status": 3, "test_output": "x\nno disk\n"}))],
        ),
        ("m-prov", &[("complete", json!({"provision_status": 1, "provision_output": "no power"}))]),
        ("m-gone", &[("cancelled", json!({"test_status": 0, "test_output": "part"}))]),
        ("m-none", &[("complete", json!({"setup_status": 0}))]),
    ]);
    let answer = desk.json(1, &[]);
    let told = |machine: &str| {
        let row = &answer["jobs"][machine];
        let of = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
        (of("outcome"), of("hw_status"), of("reason"))
    };
    let is = |outcome: &str, hw: &str, reason: &str| (outcome.to_owned(), hw.to_owned(), reason.to_owned());
    assert_eq!(told("m-pass"), is("passed", "Certified", ""));
    assert_eq!(told("m-fail"), is("failed", "", "test ended with 3: no disk"));
    assert_eq!(told("m-prov"), is("provision_failed", "", "provision ended with 1: no power"));
    assert_eq!(told("m-gone"), is("cancelled", "", "it was cancelled"));
    assert_eq!(told("m-none"), is("error", "", "the test phase never ran, and no other failed"));
    assert_eq!((&answer["passed"], &answer["total"]), (&json!(1), &json!(5)));

    let tag = answer["run"].as_str().expect("a tag");
    for machine in ["m-pass", "m-fail", "m-prov", "m-gone", "m-none"] {
        let job = desk.server.job(machine);
        assert_eq!(desk.read(&format!("job_outputs/{machine}/tf_job_id.txt")), job.id, "no newline");
        assert_eq!(job.data["tags"], json!([tag]));
        assert_eq!(job.data["test_data"]["test_cmds"], format!("run hwctl on {machine}\n"));
        assert_eq!(job.data["test_data"]["attachments"], json!([{"agent": "hwctl"}]), "without `local`");
        assert_eq!(job.unpacked()["test/hwctl"], b"a program");
    }
    let file = |name: &str| desk.read(&format!("job_outputs/{name}"));
    assert_eq!(file("m-pass/output.txt"), passed().1["test_output"].as_str().expect("text"));
    assert_eq!(
        (file("m-pass/hw_status.txt"), file("m-prov/hw_status.txt")),
        ("Certified".into(), "Unknown".into())
    );
    assert_eq!(
        (file("m-prov/output.txt"), file("m-prov/provision_output.txt")),
        (String::new(), "no power".into())
    );
    assert!(!desk.exists("job_outputs/m-gone/output.txt"), "as in the original");
    assert_eq!(
        desk.ledger(),
        [
            ("m-fail", "failed"),
            ("m-gone", "interrupted"),
            ("m-none", "error"),
            ("m-pass", "passed"),
            ("m-prov", "error")
        ]
        .map(|(machine, outcome)| (format!("jobs::{machine}"), outcome.to_owned()))
    );
    desk.check();
}

#[test]
fn status_0_means_that_all_passed_and_a_table_says_so() {
    let desk = Desk::new(&[("m1", &[passed()]), ("m2", &[passed()])]);
    let ended = desk.run(&[]);
    ended.is(0).says("m1").says("Certified").says("m2: passed");
    assert!(ended.stdout.starts_with("MACHINE"), "{}", ended.stdout);
}

#[test]
fn one_search_asks_for_all_and_each_result_is_fetched_once() {
    let names: Vec<_> = (0..30).map(|number| format!("m{number}")).collect();
    let fates = [passed()];
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), &fates[..])).collect();
    let desk = Desk::new(&machines);
    desk.run(&["--send-jobs"]).is(0);
    let searches = desk.server.count("GET", "/v1/job/search");
    desk.run(&["--check-status"]).is(0);
    let results = |server: &crate::server::Server| {
        server.state().seen.iter().filter(|(request, _)| request.path.starts_with("/v1/result/")).count()
    };
    assert_eq!(results(&desk.server), 30);
    // One to see that the server is there, and one that shows all that has become of them.
    assert!(desk.server.count("GET", "/v1/job/search") - searches <= 2);
    desk.check();
}

#[test]
fn sending_and_checking_are_halves_of_the_whole() {
    let desk = Desk::new(&[("m1", &[passed()])]);
    desk.run(&["--check-status"]).is(1).says("there are no jobs in job_outputs").says("--send-jobs");
    assert!(!desk.exists("job_outputs"));
    desk.run(&["--send-jobs"]).is(0).says("submitted");
    assert!(desk.exists("job_outputs/m1/tf_job_id.txt") && !desk.exists("job_outputs/m1/output.txt"));
    desk.run(&["--send-jobs"]).is(0).says("going on with the run");
    desk.run(&["--check-status"]).is(0).says("passed");
    assert_eq!(desk.read("job_outputs/m1/hw_status.txt"), "Certified");
    let requests = desk.server.state().seen.len();
    desk.run(&["--check-status"]).is(0).says("passed");
    assert_eq!(desk.server.state().seen.len(), requests, "all is known");
    assert_eq!(desk.ledger().len(), 1);
    desk.run(&["--send-jobs", "--check-status"]).is(2);
    desk.check();
}

#[test]
fn once_all_have_ended_it_begins_anew_and_old_results_are_gone() {
    let desk = Desk::new(&[("m1", &[passed(), ("complete", json!({"provision_status": 2}))])]);
    desk.run(&[]).is(0);
    let first = desk.server.job("m1").id;
    let answer = desk.json(1, &[]);
    let second = desk.server.job("m1").id;
    assert_ne!(first, second);
    assert_eq!(
        (&answer["jobs"]["m1"]["previous_jobs"], &answer["jobs"]["m1"]["attempt"]),
        (&json!([]), &json!(1))
    );
    assert_eq!(desk.read("job_outputs/m1/output.txt"), "", "not that of the first run");
    assert_eq!(desk.ledger().len(), 2);
    desk.server.check();
}

#[test]
fn a_new_run_can_be_had_and_remembers_what_goes_on() {
    let desk = Desk::new(&[("m1", &[])]);
    desk.run(&["--send-jobs"]).is(0);
    let first = desk.server.job("m1").id;
    desk.run(&["--send-jobs", "--new-run"]).is(0);
    assert_ne!(desk.server.job("m1").id, first);
    let known = desk.read("job_outputs/m1/job.json");
    assert!(known.contains(&first), "{known}");
    desk.check();
}

#[test]
fn a_machine_that_is_added_later_gets_its_job_in_the_run_that_goes_on() {
    let desk = Desk::new(&[("m1", &[])]);
    desk.run(&["--send-jobs"]).is(0);
    desk.write("machines.txt", "m1\nm2\n");
    desk.server.queue("m2", &[]);
    desk.run(&["--send-jobs"]).is(0).says("of 2 machines, 1 have a job");
    assert_eq!(desk.server.job("m1").data["tags"], desk.server.job("m2").data["tags"]);
    assert_eq!(desk.server.state().jobs.len(), 2);
    desk.check();
}

#[test]
fn jobs_are_submitted_side_by_side() {
    let desk = Desk::new(&[("m1", &[passed()]), ("m2", &[passed()]), ("m3", &[passed()])]);
    let all = Arc::new(Barrier::new(3));
    desk.server.misbehave(move |request| {
        if request.is("POST", "/v1/job") {
            all.wait();
        }
        None
    });
    desk.run(&[]).is(0);
    desk.check();
}

#[test]
fn a_machine_that_could_not_be_provisioned_gets_another_job() {
    let failed = ("complete", json!({"provision_status": 46}));
    let desk = Desk::new(&[
        ("m1", &[failed.clone(), passed()]),
        ("m2", &[failed.clone(), failed.clone(), failed.clone()]),
        ("m3", &[("complete", json!({"provision_status": 0, "test_status": 1}))]),
    ]);
    let answer = desk.json(1, &["--retry-provision", "1"]);
    let of = |machine: &str| {
        let row = &answer["jobs"][machine];
        (row["outcome"].as_str().expect("an outcome").to_owned(), row["attempt"].as_u64().expect("a number"))
    };
    assert_eq!((of("m1"), of("m2")), (("passed".into(), 2), ("provision_failed".into(), 2)));
    assert_eq!(of("m3"), ("failed".into(), 1), "what failed is not tried again");
    assert_eq!(desk.read("job_outputs/m1/tf_job_id.txt"), desk.server.job("m1").id);
    let lines = desk.ledger();
    let outcomes = |machine: &str| lines.iter().filter(|line| line.0 == format!("jobs::{machine}")).count();
    assert_eq!((outcomes("m1"), outcomes("m2"), outcomes("m3")), (2, 2, 1), "each job has its line");
    desk.check();
}

#[test]
fn jobs_of_the_original_script_are_watched_as_well() {
    let desk = Desk::new(&[("m1", &[])]);
    desk.run(&["--send-jobs"]).is(0);
    for (name, text) in
        [("m2", "00000000-0000-4000-8000-000000000001"), ("m3", "00000000-0000-4000-8000-000000000002")]
    {
        desk.write(&format!("old/{name}/tf_job_id.txt"), text);
    }
    let mut job = desk.server.job("m1");
    job.id = "00000000-0000-4000-8000-000000000001".into();
    job.state = "complete".into();
    job.result = passed().1.as_object().expect("an object").clone();
    desk.server.state().jobs.push(job);
    let answer = desk.json(1, &["--check-status", "--output-dir", "old"]);
    assert_eq!(answer["jobs"]["m2"]["outcome"], "passed");
    assert_eq!(answer["jobs"]["m3"]["outcome"], "expired");
    assert_eq!(desk.read("old/m2/hw_status.txt"), "Certified");
    desk.server.check();
}

#[test]
fn a_login_is_used_and_its_token_renewed() {
    let mut desk = Desk::new(&[("m1", &[passed()])]);
    desk.server.wants_login("me", "sesame");
    desk.run(&[]).is(1).says("refuses us").says("TESTFLINGER_CLIENT_ID");
    desk.env = vec![("TESTFLINGER_CLIENT_ID", "me".into()), ("TESTFLINGER_SECRET_KEY", "wrong".into())];
    desk.run(&[]).is(1).says("Invalid client id or client key");
    desk.env = vec![("TESTFLINGER_CLIENT_ID", "me".into())];
    desk.run(&[]).is(2).says("TESTFLINGER_SECRET_KEY");
    desk.env = vec![("TESTFLINGER_CLIENT_ID", "me".into()), ("TESTFLINGER_SECRET_KEY", "sesame".into())];
    let server = desk.server.clone();
    desk.server.misbehave(move |request| {
        if request.path.ends_with("/attachments") || request.path.starts_with("/v1/result/") {
            server.expire_tokens();
            // Once for each.
            server.behave();
        }
        None
    });
    let ended = desk.run(&[]);
    ended.is(0);
    assert!(!ended.stderr.contains("sesame"));
    desk.check();
}

#[test]
fn a_login_is_not_sent_in_clear_text_that_nobody_asked_for() {
    let mut desk = Desk::new(&[("m1", &[passed()])]);
    desk.env = vec![("TESTFLINGER_CLIENT_ID", "me".into()), ("TESTFLINGER_SECRET_KEY", "sesame".into())];
    desk.run(&["--server", "tf.invalid"]).is(1).says("write `https://tf.invalid`");
    // Here it does not leave the host.
    desk.server.wants_login("me", "sesame");
    desk.run(&["--server", desk.server.address().trim_start_matches("http://")]).is(0);
}

#[test]
fn who_we_are_in_an_address_is_sent_and_in_no_file_and_no_log() {
    let desk = Desk::new(&[("m1", &[passed()])]);
    let address = desk.server.address().replace("http://", "http://me:s3same@");
    let ended = desk.run(&["--server", &address]);
    ended.is(0);
    let basic = desk.server.state().seen.iter().all(|(request, _)| {
        request.headers.get("authorization").is_some_and(|value| value == "Basic bWU6czNzYW1l")
    });
    assert!(basic, "a server in front of it may want it");
    let files = std::process::Command::new("grep").args(["-r", "s3same"]).arg(desk.dir.path()).output();
    let files = String::from_utf8_lossy(&files.expect("runs").stdout).into_owned();
    let said = files + &ended.stdout + &ended.stderr;
    assert!(!said.contains("s3same"), "{said}");
}

#[test]
fn a_login_goes_to_no_server_that_only_a_file_names() {
    let mut desk = Desk::new(&[("m1", &[passed()])]);
    desk.run(&["--send-jobs"]).is(0);
    desk.env = vec![
        ("TESTFLINGER_SERVER", "http://127.0.0.1:9".into()),
        ("TESTFLINGER_CLIENT_ID", "me".into()),
        ("TESTFLINGER_SECRET_KEY", "sesame".into()),
    ];
    let before = desk.server.state().seen.len();
    desk.run(&["--check-status"]).is(1).says("if that is to have your login");
    assert_eq!(desk.server.state().seen.len(), before);
}
