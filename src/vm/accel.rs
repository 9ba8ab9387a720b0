//! Which accelerator machines run under, and why.
//!
//! Owns the probe and its cached answer. `kvm` is the answer only when a guest of ours ran under it
//! through long mode, a trap, a page fault and user mode: there are hosts on which `/dev/kvm` opens,
//! virtual CPUs are made, and a Linux guest hangs for ever all the same.

mod guest;

use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::{self, setting, tools};
use crate::process;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// The CPU model under KVM. The probe uses it too: a model that the host cannot give is one more way
/// for KVM not to work.
const KVM_MODEL: &str = "max";
/// The CPU model under TCG: x86-64-v2 without virtualisation. `max` costs a Linux guest a second or
/// two of its boot, for vector code that is slow to translate.
const TCG_MODEL: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+rdrand,-svm";

/// Overrides the probe: `tcg` or `kvm`.
pub const VARIABLE: &str = "SHAKEDOWN_ACCEL";

const DEVICE: &str = "/dev/kvm";
/// A guest that works needs milliseconds; one that does not, never ends.
const PROBE_TIME: Duration = Duration::from_secs(5);

/// How QEMU runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Hardware virtualisation.
    Kvm,
    /// Translation in software: works everywhere, several times slower.
    Tcg,
}

/// The accelerator of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accel {
    /// What to give to `-accel`.
    pub kind: Kind,
    /// Why this one, as a sentence for a person.
    pub reason: String,
    /// What would make the better one available, where that is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fix: Option<String>,
}

impl Kind {
    /// As QEMU writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// The CPU model for `-cpu`.
    pub fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => KVM_MODEL,
            Self::Tcg => TCG_MODEL,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Accel {
    fn tcg(reason: impl Into<String>) -> Self {
        Self { kind: Kind::Tcg, reason: reason.into(), fix: None }
    }
}

/// The accelerator to use: the override, else the cached answer, else a probe of a few seconds.
///
/// # Errors
/// A bad `SHAKEDOWN_ACCEL`, no QEMU, or an unusable cache directory. A KVM that does not work is
/// an answer, not an error.
pub fn detect(deadline: &Deadline) -> Result<Accel> {
    decide(deadline, true)
}

/// As [`detect`], but probes although an answer is cached, and caches the new one.
///
/// # Errors
/// As [`detect`].
pub fn detect_afresh(deadline: &Deadline) -> Result<Accel> {
    decide(deadline, false)
}

/// What `SHAKEDOWN_ACCEL` says, if anything.
///
/// # Errors
/// [`setting::Invalid`] when it is neither `tcg` nor `kvm`.
pub fn chosen() -> Result<Option<Kind>> {
    let name = setting::choice(VARIABLE, &["tcg", "kvm"])?;
    Ok(name.map(|name| if name == "kvm" { Kind::Kvm } else { Kind::Tcg }))
}

fn decide(deadline: &Deadline, trust_cache: bool) -> Result<Accel> {
    if let Some(kind) = chosen()? {
        return Ok(Accel { kind, reason: format!("{VARIABLE}={kind}"), fix: None });
    }
    if let Some(obstacle) = obstacle(Path::new(DEVICE)) {
        return Ok(obstacle);
    }
    let qemu = tools::require("qemu-system-x86_64")?;
    let cache = host::cache_dir()?.join("accel.json");
    let key = Key::of_host(&qemu)?;
    if trust_cache && let Some(accel) = recall(&cache, &key) {
        return Ok(accel);
    }
    let probe = probe(&qemu, Kind::Kvm, &deadline.within(PROBE_TIME, "accelerator probe"))?;
    if !probe.complete() {
        // A probe cut short by Ctrl-C or by the caller's own deadline proves nothing.
        deadline.check()?;
    }
    let accel = judge(&probe);
    remember(&cache, key, &accel)?;
    Ok(accel)
}

/// What can be seen without running anything.
fn obstacle(device: &Path) -> Option<Accel> {
    if !cfg!(target_arch = "x86_64") {
        return Some(Accel::tcg(format!("this host is {}, the machines are x86_64", std::env::consts::ARCH)));
    }
    match std::fs::File::options().read(true).write(true).open(device) {
        Ok(_) => None,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Some(Accel {
            fix: Some("sudo usermod --append --groups kvm $USER, then log in again".into()),
            ..Accel::tcg(format!("no permission to open {}", device.display()))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Some(Accel::tcg(format!("this host has no {}", device.display())))
        }
        Err(error) => Some(Accel::tcg(format!("{} cannot be opened: {error}", device.display()))),
    }
}

/// How far the probe guest came, and what QEMU said meanwhile.
#[derive(Debug)]
struct Probe {
    /// The letters the guest wrote.
    trail: Vec<u8>,
    /// QEMU's first complaint.
    complaint: Option<String>,
}

impl Probe {
    fn complete(&self) -> bool {
        self.trail.iter().copied().eq(guest::STAGES.iter().map(|(letter, _)| *letter))
    }
}

fn judge(probe: &Probe) -> Accel {
    if probe.complete() {
        return Accel { kind: Kind::Kvm, reason: "the probe guest ran under KVM".into(), fix: None };
    }
    let reached = guest::STAGES.iter().zip(&probe.trail).take_while(|((letter, _), seen)| letter == *seen);
    let place = match reached.last() {
        Some(((_, name), _)) => format!("reached {name} and no further"),
        None => "did not start".into(),
    };
    let complaint = probe.complaint.as_ref().map(|text| format!(" ({text})")).unwrap_or_default();
    Accel::tcg(format!("KVM does not work here: the probe guest {place}{complaint}"))
}

enum Heard {
    Guest(Vec<u8>),
    Qemu(Vec<u8>),
}

/// Runs the probe guest until it is through, QEMU gives up, or the time is up.
fn probe(qemu: &Path, kind: Kind, deadline: &Deadline) -> Result<Probe> {
    let mut rom = tempfile::NamedTempFile::new().context(Fault::host("cannot make a temporary file"))?;
    rom.write_all(&guest::rom()).context(Fault::host("cannot write the probe guest"))?;
    let mut command = Command::new(qemu);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "16"])
        .args(["-machine", "q35", "-accel", kind.as_str(), "-cpu", kind.cpu(), "-debugcon", "stdio", "-bios"])
        .arg(rom.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = process::spawn(command)?;
    let (_, stdout, stderr) = child.pipes();
    let (sender, inbox) = mpsc::channel();
    listen(stdout, sender.clone(), Heard::Guest);
    listen(stderr, sender, Heard::Qemu);

    let mut probe = Probe { trail: Vec::new(), complaint: None };
    let mut said = Vec::new();
    while !probe.complete() && !probe.hopeless() {
        match inbox.recv_timeout(deadline.slice(Duration::from_millis(100))) {
            Ok(Heard::Guest(bytes)) => probe.trail.extend(bytes),
            Ok(Heard::Qemu(bytes)) => {
                said.extend(bytes);
                probe.complaint = complaint(&said);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) if deadline.expired() => break,
            Err(mpsc::RecvTimeoutError::Timeout) => deadline.check()?,
        }
    }
    Ok(probe)
}

impl Probe {
    /// QEMU stops the guest after this message, but does not exit.
    fn hopeless(&self) -> bool {
        self.complaint.as_ref().is_some_and(|text| text.contains("KVM internal error"))
    }
}

fn listen(
    pipe: Option<impl Read + Send + 'static>,
    sender: mpsc::Sender<Heard>,
    wrap: impl Fn(Vec<u8>) -> Heard + Send + 'static,
) {
    let Some(mut pipe) = pipe else { return };
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if sender.send(wrap(buffer[..count].to_vec())).is_err() {
                break;
            }
        }
    });
}

/// The first whole line of QEMU's that is not a mere warning, without the program's name.
fn complaint(said: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(said);
    let whole = &text[..=text.rfind('\n')?];
    let line = whole.lines().find(|line| !line.trim().is_empty() && !line.contains(": warning: "))?;
    let line = line.trim();
    Some(
        line.split_once(": ").filter(|(name, _)| name.contains("qemu")).map_or(line, |(_, rest)| rest).into(),
    )
}

/// What an answer depends on. A change of any of it asks for a new probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    kernel: String,
    qemu: PathBuf,
    qemu_size: u64,
    qemu_mtime: i64,
    probe: String,
}

impl Key {
    fn of_host(qemu: &Path) -> Result<Self> {
        let path = qemu.canonicalize().unwrap_or_else(|_| qemu.to_owned());
        let meta =
            path.metadata().with_context(|| Fault::host(format!("cannot look at {}", path.display())))?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .context(Fault::host("cannot read the boot id of this host"))?;
        Ok(Self {
            boot_id: boot_id.trim().into(),
            kernel: host::kernel_release(),
            qemu: path,
            qemu_size: meta.size(),
            qemu_mtime: meta.mtime(),
            probe: format!("{:x}", Sha256::digest([KVM_MODEL.as_bytes(), &guest::rom()].concat())),
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Cached {
    key: Key,
    accel: Accel,
}

/// The cached answer, when there is one for exactly this key. A damaged file is no answer.
fn recall(file: &Path, key: &Key) -> Option<Accel> {
    let cached: Cached = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (cached.key == *key).then_some(cached.accel)
}

fn remember(file: &Path, key: Key, accel: &Accel) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let dir = file.parent().unwrap_or(Path::new("."));
        let mut temporary = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer_pretty(&mut temporary, &Cached { key, accel: accel.clone() })?;
        temporary.write_all(b"\n")?;
        temporary.persist(file)?;
        Ok(())
    };
    write().with_context(|| Fault::host(format!("cannot write {}", file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline() -> Deadline {
        Deadline::after(Duration::from_secs(60), "test")
    }

    fn qemu() -> PathBuf {
        tools::require("qemu-system-x86_64").expect("these tests need QEMU")
    }

    fn key() -> Key {
        Key::of_host(Path::new("/bin/sh")).expect("a key")
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_probe_guest_is_right_since_it_runs_to_its_end_under_tcg() {
        let probe = probe(&qemu(), Kind::Tcg, &deadline()).expect("QEMU runs");
        assert!(probe.complete(), "{probe:?}");
        assert_eq!(probe.complaint, None);
    }

    #[test]
    fn a_guest_that_stops_on_the_way_means_tcg_and_says_where() {
        let probe = Probe { trail: b"RPL".into(), complaint: Some("KVM internal error. Suberror: 1".into()) };
        assert!(probe.hopeless());
        let accel = judge(&probe);
        assert_eq!(accel.kind, Kind::Tcg);
        assert_eq!(
            accel.reason,
            "KVM does not work here: the probe guest reached long mode and no further \
             (KVM internal error. Suberror: 1)"
        );
        let accel = judge(&Probe { trail: Vec::new(), complaint: None });
        assert_eq!(accel.reason, "KVM does not work here: the probe guest did not start");
        let whole: Vec<u8> = guest::STAGES.iter().map(|(letter, _)| *letter).collect();
        assert_eq!(judge(&Probe { trail: whole, complaint: None }).kind, Kind::Kvm);
    }

    #[test]
    fn a_qemu_that_cannot_start_is_an_answer_with_its_own_words() {
        let dir = tempfile::tempdir().expect("temp dir");
        let fake = host::tools::tests::script(
            dir.path(),
            "qemu-system-x86_64",
            "echo 'qemu-system-x86_64: warning: dull' >&2\n\
             echo 'qemu-system-x86_64: failed to initialize kvm: Permission denied' >&2; exit 1",
        );
        let accel = judge(&probe(&fake, Kind::Kvm, &deadline()).expect("it ran"));
        assert_eq!(accel.kind, Kind::Tcg);
        assert!(
            accel.reason.ends_with("did not start (failed to initialize kvm: Permission denied)"),
            "{accel:?}"
        );
    }

    #[test]
    fn a_guest_that_hangs_is_ended_at_the_deadline() {
        let dir = tempfile::tempdir().expect("temp dir");
        let fake = host::tools::tests::script(dir.path(), "qemu", "printf RP; exec sleep 1000");
        let soon = Deadline::after(Duration::from_millis(500), "test");
        let probe = probe(&fake, Kind::Kvm, &soon).expect("an answer");
        assert!(!probe.complete() && soon.expired(), "{probe:?}");
    }

    #[test]
    fn complaints_are_whole_lines_and_no_warnings() {
        assert_eq!(complaint(b"KVM internal er"), None);
        assert_eq!(complaint(b"qemu-system-x86_64: warning: host lacks pni\n\n"), None);
        let said = b"qemu-system-x86_64: warning: x\nKVM internal error. Suberror: 1\nextra data\n";
        assert_eq!(complaint(said).as_deref(), Some("KVM internal error. Suberror: 1"));
    }

    #[test]
    fn missing_and_closed_devices_have_their_own_reasons() {
        let dir = tempfile::tempdir().expect("temp dir");
        let missing = obstacle(&dir.path().join("kvm")).expect("an obstacle");
        assert!(missing.reason.starts_with("this host has no "), "{missing:?}");
        let odd = obstacle(dir.path()).expect("a directory is no device");
        assert!(odd.reason.contains("cannot be opened"), "{odd:?}");
    }

    #[test]
    fn an_answer_is_remembered_for_its_key_only() {
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("accel.json");
        let accel = Accel::tcg("because");
        assert_eq!(recall(&file, &key()), None, "nothing yet");
        remember(&file, key(), &accel).expect("is written");
        assert_eq!(recall(&file, &key()), Some(accel));
        let others: [fn(&mut Key); 6] = [
            |k| k.boot_id.push('x'),
            |k| k.kernel.push('x'),
            |k| k.qemu.push("x"),
            |k| k.qemu_size += 1,
            |k| k.qemu_mtime += 1,
            |k| k.probe.push('x'),
        ];
        for (index, change) in others.into_iter().enumerate() {
            let mut other = key();
            change(&mut other);
            assert_eq!(recall(&file, &other), None, "field {index}");
        }
        std::fs::write(&file, "{").expect("is damaged");
        assert_eq!(recall(&file, &key()), None, "damaged");
    }
}
