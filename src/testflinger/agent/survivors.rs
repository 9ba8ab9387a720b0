//! Processes that a phase started, whatever they did to get away from it.
//!
//! A process may leave its group and its session and outlive its parent, but it inherits its
//! environment: there each command is given a mark. The mark finds them after a crash of the agent, too.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// The variable that carries the mark: `{job}/{phase}`.
pub(super) use crate::record::environment::JOB_MARK as VARIABLE;

/// How long a process may take to end after SIGTERM.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Which processes are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Those of one phase: `{job}/{phase}`.
    Phase(String),
    /// Those of any phase of this job.
    Job(String),
    /// Those that the agent of this name, of another make, started in this directory.
    In(std::path::PathBuf, String),
}

/// What a process was given. While it starts another program there is nothing, for a moment; and a
/// second read would find the end of what the first one began.
fn environment(process: &Path) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 256 << 10];
    for _ in 0..20 {
        let size = fs::File::open(process.join("environ")).ok()?.read(&mut bytes).ok()?;
        if size == bytes.len() {
            bytes.resize(size * 4, 0);
            continue;
        }
        // Neither the kernel's own processes nor the dead have a program.
        if size > 0 || fs::read_link(process.join("exe")).is_err() {
            bytes.truncate(size);
            return Some(bytes);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

impl Mark {
    fn is_on(&self, process: &Path) -> bool {
        let has = |wanted: &dyn Fn(&[u8]) -> bool| {
            environment(process).is_some_and(|environ| environ.split(|b| *b == 0).any(wanted))
        };
        let value = |name: &str| format!("{name}=").into_bytes();
        match self {
            Self::Phase(mark) => {
                has(&|line| line.strip_prefix(&value(VARIABLE)[..]) == Some(mark.as_bytes()))
            }
            Self::Job(job) => has(&|line| {
                let mark = line.strip_prefix(&value(VARIABLE)[..]);
                mark.is_some_and(|mark| {
                    mark.strip_prefix(job.as_bytes()).is_some_and(|m| m.starts_with(b"/"))
                })
            }),
            Self::In(dir, agent) => {
                fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
                    && has(&|line| line.strip_prefix(&value("agent_id")[..]) == Some(agent.as_bytes()))
            }
        }
    }

    /// The processes that carry it. Each is held, so that its number cannot become another's.
    fn find(&self) -> Vec<OwnedFd> {
        let ours = rustix::process::getpid();
        let numbers = fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| {
            let number: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            Pid::from_raw(number).filter(|pid| *pid != ours)
        });
        numbers
            .filter_map(|pid| {
                let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
                let held =
                    self.is_on(&process).then(|| pidfd_open(pid, PidfdFlags::empty()).ok()).flatten()?;
                // It may have become another between the look and the hold.
                self.is_on(&process).then_some(held)
            })
            .collect()
    }

    /// True while a process carries it.
    pub(super) fn is_alive(&self) -> bool {
        !self.find().is_empty()
    }

    /// Sends `signal` to all that carry it, and says to how many.
    pub(super) fn signal(&self, signal: Signal) -> usize {
        let found = self.find();
        for process in &found {
            let _ = pidfd_send_signal(process, signal);
        }
        found.len()
    }

    /// Ends all that carry it, and says how many there were. None is left, but what may not be
    /// signalled by us or does not die of SIGKILL.
    pub(super) fn end(&self) -> usize {
        let count = self.signal(Signal::TERM);
        if count == 0 {
            return 0;
        }
        let begun = Instant::now();
        while self.is_alive() && begun.elapsed() < GRACE * 2 {
            if begun.elapsed() > GRACE {
                self.signal(Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use std::process::{Command, Stdio};

    #[test]
    fn who_starts_one_program_after_the_other_is_always_found() {
        let mark = Mark::Phase(format!("exec-{}/test", std::process::id()));
        let Mark::Phase(value) = &mark else { unreachable!() };
        // Each shell becomes the next one.
        let script = "[ $1 = 0 ] || exec /bin/sh -c \"$0\" \"$0\" $(($1 - 1)); read line";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, script, "300"]).env(VARIABLE, value).stdin(Stdio::piped());
        let mut child = process::spawn(command).expect("starts");
        let (input, _, _) = child.pipes();
        let last =
            |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"\x000\0"));
        while !last(child.id()) {
            assert!(mark.is_alive(), "in the middle of starting a program");
        }
        drop(input);
    }

    #[test]
    fn who_leaves_its_session_is_found_and_ended() {
        let job = format!("test-{}", std::process::id());
        let mut command = Command::new("/bin/sh");
        // Two processes: one that went its own way, one that does not mind SIGTERM.
        command.args([
            "-c",
            "setsid sh -c 'sleep 1000 & wait' & setsid sh -c \"trap '' HUP; exec sleep 1000\" & wait",
        ]);
        command.env(VARIABLE, format!("{job}/test")).stdout(Stdio::null());
        let child = process::spawn(command).expect("starts");
        let (job_mark, phase_mark) = (Mark::Job(job.clone()), Mark::Phase(format!("{job}/test")));
        while phase_mark.find().len() < 4 {
            std::thread::yield_now();
        }
        drop(child);
        assert!(job_mark.is_alive(), "what left the group has survived it");
        assert!(!Mark::Phase(format!("{job}/cleanup")).is_alive());
        assert!(!Mark::Job(job[..job.len() - 1].into()).is_alive(), "another job's id may begin like ours");
        assert!(job_mark.end() >= 2);
        assert!(!phase_mark.is_alive());
    }
}
