//! What a scenario author holds: a connection with its deadline and blame settled.

use super::{Cmd, Connection, ConnectionError, Output};
use crate::deadline::{Deadline, Stop};
use crate::fault::{Fault, blame};
use crate::record::event::{Event, Events};
use anyhow::Result;
use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A connection borrowed for a while, with the deadline of whoever borrows it.
///
/// Each call is told as an [`Event::Command`], and its error carries blame: a command that failed
/// or hung is the machine's, a connection that broke is ours unless the caller knows better and
/// says so by a context of its own. An interruption carries no blame.
pub struct Session<'a> {
    connection: &'a mut dyn Connection,
    deadline: Deadline,
    events: Events,
    machine: Option<Machine<'a>>,
}

/// The other end, where that is a machine under test.
struct Machine<'a> {
    trouble: &'a AtomicBool,
    witness: &'a dyn Witness,
}

/// Who heard what else a machine had to say.
pub trait Witness {
    /// Its last words, with an introduction, for the end of a message.
    fn last_words(&self) -> String;
}

impl<'a> Session<'a> {
    /// Commands over `connection` end by `deadline` and are told to `events`.
    pub fn new(connection: &'a mut dyn Connection, deadline: Deadline, events: Events) -> Self {
        Self { connection, deadline, events, machine: None }
    }

    /// The same, but the other end is a machine under test: a connection that breaks is its doing,
    /// unless whoever runs it knows better. `trouble` is set when a call ends in an error;
    /// `witness` tells what else the machine said.
    #[must_use]
    pub fn with_machine(self, trouble: &'a AtomicBool, witness: &'a dyn Witness) -> Self {
        Self { machine: Some(Machine { trouble, witness }), ..self }
    }

    /// Runs a command line, or a [`Cmd`] with more to say, and checks its exit status.
    ///
    /// # Errors
    /// A [`ConnectionError`] with blame.
    pub fn run<'c>(&mut self, cmd: impl Into<Cmd<'c>>) -> Result<Output> {
        let cmd = cmd.into();
        let line = cmd.line.clone();
        self.tell(&line, |connection, deadline| connection.run(cmd, deadline), |out| out.exit.to_string())
    }

    /// Copies a local file to the machine; see [`Connection::upload`].
    ///
    /// # Errors
    /// A [`ConnectionError`] with blame.
    pub fn upload(&mut self, local: impl AsRef<Path>, remote: &str, mode: u32) -> Result<()> {
        let local = local.as_ref();
        self.tell(
            &format!("upload {} to {remote}", local.display()),
            |connection, deadline| connection.upload(local, remote, mode, deadline),
            |()| "done".into(),
        )
    }

    /// Copies a file of the machine here; see [`Connection::download`].
    ///
    /// # Errors
    /// A [`ConnectionError`] with blame.
    pub fn download(&mut self, remote: &str, local: impl AsRef<Path>) -> Result<()> {
        let local = local.as_ref();
        self.tell(
            &format!("download {remote} to {}", local.display()),
            |connection, deadline| connection.download(remote, local, deadline),
            |()| "done".into(),
        )
    }

    fn tell<T>(
        &mut self,
        what: &str,
        act: impl FnOnce(&mut dyn Connection, &Deadline) -> Result<T, ConnectionError>,
        status: impl FnOnce(&T) -> String,
    ) -> Result<T> {
        let start = Instant::now();
        let result = act(self.connection, &self.deadline);
        self.events.emit(Event::Command {
            connection: self.connection.peer(),
            command: what.to_owned(),
            status: result.as_ref().map_or_else(brief, status),
            seconds: start.elapsed().as_secs_f64(),
        });
        result.map_err(|error| match &self.machine {
            None => with_blame(error),
            Some(machine) => {
                machine.trouble.store(true, Ordering::SeqCst);
                machine.blame(error)
            }
        })
    }
}

impl Machine<'_> {
    fn blame(&self, error: ConnectionError) -> anyhow::Error {
        let broke = matches!(error, ConnectionError::Transport { .. });
        let hung = matches!(error, ConnectionError::Stopped { .. });
        let error = with_blame(error);
        if blame(&error).is_none() || !(broke || hung) {
            return error;
        }
        let what = if broke { "the machine broke the connection" } else { "the machine does not answer" };
        error.context(Fault::machine(format!("{what}; {}", self.witness.last_words())))
    }
}

/// How a call without result ended, in the words of an event.
fn brief(error: &ConnectionError) -> String {
    match error {
        ConnectionError::Failed { exit, .. } => exit.to_string(),
        ConnectionError::Stopped { stop, .. } => stop.to_string(),
        other => other.to_string(),
    }
}

fn with_blame(error: ConnectionError) -> anyhow::Error {
    let stop = error.source().and_then(|source| source.downcast_ref());
    if stop == Some(&Stop::Interrupted) {
        return error.into();
    }
    let fault = match &error {
        ConnectionError::Failed { .. } => Fault::machine("a command failed"),
        ConnectionError::Stopped { .. } => Fault::machine("a command hung"),
        ConnectionError::TooMuch { .. } => Fault::machine("a command printed too much"),
        ConnectionError::Transport { .. } => Fault::host("the connection broke"),
        ConnectionError::Host { .. } => Fault::host("this host could not do its part"),
    };
    anyhow::Error::new(error).context(fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Local;
    use crate::fault::Blame;
    use crate::record::event::Observer;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<Event>>>);

    impl Observer for Seen {
        fn observe(&self, event: &Event) {
            self.0.lock().expect("not poisoned").push(event.clone());
        }
    }

    fn with_session<T>(act: impl FnOnce(&mut Session<'_>) -> T) -> (T, Vec<Event>) {
        let seen = Seen::default();
        let mut local = Local;
        let deadline = Deadline::after(Duration::from_secs(30), "test");
        let result = act(&mut Session::new(&mut local, deadline, Events::to(seen.clone())));
        let events = seen.0.lock().expect("not poisoned").clone();
        (result, events)
    }

    #[test]
    fn a_command_reads_well_and_is_told() {
        let (size, events) =
            with_session(|local| local.run("echo 4096").map(|out| out.trimmed().parse::<u64>()));
        assert_eq!(size.expect("ran"), Ok(4096));
        let [Event::Command { connection, command, status, seconds }] = &events[..] else {
            panic!("one command event, got {events:?}");
        };
        assert_eq!((&connection[..], &command[..], &status[..]), ("this host", "echo 4096", "exit status 0"));
        assert!(*seconds > 0.0);
    }

    #[test]
    fn a_failure_is_the_machines_and_says_why() {
        let (result, events) = with_session(|local| local.run("echo no disk >&2; exit 4"));
        let error = result.expect_err("exit status 4");
        assert_eq!(blame(&error), Some(Blame::Machine));
        let text = format!("{error:#}");
        assert!(text.contains("a command failed: `echo") && text.contains("exit status 4"), "{text}");
        assert!(text.contains("no disk"), "{text}");
        assert!(matches!(&events[..], [Event::Command { status, .. }] if status == "exit status 4"));
    }

    #[test]
    fn a_hang_is_the_machines_and_names_the_limit() {
        let (result, _) =
            with_session(|local| local.run(Cmd::new("sleep 1000").timeout(Duration::from_millis(50))));
        let error = result.expect_err("hangs");
        assert_eq!(blame(&error), Some(Blame::Machine));
        assert_eq!(
            format!("{error:#}"),
            "a command hung: `sleep 1000` on this host did not end: \
             no answer within 0.05 s (the command's own timeout)"
        );
    }

    #[test]
    fn transport_and_local_files_are_ours() {
        let (result, _) = with_session(|local| local.upload("/no/such/file", "/tmp/x", 0o600));
        assert_eq!(blame(&result.expect_err("missing")), Some(Blame::Host));
        let broken = ConnectionError::Transport { peer: "vm".into(), what: "reset".into(), source: None };
        assert_eq!(blame(&with_blame(broken)), Some(Blame::Host));
    }

    #[test]
    fn an_interruption_blames_nobody_and_stays_visible() {
        let stopped =
            ConnectionError::Stopped { line: "true".into(), peer: "vm".into(), stop: Stop::Interrupted };
        let waiting = ConnectionError::Transport {
            peer: "vm".into(),
            what: "SSH is not usable".into(),
            source: Some(Box::new(Stop::Interrupted)),
        };
        for error in [stopped, waiting].map(with_blame) {
            assert_eq!(blame(&error), None);
            assert!(error.chain().any(|e| e.downcast_ref::<Stop>() == Some(&Stop::Interrupted)));
        }
    }
}
