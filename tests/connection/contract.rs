//! What every connection promises, asked of each.

use crate::sshd::{Sshd, ample};
use shakedown::connection::{Cmd, Connection, ConnectionError, Exit, Local, Stream};
use shakedown::deadline::Deadline;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

fn everywhere(check: impl Fn(&mut dyn Connection)) {
    println!("over this host:");
    check(&mut Local);
    println!("over SSH:");
    let sshd = Sshd::start();
    check(&mut sshd.open());
    assert_eq!(sshd.accepted(), 1, "one session serves it all");
}

fn run(connection: &mut dyn Connection, cmd: impl Into<Cmd<'static>>) -> shakedown::connection::Output {
    connection.run(cmd.into(), &ample()).expect("runs")
}

/// Bytes in which any loss, repetition or exchange shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("exists").permissions().mode() & 0o7777
}

#[test]
fn bytes_are_exact() {
    everywhere(|connection| {
        let bytes: Vec<u8> = (0..=255).chain([0, b'\n', 1, b'\r', b'\n']).collect();
        assert_eq!(run(connection, Cmd::new("cat").stdin(bytes.clone())).stdout, bytes);
        let out = run(connection, "printf out; printf err >&2");
        assert_eq!((&out.stdout[..], &out.stderr[..]), (&b"out"[..], &b"err"[..]));
        assert_eq!(run(connection, "printf '\\001shakedown:7\\n'").stdout, b"\x01shakedown:7\n");
        assert!(run(connection, "true").stdout.is_empty());
    });
}

#[test]
fn the_line_is_for_a_posix_shell_as_it_is() {
    everywhere(|connection| {
        let out = run(connection, "x='it'\\''s \"$HOME\"'\necho \"$x\" # comment\ncat <<'END'\n$x\nEND\n");
        assert_eq!(out.text(), "it's \"$HOME\"\n$x\n");
        let out = run(connection, Cmd::new("if then").allow_failure());
        assert_eq!(out.exit, Exit::Code(2), "a syntax error is the command's");
        assert!(!out.stderr.is_empty());
    });
}

#[test]
fn large_output_and_input_do_not_block_each_other() {
    everywhere(|connection| {
        let bytes = pattern(5 << 20);
        let out = run(connection, Cmd::new("cat").stdin(bytes.clone()));
        assert!(out.stdout == bytes, "{} bytes came back", out.stdout.len());
        let out = run(connection, "head -c 5242880 /dev/zero; head -c 5242880 /dev/zero >&2");
        assert_eq!((out.stdout.len(), out.stderr.len()), (5 << 20, 5 << 20));
    });
}

#[test]
fn both_streams_flow_at_once() {
    everywhere(|connection| {
        let out = run(connection, "i=0; while [ $i -lt 2000 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done");
        let expected = |c: char| (0..2000).map(|i| format!("{c}{i}\n")).collect::<String>();
        assert_eq!(out.text(), expected('o'));
        assert_eq!(String::from_utf8_lossy(&out.stderr), expected('e'));
    });
}

#[test]
fn output_is_seen_as_it_comes() {
    everywhere(|connection| {
        let dir = tempfile::tempdir().expect("temp dir");
        let flag = dir.path().join("flag");
        // The command ends only once its first line was seen here.
        let line = format!("echo first; while [ ! -e {} ]; do sleep 0.01; done; echo second", flag.display());
        let mut seen = Vec::new();
        let cmd = Cmd::new(line).on_output(|stream, bytes| {
            assert_eq!(stream, Stream::Stdout);
            seen.extend_from_slice(bytes);
            fs::write(&flag, "").expect("written");
        });
        let out = connection.run(cmd, &ample()).expect("runs");
        assert_eq!(out.text(), "first\nsecond\n");
        assert_eq!(seen, out.stdout);
    });
}

#[test]
fn exit_status_and_signal_are_told_apart() {
    everywhere(|connection| {
        for code in [1, 2, 126, 127, 137, 255] {
            let out = run(connection, Cmd::new(format!("exit {code}")).allow_failure());
            assert_eq!(out.exit, Exit::Code(code));
        }
        for signal in ["KILL", "TERM", "HUP", "USR1"] {
            let out = run(connection, Cmd::new(format!("kill -{signal} $$; sleep 1000")).allow_failure());
            assert_eq!(out.exit, Exit::Signal(signal.into()));
        }
        let error = connection.run("echo why >&2; exit 3".into(), &ample()).expect_err("fails");
        assert!(matches!(&error, ConnectionError::Failed { exit: Exit::Code(3), .. }), "{error}");
        assert!(error.to_string().contains("why"), "{error}");
    });
}

#[test]
fn input_that_nobody_reads_is_no_error() {
    everywhere(|connection| {
        assert!(run(connection, Cmd::new("true").stdin(pattern(5 << 20))).stdout.is_empty());
        assert_eq!(run(connection, Cmd::new("head -c 3").stdin(pattern(5 << 20))).stdout, &pattern(3)[..]);
        assert_eq!(run(connection, "cat; echo end").text(), "end\n", "no input is end-of-file at once");
    });
}

#[test]
fn a_command_may_close_its_output_and_read_on() {
    everywhere(|connection| {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("copy");
        let bytes = pattern(3 << 20);
        run(connection, Cmd::new(format!("exec >&- 2>&-; cat >{}", path.display())).stdin(bytes.clone()));
        assert!(fs::read(path).expect("copied") == bytes);
    });
}

#[test]
fn a_hanging_command_is_killed_with_its_children() {
    everywhere(|connection| {
        let mut said = Vec::new();
        let cmd = Cmd::new("trap '' TERM HUP; sleep 1000 & echo $!; echo $$; wait; sleep 1000")
            .stdin(pattern(5 << 20))
            .timeout(Duration::from_secs(2))
            .on_output(|_, bytes| said.extend_from_slice(bytes));
        let error = connection.exec(cmd, &ample()).expect_err("hangs");
        assert!(matches!(error, ConnectionError::Stopped { .. }), "{error}");
        let said = String::from_utf8(said).expect("text");
        assert_eq!(said.lines().count(), 2, "it ran: {said:?}");
        assert_dead(&said);
        assert_eq!(run(connection, "echo usable").text(), "usable\n");
    });
}

#[test]
fn an_endless_talker_is_killed() {
    everywhere(|connection| {
        let mut pid = Vec::new();
        let cmd = Cmd::new("echo $$; exec yes").timeout(Duration::from_secs(1)).discard_stdout().on_output(
            |_, bytes| {
                if pid.is_empty() {
                    pid = bytes.iter().copied().take_while(u8::is_ascii_digit).collect();
                }
            },
        );
        let error = connection.exec(cmd, &ample()).expect_err("never ends");
        assert!(matches!(error, ConnectionError::Stopped { .. }), "{error}");
        assert_dead(&String::from_utf8(pid).expect("text"));
        assert_eq!(run(connection, "echo usable").text(), "usable\n");
    });
}

#[test]
fn who_prints_without_end_is_killed_before_memory_is_full() {
    everywhere(|connection| {
        for to in ["", " >&2"] {
            let dir = tempfile::tempdir().expect("temp dir");
            let pid = dir.path().join("pid");
            let line = format!("echo $$ >{}; exec yes{to}", pid.display());
            let error = connection.run(line.into(), &ample()).expect_err("prints without end");
            assert!(matches!(error, ConnectionError::TooMuch { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("more than 64 MiB") && text.contains("`Cmd::on_output`"), "{text}");
            assert_dead(&fs::read_to_string(pid).expect("it ran"));
            assert_eq!(run(connection, "echo usable").text(), "usable\n");
        }
    });
}

fn assert_dead(pids: &str) {
    let end = ample();
    for pid in pids.lines() {
        let alive =
            || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
        while alive() {
            end.check().unwrap_or_else(|_| panic!("process {pid} outlived its deadline"));
            std::thread::yield_now();
        }
    }
}

#[test]
fn an_input_that_fails_ends_the_command() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("bad sector"))
        }
    }
    everywhere(|connection| {
        let dir = tempfile::tempdir().expect("temp dir");
        let done = dir.path().join("done");
        let cmd =
            Cmd::new(format!("cat && touch {}", done.display())).stdin_from(pattern(1 << 20).chain(Broken));
        let error = connection.run(cmd, &ample()).expect_err("cannot be whole");
        assert!(matches!(error, ConnectionError::Host { .. }), "{error}");
        assert!(!done.exists(), "`cat` must not take half of its input for all of it");
        assert_eq!(run(connection, "echo usable").text(), "usable\n");
    });
}

trait Chain: Sized {
    fn chain<R: Read>(self, then: R) -> io::Chain<io::Cursor<Vec<u8>>, R>;
}

impl Chain for Vec<u8> {
    fn chain<R: Read>(self, then: R) -> io::Chain<io::Cursor<Vec<u8>>, R> {
        io::Cursor::new(self).chain(then)
    }
}

#[test]
fn an_expired_deadline_runs_nothing() {
    everywhere(|connection| {
        let error =
            connection.run("echo".into(), &Deadline::after(Duration::ZERO, "test")).expect_err("late");
        assert!(matches!(error, ConnectionError::Stopped { .. }), "{error}");
    });
}

#[test]
fn files_make_the_round_trip() {
    everywhere(|connection| {
        let dir = tempfile::tempdir().expect("temp dir");
        let (here, there, back) =
            (dir.path().join("here"), dir.path().join("it's \"there\" $x"), dir.path().join("back"));
        let remote = there.to_str().expect("text");
        for (length, bits) in [(0, 0o600), (1, 0o755), (20 << 20, 0o4711)] {
            fs::write(&here, pattern(length)).expect("written");
            connection.upload(&here, remote, bits, &ample()).expect("uploads");
            assert!(fs::read(&there).expect("there") == pattern(length));
            assert_eq!(mode(&there), bits);
            connection.download(remote, &back, &ample()).expect("downloads");
            assert!(fs::read(&back).expect("back") == pattern(length));
            assert_eq!(mode(&back), 0o600);
        }
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 3, "no temporary file stays");
    });
}

#[test]
fn a_failed_transfer_leaves_nothing() {
    everywhere(|connection| {
        let dir = tempfile::tempdir().expect("temp dir");
        let (here, back) = (dir.path().join("here"), dir.path().join("back"));
        fs::write(&here, "x").expect("written");
        let error = connection.download("/no/such/file", &back, &ample()).expect_err("missing");
        assert!(matches!(error, ConnectionError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("`download /no/such/file`"), "{error}");
        let error = connection.upload(&here, "/no/such/dir/file", 0o600, &ample()).expect_err("missing");
        assert!(matches!(error, ConnectionError::Failed { .. }), "{error}");
        let error = connection.upload(&here, "/proc/version", 0o600, &ample()).expect_err("not writable");
        assert!(matches!(error, ConnectionError::Failed { .. }), "{error}");
        let remote = dir.path().to_str().expect("text");
        let error = connection.upload(&here, remote, 0o600, &ample()).expect_err("a directory");
        assert!(error.to_string().contains("is a directory"), "{error}");
        let error = connection.upload(&dir.path().join("no"), remote, 0o600, &ample()).expect_err("missing");
        assert!(matches!(error, ConnectionError::Host { .. }), "{error}");
        let nowhere = dir.path().join("no/dir/back");
        let error =
            connection.download(here.to_str().expect("text"), &nowhere, &ample()).expect_err("no directory");
        assert!(matches!(error, ConnectionError::Host { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("lists").count(), 1, "only the source is there");
    });
}
