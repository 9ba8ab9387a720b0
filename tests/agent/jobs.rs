//! What holds for one job, beyond the recordings: each test fails with the behaviour of the original.

use crate::server::{Fault, Server};
use crate::support::{COMMANDS, Lab, process_with, until};
use crate::traces::archive;
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

fn lab(script: &str) -> Lab {
    let lab = Lab::new(COMMANDS);
    lab.script(script);
    lab
}

#[test]
fn output_is_shown_while_the_command_runs() {
    let lab =
        lab("echo first; printf 'zw\\303'; until [ -e ../../go ]; do sleep 0.02; done; printf '\\266lf\\n'");
    let job = lab.submit(json!({}));
    let _agent = lab.start();
    lab.server.until("the output of a running test is there", |state| {
        state.results[&job].output("test").contains("first\nzw").then_some(())
    });
    std::fs::write(lab.path("go"), "").expect("writes");
    let result = lab.server.finished(&job);
    assert!(result.output("test").ends_with("first\nzwölf\n"), "a character was cut: {result:?}");
    lab.check();
}

#[test]
fn a_job_without_work_takes_no_time() {
    let lab = lab("true");
    let agent = lab.start();
    lab.server
        .until("it asks for work", |state| state.seen.iter().any(|s| s.is("GET", "/v1/job")).then_some(()));
    let job = lab.submit(json!({"provision_data": {"distro": "x"}}));
    lab.server.until("the job is taken", |state| state.taken.contains(&job).then_some(()));
    let begun = Instant::now();
    lab.server.finished(&job);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}: the original sleeps 16 times");
    drop(agent);
    lab.check();
}

#[test]
fn a_job_needs_few_connections() {
    let lab = lab("echo x; mkdir artifacts; echo x > artifacts/x");
    let _agent = lab.start();
    for _ in 0..5 {
        let job = lab.submit(json!({"provision_data": {"distro": "x"}}));
        lab.server.finished(&job);
    }
    let connected = lab.server.connected();
    assert!(connected < 5, "{connected} connections for 5 jobs");
}

#[test]
fn nothing_survives_a_cancelled_job_but_its_cleanup() {
    let mut lab = lab("setsid sleep 1234501 & (trap '' TERM; sleep 1234501) & echo begun; sleep 1234501");
    lab.config = lab.config.replace("echo CLEANUP", "'sleep 1.5; echo CLEANED'");
    let job = lab.submit(json!({}));
    let _agent = lab.start();
    lab.server
        .until("the test runs", |state| state.results[&job].output("test").contains("begun").then_some(()));
    until("its processes run", || process_with("1234501"));
    lab.server.cancel(&job);
    let result = lab.server.finished(&job);
    assert!(!process_with("1234501"), "a process survived");
    assert_eq!(result.state, "cancelled", "and not complete");
    assert_eq!((result.status["test"], result.status["cleanup"]), (247, 0));
    assert!(result.output("cleanup").ends_with("CLEANED\n"), "cleanup was cut short");
    lab.check();
}

#[test]
fn what_a_job_leaves_behind_ends_with_it() {
    let lab = lab("setsid sleep 1234502 >/dev/null 2>&1 & echo done");
    let job = lab.submit(json!({}));
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert_eq!(result.status["test"], 0);
    assert!(!process_with("1234502"));
}

#[test]
fn secrets_are_literals_and_never_shown() {
    let lab = lab(
        "printf 'a $SECRET '; printf 'hun.te'; sleep 0.3; printf 'r(2 end\\n'; echo \"$SECRET\"; echo huXter; stat -c %a testflinger.json test.log",
    );
    let secrets = json!({"test_cmds": "x", "secrets": {"SECRET": "hun.ter(2", "EMPTY": ""}});
    let job = lab.submit(json!({"test_data": secrets}));
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    let text = result.output("test");
    assert!(!text.contains("hun.te") && !text.contains("r(2"), "{text}");
    let text = text.split_once("a1 *\n").expect("a banner").1.split_once('\n').expect("stars").1;
    let lines: Vec<_> = text.lines().collect();
    let mark = lines[1];
    assert!(mark.len() == 10 && mark.starts_with("**") && mark.ends_with("**"), "{text}");
    assert_eq!(lines, [&format!("a $SECRET {mark} end"), mark, "huXter", "600", "600"]);
    assert_eq!(result.status["test"], 0);
    lab.check();
}

#[test]
fn commands_find_the_strings_of_the_configuration() {
    let mut lab = lab("echo $agent_id/$provision_type/$setup_command/$polling_interval/$SECRET/$token_file");
    lab.config.push_str("provision_type: noprov\n");
    let job = lab.submit(json!({"test_data": {"test_cmds": "x", "secrets": {"SECRET": "s3cret"}}}));
    let _agent = lab.start();
    let token = lab.path("no-token");
    let text = lab.server.finished(&job).output("test");
    let (start, end) = ("a1/noprov/echo SETUP//**", format!("**/{}\n", token.display()));
    assert!(text.contains(start) && text.ends_with(&end), "{text}");
}

#[test]
fn broken_attachments_are_told_to_the_user() {
    for bytes in [archive(&[("test/../../evil", "x", 0o644)]), b"no archive".to_vec()] {
        let lab = lab("echo never");
        let data = json!({"test_cmds": "x", "attachments": [{"agent": "x"}]});
        let job = crate::support::job(json!({"test_data": data, "attachments_status": "complete"}));
        let id = job["job_id"].as_str().expect("an id").to_owned();
        lab.server.state().attachments.insert(id.clone(), bytes);
        lab.server.submit(job);
        let _agent = lab.start();
        let result = lab.server.finished(&id);
        assert_eq!((result.status["test"], result.status["cleanup"]), (100, 0));
        assert!(result.output("test").contains("ERROR: The attachments could not be unpacked"), "{result:?}");
        assert!(!result.output("test").contains("never"));
        assert!(!lab.path("run/evil").exists() && !lab.path("evil").exists());
        lab.check();
    }
}

#[test]
fn an_allocation_ends_although_its_parent_is_silent() {
    let lab = Lab::new(
        "allocate_command: \"echo '{\\\"device_info\\\": {\\\"device_ip\\\": \\\"10.0.0.1\\\"}}' > device-info.json\"\n",
    );
    let job =
        lab.submit(json!({"allocate_data": {"allocate": true}, "test_data": null, "allocation_timeout": 2}));
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert_eq!(result.device_info["device_ip"], "10.0.0.1");
    assert_eq!(result.status["allocate"], 247);
    let asked = lab.server.state().seen.iter().filter(|s| s.is("GET", &format!("/v1/result/{job}"))).count();
    assert!(asked < 20, "{asked} questions in two seconds");
    lab.check();
}

#[test]
fn a_broken_webhook_does_not_hold_the_job() {
    let lab = lab("true");
    let job = lab.submit(json!({"job_status_webhook": "http://127.0.0.1:9/hook"}));
    lab.server.misbehave(|seen| seen.path.ends_with("/events").then_some(Fault::Status(500)));
    let _agent = lab.start();
    lab.server.until("the job is taken", |state| state.taken.contains(&job).then_some(()));
    let begun = Instant::now();
    lab.server.finished(&job);
    assert!(begun.elapsed() < Duration::from_secs(5));
    let tries = lab.server.state().seen.iter().filter(|s| s.path.ends_with("/events")).count();
    assert_eq!(tries, 2, "the first, and the last, which has them all");
}

#[test]
fn a_cancel_is_not_undone_by_the_next_phase() {
    let lab = lab("echo never");
    let job = lab.submit(json!({}));
    let server = lab.server.clone();
    let id = job.clone();
    // Between the agent's look at the admin's wishes and its post: the original has looked already.
    lab.server.misbehave(move |seen| {
        if seen.is("GET", "/v1/agents/data/a1") && server.state().results[&id].state == "setup" {
            server.cancel(&id);
        }
        None
    });
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert_eq!(result.states, ["setup", "cancelled"]);
    assert_eq!(result.status.keys().collect::<Vec<_>>(), ["cleanup", "setup"]);
}

#[test]
fn a_failed_test_does_not_stop_what_follows() {
    let mut lab = lab("exit 3");
    lab.config.push_str("reserve_command: echo RESERVED\n");
    let job = lab.submit(json!({"reserve_data": {"ssh_keys": ["lp:x"], "timeout": 1}}));
    let _agent = lab.start();
    let result = lab.server.finished(&job);
    assert_eq!((result.status["test"], result.status["reserve"]), (3, 0));
}

#[test]
fn serial_logs_are_sent_and_commands_may_remove_what_they_find() {
    let lab = lab(
        "printf 'boot\\377ing' > test-serial.log; mkdir artifacts; mv *.json *.log artifacts 2>/dev/null; true",
    );
    let lab2 = lab.submit(json!({"provision_data": {"distro": "x"}}));
    let _agent = lab.start();
    let result = lab.server.finished(&lab2);
    assert_eq!(result.status.values().sum::<i64>(), 0, "{result:?}");
    assert!(result.artifact_names().contains(&"artifacts/testflinger.json".to_owned()));
    let other = Lab::new(COMMANDS);
    other.script("printf 'boot\\377ing' > test-serial.log");
    let job = other.submit(json!({}));
    let _agent = other.start();
    assert_eq!(other.server.finished(&job).text("serial", "test"), "boot\u{fffd}ing");
    other.check();
}

#[test]
fn the_agent_works_under_the_name_of_the_original() {
    let lab = lab("true");
    let link = lab.path("testflinger-agent");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_shakedown"), &link).expect("links");
    std::fs::write(lab.path("testflinger-agent.conf"), &lab.config).expect("writes");
    let job = lab.submit(json!({}));
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let mut command = std::process::Command::new(link);
    command.current_dir(lab.dir.path()).args(["-p", &port.to_string(), "--token-file", "none"]);
    let _agent = crate::support::Running::start(command);
    lab.server.finished(&job);
    let page = {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connects");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("asks");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("reads");
        page
    };
    assert!(page.contains("jobs_total{agent_id=\"a1\"} 1.0\n"), "{page}");
    assert!(page.contains("test_phase=\"reserve\"") && !page.contains("test_phase=\"cleanup\""), "{page}");
}

#[test]
fn two_agents_share_a_process() {
    let server = Server::start();
    let (one, two) = (Lab::with(server.clone(), "a1", COMMANDS), Lab::with(server.clone(), "a2", COMMANDS));
    one.script("echo one");
    two.script("echo two");
    let second = two.path("second.conf");
    std::fs::write(&second, &two.config).expect("writes");
    let jobs = [one.submit(json!({})), two.submit(json!({"job_queue": "q-a2"}))];
    let _agents = one.start_with(&["-c", second.to_str().expect("UTF-8")]);
    for (job, word) in jobs.iter().zip(["one\n", "two\n"]) {
        assert!(server.finished(job).output("test").ends_with(word));
    }
    // One is asked to restart: it begins anew, and the other does not notice.
    server.set_agent("a2", "restart", "please");
    server.until("a2 works again", |state| (state.agents["a2"]["state"] == "waiting").then_some(()));
    let job = two.submit(json!({"job_queue": "q-a2"}));
    assert!(server.finished(&job).output("test").ends_with("two\n"));
}

#[test]
fn files_with_secrets_are_for_their_owner() {
    let lab = lab("until [ -e ../../go ]; do sleep 0.02; done");
    let job = lab.submit(json!({}));
    let _agent = lab.start();
    lab.server.until("the test runs", |state| (state.agents.get("a1")?["state"] == "test").then_some(()));
    let mode = |path: std::path::PathBuf| {
        std::fs::metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode()
            & 0o777
    };
    assert_eq!(mode(lab.rundir(&job).join("testflinger.json")), 0o600);
    assert_eq!(mode(lab.path("run/.shakedown")), 0o700);
    std::fs::write(lab.path("go"), "").expect("writes");
    lab.server.finished(&job);
}
