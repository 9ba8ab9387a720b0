//! One phase of a job: whether it runs, its command, its output, and what it leaves to be told.

use super::job::{INTERNAL, Running};
use super::mask::{Filter, Mask};
use super::place::{self, read_object};
use super::runner::{self, Cut, Ended, Limits};
use super::spool::Post;
use super::survivors::{self, Mark};
use crate::testflinger::wire::{Log, Phase, ResultUpdate, job_state};
use anyhow::Result;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Serial logs are sent in pieces of this many bytes.
const PIECE: usize = 512 << 10;

impl Running<'_> {
    /// Runs `phase`, unless there is nothing to run; `None` when the agent must end now.
    pub(super) fn run_phase(&mut self, phase: Phase) -> Option<Ended> {
        let Some(command) = self.agent.config.command(phase).filter(|_| self.job.asks_for(phase)) else {
            self.agent.log.debug(format!("Phase {phase} is skipped"));
            return Some(Ended { code: 0, cut: None });
        };
        self.agent.log.info(format!("Running phase {phase}"));
        let banner = format!("* Starting testflinger {phase} phase on {} *", self.agent.config.agent_id);
        let stars = "*".repeat(banner.chars().count());
        self.print(phase, &format!("{stars}\n{banner}\n{stars}\n"));
        self.tell_device();
        let mask = match phase {
            Phase::Test => Mask::new(self.job.secrets().into_values()),
            _ => Mask::new([]),
        };
        let mut ended = match self.command(phase, command, &mask) {
            Ok(ended) => ended,
            Err(error) => {
                self.print(phase, &format!("\nERROR: {error:#}\n"));
                self.agent.log.error(format!("Phase {phase}: {error:#}"));
                Ended { code: INTERNAL, cut: None }
            }
        };
        if ended.cut == Some(Cut::Stopped) {
            return None;
        }
        if let Some(cut) = ended.cut {
            self.print(phase, &format!("\n{}\n", cut.text()));
        }
        self.send_serial(phase, &mask);
        self.record(phase, ended.code);
        if phase == Phase::Allocate && ended.code == 0 {
            ended = self.stay_allocated()?;
            if let Some(cut) = ended.cut {
                self.print(phase, &format!("\n{}\n", cut.text()));
            }
            if ended.code != 0 {
                self.record(phase, ended.code);
            }
        }
        Some(ended)
    }

    fn command(&self, phase: Phase, line: &str, mask: &Mask) -> Result<Ended> {
        // A command of an earlier phase may have removed it.
        self.place.make_rundir()?;
        let mark = format!("{}/{phase}", self.job.id());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", line]).current_dir(&self.place.rundir);
        command.envs(self.agent.config.environment());
        command.env("token_file", &self.agent.token_file);
        // The agent's own, and a job can print what it finds.
        command.env_remove("INFLUX_PW");
        if phase == Phase::Test {
            command.envs(self.job.secrets().iter().filter(|(name, value)| can_be_variable(name, value)));
        }
        command.env(survivors::VARIABLE, &mark);
        let limits = Limits {
            global: self.limit(phase),
            output: (phase == Phase::Test).then(|| self.agent.config.output_limit(self.job.output_timeout())),
        };
        // A machine that is cut off in the middle of its provisioning may be lost; cleaning up is
        // what a cancelled job needs most.
        let may_cancel = !matches!(phase, Phase::Provision | Phase::Cleanup);
        self.outbox.watch(may_cancel);
        let control = &self.agent.control;
        let ask = || {
            if control.ends_now() {
                Some(Cut::Stopped)
            } else if may_cancel && self.outbox.cancelled() {
                Some(Cut::Cancelled)
            } else {
                None
            }
        };
        let mut log = place::append(&self.place.rundir.join(format!("{phase}.log"))).ok();
        let mut filter = Filter::new(mask);
        let mut show = |text: String| {
            if let Some(file) = &mut log {
                let _ = file.write_all(text.as_bytes());
            }
            self.outbox.text(Log::Output, phase, text);
        };
        let outcome =
            runner::run(command, &Mark::Phase(mark), &limits, ask, |bytes| show(filter.push(bytes)));
        show(filter.finish());
        self.outbox.watch(false);
        outcome
    }

    /// Tells what the device connector said of the machine.
    fn tell_device(&self) -> bool {
        let path = self.place.rundir.join("device-info.json");
        if !path.exists() {
            return false;
        }
        let Some(info) = read_object(&path) else {
            self.agent.log.error("device-info.json is no JSON object");
            return false;
        };
        for key in info.keys().filter(|key| *key != "device_info") {
            self.agent
                .log
                .warning(format!("device-info.json has `{key}`, which no server takes: it is left out"));
        }
        let Some(info) = info.get("device_info") else { return false };
        let device_info = Some(info.clone());
        self.outbox.post(Post::Result(ResultUpdate { device_info, ..ResultUpdate::default() }));
        true
    }

    fn send_serial(&self, phase: Phase, mask: &Mask) {
        let path = self.place.rundir.join(format!("{phase}-serial.log"));
        let Ok(mut file) = File::open(path) else { return };
        let mut filter = Filter::new(mask);
        let mut piece = vec![0; PIECE];
        while let Ok(size @ 1..) = file.read(&mut piece) {
            self.outbox.text(Log::Serial, phase, filter.push(&piece[..size]));
        }
        self.outbox.text(Log::Serial, phase, filter.finish());
    }

    /// The machine is the parent job's until that ends, or this one, or the time is up.
    fn stay_allocated(&mut self) -> Option<Ended> {
        self.tell_device();
        self.outbox.post(Post::Result(ResultUpdate::state(job_state::ALLOCATED)));
        self.outbox.settle();
        let (begun, limit) = (Instant::now(), self.allocation_limit());
        let glance =
            self.agent.config.polling_interval().clamp(Duration::from_secs(1), Duration::from_secs(10));
        self.outbox.watch(true);
        let over = loop {
            if self.agent.control.ends_now() {
                return None;
            }
            if self.outbox.cancelled() {
                break Ended { code: 0, cut: Some(Cut::Cancelled) };
            }
            let job = self.agent.client.job_state(self.job.id());
            let parent = self.job.parent().map(|parent| self.agent.client.job_state(parent));
            let is_over = |state: &Result<Option<String>, _>| matches!(state, Ok(Some(state)) if job_state::is_final(state));
            if is_over(&job) || parent.as_ref().is_some_and(is_over) {
                break Ended { code: 0, cut: None };
            }
            if begun.elapsed().as_secs() >= limit {
                break Ended { code: 247, cut: Some(Cut::Global(limit)) };
            }
            let wake = Instant::now() + glance;
            while Instant::now() < wake && !self.agent.control.ends_now() && !self.outbox.cancelled() {
                std::thread::sleep(Duration::from_millis(100).min(glance));
            }
        };
        self.outbox.watch(false);
        Some(over)
    }

    fn allocation_limit(&self) -> u64 {
        let limit = self.agent.config.global_limit(self.job.global_timeout());
        self.job.allocation_timeout().map_or(limit, |asked| asked.min(limit))
    }
}

/// `std` would panic at others.
pub(in crate::testflinger) fn can_be_variable(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

/// What the device connector says went wrong in `phase`; empty when it says nothing.
pub(super) fn describe_exception(rundir: &Path, phase: Phase) -> String {
    let errors = read_object(&rundir.join("device-connector-error.json"));
    let Some(info) = errors.as_ref().and_then(|errors| errors.get(&format!("{phase}_exception_info"))) else {
        return String::new();
    };
    let text = |key: &str| match info.get(key) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let described = format!("{}: {}", text("exception_name"), text("exception_message"));
    match text("exception_cause") {
        cause if cause.is_empty() => described,
        cause => format!("{described} caused by {cause}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_read_as_in_the_original() {
        let dir = tempfile::tempdir().expect("temp dir");
        let describe = |json: &str| {
            std::fs::write(dir.path().join("device-connector-error.json"), json).expect("writes");
            describe_exception(dir.path(), Phase::Provision)
        };
        let info = r#"{"provision_exception_info": {"exception_name": "ProvisioningError", "exception_message": "no boot", "exception_cause": CAUSE}}"#;
        assert_eq!(describe(&info.replace("CAUSE", "null")), "ProvisioningError: no boot");
        assert_eq!(describe(&info.replace("CAUSE", "\"x()\"")), "ProvisioningError: no boot caused by x()");
        for nothing in ["", "[]", "{}", r#"{"test_exception_info": {}}"#] {
            assert_eq!(describe(nothing), "", "{nothing}");
        }
    }

    #[test]
    fn a_secret_with_an_impossible_name_is_no_variable() {
        assert!(can_be_variable("TOKEN", "x"));
        assert!(!can_be_variable("A=B", "x") && !can_be_variable("", "x") && !can_be_variable("A", "x\0"));
    }
}
