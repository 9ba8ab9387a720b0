//! QEMU machines: from what a scenario needs to a running VM one can drive.

pub mod accel;
pub mod needs;

pub use needs::{Boot, Bus, DiskNeed, Firmware, Medium, Needs};
