//! The agent's own log: a file that is turned at midnight, and standard error.

use jiff::Zoned;
use jiff::civil::Date;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// How grave a line is, by the names that configurations use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Debug,
    Info,
    Warning,
    Error,
    Critical,
}

impl Level {
    /// What is unknown is `INFO`, as in the original.
    pub(super) fn named(name: &str) -> Self {
        match name.to_ascii_uppercase().as_str() {
            "DEBUG" | "NOTSET" => Self::Debug,
            "WARNING" | "WARN" => Self::Warning,
            "ERROR" => Self::Error,
            "CRITICAL" | "FATAL" => Self::Critical,
            _ => Self::Info,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
            Self::Critical => "CRITICAL",
        }
    }
}

/// Days that are kept beside the current one.
const KEPT: usize = 6;
const NAME: &str = "testflinger-agent.log";

/// One agent's log. What cannot be written to the file is still on standard error.
#[derive(Debug)]
pub(super) struct Log {
    level: Level,
    quiet: bool,
    file: Mutex<Turning>,
}

#[derive(Debug)]
struct Turning {
    dir: PathBuf,
    day: Date,
    file: Option<File>,
}

impl Log {
    /// Opens the log in `dir`, which must exist.
    pub(super) fn open(dir: &Path, level: Level, quiet: bool) -> std::io::Result<Self> {
        let path = dir.join(NAME);
        // A log of a day before is turned at the first line.
        let day = fs::metadata(&path).and_then(|meta| meta.modified()).map_or_else(
            |_| Zoned::now().date(),
            |time| {
                jiff::Timestamp::try_from(time)
                    .map_or_else(|_| Zoned::now(), |time| time.to_zoned(jiff::tz::TimeZone::system()))
                    .date()
            },
        );
        let file = Some(open(&path)?);
        Ok(Self { level, quiet, file: Mutex::new(Turning { dir: dir.to_owned(), day, file }) })
    }

    #[track_caller]
    pub(super) fn debug(&self, text: impl AsRef<str>) {
        self.write(Level::Debug, text.as_ref(), Location::caller());
    }

    #[track_caller]
    pub(super) fn info(&self, text: impl AsRef<str>) {
        self.write(Level::Info, text.as_ref(), Location::caller());
    }

    #[track_caller]
    pub(super) fn warning(&self, text: impl AsRef<str>) {
        self.write(Level::Warning, text.as_ref(), Location::caller());
    }

    #[track_caller]
    pub(super) fn error(&self, text: impl AsRef<str>) {
        self.write(Level::Error, text.as_ref(), Location::caller());
    }

    fn write(&self, level: Level, text: &str, place: &Location<'_>) {
        if level < self.level {
            return;
        }
        let now = Zoned::now();
        let name = Path::new(place.file()).file_name().unwrap_or_default().to_string_lossy();
        let line = format!(
            "[{}] {:>7}: ({name}:{})| {}\n",
            now.strftime("%y-%m-%d %H:%M:%S"),
            level.name(),
            place.line(),
            crate::fault::visible(text)
        );
        let mut turning = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        turning.turn(now.date());
        if let Some(file) = &mut turning.file {
            let _ = file.write_all(line.as_bytes());
        }
        if !self.quiet {
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).mode(0o644).open(path)
}

impl Turning {
    fn turn(&mut self, today: Date) {
        if today == self.day {
            return;
        }
        let path = self.dir.join(NAME);
        let _ = fs::rename(&path, self.dir.join(format!("{NAME}.{}", self.day)));
        self.file = open(&path).ok();
        self.day = today;
        let mut old: Vec<_> = fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.strip_prefix(NAME).is_some_and(is_date))
            .collect();
        old.sort();
        for name in old.iter().rev().skip(KEPT) {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

fn is_date(suffix: &str) -> bool {
    suffix.strip_prefix('.').is_some_and(|date| date.parse::<Date>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_shape_of_the_original() {
        let dir = tempfile::tempdir().expect("temp dir");
        let log = Log::open(dir.path(), Level::named("nonsense"), true).expect("opens");
        log.debug("not seen");
        log.warning("seen\x1b[2J");
        let text = fs::read_to_string(dir.path().join(NAME)).expect("reads");
        let shape = regex::Regex::new(
            r"^\[\d\d-\d\d-\d\d \d\d:\d\d:\d\d\] WARNING: \(log\.rs:\d+\)\| seen\\u\{1b\}\[2J\n$",
        );
        assert!(shape.expect("a regex").is_match(&text), "{text:?}");
    }

    #[test]
    fn six_days_are_kept() {
        let dir = tempfile::tempdir().expect("temp dir");
        let log = Log::open(dir.path(), Level::Info, true).expect("opens");
        for day in 1..=9 {
            let mut turning = log.file.lock().expect("lock");
            turning.day = jiff::civil::date(2026, 11, day);
            turning.turn(jiff::civil::date(2026, 11, day + 1));
        }
        fs::write(dir.path().join("testflinger-agent.log.note"), "not ours").expect("writes");
        log.file.lock().expect("lock").turn(jiff::civil::date(2026, 11, 11));
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .expect("reads")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        let expected = (5..=10).map(|day| format!("{NAME}.2026-11-{day:02}"));
        let expected: Vec<_> =
            [NAME.to_owned()].into_iter().chain(expected).chain([format!("{NAME}.note")]).collect();
        assert_eq!(names, expected);
    }
}
