//! Residue: RAID and LVM layouts, plans that make, remove and check them, and the proof that a
//! cleanup left nothing.
//!
//! Owns layouts as data ([`catalog`]), what is run for them ([`Plan`]), the block graph, the cleaner
//! `storage-cleanup`, three levels of verification, and the matrix of all that on machines of our
//! own ([`matrix`]). What a scenario says about storage in general is not here.
//!
//! A cleanup that passes every look can still be undone: an array that was stopped before the volume
//! group on it was removed takes the group along, and whoever creates the same array again has both
//! back. Hence the levels: see [`Level`].

pub mod catalog;
mod conduct;
mod graph;
mod guard;
mod layout;
pub mod matrix;
mod plan;
mod scan;
mod seed;
mod teardown;
mod verify;

pub use catalog::{CANONICAL, LAYOUTS, layout_named};
pub use conduct::{Cleaner, Verdict, clean, seed, verify};
pub use graph::Graph;
pub use guard::admit;
pub use layout::{DISK_BYTES, Dev, Layer, Layout, SENTINEL};
pub use plan::{Ended, Evidence, Expect, Phase, Plan, Step};
pub use scan::{Find, scan};
pub use teardown::{Action, CLEANER, cleaner};
pub use verify::Level;

impl Layout {
    /// The plan that makes the layout on `disks`, whatever is on them: all of it is lost.
    pub fn seed(&self, disks: &[String]) -> Plan {
        self.plan(Phase::Seed, disks, seed::steps(self, disks))
    }

    /// The plan that takes the layout away from `disks`, and then does `action`, as it would be if
    /// nothing else stood on them. On a machine the block graph decides; see [`clean`].
    pub fn teardown(&self, disks: &[String], action: Action) -> Plan {
        let graph = seed::graph(self, disks);
        self.plan(Phase::Teardown, disks, teardown::steps(&graph, disks, action))
    }

    /// The plan that looks whether the layout is gone from `disks`, and whether it comes back on
    /// copies of them.
    pub fn verify(&self, disks: &[String]) -> Plan {
        let mut steps = verify::gone(self, disks);
        steps.extend(verify::resurrect(self, disks));
        self.plan(Phase::Verify, disks, steps)
    }

    fn plan(&self, phase: Phase, disks: &[String], steps: Vec<Step>) -> Plan {
        Plan { layout: self.name, phase, disks: disks.to_vec(), steps }
    }
}
