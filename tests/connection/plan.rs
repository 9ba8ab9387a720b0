//! `shakedown plan run --on ssh:HOST`, against a real SSH server and loop devices of this host.

use super::sshd::{Sshd, user};
use assert_cmd::Command;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

/// A loop device over a file that goes with it.
struct Loop {
    device: String,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        file.as_file().set_len(64 << 20).expect("long enough");
        let device = output("losetup", &["--find", "--show", &file.path().to_string_lossy()]);
        Self { device, _file: file }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        output("losetup", &["-d", &self.device]);
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let out = std::process::Command::new(program).args(arguments).output().expect(program);
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// The status and all that is said.
fn plan_run(server: &Sshd, cache: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let on = format!("ssh:root@{}", server.addr);
    let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
    command
        .env("SHAKEDOWN_CACHE", cache)
        .args(["plan", "run", "--on", &on, "--timeout", "2m"])
        .args(arguments);
    let out = command.output().expect("runs");
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// A cache whose key is the one that the server takes.
fn cache(server: &Sshd) -> tempfile::TempDir {
    let cache = tempfile::tempdir().expect("temp dir");
    fs::set_permissions(cache.path(), fs::Permissions::from_mode(0o700)).expect("set");
    let keys = cache.path().join("keys");
    fs::DirBuilder::new().mode(0o700).create(&keys).expect("made");
    for file in ["id_ed25519", "id_ed25519.pub"] {
        fs::copy(server.dir.path().join("client").join(file), keys.join(file)).expect("copied");
    }
    cache
}

#[test]
fn a_layout_is_made_cleaned_and_judged_on_a_host_and_its_own_disks_are_safe() {
    if user() != "root" {
        eprintln!("not tested: loop devices are root's");
        return;
    }
    let server = Sshd::start();
    let cache = cache(&server);
    let run = |arguments: &[&str]| plan_run(&server, cache.path(), arguments);

    let root = output("findmnt", &["-no", "SOURCE", "/"]);
    if root.starts_with("/dev/") {
        let (status, said) = run(&["ext4", "--disks", &root, "--confirm", &root]);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains("is refused"), "{said}");
    }

    let disk = Loop::new();
    let device = &*disk.device;
    let (status, said) = run(&["ext4", "--disks", device]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("was not confirmed") && said.contains(&format!("--confirm {device}")), "{said}");

    let named = ["ext4", "--disks", device, "--confirm", device];
    for action in ["wipe-signatures", "overwrite"] {
        let (status, said) = run(&[&named[..], &["--action", action]].concat());
        assert_eq!(status, Some(0), "{said}");
        assert!(said.contains("gone") && said.contains("not resurrectable"), "{said}");
    }

    // A cleaner that does nothing leaves it mounted, and so in nobody's hands but their own.
    let (status, said) = run(&[&named[..], &["--cleaner", "true"]].concat());
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("failed") && said.contains("residue-marker"), "{said}");
    let (status, said) = run(&named);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains(&format!("{device} is mounted")), "{said}");
    output("umount", &["--all-targets", device]);
}
