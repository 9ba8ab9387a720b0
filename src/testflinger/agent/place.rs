//! Where a job is on disk: the directory its commands run in, and beside it what is ours alone.
//!
//! Commands may do with their directory what they like, and some do. What the agent must know after a
//! crash is therefore kept elsewhere, where none of them looks.

use crate::fault::Fault;
use crate::record::files;
use crate::testflinger::wire::{Event, Job, Phase, Statuses};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Below the directory of all jobs, and in each of the results that wait.
pub(super) const OURS: &str = ".shakedown";

/// What is known of a job that runs or ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Memo {
    pub(super) agent_id: String,
    /// The phase that was entered last.
    pub(super) phase: Option<Phase>,
    pub(super) statuses: Statuses,
    pub(super) events: Vec<Event>,
    pub(super) cancelled: bool,
    /// All phases are over; what is left is to tell it.
    pub(super) ended: bool,
    /// Why the agent must be offline after this job.
    pub(super) offline: Option<String>,
}

/// The directories of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// What commands run in.
    pub(super) rundir: PathBuf,
    /// What is ours.
    pub(super) state: PathBuf,
}

const JOB: &str = "job.json";
const MEMO: &str = "memo.json";

impl Place {
    /// The place of a job in `basedir`, which need not exist.
    pub(super) fn of(basedir: &Path, job: &str) -> Self {
        Self { rundir: basedir.join(job), state: basedir.join(OURS).join(job) }
    }

    /// The place of results that wait in `dir`.
    pub(super) fn waiting(dir: &Path) -> Self {
        Self { rundir: dir.to_owned(), state: dir.join(OURS) }
    }

    /// Makes the directories. What another life left there is removed: the job is ours anew.
    pub(super) fn make(&self, job: &Job, memo: &Memo) -> Result<()> {
        for dir in [&self.state, &self.rundir] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| files::cannot("remove", dir));
                }
                _ => {}
            }
        }
        self.make_ours(job, memo)?;
        self.make_rundir()
    }

    pub(super) fn make_ours(&self, job: &Job, memo: &Memo) -> Result<()> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.state);
        made.with_context(|| files::cannot("make", &self.state))?;
        files::write_json(&self.state.join(JOB), job)?;
        self.save(memo)
    }

    pub(super) fn make_rundir(&self) -> Result<()> {
        let made = DirBuilder::new().recursive(true).create(&self.rundir);
        made.with_context(|| files::cannot("make", &self.rundir))
    }

    pub(super) fn save(&self, memo: &Memo) -> Result<()> {
        files::write_json(&self.state.join(MEMO), memo)
    }

    pub(super) fn job(&self) -> Result<Job> {
        read_job(&self.state.join(JOB))
    }

    pub(super) fn memo(&self) -> Result<Memo> {
        files::read_json(&self.state.join(MEMO))
    }

    /// Removes all of it.
    pub(super) fn remove(&self) -> Result<()> {
        for dir in [&self.rundir, &self.state] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| files::cannot("remove", dir));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves all of it to `to`, where results wait.
    pub(super) fn move_to(&self, to: &Path) -> Result<()> {
        if self.rundir.exists() {
            move_dir(&self.rundir, to)?;
        } else {
            fs::create_dir_all(to).with_context(|| files::cannot("make", to))?;
        }
        if self.state.exists() { move_dir(&self.state, &to.join(OURS)) } else { Ok(()) }
    }
}

/// Reads a job from a file: ours, or that of the other agent.
pub(super) fn read_job(path: &Path) -> Result<Job> {
    Job::new(files::read_json(path)?).with_context(|| files::cannot("use", path))
}

/// The places in `basedir` that an agent of this name left.
pub(super) fn left_by(basedir: &Path, agent: &str) -> Vec<Place> {
    let dirs = fs::read_dir(basedir.join(OURS)).into_iter().flatten().flatten();
    dirs.filter_map(|dir| {
        let place = Place::of(basedir, dir.file_name().to_str()?);
        (place.memo().ok()?.agent_id == agent).then_some(place)
    })
    .collect()
}

/// That a job could be run now: asked before one is taken, since a job that was taken is gone.
pub(super) fn check_room(basedir: &Path) -> Result<()> {
    let dir = basedir.join(OURS);
    let check = || -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let mut file = tempfile::Builder::new().prefix(".room-").tempfile_in(&dir)?;
        // Enough for a memo and the beginning of a log.
        file.write_all(&[b'.'; 16 << 10])?;
        file.flush()
    };
    check().with_context(|| {
        Fault::host(format!("no job can run in {}", basedir.display()))
            .fix("make room, or `chown` it to the agent's user")
    })
}

/// `rename`, also from one file system to another.
pub(super) fn move_dir(from: &Path, to: &Path) -> Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| files::cannot("make", parent))?;
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
        // What was moved before and not removed.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            fs::remove_dir_all(to).with_context(|| files::cannot("replace", to))?;
            return move_dir(from, to);
        }
        other => return other.with_context(|| files::cannot("move", from)),
    }
    // Under another name until it is whole.
    let part = to.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    copy_dir(from, &part).with_context(|| files::cannot("copy", from))?;
    fs::rename(&part, to).with_context(|| files::cannot("move", &part))?;
    fs::remove_dir_all(from).with_context(|| files::cannot("remove", from))
}

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}

/// Opens a file of a job to append to it: for its owner alone, as there may be secrets in it.
pub(in crate::testflinger) fn append(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).mode(0o600).open(path)
}

/// Writes a file of a job, with the spaces that Python puts into JSON: commands `grep` in these.
pub(super) fn write_python_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, Python);
    let write = |text: &[u8]| -> io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
        file.write_all(text)?;
        file.persist(path)?;
        Ok(())
    };
    value.serialize(&mut serializer).with_context(|| files::cannot("write", path))?;
    write(&text).with_context(|| files::cannot("write", path))
}

struct Python;

impl serde_json::ser::Formatter for Python {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The JSON object in a file that others write; `None` where there is none.
pub(super) fn read_object(path: &Path) -> Option<serde_json::Map<String, Value>> {
    match serde_json::from_slice(&fs::read(path).ok()?) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn job() -> Job {
        Job::new(json!({"job_id": "j1", "test_data": {"secrets": {"A": "b"}}})).expect("a job")
    }

    #[test]
    fn json_is_spaced_as_python_does_and_private() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("testflinger.json");
        write_python_json(&path, &json!({"a": [1, {"b": null}], "c": {}})).expect("writes");
        assert_eq!(fs::read_to_string(&path).expect("reads"), r#"{"a": [1, {"b": null}], "c": {}}"#);
        assert_eq!(fs::metadata(&path).expect("is there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_place_is_found_by_its_agent_and_moves_as_a_whole() {
        let dir = tempfile::tempdir().expect("temp dir");
        let place = Place::of(dir.path(), "j1");
        let memo = Memo { agent_id: "a1".into(), ended: true, ..Memo::default() };
        place.make(&job(), &memo).expect("makes");
        fs::write(place.rundir.join("file"), "kept").expect("writes");
        assert_eq!(left_by(dir.path(), "a1"), std::slice::from_ref(&place));
        assert_eq!(left_by(dir.path(), "a2"), []);
        let to = dir.path().join("results/j1");
        place.move_to(&to).expect("moves");
        place.make(&job(), &memo).expect("makes");
        place.move_to(&to).expect("moves over what was there");
        let waiting = Place::waiting(&to);
        assert_eq!((waiting.memo().expect("memo"), waiting.job().expect("job")), (memo, job()));
        assert_eq!(left_by(dir.path(), "a1"), []);
    }

    #[test]
    fn a_copy_is_whole() {
        let dir = tempfile::tempdir().expect("temp dir");
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("sub")).expect("makes");
        fs::write(from.join("sub/file"), "x").expect("writes");
        std::os::unix::fs::symlink("sub/file", from.join("link")).expect("links");
        copy_dir(&from, &dir.path().join("to")).expect("copies");
        assert_eq!(fs::read_to_string(dir.path().join("to/link")).expect("reads"), "x");
    }

    #[test]
    fn no_room_is_known_before_a_job_is_taken() {
        let dir = tempfile::tempdir().expect("temp dir");
        check_room(&dir.path().join("new/run")).expect("there is room");
        let file = dir.path().join("file");
        fs::write(&file, "").expect("writes");
        assert!(check_room(&file).is_err());
    }
}
