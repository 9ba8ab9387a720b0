//! What a lab's InfluxDB gets to see.

use crate::server::{Fault, Server};
use crate::support::{COMMANDS, Lab, Running};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};

fn start(lab: &Lab, influx: &Server) -> Running {
    let mut command = lab.command(&[]);
    command.env("INFLUX_HOST", "127.0.0.1").env("INFLUX_PORT", influx.address.port().to_string());
    Running::start({
        command.env("INFLUX_USER", "me").env("INFLUX_PW", "pw");
        command
    })
}

/// Of one job whose test fails: each state, and each phase's end, also of those that are skipped.
fn expected() -> Vec<String> {
    let phases = [
        ("setup", 0),
        ("provision", 0),
        ("firmware_update", 0),
        ("test", 7),
        ("allocate", 0),
        ("reserve", 0),
    ];
    let of_phase = |(phase, result): (&str, u8)| {
        [format!("phase=\"{phase}\""), format!("phase=\"{phase}\",result={result}i")]
    };
    let waiting = || std::iter::once("phase=\"waiting\"".to_owned());
    waiting().chain(phases.into_iter().flat_map(of_phase)).chain(waiting()).collect()
}

#[test]
fn it_has_each_state_and_each_end_of_a_phase() {
    let (mut lab, influx) = (Lab::new(COMMANDS), Server::start());
    lab.script("exit 7");
    lab.config = lab.config.replace("agent_id: a1", "agent_id: a,1 =x");
    let _agent = start(&lab, &influx);
    lab.submit(json!({}));
    let points = influx
        .until("all points", |state| state.points.clone().filter(|points| points.len() >= expected().len()));
    assert_eq!(points, expected());
    assert_eq!(influx.state().violations, [""; 0]);
}

#[test]
fn a_database_that_is_away_keeps_nobody_waiting_and_misses_nothing() {
    let (lab, influx) = (Lab::new(COMMANDS), Server::start_down());
    lab.script("exit 7");
    let _agent = start(&lab, &influx);
    let job = lab.submit(json!({}));
    lab.server.finished(&job);
    let failed = AtomicBool::new(false);
    influx.misbehave(move |seen| {
        (seen.path.starts_with("/write") && !failed.swap(true, Ordering::Relaxed))
            .then_some(Fault::Status(503))
    });
    influx.up();
    let points = influx
        .until("all points", |state| state.points.clone().filter(|points| points.len() >= expected().len()));
    assert_eq!(points, expected());
    assert_eq!(influx.state().violations, [""; 0]);
    lab.check();
}

#[test]
fn a_port_that_is_none_is_said_at_once() {
    let lab = Lab::new("");
    let mut command = lab.command(&[]);
    command.env("INFLUX_HOST", "127.0.0.1").env("INFLUX_PORT", "influx");
    assert_eq!(Running::start(command).ended(), 70);
}
