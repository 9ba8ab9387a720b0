//! The directory of one scenario execution, and everything that is written into it.
//!
//! Its identity is on disk before anything happens and its outcome at the end; a directory without
//! `record.json` whose owner is gone is a death. Reads the events, does not cause any.

use super::event::{Event, Events, Observer};
use super::ledger::{self, Record};
use super::metadata::{
    BootKind, Diagnostic, Diagnostics, Logs, Metadata, Outcome, Qemu, SESSION_CEILING_SECONDS, Utc, millis,
};
use super::sweep::Marker;
use super::{Run, files};
use crate::fault::{Fault, visible};
use anyhow::{Context, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The evidence of one scenario execution. A handle: clones are the same evidence, and
/// [`Events::to`](super::event::Events::to) takes one.
#[derive(Clone)]
pub struct Evidence(Arc<Inner>);

struct Inner {
    directory: PathBuf,
    ledger: Option<PathBuf>,
    run_started: Utc,
    started: Instant,
    state: Mutex<State>,
}

struct State {
    metadata: Metadata,
    events: File,
    log: File,
    machine_started: Option<Instant>,
    /// How long it had lasted when this began.
    before: Duration,
    /// Told after the logs.
    watcher: Option<Events>,
    /// How many diagnostics got a number.
    numbered: usize,
    /// The first thing that could not be written while events came in.
    problem: Option<anyhow::Error>,
    /// Gone once the outcome is recorded.
    marker: Option<Marker>,
}

/// `scenario.json`.
#[derive(Serialize)]
struct Identity<'a> {
    schema_version: u32,
    run_id: &'a str,
    scenario: &'a str,
    attempt: u32,
    markers: &'a [String],
    pid: u32,
    started_at: Utc,
}

/// One line of `events.jsonl`.
#[derive(Serialize)]
struct Line<'a> {
    time: Utc,
    /// Since the scenario began. Events have a `seconds` of their own.
    elapsed_seconds: f64,
    #[serde(flatten)]
    event: &'a Event,
}

/// The files that events go to.
struct Files {
    events: File,
    log: File,
}

impl Files {
    /// Makes them, the directories for logs and diagnostics, and the first `metadata.json`.
    fn make(directory: &Path, metadata: &mut Metadata) -> Result<Self> {
        let logs = directory.join("logs");
        let diagnostics = logs.join("diagnostics");
        for path in [&logs, &diagnostics] {
            files::private_dir(path).with_context(|| files::cannot("make", path))?;
        }
        metadata.logs = Some(Logs { harness: logs.join("harness.log"), serial: logs.join("serial.log") });
        metadata.diagnostics = Some(Diagnostics { directory: diagnostics, artifacts: Vec::new() });
        files::write_json(&directory.join("metadata.json"), metadata)?;
        Ok(Self { events: create(&directory.join("events.jsonl"))?, log: create(&logs.join("harness.log"))? })
    }
}

impl Evidence {
    pub(super) fn create(
        run: &Run,
        log_root: &Path,
        mut metadata: Metadata,
        ledger: Option<&Path>,
    ) -> Result<Self> {
        let now = Utc::now();
        let (directory, attempt) = make_directory(run.directory(), &metadata.scenario)?;
        let identity = Identity {
            schema_version: metadata.schema_version,
            run_id: run.id(),
            scenario: &metadata.scenario,
            attempt,
            markers: &metadata.markers,
            pid: std::process::id(),
            started_at: now,
        };
        files::write_json(&directory.join("scenario.json"), &identity)?;
        metadata.attempt = attempt;
        metadata.timings.start = Some(now);
        let files = Files::make(&directory, &mut metadata)?;
        // Last: where there is a marker, there is all that a sweep needs.
        let marker = Marker::set(log_root, &directory, ledger)?;
        let run_started = Utc::from(run.started_at());
        Ok(Self::begin(directory, ledger.map(Path::to_owned), run_started, metadata, files, Some(marker)))
    }

    fn begin(
        directory: PathBuf,
        ledger: Option<PathBuf>,
        run_started: Utc,
        metadata: Metadata,
        files: Files,
        marker: Option<Marker>,
    ) -> Self {
        let state = State {
            metadata,
            events: files.events,
            log: files.log,
            machine_started: None,
            before: Duration::ZERO,
            watcher: None,
            numbered: 0,
            problem: None,
            marker,
        };
        let (started, state) = (Instant::now(), Mutex::new(state));
        Self(Arc::new(Inner { directory, ledger, run_started, started, state }))
    }

    /// Evidence of another machine of the same scenario, in a directory below this one. It has no
    /// outcome of its own.
    ///
    /// # Errors
    /// A host [`Fault`] when the directory cannot be made.
    pub fn child(&self, name: &str) -> Result<Self> {
        let mut metadata = self.metadata();
        let (directory, attempt) = make_directory(&self.0.directory, name)?;
        metadata.attempt = attempt;
        let files = Files::make(&directory, &mut metadata)?;
        Ok(Self::begin(directory, None, self.0.run_started, metadata, files, None))
    }

    /// The scenario's directory.
    pub fn directory(&self) -> &Path {
        &self.0.directory
    }

    /// Where logs belong: `serial.log` and others.
    pub fn logs(&self) -> PathBuf {
        self.0.directory.join("logs")
    }

    /// Where to tell what happens.
    pub fn events(&self) -> Events {
        Events::to(self.clone())
    }

    /// Tells `watcher` too, from now on: who shows progress to a person.
    pub fn watched_by(&self, watcher: Events) {
        self.state().watcher = Some(watcher);
    }

    /// The metadata as it stands.
    pub fn metadata(&self) -> Metadata {
        self.state().metadata.clone()
    }

    /// Says that what is recorded here began at `start`, elsewhere and before this.
    pub fn began(&self, start: Utc) {
        let mut state = self.state();
        let seconds = Utc::now().seconds_since(start).max(0.0);
        state.before = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        state.metadata.timings.start = Some(start);
    }

    /// Adds to the metadata and writes it, before the act that it describes.
    ///
    /// # Errors
    /// A host [`Fault`] when `metadata.json` cannot be written.
    pub fn update(&self, edit: impl FnOnce(&mut Metadata)) -> Result<()> {
        let mut state = self.state();
        edit(&mut state.metadata);
        self.save(&mut state)
    }

    /// A new file for a diagnostic, `<slug of the label>-<NN>.<ext>`, registered under its label.
    /// The caller writes it; one that was never written is not in the final metadata.
    pub fn diagnostic(&self, label: &str, ext: &str) -> PathBuf {
        let mut state = self.state();
        state.numbered += 1;
        let name = format!("{}-{:02}.{ext}", slug(label, 60), state.numbered);
        let path = self.0.directory.join("logs/diagnostics").join(name);
        register(&mut state, label, &path);
        path
    }

    /// Records the outcome: metadata, `record.json`, ledger line. Every outcome but `passed` has a reason.
    ///
    /// # Errors
    /// A host [`Fault`] when anything could not be written, now or while events came in, and when
    /// the outcome is recorded already. A missing ledger line is then added by the next [`sweep`](super::sweep)
    /// after this process.
    pub fn finish(&self, outcome: Outcome, reason: Option<&str>) -> Result<Record> {
        let mut state = self.state();
        let marker = state.marker.take().with_context(|| {
            Fault::host(format!("the outcome in {} is recorded already", self.0.directory.display()))
        })?;
        let ended = Event::Note {
            text: match reason {
                Some(reason) => format!("outcome: {outcome}\n{reason}"),
                None => format!("outcome: {outcome}"),
            },
        };
        self.write(&mut state, &ended);
        let total = (state.before + self.0.started.elapsed()).as_secs_f64();
        conclude(&mut state.metadata, Utc::now(), total, self.0.run_started);
        state.metadata.outcome = Some(outcome);
        state.metadata.reason = reason.map(str::to_owned);
        let record = Record::of(&state.metadata, Some(&self.0.directory));
        let saved = self.save(&mut state);
        // In this order, so that a sweep after a crash in between finds the line that is missing.
        let kept = files::write_json(&self.0.directory.join("record.json"), &record);
        let listed =
            self.0.ledger.as_deref().map_or(Ok(()), |path| ledger::append(path, slice::from_ref(&record)));
        let cleared = listed.and_then(|()| marker.clear());
        cleared.and(kept).and(saved).and(state.problem.take().map_or(Ok(()), Err))?;
        Ok(record)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of the scenario's body must not cost its evidence.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, state: &mut State) -> Result<()> {
        state.metadata.generated_at = Utc::now();
        files::write_json(&self.0.directory.join("metadata.json"), &state.metadata)
    }

    /// Writes to both logs. An observer cannot fail, so the first problem waits for [`Evidence::finish`].
    fn write(&self, state: &mut State, event: &Event) {
        let (time, seconds) = (Utc::now(), millis(self.0.started.elapsed().as_secs_f64()));
        let result = serde_json::to_vec(&Line { time, elapsed_seconds: seconds, event })
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                state.events.write_all(&line)?;
                state.log.write_all(readable(time, seconds, event).as_bytes())
            });
        if let Err(error) = result {
            let fault = || files::cannot("write the logs in", &self.0.directory);
            state.problem.get_or_insert_with(|| anyhow::Error::new(error).context(fault()));
        }
    }
}

impl Observer for Evidence {
    fn observe(&self, event: &Event) {
        let mut state = self.state();
        // Percentages are for who watches; the logs have the phases.
        if !matches!(event, Event::ImageBuildProgress { percent: Some(_), .. }) {
            self.write(&mut state, event);
        }
        if let Some(watcher) = &state.watcher {
            watcher.emit(event.clone());
        }
        let booted = state.machine_started.map(|start| millis(start.elapsed().as_secs_f64()));
        let State { metadata, machine_started, .. } = &mut *state;
        let timings = &mut metadata.timings;
        match event {
            Event::ImageReady { seconds, .. } => timings.build_seconds = Some(millis(*seconds)),
            Event::QemuStarting { command } => {
                *machine_started = Some(Instant::now());
                metadata.qemu.get_or_insert_with(Qemu::default).command.clone_from(command);
            }
            // A machine that is booted again keeps the times of its first boot.
            // A fork was not booted, and connects when its scenario first asks.
            Event::LoginSeen | Event::SshReady if metadata.boot == BootKind::Fork => return,
            Event::LoginSeen => timings.boot_to_login_seconds = timings.boot_to_login_seconds.or(booted),
            Event::SshReady => timings.boot_to_ssh_seconds = timings.boot_to_ssh_seconds.or(booted),
            _ => return,
        }
        if let Err(error) = self.save(&mut state) {
            state.problem.get_or_insert(error);
        }
    }
}

/// Fills in the end. What was announced as a diagnostic and never written is left out.
pub(super) fn conclude(metadata: &mut Metadata, end: Utc, total_seconds: f64, run_started: Utc) {
    if let Some(diagnostics) = &mut metadata.diagnostics {
        diagnostics.artifacts.retain(|artifact| artifact.path.exists());
    }
    metadata.timings.end = Some(end);
    metadata.timings.total_seconds = Some(millis(total_seconds));
    metadata.session_ceiling_exceeded = Some(end.seconds_since(run_started) >= SESSION_CEILING_SECONDS);
}

fn register(state: &mut State, label: &str, path: &Path) {
    if let Some(diagnostics) = &mut state.metadata.diagnostics
        && !diagnostics.artifacts.iter().any(|artifact| artifact.path == path)
    {
        diagnostics.artifacts.push(Diagnostic { label: label.to_owned(), path: path.to_owned() });
    }
}

fn create(path: &Path) -> Result<File> {
    File::create_new(path).with_context(|| files::cannot("make", path))
}

/// The event for `harness.log`: what follows the first line is indented. Control characters, which
/// may come from a guest, are made visible.
fn readable(time: Utc, seconds: f64, event: &Event) -> String {
    let text = visible(event.to_string().trim_end()).replace('\n', "\n    ");
    format!("[{time} +{seconds:.3}] {text}\n")
}

/// Makes a directory for the next attempt of a scenario.
pub(super) fn make_directory(run: &Path, scenario: &str) -> Result<(PathBuf, u32)> {
    let name = directory_name(scenario);
    let mut attempt = 1;
    loop {
        let path = run.join(if attempt == 1 { name.clone() } else { format!("{name}.{attempt}") });
        match files::private_dir(&path) {
            Ok(()) => return Ok((path, attempt)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            Err(error) => return Err(error).with_context(|| files::cannot("make", &path)),
        }
    }
}

/// A scenario's name as the name of a directory: `a::b` is `a--b`. A name for which that would be
/// ambiguous or too long gets a piece of its hash. A dot is kept for the number of the attempt.
fn directory_name(scenario: &str) -> String {
    const LONGEST: usize = 80;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let faithful = scenario.split("::").all(|part| {
        !part.is_empty()
            && !part.contains("--")
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.chars().all(plain)
    });
    let name = scenario.replace("::", "--");
    if faithful && name.len() <= LONGEST {
        return name;
    }
    let hash = Sha256::digest(scenario);
    format!("{}.{:02x}{:02x}{:02x}{:02x}", slug(&name, LONGEST), hash[0], hash[1], hash[2], hash[3])
}

/// Lower-case words with hyphens in between, no longer than `longest`, for the name of a file.
fn slug(text: &str, longest: usize) -> String {
    let mut slug = String::new();
    for c in text.chars().map(|c| c.to_ascii_lowercase()) {
        if c.is_ascii_alphanumeric() || c == '_' {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.truncate(longest);
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "unnamed".to_owned() } else { slug.to_owned() }
}

#[cfg(test)]
mod tests;
