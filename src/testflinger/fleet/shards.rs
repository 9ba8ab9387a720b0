//! The books of a run on many hosts: which shard has which scenarios, and who has a verdict.
//!
//! Knows nothing of servers. Whatever happens, in whatever order, it keeps one promise: each scenario
//! is owed one verdict, gets one, and no second one.

use super::split::{Backlog, Index, Sizes};
use std::collections::BTreeSet;
use std::time::Duration;

/// How often a scenario may go down with its host before it is given up.
const MOST_LOSSES: u8 = 3;

/// A shard by its number.
pub type ShardId = usize;

/// Scenarios that travel together, as one job.
#[derive(Clone, Debug)]
pub struct Shard {
    /// What it has to run.
    pub scenarios: Vec<Index>,
    /// The id of its job: ours to choose, so that it is known before the server hears of it.
    pub job: String,
    /// Where it is.
    pub state: State,
    /// Who took it.
    pub agent: Option<String>,
}

/// Where a shard is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Made; the server may not know of it.
    New,
    /// Waits for an agent.
    Waiting,
    /// An agent has it.
    Running {
        /// Since when.
        since: Duration,
        /// When it was last heard of.
        heard: Duration,
        /// It is in its test phase, where it does not fall silent.
        testing: bool,
        /// Its scenarios are over, and the rest is the agent's.
        over: bool,
    },
    /// It ended, and all that it had to say is known.
    Ended,
    /// It will not end.
    Lost(String),
    /// Nobody waits for its end.
    Dropped,
}

impl State {
    fn is_over(&self) -> bool {
        matches!(self, Self::Ended | Self::Lost(_) | Self::Dropped)
    }
}

/// How a shard came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It has run to its end.
    Whole,
    /// It has run to its end, and would end so anywhere.
    Hopeless(String),
    /// It, its job or its host died.
    Lost(String),
    /// Nobody waits for it any more.
    Dropped,
}

/// A scenario that gets no further try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// Which.
    pub scenario: Index,
    /// Why.
    pub reason: String,
}

/// The books.
#[derive(Debug)]
pub struct Shards {
    expected: Vec<Duration>,
    done: Vec<bool>,
    owed: usize,
    losses: Vec<u8>,
    backlog: Backlog,
    all: Vec<Shard>,
    distrusted: BTreeSet<String>,
}

impl Shards {
    /// Of scenarios that are expected to take so long.
    pub fn new(expected: Vec<Duration>) -> Self {
        let mut backlog = Backlog::default();
        expected.iter().enumerate().for_each(|(index, length)| backlog.add(index, *length));
        let count = expected.len();
        Self {
            expected,
            done: vec![false; count],
            owed: count,
            losses: vec![0; count],
            backlog,
            all: Vec::new(),
            distrusted: BTreeSet::new(),
        }
    }

    /// Of a run that goes on: with the shards there were, and the scenarios that have a verdict.
    pub fn resumed(expected: Vec<Duration>, all: Vec<Shard>, done: impl IntoIterator<Item = Index>) -> Self {
        let mut shards = Self::new(expected);
        for shard in &all {
            for scenario in shard.scenarios.iter().copied() {
                match shard.state {
                    // Of a scenario that has no verdict it was the end.
                    State::Ended | State::Lost(_) => {
                        shards.losses[scenario] = shards.losses[scenario].saturating_add(1);
                    }
                    State::Dropped => {}
                    _ => shards.backlog.remove(scenario, shards.expected[scenario]),
                }
            }
            if let (State::Lost(_), Some(agent)) = (&shard.state, &shard.agent) {
                shards.distrusted.insert(agent.clone());
            }
        }
        for scenario in done {
            shards.finish(scenario);
            shards.backlog.remove(scenario, shards.expected[scenario]);
        }
        Self { all, ..shards }
    }

    /// True when each scenario has its verdict.
    pub fn all_done(&self) -> bool {
        self.owed == 0
    }

    /// How many scenarios have none yet.
    pub fn owed(&self) -> usize {
        self.owed
    }

    /// The scenarios that have no verdict.
    pub fn unfinished(&self) -> Vec<Index> {
        (0..self.done.len()).filter(|index| !self.done[*index]).collect()
    }

    /// Agents that have lost a shard: they get no more.
    pub fn distrusted(&self) -> &BTreeSet<String> {
        &self.distrusted
    }

    /// All shards there ever were.
    pub fn all(&self) -> &[Shard] {
        &self.all
    }

    /// A shard.
    pub fn get(&self, shard: ShardId) -> &Shard {
        &self.all[shard]
    }

    /// For what is learned of it.
    pub fn get_mut(&mut self, shard: ShardId) -> &mut Shard {
        &mut self.all[shard]
    }

    /// The shards that are not over, oldest first.
    pub fn open(&self) -> impl Iterator<Item = (ShardId, &Shard)> {
        let open = |shard: &Shard| !shard.state.is_over();
        self.all.iter().enumerate().filter(move |(_, shard)| open(shard))
    }

    /// What a shard is expected to take.
    pub fn expected(&self, shard: ShardId) -> Duration {
        self.all[shard].scenarios.iter().map(|scenario| self.expected[*scenario]).sum()
    }

    /// What is in no open shard, and has no verdict.
    pub(super) fn backlog(&self) -> Duration {
        self.backlog.total()
    }

    /// Makes shards of what is to be done, `most` at most.
    pub(super) fn make(&mut self, most: usize, sizes: Sizes) -> Vec<ShardId> {
        let mut made = Vec::new();
        while made.len() < most && !self.backlog.is_empty() {
            let scenarios = self.backlog.next_shard(sizes);
            made.push(self.all.len());
            let job = uuid::Uuid::new_v4().to_string();
            self.all.push(Shard { scenarios, job, state: State::New, agent: None });
        }
        made
    }

    /// True when `scenario` may have this verdict of `shard`: it is the first one, and the scenario
    /// is one of the shard's.
    pub fn accept(&mut self, shard: ShardId, scenario: Index) -> bool {
        self.all[shard].scenarios.contains(&scenario) && self.finish(scenario)
    }

    /// True when `scenario` had no verdict before.
    pub fn finish(&mut self, scenario: Index) -> bool {
        let first = !std::mem::replace(&mut self.done[scenario], true);
        self.owed -= usize::from(first);
        first
    }

    /// Closes a shard. What it leaves without a verdict is to be done again; what was lost too often
    /// is given up, which the caller has to put on record.
    pub fn close(&mut self, shard: ShardId, end: &End) -> Vec<GivenUp> {
        let closed = &mut self.all[shard];
        if closed.state.is_over() {
            return Vec::new();
        }
        closed.state = match end {
            End::Whole | End::Hopeless(_) => State::Ended,
            End::Lost(why) => State::Lost(why.clone()),
            End::Dropped => State::Dropped,
        };
        if let (End::Lost(_), Some(agent)) = (end, &closed.agent) {
            self.distrusted.insert(agent.clone());
        }
        let mut given_up = Vec::new();
        for scenario in self.all[shard].scenarios.clone() {
            if self.done[scenario] {
                continue;
            }
            let reason = match end {
                End::Dropped => None,
                End::Hopeless(why) => Some(why.clone()),
                End::Whole => self.lose(scenario, "its shard ended without a verdict of it"),
                End::Lost(why) => self.lose(scenario, why),
            };
            match reason {
                Some(reason) => {
                    self.finish(scenario);
                    given_up.push(GivenUp { scenario, reason });
                }
                None => self.backlog.add(scenario, self.expected[scenario]),
            }
        }
        given_up
    }

    /// Counts a loss; the reason when it was the last.
    fn lose(&mut self, scenario: Index, why: &str) -> Option<String> {
        self.losses[scenario] += 1;
        (self.losses[scenario] >= MOST_LOSSES)
            .then(|| format!("it was sent out {MOST_LOSSES} times and never came back; the last time, {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZES: Sizes =
        Sizes { hosts: 3, smallest: Duration::from_secs(30), largest: Duration::from_secs(3600) };

    fn books(count: usize) -> Shards {
        Shards::new((0..count).map(|index| Duration::from_secs(10 + index as u64)).collect())
    }

    #[test]
    fn what_a_lost_shard_has_finished_is_not_repeated() {
        let mut shards = books(9);
        let made = shards.make(1, SIZES)[0];
        let scenarios = shards.get(made).scenarios.clone();
        assert!(scenarios.len() > 1 && shards.accept(made, scenarios[0]));
        shards.get_mut(made).agent = Some("rack1".into());
        assert!(shards.close(made, &End::Lost("its host fell silent".into())).is_empty());
        assert!(shards.distrusted().contains("rack1"));
        let next: Vec<_> =
            shards.make(99, SIZES).iter().flat_map(|id| shards.get(*id).scenarios.clone()).collect();
        assert!(!next.contains(&scenarios[0]));
        assert!(scenarios[1..].iter().all(|scenario| next.contains(scenario)));
        assert!(!shards.accept(made, scenarios[0]), "a second verdict");
    }

    #[test]
    fn a_verdict_on_what_is_not_in_the_shard_is_none() {
        let mut shards = books(9);
        let made = shards.make(2, SIZES);
        let others = shards.get(made[1]).scenarios[0];
        assert!(!shards.accept(made[0], others));
        assert!(shards.accept(made[1], others));
    }

    #[test]
    fn what_is_lost_again_and_again_is_given_up_with_the_reason() {
        let mut shards = books(1);
        for round in 1..=MOST_LOSSES {
            let made = shards.make(1, SIZES)[0];
            let given_up = shards.close(made, &End::Lost("provisioning failed".into()));
            assert_eq!(given_up.len(), usize::from(round == MOST_LOSSES));
            if let Some(last) = given_up.first() {
                assert!(last.reason.contains("3 times") && last.reason.ends_with("provisioning failed"));
            }
        }
        assert!(shards.all_done() && shards.make(1, SIZES).is_empty());
    }

    #[test]
    fn a_shard_that_is_dropped_costs_no_try() {
        let mut shards = books(1);
        for _ in 0..10 {
            let made = shards.make(1, SIZES)[0];
            assert!(shards.close(made, &End::Dropped).is_empty());
        }
        let made = shards.make(1, SIZES)[0];
        assert_eq!(shards.close(made, &End::Hopeless("wrong settings".into())).len(), 1);
        assert!(shards.close(made, &End::Lost("late".into())).is_empty(), "it is closed");
    }

    #[derive(Clone, Debug)]
    enum Happening {
        Make(usize),
        Verdict(usize, usize),
        /// The process dies, and another one goes on.
        Die,
        Close(usize, u8),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            (0usize..4).prop_map(Happening::Make),
            (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Happening::Verdict(a, b)),
            (any::<usize>(), 0u8..4).prop_map(|(a, b)| Happening::Close(a, b)),
            Just(Happening::Die),
        ]
    }

    proptest! {
        #[test]
        fn each_scenario_has_one_verdict_whatever_dies_and_in_any_order(
            count in 1usize..40, happenings in prop::collection::vec(happening(), 0..200),
        ) {
            let mut shards = books(count);
            let mut verdicts = vec![0; count];
            // At last, whatever is open ends well until nothing is left.
            let end = (0..5 * count).flat_map(|_| [Happening::Make(4), Happening::Close(0, 9)]);
            for happening in happenings.into_iter().chain(end) {
                match happening {
                    Happening::Make(most) => drop(shards.make(most, SIZES)),
                    Happening::Verdict(shard, scenario) if !shards.all().is_empty() => {
                        let (shard, scenario) = (shard % shards.all().len(), scenario % count);
                        verdicts[scenario] += usize::from(shards.accept(shard, scenario));
                    }
                    Happening::Verdict(..) => {}
                    Happening::Die => {
                        let done = (0..count).filter(|scenario| verdicts[*scenario] > 0);
                        let (old, all) = (shards.losses.clone(), shards.all.clone());
                        shards = Shards::resumed(shards.expected.clone(), all, done);
                        for scenario in shards.unfinished() {
                            prop_assert_eq!(shards.losses[scenario], old[scenario]);
                        }
                    }
                    Happening::Close(shard, how) => {
                        let open: Vec<_> = shards.open().map(|(id, _)| id).collect();
                        let Some(shard) = open.get(shard % open.len().max(1)) else { continue };
                        let end = match how {
                            0 => End::Lost("it died".into()),
                            1 => End::Hopeless("it cannot run".into()),
                            2 => End::Dropped,
                            3 => End::Whole,
                            _ => {
                                for scenario in shards.get(*shard).scenarios.clone() {
                                    verdicts[scenario] += usize::from(shards.accept(*shard, scenario));
                                }
                                End::Whole
                            }
                        };
                        for GivenUp { scenario, .. } in shards.close(*shard, &end) {
                            verdicts[scenario] += 1;
                        }
                    }
                }
                // Whoever has no verdict is in one open shard, or waits for one.
                let open: Vec<_> = shards.open().flat_map(|(_, shard)| shard.scenarios.clone()).collect();
                let mut unique = open.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(open.len(), unique.len());
                prop_assert_eq!(shards.owed(), verdicts.iter().filter(|number| **number == 0).count());
            }
            prop_assert!(shards.all_done());
            prop_assert!(verdicts.iter().all(|number| *number == 1), "{:?}", verdicts);
        }
    }
}
