//! A project outside of this one: builds against the library alone, with its own markers and images.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// `fixtures/outside`, or a copy of it, and where its runs leave their evidence.
struct Project {
    directory: PathBuf,
    evidence: tempfile::TempDir,
}

/// A directory with the versions of libraries that we are tested with: a `Cargo.lock` of its own would
/// lag behind ours.
fn prepared(directory: PathBuf) -> PathBuf {
    std::fs::create_dir_all(&directory).expect("makes");
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    std::fs::copy(ours, directory.join("Cargo.lock")).expect("copies");
    directory
}

impl Project {
    fn new() -> Self {
        static READY: OnceLock<PathBuf> = OnceLock::new();
        let ready =
            READY.get_or_init(|| prepared(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/outside")));
        Self::at(ready)
    }

    /// A copy in whose `Cargo.toml` `from` is replaced by `to`.
    fn changed(from: &str, to: &str) -> Self {
        let Self { directory: original, .. } = Self::new();
        // Always the same place, where the next copy replaces what this one leaves built.
        let copy = Self::at(&prepared(Path::new(env!("CARGO_TARGET_TMPDIR")).join("outside")));
        for file in ["src/lib.rs", "tests/scenarios.rs"] {
            let to = copy.directory.join(file);
            std::fs::create_dir_all(to.parent().expect("a directory")).expect("makes");
            std::fs::copy(original.join(file), to).expect("copies");
        }
        let manifest = std::fs::read_to_string(original.join("Cargo.toml")).expect("reads");
        assert!(manifest.contains(from), "{from:?} is not in\n{manifest}");
        // Under the original's name cargo would take its executable for that of the copy.
        let replaced =
            [(from, to), ("../..", env!("CARGO_MANIFEST_DIR")), ("name = \"outside\"", "name = \"changed\"")];
        let manifest = replaced.iter().fold(manifest, |text, (from, to)| text.replace(from, to));
        std::fs::write(copy.directory.join("Cargo.toml"), manifest).expect("writes");
        copy
    }

    fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), evidence: tempfile::tempdir().expect("temp dir") }
    }

    /// Runs its scenarios by `cargo test`; both streams and the exit status.
    fn test(&self, arguments: &[&str]) -> (String, Option<i32>) {
        // Our own target directory: what we have built already is not built again for it.
        let this = std::env::current_exe().expect("this test");
        let target = this.ancestors().nth(3).expect("target/debug/deps/this");
        let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
            .args(["test", "--quiet", "--test", "scenarios", "--"])
            .args(arguments)
            .current_dir(&self.directory)
            .env("CARGO_TARGET_DIR", target)
            .env("BOOT_IMAGE_VM_LOG_ROOT", self.evidence.path().join("notes"))
            .env("BOOT_IMAGE_VM_LEDGER_PATH", self.evidence.path().join("ledger.jsonl"))
            .env_remove("SHAKEDOWN_MARKERS")
            .env_remove("SHAKEDOWN_IMAGE")
            .output()
            .expect("cargo runs");
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&text).into_owned(), output.status.code())
    }
}

#[test]
fn its_scenarios_run_on_its_machines() {
    let (run, code) = Project::new().test(&[]);
    assert_eq!(code, Some(0), "{run}");
    assert!(run.contains("2 passed") && run.contains("scenarios: 2 passed"), "{run}");
}

#[test]
fn its_own_markers_are_known_and_ours_are_too() {
    let project = Project::new();
    let (list, _) = project.test(&["--list", "-m", "all(storage, vm)"]);
    assert!(list.contains("extra_disks_are_blank: test\n") && !list.contains("rescue"), "{list}");
    let (text, code) = project.test(&["-m", "broken"]);
    assert_ne!(code, Some(0), "{text}");
    assert!(text.contains("unknown marker `broken`; known are") && text.contains("`storage`"), "{text}");
}

#[test]
fn its_mistakes_end_a_run_before_it_begins() {
    for (from, to, message) in [
        ("ignore =", "ignored =", "unknown key `ignored`; did you mean `ignore`?"),
        (
            "login = false",
            "logn = false",
            "images.rescue] of Cargo.toml is wrong\ncaused by: unknown key `logn`",
        ),
        ("images.rescue]", "images.rescu]", "unknown image `rescue`; did you mean `rescu`?"),
        ("storage =", "storag =", "has the unknown marker `storage`; did you mean `storag`?"),
    ] {
        let (text, code) = Project::changed(from, to).test(&[]);
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(message), "{message:?} is missing in\n{text}");
    }
}
