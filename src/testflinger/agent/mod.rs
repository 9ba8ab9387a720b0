//! agent

pub mod config;
mod log;
mod mask;
mod runner;
mod survivors;
