//! Children that cannot outlive us, and Ctrl-C.
//!
//! Every child is its own process group, dies with this process by `PR_SET_PDEATHSIG`, and is
//! killed with its group and reaped on drop and on Ctrl-C. Does not know what the children do.

mod other;

pub use other::Other;

use crate::deadline::{Deadline, Stop};
use crate::fault::Fault;
use anyhow::{Context, Result};
use once_cell::sync::OnceCell;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Who signals twice on purpose takes longer than this. coreutils' `timeout` signals its child and
/// at once the group, which is the child again.
const IMPATIENCE: Duration = Duration::from_millis(500);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// What a second signal, which runs no destructors, must put in order.
static LAST: Mutex<Option<fn()>> = Mutex::new(None);
/// Process groups to kill on Ctrl-C.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// True once Ctrl-C or SIGTERM arrived; every wait then ends.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// From now on Ctrl-C, SIGTERM and SIGHUP set [`interrupted`] and kill all children; waits end and
/// destructors run. A second signal exits at once with status 130, unless it follows so closely that
/// it belongs to the first.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn handle_signals() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    static DONE: OnceCell<()> = OnceCell::new();
    DONE.get_or_try_init(|| -> Result<()> {
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
            .context(Fault::host("cannot install signal handlers"))?;
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let mut first: Option<Instant> = None;
                for _ in signals.forever() {
                    INTERRUPTED.store(true, Ordering::SeqCst);
                    if first.get_or_insert_with(Instant::now).elapsed() >= IMPATIENCE {
                        kill_all();
                        if let Some(last) = *lock(&LAST) {
                            last();
                        }
                        std::process::exit(130);
                    }
                    kill_all();
                }
            })
            .context(Fault::host("cannot start the signal thread"))?;
        Ok(())
    })?;
    Ok(())
}

/// Has `last` run before a second signal ends this process on the spot.
pub fn before_sudden_exit(last: fn()) {
    *lock(&LAST) = Some(last);
}

fn kill_all() {
    for group in lock(&GROUPS).iter() {
        let _ = kill_process_group(*group, Signal::KILL);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running child and its process group. Dropping it kills the group and reaps the child.
#[derive(Debug)]
pub struct Child {
    inner: std::process::Child,
    pid: Pid,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

type Request = (Command, mpsc::Sender<io::Result<std::process::Child>>);

/// Starts `command` in a process group of its own, tied to the life of this process.
///
/// # Errors
/// When the program cannot be started; the message names it.
pub fn spawn(mut command: Command) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.process_group(0);
    let parent = rustix::process::getpid();
    #[allow(unsafe_code)]
    // SAFETY: the closure makes two system calls, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::from(rustix::io::Errno::SRCH));
            }
            Ok(())
        });
    }
    let child =
        spawner()?.spawn(command).with_context(|| Fault::host(format!("cannot start `{program}`")))?;
    let pid = Pid::from_child(&child);
    let mut groups = lock(&GROUPS);
    groups.push(pid);
    drop(groups);
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            let mut child = child;
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = child.wait();
            lock(&GROUPS).retain(|group| *group != pid);
            return Err(error).with_context(|| Fault::host(format!("cannot watch `{program}`")));
        }
    };
    let child = Child { inner: child, pid, pidfd, status: None };
    if interrupted() {
        // The signal came between the start and the registration above.
        let _ = kill_process_group(pid, Signal::KILL);
    }
    Ok(child)
}

/// The death signal is tied to the *thread* that forked, so one thread that never ends forks all.
struct Spawner(Mutex<mpsc::Sender<Request>>);

fn spawner() -> Result<&'static Spawner> {
    static SPAWNER: OnceCell<Spawner> = OnceCell::new();
    SPAWNER.get_or_try_init(|| {
        let (requests, inbox) = mpsc::channel::<Request>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in inbox {
                    let _ = answer.send(command.spawn());
                }
            })
            .context(Fault::host("cannot start the spawner thread"))?;
        Ok(Spawner(Mutex::new(requests)))
    })
}

impl Spawner {
    fn spawn(&self, command: Command) -> io::Result<std::process::Child> {
        let (answer, result) = mpsc::channel();
        lock(&self.0).send((command, answer)).map_err(|_| io::Error::other("the spawner thread is gone"))?;
        result.recv().map_err(|_| io::Error::other("the spawner thread is gone"))?
    }
}

impl Child {
    /// The process id, also of its process group.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Becomes readable when the child ends: for waits that race something else.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// The pipes that were asked for, as `std` has them.
    pub fn pipes(
        &mut self,
    ) -> (
        Option<std::process::ChildStdin>,
        Option<std::process::ChildStdout>,
        Option<std::process::ChildStderr>,
    ) {
        (self.inner.stdin.take(), self.inner.stdout.take(), self.inner.stderr.take())
    }

    /// How it ended, or `None` while it runs.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() && wait_readable(&self.pidfd, Duration::ZERO)? {
            self.kill();
        }
        Ok(self.status)
    }

    /// As [`Self::try_wait`], but what the child left in its group is let alone: for a shell whose
    /// background processes are meant to stay.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn try_wait_alone(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() && wait_readable(&self.pidfd, Duration::ZERO)? {
            let mut groups = lock(&GROUPS);
            groups.retain(|group| *group != self.pid);
            drop(groups);
            self.status = self.inner.wait().ok();
        }
        Ok(self.status)
    }

    /// Waits until it ended or the deadline passed; it is left running in the latter case.
    ///
    /// # Errors
    /// [`Stop`] in the chain when the time is up or the user interrupted.
    pub fn wait(&mut self, deadline: &Deadline) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            deadline.check()?;
            // Short slices only so that Ctrl-C is seen; the end of the child wakes us at once.
            wait_readable(&self.pidfd, deadline.slice(Duration::from_millis(200)))?;
        }
    }

    /// Kills the whole group and reaps the child; what the child left behind goes with it.
    pub fn kill(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            // Before the reaping: an unreaped leader keeps the group's number from being reused.
            let mut groups = lock(&GROUPS);
            let _ = kill_process_group(self.pid, Signal::KILL);
            groups.retain(|group| *group != self.pid);
            drop(groups);
            self.status = self.inner.wait().ok();
        }
        self.status
    }

    /// Sends `signal` to the whole group.
    pub fn signal(&self, signal: Signal) {
        if self.status.is_none() {
            let _ = kill_process_group(self.pid, signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `fd` is readable or `timeout` passed; false in the latter case.
///
/// # Errors
/// When `poll` fails otherwise than by a signal.
pub fn wait_readable(fd: impl AsFd, timeout: Duration) -> Result<bool> {
    let timespec = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    match poll(&mut fds, Some(&timespec)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error).context(Fault::host("poll failed")),
    }
}

/// How a child ended, as a person says it.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".into(),
    }
}

/// Runs a short host command to its end and gives its standard output as text.
///
/// Standard input is empty. Standard error is kept for the message.
///
/// # Errors
/// A host [`Fault`] that names the program and carries the last lines of its standard error.
pub fn output(mut command: Command, deadline: &Deadline) -> Result<String> {
    let line = display(&command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command)?;
    let (_, stdout, stderr) = child.pipes();
    let out = drain(stdout);
    let err = drain(stderr);
    let status = child.wait(deadline).with_context(|| Fault::host(format!("`{line}` did not end")))?;
    let out = out.join().unwrap_or_default();
    let err = err.join().unwrap_or_default();
    if !status.success() {
        let err = String::from_utf8_lossy(&err);
        let last: Vec<_> = err.trim_end().lines().rev().take(5).collect();
        let last: Vec<_> = last.into_iter().rev().collect();
        return Err(Fault::host(format!(
            "`{line}` failed with {}\n  {}",
            describe(status),
            last.join("\n  ")
        ))
        .into());
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// A command as one would type it, for messages and evidence.
pub fn display(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|arg| quote(&arg.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Quotes one word for a POSIX shell, only where it needs it.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs a long host command: each line of its output goes to `log` and to `on_line` as it comes.
///
/// Standard output and standard error are one stream. A command that is silent for `stall` is
/// ended. Lines end at `\n` or `\r`, so that progress bars are lines too.
///
/// # Errors
/// A host [`Fault`] with the last lines when the command fails, stalls or the time is up.
pub fn stream(
    mut command: Command,
    log: &Path,
    stall: Duration,
    deadline: &Deadline,
    mut on_line: impl FnMut(&str),
) -> Result<()> {
    let line = display(&command);
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| Fault::host(format!("cannot write {}", log.display())))?;
    writeln!(file, "$ {line}").with_context(|| Fault::host(format!("cannot write {}", log.display())))?;
    let (reader, writer) = io::pipe().context(Fault::host("cannot make a pipe"))?;
    let errors = writer.try_clone().context(Fault::host("cannot make a pipe"))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(errors);
    let mut child = spawn(command)?;
    let (lines, inbox) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        while let Some(text) = next_line(&mut reader) {
            if lines.send(text).is_err() {
                break;
            }
        }
    });
    let mut last = VecDeque::with_capacity(20);
    let mut heard = Instant::now();
    let problem = loop {
        match inbox.recv_timeout(deadline.slice(Duration::from_millis(100))) {
            Ok(text) => {
                heard = Instant::now();
                let _ = writeln!(file, "{text}");
                if !text.trim().is_empty() {
                    if last.len() == 20 {
                        last.pop_front();
                    }
                    last.push_back(text.clone());
                    on_line(&text);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break None,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if child.try_wait()?.is_some() {
                    // A grandchild may hold the pipe; what is buffered has been read by now.
                    break None;
                }
                if let Err(stop) = deadline.check() {
                    break Some(stop);
                }
                if heard.elapsed() > stall {
                    break Some(Stop::Expired { owner: "no output".into(), budget: stall });
                }
            }
        }
    };
    let (what, source) = match problem {
        None => {
            let status = child.wait(deadline)?;
            if status.success() {
                return Ok(());
            }
            (format!("failed with {}", describe(status)), None)
        }
        Some(stop) => {
            child.kill();
            ("was ended".to_owned(), Some(stop))
        }
    };
    let tail: Vec<String> = last.into();
    let fault = Fault::host(format!(
        "`{}` {what}; its last lines:\n  {}\nAll output: {}",
        beginning(&line),
        tail.join("\n  "),
        log.display()
    ));
    Err(match source {
        Some(stop) => fault.because(stop).into(),
        None => fault.into(),
    })
}

/// Enough of a command line to tell which command it is; all of it is in the log.
fn beginning(line: &str) -> String {
    const LONGEST: usize = 200;
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line.to_owned(),
    }
}

fn next_line(reader: &mut impl BufRead) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return None,
        };
        if available.is_empty() {
            return (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned());
        }
        let end = available.iter().position(|b| matches!(b, b'\n' | b'\r'));
        bytes.extend_from_slice(&available[..end.unwrap_or(available.len())]);
        let used = end.map_or(available.len(), |e| e + 1);
        reader.consume(used);
        if end.is_some() {
            return Some(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds), "test")
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_long_command_is_told_by_its_beginning() {
        assert_eq!(beginning("true"), "true");
        let long = "ü".repeat(300);
        assert_eq!(beginning(&long), format!("{} ...", "ü".repeat(200)));
    }

    #[test]
    fn output_is_checked() {
        assert_eq!(output(sh("echo hi"), &deadline(10)).expect("runs"), "hi\n");
        let error = output(sh("echo broken >&2; exit 3"), &deadline(10)).expect_err("fails");
        let text = format!("{error:#}");
        assert!(text.contains("exit status 3") && text.contains("broken"), "{text}");
        let error = output(Command::new("no-such-tool"), &deadline(10)).expect_err("missing");
        assert!(format!("{error:#}").contains("no-such-tool"));
    }

    #[test]
    fn a_dropped_child_takes_its_group_along() {
        let mut command = sh("sleep 1000 & echo $!; wait");
        command.stdout(Stdio::piped());
        let mut child = spawn(command).expect("starts");
        let (_, stdout, _) = child.pipes();
        let mut pid = String::new();
        BufReader::new(stdout.expect("piped")).read_line(&mut pid).expect("reads");
        let pid: i32 = pid.trim().parse().expect("a pid");
        drop(child);
        let end = deadline(10);
        let alive = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z"));
        while alive() {
            end.check().expect("the grandchild is gone in time");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let child = std::thread::spawn(|| spawn(sh("sleep 1000"))).join().expect("joins");
        let mut child = child.expect("starts");
        let error = child.wait(&Deadline::after(Duration::from_millis(100), "test"));
        assert!(error.is_err(), "still running, although its asking thread has ended");
    }

    #[test]
    fn a_stalled_command_is_ended_with_its_last_lines() {
        let dir = tempfile::tempdir().expect("temp dir");
        let log = dir.path().join("log");
        let error =
            stream(sh("echo working; sleep 1000"), &log, Duration::from_millis(200), &deadline(30), |_| {})
                .expect_err("stalls");
        let text = format!("{error:#}");
        assert!(text.contains("working") && text.contains("no output"), "{text}");
    }

    #[test]
    fn streamed_lines_end_at_carriage_returns_too() {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut lines = Vec::new();
        stream(
            sh(r"printf '10%%\r20%%\nend'"),
            &dir.path().join("log"),
            Duration::from_secs(10),
            &deadline(10),
            |l| {
                lines.push(l.to_owned());
            },
        )
        .expect("runs");
        assert_eq!(lines, ["10%", "20%", "end"]);
    }

    #[test]
    fn words_are_quoted_only_where_needed() {
        assert_eq!(quote("a=b,c"), "a=b,c");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
