//! What a layout is: layers of storage on disks, as data.
//!
//! Owns the words in which layouts are said, and what can be told of one without touching a disk.
//! The layouts themselves are in [`catalog`](super::catalog), the commands in `seed` and `verify`.

use std::collections::BTreeSet;

/// The bytes that a seed leaves wherever a layout can hold data.
pub const SENTINEL: &str = "residue-marker";
/// All disks of a layout have at least this size: the smallest on which all its tools work.
pub const DISK_BYTES: u64 = 64 << 20;

/// A named arrangement of storage on some disks.
#[derive(Debug)]
pub struct Layout {
    /// By which it is asked for.
    pub name: &'static str,
    /// In a few words.
    pub about: &'static str,
    /// From the disks up: a layer uses disks and what layers before it made.
    pub layers: &'static [Layer],
}

/// A block device, as layers refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dev {
    /// A disk of the layout, from 0.
    Disk(usize),
    /// A partition of such a disk, from 1.
    Part(usize, u8),
    /// `/dev/mdN`.
    Md(u16),
    /// An opened LUKS volume.
    Crypt(&'static str),
    /// Volume group and logical volume.
    Lv(&'static str, &'static str),
    /// `/dev/bcacheN`.
    Bcache(u8),
}

/// One step of a layout's construction.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields are named for what they hold")]
pub enum Layer {
    /// A GPT with so many partitions of equal size.
    Table { disk: usize, parts: u8 },
    /// An md array.
    Md(Array),
    /// A LUKS volume of this version, opened by this name.
    Luks { on: Dev, version: u8, name: &'static str },
    /// A volume group.
    Vg { name: &'static str, on: &'static [Dev] },
    /// A logical volume; `how` are the words for lvcreate that say which.
    Lv { vg: &'static str, name: &'static str, how: &'static str },
    /// A mounted file system, with the sentinel in a file.
    Fs { kind: Fs, on: &'static [Dev] },
    /// Swap in use, with the sentinel as its label.
    Swap { on: Dev },
    /// A cached disk, `/dev/bcache0`.
    Bcache { cache: Dev, backing: Dev },
    /// The labels of a ZFS pool's member, without a pool: signatures need no module.
    Zfs { on: Dev },
    /// The sentinel in the device's first bytes.
    Raw { on: Dev },
}

/// An md array's geometry.
#[derive(Debug)]
pub struct Array {
    /// `/dev/mdN`.
    pub number: u16,
    /// As mdadm's `--level` has it.
    pub level: &'static str,
    /// As mdadm's `--metadata` has it.
    pub metadata: &'static str,
    /// In their order.
    pub members: &'static [Dev],
    /// Stands by.
    pub spare: Option<Dev>,
    /// One member more that is not there.
    pub degraded: bool,
}

/// A file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    Ext4,
    Xfs,
    /// On one device or several.
    Btrfs,
}

impl Layer {
    /// What it stands on.
    pub fn on(&self) -> Vec<Dev> {
        match self {
            Self::Table { disk, .. } => vec![Dev::Disk(*disk)],
            Self::Md(array) => array.members.iter().copied().chain(array.spare).collect(),
            Self::Vg { on, .. } | Self::Fs { on, .. } => on.to_vec(),
            Self::Luks { on, .. } | Self::Swap { on } | Self::Zfs { on } | Self::Raw { on } => vec![*on],
            Self::Bcache { cache, backing } => vec![*cache, *backing],
            Self::Lv { .. } => Vec::new(),
        }
    }
}

impl Layout {
    /// How many disks it needs.
    pub fn disks(&self) -> usize {
        let disk = |dev| match dev {
            Dev::Disk(disk) | Dev::Part(disk, _) => Some(disk + 1),
            _ => None,
        };
        self.layers.iter().flat_map(Layer::on).filter_map(disk).max().unwrap_or(0)
    }

    /// The programs that it takes, besides a POSIX system's and util-linux's.
    pub fn programs(&self) -> BTreeSet<&'static str> {
        self.layers.iter().filter_map(Layer::program).collect()
    }

    /// Something stands on an array where no look at the array's members sees it. Whoever stops the
    /// array before they take that away leaves it behind for the next array of the same geometry.
    ///
    /// Superblocks 0.90 and 1.0 are at a member's end, so that the data begins where the member does.
    pub fn hides_behind_array(&self) -> bool {
        let hides = |layer: &Layer| match layer {
            Layer::Md(array) if array.metadata != "0.90" && array.metadata != "1.0" => {
                Some(Dev::Md(array.number))
            }
            _ => None,
        };
        let arrays: Vec<_> = self.layers.iter().filter_map(hides).collect();
        self.layers.iter().flat_map(Layer::on).any(|dev| arrays.contains(&dev))
    }
}

impl Layer {
    fn program(&self) -> Option<&'static str> {
        Some(match self {
            Self::Table { .. } => "sfdisk",
            Self::Md(_) => "mdadm",
            Self::Luks { .. } => "cryptsetup",
            Self::Vg { .. } | Self::Lv { .. } => "lvm",
            Self::Fs { kind: Fs::Ext4, .. } => "mkfs.ext4",
            Self::Fs { kind: Fs::Xfs, .. } => "mkfs.xfs",
            Self::Fs { kind: Fs::Btrfs, .. } => "mkfs.btrfs",
            Self::Bcache { .. } => "make-bcache",
            Self::Swap { .. } | Self::Zfs { .. } | Self::Raw { .. } => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::catalog::LAYOUTS;

    fn made(layer: &Layer) -> Vec<Dev> {
        match layer {
            Layer::Table { disk, parts } => (1..=*parts).map(|part| Dev::Part(*disk, part)).collect(),
            Layer::Md(array) => vec![Dev::Md(array.number)],
            Layer::Luks { name, .. } => vec![Dev::Crypt(name)],
            Layer::Lv { vg, name, .. } => vec![Dev::Lv(vg, name)],
            Layer::Bcache { .. } => vec![Dev::Bcache(0)],
            _ => Vec::new(),
        }
    }

    #[test]
    fn every_layer_stands_on_disks_or_on_what_came_before() {
        for layout in LAYOUTS {
            let mut there: BTreeSet<_> = (0..layout.disks()).map(Dev::Disk).collect();
            for layer in layout.layers {
                for dev in layer.on() {
                    assert!(there.contains(&dev), "{}: {layer:?} on {dev:?}", layout.name);
                }
                there.extend(made(layer));
            }
        }
    }

    #[test]
    fn layouts_can_stand_side_by_side() {
        let mut seen = BTreeSet::new();
        for layout in LAYOUTS {
            assert!(seen.insert(layout.name.to_owned()), "two layouts are called {}", layout.name);
            for layer in layout.layers {
                let name = match layer {
                    Layer::Md(array) => format!("md{}", array.number),
                    Layer::Vg { name, .. } | Layer::Luks { name, .. } => (*name).to_owned(),
                    Layer::Bcache { .. } => "bcache0".into(),
                    _ => continue,
                };
                assert!(seen.insert(name.clone()), "{}: {name} is taken", layout.name);
            }
        }
    }

    #[test]
    fn every_layout_has_a_sentinel() {
        let holds = |layer: &Layer| {
            matches!(layer, Layer::Fs { .. } | Layer::Swap { .. } | Layer::Zfs { .. } | Layer::Raw { .. })
        };
        for layout in LAYOUTS {
            assert!(layout.layers.iter().any(holds), "{}", layout.name);
        }
    }
}
