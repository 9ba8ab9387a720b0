//! Whether a layout is gone, and whether it can be brought back: looks, each of which prints nothing
//! when all is well.
//!
//! Bringing back works on copy-on-write copies of the disks, so that it proves without changing
//! anything. It makes again what anybody could make again without knowing more than the geometry:
//! partition tables and arrays. What then shows up on them was left behind.

use super::layout::{DISK_BYTES, Dev, Layer, Layout, SENTINEL};
use super::plan::Step;
use super::seed::{self, Names, SETTLE};

/// How deep a cleanup is looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Kernel, udev, mdadm, LVM and blkid see nothing of the layout.
    Gone,
    /// Making the same containers again brings nothing back.
    NotResurrectable,
    /// The raw disks have no trace.
    Erased,
}

impl Level {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Gone, Self::NotResurrectable, Self::Erased];
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gone => "gone",
            Self::NotResurrectable => "not resurrectable",
            Self::Erased => "erased",
        })
    }
}

/// The looks of [`Level::Gone`].
pub(super) fn gone(layout: &Layout, disks: &[String]) -> Vec<Step> {
    let all = disks.join(" ");
    let short: Vec<_> = disks.iter().map(|disk| disk.trim_start_matches("/dev/")).collect();
    let each = |before: &str, names: &[&str], after: &str| {
        names.iter().map(|name| format!(" -e '{before}{name}{after}'")).collect::<String>()
    };
    let mut steps = vec![
        Step::must("let udev finish", SETTLE),
        Step::look(
            "what stands on the disks, and what udev remembers",
            // It may still be about to look at what was just written.
            format!(
                "for try in 1 2 3 4 5 6 7 8 9 10; do\n\
                 seen=$(lsblk -nro NAME,TYPE,FSTYPE,PTTYPE,MOUNTPOINTS {all} | grep -vE ' (disk|loop) *$') && sleep 0.2 || break\n\
                 {SETTLE}; done; [ -z \"$seen\" ] || echo \"$seen\""
            ),
        ),
        Step::look("signatures that blkid finds", format!("blkid -p {all}")),
        Step::look("signatures that wipefs finds", format!("wipefs -n --noheadings {all}")),
        Step::look(
            "mounts, swap and arrays that run",
            format!(
                "grep -shwE{}{} /proc/self/mounts /proc/swaps /proc/mdstat",
                each("/run/residue/", &[layout.name], "-[0-9]+"),
                each("", &short, "p?[0-9]*"),
            ),
        ),
    ];
    let (mut names, mut groups) = (Vec::new(), Vec::new());
    for layer in layout.layers {
        match layer {
            Layer::Md(array) => {
                // A node alone is no array: opening it makes an empty one.
                let file = format!("/sys/class/block/md{}/md/array_state", array.number);
                steps.push(Step::look(
                    format!("the array /dev/md{}", array.number),
                    format!("[ ! -e {file} ] || {{ read -r state <{file}; [ $state = clear ] || echo $state; }}"),
                ));
            }
            Layer::Vg { name, .. } => {
                names.push(format!("/dev/{name}"));
                groups.push(*name);
            }
            Layer::Luks { name, .. } => names.push(format!("/dev/mapper/{name}")),
            Layer::Bcache { .. } => names.push("/dev/bcache0".into()),
            _ => {}
        }
    }
    if !groups.is_empty() {
        let patterns = each("", &groups, "") + &each("/dev/", &short, "p?[0-9]*");
        steps.push(Step::look(
            "physical volumes and volume groups",
            format!("pvs --noheadings -o pv_name,vg_name 2>/dev/null | grep -wE{patterns}"),
        ));
    }
    if layout.programs().contains("mdadm") {
        steps.push(Step::look("md superblocks", format!("mdadm --examine --brief {all} 2>/dev/null")));
    }
    if !names.is_empty() {
        let look = format!("for node in {}; do [ ! -e $node ] || echo $node; done", names.join(" "));
        steps.push(Step::look("its device nodes", look));
    }
    steps
}

/// The looks of [`Level::NotResurrectable`], on copies that are put away afterwards.
pub(super) fn resurrect(layout: &Layout, disks: &[String]) -> Vec<Step> {
    let names = Names::Again;
    let mut steps = vec![Step::must("copy the disks", copies(layout, disks))];
    // What makes it, undone in reverse.
    let mut undo = Vec::new();
    for layer in layout.layers {
        match layer {
            Layer::Table { disk, parts } => {
                steps.push(Step::must(
                    format!("make the partitions of disk {disk} again"),
                    seed::table(*disk, *parts, names),
                ));
            }
            Layer::Md(array) => {
                let number = array.number + 100;
                undo.push(format!("[ ! -e /dev/md{number} ] || mdadm --quiet --stop /dev/md{number}\n"));
                steps.push(Step::must(
                    format!("make the array /dev/md{} again, as /dev/md{number}", array.number),
                    format!("{}\n{SETTLE}", seed::array(array, names)),
                ));
            }
            Layer::Luks { on, name, .. } => {
                let dev = names.dev(*on);
                let mapper = names.dev(Dev::Crypt(name));
                undo.push(format!("[ ! -e {mapper} ] || dmsetup remove --retry {mapper}\n"));
                steps.push(Step::look(
                    format!("the LUKS volume {name} opens"),
                    format!(
                        "if [ -b {dev} ] && {{ {}; }} 2>/dev/null; then echo it is open; fi",
                        seed::open(*on, name, names)
                    ),
                ));
            }
            Layer::Vg { name, on } => {
                undo.push(format!("[ ! -e /dev/{name} ] || vgchange -q -an --devices \"$where\" {name}\n"));
                let devs = on.iter().map(|dev| names.dev(*dev)).collect::<Vec<_>>().join(" ");
                steps.push(Step::must(
                    format!("where {name} could be"),
                    format!(
                        "where=; for dev in {devs}; do [ ! -b $dev ] || where=$where${{where:+,}}$dev; done"
                    ),
                ));
                steps.push(Step::look(
                    format!("the volume group {name} is back"),
                    format!(
                        "[ -z \"$where\" ] || ! vgs --devices $where --noheadings {name} 2>/dev/null ||\n\
                         {{ vgchange -q -ay --devices $where {name} >/dev/null 2>&1; {SETTLE}; }}"
                    ),
                ));
            }
            Layer::Lv { .. } | Layer::Bcache { .. } => {}
            Layer::Fs { .. } | Layer::Swap { .. } | Layer::Zfs { .. } | Layer::Raw { .. } => {
                for on in layer.on().into_iter().filter(|on| !matches!(on, Dev::Bcache(_))) {
                    let dev = names.dev(on);
                    steps.push(Step::look(
                        format!("what is on {dev}"),
                        format!(
                            "if [ -b {dev} ]; then wipefs -n --noheadings {dev}; {}; fi",
                            sentinel(layer, &dev)
                        ),
                    ));
                }
            }
        }
    }
    steps.push(Step::always("put the copies away", put_away(layout, disks.len(), &undo)));
    steps
}

/// Prints the sentinel if it can be read through `dev`.
fn sentinel(layer: &Layer, dev: &str) -> String {
    match layer {
        Layer::Fs { .. } => format!(
            "mkdir -p /run/residue/again && mount -o ro {dev} /run/residue/again 2>/dev/null && {{\n\
             cat /run/residue/again/sentinel; umount /run/residue/again; }} || :"
        ),
        _ => format!("dd if={dev} bs=64 count=1 status=none | grep -ao {SENTINEL} || :"),
    }
}

/// Loop devices, because they can have partitions: over a snapshot, whose changes go to memory, or
/// over a whole copy where the disk is so small that this is faster.
fn copies(layout: &Layout, disks: &[String]) -> String {
    let tables = layout.layers.iter().any(|layer| matches!(layer, Layer::Table { .. }));
    let attach = if tables { "losetup --find --show --partscan" } else { "losetup --find --show" };
    let mut text = format!(
        "[ -e /sys/module/loop ] || modprobe -q loop\n\
         [ -d /run/residue ] || mkdir -p /run/residue\n\
         set -- $(blockdev --getsz {})\n",
        disks.join(" ")
    );
    for (number, disk) in disks.iter().enumerate() {
        let (file, mapped) = (copy_file(layout, number), copy_mapped(layout, number));
        text += &format!(
            "if [ $1 -le {LARGEST_COPY} ]; then\n\
             dd if={disk} of={file} bs=1M iflag=direct conv=sparse status=none &&\n\
             copy{number}=$({attach} {file})\n\
             else\n\
             truncate -s $(($1 * 512)) {file} &&\n\
             changes{number}=$(losetup --find --show {file}) &&\n\
             modprobe -q dm-snapshot; dmsetup create {mapped} --table \"0 $1 snapshot {disk} $changes{number} N 8\" &&\n\
             copy{number}=$({attach} /dev/mapper/{mapped})\n\
             fi && shift &&\n"
        );
    }
    text + SETTLE
}

/// In sectors: what a machine's memory has room for several times.
const LARGEST_COPY: u64 = DISK_BYTES >> 9;

fn copy_file(layout: &Layout, number: usize) -> String {
    format!("/run/residue/{}.copy{number}", layout.name)
}

fn copy_mapped(layout: &Layout, number: usize) -> String {
    format!("residue_{}_{number}", layout.name.replace('-', "_"))
}

fn put_away(layout: &Layout, disks: usize, undo: &[String]) -> String {
    let mut text = format!("{SETTLE}\n");
    text.extend(undo.iter().rev().map(String::as_str));
    let all = |name: &str| (0..disks).map(|disk| format!(" ${{{name}{disk}-}}")).collect::<String>();
    let detach = |name: &str| format!("set --{}; [ $# = 0 ] || losetup -d \"$@\"\n", all(name));
    text += &detach("copy");
    for number in 0..disks {
        let mapped = copy_mapped(layout, number);
        text += &format!("[ ! -e /dev/mapper/{mapped} ] || {{ {SETTLE}; dmsetup remove --retry {mapped}; }}\n");
    }
    text += &detach("changes");
    let files: Vec<_> = (0..disks).map(|disk| copy_file(layout, disk)).collect();
    text + &format!("rm -f {}\n", files.join(" ")) + SETTLE
}
