//! The harness as its users meet it: what a test binary prints, how it exits, what it leaves behind.
//!
//! The binaries are the examples in `tests/selftest/`, most of whose scenarios fail on purpose.

mod budget;
mod debug;
mod faults;
mod input;
mod kills;
mod nix;
mod runs;
mod support;
