//! Runs the examples in places of their own, and looks at what they leave behind.

use rustix::process::{Pid, Signal, kill_process};
use shakedown::deadline::Deadline;
use shakedown::image::{Image, Images};
use shakedown::record::Environment;
use shakedown::record::event::Events;
use shakedown::record::ledger::{self, Record};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Longer than anything here takes on a busy machine, and a fraction of the limits that are under
/// test: 900 s for the first output, 300 s for the login.
const LIMIT: Duration = Duration::from_secs(240);

/// The `cargo` that runs this.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("SHAKEDOWN_MARKERS");
    cargo
}

/// The executable of an example. `cargo test --test harness` alone does not build them, so the first
/// test that needs one does.
pub(crate) fn example(name: &str) -> &'static Path {
    static EXAMPLES: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    let examples = EXAMPLES.get_or_init(|| {
        let arguments = ["build", "--examples", "--message-format", "json-render-diagnostics"];
        let built = cargo().args(arguments).output().expect("cargo runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let executable = |line: &str| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, PathBuf::from(message["executable"].as_str()?)))
        };
        String::from_utf8_lossy(&built.stdout).lines().filter_map(executable).collect()
    });
    &examples[name]
}

/// Where one test's runs leave everything: evidence, ledger, temporary files, and the cache unless
/// it is the user's.
pub(crate) struct Place {
    directory: tempfile::TempDir,
    own_cache: bool,
}

/// How a run ended, and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) code: Option<i32>,
}

impl Place {
    /// With an empty cache.
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(directory.path().join("tmp")).expect("makes");
        Self { directory, own_cache: true }
    }

    /// With the user's own cache, in which images and templates need not be made anew.
    pub(crate) fn with_images() -> Self {
        let mut place = Self::new();
        place.own_cache = false;
        place
    }

    /// A cache of its own with the images of the user's.
    pub(crate) fn with_linked_images() -> Self {
        let place = Self::new();
        let theirs = shakedown::host::cache_dir().expect("a cache");
        std::fs::create_dir(place.path("cache")).expect("makes");
        for part in ["images", "apt"] {
            std::fs::create_dir_all(theirs.join(part)).expect("makes");
            std::os::unix::fs::symlink(theirs.join(part), place.path("cache").join(part)).expect("links");
        }
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the place means to a test binary.
    pub(crate) fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        let mut variables = vec![
            ("BOOT_IMAGE_VM_LOG_ROOT", self.path("notes")),
            ("BOOT_IMAGE_VM_LEDGER_PATH", self.path("ledger.jsonl")),
            ("TMPDIR", self.path("tmp")),
            ("XDG_RUNTIME_DIR", self.path("tmp")),
        ];
        if self.own_cache {
            variables.push(("SHAKEDOWN_CACHE", self.path("cache")));
        }
        variables
    }

    /// An example with arguments, free of the caller's settings.
    pub(crate) fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(example(name));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in ["NEXTEST", "NEXTEST_RUN_ID", "RUST_BACKTRACE"] {
            command.env_remove(name);
        }
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let ours = ["SHAKEDOWN_", "BOOT_IMAGE_VM_"].iter().any(|prefix| text.starts_with(prefix));
            // Which cache and accelerator this host is tested with stays the caller's business.
            if ours && !["SHAKEDOWN_CACHE", "SHAKEDOWN_ACCEL"].contains(&&*text) {
                command.env_remove(name);
            }
        }
        command.envs(self.environment());
        command
    }

    /// Runs an example to its end.
    pub(crate) fn run(&self, name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Ended {
        let mut command = self.command(name, arguments);
        command.envs(variables.iter().copied());
        finish(command)
    }

    /// The ledger, of which every line must be sound, in the order of the names.
    pub(crate) fn records(&self) -> Vec<Record> {
        let path = self.path("ledger.jsonl");
        assert_eq!(ledger::check(&path).expect("a ledger"), []);
        let mut records: Vec<_> =
            ledger::read(&path).expect("a ledger").map(|record| record.expect("sound")).collect();
        records.sort_by(|a, b| a.scenario.cmp(&b.scenario));
        records
    }

    /// The ledger as `name: outcome`.
    pub(crate) fn outcomes(&self) -> Vec<String> {
        let line = |record: &Record| format!("{}: {}", record.scenario, record.outcome);
        self.records().iter().map(line).collect()
    }

    /// Processes that a run of this place started and that still run, by what they inherited.
    pub(crate) fn survivors(&self) -> Vec<String> {
        let inherited = format!("BOOT_IMAGE_VM_LOG_ROOT={}", self.path("notes").display());
        let ours = |process: &Path| {
            let environment = std::fs::read(process.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == inherited.as_bytes())
        };
        let processes = std::fs::read_dir("/proc").expect("reads").flatten().map(|entry| entry.path());
        processes
            .filter(|process| ours(process))
            .map(|process| {
                let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
                format!("{}: {}", process.display(), String::from_utf8_lossy(&line).replace('\0', " "))
            })
            .collect()
    }

    /// Fails unless all of them are gone in a moment: the kernel takes its time to end a process.
    pub(crate) fn is_deserted(&self) {
        wait("the processes of the run end", || self.survivors().is_empty());
    }

    /// Fails if machines have left files behind.
    pub(crate) fn is_tidy(&self) {
        for place in ["cache/machines", "tmp"] {
            let path = self.path(place);
            let left: Vec<_> = match std::fs::read_dir(&path) {
                Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
                Err(_) => Vec::new(),
            };
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What nix has built is read-only, and then only root could remove it.
        let mut command = Command::new("chmod");
        command.args(["-R", "u+w"]).arg(self.path("nix")).stderr(Stdio::null());
        let _ = command.status();
    }
}

/// Runs a command to its end; one that does not end is killed and fails the test.
pub(crate) fn finish(command: Command) -> Ended {
    let output = assert_cmd::Command::from_std(command).timeout(LIMIT).output().expect("runs");
    ended(output)
}

pub(crate) fn ended(output: Output) -> Ended {
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Ended { out: text(output.stdout), err: text(output.stderr), code: output.status.code() }
}

/// Waits for something that other processes do.
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Deadline::after(Duration::from_secs(60), "test");
    while !done() {
        assert!(!deadline.expired(), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("is alive");
}

/// A directory in which these programs are shell scripts, for the front of `PATH`.
pub(crate) fn programs(directory: &Path, scripts: &[(&str, &str)]) -> OsString {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(directory).expect("makes");
    for (name, body) in scripts {
        let path = directory.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("writes");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("is executable");
    }
    let mut path = directory.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

/// The project's default image, built now where it is not in the store yet.
pub(crate) fn debian() -> Image {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let environment = Environment::from_vars([], project).expect("no variables");
    let cache = shakedown::host::cache_dir().expect("a cache");
    let images = Images::new(cache, &environment, &None, &Default::default()).expect("a store");
    let deadline = Deadline::after(Duration::from_secs(1200), "test");
    images.get(None, None, &deadline, &Events::silent()).expect("the debian image")
}

/// A disk of which the boot sector writes `text` to the serial port and halts: as much of a machine
/// as it takes to see how it is watched, and up in a second.
pub(crate) fn boot_sector(file: &Path, text: &str) {
    // xor ax,ax; mov ds,ax; mov si,TEXT; mov dx,3f8h
    // next: lodsb; test al,al; jz halt; out dx,al; jmp next
    // halt: hlt; jmp halt
    let code: [u8; 21] = [
        0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x15, 0x7c, 0xba, 0xf8, 0x03, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb,
        0xf8, 0xf4, 0xeb, 0xfd,
    ];
    let mut disk = [&code, text.as_bytes()].concat();
    disk.resize(1 << 20, 0);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(file, disk).expect("writes");
}
