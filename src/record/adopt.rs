//! Executions that happened on other hosts become part of a run here.
//!
//! Owns where they are put and what is rewritten: ids and paths. That a record is sound in itself is
//! for who brings it to see to; no path in it is followed.

use super::evidence::make_directory;
use super::ledger::{self, Record};
use super::metadata::{Diagnostic, Diagnostics, Logs, Metadata, Utc};
use super::{Run, files};
use crate::fault::visible;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::slice;

impl Run {
    /// Takes over an execution that another host recorded, with its evidence where that came along: the
    /// directory is moved into this run's. The record as it is now in the ledger.
    ///
    /// # Errors
    /// A host [`Fault`](crate::fault::Fault) when it cannot be written.
    pub fn adopt(&self, mut record: Record, evidence: Option<&Path>) -> Result<Record> {
        record.run_id = self.id().to_owned();
        record.reason = record.reason.map(|reason| visible(&reason));
        if record.ran() {
            let (directory, attempt) = make_directory(self.directory(), &record.scenario)?;
            record.attempt = attempt;
            if let Some(evidence) = evidence {
                fs::rename(evidence, &directory).with_context(|| files::cannot("move", evidence))?;
            }
            self.rewrite(&mut record, &directory)?;
            files::write_json(&directory.join("record.json"), &record)?;
        }
        if let Some(ledger) = self.ledger() {
            ledger::append(ledger, slice::from_ref(&record))?;
        }
        Ok(record)
    }

    /// Makes the record and `metadata.json` speak of the files where they are now.
    fn rewrite(&self, record: &mut Record, directory: &Path) -> Result<()> {
        let old = record.metadata.as_deref().and_then(Path::parent).unwrap_or(Path::new("")).to_owned();
        let here = |path: &Path| moved(path, &old, directory);
        let path = directory.join("metadata.json");
        let mut metadata = files::read_json(&path).unwrap_or_else(|_| metadata_of(record));
        record.harness_log = record.harness_log.as_deref().and_then(here);
        record.serial_log = record.serial_log.as_deref().and_then(here);
        record.diagnostics = std::mem::take(&mut record.diagnostics)
            .into_iter()
            .filter_map(|Diagnostic { label, path }| Some(Diagnostic { label, path: here(&path)? }))
            .collect();
        record.metadata = Some(path.clone());
        metadata.run_id.clone_from(&record.run_id);
        metadata.attempt = record.attempt;
        metadata.scenario.clone_from(&record.scenario);
        metadata.outcome = Some(record.outcome);
        metadata.reason.clone_from(&record.reason);
        let logs = directory.join("logs");
        metadata.logs = logs
            .is_dir()
            .then(|| Logs { harness: logs.join("harness.log"), serial: logs.join("serial.log") });
        metadata.diagnostics = logs.is_dir().then(|| Diagnostics {
            directory: logs.join("diagnostics"),
            artifacts: record.diagnostics.clone(),
        });
        files::write_json(&path, &metadata)
    }
}

/// Where a file of the evidence is now; `None` for what is not of it, or did not come along.
fn moved(path: &Path, old: &Path, new: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(old).ok()?;
    let plain = inside.components().all(|part| matches!(part, Component::Normal(_)));
    let path = new.join(inside);
    (plain && path.is_file()).then_some(path)
}

/// What the record alone tells: its evidence died with its host.
fn metadata_of(record: &Record) -> Metadata {
    let r = record.clone();
    Metadata {
        schema_version: r.schema_version,
        generated_at: Utc::now(),
        run_id: r.run_id,
        scenario: r.scenario,
        attempt: r.attempt,
        markers: r.markers,
        outcome: Some(r.outcome),
        reason: r.reason,
        boot: r.boot,
        accelerator: r.accelerator,
        firmware: r.firmware,
        image: r.image,
        artifact: None,
        logs: None,
        qemu: r.qemu,
        ssh: r.ssh,
        diagnostics: None,
        timings: r.timings.unwrap_or_default(),
        session_ceiling_exceeded: r.session_ceiling_exceeded,
        timeouts: r.timeouts,
        harness_args: r.harness_args,
        host: r.host,
        git: r.git,
        env: r.env,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Environment, Outcome};

    fn run(root: &Path) -> Run {
        let vars = [("BOOT_IMAGE_VM_LOG_ROOT".into(), root.join("notes").into_os_string())];
        let environment = Environment::from_vars(vars, root).expect("an environment");
        Run::start_in(Environment { ledger: Some(root.join("ledger.jsonl")), ..environment }, None)
            .expect("a run")
    }

    #[test]
    fn an_execution_of_another_host_is_one_of_ours_with_all_its_files() {
        let (there, here) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let evidence = run(there.path()).scenario("disks::blank", &["vm"]).expect("begins");
        let path = evidence.diagnostic("dmesg", "txt");
        fs::write(&path, "text").expect("writes");
        let record = evidence.finish(Outcome::Failed, Some("no \u{1b}disk")).expect("ends");
        let ours = run(here.path());
        let adopted = ours.adopt(record.clone(), Some(evidence.directory())).expect("adopts");
        assert_eq!((adopted.run_id.as_str(), adopted.outcome), (ours.id(), Outcome::Failed));
        assert_eq!(adopted.reason.as_deref(), Some("no \\u{1b}disk"));
        let files = [&adopted.metadata, &adopted.harness_log, &Some(adopted.diagnostics[0].path.clone())];
        for file in files {
            let file = file.as_deref().expect("a path");
            assert!(file.starts_with(ours.directory().join("disks--blank")) && file.is_file(), "{file:?}");
        }
        let again = ours.adopt(record, None).expect("adopts without evidence");
        assert_eq!((again.attempt, again.harness_log), (2, None));
        assert!(ledger::check(&here.path().join("ledger.jsonl")).expect("reads").is_empty());
    }

    #[test]
    fn no_path_leads_out_of_the_evidence() {
        let new = tempfile::tempdir().expect("dir");
        fs::write(new.path().join("a"), "").expect("writes");
        let old = Path::new("/far/run/x");
        assert!(moved(Path::new("/far/run/x/a"), old, new.path()).is_some());
        for path in ["/etc/passwd", "/far/run/x/../../etc/passwd", "/far/run/x/b", "/far/run/x"] {
            assert_eq!(moved(Path::new(path), old, new.path()), None, "{path}");
        }
    }
}
