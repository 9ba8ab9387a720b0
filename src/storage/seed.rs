//! How a layout is made: from its layers to commands.
//!
//! The commands that give a container its geometry are here once; [`verify`](super::verify) makes
//! the same containers again, on copies, by the same lines.

use super::graph::{Content, Graph, Kind};
use super::layout::{Array, Dev, Fs, Layer, Layout, SENTINEL};
use super::plan::Step;
use super::teardown;

/// How devices are called where a layout is made.
#[derive(Clone, Copy, Debug)]
pub(super) enum Names<'a> {
    /// On these disks.
    Own(&'a [String]),
    /// On copies of the disks: in the shell's variables `copy0`, `copy1`, ..., beside the original.
    Again,
}

/// Where there is udev, it may still be at work on what changed.
pub(super) const SETTLE: &str = "if command -v udevadm >/dev/null; then udevadm settle; fi";
/// For volumes that live for minutes, and must open in a moment.
const KEY: &str = "printf residue-key |";

impl Names<'_> {
    pub(super) fn dev(self, dev: Dev) -> String {
        match (dev, self) {
            (Dev::Disk(disk), Self::Own(disks)) => disks[disk].clone(),
            (Dev::Disk(disk), Self::Again) => format!("$copy{disk}"),
            (Dev::Part(disk, part), Self::Own(disks)) => partition(&disks[disk], part),
            // They are loop devices.
            (Dev::Part(disk, part), Self::Again) => format!("${{copy{disk}}}p{part}"),
            (Dev::Md(number), Self::Own(_)) => format!("/dev/md{number}"),
            (Dev::Md(number), Self::Again) => format!("/dev/md{}", number + 100),
            (Dev::Crypt(name), Self::Own(_)) => format!("/dev/mapper/{name}"),
            (Dev::Crypt(name), Self::Again) => format!("/dev/mapper/{name}_again"),
            (Dev::Lv(vg, lv), _) => format!("/dev/{vg}/{lv}"),
            (Dev::Bcache(number), _) => format!("/dev/bcache{number}"),
        }
    }

    fn devs(self, devs: &[Dev]) -> String {
        devs.iter().map(|dev| self.dev(*dev)).collect::<Vec<_>>().join(" ")
    }
}

/// As the kernel calls partitions: a `p` between two numbers.
fn partition(disk: &str, part: u8) -> String {
    let p = if disk.ends_with(|c: char| c.is_ascii_digit()) { "p" } else { "" };
    format!("{disk}{p}{part}")
}

/// Where a layout's file system is mounted: the `number`th of it.
pub(super) fn mount_point(layout: &Layout, number: usize) -> String {
    format!("/run/residue/{}-{number}", layout.name)
}

/// Writes a partition table; what is inside the partitions stays.
pub(super) fn table(disk: usize, parts: u8, names: Names<'_>) -> String {
    let disk = names.dev(Dev::Disk(disk));
    // The first starts at 1 MiB; the last goes to the end.
    let size = super::layout::DISK_BYTES / u64::from(parts) - (1 << 20);
    let lines: String = (1..parts).map(|_| format!("size={}KiB\\n", size >> 10)).collect();
    format!(
        "printf 'label: gpt\\n{lines},\\n' | sfdisk --quiet --wipe never --wipe-partitions never {disk}\n\
         {SETTLE}"
    )
}

/// Makes an array and leaves its data as it is, or starts as if it were in sync: disks that were never
/// written are.
pub(super) fn array(array: &Array, names: Names<'_>) -> String {
    let Array { number, level, metadata, members, spare, degraded } = array;
    let mut devs = names.devs(members);
    let count = members.len() + usize::from(*degraded);
    if *degraded {
        devs += " missing";
    }
    let spare = spare.map(|dev| format!(" --spare-devices=1 {}", names.dev(dev))).unwrap_or_default();
    let chunk = if *level == "1" { "" } else { " --chunk=64" };
    format!(
        "mdadm --create {} --run --force --assume-clean --homehost=any --level={level} --metadata={metadata}{chunk} \
         --raid-devices={count} {devs}{}",
        names.dev(Dev::Md(*number)),
        // Spares come last on the command line.
        spare
    )
}

/// Opens a LUKS volume of ours.
pub(super) fn open(on: Dev, name: &'static str, names: Names<'_>) -> String {
    let mapper = names.dev(Dev::Crypt(name));
    let mapper = mapper.rsplit('/').next().unwrap_or_default().to_owned();
    format!("{KEY} cryptsetup open --key-file - {} {mapper}", names.dev(on))
}

/// The steps that make a layout on `disks`, whatever was on them.
pub(super) fn steps(layout: &Layout, disks: &[String]) -> Vec<Step> {
    let names = Names::Own(disks);
    let mut steps = vec![Step::must("clear the disks", teardown::unless_blank(disks))];
    let mut mounts = 0;
    for layer in layout.layers {
        match layer {
            Layer::Table { disk, parts } => {
                steps.push(Step::must(format!("partition {}", disks[*disk]), table(*disk, *parts, names)));
            }
            Layer::Md(md) => {
                steps.push(Step::must(format!("create /dev/md{}", md.number), array(md, names)));
            }
            Layer::Luks { on, version, name } => {
                let on_dev = names.dev(*on);
                let format = format!(
                    "{KEY} cryptsetup luksFormat -q --type luks{version} --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - {on_dev}"
                );
                steps.push(Step::must(format!("encrypt {on_dev}"), format));
                steps.push(Step::must(format!("open {name}"), open(*on, name, names)));
            }
            Layer::Vg { name, on } => {
                let devs = names.devs(on);
                // One command makes the physical volumes, too.
                let create = format!("vgcreate -ff -y {name} {devs}");
                steps.push(Step::must(format!("create the volume group {name}"), create));
            }
            Layer::Lv { vg, name, how } => {
                // A snapshot names its origin, and has what that has.
                let (wipe, group) = if how.contains("-s ") { ("", "") } else { ("-Wy ", *vg) };
                let create = format!("lvcreate -y {wipe}-n {name} {how} {group}");
                steps.push(Step::must(format!("create the volume {vg}/{name}"), create.trim_end()));
            }
            Layer::Fs { kind, on } => {
                let devs = names.devs(on);
                let make = match kind {
                    Fs::Ext4 => format!("mkfs.ext4 -q -F {devs}"),
                    // Small ones are for tests.
                    Fs::Xfs => format!("mkfs.xfs -q -f --unsupported {devs}"),
                    Fs::Btrfs if on.len() > 1 => format!("mkfs.btrfs -q -f -M -d single -m single {devs}"),
                    Fs::Btrfs => format!("mkfs.btrfs -q -f -M {devs}"),
                };
                steps.push(Step::must(format!("make {kind:?} on {devs}").to_lowercase(), make));
                let (dir, dev) = (mount_point(layout, mounts), names.dev(on[0]));
                mounts += 1;
                let write = format!(
                    "mkdir -p {dir} && mount {dev} {dir} && printf {SENTINEL} >{dir}/sentinel && sync -f {dir}"
                );
                steps.push(Step::must(format!("leave the sentinel in a file on {dev}"), write));
            }
            Layer::Swap { on } => {
                let dev = names.dev(*on);
                let make = format!("mkswap -q -f -L {SENTINEL} {dev} && swapon {dev}");
                steps.push(Step::must(format!("swap on {dev}"), make));
            }
            Layer::Bcache { cache, backing } => {
                let (cache, backing) = (names.dev(*cache), names.dev(*backing));
                let make = format!(
                    "modprobe bcache && make-bcache --wipe-bcache -C {cache} -B {backing} && {SETTLE}\n\
                     [ -b /dev/bcache0 ] || {{ for dev in {cache} {backing}; do echo $dev >/sys/fs/bcache/register; done; {SETTLE}; }}\n\
                     [ -b /dev/bcache0 ]"
                );
                steps.push(Step::must(format!("cache {backing} on {cache}"), make));
            }
            Layer::Zfs { on } => steps.push(Step::must("write labels of ZFS", zfs(&names.dev(*on)))),
            Layer::Raw { on } => {
                let dev = names.dev(*on);
                let write = format!("printf {SENTINEL} | dd of={dev} bs=1 conv=fsync status=none");
                steps.push(Step::must(format!("leave the sentinel on {dev}"), write));
            }
        }
    }
    steps
}

/// The block graph of a machine that has the layout on `disks`, and nothing else.
pub(super) fn graph(layout: &Layout, disks: &[String]) -> Graph {
    let names = Names::Own(disks);
    let mut graph = Graph::default();
    for disk in disks {
        graph.node(disk, Kind::Disk);
    }
    for layer in layout.layers {
        let on: Vec<_> = layer.on().iter().map(|dev| graph.node(&names.dev(*dev), Kind::Disk)).collect();
        let made = match layer {
            Layer::Table { disk, parts } => {
                let part = |part| (names.dev(Dev::Part(*disk, part)), Kind::Partition);
                (1..=*parts).map(part).collect()
            }
            Layer::Md(md) => vec![(names.dev(Dev::Md(md.number)), Kind::Raid)],
            Layer::Luks { name, .. } => vec![(names.dev(Dev::Crypt(name)), Kind::Crypt)],
            Layer::Vg { name, .. } => vec![((*name).to_owned(), Kind::Group)],
            Layer::Lv { vg, name, .. } => vec![(names.dev(Dev::Lv(vg, name)), Kind::Volume)],
            Layer::Bcache { .. } => vec![(names.dev(Dev::Bcache(0)), Kind::Bcache)],
            Layer::Fs { .. } | Layer::Swap { .. } | Layer::Zfs { .. } | Layer::Raw { .. } => Vec::new(),
        };
        for (name, kind) in made {
            let made = graph.node(&name, kind);
            on.iter().for_each(|below| graph.stands_on(made, *below));
            if let Layer::Lv { vg, .. } = layer {
                let group = graph.node(vg, Kind::Group);
                graph.stands_on(made, group);
            }
        }
        for (number, below) in on.into_iter().enumerate() {
            let node = graph.node_mut(below);
            match layer {
                Layer::Md(_) => node.content = Content::Member,
                Layer::Luks { .. } => node.content = Content::Luks,
                Layer::Vg { .. } => node.content = Content::Physical,
                Layer::Fs { .. } => node.mounted = number == 0,
                Layer::Swap { .. } => node.swap = true,
                _ => {}
            }
        }
    }
    graph
}

/// Four labels of 256 KiB, two at each end, with uberblocks in their second half and the sentinel
/// where the pool's configuration would be. (OpenZFS, "On-Disk Specification", chapter 1.)
fn zfs(dev: &str) -> String {
    format!(
        "size=$(blockdev --getsize64 {dev})\n\
         for label in 0 262144 $((size - 524288)) $((size - 262144)); do\n\
         printf {SENTINEL} | dd of={dev} bs=1 seek=$((label + 16384)) conv=notrunc status=none\n\
         for slot in 0 1 2 3 4 5 6 7; do\n\
         printf '\\014\\261\\272\\000\\000\\000\\000\\000\\210\\023\\000\\000\\000\\000\\000\\000' |\n\
         dd of={dev} bs=16 seek=$(((label + 131072 + slot * 1024) / 16)) conv=notrunc status=none\n\
         done\ndone\nsync {dev}"
    )
}
