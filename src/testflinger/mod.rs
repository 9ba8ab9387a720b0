//! Testflinger: the queue service that hands jobs to machines in a lab.
//!
//! [`wire`] is the vocabulary of its server, [`client`] speaks HTTP with it, [`agent`] takes jobs from
//! queues and runs them, [`device`] makes machines that they can run on, [`jobs`] submits jobs and tells
//! how they ended, [`fleet`] spreads the scenarios of a project over agents. The protocol is that of
//! server 1.5.0; the vocabulary knows nothing of HTTP, the client nothing of agents.

pub mod agent;
mod archive;
pub mod client;
pub mod device;
pub mod fleet;
mod gauge;
pub mod jobs;
pub mod template;
pub mod wire;

/// The name of an agent, as a part of the names of its files.
fn file_name(agent: &str) -> String {
    agent.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect()
}
