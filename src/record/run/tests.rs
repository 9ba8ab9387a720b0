use super::*;
use crate::record::ledger;
use std::os::unix::fs::PermissionsExt;

fn environment(root: &Path) -> Environment {
    let vars = [("BOOT_IMAGE_VM_LOGIN_TIMEOUT".into(), "60".into())];
    Environment::from_vars(vars, root).expect("reads")
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

#[test]
fn a_run_has_a_private_directory_with_its_identity() {
    let root = temp();
    let run = Run::start_in(environment(root.path()), None).expect("starts");
    assert_eq!(run.directory().file_name().and_then(|name| name.to_str()), Some(run.id()));
    assert!(run.directory().starts_with(root.path().join("notes")));
    let (time, id) = run.id().split_at("2026-01-31T120000Z".len());
    assert!(time.ends_with('Z') && id.len() == 9 && id.starts_with('-'), "{}", run.id());
    let mode = fs::metadata(run.directory()).expect("exists").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let file: RunFile = files::read_json(&run.directory().join("run.json")).expect("reads");
    assert_eq!(file, run.file);
    assert_eq!(file.project, root.path());
    assert_eq!(file.env["BOOT_IMAGE_VM_LOGIN_TIMEOUT"], "60");
    assert_eq!(file.git, None, "not a checkout");
    assert!(file.host.cpus > 0 && file.host.memory > 1 << 20 && !file.argv.is_empty());
}

#[test]
fn latest_points_to_the_newest_run() {
    let root = temp();
    for _ in 0..2 {
        let run = Run::start_in(environment(root.path()), None).expect("starts");
        let latest = fs::read_link(root.path().join("notes/latest")).expect("a link");
        assert_eq!(latest.to_str(), Some(run.id()));
    }
}

#[test]
fn something_in_the_place_of_latest_is_an_error_with_the_fix() {
    let root = temp();
    fs::create_dir_all(root.path().join("notes/latest")).expect("makes");
    let error = Run::start_in(environment(root.path()), None).expect_err("cannot link");
    assert!(format!("{error:#}").contains("Fix: remove"), "{error:#}");
}

#[test]
fn processes_of_one_nextest_run_share_a_directory() {
    let root = temp();
    let start = |shared: &str| Run::start_in(environment(root.path()), Some(shared.into())).expect("starts");
    let ids: std::collections::BTreeSet<_> = std::thread::scope(|threads| {
        let starting: Vec<_> =
            (0..8).map(|_| threads.spawn(|| start("1f79aa0d-4ec8").id().to_owned())).collect();
        starting.into_iter().map(|thread| thread.join().expect("joins")).collect()
    });
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_ne!(ids.first().map(String::as_str), Some(start("1f79aa0d-5ec9").id()));
}

#[test]
fn what_did_not_run_is_in_the_ledger_with_its_reason() {
    let root = temp();
    let run = Run::start_in(environment(root.path()), None).expect("starts");
    let scenarios: [(&str, &[&str], &str); 2] =
        [("a", &["hardware"], "marker `hardware`"), ("b", &[], "on demand")];
    run.not_run(Outcome::Ignored, &scenarios).expect("writes");
    let path = run.ledger().expect("is on");
    let records: Vec<_> = ledger::read(path).expect("opens").map(|line| line.expect("sound")).collect();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].reason.as_deref(), Some("marker `hardware`"));
    assert_eq!(records[0].markers, ["hardware"]);
    assert_eq!((records[1].outcome, &records[1].metadata), (Outcome::Ignored, &None));
    assert_eq!(records[0].timeouts.login_seconds, 60);
    assert_eq!(ledger::check(path).expect("opens"), []);
}

#[test]
fn a_checkout_is_clean_or_dirty() {
    let root = temp();
    let git_in = |args: &[&str]| {
        let mut command = Command::new("git");
        command.arg("-C").arg(root.path()).args(["-c", "user.name=n", "-c", "user.email=e"]).args(args);
        process::output(command, &Deadline::after(Duration::from_secs(20), "test")).expect("git works")
    };
    assert_eq!(git(root.path()), None);
    git_in(&["init", "-q"]);
    assert_eq!(git(root.path()), None, "no commit yet");
    fs::write(root.path().join("file"), "1").expect("writes");
    git_in(&["add", "file"]);
    git_in(&["commit", "-qm", "one"]);
    let clean = git(root.path()).expect("a commit");
    assert!(!clean.dirty && clean.commit.len() >= 40, "{clean:?}");
    fs::write(root.path().join("untracked"), "").expect("writes");
    assert_eq!(git(root.path()), Some(clean.clone()), "an untracked file does not count");
    fs::write(root.path().join("file"), "2").expect("writes");
    assert_eq!(git(root.path()), Some(Git { dirty: true, ..clean }));
}

#[test]
fn a_login_in_an_address_is_not_written_down() {
    for (given, kept) in [
        (&["x", "--server", "me:pw@host:80", "a@b"][..], &["x", "--server", "host:80", "a@b"][..]),
        (&["--server=me:p@w@host", "c:d@e"], &["--server=host", "c:d@e"]),
        (&["https://me:pw@host/x@y", "-m", "any(a, b)"], &["https://host/x@y", "-m", "any(a, b)"]),
        (&["--url=http://me@host"], &["--url=http://host"]),
        (&["http://host/me:pw@x", "--server"], &["http://host/me:pw@x", "--server"]),
    ] {
        assert_eq!(without_logins(given.iter().map(|text| (*text).to_owned())), kept);
    }
}

#[test]
fn a_run_is_gone_on_with_under_its_id_or_as_the_latest() {
    let root = temp();
    let first = Run::start_in(environment(root.path()), None).expect("starts");
    for id in [first.id(), "latest"] {
        let again = Run::reopen(environment(root.path()), id).expect("is there");
        assert_eq!((again.id(), again.joined()), (first.id(), true));
        assert_eq!(again.directory().file_name(), first.directory().file_name());
    }
    for none in ["", ".", "..", "../notes", "no-such-run", "/etc"] {
        let error = Run::reopen(environment(root.path()), none).expect_err(none);
        assert!(error.to_string().contains("there is no run"), "{none}: {error:#}");
    }
}
