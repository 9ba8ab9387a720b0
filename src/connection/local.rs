//! Commands on this host, with the semantics of every other connection.

use super::{Cmd, Collector, Connection, ConnectionError, Exit, Output, Stream, signal_name};
use crate::deadline::{Deadline, Stop};
use crate::process::{self, Child};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// This host. A command that exceeds its deadline is killed with its process group, and so is what
/// a finished command left behind in that group.
#[derive(Clone, Copy, Debug, Default)]
pub struct Local;

impl Connection for Local {
    fn peer(&self) -> String {
        "this host".into()
    }

    fn exec(&mut self, cmd: Cmd<'_>, deadline: &Deadline) -> Result<Output, ConnectionError> {
        let deadline = cmd.deadline(deadline);
        let Cmd { line, stdin, keep, on_output, .. } = cmd;
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(&line).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = process::spawn(shell).map_err(|error| self.broken(error.into()))?;
        let mut collector = Collector::new(keep, on_output);
        let mut pipes = child.pipes();
        let ended = pump(&mut child, &mut pipes, stdin, &mut collector, &deadline);
        if ended.is_err() {
            // Before its pipes close: end-of-file would tell it that its input is complete.
            child.kill();
        }
        let status = ended.map_err(|end| match end {
            End::Stop(stop) => ConnectionError::Stopped { line, peer: self.peer(), stop },
            End::TooMuch => Collector::too_much(line, self.peer()),
            End::Input(source) => {
                ConnectionError::Host { what: "cannot read what the command is to get".into(), source }
            }
            End::Broken(error) => self.broken(error.into()),
        })?;
        Ok(collector.finish(exit(status)))
    }
}

impl Local {
    fn broken(self, source: Box<dyn std::error::Error + Send + Sync>) -> ConnectionError {
        ConnectionError::Transport {
            peer: self.peer(),
            what: "cannot run a command".into(),
            source: Some(source),
        }
    }
}

type Pipes = (Option<ChildStdin>, Option<ChildStdout>, Option<ChildStderr>);

/// Why a command has no exit status.
enum End {
    Stop(Stop),
    TooMuch,
    Input(io::Error),
    Broken(anyhow::Error),
}

/// Moves bytes between the child's pipes and us until it is done.
fn pump(
    child: &mut Child,
    (input, stdout, stderr): &mut Pipes,
    stdin: Box<dyn Read + '_>,
    collector: &mut Collector<'_>,
    deadline: &Deadline,
) -> Result<ExitStatus, End> {
    let broken = |error: io::Error| End::Broken(error.into());
    for fd in
        [input.as_ref().map(AsFd::as_fd), stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)]
            .into_iter()
            .flatten()
    {
        rustix::io::ioctl_fionbio(fd, true).map_err(|errno| broken(errno.into()))?;
    }
    let mut source = BufReader::with_capacity(1 << 16, stdin);
    let mut buffer = vec![0; 1 << 16];
    while input.is_some() || stdout.is_some() || stderr.is_some() {
        deadline.check().map_err(End::Stop)?;
        feed(input, &mut source)?;
        drain(stdout, &mut buffer, |bytes| collector.take(Stream::Stdout, bytes)).map_err(broken)?;
        drain(stderr, &mut buffer, |bytes| collector.take(Stream::Stderr, bytes)).map_err(broken)?;
        if collector.overflowed() {
            return Err(End::TooMuch);
        }
        let mut fds = Vec::with_capacity(4);
        fds.extend(input.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        fds.extend(stdout.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(stderr.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let slice = deadline.slice(Duration::from_millis(100));
        let slice = Timespec::try_from(slice).map_err(|error| End::Broken(error.into()))?;
        if !fds.is_empty()
            && let Err(errno) = poll(&mut fds, Some(&slice))
            && errno != Errno::INTR
        {
            return Err(broken(errno.into()));
        }
    }
    child.wait(deadline).map_err(|error| match error.downcast::<Stop>() {
        Ok(stop) => End::Stop(stop),
        Err(error) => End::Broken(error),
    })
}

/// Writes what fits; closes the pipe at the end of the source, or when nobody reads it any more.
fn feed(input: &mut Option<ChildStdin>, source: &mut impl BufRead) -> Result<(), End> {
    let Some(pipe) = input else { return Ok(()) };
    let bytes = source.fill_buf().map_err(End::Input)?;
    if bytes.is_empty() {
        *input = None;
        return Ok(());
    }
    match pipe.write(bytes) {
        Ok(written) => source.consume(written),
        Err(error) if again(&error) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => *input = None,
        Err(error) => return Err(End::Broken(error.into())),
    }
    Ok(())
}

/// Takes what is there; closes the pipe at its end.
fn drain(pipe: &mut Option<impl Read>, buffer: &mut [u8], mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let Some(reader) = pipe else { return Ok(()) };
    match reader.read(buffer) {
        Ok(0) => *pipe = None,
        Ok(count) => take(&buffer[..count]),
        Err(error) if again(&error) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn exit(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal_name(signal.unwrap_or_default())),
    }
}
