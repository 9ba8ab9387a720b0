use super::super::ansi::Filter;
use super::super::testing::{Guest, guest, wire};
use super::*;
use crate::connection::Connection;
use crate::fault::{Blame, blame};
use std::io::Write as _;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

fn patterns() -> Patterns {
    Patterns::new(&LoginProfile::default()).expect("the defaults are right")
}

/// The prompts seen when a recording is cut at every byte, each once.
fn replay(recording: &[u8]) -> Vec<Seen> {
    let (patterns, mut filter, mut text) = (patterns(), Filter::default(), Vec::new());
    let mut seen = Vec::new();
    let mut last = None;
    for byte in recording {
        filter.feed(&[*byte], &mut text);
        let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(200)..]).into_owned();
        let prompt = patterns.prompt(&tail);
        if prompt != last {
            last = prompt;
            seen.extend(patterns.prompt(&tail));
        }
    }
    seen
}

#[test]
fn a_boot_has_no_prompt_before_its_prompts() {
    let seen = replay(include_bytes!("../../fixtures/serial/debian-12-boot.log"));
    // The login is automatic; its prompt is over at the next byte. Then bash, the probe, bash.
    let login = Seen::Login("shakedown login:".into());
    assert_eq!(seen, [login, Seen::Shell, Seen::Shell]);
}

#[test]
fn recorded_dialogues_are_understood() {
    use Seen::Shell;
    let login = || Seen::Login("shakedown login:".into());
    let password = || Seen::Password("Password:".into());
    let seen = replay(include_bytes!("../../fixtures/serial/debian-12-login.log"));
    let (first, rest) = seen.split_at(4);
    assert_eq!(first, [login(), password(), login(), password()]);
    assert_eq!(rest.iter().filter(|seen| **seen == password()).count(), 2, "two times `su -`");
    assert!(rest.iter().all(|seen| *seen == Shell || *seen == password()), "{rest:?}");

    let seen = replay(include_bytes!("../../fixtures/serial/nixos-login.log"));
    let sudo = Seen::Password("[sudo] password for nixos:".into());
    assert_eq!(seen, [Seen::Login("nixos login:".into()), Shell, sudo, Shell]);
}

#[test]
fn prompts_are_seen_behind_noise_and_nowhere_else() {
    let patterns = patterns();
    let shell = |text: &str| patterns.prompt(text) == Some(Seen::Shell);
    for text in [
        "root@host:~# ",
        "\n# ",
        "/ # ",
        "[root@nixos:~]# ",
        "user@host:~$ ",
        "root@host:~# [   12.345678] usb 1-1: new device\r\n[   12.4] more",
        "root@host:~# [  OK  ] Started foo.service.\r\n         Starting bar...\r\n",
        "root@host:~# \r\n",
    ] {
        assert!(shell(text), "{text:?}");
    }
    for text in ["Linux version 6.1 #1 SMP", "[    1.0] a # b", "total $ 5", "root@host:~# ls", "#", "50% "] {
        assert!(!shell(text), "{text:?}");
    }
    assert_eq!(patterns.prompt("Last login: Fri Nov 20 on ttyS0"), None);
    assert_eq!(patterns.prompt("host login: root (automatic login)\r\n"), None);
    let late = "host login: [   31.5] EXT4-fs (vda): mounted\r\n";
    assert!(matches!(patterns.prompt(late), Some(Seen::Login(_))));
}

/// A getty, a `sudo` and an `su` of our own in front of a real shell; `$login` and `$noise` tell
/// how they behave.
fn machine(settings: &str) -> Guest {
    let script = r#"
d=$DIR/bin; mkdir "$d"
cat >"$d/id" <<'END'
echo "${fake_uid:-1000}"
END
cat >"$d/sudo" <<'END'
stty -echo; printf '[sudo] password for user: '; read -r word; stty echo; echo
[ "$word" = secret ] || { echo 'Sorry, try again.'; exec sleep 1000; }
fake_uid=0 PS1='root# ' exec dash -i
END
cp "$d/sudo" "$d/su"; chmod +x "$d"/*; PATH=$d:$PATH
ask() { printf '\r\033[0mguest login: %s' "$noise"; read -r name; }
if [ "$login" = auto ]; then
  printf '\033]0;title\007guest login: '; printf 'user (automatic login)\r\n'
else
  ask; [ "$login" = twice ] && ask
  stty -echo; printf 'Password: '; read -r word; stty echo; echo
  [ "$name:$word" = user:secret ] || { echo 'Login incorrect'; ask; }
fi
PS1='user$ ' dash -i
"#;
    guest(&format!("exec sh -c {}", crate::process::quote(&format!("{settings}\n{script}"))))
}

fn user(password: &str, escalate: Escalate) -> LoginProfile {
    LoginProfile { user: "user".into(), password: Some(password.into()), escalate, ..Default::default() }
}

fn answers(mut shell: Shell) {
    let output = shell.exec("echo here".into(), &soon()).expect("runs");
    assert_eq!(output.text(), "here\n");
}

#[test]
fn an_automatic_login_is_left_alone() {
    let mut guest = machine("login=auto");
    let shell = guest.console.login(&user("secret", Escalate::None), &soon()).expect("logs in");
    assert_eq!(shell.user_id(), Some(1000));
    answers(shell);
    let typed = std::fs::read_to_string(guest.logs.path().join("console.cast")).expect("reads");
    assert!(!typed.contains(r#""i", "user\n""#), "no name was typed");
}

#[test]
fn a_user_logs_in_and_becomes_root() {
    for escalate in [Escalate::Sudo, Escalate::Su] {
        let mut guest = machine("noise='[   12.345678] random: crng init done\r\n'");
        let shell = guest.console.login(&user("secret", escalate), &soon()).expect("logs in");
        assert_eq!(shell.user_id(), Some(0));
        answers(shell);
        for file in ["console.cast", "serial.log"] {
            let evidence = std::fs::read_to_string(guest.logs.path().join(file)).expect("reads");
            assert!(!evidence.contains("secret"), "{file} has the password");
        }
    }
}

#[test]
fn a_getty_may_ask_again() {
    let mut guest = machine("login=twice");
    answers(guest.console.login(&user("secret", Escalate::None), &soon()).expect("logs in"));
}

#[test]
fn a_shell_that_is_already_there_is_found() {
    let mut guest = guest("dash -i");
    // Its prompt is gone from view.
    Keyboard::new(&guest.console.line, &soon()).enter("clear; sleep 0").expect("types");
    answers(guest.console.login(&LoginProfile::default(), &soon()).expect("logs in"));
}

#[test]
fn refusals_name_the_prompt_and_blame_the_machine() {
    let mut guest = machine("");
    let error = guest.console.login(&user("wrong", Escalate::None), &soon()).expect_err("is refused");
    let text = format!("{error:#}");
    assert!(
        text.contains("`Login incorrect` to `user`") && text.contains("guest login: Password:"),
        "{text}"
    );
    assert_eq!(blame(&error), Some(Blame::Machine));

    let mut guest = machine("login=auto");
    let error = guest.console.login(&user("wrong", Escalate::Sudo), &soon()).expect_err("is refused");
    let text = format!("{error:#}");
    assert!(text.contains("`Sorry, try again` to `sudo -i`"), "{text}");
}

#[test]
fn a_guest_without_prompt_ends_with_its_last_lines() {
    let (mut console, mut guest, _logs) = wire();
    guest.write_all(b"Kernel panic - not syncing: no init found\r\n").expect("writes");
    let brief = Deadline::after(Duration::from_millis(300), "BOOT_IMAGE_VM_LOGIN_TIMEOUT");
    let error = console.login(&LoginProfile::default(), &brief).expect_err("there is no login");
    let text = format!("{error:#}");
    assert!(text.contains("no init found") && text.contains("BOOT_IMAGE_VM_LOGIN_TIMEOUT"), "{text}");
    assert_eq!(blame(&error), Some(Blame::Machine));
    drop(guest);
    let error = console.login(&LoginProfile::default(), &soon()).expect_err("the machine is gone");
    assert_eq!(error.downcast_ref::<WaitError>(), Some(&WaitError::Closed), "{error:#}");
}

#[test]
fn profiles_come_from_toml() {
    let text = "user = \"nixos\"\nescalate = \"sudo\"\nlogin_prompt = 'Name: $'";
    let profile: LoginProfile = toml::from_str(text).expect("parses");
    assert_eq!((profile.user.as_str(), profile.escalate), ("nixos", Escalate::Sudo));
    assert!(toml::from_str::<LoginProfile>("usr = \"root\"").is_err());
    let bad = LoginProfile { shell_prompt: Some("(".into()), ..Default::default() };
    let error = Patterns::new(&bad).err().expect("is no pattern");
    assert!(format!("{error:#}").contains("shell_prompt"), "{error:#}");
}
