//! Shakedown's own scenarios: the `debian` image, booted in every way that it promises.

mod boot;
mod command;
mod device;
mod disks;
mod forks;
mod identity;
mod network;
mod nixos;
mod power;
mod prebuilt;
mod residue;

shakedown::main!();
