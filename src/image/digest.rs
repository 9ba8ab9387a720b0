//! SHA-256 of files, computed once per content.

use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The SHA-256 of a whole file, in hexadecimal.
///
/// # Errors
/// When it cannot be read, or [`Stop`](crate::deadline::Stop) when the deadline passed first.
pub(crate) fn of_file(path: &Path, deadline: &Deadline) -> Result<String> {
    let cannot = || Fault::host(format!("cannot read {}", path.display()));
    let mut file = File::open(path).with_context(cannot)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        deadline.check()?;
        let count = file.read(&mut buffer).with_context(cannot)?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

/// As [`of_file`], but remembered in `cache` for as long as the file stays as it is: the same path,
/// inode, size and times.
///
/// # Errors
/// As [`of_file`].
pub(crate) fn of_file_cached(path: &Path, cache: &Path, deadline: &Deadline) -> Result<String> {
    let meta = path.metadata().with_context(|| Fault::host(format!("cannot read {}", path.display())))?;
    let identity = format!(
        "{}\0{}\0{}\0{}\0{}.{}\0{}.{}",
        path.display(),
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    );
    let entry = cache.join(hex(&Sha256::digest(identity)));
    if let Ok(known) = std::fs::read_to_string(&entry)
        && known.len() == 64
    {
        return Ok(known);
    }
    let digest = of_file(path, deadline)?;
    // Only a memory: without it the next start takes longer.
    let _ = std::fs::create_dir_all(cache);
    let _ = std::fs::write(&entry, &digest);
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_changed_file_is_hashed_anew() {
        let dir = tempfile::tempdir().expect("temp dir");
        let deadline = Deadline::after(Duration::from_secs(60), "test");
        let (file, cache) = (dir.path().join("f"), dir.path().join("cache"));
        let digest = || of_file_cached(&file, &cache, &deadline).expect("hashes");
        std::fs::write(&file, "abc").expect("written");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((digest().as_str(), digest().as_str()), (abc, abc));
        let entry = std::fs::read_dir(&cache).expect("made").next().expect("one").expect("readable").path();
        std::fs::write(&entry, "0".repeat(64)).expect("written");
        assert_eq!(digest(), "0".repeat(64), "the memory is used");
        std::fs::write(&file, "abcd").expect("written");
        assert_ne!(digest(), "0".repeat(64));
    }
}
