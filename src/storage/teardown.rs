//! How storage is taken away: what is done to a node of the block graph, and the two that do it.
//!
//! Owns the table of actions. The order is leaf to root: by [`Graph`] where we run step by step, by
//! the same rule in `storage-cleanup`, a POSIX script that needs nothing of ours. Its text is
//! rendered from the table.

use super::graph::{Content, Graph, Kind};
use super::plan::Step;
use super::seed::SETTLE;
use std::fmt::Write as _;

/// What becomes of the disks once nothing stands on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Only what says what they are is taken away.
    WipeSignatures,
    /// Their blocks are given back.
    Discard,
    /// Zeros are written on all of them.
    Overwrite,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::WipeSignatures, Self::Discard, Self::Overwrite];

    /// As options and JSON have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WipeSignatures => "wipe-signatures",
            Self::Discard => "discard",
            Self::Overwrite => "overwrite",
        }
    }

    /// Whether nothing at all may be found on the disks afterwards.
    pub fn erases(self) -> bool {
        self != Self::WipeSignatures
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is done to a node: a name, what for, and the line in which `"$1"` is the node.
struct Act(&'static str, &'static str, &'static str);

const UNMOUNT: Act = Act("unmount", "unmount", r#"umount --all-targets "$1""#);
const SWAPOFF: Act = Act("swapoff", "stop swapping to", r#"swapoff "$1""#);
const REMOVE_VG: Act = Act(
    "remove_vg",
    "remove the volume group",
    r#"vgremove -q -ff -y "$1" || { vgreduce -q --removemissing --force "$1" && vgremove -q -ff -y "$1"; }"#,
);
const REMOVE_PV: Act = Act("remove_pv", "remove the physical volume", r#"pvremove -q -ff -y "$1""#);
const ERASE_KEYS: Act = Act("erase_keys", "erase the keys of", r#"cryptsetup erase -q "$1""#);
const ZERO_SUPERBLOCK: Act =
    Act("zero_superblock", "zero the md superblock of", r#"mdadm --zero-superblock --force "$1""#);
const WIPE: Act = Act("wipe", "wipe the signatures of", r#"wipefs -q -a -f "$1""#);
/// Whoever opens the node of an array that was stopped makes an empty one, and udev looks at what was
/// just written to: it must have done so before. It would also put a member that is let go of into the
/// array again: so the superblocks go at once.
const STOP_MD: Act = Act(
    "stop_md",
    "stop the array",
    r#"members=''
    for slave in /sys/class/block/"${1##*/}"/slaves/*; do members="$members /dev/${slave##*/}"; done
    ! command -v udevadm >/dev/null || udevadm settle
    mdadm --quiet --stop "$1" || return
    mdadm --zero-superblock --force $members"#,
);
const CLOSE: Act = Act("close", "close", r#"dmsetup remove --retry "$1""#);
/// Signatures first: udev would register again what is let go of and still has one.
const STOP_BCACHE: Act = Act(
    "stop_bcache",
    "stop the cached disk",
    r#"dir=/sys/class/block/${1##*/}/bcache
    for slave in "${dir%/bcache}"/slaves/*; do wipefs -q -a -f /dev/"${slave##*/}"; done
    if [ -e "$dir/cache" ]; then set=$(readlink -f "$dir/cache"); else set=; fi
    echo 1 >"$dir/stop"
    [ -z "$set" ] || echo 1 >"$set/stop"
    tries=50
    while [ -e "/sys/class/block/${1##*/}" ] || [ -n "$set" ] && [ -e "$set" ]; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep 0.1
    done"#,
);
const FORGET: Act = Act(
    "forget",
    "have kernel and udev look again at",
    r#"set -- "$1" /sys/class/block/"${1##*/}"/"${1##*/}"*/partition
    # It is refused while udev looks at a partition.
    [ ! -e "$2" ] || blockdev --rereadpt "$1" 2>/dev/null || { udevadm settle; blockdev --rereadpt "$1"; }
    echo change >/sys/class/block/"${1##*/}"/uevent || :"#,
);
const DISCARD: Act = Act("discard", "discard all of", r#"blkdiscard -f "$1""#);
const OVERWRITE: Act = Act(
    "overwrite",
    "write zeros on all of",
    r#"dd if=/dev/zero of="$1" bs=1M count="$(blockdev --getsize64 "$1")" iflag=count_bytes oflag=direct conv=fsync status=none"#,
);

const ACTS: [&Act; 13] = [
    &UNMOUNT,
    &SWAPOFF,
    &REMOVE_VG,
    &REMOVE_PV,
    &ERASE_KEYS,
    &ZERO_SUPERBLOCK,
    &WIPE,
    &STOP_MD,
    &CLOSE,
    &STOP_BCACHE,
    &FORGET,
    &DISCARD,
    &OVERWRITE,
];

impl Act {
    fn step(&self, node: &str) -> Step {
        let Self(_, what, line) = self;
        // A function's `return` ends only the function, and its `$1` is what it was given.
        let run = if line.contains("return") || line.contains("${1") {
            format!("act() {{\n{line}\n}}\nact {}", crate::process::quote(node))
        } else {
            line.replace("\"$1\"", &crate::process::quote(node))
        };
        Step::must(format!("{what} {node}"), run)
    }
}

/// What a signature asks for before it is wiped.
fn content_acts(content: Content) -> &'static [&'static Act] {
    match content {
        Content::Physical => &[&REMOVE_PV],
        Content::Luks => &[&ERASE_KEYS],
        Content::Member => &[&ZERO_SUPERBLOCK],
        Content::Other => &[],
    }
}

/// How a node itself goes.
fn kind_acts(kind: Kind) -> &'static [&'static Act] {
    match kind {
        Kind::Raid => &[&STOP_MD],
        Kind::Crypt | Kind::Mapped => &[&CLOSE],
        Kind::Bcache => &[&STOP_BCACHE],
        // Volumes go with their group.
        Kind::Volume | Kind::Partition => &[],
        Kind::Group => &[&REMOVE_VG],
        Kind::Disk => &[&FORGET],
    }
}

/// The steps that take away all that stands on `disks`, in the order of the graph, and then `action`.
pub(super) fn steps(graph: &Graph, disks: &[String], action: Action) -> Vec<Step> {
    let mut steps = Vec::new();
    for node in graph.teardown_order(disks) {
        let uses = [(node.mounted, &UNMOUNT), (node.swap, &SWAPOFF)];
        steps.extend(uses.iter().filter(|(used, _)| *used).map(|(_, act)| act.step(&node.name)));
        steps.extend(content_acts(node.content).iter().map(|act| act.step(&node.name)));
        if node.kind != Kind::Group && !node.hidden {
            steps.push(WIPE.step(&node.name));
        }
        steps.extend(kind_acts(node.kind).iter().map(|act| act.step(&node.name)));
    }
    let last = match action {
        Action::WipeSignatures => None,
        Action::Discard => Some(&DISCARD),
        Action::Overwrite => Some(&OVERWRITE),
    };
    steps.extend(disks.iter().zip(last.iter().cycle()).map(|(disk, act)| act.step(disk)));
    steps.push(Step::must("let udev finish", SETTLE));
    steps
}

/// What every image with storage tools has as `/usr/local/sbin/storage-cleanup`.
pub fn cleaner() -> String {
    let mut functions = String::new();
    for Act(name, _, line) in ACTS {
        let _ = write!(functions, "do_{name}() {{\n    {line}\n}}\n");
    }
    include_str!("storage-cleanup.sh").replace("@ACTIONS@\n", &functions)
}

/// Where the cleaner is in images that have it.
pub const CLEANER: &str = "/usr/local/sbin/storage-cleanup";

/// A line that gives the cleaner to a shell.
pub(super) fn by_script(disks: &[String], action: Action) -> String {
    format!("sh -s -- --action {action} {} <<'CLEANER'\n{}CLEANER", disks.join(" "), cleaner())
}

/// A line that cleans the disks unless nothing was ever on them: seeds are repeated.
pub(super) fn unless_blank(disks: &[String]) -> String {
    let all = disks.join(" ");
    format!(
        "[ -z \"$(wipefs -n --noheadings {all}; lsblk -nro TYPE {all} | grep -vx -e disk -e loop)\" ] || {{\n{}\n}}",
        by_script(disks, Action::WipeSignatures)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_have_the_cleaner_of_today() {
        for file in ["fixtures/image/storage/storage-cleanup", "nix/storage-cleanup"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            if std::env::var_os("BLESS").is_some() {
                std::fs::write(&path, cleaner()).expect("written");
            }
            let there = std::fs::read_to_string(&path).unwrap_or_default();
            let bless = "BLESS=1 cargo test --lib the_images_have_the_cleaner_of_today";
            assert_eq!(there, cleaner(), "{file}: {bless}");
        }
    }
}
