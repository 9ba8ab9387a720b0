//! The same scenarios on many hosts: they are split into shards, each shard is a job, and what comes
//! back is one run.
//!
//! [`run`](run::run) is the work: it sends out shards, watches them, and takes what comes back.
//! [`shards`] keeps the books, `split` says how large a shard is. All of it acts through a
//! [`Lab`](lab::Lab): a Testflinger server, or a [`simulation`].
//!
//! A shard is longer at the beginning of a run and shorter towards its end; it has the longest scenarios
//! that are left, by the medians of the ledger. A host that dies takes a shard with it: its job ends
//! without the file that says how its run ended, or it says nothing for 75 seconds, though a shard says
//! something every 15. What it had finished was in its log and is not repeated; the rest goes into
//! other shards, which other agents get. A scenario that is lost three times ends in `error`.
//!
//! The process itself may die as well: what it did is in its run directory, and another one goes on with it
//! ([`saved`]).

mod each;
mod harvest;
pub mod job;
pub mod lab;
mod remote;
pub mod run;
pub mod saved;
pub mod server;
pub mod shards;
pub mod show;
pub mod simulation;
mod split;
pub use split::Index;
