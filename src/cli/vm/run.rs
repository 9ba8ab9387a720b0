//! `shakedown vm run`: a command on a machine of its own, as if it ran here.

use super::machine::Machine;
use crate::cli::{Verdict, value};
use anyhow::{Context, Result, ensure};
use shakedown::connection::{Cmd, Stream};
use shakedown::deadline::Deadline;
use shakedown::process;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

/// What docker and podman use as well: hardly any command has it.
pub(super) const OWN_ERROR: u8 = 125;
/// Without SSH all input goes in one piece, which the guest agent takes up to this size.
const MOST_INPUT: u64 = 8 << 20;

/// Run a command on a machine made for it; the machine is gone afterwards.
///
/// The machine is a fork of one that has booted, so it is there in a second. The command goes over the
/// guest agent, else the serial console: it needs no network, and its output comes at its end. With
/// --ssh it goes over SSH and its output comes as it is printed. Standard input is passed on, unless it
/// is a terminal: the machine of a command in a loop wants `</dev/null`.
///
/// What happened is in a run directory, as for any run; the ledger has no line of it.
#[derive(clap::Args)]
#[command(after_help = MORE)]
pub(super) struct Run {
    /// Over SSH
    #[arg(long)]
    ssh: bool,
    /// How long the machine may live
    #[arg(long, value_name = "TIME", value_parser = value::limit, default_value = "10m")]
    timeout: Duration,
    #[command(flatten)]
    machine: Machine,
    /// A program and its arguments; or one word, which is a line for /bin/sh
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

const MORE: &str = "\
Examples:
  shakedown vm run -- uname -a
  shakedown vm run --disk 1500M --disk 1500M -- 'mkfs.ext4 -q /dev/vda && lsblk -f'
  shakedown vm run --cold --firmware uefi -- test -d /sys/firmware/efi
  tar c src | shakedown vm run --ssh -- 'tar x && make -C src'

Exit status:
  that of the command, or 128 and the number of the signal that ended it
  125  an error of ours: no image, no machine, no time left
  2    wrong usage
  130  interrupted";

impl Run {
    pub(super) fn run(self) -> Result<Verdict> {
        let line = line(&self.command);
        let input = Input::new(&Deadline::after(self.timeout, "--timeout"), self.ssh)?;
        let status = self.machine.with("vm-run", self.timeout, |vm| {
            let watch = vm.watch()?;
            let mut problem = None;
            let show = |stream, bytes: &[u8]| {
                if problem.is_none()
                    && let Err(error) = print(stream, bytes)
                {
                    problem = Some(error);
                    // Nobody is left for whom the command could go on.
                    watch.kill();
                }
            };
            let cmd = Cmd::new(line).allow_failure().discard_stdout().stdin_from(input).on_output(show);
            let mut session = if self.ssh { vm.ssh()? } else { vm.shell()? };
            let result = session.run(cmd);
            match problem {
                Some(error) => Err(error).context("cannot pass on the output of the command"),
                None => Ok(result?.exit.status()),
            }
        })?;
        Ok(Verdict::Status(u8::try_from(status).unwrap_or(OWN_ERROR)))
    }
}

/// One word is a line of shell already; several are a program and its arguments.
fn line(words: &[String]) -> String {
    match words {
        [line] => line.clone(),
        words => words.iter().map(|word| process::quote(word)).collect::<Vec<_>>().join(" "),
    }
}

fn print(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
        }
        Stream::Stderr => io::stderr().lock().write_all(bytes),
    }
}

/// Our standard input, for the command.
enum Input {
    /// Read as the command takes it.
    Live(File),
    /// All of it, or none.
    Whole(io::Cursor<Vec<u8>>),
}

impl Input {
    /// Waits for the end of the input where the command's connection takes it in one piece only.
    fn new(deadline: &Deadline, live: bool) -> Result<Self> {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Ok(Self::Whole(io::Cursor::default()));
        }
        // Not through the standard library's buffer, of which poll(2) knows nothing.
        let mut file = File::from(stdin.as_fd().try_clone_to_owned().context("cannot use standard input")?);
        if live {
            return Ok(Self::Live(file));
        }
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 16];
        loop {
            deadline.check().context("standard input has no end; give `</dev/null`, or use --ssh")?;
            if process::wait_readable(&file, deadline.slice(Duration::from_millis(200)))? {
                match file.read(&mut chunk).context("cannot read standard input")? {
                    0 => return Ok(Self::Whole(io::Cursor::new(bytes))),
                    count => bytes.extend_from_slice(&chunk[..count]),
                }
            }
            ensure!(bytes.len() as u64 <= MOST_INPUT, "standard input is larger than 8 MiB: use --ssh");
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Whole(bytes) => bytes.read(buffer),
            Self::Live(file) => match process::wait_readable(&*file, Duration::ZERO) {
                Ok(true) => file.read(buffer),
                Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                Err(error) => Err(io::Error::other(error)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_is_a_line_and_several_are_a_program() {
        let line = |words: &[&str]| line(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(line(&["ls | wc -l"]), "ls | wc -l");
        assert_eq!(line(&["grep", "it's", "$HOME"]), r"grep 'it'\''s' '$HOME'");
    }
}
