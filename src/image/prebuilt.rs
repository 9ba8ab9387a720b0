//! Images that are there already: ISO, raw or qcow2, and what their owner says about them.
//!
//! The format is read from the content. What cannot be read from it is in the image's table of the
//! settings or in `FILE.toml` beside it; without either, the file is taken for an image such as the
//! `debian` recipe builds.

use super::iso::{Iso, Platform};
use super::settings::known_keys;
use super::{Image, ImageFormat, KeyEntry, digest};
use crate::console::{Escalate, LoginProfile};
use crate::deadline::Deadline;
use crate::fault::Fault;
use crate::host::tools;
use crate::process;
use crate::vm::Firmware;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use toml::Table;

/// What the owner of an image says about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Description {
    user: Option<String>,
    password: Option<String>,
    /// A file that holds the password, relative to the description.
    password_file: Option<PathBuf>,
    /// An environment variable that holds it.
    password_env: Option<String>,
    escalate: Escalate,
    login_prompt: Option<String>,
    shell_prompt: Option<String>,
    /// `false`: nothing ever asks for a login on the serial console.
    login: Option<bool>,
    firmware: Option<Vec<FirmwareName>>,
    key: Option<KeyEntry>,
}

/// The keys of a description.
const KEYS: [&str; 10] = [
    "user",
    "password",
    "password_file",
    "password_env",
    "escalate",
    "login_prompt",
    "shell_prompt",
    "login",
    "firmware",
    "key",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FirmwareName {
    Bios,
    Uefi,
}

/// Opens the image in `file`. `table` is what the settings say about it, `digests` where digests of
/// large files are remembered.
///
/// # Errors
/// A host [`Fault`] that names the file and what is wrong with it or with its description.
pub(super) fn open(
    name: &str,
    file: &Path,
    table: &Table,
    base: &Path,
    digests: &Path,
    deadline: &Deadline,
) -> Result<Image> {
    let file = file.canonicalize().with_context(|| {
        Fault::host(format!("there is no image {}", file.display()))
            .fix("correct the path, or build one: `shakedown image build`")
    })?;
    let found = inspect(&file)
        .with_context(|| Fault::host(format!("{} cannot be used as an image", file.display())))?;
    let beside = PathBuf::from(format!("{}.toml", file.display()));
    let described = if table.is_empty() { read(&beside)? } else { describe(table.clone(), base)? };
    let Access { firmware, login, key } = described
        .access(found.firmware)
        .with_context(|| Fault::host(format!("the description of {} is wrong", file.display())))?;
    Ok(Image {
        name: name.to_owned(),
        recipe: None,
        digest: format!("sha256:{}", digest::of_file_cached(&file, digests, deadline)?),
        file,
        format: found.format,
        kernel: None,
        firmware,
        login,
        key,
        origin: None,
        guard: None,
    })
}

/// How one gets at the machine.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) firmware: Vec<Firmware>,
    pub(super) login: Option<LoginProfile>,
    pub(super) key: KeyEntry,
}

/// What `table` of the settings says of an ISO that was built, and what its boot entries say.
///
/// # Errors
/// A host [`Fault`] that names what is wrong with either.
pub(super) fn access(iso: &Path, table: &Table, base: &Path) -> Result<Access> {
    let found = inspect(iso)
        .and_then(|found| match found.format {
            ImageFormat::Iso => Ok(found),
            _ => bail!("it is no ISO 9660 image"),
        })
        .with_context(|| Fault::host(format!("{} cannot be used as an image", iso.display())))?;
    describe(table.clone(), base)?.access(found.firmware)
}

impl Description {
    /// `found`: the firmware that the content of the image speaks of.
    fn access(self, found: Vec<Firmware>) -> Result<Access> {
        let firmware = match self.firmware {
            Some(names) if names.is_empty() => bail!(Fault::host("`firmware` is empty")),
            Some(names) => names.into_iter().map(Firmware::from).collect(),
            None => found,
        };
        let profile = LoginProfile {
            user: self.user.unwrap_or_default(),
            password: self.password,
            escalate: self.escalate,
            login_prompt: self.login_prompt,
            shell_prompt: self.shell_prompt,
        };
        let login = (self.login != Some(false)).then_some(profile);
        let default_key = if login.is_some() { KeyEntry::Smbios } else { KeyEntry::None };
        Ok(Access { firmware, login, key: self.key.unwrap_or(default_key) })
    }
}

impl From<FirmwareName> for Firmware {
    fn from(name: FirmwareName) -> Self {
        match name {
            FirmwareName::Bios => Self::Bios,
            FirmwareName::Uefi => Self::Uefi,
        }
    }
}

fn read(beside: &Path) -> Result<Description> {
    let text = match fs::read_to_string(beside) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Description::default()),
        Err(error) => {
            return Err(error).with_context(|| Fault::host(format!("cannot read {}", beside.display())));
        }
    };
    let table = text.parse::<Table>().context("it is not TOML");
    table
        .and_then(|table| describe(table, beside.parent().unwrap_or(Path::new("."))))
        .with_context(|| Fault::host(format!("{} is wrong", beside.display())))
}

/// Checks a description; everything but the secret's content, which is looked up.
fn describe(table: Table, base: &Path) -> Result<Description> {
    known_keys(&table, &KEYS)?;
    let mut described: Description = table.try_into()?;
    let sources =
        [described.password.is_some(), described.password_file.is_some(), described.password_env.is_some()];
    if sources.into_iter().filter(|given| *given).count() > 1 {
        bail!("`password`, `password_file` and `password_env` exclude each other");
    }
    if let Some(file) = &described.password_file {
        let path = base.join(file);
        let text = fs::read_to_string(&path)
            .with_context(|| Fault::host(format!("`password_file`: cannot read {}", path.display())))?;
        described.password = Some(text.trim_end_matches(['\r', '\n']).to_owned());
    }
    if let Some(variable) = &described.password_env {
        let value = std::env::var(variable);
        described.password =
            Some(value.with_context(|| Fault::host(format!("`password_env`: {variable} is not set")))?);
    }
    if described.login == Some(false) && described.key == Some(KeyEntry::Console) {
        bail!("`key = \"console\"` needs a login, and `login` is false");
    }
    for pattern in [&described.login_prompt, &described.shell_prompt].into_iter().flatten() {
        crate::console::Regex::new(pattern)
            .with_context(|| format!("`{pattern}` is not a regular expression"))?;
    }
    Ok(described)
}

/// What the table of an image may say of it, besides the keys that say `whence` it comes.
///
/// # Errors
/// Names the key.
pub(super) fn check(table: &Table, whence: &[&str]) -> Result<()> {
    known_keys(table, &[whence, &KEYS].concat())
}

/// What a file's content says.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    format: ImageFormat,
    firmware: Vec<Firmware>,
}

fn inspect(path: &Path) -> Result<Found> {
    let mut file = File::open(path).context("it cannot be read")?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        bail!("it is not a regular file");
    }
    let mut head = Vec::new();
    file.by_ref().take(HEAD).read_to_end(&mut head)?;
    if head.is_empty() {
        bail!("it is empty");
    }
    if head.starts_with(b"QFI\xfb") {
        qcow2(&head, meta.len())?;
        return Ok(Found { format: ImageFormat::Qcow2, firmware: vec![Firmware::Bios, Firmware::Uefi] });
    }
    // First ISO, as a hybrid one has a partition table as well.
    if head.get(32769..32774) == Some(b"CD001") {
        file.seek(SeekFrom::Start(0))?;
        return Ok(Found { format: ImageFormat::Iso, firmware: iso(file)? });
    }
    if head.get(510..512) == Some(&[0x55, 0xaa]) {
        return Ok(Found { format: ImageFormat::Raw, firmware: vec![Firmware::Bios, Firmware::Uefi] });
    }
    bail!("it is neither ISO 9660, qcow2 nor a disk with a partition table, but {}", guess(&head))
}

/// Up to the first volume descriptor of an ISO.
const HEAD: u64 = 34 << 10;

fn guess(head: &[u8]) -> &'static str {
    let signs: [(&[u8], &str); 11] = [
        (b"\x1f\x8b", "a gzip file: unpack it first"),
        (b"\xfd7zXZ\0", "an xz file: unpack it first"),
        (b"\x28\xb5\x2f\xfd", "a zstd file: unpack it first"),
        (b"BZh", "a bzip2 file: unpack it first"),
        (b"PK\x03\x04", "a zip file: unpack it first"),
        (b"KDMV", "a VMDK disk: convert it with `qemu-img convert -O qcow2`"),
        (b"conectix", "a VHD disk: convert it with `qemu-img convert -O qcow2`"),
        (b"vhdxfile", "a VHDX disk: convert it with `qemu-img convert -O qcow2`"),
        (b"<<< ", "a VDI disk: convert it with `qemu-img convert -O qcow2`"),
        (b"hsqs", "a bare squashfs"),
        (b"\x7fELF", "a program"),
    ];
    let text =
        |head: &[u8]| head.iter().take(256).all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    match signs.iter().find(|(sign, _)| head.starts_with(sign)) {
        Some((_, what)) => what,
        None if head.iter().all(|byte| *byte == 0) => "a file that begins with zeros",
        None if text(head) => "text",
        None => "something unknown",
    }
}

fn iso(file: File) -> Result<Vec<Firmware>> {
    let mut iso = Iso::new(file)?;
    let firmware: Vec<_> = iso
        .boot_entries()?
        .iter()
        .filter_map(|entry| match entry.platform {
            Platform::Bios => Some(Firmware::Bios),
            Platform::Efi => Some(Firmware::Uefi),
            Platform::Other(_) => None,
        })
        .collect();
    if firmware.is_empty() {
        bail!("it is an ISO 9660 image that neither BIOS nor UEFI can boot: no El Torito entry");
    }
    Ok(firmware)
}

/// Checks a qcow2 header: <https://www.qemu.org/docs/master/interop/qcow2.html>.
///
/// One that refers to other files is refused: QEMU would open whatever path it holds.
fn qcow2(head: &[u8], size: u64) -> Result<()> {
    if head.len() < 72 {
        bail!("it is a truncated qcow2 image of {size} bytes");
    }
    let be32 = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
    let version = be32(4);
    if !matches!(version, 2 | 3) {
        bail!("it is a qcow2 image of version {version}, and 2 or 3 is needed");
    }
    if version == 3 && head.len() < 104 {
        bail!("it is a truncated qcow2 image of {size} bytes");
    }
    if be64(8) != 0 {
        bail!(
            Fault::host("it is a qcow2 image with a backing file")
                .fix("make it stand alone: `qemu-img convert -O qcow2 OLD NEW`")
        );
    }
    const DIRTY_OR_CORRUPT: u64 = 0b11;
    const EXTERNAL_DATA: u64 = 0b100;
    let features = if version == 3 { be64(72) } else { 0 };
    if features & EXTERNAL_DATA != 0 {
        bail!(
            Fault::host("it is a qcow2 image whose data are in another file")
                .fix("make it stand alone: `qemu-img convert -O qcow2 OLD NEW`")
        );
    }
    if features & DIRTY_OR_CORRUPT != 0 {
        bail!(
            Fault::host("it is a qcow2 image that was not closed, or is corrupt")
                .fix("repair it: `qemu-img check -r all FILE`")
        );
    }
    if be32(32) != 0 {
        bail!("it is an encrypted qcow2 image");
    }
    let cluster_bits = be32(20);
    if !(9..=21).contains(&cluster_bits) || be64(24) == 0 {
        bail!("it is a qcow2 image with an impossible header");
    }
    let l1_end = be64(40).saturating_add(u64::from(be32(36)) * 8);
    let refcounts_end = be64(48).saturating_add(u64::from(be32(56)) << cluster_bits);
    if l1_end.max(refcounts_end) > size {
        bail!(
            "it is a truncated qcow2 image: its tables end at byte {}, the file at byte {size}",
            l1_end.max(refcounts_end)
        );
    }
    Ok(())
}

/// Makes a cloud-init seed at `out` that opens root's and the default user's account to `key`, a
/// public key line: <https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html>.
///
/// # Errors
/// A host [`Fault`] when xorriso is missing or fails.
pub fn nocloud_seed(key: &str, out: &Path, deadline: &Deadline) -> Result<()> {
    let cannot = || Fault::host(format!("cannot make the cloud-init seed {}", out.display()));
    let dir = tempfile::tempdir().with_context(cannot)?;
    // cloud-init acts once per instance, and each seed is for a new one.
    let instance = digest::hex(&<sha2::Sha256 as sha2::Digest>::digest(format!("{key}{}", out.display())));
    fs::write(dir.path().join("meta-data"), format!("instance-id: shakedown-{}\n", &instance[..16]))
        .with_context(cannot)?;
    fs::write(dir.path().join("user-data"), user_data(key)).with_context(cannot)?;
    let mut command = Command::new(tools::require("xorriso")?);
    command.args(["-as", "mkisofs", "-quiet", "-V", "cidata", "-J", "-R", "-o"]).arg(out).arg(dir.path());
    process::output(command, deadline).map(drop).with_context(cannot)
}

fn user_data(key: &str) -> String {
    // JSON text is YAML text, whatever is in the key's comment.
    let key = serde_json::Value::from(key.trim());
    format!("#cloud-config\ndisable_root: false\nssh_authorized_keys:\n  - {key}\n")
}

#[cfg(test)]
mod tests;
