//! QEMU machines: from what a scenario needs to a running VM one can drive.

pub mod accel;
pub mod assemble;
mod diagnose;
mod herd;
mod identity;
mod machine;
pub mod needs;
pub mod qemu;
pub mod qmp;
pub mod register;
mod screen;
pub mod size;
pub mod spec;
pub mod template;

pub use herd::Herd;
pub(crate) use machine::{Death, LAST_MOMENTS};
pub use machine::{Launch, Vm};
pub use needs::{Boot, Bus, DiskNeed, Firmware, Medium, Needs};
pub use template::Template;
