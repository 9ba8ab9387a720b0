//! What Prometheus reads: the names, labels and buckets of the original, at any path of a port.

use crate::fault::Fault;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds in seconds.
const BUCKETS: [u64; 8] = [60, 120, 300, 600, 1800, 3600, 7200, 14400];

/// Label values in the order of the labels.
type Labels = Vec<String>;

/// The numbers of all agents of this process.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics(Arc<Mutex<Numbers>>);

#[derive(Debug, Default)]
struct Numbers {
    jobs: BTreeMap<Labels, u64>,
    failures: BTreeMap<Labels, u64>,
    recovery_failures: BTreeMap<Labels, u64>,
    durations: BTreeMap<Labels, Histogram>,
}

/// A histogram.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: u64,
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn job(&self, agent: &str) {
        *self.lock().jobs.entry(vec![agent.into()]).or_default() += 1;
    }

    pub(super) fn failure(&self, agent: &str, phase: &str) {
        *self.lock().failures.entry(vec![agent.into(), phase.into()]).or_default() += 1;
    }

    pub(super) fn recovery_failure(&self, agent: &str) {
        *self.lock().recovery_failures.entry(vec![agent.into()]).or_default() += 1;
    }

    pub(super) fn duration(&self, agent: &str, phase: &str, identifier: &str, release: &str, seconds: u64) {
        let labels = [agent, phase, identifier, release].map(str::to_owned).to_vec();
        let mut numbers = self.lock();
        let histogram = numbers.durations.entry(labels).or_default();
        for (bound, count) in BUCKETS.iter().zip(&mut histogram.buckets) {
            *count += u64::from(seconds <= *bound);
        }
        histogram.count += 1;
        histogram.sum += seconds;
    }

    /// The page.
    pub(super) fn page(&self) -> String {
        let numbers = self.lock();
        let mut page = String::new();
        counter(&mut page, "jobs", "Total number of jobs", &["agent_id"], &numbers.jobs);
        let labels = ["agent_id", "test_phase"];
        counter(&mut page, "failures", "Total number of failures", &labels, &numbers.failures);
        let help = "Total number of recovery failures";
        counter(&mut page, "recovery_failures", help, &["agent_id"], &numbers.recovery_failures);
        durations(&mut page, &numbers.durations);
        drop(numbers);
        process(&mut page);
        page
    }

    /// Serves the page on `port` of all interfaces, as who scrapes it is elsewhere.
    pub(super) fn serve(&self, port: u16) -> Result<()> {
        let listener = TcpListener::bind(("0.0.0.0", port)).with_context(|| {
            Fault::host(format!("cannot listen on port {port} for metrics"))
                .fix("choose another one with `-p`")
        })?;
        let metrics = self.clone();
        std::thread::Builder::new()
            .name("metrics".into())
            .stack_size(128 << 10)
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let _ = metrics.answer(stream);
                }
            })
            .context(Fault::host("cannot start the thread for metrics"))?;
        Ok(())
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        // One at a time: a client that dawdles does not keep others waiting for long.
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.set_write_timeout(Some(Duration::from_secs(2)))?;
        let mut request = Vec::new();
        let mut chunk = [0; 1024];
        while !request.windows(4).any(|window| window == b"\r\n\r\n") && request.len() < 16 << 10 {
            let size = stream.read(&mut chunk)?;
            if size == 0 {
                return Ok(());
            }
            request.extend_from_slice(&chunk[..size]);
        }
        let (status, page) = if request.starts_with(b"GET ") {
            ("200 OK", self.page())
        } else {
            ("405 Not Allowed", String::new())
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            page.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(page.as_bytes())
    }
}

fn labelled(names: &[&str], values: &[String], more: Option<(&str, &str)>) -> String {
    let escape = |value: &str| value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs = names.iter().copied().zip(values.iter().map(String::as_str)).chain(more);
    let pairs: Vec<_> = pairs.map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

fn counter(page: &mut String, name: &str, help: &str, labels: &[&str], values: &BTreeMap<Labels, u64>) {
    let _ = write!(page, "# HELP {name}_total {help}\n# TYPE {name}_total counter\n");
    for (value, count) in values {
        let _ = writeln!(page, "{name}_total{} {count}.0", labelled(labels, value, None));
    }
}

fn durations(page: &mut String, values: &BTreeMap<Labels, Histogram>) {
    let name = "phase_duration_seconds";
    let names = ["agent_id", "test_phase", "identifier", "release"];
    let _ = write!(page, "# HELP {name} Duration of a test phase\n# TYPE {name} histogram\n");
    for (labels, histogram) in values {
        for (bound, count) in BUCKETS.iter().zip(histogram.buckets) {
            let bound = format!("{bound}.0");
            let _ =
                writeln!(page, "{name}_bucket{} {count}.0", labelled(&names, labels, Some(("le", &bound))));
        }
        let count = histogram.count;
        let _ = writeln!(page, "{name}_bucket{} {count}.0", labelled(&names, labels, Some(("le", "+Inf"))));
        let labels = labelled(&names, labels, None);
        let _ = write!(page, "{name}_count{labels} {count}.0\n{name}_sum{labels} {}.0\n", histogram.sum);
    }
}

/// What is known of this process, by the names that Prometheus clients use.
fn process(page: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name of the program may have spaces and is in parentheses.
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |index: usize| fields.get(index).copied().unwrap_or(0.0);
    #[allow(clippy::cast_precision_loss)] // They are small.
    let (ticks, page_size) =
        (rustix::param::clock_ticks_per_second() as f64, rustix::param::page_size() as f64);
    let boot = fs::read_to_string("/proc/stat")
        .ok()
        .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok()))
        .unwrap_or(0.0);
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let mut gauge = |name: &str, kind: &str, help: &str, value: String| {
        let _ = write!(
            page,
            "# HELP process_{name} {help}\n# TYPE process_{name} {kind}\nprocess_{name} {value}\n"
        );
    };
    gauge("virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", format!("{:.1}", field(20)));
    gauge(
        "resident_memory_bytes",
        "gauge",
        "Resident memory size in bytes.",
        format!("{:.1}", field(21) * page_size),
    );
    let start = boot + field(19) / ticks;
    gauge(
        "start_time_seconds",
        "gauge",
        "Start time of the process since unix epoch in seconds.",
        format!("{start:.2}"),
    );
    let cpu = (field(11) + field(12)) / ticks;
    gauge(
        "cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        format!("{cpu:.2}"),
    );
    gauge("open_fds", "gauge", "Number of open file descriptors.", format!("{open}.0"));
    gauge("max_fds", "gauge", "Maximum number of open file descriptors.", format!("{limit}.0"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_the_original() {
        let metrics = Metrics::default();
        metrics.job("a\"1");
        metrics.failure("a1", "provision");
        metrics.recovery_failure("a1");
        metrics.duration("a1", "test", "cid", "22.04", 61);
        metrics.duration("a1", "test", "cid", "22.04", 0);
        let page = metrics.page();
        for line in [
            "jobs_total{agent_id=\"a\\\"1\"} 1.0",
            "failures_total{agent_id=\"a1\",test_phase=\"provision\"} 1.0",
            "recovery_failures_total{agent_id=\"a1\"} 1.0",
            "phase_duration_seconds_bucket{agent_id=\"a1\",test_phase=\"test\",identifier=\"cid\",release=\"22.04\",le=\"60.0\"} 1.0",
            "phase_duration_seconds_bucket{agent_id=\"a1\",test_phase=\"test\",identifier=\"cid\",release=\"22.04\",le=\"+Inf\"} 2.0",
            "phase_duration_seconds_sum{agent_id=\"a1\",test_phase=\"test\",identifier=\"cid\",release=\"22.04\"} 61.0",
        ] {
            assert!(page.lines().any(|l| l == line), "no {line} in\n{page}");
        }
        assert!(!page.contains("_created"));
        let resident = page.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
        assert!(resident.is_some_and(|bytes| bytes.parse::<f64>().is_ok_and(|bytes| bytes > 1e6)), "{page}");
    }
}
