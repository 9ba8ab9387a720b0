//! Catching a panic together with its place.
//!
//! A panic that is caught here is not printed where it happens, among the output of others; it is
//! the message of the outcome. Panics elsewhere are printed as always.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::Once;

thread_local! {
    /// `Some` while this thread is inside [`catch`]: what its last panic said.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`.
///
/// # Errors
/// The message and place of its panic, and the backtrace where `RUST_BACKTRACE` asks for it.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let caught = CAUGHT.with_borrow_mut(|caught| match caught {
                Some(message) => {
                    *message = describe(info);
                    true
                }
                None => false,
            });
            if !caught {
                before(info);
            }
        }));
    });
    CAUGHT.set(Some(String::new()));
    // Nothing that the panic may have left half done is looked at again but for the machine, which
    // is destroyed.
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    let message = CAUGHT.take().unwrap_or_default();
    result.map_err(|_| message)
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let message = text
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panicked with a value that is not text");
    let place = info.location().map(|place| format!("\n  at {place}")).unwrap_or_default();
    let trace = Backtrace::capture();
    let trace = match trace.status() {
        BacktraceStatus::Captured => format!("\n{trace}"),
        _ => String::new(),
    };
    format!("{message}{place}{trace}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_and_place_are_kept() {
        let message = catch(|| panic!("broken {}", 7)).expect_err("panics");
        assert!(message.starts_with("broken 7\n  at src/harness/panics.rs:"), "{message}");
        assert_eq!(catch(|| 5), Ok(5));
    }

    #[test]
    fn threads_do_not_mix() {
        let threads: Vec<_> =
            (0..8).map(|n| std::thread::spawn(move || catch(|| panic!("number {n}.")))).collect();
        for (n, thread) in threads.into_iter().enumerate() {
            let message = thread.join().expect("caught").expect_err("panics");
            assert!(message.starts_with(&format!("number {n}.")), "{message}");
        }
    }
}
