//! Our agent does the recorded jobs, and posts what the original did, in the same order.
//!
//! Where ours is to do better, the difference is written down here. Log fragments are compared by phase,
//! since ours come when there is output and not every ten seconds.

use crate::server::Server;
use crate::support::{Lab, Running, job};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;

const COMMANDS: &str = r#"
location: here
provision_type: noprovision
setup_command: echo SETUP
provision_command: "../../provision.sh"
test_command: sh ../../test.sh
allocate_command: echo allocating; ls -la
reserve_command: echo '*** TESTFLINGER SYSTEM RESERVED ***'; echo 'keys [lp:someone, gh:someone]'; sleep 0.1; echo reservation over
cleanup_command: echo CLEANUP; ls; cat testflinger-outcome.json
"#;

const PROVISION: &str = r#"#!/bin/sh
distro=$(sed -n 's/.*"distro": "\([a-z]*\)".*/\1/p' testflinger.json)
echo "provisioning distro $distro"
case $distro in
fail) echo '{"provision_exception_info": {"exception_name": "ProvisioningError", "exception_message": "no boot", "exception_cause": null}}' > device-connector-error.json
    echo boom; exit 7;;
recovery) exit 46;;
esac
echo '{"device_info": {"device_ip": "127.0.0.1", "agent_name": "a1"}}' > device-info.json
"#;

/// What a request says, without what differs from run to run.
#[derive(Clone, Debug, PartialEq)]
enum Said {
    /// The last event of the list.
    Event(String, String),
    Log(String, String),
    Post(String, Value),
}

fn said(method: &str, path: &str, body: &Value, id: &str, server: &str) -> Option<Said> {
    if method != "POST" || path.ends_with("/oauth2/refresh") {
        return None;
    }
    let path = path.replace(id, "JOB");
    let text =
        |value: &Value| value.as_str().unwrap_or_default().replace(id, "JOB").replace(server, "SERVER");
    Some(if path.ends_with("/events") {
        let last = body["events"].as_array().and_then(|events| events.last()).expect("events");
        Said::Event(text(&last["event_name"]), text(&last["detail"]))
    } else if path.ends_with("/log/output") {
        Said::Log(text(&body["phase"]), text(&body["log_data"]))
    } else if path.ends_with("/artifact") {
        Said::Post(path, "artifacts".into())
    } else {
        Said::Post(path, serde_json::from_str(&body.to_string().replace(id, "JOB")).expect("JSON"))
    })
}

/// Joins what was said of one phase's log in a row.
fn joined(all: impl Iterator<Item = Said>) -> Vec<Said> {
    let mut joined: Vec<Said> = Vec::new();
    for said in all {
        match (joined.last_mut(), said) {
            (Some(Said::Log(phase, text)), Said::Log(same, more)) if *phase == same => text.push_str(&more),
            (_, said) => joined.push(said),
        }
    }
    joined
}

struct Trace {
    job: Value,
    expected: Vec<Said>,
}

/// Reads a recording; `change` edits the job, so that it takes less time.
fn trace(name: &str, change: impl Fn(&str) -> String) -> Trace {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/testflinger/{name}.jsonl"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let given = lines.iter().find(|line| line["method"] == "GET").map(|line| line["answer"].clone());
    let job = given.map_or(Value::Null, |job| serde_json::from_str(&change(&job.to_string())).expect("JSON"));
    let id = job["job_id"].as_str().unwrap_or("none");
    let server = lines.iter().find_map(|line| {
        let start = line["body"]["events"][0]["detail"].as_str()?;
        Some(start.split("/jobs/").next().expect("a server").to_owned())
    });
    let server = server.unwrap_or_else(|| "none".into());
    let expected = joined(lines.iter().filter_map(|line| {
        said(line["method"].as_str()?, line["path"].as_str()?, &line["body"], id, &server)
    }));
    Trace { job, expected }
}

struct Stage {
    lab: Lab,
    trace: Trace,
    agent: Running,
}

impl Stage {
    /// Starts an agent as the recorded one was, and hands it the job.
    fn new(name: &str, change: impl Fn(&str) -> String, before: impl FnOnce(&Lab, &Trace)) -> Self {
        let trace = trace(name, change);
        let server = Server::start();
        server.expire_tokens();
        let more =
            format!("identifier: cid-{name}\nadvertised_queues:\n  q-{name}: queue {name}\n{COMMANDS}");
        let lab = Lab::with(server, name, &more);
        lab.script(trace.job["test_data"]["test_cmds"].as_str().unwrap_or("exit 99"));
        let provision = lab.path("provision.sh");
        std::fs::write(&provision, PROVISION).expect("writes");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&provision, mode).expect("is executable");
        before(&lab, &trace);
        if trace.job.is_object() {
            lab.server.submit(trace.job.clone());
        }
        let agent = lab.start_with(&["--token-file", &lab.token_file()]);
        Self { lab, trace, agent }
    }

    fn plain(name: &str) -> Self {
        Self::new(name, |job| job.replace("sleep 7", "sleep 0.1"), |_, _| {})
    }

    fn id(&self) -> &str {
        self.trace.job["job_id"].as_str().expect("an id")
    }

    /// What the agent said, when that is as much as is recorded.
    fn said(&self) -> Vec<Said> {
        let server = format!("http://{}", self.lab.server.address);
        let id = self.trace.job["job_id"].as_str().unwrap_or("none").to_owned();
        let said = self.lab.server.until("as much came as is recorded", |state| {
            let all = state.seen.iter().filter_map(|s| said(&s.method, &s.path, &s.json, &id, &server));
            let all = joined(all);
            (all.len() >= self.trace.expected.len()).then_some(all)
        });
        self.lab.check();
        said
    }

    fn passes(&self) {
        self.passes_with(|_| {});
    }

    /// `better`: edits the recording where ours does something else on purpose.
    fn passes_with(&self, better: impl FnOnce(&mut Vec<Said>)) {
        let said = self.said();
        let mut expected = self.trace.expected.clone();
        better(&mut expected);
        for (index, (ours, theirs)) in said.iter().zip(&expected).enumerate() {
            assert_eq!(ours, theirs, "request {index} differs (ours first)\n{}", self.lab.log());
        }
        assert_eq!(said.len(), expected.len(), "{:#?}", &said[said.len().min(expected.len())..]);
    }
}

fn edit_log(all: &mut [Said], phase: &str, edit: impl Fn(&str) -> String) {
    for said in all {
        if let Said::Log(name, text) = said
            && name == phase
        {
            *text = edit(text);
        }
    }
}

#[test]
fn pass() {
    let stage = Stage::plain("pass");
    stage.passes();
    let result = stage.lab.server.finished(stage.id());
    assert_eq!(result.artifact_names(), ["artifacts", "artifacts/sub", "artifacts/sub/when.txt"]);
    assert!(!stage.lab.rundir(stage.id()).exists());
}

#[test]
fn provision_fails() {
    Stage::plain("pfail").passes();
}

#[test]
fn recovery_fails() {
    let stage = Stage::plain("recov");
    stage.passes();
    assert_eq!(stage.lab.server.state().agents["recov"]["state"], "offline");
}

#[test]
fn reserve() {
    Stage::plain("reserve").passes();
}

#[test]
fn attachments() {
    let archive = archive(&[
        ("test/data/config.json", "{\"a\": \"b\"}", 0o644),
        ("test/sub/s.sh", "echo attached script ran", 0o755),
    ]);
    // `ls -la` shows times and sizes.
    let change =
        |job: &str| job.replace("find attachments -type f | xargs ls -la", "find attachments -type f | sort");
    let stage = Stage::new("attach2", change, |lab, trace| {
        let id = trace.job["job_id"].as_str().expect("an id");
        lab.server.state().attachments.insert(id.to_owned(), archive);
    });
    let files = "attachments/test/data/config.json\nattachments/test/sub/s.sh\n";
    stage.passes_with(|expected| {
        edit_log(expected, "test", |text| {
            let Some(listing) = text.find("-rw-r--r--") else { return text.to_owned() };
            let json = text.find("{\"attachments_status").expect("the job");
            change(&format!("{}{files}{}", &text[..listing], &text[json..]))
        });
    });
}

#[test]
fn global_timeout() {
    // The time counts from the start of the job, of which the original spent 14 s on its own.
    let stage =
        Stage::new("gto", |job| job.replace("\"global_timeout\":15", "\"global_timeout\":2"), |_, _| {});
    let said = stage.said();
    let log = said.iter().find_map(|said| match said {
        Said::Log(phase, text) if phase == "test" => Some(text.clone()),
        _ => None,
    });
    let log = log.expect("a log");
    let (child, after) = log.split_once("child ").expect("its child").1.split_once('\n').expect("a line");
    assert_eq!(after, "\nERROR: Global timeout reached! (2s)\n", "after the last output");
    // What is dead and not yet reaped has no command line.
    let line = std::fs::read(Path::new("/proc").join(child).join("cmdline")).unwrap_or_default();
    assert!(line.is_empty(), "the grandchild survived");
    stage.passes_with(|expected| {
        edit_log(expected, "test", |_| log.clone());
        for said in expected {
            if let Said::Event(_, detail) = said {
                *detail = detail.replace("15s", "2s");
            }
        }
    });
}

#[test]
fn output_timeout() {
    let stage =
        Stage::new("oto", |job| job.replace("\"output_timeout\":12", "\"output_timeout\":1"), |_, _| {});
    stage.passes_with(|expected| {
        edit_log(expected, "test", |text| text.replace("12s", "1s"));
        for said in expected {
            if let Said::Event(_, detail) = said {
                *detail = detail.replace("12s", "1s");
            }
        }
    });
}

#[test]
fn cancel() {
    let stage = Stage::new(
        "cancel",
        |job| job.replace("sleep 5", "sleep 0.05"),
        |lab, trace| {
            let id = trace.job["job_id"].as_str().expect("an id").to_owned();
            let server = lab.server.clone();
            std::thread::spawn(move || {
                server.until("the test ticks", |state| {
                    state.results.get(&id)?.output("test").contains("tick 1").then_some(())
                });
                server.cancel(&id);
            });
        },
    );
    let said = stage.said();
    let log = said.iter().find_map(|said| match said {
        Said::Log(phase, text) if phase == "test" => Some(text.clone()),
        _ => None,
    });
    let log = log.expect("a log");
    assert!(log.ends_with("\n\nJob cancellation was requested, exiting.\n"), "{log:?}");
    stage.passes_with(|expected| {
        edit_log(expected, "test", |_| log.clone());
        // Cleanup is not cancelled, and the job ends as what it is.
        edit_log(expected, "cleanup", |text| {
            text.replace("\nJob cancellation was requested, exiting.\n", "")
        });
        for said in expected {
            if let Said::Post(_, body) = said
                && body["job_state"] == "complete"
            {
                body["job_state"] = "cancelled".into();
            }
        }
    });
}

#[test]
fn allocate() {
    let stage = Stage::new("alloc", str::to_owned, |lab, trace| {
        let parent = trace.job["parent_job_id"].as_str().expect("a parent");
        lab.server.state().results.entry(parent.to_owned()).or_default().state = "test".into();
    });
    stage.passes_with(|expected| {
        // A listing with times.
        let ours = stage.lab.server.state().results[stage.id()].output("allocate");
        assert!(ours.contains("\nallocating\ntotal "), "{ours}");
        let (banner, rest) = ours.split_at(ours.find("allocating").expect("output"));
        edit_log(
            expected,
            "allocate",
            |text| if text.contains("total") { rest.into() } else { banner.into() },
        );
    });
    let parent = stage.trace.job["parent_job_id"].as_str().expect("a parent").to_owned();
    stage.lab.server.state().results.entry(parent).or_default().state = "complete".into();
    let result = stage.lab.server.finished(stage.id());
    assert_eq!(result.states[result.states.len() - 3..], ["allocated", "reserve", "complete"]);
}

#[test]
fn offline_while_busy() {
    let stage = Stage::new(
        "offl",
        |job| job.replace("sleep 30", "sleep 0.5"),
        |lab, _| {
            let server = lab.server.clone();
            std::thread::spawn(move || {
                server.until("the test runs", |state| {
                    (state.agents.get("offl")?["state"] == "test").then_some(())
                });
                server.set_agent("offl", "offline", "Set to offline by dev-admin. Reason: admin says so");
            });
        },
    );
    stage.passes();
}

#[test]
fn usr1_while_busy() {
    let mut stage = Stage::new("usr1", |job| job.replace("sleep 45", "sleep 1"), |_, _| {});
    stage
        .lab
        .server
        .until("the test runs", |state| (state.agents.get("usr1")?["state"] == "test").then_some(()));
    stage.agent.signal(Signal::USR1);
    stage.passes_with(|expected| {
        // The state that a start takes for what it is; the original says `offline`.
        if let Some(Said::Post(_, body)) = expected.last_mut() {
            body["state"] = "restart".into();
        }
    });
    assert_eq!(stage.agent.ended(), 1);
}

#[test]
fn restart_while_idle() {
    let mut stage = Stage::new("rst", str::to_owned, |lab, _| {
        let server = lab.server.clone();
        std::thread::spawn(move || {
            server.until("it asks for work", |state| {
                state.seen.iter().any(|seen| seen.is("GET", "/v1/job")).then_some(())
            });
            server.set_agent("rst", "restart", "pls restart");
        });
    });
    assert_eq!(stage.agent.ended(), 1);
    stage.passes_with(|expected| {
        // As after SIGUSR1.
        if let Some(Said::Post(_, body)) = expected.last_mut() {
            body["state"] = "restart".into();
        }
    });
}

pub(crate) fn archive(members: &[(&str, &str, u32)]) -> Vec<u8> {
    let encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut builder = tar::Builder::new(encoder);
    for (name, content, mode) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_bytes()).expect("appends");
    }
    builder.into_inner().expect("ends").finish().expect("ends")
}

#[test]
fn a_job_of_these_tests_is_one_of_the_server() {
    assert!(job(json!({})).get("exclude_agents").is_some());
}
