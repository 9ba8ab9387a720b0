//! Jobs in the ledger: one line each, in the run directory of their run.

use super::store::{Ended, Job};
use crate::record::ledger;
use crate::record::{self, Environment, Run};
use anyhow::Result;

/// Writes ledger lines. The run directory is made with the first one.
#[derive(Debug)]
pub(super) struct Recorder {
    environment: Environment,
    tag: String,
    run: Option<Run>,
}

impl Recorder {
    pub(super) fn new(environment: Environment, tag: &str) -> Self {
        Self { environment, tag: tag.to_owned(), run: None }
    }

    fn run(&mut self) -> Result<&Run> {
        match &mut self.run {
            Some(run) => Ok(run),
            none => {
                // First those that died, which may be an earlier process of this run.
                record::sweep(&self.environment.log_root)?;
                Ok(none.insert(Run::named(self.environment.clone(), &self.tag)?))
            }
        }
    }

    /// Writes the line of a job that has ended, unless the ledger has it.
    pub(super) fn record(&mut self, job: &Job, ended: &Ended) -> Result<()> {
        let run = self.run()?;
        let name = format!("jobs::{}", job.machine);
        let reason = ended.reason.as_ref().map(|reason| format!("job {}: {reason}", job.job_id));
        if run.joined() && has(run, &name, job, ended)? {
            return Ok(());
        }
        // Aside: were we killed now, a sweep would write that the job was interrupted, which it is not.
        let evidence = run.aside(&name)?;
        evidence.began(job.submitted_at);
        evidence.update(|metadata| {
            metadata.markers = vec!["hardware".into()];
            // Times of jobs in a lab say nothing about those of scenarios here.
            metadata.accelerator = Some("testflinger".into());
        })?;
        let exit = ended.exit.map_or("none".to_owned(), |exit| exit.to_string());
        let hw_status = ended.hw_status.as_deref().unwrap_or("none");
        evidence.events().note(format!(
            "job {} on {}, attempt {}: exit status {exit}, hardware status {hw_status}",
            job.job_id, job.machine, job.attempt
        ));
        let record = evidence.finish(ended.outcome.in_ledger(), reason.as_deref())?;
        run.ledger().map_or(Ok(()), |path| ledger::append(path, &[record]))
    }

    /// Says in the run directory that this process is done with it.
    pub(super) fn end(&self) -> Result<()> {
        self.run.as_ref().map_or(Ok(()), Run::end)
    }
}

/// A process that was killed may have written the line, and not that it has.
fn has(run: &Run, name: &str, job: &Job, ended: &Ended) -> Result<bool> {
    let Some(path) = run.ledger().filter(|path| path.exists()) else { return Ok(false) };
    Ok(ledger::read(path)?.flatten().any(|record| {
        let start = record.timings.and_then(|timings| timings.start);
        record.run_id == run.id()
            && record.scenario == name
            && record.outcome == ended.outcome.in_ledger()
            && start == Some(job.submitted_at)
    }))
}
