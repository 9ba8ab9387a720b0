//! QEMU machines: from what a scenario needs to a running VM one can drive.

pub mod accel;
pub mod assemble;
pub mod needs;
pub mod qemu;
pub mod qmp;
pub mod spec;

pub use needs::{Boot, Bus, DiskNeed, Firmware, Medium, Needs};
