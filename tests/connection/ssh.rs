//! SSH when its peer is late, silent, wrong, noisy or dead.

use crate::sshd::{Sshd, ample, listener, trickle, user};
use shakedown::connection::ssh::Target;
use shakedown::connection::{Cmd, Connection, ConnectionError, KeyPair, Ssh};
use shakedown::deadline::{Deadline, Stop};
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const AMPLE: Duration = Duration::from_secs(600);

fn target(addr: SocketAddr) -> Target {
    Target::new(addr, user(), KeyPair::generate().expect("a key"))
}

/// The error when `target` cannot be used within the time, or until it says that it is gone.
fn refused(target: Target, time: Duration) -> String {
    match Ssh::open(target, &Deadline::after(time, "BOOT_IMAGE_VM_LOGIN_TIMEOUT")) {
        Ok(_) => panic!("opened"),
        Err(error @ ConnectionError::Transport { .. }) => format!("{:#}", anyhow::Error::from(error)),
        Err(error) => panic!("another error: {error}"),
    }
}

/// As [`refused`], after `attempts` connections.
fn refused_after(attempts: usize, sshd: &Sshd, target: Target) -> String {
    let accepted = sshd.counter();
    refused(target.until(move || (accepted() > attempts).then(|| "enough".into())), AMPLE)
}

#[test]
fn the_first_attempt_does_when_the_server_is_up() {
    let sshd = Sshd::start();
    let mut ssh = sshd.open();
    assert_eq!((ssh.attempts(), sshd.accepted()), (1, 1));
    assert_eq!(ssh.peer(), format!("{}@{}", user(), sshd.addr));
    fn is_send<T: Send>(_: &T) {}
    is_send(&ssh);
    assert!(ssh.run("true".into(), &ample()).is_ok());
}

#[test]
fn a_peer_that_never_speaks_is_named_with_the_limit() {
    // The kernel accepts for it.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let text = refused(target(silent.local_addr().expect("an address")), Duration::from_millis(300));
    assert!(text.contains("1 attempt") && text.contains("stayed silent"), "{text}");
    assert!(text.contains("BOOT_IMAGE_VM_LOGIN_TIMEOUT"), "{text}");
}

#[test]
fn a_peer_that_closes_or_refuses_is_tried_again() {
    let count = Arc::new(AtomicUsize::new(0));
    let addr = listener({
        let count = Arc::clone(&count);
        move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let target_until =
        target(addr).until(move || (count.load(Ordering::SeqCst) >= 3).then(|| "enough".into()));
    let text = refused(target_until, AMPLE);
    assert!(text.contains("closed before the SSH banner") || text.contains("reset"), "{text}");
    // A port on which nobody listens: of a listener that is no more.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let text = refused(target(free), Duration::from_millis(300));
    assert!(text.contains("refused"), "{text}");
}

#[test]
fn a_connection_that_stays_silent_does_not_hold_up_the_next() {
    let sshd = Sshd::with("", 2);
    let ssh = sshd.open();
    assert_eq!(ssh.attempts(), 3);
}

#[test]
fn a_peer_that_speaks_something_else_is_named() {
    use std::io::Write;
    let addr = listener(|mut socket| {
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    let text = refused(target(addr), Duration::from_millis(500));
    assert!(text.to_lowercase().contains("banner"), "{text}");
}

#[test]
fn a_banner_that_trickles_in_is_enough() {
    let sshd = Sshd::start();
    let target = Target { addr: trickle(sshd.addr), ..sshd.target() };
    let mut ssh = Ssh::open(target, &ample()).expect("opens");
    assert_eq!(ssh.run("echo hi".into(), &ample()).expect("runs").stdout, b"hi\n");
}

#[test]
fn a_wrong_key_is_called_a_refused_login() {
    let sshd = Sshd::start();
    let text = refused_after(2, &sshd, target(sshd.addr));
    assert!(text.contains("enough; 3 attempts, 2 of them with the login refused"), "{text}");
}

#[test]
fn a_key_that_is_authorized_later_gets_in() {
    let sshd = Sshd::start();
    fs::remove_file(sshd.authorized_keys()).expect("removed");
    let ssh = std::thread::scope(|scope| {
        let opening = scope.spawn(|| sshd.open());
        let end = ample();
        while sshd.accepted() < 2 {
            end.check().expect("tries again");
            std::thread::yield_now();
        }
        sshd.authorize();
        opening.join().expect("opens")
    });
    assert!(ssh.attempts() >= 2, "{}", ssh.attempts());
}

#[test]
fn the_wait_ends_when_the_machine_is_gone() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let asked = AtomicUsize::new(0);
    let target = target(silent.local_addr().expect("an address"))
        .until(move || (asked.fetch_add(1, Ordering::SeqCst) > 2).then(|| "QEMU ended with signal 9".into()));
    let text = refused(target, AMPLE);
    assert!(text.contains("QEMU ended with signal 9; 1 attempt"), "{text}");
}

#[test]
fn a_peer_that_dies_in_mid_command_is_a_transport_error_and_the_next_command_reconnects() {
    let sshd = Sshd::start();
    let mut ssh = sshd.open();
    let dir = tempfile::tempdir().expect("temp dir");
    let runs = dir.path().join("runs");
    let line = format!("echo run >>{}; while echo on; do sleep 0.1; done", runs.display());
    let cmd = Cmd::new(line).on_output(|_, _| sshd.kill());
    let error = ssh.run(cmd, &ample()).expect_err("the peer died");
    assert!(matches!(error, ConnectionError::Transport { .. }), "{error}");
    assert_eq!(ssh.run("echo back".into(), &ample()).expect("reconnects").stdout, b"back\n");
    assert_eq!(sshd.accepted(), 2);
    assert_eq!(fs::read_to_string(runs).expect("ran"), "run\n", "a command is never repeated");
}

#[test]
fn a_session_that_broke_between_commands_is_made_anew() {
    let sshd = Sshd::start();
    let mut ssh = sshd.open();
    sshd.kill();
    assert_eq!(ssh.run("echo back".into(), &ample()).expect("reconnects").stdout, b"back\n");
}

#[test]
fn another_machine_at_the_same_address_is_refused() {
    let sshd = Sshd::start();
    let mut ssh = sshd.open();
    fs::remove_dir_all(sshd.dir.path().join("host")).expect("removed");
    KeyPair::load_or_create(&sshd.dir.path().join("host")).expect("another host key");
    sshd.kill();
    let error = ssh.run("true".into(), &ample()).expect_err("an impostor");
    assert!(error.to_string().contains("another machine answers"), "{error}");
}

#[test]
fn a_noisy_login_is_not_in_the_output() {
    let noise = "ForceCommand echo Welcome; echo Careful >&2; exec /bin/sh -c \"$SSH_ORIGINAL_COMMAND\"\n";
    let sshd = Sshd::with(noise, 0);
    let out = sshd.open().run("echo hi; echo ho >&2".into(), &ample()).expect("runs");
    assert_eq!((&out.stdout[..], &out.stderr[..]), (&b"hi\n"[..], &b"ho\n"[..]));
}

#[test]
fn an_account_without_a_shell_is_said_to_be_one() {
    let sshd = Sshd::with("ForceCommand echo This account is currently not available.; exit 1\n", 0);
    let text = refused_after(1, &sshd, sshd.target());
    assert!(text.contains("did not run /bin/sh") && text.contains("not available"), "{text}");
}

#[test]
fn a_machine_that_vanishes_under_a_command_ends_it() {
    let sshd = Sshd::start();
    let seen = Arc::new(AtomicUsize::new(0));
    let target = sshd.target().until({
        let seen = Arc::clone(&seen);
        move || (seen.load(Ordering::SeqCst) > 0).then(|| "powered off".into())
    });
    let mut ssh = Ssh::open(target, &ample()).expect("opens");
    let cmd = Cmd::new("echo on; exec sleep 5").on_output(|_, _| seen.store(1, Ordering::SeqCst));
    let error = ssh.run(cmd, &Deadline::after(Duration::from_secs(600), "test")).expect_err("vanished");
    assert!(matches!(error, ConnectionError::Transport { .. }), "{error}");
    assert!(error.to_string().contains("powered off"), "{error}");
}

#[test]
fn a_line_too_long_for_a_packet_is_refused_with_the_way_out() {
    let sshd = Sshd::start();
    let mut ssh = sshd.open();
    assert!(ssh.run(format!(": {}", "x".repeat(31_000)).into(), &ample()).is_ok());
    let error = ssh.run(format!(": {}", "x".repeat(40_000)).into(), &ample()).expect_err("too long");
    let text = format!("{:#}", anyhow::Error::from(error));
    assert!(text.contains("`sh -s`"), "{text}");
    assert!(ssh.run("true".into(), &ample()).is_ok(), "the session is still good");
}

#[test]
fn the_deadline_says_whose_it_is() {
    let sshd = Sshd::start();
    let error = sshd
        .open()
        .run("exec sleep 1000".into(), &Deadline::after(Duration::from_millis(300), "scenario timeout"))
        .expect_err("hangs");
    let ConnectionError::Stopped { stop: Stop::Expired { owner, .. }, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(owner, "scenario timeout");
}
