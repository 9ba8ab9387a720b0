//! Requests of a round, a few at a time.

use std::sync::{Mutex, PoisonError};

/// How many are under way at once.
pub(super) const AT_ONCE: usize = 8;

/// Does something for each, a few at a time; the answers in the same order.
pub(super) fn each<T: Send, R: Send>(items: Vec<T>, act: impl Fn(T) -> R + Sync) -> Vec<R> {
    let count = items.len();
    let queue = Mutex::new(items.into_iter().enumerate());
    let done = Mutex::new(Vec::with_capacity(count));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(count) {
            scope.spawn(|| {
                while let Some((place, item)) = next() {
                    let answer = act(item);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((place, answer));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, answer)| answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_in_the_order_of_the_questions() {
        let numbers: Vec<u32> = (0..100).collect();
        assert_eq!(each(numbers.clone(), |number| number), numbers);
        assert!(each(Vec::<u32>::new(), |number| number).is_empty());
    }
}
