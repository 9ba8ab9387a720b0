//! The layouts that there are.
//!
//! Names of arrays, volume groups and volumes differ between layouts, so that several can stand on
//! one machine.

use super::layout::{Array, Dev, Fs, Layer, Layout};
use crate::fault::Fault;
use crate::nearest;
use Dev::{Bcache, Crypt, Disk, Lv, Md, Part};
use anyhow::Result;

const fn md(number: u16, level: &'static str, metadata: &'static str, members: &'static [Dev]) -> Layer {
    Layer::Md(Array { number, level, metadata, members, spare: None, degraded: false })
}

const fn vg(name: &'static str, on: &'static [Dev]) -> Layer {
    Layer::Vg { name, on }
}

const fn lv(vg: &'static str, name: &'static str, how: &'static str) -> Layer {
    Layer::Lv { vg, name, how }
}

const fn raw(on: Dev) -> Layer {
    Layer::Raw { on }
}

const fn fs(kind: Fs, on: &'static [Dev]) -> Layer {
    Layer::Fs { kind, on }
}

const fn layout(name: &'static str, about: &'static str, layers: &'static [Layer]) -> Layout {
    Layout { name, about, layers }
}

const TWO: &[Dev] = &[Disk(0), Disk(1)];
const THREE: &[Dev] = &[Disk(0), Disk(1), Disk(2)];
const FOUR: &[Dev] = &[Disk(0), Disk(1), Disk(2), Disk(3)];

/// The layout that this all began with.
pub const CANONICAL: &str = "raid1-lvm";

/// All layouts.
pub const LAYOUTS: &[Layout] = &[
    layout(
        CANONICAL,
        "a volume on a mirror of two disks",
        &[
            md(127, "1", "1.2", TWO),
            vg("vg_residue", &[Md(127)]),
            lv("vg_residue", "lv_residue", "-l 100%FREE"),
            raw(Lv("vg_residue", "lv_residue")),
        ],
    ),
    layout("raid0-ext4", "ext4 on a striped array", &[md(101, "0", "1.2", TWO), fs(Fs::Ext4, &[Md(101)])]),
    layout(
        "raid1-090-ext4",
        "ext4 on a mirror with its superblock, of the old format, at the end",
        &[md(102, "1", "0.90", TWO), fs(Fs::Ext4, &[Md(102)])],
    ),
    layout(
        "raid1-10-ext4",
        "ext4 on a mirror with its superblock at the end: each disk looks like ext4",
        &[md(103, "1", "1.0", TWO), fs(Fs::Ext4, &[Md(103)])],
    ),
    layout(
        "raid1-11-xfs",
        "XFS on a mirror with its superblock in the first sector",
        &[md(104, "1", "1.1", TWO), fs(Fs::Xfs, &[Md(104)])],
    ),
    layout(
        "raid4-ext4",
        "ext4 on three disks, one for parity",
        &[md(105, "4", "1.2", THREE), fs(Fs::Ext4, &[Md(105)])],
    ),
    layout(
        "raid5-lvm",
        "a volume on three disks with parity",
        &[
            md(106, "5", "1.2", THREE),
            vg("vg_raid5", &[Md(106)]),
            lv("vg_raid5", "lv", "-l 100%FREE"),
            raw(Lv("vg_raid5", "lv")),
        ],
    ),
    layout(
        "raid6-ext4",
        "ext4 on four disks with double parity",
        &[md(107, "6", "1.2", FOUR), fs(Fs::Ext4, &[Md(107)])],
    ),
    layout(
        "raid10-swap",
        "swap on four mirrored and striped disks",
        &[md(108, "10", "1.2", FOUR), Layer::Swap { on: Md(108) }],
    ),
    layout(
        "raid1-spare-lvm",
        "a volume on a mirror with a third disk standing by",
        &[
            Layer::Md(Array {
                number: 109,
                level: "1",
                metadata: "1.2",
                members: TWO,
                spare: Some(Disk(2)),
                degraded: false,
            }),
            vg("vg_spare", &[Md(109)]),
            lv("vg_spare", "lv", "-l 100%FREE"),
            raw(Lv("vg_spare", "lv")),
        ],
    ),
    layout(
        "raid1-degraded-lvm",
        "a volume on a mirror that lacks a disk",
        &[
            Layer::Md(Array {
                number: 110,
                level: "1",
                metadata: "1.2",
                members: &[Disk(0)],
                spare: None,
                degraded: true,
            }),
            vg("vg_degraded", &[Md(110)]),
            lv("vg_degraded", "lv", "-l 100%FREE"),
            raw(Lv("vg_degraded", "lv")),
        ],
    ),
    layout(
        "raid1-partitions-lvm",
        "a volume on a mirror of two partitions",
        &[
            Layer::Table { disk: 0, parts: 2 },
            Layer::Table { disk: 1, parts: 2 },
            md(111, "1", "1.2", &[Part(0, 2), Part(1, 2)]),
            vg("vg_partitions", &[Md(111)]),
            lv("vg_partitions", "lv", "-l 100%FREE"),
            raw(Lv("vg_partitions", "lv")),
        ],
    ),
    layout(
        "partitions",
        "ext4 and swap on partitions of one disk",
        &[Layer::Table { disk: 0, parts: 2 }, fs(Fs::Ext4, &[Part(0, 1)]), Layer::Swap { on: Part(0, 2) }],
    ),
    layout(
        "lvm-linear",
        "an ext4 volume over two disks",
        &[vg("vg_linear", TWO), lv("vg_linear", "lv", "-l 100%FREE"), fs(Fs::Ext4, &[Lv("vg_linear", "lv")])],
    ),
    layout(
        "lvm-striped",
        "a volume in stripes over two disks",
        &[vg("vg_striped", TWO), lv("vg_striped", "lv", "-i 2 -l 100%FREE"), raw(Lv("vg_striped", "lv"))],
    ),
    layout(
        "lvm-mirror",
        "a volume mirrored the old way",
        &[
            vg("vg_mirror", TWO),
            lv("vg_mirror", "lv", "--type mirror -m 1 --mirrorlog core --nosync -l 8"),
            raw(Lv("vg_mirror", "lv")),
        ],
    ),
    layout(
        "lvm-raid1",
        "a volume mirrored by dm-raid",
        &[
            vg("vg_raid1", TWO),
            lv("vg_raid1", "lv", "--type raid1 -m 1 --nosync -l 8"),
            raw(Lv("vg_raid1", "lv")),
        ],
    ),
    layout(
        "lvm-thin",
        "a thin volume in its pool",
        &[
            vg("vg_thin", &[Disk(0)]),
            lv("vg_thin", "lv", "--type thin --thinpool pool -L 32M -V 64M"),
            fs(Fs::Ext4, &[Lv("vg_thin", "lv")]),
        ],
    ),
    layout(
        "lvm-snapshot",
        "a volume and its snapshot",
        &[
            vg("vg_snapshot", &[Disk(0)]),
            lv("vg_snapshot", "lv", "-L 24M"),
            raw(Lv("vg_snapshot", "lv")),
            lv("vg_snapshot", "snap", "-s vg_snapshot/lv -L 12M"),
        ],
    ),
    layout(
        "luks-below-lvm",
        "a volume inside an encrypted disk",
        &[
            Layer::Luks { on: Disk(0), version: 2, name: "crypt_below" },
            vg("vg_crypt", &[Crypt("crypt_below")]),
            lv("vg_crypt", "lv", "-l 100%FREE"),
            raw(Lv("vg_crypt", "lv")),
        ],
    ),
    layout(
        "luks-above-lvm",
        "ext4 inside an encrypted volume",
        &[
            vg("vg_above", &[Disk(0)]),
            lv("vg_above", "lv", "-l 100%FREE"),
            Layer::Luks { on: Lv("vg_above", "lv"), version: 2, name: "crypt_above" },
            fs(Fs::Ext4, &[Crypt("crypt_above")]),
        ],
    ),
    layout(
        "luks1-raid1",
        "ext4 inside an encrypted mirror",
        &[
            md(112, "1", "1.2", TWO),
            Layer::Luks { on: Md(112), version: 1, name: "crypt_raid" },
            fs(Fs::Ext4, &[Crypt("crypt_raid")]),
        ],
    ),
    layout("swap", "swap on a whole disk", &[Layer::Swap { on: Disk(0) }]),
    layout("ext4", "ext4 on a whole disk", &[fs(Fs::Ext4, &[Disk(0)])]),
    layout("xfs", "XFS on a whole disk", &[fs(Fs::Xfs, &[Disk(0)])]),
    layout("btrfs", "btrfs on a whole disk", &[fs(Fs::Btrfs, &[Disk(0)])]),
    layout("btrfs-two", "btrfs on two disks", &[fs(Fs::Btrfs, TWO)]),
    layout(
        "bcache",
        "ext4 on a cached disk",
        &[Layer::Bcache { cache: Disk(0), backing: Disk(1) }, fs(Fs::Ext4, &[Bcache(0)])],
    ),
    layout("zfs", "the labels of a ZFS pool's member", &[Layer::Zfs { on: Disk(0) }]),
];

/// The layout of that name.
///
/// # Errors
/// A host [`Fault`] with the nearest right name.
pub fn layout_named(name: &str) -> Result<&'static Layout> {
    LAYOUTS.iter().find(|layout| layout.name == name).ok_or_else(|| {
        let hint = nearest::hint(name, LAYOUTS.iter().map(|layout| layout.name));
        Fault::host(format!("unknown layout `{name}`{hint}")).fix("`shakedown plan list` has them all").into()
    })
}
