use super::super::testing::{Guest, guest, noisy_guest};
use super::*;
use crate::connection::Exit;
use proptest::prelude::*;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

fn shell(guest: &Guest) -> Shell {
    Shell::start(&guest.console.line, &soon()).expect("the agent starts")
}

/// Shells to log in with, each with another program as `sh` for the agent and the commands.
fn guests() -> Vec<(&'static str, Guest)> {
    let mut guests = vec![
        ("dash", guest("dash -i")),
        ("bash with readline", guest("bash --norc -i")),
        ("bash as sh", guest("d=$(mktemp -d); ln -s $(command -v bash) $d/sh; PATH=$d:$PATH exec bash --norc -i")),
    ];
    if process_has("busybox") {
        guests.push((
            "busybox",
            guest("d=$(mktemp -d); busybox --install -s $d; PATH=$d exec $d/sh -i"),
        ));
    }
    guests
}

fn process_has(tool: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).exists()))
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
        assert_eq!(run("exit 137").exit, Exit::Code(137), "{name}");
        for signal in ["KILL", "TERM", "HUP", "INT", "SEGV"] {
            let output = run(&format!("kill -{signal} $$; sleep 10"));
            assert_eq!(output.exit, Exit::Signal(signal.into()), "{name}");
        }
        assert_eq!(run("printf %s ' it'\\''s \"ü\\t! \"\\\\0101  $sd_k ").stdout, " it'sü\\t! \\0101".as_bytes());
    }
}
