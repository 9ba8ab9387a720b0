//! How long a run will take, and which of its scenarios fit into its budget.
//!
//! Owns the arithmetic. What a scenario is expected to take comes from outside, and so does what
//! happens to one that does not fit.

use std::time::Duration;

/// A scenario, as far as time is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    /// What it takes; zero where nothing is known.
    pub(super) estimate: Duration,
    pub(super) machine: bool,
}

/// What runs at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lanes {
    /// Scenarios of this process.
    pub(super) threads: usize,
    /// Those of them that have a machine.
    pub(super) machines: usize,
}

/// When a job would end, counted from the beginning of the run, and whether it may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) end: Duration,
    pub(super) fits: bool,
}

/// Puts the jobs on the lanes as the run will: in their order, each on the lane that is free first.
/// One that would end after `limit` does not fit, and takes no lane; shorter ones behind it may
/// still fit. The first job fits however long it is: in no later run would there be more time for it.
pub(super) fn plan(jobs: &[Job], lanes: Lanes, spent: Duration, limit: Duration) -> Vec<Slot> {
    let mut threads = vec![spent; lanes.threads.max(1)];
    let mut machines = vec![spent; lanes.machines.max(1)];
    let mut first = true;
    let mut place = |job: &Job| {
        let thread = earliest(&threads);
        let machine = earliest(&machines);
        let begin = if job.machine { threads[thread].max(machines[machine]) } else { threads[thread] };
        let end = begin.saturating_add(job.estimate);
        let fits = end <= limit || first;
        first = false;
        if fits {
            threads[thread] = end;
            if job.machine {
                machines[machine] = end;
            }
        }
        Slot { end, fits }
    };
    jobs.iter().map(&mut place).collect()
}

/// How long the run takes with all of its jobs.
pub(super) fn length(jobs: &[Job], lanes: Lanes, spent: Duration) -> Duration {
    let slots = plan(jobs, lanes, spent, Duration::MAX);
    slots.into_iter().map(|slot| slot.end).max().unwrap_or(spent)
}

fn earliest(lanes: &[Duration]) -> usize {
    lanes.iter().enumerate().min_by_key(|(_, free)| **free).map_or(0, |(lane, _)| lane)
}

/// A length of time for a person who plans: minutes where there are some, rounded up.
pub(super) fn about(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().ceil();
    if seconds >= 120.0 { format!("{} min", (seconds / 60.0).ceil()) } else { format!("{seconds} s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn jobs(estimates: &[u64], machine: bool) -> Vec<Job> {
        estimates.iter().map(|estimate| Job { estimate: seconds(*estimate), machine }).collect()
    }

    fn fitting(jobs: &[Job], lanes: (usize, usize), spent: u64, limit: u64) -> Vec<bool> {
        let lanes = Lanes { threads: lanes.0, machines: lanes.1 };
        plan(jobs, lanes, seconds(spent), seconds(limit)).iter().map(|slot| slot.fits).collect()
    }

    #[test]
    fn what_ends_too_late_is_left_out_and_what_is_shorter_still_fits() {
        let jobs = jobs(&[40, 30, 50, 30, 0, 1], true);
        assert_eq!(fitting(&jobs, (1, 1), 0, 100), [true, true, false, true, true, false]);
        assert_eq!(fitting(&jobs, (2, 2), 0, 100), [true, true, true, true, true, true]);
        assert_eq!(fitting(&jobs, (2, 1), 0, 100), [true, true, false, true, true, false]);
        assert_eq!(fitting(&jobs, (1, 1), 70, 100), [true, false, false, false, false, false]);
    }

    #[test]
    fn only_machines_wait_for_machines() {
        let mut jobs = jobs(&[60, 60], true);
        jobs.push(Job { estimate: seconds(10), machine: false });
        assert_eq!(length(&jobs, Lanes { threads: 2, machines: 1 }, seconds(5)), seconds(125));
        assert_eq!(length(&jobs, Lanes { threads: 3, machines: 3 }, seconds(0)), seconds(60));
        assert_eq!(length(&[], Lanes { threads: 3, machines: 3 }, seconds(7)), seconds(7));
    }

    #[test]
    fn what_is_longer_than_any_budget_runs_when_it_comes_first() {
        let jobs = jobs(&[200, 1, 0], true);
        assert_eq!(fitting(&jobs, (1, 1), 0, 100), [true, false, false]);
        assert_eq!(fitting(&jobs[1..], (1, 1), 0, 100), [true, true]);
    }

    #[test]
    fn lengths_are_told_in_minutes() {
        for (length, text) in [(seconds(0), "0 s"), (seconds(119), "119 s"), (seconds(3001), "51 min")] {
            assert_eq!(about(length), text);
        }
        assert_eq!(about(Duration::from_millis(1)), "1 s");
    }

    proptest! {
        #[test]
        fn a_plan_keeps_to_its_limit_and_leaves_out_only_what_breaks_it(
            estimates in prop::collection::vec((0u64..500, any::<bool>()), 0..30),
            threads in 1usize..6, machines in 1usize..6, limit in 0u64..2000,
        ) {
            let jobs: Vec<_> =
                estimates.iter().map(|(s, machine)| Job { estimate: seconds(*s), machine: *machine }).collect();
            let lanes = Lanes { threads, machines };
            let slots = plan(&jobs, lanes, Duration::ZERO, seconds(limit));
            for (number, slot) in slots.iter().enumerate() {
                prop_assert_eq!(slot.fits, number == 0 || slot.end <= seconds(limit));
            }
            let fitting: Vec<_> =
                jobs.iter().zip(&slots).filter(|(_, slot)| slot.fits).map(|(job, _)| *job).collect();
            let first = jobs.first().map_or(Duration::ZERO, |job| job.estimate);
            prop_assert!(length(&fitting, lanes, Duration::ZERO) <= seconds(limit).max(first));
            // No lane stands still while there is work, so it is never worse than one after the other.
            let sum: Duration = jobs.iter().map(|job| job.estimate).sum();
            prop_assert!(length(&jobs, lanes, Duration::ZERO) <= sum);
            prop_assert!(length(&jobs, lanes, Duration::ZERO) * threads as u32 >= sum);
        }
    }
}
