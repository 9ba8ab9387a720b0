//! The SSH identity: an ed25519 key pair that is made once and kept in a directory.
//!
//! Owns the files, their permissions and OpenSSH's private-key format. Does not authenticate.
//!
//! OpenSSL, which libssh2 signs with anyway, makes the key; only the container is written here, so
//! that neither `ssh-keygen` nor a second crypto library is needed.

use crate::fault::Fault;
use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use openssl::pkey::{Id, PKey};
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};
use std::fs::{DirBuilder, File, Metadata};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const ALGORITHM: &str = "ssh-ed25519";
const COMMENT: &str = "shakedown";
const FILE: &str = "id_ed25519";
const ARMOR: (&str, &str) = ("-----BEGIN OPENSSH PRIVATE KEY-----", "-----END OPENSSH PRIVATE KEY-----");
/// Of OpenSSH's `PROTOCOL.key`: every unencrypted private key starts like this.
const MAGIC: &[u8] = b"openssh-key-v1\0";

/// An ed25519 key pair without passphrase. Its `Debug` form shows the public half only.
#[derive(Clone)]
pub struct KeyPair {
    seed: [u8; 32],
    public: [u8; 32],
    /// Where the private half is kept.
    file: Option<PathBuf>,
}

impl KeyPair {
    /// The key pair kept in `dir` as `id_ed25519` and `id_ed25519.pub`, made there if there is none.
    ///
    /// Safe to call from several processes at once: all get the same pair.
    ///
    /// # Errors
    /// A host [`Fault`] with the fix when the directory or the private key belongs to another user
    /// or is open to others, and when the file is not such a key.
    pub fn load_or_create(dir: &Path) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| Fault::host(format!("cannot create {}", dir.display())))?;
        let meta = dir
            .symlink_metadata()
            .with_context(|| Fault::host(format!("cannot inspect {}", dir.display())))?;
        check_private(dir, &meta, "700")?;
        let path = dir.join(FILE);
        let mut pair = match Self::load(&path)? {
            Some(pair) => pair,
            None => Self::create(&path)?,
        };
        let public = dir.join(format!("{FILE}.pub"));
        if !public.exists() {
            // Only a convenience for people: the private file holds both halves.
            publish(&public, &pair.public_line(), false)?;
        }
        pair.file = Some(path);
        Ok(pair)
    }

    /// A new pair that is in no file.
    ///
    /// # Errors
    /// A host [`Fault`] when OpenSSL cannot.
    pub fn generate() -> Result<Self> {
        let make = || -> Result<Self> {
            let key = PKey::generate_ed25519()?;
            Ok(Self {
                seed: key.raw_private_key()?.as_slice().try_into()?,
                public: key.raw_public_key()?.as_slice().try_into()?,
                file: None,
            })
        };
        make().context(Fault::host("cannot generate an ed25519 key"))
    }

    fn load(path: &Path) -> Result<Option<Self>> {
        let nofollow = OFlags::NOFOLLOW.bits().cast_signed();
        let mut file = match File::options().read(true).custom_flags(nofollow).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).context(Fault::host(format!("cannot read {}", path.display())));
            }
        };
        let cannot = || Fault::host(format!("cannot read {}", path.display()));
        check_private(path, &file.metadata().with_context(cannot)?, "600")?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(cannot)?;
        match Self::from_openssh(&text) {
            Some(pair) => Ok(Some(pair)),
            None => Err(Fault::host(format!(
                "{} is not an unencrypted ed25519 key in OpenSSH's format",
                path.display()
            ))
            .fix(format!("rm {}; a new key is made at the next start", process_quote(path)))
            .into()),
        }
    }

    fn create(path: &Path) -> Result<Self> {
        let pair = Self::generate()?;
        if publish(path, &pair.private_openssh(), true)? {
            return Ok(pair);
        }
        // Another process was faster: its key is the one in use.
        Self::load(path)?.with_context(|| Fault::host(format!("{} vanished", path.display())))
    }

    /// The file of the private half, for other SSH clients; `None` for a pair that is in no file.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The line for `authorized_keys`, with its newline.
    pub fn public_line(&self) -> String {
        format!("{ALGORITHM} {} {COMMENT}\n", STANDARD.encode(self.public_blob()))
    }

    /// The line that `ssh-keygen -lf` prints: `256 SHA256:... shakedown (ED25519)`.
    pub fn fingerprint(&self) -> String {
        let digest = STANDARD_NO_PAD.encode(Sha256::digest(self.public_blob()));
        format!("256 SHA256:{digest} {COMMENT} (ED25519)")
    }

    /// The private key as OpenSSH and libssh2 read it (OpenSSH's `PROTOCOL.key`). A secret.
    pub fn private_openssh(&self) -> String {
        // Twice the same number, by which a reader of an encrypted key sees a wrong passphrase.
        let mut inner = vec![0; 8];
        string(&mut inner, ALGORITHM.as_bytes());
        string(&mut inner, &self.public);
        string(&mut inner, &[self.seed, self.public].concat());
        string(&mut inner, COMMENT.as_bytes());
        inner.extend((1..=8).take((8 - inner.len() % 8) % 8));
        let mut outer = MAGIC.to_vec();
        string(&mut outer, b"none"); // cipher
        string(&mut outer, b"none"); // key derivation
        string(&mut outer, b""); // its options
        outer.extend(1_u32.to_be_bytes()); // number of keys
        string(&mut outer, &self.public_blob());
        string(&mut outer, &inner);
        let body = STANDARD.encode(outer);
        let lines: Vec<_> = body.as_bytes().chunks(70).map(String::from_utf8_lossy).collect();
        format!("{}\n{}\n{}\n", ARMOR.0, lines.join("\n"), ARMOR.1)
    }

    fn from_openssh(text: &str) -> Option<Self> {
        let body = text.trim().strip_prefix(ARMOR.0)?.strip_suffix(ARMOR.1)?;
        let bytes = STANDARD.decode(body.split_whitespace().collect::<String>()).ok()?;
        let mut outer = Reader(bytes.strip_prefix(MAGIC)?);
        (outer.string()? == b"none" && outer.string()? == b"none" && outer.string()?.is_empty())
            .then_some(())?;
        (outer.number()? == 1).then_some(())?;
        outer.string()?;
        let mut inner = Reader(outer.string()?);
        (inner.number()? == inner.number()?).then_some(())?;
        (inner.string()? == ALGORITHM.as_bytes()).then_some(())?;
        let public: [u8; 32] = inner.string()?.try_into().ok()?;
        let seed: [u8; 32] = inner.string()?.get(..32)?.try_into().ok()?;
        let key = PKey::private_key_from_raw_bytes(&seed, Id::ED25519).ok()?;
        (key.raw_public_key().ok()? == public).then_some(Self { seed, public, file: None })
    }

    fn public_blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        string(&mut blob, ALGORITHM.as_bytes());
        string(&mut blob, &self.public);
        blob
    }
}

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyPair({})", self.fingerprint())
    }
}

/// Appends an SSH `string` (RFC 4251, section 5): a length, then the bytes.
fn string(to: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).expect("key material is far below 4 GiB");
    to.extend(length.to_be_bytes());
    to.extend(bytes);
}

/// Reads what [`string`] writes; `None` where the bytes end early.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn number(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*head))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }
}

/// Refuses what others could read or have put there.
fn check_private(path: &Path, meta: &Metadata, mode: &str) -> Result<()> {
    let quoted = process_quote(path);
    if meta.is_symlink() {
        return Err(Fault::host(format!("{} is a symbolic link", path.display()))
            .fix(format!("rm {quoted}"))
            .into());
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(Fault::host(format!("{} belongs to user {}, not to you", path.display(), meta.uid()))
            .fix(format!("remove it, or: sudo chown \"$(id -u)\" {quoted}"))
            .into());
    }
    if meta.mode() & 0o077 != 0 {
        let bits = meta.mode() & 0o777;
        return Err(Fault::host(format!("{} is open to others (mode {bits:o})", path.display()))
            .fix(format!("chmod {mode} {quoted}"))
            .into());
    }
    Ok(())
}

/// Writes a whole new file; false when there is one already. A private one has mode 0600.
fn publish(path: &Path, text: &str, private: bool) -> Result<bool> {
    let write = || -> std::io::Result<bool> {
        let mode = if private { 0o600 } else { 0o644 };
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))
            .tempfile_in(dir)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(path) {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.error),
        }
    };
    write().with_context(|| Fault::host(format!("cannot write {}", path.display())))
}

fn process_quote(path: &Path) -> String {
    crate::process::quote(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    }

    fn private_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temp dir");
        chmod(dir.path(), 0o700);
        dir
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().expect("exists").mode() & 0o777
    }

    #[test]
    fn a_pair_is_made_once_and_loaded_after_that() {
        let dir = tempfile::tempdir().expect("temp dir");
        let dir = dir.path().join("a/keys");
        let first = KeyPair::load_or_create(&dir).expect("made");
        let second = KeyPair::load_or_create(&dir).expect("loaded");
        assert_eq!(first.private_openssh(), second.private_openssh());
        assert_eq!((mode(&dir), mode(&dir.join(FILE))), (0o700, 0o600));
        let other = KeyPair::generate().expect("made");
        assert_ne!(first.public_line(), other.public_line(), "keys are random");
    }

    #[test]
    fn ssh_keygen_reads_the_same_key() {
        let dir = private_dir();
        let pair = KeyPair::load_or_create(dir.path()).expect("made");
        let keygen = |args: &[&str]| {
            let out = Command::new("ssh-keygen")
                .args(args)
                .arg(dir.path().join(FILE))
                .output()
                .expect("ssh-keygen runs: apt-get install -y openssh-client");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8(out.stdout).expect("text")
        };
        assert_eq!(keygen(&["-lf"]).trim(), pair.fingerprint());
        // Without the .pub file it derives the public half from the private one.
        std::fs::remove_file(dir.path().join("id_ed25519.pub")).expect("removed");
        assert_eq!(keygen(&["-yf"]).trim(), pair.public_line().trim());
    }

    #[test]
    fn eight_at_once_get_one_key() {
        let dir = private_dir();
        let start = std::sync::Barrier::new(8);
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        KeyPair::load_or_create(dir.path()).expect("made or loaded").public_line()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().expect("no panic")).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
        let files = std::fs::read_dir(dir.path()).expect("readable").count();
        assert_eq!(files, 2, "no temporary file stays");
    }

    #[test]
    fn lax_permissions_are_refused_with_the_fix() {
        let dir = private_dir();
        KeyPair::load_or_create(dir.path()).expect("made");
        let refused = || KeyPair::load_or_create(dir.path()).expect_err("refused").to_string();
        chmod(&dir.path().join(FILE), 0o640);
        let text = refused();
        assert!(text.contains("mode 640") && text.contains("Fix: chmod 600"), "{text}");
        chmod(dir.path(), 0o755);
        let text = refused();
        assert!(text.contains("mode 755") && text.contains("Fix: chmod 700"), "{text}");
    }

    #[test]
    fn a_link_and_a_foreign_file_are_refused() {
        let dir = private_dir();
        let path = dir.path().join(FILE);
        std::os::unix::fs::symlink("/etc/hostname", &path).expect("linked");
        assert!(KeyPair::load_or_create(dir.path()).is_err(), "a symbolic link is not followed");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "not a key").expect("written");
        chmod(&path, 0o600);
        let text = KeyPair::load_or_create(dir.path()).expect_err("not a key").to_string();
        assert!(text.contains("not an unencrypted ed25519 key") && text.contains("Fix: rm "), "{text}");
    }

    #[test]
    fn the_debug_form_keeps_the_secret() {
        let pair = KeyPair { seed: [7; 32], public: [1; 32], file: None };
        let text = format!("{pair:?}");
        assert!(text.contains("SHA256:") && !text.contains("7, 7"), "{text}");
    }

    proptest! {
        #[test]
        fn damaged_keys_are_refused_without_panic(at in 0usize..320, byte: u8) {
            let good = KeyPair::generate().expect("made");
            let text = good.private_openssh();
            let body: String = text.lines().filter(|line| !line.starts_with("---")).collect();
            let mut bytes = STANDARD.decode(body).expect("base64");
            let at = at % bytes.len();
            bytes[at] = byte;
            let text = format!("{}\n{}\n{}\n", ARMOR.0, STANDARD.encode(&bytes), ARMOR.1);
            if let Some(read) = KeyPair::from_openssh(&text) {
                prop_assert_eq!(read.seed, good.seed);
                prop_assert_eq!(read.public, good.public);
            }
            bytes.truncate(at);
            let text = format!("{}\n{}\n{}\n", ARMOR.0, STANDARD.encode(&bytes), ARMOR.1);
            let whole_but_padding = at > MAGIC.len() + 200;
            prop_assert!(KeyPair::from_openssh(&text).is_none() || whole_but_padding);
        }
    }
}
