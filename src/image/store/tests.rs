use super::*;
use crate::image::Built;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const KEY: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const OTHER: &str = "fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210";

fn store() -> (tempfile::TempDir, Store<Built>) {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = open(&dir.path().join("images"));
    (dir, store)
}

fn open(dir: &Path) -> Store<Built> {
    Store::open(dir.to_owned(), |_| {}).expect("opens")
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

fn write_image(dir: &Path, log: &Path) -> Result<Built> {
    fs::write(dir.join("image.iso"), "an image")?;
    fs::write(log, "a log")?;
    Ok(Built { recipe: "test".into(), ..Built::default() })
}

fn get(store: &Store<Built>, key: &str, name: &str) -> Result<Entry<Built>> {
    store.get(key, name, None, &deadline(), &Events::silent(), write_image)
}

fn must_not_build(_: &Path, _: &Path) -> Result<Built> {
    panic!("built although it is there")
}

#[test]
fn an_entry_is_built_once_and_whole() {
    let (_dir, store) = store();
    let entry = get(&store, KEY, "mine").expect("builds");
    assert_eq!(fs::read_to_string(entry.dir.join("image.iso")).expect("is there"), "an image");
    assert_eq!(fs::read_to_string(entry.dir.join(LOG)).expect("is there"), "a log");
    let record = &entry.manifest.files["image.iso"];
    assert_eq!((record.bytes, record.sha256.as_ref().map(String::len)), (8, Some(64)));
    let again = store
        .get(KEY, "mine", Some("a run"), &deadline(), &Events::silent(), must_not_build)
        .expect("is there");
    assert_eq!(again.manifest, entry.manifest);
    let names: Vec<_> = store.names().expect("reads");
    assert!(!names.iter().any(|name| name.starts_with("tmp-") || name.ends_with(".log")), "{names:?}");
}

#[test]
fn a_failed_build_leaves_its_log_and_nothing_else() {
    let (_dir, store) = store();
    let fail = |dir: &Path, log: &Path| -> Result<Built> {
        write_image(dir, log)?;
        bail!(Fault::host("the mirror is gone"))
    };
    let error =
        store.get(KEY, "mine", Some("a run"), &deadline(), &Events::silent(), fail).expect_err("fails");
    assert!(format!("{error:#}").contains("the mirror is gone"));
    assert!(!store.dir.join(KEY).exists() && !store.dir.join(format!("tmp-{KEY}")).exists());
    assert_eq!(fs::read_to_string(store.path(KEY, "log")).expect("stays"), "a log");
    get(&store, KEY, "mine").expect("a new attempt is not refused");
    assert!(!store.path(KEY, "failed").exists(), "forgotten after a success");
}

#[test]
fn a_damaged_entry_is_built_anew_with_a_warning() {
    type Damage = fn(&Path) -> io::Result<()>;
    let damages: [Damage; 4] = [
        |dir| fs::write(dir.join("image.iso"), "an"),
        |dir| fs::remove_file(dir.join("image.iso")),
        |dir| fs::write(dir.join(MANIFEST), "{"),
        |dir| fs::remove_file(dir.join(IN_USE)),
    ];
    for damage in damages {
        let (_dir, store) = store();
        let entry = get(&store, KEY, "mine").expect("builds");
        damage(&entry.dir).expect("is damaged");
        let notes = Notes::default();
        let entry = store
            .get(KEY, "mine", Some("a run"), &deadline(), &notes.events(), write_image)
            .expect("builds anew");
        assert_eq!(fs::read_to_string(entry.dir.join("image.iso")).expect("is there"), "an image");
        assert!(notes.any("is damaged"), "{notes:?}");
    }
}

#[test]
fn of_many_who_want_it_one_builds() {
    let (_dir, store) = store();
    let builds = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let build = |dir: &Path, log: &Path| {
                    builds.fetch_add(1, Ordering::SeqCst);
                    write_image(dir, log)
                };
                open(&store.dir)
                    .get(KEY, "mine", Some("a run"), &deadline(), &Events::silent(), build)
                    .expect("gets it");
            });
        }
    });
    assert_eq!(builds.into_inner(), 1);
}

#[test]
fn a_build_fails_once_in_a_run_and_is_tried_again_in_the_next() {
    let (_dir, store) = store();
    let run = Some("a run");
    let fail = |_: &Path, _: &Path| -> Result<Built> { bail!(Fault::machine("it panics")) };
    store.get(KEY, "mine", run, &deadline(), &Events::silent(), fail).expect_err("fails");
    let again = store.get(KEY, "mine", run, &deadline(), &Events::silent(), must_not_build);
    let error = again.expect_err("fails at once");
    assert!(format!("{error:#}").contains("before in this run:\nit panics"), "{error:#}");
    assert_eq!(blame(&error), Some(Blame::Machine), "whose fault it is stays");
    store.prune(Some(Duration::ZERO), None).expect("prunes");
    store.get(KEY, "mine", run, &deadline(), &Events::silent(), must_not_build).expect_err("still");
    store.get(KEY, "mine", Some("another"), &deadline(), &Events::silent(), write_image).expect("builds");
}

#[test]
fn who_waited_for_a_build_that_failed_fails_with_its_words() {
    let (_dir, store) = store();
    let (building, begun) = std::sync::mpsc::channel();
    let notes = Notes::default();
    std::thread::scope(|scope| {
        let (store, notes) = (&store, &notes);
        let first = scope.spawn(move || {
            let build = |_: &Path, _: &Path| -> Result<Built> {
                building.send(()).expect("is awaited");
                while !notes.any("waiting for image `mine`") {
                    deadline().check()?;
                    std::thread::yield_now();
                }
                bail!("no such package")
            };
            store.get(KEY, "mine", Some("a run"), &deadline(), &Events::silent(), build)
        });
        begun.recv().expect("begins");
        let waited = store.get(KEY, "mine", Some("a run"), &deadline(), &notes.events(), must_not_build);
        let text = format!("{:#}", waited.expect_err("fails too"));
        assert!(text.contains("before in this run") && text.contains("no such package"), "{text}");
        assert!(first.join().expect("joins").is_err());
    });
    assert!(notes.any(&format!("process {}", std::process::id())), "says for whom: {notes:?}");
}

#[test]
fn a_leftover_that_cannot_be_removed_is_in_nobody_else_s_way() {
    let (_dir, store) = store();
    // Where root may do all, the way to a directory that cannot go is to be no directory.
    fs::write(store.dir.join(format!("tmp-{KEY}")), "").expect("writes");
    let store = open(&store.dir);
    get(&store, OTHER, "other").expect("is not touched by it");
    get(&store, KEY, "mine").expect_err("has it in the way");
}

#[test]
fn what_is_condemned_is_built_anew() {
    let (_dir, store) = store();
    let entry = get(&store, KEY, "mine").expect("builds");
    let dir = entry.dir.clone();
    condemn(&dir).expect("removes");
    store.prune(None, None).expect("prunes");
    assert!(dir.exists(), "it is in use");
    drop(entry);
    let entry = get(&store, KEY, "mine").expect("builds anew");
    condemn(&entry.dir).expect("removes");
    drop(entry);
    store.prune(None, None).expect("prunes");
    assert!(!dir.exists(), "nobody can read it");
}

#[test]
fn what_is_in_use_is_neither_removed_nor_pruned() {
    let (_dir, store) = store();
    let entry = get(&store, KEY, "mine").expect("builds");
    drop(get(&store, OTHER, "other").expect("builds"));
    let text = format!("{:#}", store.rm("mine").expect_err("is in use"));
    assert!(text.contains("in use"), "{text}");
    let removed = store.prune(Some(Duration::ZERO), Some(0)).expect("prunes");
    assert_eq!(removed.iter().map(|e| e.manifest.name.as_str()).collect::<Vec<_>>(), ["other"]);
    assert!(store.list().expect("lists")[0].in_use);
    let Entry { guard, .. } = entry;
    drop(guard);
    assert_eq!(store.rm(&KEY[..12]).expect("is free now").len(), 1);
    assert!(store.list().expect("lists").is_empty());
    let text = format!("{:#}", store.rm("mine").expect_err("is gone"));
    assert!(text.contains("no image `mine`"), "{text}");
}

#[test]
fn pruning_by_size_begins_with_what_was_last_used_longest_ago() {
    let (_dir, store) = store();
    let keys: Vec<String> = (0..3).map(|n| format!("{n}{}", &KEY[1..])).collect();
    for (age, key) in [20, 30, 10].into_iter().zip(&keys) {
        let entry = get(&store, key, key).expect("builds");
        let used = SystemTime::now() - Duration::from_secs(age * 3600);
        let file = File::options().write(true).open(entry.dir.join(IN_USE)).expect("opens");
        file.set_modified(used).expect("sets");
    }
    let one = store.list().expect("lists")[0].bytes;
    let removed = store.prune(None, Some(2 * one)).expect("prunes");
    assert_eq!(removed.iter().map(|e| &e.manifest.key).collect::<Vec<_>>(), [&keys[1]]);
    let removed = store.prune(Some(Duration::from_secs(15 * 3600)), None).expect("prunes");
    assert_eq!(removed.iter().map(|e| &e.manifest.key).collect::<Vec<_>>(), [&keys[0]]);
    get(&store, &keys[2], "x").expect("is still there");
    assert!(!store.path(&keys[0], "lock").exists(), "locks of what is gone go too");
}

/// Another process: this very test program, told by the variable to build and never to end.
const BUILDER: &str = "SHAKEDOWN_TEST_STORE";

#[test]
fn what_a_killed_builder_left_is_swept_and_built_by_the_next() {
    if let Some(dir) = std::env::var_os(BUILDER) {
        let build = |dir: &Path, log: &Path| -> Result<Built> {
            write_image(dir, log)?;
            println!("building");
            loop {
                std::thread::park();
            }
        };
        let _ = open(Path::new(&dir)).get(KEY, "mine", Some("a run"), &deadline(), &Events::silent(), build);
        return;
    }
    let (_dir, store) = store();
    let mut command = Command::new(std::env::current_exe().expect("known"));
    let this = "image::store::tests::what_a_killed_builder_left_is_swept_and_built_by_the_next";
    command.args([this, "--exact", "--nocapture"]).env(BUILDER, &store.dir).stdout(Stdio::piped());
    let mut builder = crate::process::spawn(command).expect("starts");
    let (_, stdout, _) = builder.pipes();
    let mut lines = io::BufRead::lines(io::BufReader::new(stdout.expect("piped")));
    assert!(lines.any(|line| line.expect("reads").ends_with("building")));
    let temporary = store.dir.join(format!("tmp-{KEY}"));
    open(&store.dir);
    assert!(temporary.exists(), "a build that runs is left alone");
    let short = Deadline::after(Duration::from_millis(100), "test");
    let error = store
        .get(KEY, "mine", Some("a run"), &short, &Events::silent(), must_not_build)
        .expect_err("has to wait");
    assert!(format!("{error:#}").contains(&format!("process {}", builder.id())), "{error:#}");

    let waiter = std::thread::spawn({
        let store = store.clone();
        move || get(&store, KEY, "mine").map(|entry| entry.manifest.key)
    });
    builder.kill();
    assert_eq!(waiter.join().expect("joins").expect("builds in its place"), KEY);
    assert!(!temporary.exists());

    fs::create_dir(&temporary).expect("as a death leaves it");
    open(&store.dir);
    assert!(!temporary.exists(), "swept");
}

/// Keeps what was told.
#[derive(Clone, Debug, Default)]
struct Notes(Arc<std::sync::Mutex<Vec<String>>>);

impl Notes {
    fn events(&self) -> Events {
        Events::to(self.clone())
    }

    fn any(&self, text: &str) -> bool {
        self.0.lock().expect("not poisoned").iter().any(|note| note.contains(text))
    }
}

impl crate::record::event::Observer for Notes {
    fn observe(&self, event: &Event) {
        if let Event::Note { text } = event {
            self.0.lock().expect("not poisoned").push(text.clone());
        }
    }
}
