//! The block graph of a machine: what stands on what, and the order in which it can be taken away.
//!
//! Read from `lsblk`, `pvs` and `lvs`. Volume groups are nodes, too: they stand on their physical
//! volumes and carry their volumes.

use crate::fault::Fault;
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stands on nothing.
    Disk,
    Partition,
    /// An md array.
    Raid,
    /// A volume group.
    Group,
    /// A logical volume, or a part of one.
    Volume,
    /// An opened LUKS volume.
    Crypt,
    /// Anything else of the device mapper.
    Mapped,
    Bcache,
}

/// What is on a node, as far as it takes more than a wipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A physical volume's label.
    Physical,
    Luks,
    /// An md superblock.
    Member,
    Other,
}

/// A block device, or a volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The device's path, or the group's name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// What is on it.
    pub content: Content,
    /// A file system of it is mounted.
    pub mounted: bool,
    /// It is swapped to.
    pub swap: bool,
    /// A volume that only serves others.
    pub hidden: bool,
}

/// Nodes, and which stand on which.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    /// By node: who stands on it.
    holders: Vec<BTreeSet<usize>>,
}

/// The commands that tell the graph: its devices, what is on each, and LVM's part.
pub(super) const LOOK: [&str; 4] = [
    "lsblk --json --paths -o NAME,TYPE,MOUNTPOINTS",
    // Not by lsblk, which has it from udev, which may not be there.
    "lsblk --list --noheadings --paths -o NAME | sort -u | while read -r dev; do echo \"$dev $(blkid -p -o value -s TYPE $dev)\"; done",
    "if command -v pvs >/dev/null; then pvs --reportformat json -o pv_name,vg_name; else echo '{}'; fi",
    "if command -v lvs >/dev/null; then lvs --reportformat json -o vg_name,lv_dm_path; else echo '{}'; fi",
];

#[derive(Deserialize)]
struct Lsblk {
    blockdevices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    mountpoints: Vec<Option<String>>,
    #[serde(default)]
    children: Vec<Device>,
}

/// What `--reportformat json` prints.
#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    report: Vec<BTreeMap<String, Vec<BTreeMap<String, String>>>>,
}

impl Graph {
    /// Reads what the commands of `LOOK` printed.
    ///
    /// # Errors
    /// A host [`Fault`] when that is not what these programs print.
    pub(super) fn read(texts: [&str; 4]) -> Result<Self> {
        let [lsblk, contents, pvs, lvs] = texts;
        let odd = |program: &str| Fault::host(format!("{program} printed no JSON of its kind"));
        let lsblk: Lsblk = serde_json::from_str(lsblk).with_context(|| odd("lsblk"))?;
        let pvs: Report = serde_json::from_str(pvs).with_context(|| odd("pvs"))?;
        let lvs: Report = serde_json::from_str(lvs).with_context(|| odd("lvs"))?;
        let mut graph = Self::default();
        for device in &lsblk.blockdevices {
            graph.take(device, None);
        }
        for (device, content) in contents.lines().filter_map(|line| line.split_once(' ')) {
            if let Some(node) = graph.find(device) {
                graph.nodes[node].content = match content {
                    "LVM2_member" => Content::Physical,
                    "crypto_LUKS" => Content::Luks,
                    "linux_raid_member" => Content::Member,
                    _ => Content::Other,
                };
            }
        }
        for row in pvs.rows("pv") {
            let (Some(pv), Some(vg)) = (row.get("pv_name"), row.get("vg_name")) else { continue };
            if let (Some(pv), false) = (graph.find(pv), vg.is_empty()) {
                let vg = graph.node(vg, Kind::Group);
                graph.stands_on(vg, pv);
            }
        }
        for row in lvs.rows("lv") {
            let (Some(vg), Some(lv)) = (row.get("vg_name"), row.get("lv_dm_path")) else { continue };
            // One that is not active goes with its group.
            if let Some(lv) = graph.find(lv) {
                let vg = graph.node(vg, Kind::Group);
                graph.stands_on(lv, vg);
            }
        }
        for node in 0..graph.nodes.len() {
            graph.nodes[node].hidden = graph.nodes[node].kind == Kind::Volume
                && graph.holders[node].iter().any(|&holder| graph.nodes[holder].kind == Kind::Volume);
        }
        Ok(graph)
    }

    /// The node of that name, made unless it is there.
    pub(super) fn node(&mut self, name: &str, kind: Kind) -> usize {
        if let Some(there) = self.find(name) {
            return there;
        }
        let (name, content) = (name.to_owned(), Content::Other);
        self.nodes.push(Node { name, kind, content, mounted: false, swap: false, hidden: false });
        self.holders.push(BTreeSet::new());
        self.nodes.len() - 1
    }

    pub(super) fn node_mut(&mut self, node: usize) -> &mut Node {
        &mut self.nodes[node]
    }

    /// `holder` stands on `below`.
    pub(super) fn stands_on(&mut self, holder: usize, below: usize) {
        self.holders[below].insert(holder);
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    fn take(&mut self, device: &Device, below: Option<usize>) {
        let mounts = || device.mountpoints.iter().flatten();
        let node = self.node(&device.name, kind(device, below.is_some()));
        self.nodes[node].mounted = mounts().any(|place| place != "[SWAP]");
        self.nodes[node].swap = mounts().any(|place| place == "[SWAP]");
        if let Some(below) = below {
            self.stands_on(node, below);
        }
        for child in &device.children {
            self.take(child, Some(node));
        }
    }

    /// All that stands on `disks`, and these: each node after all that stand on it.
    pub fn teardown_order(&self, disks: &[String]) -> Vec<&Node> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        for disk in disks.iter().filter_map(|disk| self.find(disk)) {
            self.visit(disk, &mut seen, &mut order);
        }
        order.into_iter().map(|node| &self.nodes[node]).collect()
    }

    fn visit(&self, node: usize, seen: &mut [bool], order: &mut Vec<usize>) {
        if std::mem::replace(&mut seen[node], true) {
            return;
        }
        // What a volume group carries stands on its disks as well, but must not be met there first.
        for &holder in &self.holders[node] {
            self.visit(holder, seen, order);
        }
        order.push(node);
    }

    /// Disks that are not among `disks`, but below something that stands on one of them.
    pub fn shared_with(&self, disks: &[String]) -> Vec<&str> {
        let reached: BTreeSet<_> = self.teardown_order(disks).into_iter().map(|node| &node.name).collect();
        let others = self.nodes.iter().filter(|node| node.kind == Kind::Disk && !disks.contains(&node.name));
        others
            .filter(|other| {
                let above = self.teardown_order(std::slice::from_ref(&other.name));
                above.iter().any(|node| reached.contains(&node.name))
            })
            .map(|node| &*node.name)
            .collect()
    }
}

fn kind(device: &Device, holder: bool) -> Kind {
    match &*device.kind {
        "part" => Kind::Partition,
        "lvm" => Kind::Volume,
        "crypt" => Kind::Crypt,
        kind if kind.starts_with("raid") || kind == "linear" => Kind::Raid,
        _ if device.name.starts_with("/dev/bcache") => Kind::Bcache,
        _ if holder => Kind::Mapped,
        _ => Kind::Disk,
    }
}

impl Report {
    fn rows(&self, what: &str) -> impl Iterator<Item = &BTreeMap<String, String>> {
        self.report.iter().filter_map(move |report| report.get(what)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(number: usize) -> String {
        format!("/dev/n{number}")
    }

    proptest! {
        #[test]
        fn no_node_goes_before_its_holders(
            count in 1_usize..40,
            edges in prop::collection::vec((0_usize..40, 0_usize..40), 0..120),
            roots in prop::collection::vec(0_usize..40, 1..6),
        ) {
            let mut graph = Graph::default();
            (0..count).for_each(|number| { graph.node(&name(number), Kind::Mapped); });
            let edges: BTreeSet<_> = edges
                .into_iter()
                .map(|(a, b)| (a % count, b % count))
                .filter(|(a, b)| a != b)
                // From a lower number to a higher one: no circles.
                .map(|(a, b)| (a.min(b), a.max(b)))
                .collect();
            for &(below, holder) in &edges {
                graph.stands_on(holder, below);
            }
            let names: Vec<_> = roots.iter().map(|root| name(root % count)).collect();
            let order: Vec<_> = graph.teardown_order(&names).iter().map(|node| node.name.clone()).collect();
            let place = |number: usize| order.iter().position(|there| *there == name(number));
            for &(below, holder) in &edges {
                if let Some(below) = place(below) {
                    let holder = place(holder);
                    prop_assert!(holder.is_some_and(|holder| holder < below), "{order:?}");
                }
            }
            let unique: BTreeSet<_> = order.iter().collect();
            prop_assert_eq!(unique.len(), order.len());
            prop_assert!(names.iter().all(|name| order.contains(name)));
        }
    }

    const LSBLK: &str = r#"{"blockdevices": [
        {"name":"/dev/vda","type":"disk","mountpoints":[null],
         "children":[{"name":"/dev/vda1","type":"part","mountpoints":["/"]}]},
        {"name":"/dev/vdb","type":"disk","mountpoints":[null],
         "children":[{"name":"/dev/md127","type":"raid1","mountpoints":[null],
          "children":[{"name":"/dev/mapper/vg-lv","type":"lvm","mountpoints":["[SWAP]"]}]}]},
        {"name":"/dev/vdc","type":"disk","mountpoints":[null],
         "children":[{"name":"/dev/md127","type":"raid1","mountpoints":[null],
          "children":[{"name":"/dev/mapper/vg-lv","type":"lvm","mountpoints":["[SWAP]"]}]}]}]}"#;
    const CONTENTS: &str = "/dev/vda\n/dev/vda1 ext4\n/dev/vdb linux_raid_member\n/dev/vdc linux_raid_member\n\
        /dev/md127 LVM2_member\n/dev/mapper/vg-lv swap\n";
    const PVS: &str = r#"{"report": [{"pv": [{"pv_name":"/dev/md127", "vg_name":"vg"}]}]}"#;
    const LVS: &str = r#"{"report": [{"lv": [{"vg_name":"vg", "lv_dm_path":"/dev/mapper/vg-lv"}]}]}"#;

    #[test]
    fn lvm_goes_before_md_and_md_before_its_members() {
        let graph = Graph::read([LSBLK, CONTENTS, PVS, LVS]).expect("reads");
        let disks = ["/dev/vdb".to_owned(), "/dev/vdc".to_owned()];
        let steps = super::super::teardown::steps(&graph, &disks, super::super::Action::Discard);
        let what: Vec<_> = steps.iter().map(|step| &*step.what).collect();
        assert_eq!(
            what,
            [
                "stop swapping to /dev/mapper/vg-lv",
                "wipe the signatures of /dev/mapper/vg-lv",
                "remove the volume group vg",
                "remove the physical volume /dev/md127",
                "wipe the signatures of /dev/md127",
                "stop the array /dev/md127",
                "zero the md superblock of /dev/vdb",
                "wipe the signatures of /dev/vdb",
                "have kernel and udev look again at /dev/vdb",
                "zero the md superblock of /dev/vdc",
                "wipe the signatures of /dev/vdc",
                "have kernel and udev look again at /dev/vdc",
                "discard all of /dev/vdb",
                "discard all of /dev/vdc",
                "let udev finish",
            ]
        );
    }

    #[test]
    fn half_of_an_array_is_not_ours_to_clean() {
        let graph = Graph::read([LSBLK, CONTENTS, "{}", "{}"]).expect("reads");
        assert_eq!(graph.shared_with(&["/dev/vdb".to_owned()]), ["/dev/vdc"]);
        assert!(graph.shared_with(&["/dev/vdb".to_owned(), "/dev/vdc".to_owned()]).is_empty());
    }
}
