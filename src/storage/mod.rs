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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    fn check(script: &str) {
        let mut sh = Command::new("sh").arg("-n").stdin(Stdio::piped()).spawn().expect("sh");
        sh.stdin.take().expect("piped").write_all(script.as_bytes()).expect("read");
        assert!(sh.wait().expect("ends").success(), "{script}");
    }

    #[test]
    fn every_plan_is_a_script_that_asks_nothing() {
        check(&cleaner());
        for layout in LAYOUTS {
            let disks: Vec<_> = (0..layout.disks()).map(|number| format!("/dev/nvme{number}n1")).collect();
            let teardown = layout.teardown(&disks, Action::Overwrite);
            for plan in [layout.seed(&disks), teardown, layout.verify(&disks)] {
                let script = plan.script();
                check(&script);
                assert!(script.contains("\nset -eu\n"), "{script}");
                assert_eq!(script.matches("} </dev/null").count(), plan.steps.len(), "{script}");
            }
        }
        assert!(LAYOUTS.len() >= 24);
    }

    #[test]
    fn the_plan_to_remove_a_layout_knows_all_of_it() {
        for layout in LAYOUTS {
            let disks: Vec<_> = (0..layout.disks()).map(|number| format!("/dev/vd{number}x")).collect();
            let script = layout.teardown(&disks, Action::WipeSignatures).script();
            for layer in layout.layers {
                let word = match layer {
                    Layer::Md(array) => format!("stop the array /dev/md{}", array.number),
                    Layer::Vg { name, .. } => format!("vgremove -q -ff -y {name}"),
                    Layer::Luks { name, .. } => format!("dmsetup remove --retry /dev/mapper/{name}"),
                    Layer::Fs { .. } => "umount --all-targets /dev/".into(),
                    Layer::Swap { .. } => "swapoff /dev/".into(),
                    _ => continue,
                };
                assert!(script.contains(&word), "{}: no {word} in\n{script}", layout.name);
            }
        }
    }
}
