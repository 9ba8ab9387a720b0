//! What the machine said on its serial console during a phase: `{phase}-serial.log`.

use crate::testflinger::agent::append;
use crate::testflinger::wire::Phase;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

/// Copies what comes to a console's log from now on.
pub(super) struct Serial(Option<(File, File)>);

impl Serial {
    /// Where there is no log, nothing is copied: no phase fails for that.
    pub(super) fn follow(log: &Path, rundir: &Path, phase: Phase) -> Self {
        let open = || -> io::Result<(File, File)> {
            let mut from = File::open(log)?;
            from.seek(SeekFrom::End(0))?;
            Ok((from, append(&rundir.join(format!("{phase}-serial.log")))?))
        };
        Self(open().ok())
    }

    /// Copies what has come.
    pub(super) fn copy(&mut self) {
        if let Some((from, to)) = &mut self.0 {
            let _ = io::copy(from, to);
        }
    }
}

/// Copies all of it, of every machine that `notes` tells of: that which is forked, and that which was
/// booted for it.
pub(super) fn copy_all(notes: &Path, rundir: &Path, phase: Phase) {
    let runs = std::fs::read_dir(notes.join("latest")).into_iter().flatten().flatten();
    let mut logs: Vec<_> = runs.map(|machine| machine.path().join("logs/serial.log")).collect();
    logs.retain(|log| log.is_file());
    // The template before its fork.
    logs.sort_by_key(|log| log.metadata().and_then(|data| data.modified()).ok());
    let Ok(mut to) = append(&rundir.join(format!("{phase}-serial.log"))) else { return };
    for mut log in logs.iter().filter_map(|log| File::open(log).ok()) {
        let _ = io::copy(&mut log, &mut to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_phase_has_what_came_in_its_time() {
        let dir = tempfile::tempdir().expect("temp dir");
        let machine = dir.path().join("notes/latest/device/logs");
        std::fs::create_dir_all(&machine).expect("makes");
        let log = machine.join("serial.log");
        std::fs::write(&log, "booted\n").expect("writes");
        copy_all(&dir.path().join("notes"), dir.path(), Phase::Provision);
        let mut serial = Serial::follow(&log, dir.path(), Phase::Test);
        let mut console = append(&log).expect("opens");
        for line in ["one\n", "two\n"] {
            console.write_all(line.as_bytes()).expect("writes");
            serial.copy();
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("reads");
        assert_eq!(read("provision-serial.log"), "booted\n");
        assert_eq!(read("test-serial.log"), "one\ntwo\n");
        Serial::follow(&dir.path().join("none"), dir.path(), Phase::Reserve).copy();
    }
}
