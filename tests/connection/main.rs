//! Connections against real peers: one contract for every implementation, and what SSH does when
//! its peer is late, silent, wrong or dead.

mod contract;
mod plan;
mod ssh;
mod sshd;
