//! What is to be done for which machine, from the machines file and from what an earlier process left.

use super::pack::Packs;
use super::retry::Retry;
use super::store::{Job, RunFile, Stage, Store};
use super::work::Shop;
use super::{Options, Row, WrongInput, machines};
use crate::fault::Fault;
use crate::testflinger::client::Client;
use crate::testflinger::template::{PLACEHOLDER, Template};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// What is done next for a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Submit its job.
    Send,
    /// Wait for the next search.
    Watch,
    /// Ask for this job alone.
    Ask,
    /// Fetch the result.
    Collect,
    /// Nothing more.
    Over,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) job: Job,
    pub(super) step: Step,
    /// A worker is at it.
    pub(super) busy: bool,
    pub(super) retry: Retry,
    /// As the server last said.
    pub(super) state: Option<String>,
    /// Why there is no job, or no other one.
    pub(super) refused: Option<String>,
}

impl Machine {
    fn new(name: &str, job: Job, step: Step) -> Self {
        let name = name.to_owned();
        Self { name, job, step, busy: false, retry: Retry::now(), state: None, refused: None }
    }

    pub(super) fn row(&self, store: &Store) -> Row {
        let Self { job, refused, .. } = self;
        let ended = job.ended.as_ref();
        let is_there = !matches!(job.stage, Stage::Planned | Stage::Intended);
        let outcome = ended.map(|ended| ended.outcome);
        let reasons = [ended.and_then(|ended| ended.reason.as_ref()), refused.as_ref()];
        let reason: Vec<_> = reasons.into_iter().flatten().map(String::as_str).collect();
        Row {
            machine: self.name.clone(),
            job_id: is_there.then(|| job.job_id.clone()),
            attempt: job.attempt,
            state: is_there.then(|| self.state.clone().unwrap_or_else(|| "submitted".into())),
            outcome: outcome.or_else(|| refused.is_some().then_some(super::Outcome::Error)),
            reason: (!reason.is_empty()).then(|| reason.join("; ")),
            statuses: ended.map(|ended| ended.statuses.clone()).unwrap_or_default(),
            exit_status: ended.and_then(|ended| ended.exit),
            hw_status: ended.and_then(|ended| ended.hw_status.clone()),
            seconds: ended.map(|ended| ended.at.seconds_since(job.submitted_at)),
            previous_jobs: job.previous.clone(),
            directory: store.machine_dir(&self.name),
        }
    }
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shop: Shop,
    pub(super) run: RunFile,
    pub(super) machines: Vec<Machine>,
    pub(super) is_resumed: bool,
}

pub(super) fn make(options: &Options) -> Result<Plan> {
    let wanted = if options.send { read_machines(&options.machines_file)? } else { Vec::new() };
    let template = (options.send || options.retry_provision > 0)
        .then(|| read_template(&options.template_file, &wanted))
        .transpose()?;
    if !options.send && !options.output_dir.is_dir() {
        return Err(nothing(&options.output_dir));
    }
    let store = Store::open(&options.output_dir)?;
    let mut jobs = BTreeMap::new();
    for name in store.machines()? {
        if let Some(job) = store.job(&name)? {
            jobs.insert(name, job);
        }
    }
    let earlier =
        store.run()?.filter(|run| !options.send || (!options.new_run && is_open(run, &jobs, &wanted)));
    let client = Client::for_user(&server(options, earlier.as_ref())?, options.login.clone());
    let is_resumed = earlier.is_some();
    let mut run = earlier.unwrap_or_else(|| RunFile::new(client.base(), Vec::new()));
    let is_part = |job: &Job| job.run == run.tag || (!options.send && job.run.is_empty());
    let asked = if options.send { &wanted } else { &run.machines };
    let mut names = asked.clone();
    names.extend(
        jobs.iter().filter(|(name, job)| is_part(job) && !asked.contains(name)).map(|(name, _)| name.clone()),
    );
    if names.is_empty() {
        return Err(nothing(&options.output_dir));
    }
    let machines = names.iter().map(|name| machine(name, jobs.remove(name), &run.tag, options)).collect();
    run.machines = names;
    store.save_run(&run)?;
    let wait_for_agents = options.wait_for_agents;
    let shop = Shop { client, store, template, packs: Packs::default(), wait_for_agents };
    Ok(Plan { shop, run, machines, is_resumed })
}

fn machine(name: &str, job: Option<Job>, tag: &str, options: &Options) -> Machine {
    let job = match job {
        Some(job) if job.run == tag || (!options.send && job.run.is_empty()) => job,
        other => Job::planned(name, tag, other),
    };
    let step = match (&job.ended, job.stage) {
        (Some(_), _) => Step::Over,
        (None, Stage::Queued) if options.watch => Step::Watch,
        (None, Stage::Queued) => Step::Over,
        (None, _) if options.send || job.attempt > 1 => Step::Send,
        (None, _) => Step::Over,
    };
    let unsent = job.ended.is_none() && job.stage != Stage::Queued && step == Step::Over;
    let mut machine = Machine::new(name, job, step);
    if unsent {
        machine.refused = Some("it was never submitted: `shakedown jobs --send-jobs` does that".into());
    }
    machine
}

/// True when something of the run is left to do for a machine that is still wanted, or has a job. A run
/// without any job is as good as none.
fn is_open(run: &RunFile, jobs: &BTreeMap<String, Job>, wanted: &[String]) -> bool {
    let has_jobs = jobs.values().any(|job| job.run == run.tag);
    let is_left = run.machines.iter().any(|name| match jobs.get(name) {
        Some(job) if job.run == run.tag => job.ended.is_none() || job.retry,
        // Of another program, and taken into the run when it was looked at.
        Some(job) if job.run.is_empty() => false,
        _ => wanted.contains(name),
    });
    has_jobs && is_left
}

/// The server of a run that goes on is where its jobs are.
fn server(options: &Options, run: Option<&RunFile>) -> Result<String> {
    let Some(run) = run else {
        return Ok(options.server.clone().unwrap_or_else(|| options.default_server.clone()));
    };
    if let Some(server) = &options.server {
        let base = Client::for_user(server, None).base().to_owned();
        if base != run.server {
            let what =
                format!("the jobs in {} are at {}, not at {base}", options.output_dir.display(), run.server);
            let fix =
                format!("leave out `--server`, or give `--server {}` or another `--output-dir`", run.server);
            return Err(Fault::host(what).fix(fix).into());
        }
    }
    let usual = Client::for_user(&options.default_server, None).base().to_owned();
    if options.login.is_some() && options.server.is_none() && run.server != usual {
        // A file is not who we give a secret to.
        let what = format!("the jobs in {} are at {}", options.output_dir.display(), run.server);
        let fix = format!("give `--server {}` if that is to have your login", run.server);
        return Err(Fault::host(what).fix(fix).into());
    }
    // Who we are to it may be in what was given, and is in no file.
    let given = options.server.as_ref().or(Some(&options.default_server).filter(|_| run.server == usual));
    Ok(given.unwrap_or(&run.server).clone())
}

fn nothing(directory: &Path) -> anyhow::Error {
    Fault::host(format!("there are no jobs in {}", directory.display()))
        .fix("submit some with `shakedown jobs --send-jobs`, or name another place with `--output-dir`")
        .into()
}

fn read_machines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| {
        Fault::host(format!("cannot read the machines file {}", path.display()))
            .fix("name it with `--machines-file FILE`; it has one Canonical ID a line")
    })?;
    machines::parse(&text)
        .with_context(|| WrongInput(format!("the machines file {} is wrong", path.display())))
}

fn read_template(path: &Path, machines: &[String]) -> Result<Template> {
    let named = || Fault::host("the template cannot be had").fix("name it with `--template-file FILE`");
    let template = Template::read(path).with_context(named)?;
    let wrong = || WrongInput(format!("the template {} is wrong", path.display()));
    if machines.len() > 1 && !template.has_placeholder() {
        return Err(Fault::host(format!("it is the same job for all machines: it has no {PLACEHOLDER}"))
            .fix(format!("write `job_queue: \"{PLACEHOLDER}\"`")))
        .with_context(wrong);
    }
    // All of them before the first is submitted.
    for machine in machines {
        template.fill(machine).with_context(|| format!("for {machine}")).with_context(wrong)?;
    }
    Ok(template)
}
