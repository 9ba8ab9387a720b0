//! QEMU machines: from what a scenario needs to a running VM one can drive.

pub mod needs;

pub use needs::{Boot, Bus, DiskNeed, Firmware, Medium, Needs};

/// A running machine. Placeholder: the harness compiles against it.
#[derive(Debug)]
pub struct Vm {
    _private: (),
}
