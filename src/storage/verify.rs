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
    let mut steps = vec![
        Step::must("let udev finish", SETTLE),
        Step::look(
            "what stands on the disks",
            format!("lsblk -nro NAME,TYPE,MOUNTPOINTS {all} | grep -v ' disk *$' | grep -v ' loop *$'"),
        ),
        Step::look("signatures that blkid finds", format!("blkid -p {all}")),
        Step::look("signatures that wipefs finds", format!("wipefs -n --noheadings {all}")),
        Step::look(
            "what udev remembers",
            // It may still be about to look at what was just written.
            format!(
                "for try in 1 2 3 4 5 6 7 8 9 10; do\n\
                 seen=$(for dev in {all}; do ! command -v udevadm >/dev/null || udevadm info --query=property --name=$dev; done |\n\
                 grep -E '^ID_(FS|PART_TABLE)_TYPE=') && sleep 0.2 || break\n\
                 {SETTLE}; done; [ -z \"$seen\" ] || echo $seen"
            ),
        ),
        Step::look(
            "mounts and swap",
            format!(
                "grep -h -e ' /run/residue/{}-[0-9]* ' /proc/self/mounts; {}",
                layout.name,
                grep_swap(&short)
            ),
        ),
    ];
    let mut names = Vec::new();
    for layer in layout.layers {
        match layer {
            Layer::Md(array) => {
                let md = format!("md{}", array.number);
                // A node alone is no array: opening it makes an empty one.
                let state = format!("cat /sys/class/block/{md}/md/array_state 2>/dev/null | grep -vx clear");
                steps.push(Step::look(format!("the array /dev/{md}"), state));
            }
            Layer::Vg { name, .. } => {
                names.push(format!("/dev/{name}"));
                steps.push(Step::look(
                    format!("the volume group {name}"),
                    format!("vgs --noheadings -o vg_name 2>/dev/null | grep -w {name}"),
                ));
            }
            Layer::Luks { name, .. } => names.push(format!("/dev/mapper/{name}")),
            Layer::Bcache { .. } => names.push("/dev/bcache0".into()),
            _ => {}
        }
    }
    if layout.programs().contains("lvm") {
        steps.push(Step::look(
            "physical volumes",
            format!("pvs --noheadings --devices {} 2>/dev/null", disks.join(",")),
        ));
    }
    if layout.programs().contains("mdadm") {
        let members = short.iter().map(|disk| format!("-e {disk}")).collect::<Vec<_>>().join(" ");
        steps.push(Step::look("arrays that run", format!("grep -w {members} /proc/mdstat")));
        steps.push(Step::look("md superblocks", format!("mdadm --examine --brief {all} 2>/dev/null")));
    }
    if !names.is_empty() {
        steps.push(Step::look("its device nodes", format!("ls -d {} 2>/dev/null", names.join(" "))));
    }
    steps
}

fn grep_swap(short: &[&str]) -> String {
    let disks = short.iter().map(|disk| format!("-e ^/dev/{disk}")).collect::<Vec<_>>().join(" ");
    format!("grep {disks} /proc/swaps")
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
    let mut text = String::from("modprobe -q loop; mkdir -p /run/residue &&\n");
    for (number, disk) in disks.iter().enumerate() {
        let (file, mapped) = (copy_file(layout, number), copy_mapped(layout, number));
        text += &format!(
            "size=$(blockdev --getsz {disk}) &&\n\
             if [ $size -le {LARGEST_COPY} ]; then\n\
             cp --sparse=always {disk} {file} &&\n\
             copy{number}=$(losetup --find --show --partscan {file})\n\
             else\n\
             truncate -s $((size * 512)) {file} &&\n\
             changes{number}=$(losetup --find --show {file}) &&\n\
             modprobe -q dm-snapshot; dmsetup create {mapped} --table \"0 $size snapshot {disk} $changes{number} N 8\" &&\n\
             copy{number}=$(losetup --find --show --partscan /dev/mapper/{mapped})\n\
             fi &&\n"
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
    let mut text = format!(
        "{SETTLE}\n! grep -q ' /run/residue/again ' /proc/self/mounts || umount /run/residue/again\n"
    );
    text.extend(undo.iter().rev().map(String::as_str));
    for number in 0..disks {
        let (file, mapped) = (copy_file(layout, number), copy_mapped(layout, number));
        text += &format!(
            "[ -z \"${{copy{number}-}}\" ] || losetup -d $copy{number}\n\
             [ ! -e /dev/mapper/{mapped} ] || {{ {SETTLE}; dmsetup remove --retry {mapped}; }}\n\
             [ -z \"${{changes{number}-}}\" ] || losetup -d $changes{number}\n\
             rm -f {file}\n"
        );
    }
    text + SETTLE
}
