//! What must be true of disks before anything of ours writes on them, on a machine that is not ours.
//!
//! A disk is taken when it was named, named once more, is a whole disk, and nothing of it is in use.

use super::graph::{Graph, LOOK};
use crate::connection::{Cmd, Session};
use crate::fault::Fault;
use anyhow::{Context, Result, bail};

impl Graph {
    /// The block graph of the machine at the other end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(session: &mut Session<'_>) -> Result<Self> {
        let mut texts = [const { String::new() }; 4];
        for (text, look) in texts.iter_mut().zip(LOOK) {
            *text = session.run(Cmd::new(look))?.text().into_owned();
        }
        Self::read(texts.each_ref().map(String::as_str))
    }
}

/// Where the disks are once links are followed, if they may be overwritten.
///
/// # Errors
/// A host [`Fault`] that names the disk and why it is refused.
pub fn admit(session: &mut Session<'_>, named: &[String], confirmed: &[String]) -> Result<Vec<String>> {
    let named = resolve(session, named)?;
    let confirmed = resolve(session, confirmed)?;
    for (number, disk) in named.iter().enumerate() {
        if named[..number].contains(disk) {
            bail!(refused(disk, "is named twice"));
        }
        if !confirmed.contains(disk) {
            bail!(
                refused(disk, "was not confirmed")
                    .fix(format!("--confirm {disk}, if all that is on it may be lost"))
            );
        }
    }
    let used = session.run("findmnt -rno SOURCE; tail -n +2 /proc/swaps | cut -d ' ' -f 1")?.lines();
    let graph = Graph::of(session)?;
    check(&graph, &named, &used)?;
    Ok(named)
}

fn refused(disk: &str, why: &str) -> Fault {
    Fault::host(format!("{disk} is refused: it {why}"))
}

fn resolve(session: &mut Session<'_>, disks: &[String]) -> Result<Vec<String>> {
    disks
        .iter()
        .map(|disk| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "/._:+-".contains(c);
            if !disk.starts_with("/dev/") || !disk.chars().all(plain) {
                bail!(refused(disk, "is not the path of a device below /dev"));
            }
            let type_of = format!("readlink -f {disk} && lsblk -dnro TYPE {disk}");
            let answer = session.run(Cmd::new(type_of).allow_failure())?.lines();
            match &answer[..] {
                [path, kind] if kind == "disk" || kind == "loop" => Ok(path.clone()),
                _ => bail!(refused(disk, "is not a disk of that machine")),
            }
        })
        .collect()
}

/// `used`: what is mounted or swapped to, by whatever name.
fn check(graph: &Graph, disks: &[String], used: &[String]) -> Result<()> {
    for disk in disks {
        let above = graph.teardown_order(std::slice::from_ref(disk));
        above.last().with_context(|| refused(disk, "is not in the block graph"))?;
        for node in above {
            let listed = used.iter().any(|used| used.split('[').next() == Some(&*node.name));
            if node.mounted || node.swap || listed {
                bail!(
                    refused(disk, &format!("is in use: {} is mounted or swapped to", node.name))
                        .fix("unmount it first, if this is the right disk")
                );
            }
        }
    }
    match graph.shared_with(disks)[..] {
        [] => Ok(()),
        [other, ..] => bail!(
            refused(&disks.join(", "), &format!("shares what stands on it with {other}"))
                .fix("name and confirm that disk as well, if it may be cleaned")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LSBLK: &str = r#"{"blockdevices": [
        {"name":"/dev/sda","type":"disk","mountpoints":[null],
         "children":[{"name":"/dev/sda1","type":"part","mountpoints":["/"]}]},
        {"name":"/dev/sdb","type":"disk","mountpoints":[null]},
        {"name":"/dev/sdc","type":"disk","mountpoints":[null]},
        {"name":"/dev/sdd","type":"disk","mountpoints":[null]},
        {"name":"/dev/sde","type":"disk","mountpoints":[null]}]}"#;
    // Not active, so only LVM knows.
    const PVS: &str = r#"{"report": [{"pv": [{"pv_name":"/dev/sdc", "vg_name":"vg"}, {"pv_name":"/dev/sdd", "vg_name":"vg"}]}]}"#;

    fn verdict(disks: &[&str], used: &[&str]) -> Result<()> {
        let graph = Graph::read([LSBLK, "", PVS, "{}"]).expect("reads");
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        check(&graph, &owned(disks), &owned(used))
    }

    #[test]
    fn only_disks_that_nobody_uses_are_taken() {
        for (disks, used, word) in [
            (&["/dev/sda"][..], &[][..], "/dev/sda1 is mounted"),
            (&["/dev/sdb"], &["/dev/sdb[/subvolume]"], "/dev/sdb is mounted"),
            (&["/dev/sdc"], &[], "with /dev/sdd"),
            (&["/dev/sdx"], &[], "not in the block graph"),
        ] {
            let text = format!("{:#}", verdict(disks, used).expect_err("refused"));
            assert!(text.contains(word), "{text}");
        }
        verdict(&["/dev/sdc", "/dev/sdd"], &["/dev/sda1"]).expect("the whole group");
        verdict(&["/dev/sdb", "/dev/sde"], &["tmpfs"]).expect("nobody uses them");
    }
}
