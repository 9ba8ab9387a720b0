//! What is still to be done, longest first, and how much of it the next shard gets.
//!
//! Shards shrink as the work does (guided self-scheduling: Polychronopoulos and Kuck, 1987): the
//! first ones are long, so that few jobs are needed; the last ones short, so that hosts end together
//! whatever the medians did not know, and whoever died.

use std::collections::BTreeSet;
use std::time::Duration;

/// A scenario by its place in the list of all.
pub type Index = usize;

/// The scenarios that no shard has.
#[derive(Clone, Debug, Default)]
pub(super) struct Backlog {
    by_length: BTreeSet<(Duration, Index)>,
    total: Duration,
}

/// How large shards are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// How many hosts work at once.
    pub(super) hosts: usize,
    /// A shard that is shorter costs more than it is worth. No more than an even part of the whole
    /// run, or some host has nothing to do.
    pub(super) smallest: Duration,
    /// A shard that is longer hits the limits of agents.
    pub(super) largest: Duration,
}

/// The share of an even part that a shard gets, margin included. The rest comes later, in smaller
/// ones, to whoever is free then.
const SHARE: f64 = 0.9;
/// A scenario may take so much longer than its median; of many, some take longer and some shorter, so
/// that their margins add up as squares.
const MARGIN: f64 = 0.8;

impl Backlog {
    pub(super) fn add(&mut self, scenario: Index, length: Duration) {
        if self.by_length.insert((length, scenario)) {
            self.total += length;
        }
    }

    pub(super) fn remove(&mut self, scenario: Index, length: Duration) {
        if self.by_length.remove(&(length, scenario)) {
            self.total -= length;
        }
    }

    /// What all of it takes.
    pub(super) fn total(&self) -> Duration {
        self.total
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_length.is_empty()
    }

    /// The next shard: the longest scenario that is left, and then always the longest that still
    /// fits. Empty only when nothing is left.
    pub(super) fn next_shard(&mut self, sizes: Sizes) -> Vec<Index> {
        let even = self.total.div_f64(sizes.hosts.max(1) as f64);
        let size = even.mul_f64(SHARE).min(sizes.largest);
        let mut shard = Vec::new();
        let mut room = Room { left: size.as_secs_f64(), squares: 0.0 };
        let mut least = sizes.smallest;
        while let Some((length, scenario)) = self.longest(room.longest().max(least), shard.is_empty()) {
            self.remove(scenario, length);
            room.take(length);
            least = least.saturating_sub(length);
            shard.push(scenario);
        }
        shard
    }

    fn longest(&self, limit: Duration, any: bool) -> Option<(Duration, Index)> {
        if any || limit.is_zero() {
            return self.by_length.last().copied().filter(|_| any);
        }
        self.by_length.range(..=(limit, Index::MAX)).next_back().copied()
    }
}

/// What of a shard is not filled yet, in seconds.
struct Room {
    left: f64,
    /// The squares of what is in it, added up.
    squares: f64,
}

impl Room {
    fn take(&mut self, length: Duration) {
        self.left -= length.as_secs_f64();
        self.squares += length.as_secs_f64().powi(2);
    }

    /// The longest that fits with the margin of all: the greatest `x` for which
    /// `x + MARGIN * sqrt(squares + x * x)` is not more than what is left.
    fn longest(&self) -> Duration {
        let Self { left, squares } = *self;
        let (m, rest) = (MARGIN * MARGIN, left * left - MARGIN * MARGIN * squares);
        if left < 0.0 || rest < 0.0 {
            return Duration::ZERO;
        }
        let x = (left - (left * left - (1.0 - m) * rest).sqrt()) / (1.0 - m);
        Duration::try_from_secs_f64(x).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn shards(lengths: &[u64], hosts: usize, smallest: u64) -> Vec<Vec<Index>> {
        let mut backlog = Backlog::default();
        lengths.iter().enumerate().for_each(|(index, length)| backlog.add(index, seconds(*length)));
        let even = backlog.total().div_f64(hosts.max(1) as f64);
        let sizes = Sizes { hosts, smallest: seconds(smallest).min(even), largest: seconds(3600) };
        let mut shards = Vec::new();
        while !backlog.is_empty() {
            shards.push(backlog.next_shard(sizes));
        }
        assert_eq!(backlog.total, Duration::ZERO);
        shards
    }

    #[test]
    fn short_work_is_one_shard_for_each_host_and_longest_first() {
        let split = shards(&[10, 50, 20, 40], 2, 60);
        assert_eq!(split, [vec![1, 0], vec![3, 2]]);
    }

    #[test]
    fn a_scenario_that_is_longer_than_its_part_is_alone() {
        assert_eq!(shards(&[1000, 10, 10], 3, 60)[0], [0]);
    }

    #[test]
    fn shards_shrink_down_to_the_smallest() {
        let split = shards(&[10; 400], 4, 100);
        let sizes: Vec<_> = split.iter().map(Vec::len).collect();
        assert_eq!(sizes[0], 82);
        assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
        assert!(sizes.iter().rev().skip(4).all(|size| *size >= 10), "{sizes:?}");
        assert!(split.len() < 30, "{}", split.len());
    }

    #[test]
    fn scenarios_of_which_nothing_is_known_are_split_all_the_same() {
        assert_eq!(shards(&[0; 5], 2, 60).concat().len(), 5);
    }

    proptest! {
        #[test]
        fn each_scenario_is_in_one_shard(
            lengths in prop::collection::vec(0u64..2000, 0..120), hosts in 0usize..20, smallest in 0u64..500,
        ) {
            let split = shards(&lengths, hosts, smallest);
            prop_assert!(split.iter().all(|shard| !shard.is_empty()));
            let mut all = split.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
        }

        /// The first shards go to one host each; none of them may be what the run waits for.
        #[test]
        fn no_shard_is_longer_than_an_even_part_but_by_one_scenario(
            lengths in prop::collection::vec(1u64..2000, 1..120), hosts in 1usize..20, smallest in 0u64..500,
        ) {
            let total: u64 = lengths.iter().sum();
            let longest = lengths.iter().max().copied().unwrap_or_default();
            for shard in shards(&lengths, hosts, smallest) {
                let length: u64 = shard.iter().map(|index| lengths[*index]).sum();
                prop_assert!(length as f64 <= (total as f64 / hosts as f64).max(longest as f64) + 1.0);
            }
        }
    }
}
