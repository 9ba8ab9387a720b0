use super::super::testing::{Guest, guest, noisy_guest};
use super::*;
use crate::connection::Exit;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

fn shell(guest: &Guest) -> Shell {
    Shell::start(&guest.console.line, &soon()).expect("the agent starts")
}

/// Shells to log in with, each with another program as `sh` for the agent and the commands.
fn guests() -> Vec<(&'static str, Guest)> {
    vec![
        ("dash", guest("dash -i")),
        ("bash with readline", guest("bash --norc -i")),
        ("bash as sh", guest("ln -s $(command -v bash) $DIR/sh; PATH=$DIR:$PATH exec bash --norc -i")),
        (
            "busybox",
            guest("ln -s $(command -v cksum) $DIR; busybox --install -s $DIR; PATH=$DIR exec $DIR/sh -i"),
        ),
    ]
}

#[test]
fn every_shell_gives_exact_output_and_status() {
    for (name, guest) in guests() {
        let mut shell = shell(&guest);
        let mut run = |line: &str| shell.exec(line.into(), &soon()).expect(name);
        let output = run("printf 'a\\r\\nb\\0c'; echo err >&2; exit 3");
        assert_eq!(output.stdout, b"a\r\nb\0c", "{name}");
        assert_eq!(output.stderr, b"err\n", "{name}");
        assert_eq!(output.exit, Exit::Code(3), "{name}");
        assert_eq!(run("true").exit, Exit::Code(0), "{name}");
        for status in [130, 137, 141, 143] {
            assert_eq!(run(&format!("exit {status}")).exit, Exit::Code(status), "{name}");
        }
        for signal in ["KILL", "TERM", "USR1", "INT", "SEGV"] {
            let output = run(&format!("kill -{signal} $$; sleep 10"));
            assert_eq!(output.exit, Exit::Signal(signal.into()), "{name}");
        }
        assert_eq!(
            run("printf %s ' it'\\''s' \"ü\\t! \"\\\\0101  $sd_k ").stdout,
            " it'sü\\t! \\0101".as_bytes()
        );
    }
}

#[test]
fn kernel_messages_at_any_byte_change_nothing() {
    // One message, in another place for each command; then one every 997 bytes, all the time.
    let place = Arc::new(AtomicU64::new(0));
    let (at, seen) = (Arc::clone(&place), Arc::new(AtomicU64::new(0)));
    let guest = noisy_guest("dash -i", {
        let seen = Arc::clone(&seen);
        move |count| {
            seen.store(count, Ordering::SeqCst);
            let at = at.load(Ordering::SeqCst);
            let hit = if at == u64::MAX { count % 997 == 0 } else { at == count };
            hit.then(|| b"[   12.345678] usb 1-1: new device\r\n".to_vec())
        }
    });
    let mut shell = shell(&guest);
    let mut run = |nth: u64| {
        let output = shell.exec("echo out; exit 3".into(), &soon()).expect("runs");
        assert_eq!(
            (&output.stdout[..], output.exit),
            (&b"out\n"[..], Exit::Code(3)),
            "noise after byte {nth}"
        );
    };
    run(0);
    let before = seen.load(Ordering::SeqCst);
    run(0);
    let length = seen.load(Ordering::SeqCst) - before;
    assert!((100..400).contains(&length), "an answer has {length} bytes");
    for nth in 0..length {
        place.store(seen.load(Ordering::SeqCst) + nth, Ordering::SeqCst);
        run(nth);
    }
    place.store(u64::MAX, Ordering::SeqCst);
    let output = shell.exec("seq 5000".into(), &soon()).expect("runs");
    assert_eq!(cksum(&output.stdout), cksum(numbers(5000).as_bytes()));
}

fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

#[test]
fn standard_input_and_files_go_both_ways_whole() {
    for (name, guest) in guests() {
        let mut shell = shell(&guest);
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        let output = shell.exec(Cmd::new("cksum").stdin(bytes.clone()), &soon()).expect(name);
        assert_eq!(output.text(), format!("{} {}\n", cksum(&bytes), bytes.len()), "{name}");
        let dir = tempfile::tempdir().expect("temp dir");
        let (local, back) = (dir.path().join("local"), dir.path().join("back"));
        let remote = dir.path().join("re mote's").to_string_lossy().into_owned();
        for bytes in [bytes, Vec::new()] {
            std::fs::write(&local, &bytes).expect("writes");
            shell.upload(&local, &remote, 0o4751, &soon()).expect(name);
            let mode = std::fs::metadata(&remote).expect("is there").permissions().mode();
            assert_eq!(mode & 0o7777, 0o4751, "{name}");
            shell.download(&remote, &back, &soon()).expect(name);
            assert!(std::fs::read(&back).expect("reads") == bytes, "{name}");
        }
        let error = shell.upload(&local, "/tmp", 0o600, &soon()).expect_err("is a directory");
        assert!(matches!(&error, ConnectionError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("/tmp is a directory"), "{error}");
        let error = shell.download("/no/such/file", &back, &soon()).expect_err("is not there");
        assert!(matches!(error, ConnectionError::Failed { .. }), "{error}");
    }
}

#[test]
fn long_commands_pass_the_line_limit_of_a_terminal() {
    for (name, guest) in guests() {
        let mut shell = shell(&guest);
        let words = "a b  c\n".repeat(3000);
        let output = shell.exec(format!("printf %s '{words}' | wc -c").into(), &soon()).expect(name);
        assert_eq!(output.text().trim(), words.len().to_string(), "{name}");
    }
}

#[test]
fn a_command_that_hangs_is_killed_with_its_children_and_the_next_one_works() {
    for (name, guest) in guests() {
        let mut shell = shell(&guest);
        let dir = tempfile::tempdir().expect("temp dir");
        let pids = dir.path().join("pids").to_string_lossy().into_owned();
        let hang = format!("sleep 1000 & echo $! $$ >{pids}; trap '' INT TERM HUP; wait; sleep 1000");
        let cmd = Cmd::new(hang).timeout(Duration::from_millis(500));
        let error = shell.exec(cmd, &soon()).expect_err("hangs");
        assert!(matches!(error, ConnectionError::Stopped { .. }), "{name}: {error}");
        let output = shell.exec("echo alive".into(), &soon()).expect(name);
        assert_eq!(output.text(), "alive\n", "{name}");
        for pid in std::fs::read_to_string(&pids).expect("was written").split_whitespace() {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            assert!(stat.is_empty() || stat.contains(") Z"), "{name}: {stat}");
        }
    }
}

#[test]
fn commands_have_no_terminal_and_begin_with_default_signals() {
    let guest = guest("dash -i");
    let mut shell = shell(&guest);
    let output = shell.exec("cat; : </dev/tty && echo terminal".into(), &soon()).expect("runs");
    assert_eq!(output.text(), "", "standard input is empty and there is no terminal to read from");
    let output = shell.exec("grep SigIgn /proc/self/status; env | grep ^sd_".into(), &soon()).expect("runs");
    let ignored = u64::from_str_radix(output.text().trim_start_matches("SigIgn:").trim(), 16);
    assert_eq!(ignored.expect("a mask") & 0b110, 0, "INT and QUIT");
}

#[test]
fn an_agent_that_was_killed_is_started_again() {
    let guest = guest("dash -i");
    let mut shell = shell(&guest);
    let token = shell.token().to_owned();
    // The agent is the parent of the command's shell.
    let cmd = Cmd::new("kill -KILL $PPID").timeout(Duration::from_millis(500));
    shell.exec(cmd, &soon()).expect_err("nobody is left to answer");
    assert_eq!(shell.exec("echo back".into(), &soon()).expect("works again").text(), "back\n");
    assert_ne!(shell.token(), token);
}

#[test]
fn a_shell_can_be_taken_up_again() {
    let mut guest = guest("dash -i");
    let token = shell(&guest).token().to_owned();
    let mut again = guest.console.resume(&token, &soon()).expect("answers");
    assert_eq!(again.exec("echo here".into(), &soon()).expect("runs").text(), "here\n");
}

#[test]
fn the_death_of_the_machine_ends_a_command_at_once() {
    let guest = guest("dash -i");
    let mut shell = shell(&guest);
    let line = Arc::clone(&guest.console.line);
    let thread = std::thread::spawn(move || shell.exec("sleep 1000".into(), &soon()));
    let typed = |text: &[u8]| text.windows(10).any(|window| window == b"sleep 1000");
    while !typed(&std::fs::read(guest.logs.path().join("console.cast")).expect("reads")) {
        std::thread::yield_now();
    }
    drop(guest);
    let error = thread.join().expect("joins").expect_err("the machine is gone");
    assert!(matches!(error, ConnectionError::Transport { .. }), "{error}");
    assert!(line.feed.wait_closed(&soon()).is_ok());
}

#[test]
fn output_is_seen_and_temporary_files_are_private() {
    let guest = guest("dash -i");
    let mut shell = shell(&guest);
    let mut seen = Vec::new();
    let line = "ls -ld $(dirname $(readlink /proc/$$/fd/1)) | cut -c1-10; echo oops >&2";
    shell
        .run(Cmd::new(line).on_output(|stream, bytes| seen.push((stream, bytes.to_vec()))), &soon())
        .expect("runs");
    assert_eq!(seen, [(Stream::Stdout, b"drwx------\n".to_vec()), (Stream::Stderr, b"oops\n".to_vec())]);
}

proptest! {
    #[test]
    fn encoded_commands_are_short_plain_lines(text in "[ -~\\n\\té\\\\]{0,300}") {
        let pieces = encode(&text, 60);
        let mut decoded = Vec::new();
        for piece in &pieces {
            prop_assert!(piece.len() <= 64 && piece.bytes().all(|b| (b' '..=b'~').contains(&b)));
            prop_assert_eq!(piece.trim(), piece);
            let mut bytes = piece.bytes();
            while let Some(byte) = bytes.next() {
                let escape: String = if byte == b'\\' { bytes.by_ref().take(4).map(char::from).collect() } else { String::new() };
                decoded.push(if byte == b'\\' { u8::from_str_radix(&escape, 8).expect("octal") } else { byte });
            }
        }
        prop_assert_eq!(decoded, text.as_bytes());
    }
}
