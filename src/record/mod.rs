//! What a run leaves behind: run directory, metadata, ledger, diagnostics, events.

pub mod event;
