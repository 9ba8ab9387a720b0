//! What a run leaves behind: run directory, metadata, ledger, diagnostics, events.
//!
//! ```text
//! notes/                                  the log root
//!   vm-run-ledger.jsonl                   one line per scenario execution: ledger
//!   deferred.jsonl                        what later runs still have to run: deferred
//!   latest -> 2026-01-31T120000Z-1a2b3c4d
//!   .running/                             who is alive: sweep
//!   2026-01-31T120000Z-1a2b3c4d/          one invocation: run
//!     run.json
//!     disks--are-blank/                   one scenario execution: evidence
//!       scenario.json  metadata.json  events.jsonl  record.json
//!       logs/harness.log  logs/serial.log  logs/diagnostics/
//! ```
//!
//! Does not collect diagnostics from a guest: who can, asks [`Evidence::diagnostic`] for a path.

mod adopt;
pub mod deferred;
pub mod environment;
pub mod event;
mod evidence;
pub(crate) mod files;
pub mod history;
pub mod ledger;
pub mod metadata;
pub mod run;
pub mod scratch;
mod sweep;

pub use environment::Environment;
pub use evidence::Evidence;
pub use ledger::Record;
pub use metadata::{BootKind, Metadata, Outcome};
pub use run::{Run, arguments};
pub use scratch::Scratch;
pub use sweep::{Swept, sweep};
