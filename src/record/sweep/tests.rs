use super::*;
use crate::record::event::{Event, Observer};
use crate::record::{Environment, Evidence, Run};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Tells the test binary, started again by a test, where to begin a scenario.
const CHILD_PROJECT: &str = "PROJECT_OF_CHILD_SCENARIO";

fn run(project: &Path) -> Run {
    Run::start_in(Environment::from_vars([], project).expect("reads"), None).expect("starts")
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

/// As if the process had died here: the lock is gone, nothing was written.
fn die(evidence: Evidence) -> PathBuf {
    evidence.directory().to_owned()
}

/// The one record that a sweep adds for a dead scenario.
fn sweep_one(log_root: &Path) -> Record {
    let added =
        files::eventually(|| Some(sweep(log_root).expect("sweeps").added).filter(|added| !added.is_empty()));
    let [record] = <[Record; 1]>::try_from(added).expect("one record");
    record
}

fn markers(log_root: &Path) -> usize {
    fs::read_dir(log_root.join(RUNNING)).expect("reads").count()
}

fn ledger_of(run: &Run) -> Vec<Record> {
    ledger::read(run.ledger().expect("is on")).expect("opens").map(|line| line.expect("sound")).collect()
}

fn log_root(run: &Run) -> &Path {
    &run.environment().log_root
}

#[test]
fn the_living_are_left_alone() {
    let root = temp();
    assert!(sweep(root.path()).expect("nothing there").added.is_empty());
    let run = run(root.path());
    let evidence = run.scenario("a", &[]).expect("begins");
    assert!(sweep(log_root(&run)).expect("sweeps").added.is_empty());
    evidence.finish(Outcome::Passed, None).expect("is recorded");
    assert!(sweep(log_root(&run)).expect("sweeps").added.is_empty());
    assert_eq!(markers(log_root(&run)), 0);
}

#[test]
fn the_dead_are_recorded_once_as_interrupted() {
    let root = temp();
    let run = run(root.path());
    let evidence = run.scenario("m::a", &["vm"]).expect("begins");
    evidence.observe(&Event::QemuStarting { command: vec!["qemu".into()] });
    let directory = die(evidence);
    let record = sweep_one(log_root(&run));
    assert_eq!(ledger_of(&run), slice::from_ref(&record));
    assert_eq!((record.outcome, record.reason.as_deref()), (Outcome::Interrupted, Some("the process died")));
    assert_eq!(record.scenario, "m::a");
    assert_eq!(record.qemu.as_ref().map(|qemu| qemu.command.len()), Some(1));
    assert_eq!(files::read_json::<Record>(&directory.join("record.json")).expect("reads"), record);
    let metadata: Metadata = files::read_json(&directory.join("metadata.json")).expect("reads");
    assert_eq!(metadata.outcome, Some(Outcome::Interrupted));
    assert!(sweep(log_root(&run)).expect("sweeps").added.is_empty());
    assert_eq!(ledger::check(run.ledger().expect("is on")).expect("opens"), []);
}

#[test]
fn a_death_at_any_step_of_the_end_leaves_one_line() {
    for (kept, listed) in [(false, false), (true, false), (true, true)] {
        let root = temp();
        let run = run(root.path());
        let evidence = run.scenario("a", &[]).expect("begins");
        evidence
            .update(|metadata| {
                metadata.outcome = Some(Outcome::Failed);
                metadata.reason = Some("no prompt".into());
            })
            .expect("writes");
        let record = Record::of(&evidence.metadata(), Some(evidence.directory()));
        if kept {
            files::write_json(&evidence.directory().join("record.json"), &record).expect("writes");
        }
        if listed {
            ledger::append(run.ledger().expect("is on"), std::slice::from_ref(&record)).expect("writes");
        }
        die(evidence);
        let added: usize = files::eventually(|| {
            let added = sweep(log_root(&run)).expect("sweeps").added.len();
            (markers(log_root(&run)) == 0).then_some(added)
        });
        assert_eq!(added, usize::from(!listed));
        let lines = ledger_of(&run);
        assert_eq!(lines.len(), 1, "record.json {kept}, ledger {listed}");
        assert_eq!(lines[0].outcome, Outcome::Failed, "the outcome that was known");
    }
}

#[test]
fn a_ledger_that_cannot_be_written_any_more_stops_nobody() {
    let root = temp();
    let start = |ledger: &str| {
        let vars = [("BOOT_IMAGE_VM_LEDGER_PATH".into(), ledger.into())];
        Run::start_in(Environment::from_vars(vars, root.path()).expect("reads"), None).expect("starts")
    };
    let (lost, sound) = (start("lost"), start("sound.jsonl"));
    die(lost.scenario("lost", &[]).expect("begins"));
    die(sound.scenario("kept", &[]).expect("begins"));
    fs::create_dir(root.path().join("lost")).expect("no ledger any more");
    let left = files::eventually(|| {
        let left = sweep(log_root(&lost)).expect("sweeps all the same").left;
        (markers(log_root(&lost)) == 1).then_some(left)
    });
    assert_eq!(ledger_of(&sound)[0].scenario, "kept");
    let [(marker, error)] = &left[..] else { panic!("one is left: {left:?}") };
    assert!(marker.exists() && format!("{error:#}").contains("lost"), "{error:#}");
    fs::remove_dir(root.path().join("lost")).expect("removes");
    assert_eq!(sweep_one(log_root(&lost)).scenario, "lost", "once it can be written");
    assert_eq!(ledger_of(&lost).len(), 1);
}

#[test]
fn what_somebody_removed_or_tore_is_forgotten() {
    let root = temp();
    let run = run(root.path());
    let gone = die(run.scenario("gone", &[]).expect("begins"));
    fs::remove_dir_all(gone).expect("removes");
    fs::write(log_root(&run).join(RUNNING).join("torn"), "{").expect("writes");
    files::eventually(|| {
        assert!(sweep(log_root(&run)).expect("sweeps").added.is_empty());
        (markers(log_root(&run)) == 0).then_some(())
    });
}

#[test]
fn a_killed_process_is_found_dead() {
    let root = temp();
    let mut child = Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "record::sweep::tests::child_scenario", "--ignored", "--nocapture"])
        .env(CHILD_PROJECT, root.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let begun = output.lines().any(|line| line.expect("reads").contains("scenario begun"));
    assert!(begun, "the child says when it is there");
    let log_root = root.path().join("notes");
    assert!(sweep(&log_root).expect("sweeps").added.is_empty(), "it lives");
    child.kill().expect("kills");
    child.wait().expect("is reaped");
    let record = sweep_one(&log_root);
    assert_eq!((record.outcome, record.scenario.as_str()), (Outcome::Interrupted, "doomed"));
}

#[test]
#[ignore = "the child of a_killed_process_is_found_dead"]
fn child_scenario() {
    let Some(project) = std::env::var_os(CHILD_PROJECT).map(PathBuf::from) else { return };
    let _evidence = run(&project).scenario("doomed", &[]).expect("begins");
    println!("scenario begun");
    std::io::stdin().lines().for_each(drop); // until the parent kills it or is gone
    panic!("the parent kills this process");
}
