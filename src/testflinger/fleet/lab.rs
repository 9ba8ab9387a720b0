//! What a run acts through: where shards run, what is asked of them, what comes back.

use super::shards::{ShardId, Shards};
use super::split::Index;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// Why something could not be done.
#[derive(Debug)]
pub enum Trouble {
    /// The server is away: later it may be done.
    Away(String),
    /// It will never be done.
    Fatal(anyhow::Error),
    /// Ctrl-C.
    Interrupted,
}

/// A shard to be submitted.
#[derive(Clone, Debug)]
pub struct Order {
    /// Which.
    pub shard: ShardId,
    /// The id of its job.
    pub job: String,
    /// What it has to run.
    pub scenarios: Vec<Index>,
    /// Who shall not get it.
    pub exclude: BTreeSet<String>,
}

/// What a shard that runs was heard to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Anything at all, since it was last listened to.
    pub any: bool,
    /// Who runs it, when that is known.
    pub agent: Option<String>,
    /// Its scenarios are over; what remains is the agent's work.
    pub over: bool,
}

/// What came back of a shard.
#[derive(Debug)]
pub struct Harvest<F> {
    /// Verdicts of its scenarios.
    pub findings: Vec<(Index, F)>,
    /// How its run ended; `None` when it did not.
    pub ended: Option<Ended>,
    /// Who ran it.
    pub agent: Option<String>,
    /// When it did not end: why.
    pub why: String,
}

/// How the run of a shard ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Why it could run nowhere; `None` when it ran.
    pub hopeless: Option<String>,
    /// The exit status of the test binary, and the last line that it printed.
    pub how: String,
    /// What its scenarios took.
    pub took: Duration,
}

/// What becomes of a scenario.
#[derive(Debug)]
pub enum Verdict<F> {
    /// What its shard says.
    Found(F),
    /// It has none, and this is why.
    Error(String),
    /// Nobody waits for one any more.
    Interrupted,
}

/// Where shards run.
pub trait Lab {
    /// A verdict with its evidence, as the lab knows it.
    type Finding;

    /// Since the lab was opened.
    fn now(&self) -> Duration;

    /// Lets time pass.
    ///
    /// # Errors
    /// [`Trouble::Interrupted`].
    fn rest(&mut self, time: Duration) -> Result<(), Trouble>;

    /// How many agents may take shards, without those.
    ///
    /// # Errors
    /// When the server does not say.
    fn hosts(&mut self, without: &BTreeSet<String>) -> Result<usize, Trouble>;

    /// Writes the books down. What is in them may be done then: whoever finds them goes on with it.
    ///
    /// # Errors
    /// When they cannot be written.
    fn write_down(&mut self, shards: &Shards) -> Result<(), Trouble>;

    /// Submits shards. One that could not be submitted for an outage is tried again later, and is
    /// never there twice.
    fn submit(&mut self, orders: &[Order]) -> Vec<Result<(), Trouble>>;

    /// The states of all jobs, in one request.
    ///
    /// # Errors
    /// When the server does not say.
    fn states(&mut self) -> Result<HashMap<String, JobState>, Trouble>;

    /// Listens to shards that run.
    fn listen(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<News, Trouble>>;

    /// What there is of shards that are over.
    fn collect(&mut self, shards: &[(ShardId, String)]) -> Vec<Result<Harvest<Self::Finding>, Trouble>>;

    /// The verdicts that were heard of a shard, without asking anybody.
    fn heard(&mut self, shard: ShardId) -> Vec<(Index, Self::Finding)>;

    /// Ends jobs, if they are not over, and if the server may have heard of them.
    fn cancel(&mut self, shards: &[(ShardId, String)]);

    /// Puts a verdict on record.
    ///
    /// # Errors
    /// When it cannot be written.
    fn keep(&mut self, scenario: Index, verdict: Verdict<Self::Finding>) -> Result<(), Trouble>;

    /// Something that a person wants to know.
    fn say(&mut self, text: &str);

    /// The books after each round, to be shown.
    fn round(&mut self, shards: &Shards);
}

/// A job, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Nobody has it yet.
    Waiting,
    /// Something is done for it, but no test.
    Busy,
    /// Its test runs, or has run.
    Testing,
    /// Nothing more happens to it.
    Over,
}
