//! Feeds InfluxDB, in which a lab plots what its agents do: only where `INFLUX_HOST` is set, and with the
//! points of the original.
//!
//! A thread sends them. A database that is away keeps nobody waiting, and misses what there is no room for.

use super::log::Log;
use super::outbox::chain;
use crate::fault::Fault;
use anyhow::{Context, Result};
use base64::Engine;
use std::env;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;
use ureq::http::header;

/// Points that wait for their database.
const MOST: usize = 1000;
const LIMIT: Duration = Duration::from_secs(10);
/// Between two tries: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(60);

/// One agent's line to the database; of no effect where there is none.
#[derive(Clone, Debug)]
pub(super) struct Influx {
    points: Option<SyncSender<String>>,
    agent: String,
}

impl Influx {
    /// As the environment says: `INFLUX_HOST`, `INFLUX_PORT`, `INFLUX_USER` and `INFLUX_PW`.
    pub(super) fn start(agent: &str, log: &Arc<Log>) -> Result<Self> {
        let value = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let Some(host) = value("INFLUX_HOST") else { return Ok(Self { points: None, agent: String::new() }) };
        let port = value("INFLUX_PORT").unwrap_or_else(|| "8086".into());
        let port: u16 = port.parse().with_context(|| {
            Fault::host(format!("INFLUX_PORT is `{port}`")).fix("set it to a port, or not at all")
        })?;
        let login = [value("INFLUX_USER"), value("INFLUX_PW")].map(Option::unwrap_or_default).join(":");
        let login = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login));
        let http = ureq::Agent::config_builder().timeout_global(Some(LIMIT)).proxy(None).build().into();
        let (points, waiting) = sync_channel(MOST);
        let database = Database { http, base: format!("http://{host}:{port}"), login, log: Arc::clone(log) };
        std::thread::Builder::new()
            .name("influx".into())
            .stack_size(256 << 10)
            .spawn(move || database.feed(&waiting))
            .context(Fault::host("cannot start a thread"))?;
        Ok(Self { points: Some(points), agent: tag(agent) })
    }

    /// The agent is in this state, or its phase ended with that status.
    pub(super) fn tell(&self, state: &str, result: Option<u8>) {
        let Some(points) = &self.points else { return };
        let mut point = format!("phase\\ result,agent={} phase=\"{}\"", self.agent, text(state));
        if let Some(result) = result {
            let _ = write!(point, ",result={result}i");
        }
        let _ = writeln!(point, " {}", jiff::Timestamp::now().as_nanosecond());
        let _ = points.try_send(point);
    }
}

fn tag(value: &str) -> String {
    value.replace(',', "\\,").replace('=', "\\=").replace(' ', "\\ ")
}

fn text(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"")
}

struct Database {
    http: ureq::Agent,
    base: String,
    login: String,
    log: Arc<Log>,
}

impl Database {
    fn feed(&self, points: &Receiver<String>) {
        self.insist("/query?q=CREATE+DATABASE+%22agent_jobs%22", "");
        for point in points {
            self.insist("/write?db=agent_jobs", &point);
        }
    }

    /// Sends until it arrives, or is refused.
    fn insist(&self, path: &str, body: &str) {
        let mut pause = FIRST_PAUSE;
        loop {
            let request = self.http.post(format!("{}{path}", self.base));
            match request.header(header::AUTHORIZATION, &self.login).send(body) {
                Ok(_) => return,
                Err(error @ ureq::Error::StatusCode(..500)) => {
                    return self.log.error(format!("InfluxDB refuses: {}", chain(&error)));
                }
                Err(error) if pause == FIRST_PAUSE => {
                    self.log
                        .warning(format!("InfluxDB is not to be had, and is asked again: {}", chain(&error)));
                }
                Err(_) => {}
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_a_line() {
        assert_eq!(tag("a b,c=d"), "a\\ b\\,c\\=d");
        assert_eq!(text("se\"t\\up"), "se\\\"t\\\\up");
    }
}
