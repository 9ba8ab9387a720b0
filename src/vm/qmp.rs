//! QMP, QEMU's control protocol, with a deadline on every exchange.
//!
//! Commands and events are `qapi`'s types. The exchange itself is ours because `qapi`'s blocking
//! client waits for ever, and a wait here must end with its deadline or with the machine.
//! Protocol: <https://www.qemu.org/docs/master/interop/qmp-spec.html>.

use crate::connection::json_lines::{JsonLines, LinesError};
use crate::deadline::{Deadline, Stop};
use qapi::qmp;
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A control connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: JsonLines,
    disk_error: Option<String>,
    /// The last that was heard of the guest: it restarted.
    restarted: bool,
    next_id: u64,
    version: String,
}

/// Why a QMP command has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// QEMU closed the connection: it ended.
    #[error("QEMU ended")]
    Closed,
    /// QEMU refused the command.
    #[error("QEMU refused `{command}`: {message}")]
    Refused {
        /// The command's name.
        command: String,
        /// QEMU's words.
        message: String,
    },
    /// QEMU said something that is not QMP.
    #[error("QEMU's answer to `{command}` is not understood: {what}")]
    Protocol {
        /// The command's name.
        command: String,
        /// What is wrong with the answer.
        what: String,
    },
    /// The time was up first.
    #[error("QEMU did not answer `{command}`: {stop}")]
    Stopped {
        /// The command's name.
        command: String,
        /// Whose limit it was.
        #[source]
        stop: Stop,
    },
    /// The socket broke.
    #[error("the QMP socket broke")]
    Io(#[from] io::Error),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        greeting: Greeting,
    },
    Answer {
        id: u64,
        #[serde(rename = "return", default)]
        result: Option<Value>,
        #[serde(default)]
        error: Option<Refusal>,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
}

#[derive(Deserialize)]
struct Greeting {
    version: qmp::VersionInfo,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Waits for QEMU's greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// [`QmpError::Closed`] when QEMU ended first: its standard error says why.
    pub fn open(stream: UnixStream, deadline: &Deadline) -> Result<Self, QmpError> {
        let lines = JsonLines::new(stream)?;
        let mut qmp = Self { lines, disk_error: None, restarted: false, next_id: 1, version: String::new() };
        loop {
            match qmp.message("greeting", deadline)? {
                Message::Greeting { greeting: Greeting { version } } => {
                    let qmp::VersionInfo { qemu, package } = version;
                    qmp.version = format!(
                        "QEMU emulator version {}.{}.{} ({package})",
                        qemu.major, qemu.minor, qemu.micro
                    );
                    break;
                }
                Message::Event { event, data } => qmp.note(&event, &data),
                Message::Answer { .. } => {}
            }
        }
        qmp.execute(&qmp::qmp_capabilities { enable: None }, deadline)?;
        Ok(qmp)
    }

    /// QEMU's version, as the first line of `--version` has it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs one command and waits for its result.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn execute<C: qapi::Command>(&mut self, command: &C, deadline: &Deadline) -> Result<C::Ok, QmpError> {
        let arguments = serde_json::to_value(command).map_err(|e| protocol(C::NAME, e))?;
        let result = self.call(C::NAME, arguments, deadline)?;
        serde_json::from_value(result).map_err(|e| protocol(C::NAME, e))
    }

    /// Runs a command of the human monitor, for what QMP has no command.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn monitor(&mut self, line: &str, deadline: &Deadline) -> Result<String, QmpError> {
        let command = qmp::human_monitor_command { cpu_index: None, command_line: line.to_owned() };
        self.execute(&command, deadline)
    }

    /// The port on this host that leads to port `guest` of the machine; the kernel chose it.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn forwarded_port(&mut self, guest: u16, deadline: &Deadline) -> Result<Option<u16>, QmpError> {
        self.monitor("info usernet", deadline).map(|table| forwarded_port(&table, guest))
    }

    /// The first error that QEMU had with a file of the machine's disks, in its words: the guest saw
    /// a broken disk where this host's is full.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub fn disk_error(&mut self, deadline: &Deadline) -> Result<Option<&str>, QmpError> {
        // Events come before the answer to what is asked after them.
        self.execute(&qmp::query_status {}, deadline)?;
        Ok(self.disk_error.as_deref())
    }

    /// Whether the guest asked for a restart, which ended QEMU. Of a QEMU that has ended.
    pub fn restarted(&mut self) -> bool {
        let rest = Deadline::after(Duration::from_secs(1), "the last words of QEMU");
        while let Ok(message) = self.message("events", &rest) {
            if let Message::Event { event, data } = message {
                self.note(&event, &data);
            }
        }
        self.restarted
    }

    fn note(&mut self, event: &str, data: &Value) {
        if event == "SHUTDOWN" {
            self.restarted = data["reason"] == "guest-reset";
        }
        if event == "BLOCK_IO_ERROR" && self.disk_error.is_none() {
            let field = |name: &str| data[name].as_str().unwrap_or("?");
            self.disk_error =
                Some(format!("{} of {}: {}", field("operation"), field("node-name"), field("reason")));
        }
    }

    fn call(&mut self, name: &str, arguments: Value, deadline: &Deadline) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = serde_json::json!({ "execute": name, "arguments": arguments, "id": id });
        self.lines.send(&request, deadline).map_err(|error| broken(name, error))?;
        loop {
            match self.message(name, deadline)? {
                Message::Event { event, data } => self.note(&event, &data),
                // An answer to a command that was given up on earlier is not ours.
                Message::Answer { id: of, result, error } if of == id => {
                    return match (result, error) {
                        (_, Some(refusal)) => {
                            Err(QmpError::Refused { command: name.to_owned(), message: refusal.desc })
                        }
                        (result, None) => Ok(result.unwrap_or_default()),
                    };
                }
                Message::Answer { .. } | Message::Greeting { .. } => {}
            }
        }
    }

    fn message(&mut self, name: &str, deadline: &Deadline) -> Result<Message, QmpError> {
        let value = self.lines.receive(deadline).map_err(|error| broken(name, error))?;
        serde_json::from_value(value).map_err(|error| protocol(name, error))
    }
}

fn broken(command: &str, error: LinesError) -> QmpError {
    match error {
        LinesError::Closed => QmpError::Closed,
        LinesError::NotJson(error) => protocol(command, error),
        LinesError::Stopped(stop) => QmpError::Stopped { command: command.to_owned(), stop },
        LinesError::Io(error) => QmpError::Io(error),
    }
}

fn protocol(command: &str, what: impl ToString) -> QmpError {
    QmpError::Protocol { command: command.to_owned(), what: what.to_string() }
}

/// Finds the forward to the guest's port in the human monitor's `info usernet`.
fn forwarded_port(table: &str, guest: u16) -> Option<u16> {
    let guest = guest.to_string();
    table.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["TCP[HOST_FORWARD]", _, "127.0.0.1", port, _, to, ..] if to == guest => port.parse().ok(),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}
"#;

    fn deadline() -> Deadline {
        Deadline::after(Duration::from_secs(10), "test")
    }

    /// Plays QEMU's part: for each line received, the next of `answers` goes out as it is.
    fn peer(answers: &'static [&'static str]) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        std::thread::spawn(move || {
            let mut theirs = theirs;
            let mut reader = io::BufReader::new(theirs.try_clone().expect("clone"));
            let mut line = String::new();
            for answer in answers {
                if theirs.write_all(answer.as_bytes()).is_err() {
                    return;
                }
                line.clear();
                if matches!(io::BufRead::read_line(&mut reader, &mut line), Ok(0) | Err(_)) {
                    return;
                }
            }
        });
        ours
    }

    #[test]
    fn events_between_command_and_answer_are_kept() {
        let stream = peer(&[
            GREETING,
            "{\"return\": {}, \"id\": 1}\r\n",
            "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"BLOCK_IO_ERROR\", \"data\": {\"node-name\": \"d0\", \"operation\": \"write\", \"reason\": \"No space left on device\"}}\r\n{\"return\": \"hi\\r\\n\", \"id\": 2}\r\n",
            "{\"return\": {\"running\": true, \"singlestep\": false, \"status\": \"running\"}, \"id\": 3}\r\n",
        ]);
        let mut qmp = Qmp::open(stream, &deadline()).expect("opens");
        assert_eq!(qmp.version(), "QEMU emulator version 7.2.22 (Debian)");
        assert_eq!(qmp.monitor("info name", &deadline()).expect("answers"), "hi\r\n");
        let error = qmp.disk_error(&deadline()).expect("answers");
        assert_eq!(error, Some("write of d0: No space left on device"));
    }

    #[test]
    fn the_forwarded_port_is_found_in_qemus_table() {
        let table = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                     TCP[ESTABLISHED]   21       127.0.0.1 39123       10.0.2.15    22     0     0\r\n  \
                     TCP[HOST_FORWARD]  17       127.0.0.1 39123       10.0.2.15    22     0     0\r\n";
        assert_eq!(forwarded_port(table, 22), Some(39123));
        assert_eq!(forwarded_port("Hub -1 (net0):\r\n", 22), None);
    }

    #[test]
    fn a_refusal_has_qemus_words() {
        let stream = peer(&[
            GREETING,
            "{\"return\": {}, \"id\": 1}\n",
            "{\"id\": 2, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such device\"}}\n",
        ]);
        let mut qmp = Qmp::open(stream, &deadline()).expect("opens");
        let error = qmp.monitor("x", &deadline()).expect_err("refused");
        assert_eq!(error.to_string(), "QEMU refused `human-monitor-command`: no such device");
    }

    #[test]
    fn a_qemu_that_ends_is_not_waited_for() {
        let error = Qmp::open(peer(&[]), &deadline()).expect_err("closed");
        assert!(matches!(error, QmpError::Closed), "{error}");
    }

    #[test]
    fn a_silent_qemu_costs_the_deadline_and_no_more() {
        let (ours, _theirs) = UnixStream::pair().expect("socketpair");
        let error = Qmp::open(ours, &Deadline::after(Duration::from_millis(20), "test")).expect_err("silent");
        assert!(matches!(error, QmpError::Stopped { .. }), "{error}");
    }
}
