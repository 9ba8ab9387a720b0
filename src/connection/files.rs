//! Files over any connection: `cat` at the far end, so that every transport that runs commands moves
//! files too, with the same promises and without an SFTP server in the image.

use super::{Cmd, Connection, ConnectionError, Stream};
use crate::deadline::Deadline;
use crate::process::quote;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Copies `local` to `remote` as a whole: written beside it, checked for its size, renamed.
pub(super) fn upload<C: Connection + ?Sized>(
    connection: &mut C,
    local: &Path,
    remote: &str,
    mode: u32,
    deadline: &Deadline,
) -> Result<(), ConnectionError> {
    let cannot = |source| ConnectionError::Host { what: format!("cannot read {}", local.display()), source };
    let file = File::open(local).map_err(cannot)?;
    let meta = file.metadata().map_err(cannot)?;
    if !meta.is_file() {
        return Err(cannot(io::Error::other("not a regular file")));
    }
    // The size check is what tells a whole file from one whose sender broke off.
    let script = format!(
        "set -e; to={to}; umask 077
if [ -d \"$to\" ]; then echo \"$to is a directory\" >&2; exit 1; fi
part=$(mktemp \"$to.XXXXXX\"); trap 'rm -f \"$part\"' EXIT
cat >\"$part\"; got=$(wc -c <\"$part\")
if [ \"$got\" -ne {size} ]; then echo \"$to: got $got of {size} bytes\" >&2; exit 1; fi
chmod {mode:o} \"$part\"; mv -f \"$part\" \"$to\"; trap - EXIT",
        to = operand(remote),
        size = meta.len(),
        mode = mode & 0o7777,
    );
    relabel(connection.run(Cmd::new(script).stdin_from(file), deadline), || {
        format!("upload {} to {remote}", local.display())
    })
}

/// Copies `remote` to `local`, which appears only once it is complete.
pub(super) fn download<C: Connection + ?Sized>(
    connection: &mut C,
    remote: &str,
    local: &Path,
    deadline: &Deadline,
) -> Result<(), ConnectionError> {
    let cannot = |source| ConnectionError::Host { what: format!("cannot write {}", local.display()), source };
    let dir = match local.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut part = tempfile::Builder::new()
        .permissions(PermissionsExt::from_mode(0o600))
        .tempfile_in(dir)
        .map_err(cannot)?;
    let mut written = Ok(());
    let script = format!("exec cat <{}", operand(remote));
    let cmd = Cmd::new(script).discard_stdout().on_output(|stream, bytes| {
        if stream == Stream::Stdout && written.is_ok() {
            written = part.write_all(bytes);
        }
    });
    relabel(connection.run(cmd, deadline), || format!("download {remote}"))?;
    written.map_err(cannot)?;
    part.persist(local).map_err(|error| cannot(error.error))?;
    Ok(())
}

/// A path as one word that no tool takes for an option.
fn operand(path: &str) -> String {
    if path.starts_with('-') { quote(&format!("./{path}")) } else { quote(path) }
}

/// In a message, what was meant instead of the script that did it.
fn relabel<T>(
    result: Result<T, ConnectionError>,
    meant: impl FnOnce() -> String,
) -> Result<(), ConnectionError> {
    result.map(drop).map_err(|mut error| {
        if let ConnectionError::Failed { line, .. } | ConnectionError::Stopped { line, .. } = &mut error {
            *line = meant();
        }
        error
    })
}
