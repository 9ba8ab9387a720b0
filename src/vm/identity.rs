//! Who a machine is: a name and a number that it does not share with others of its image.
//!
//! Owns what the guest is told for it. All forks of a template are one machine to the programs that
//! ask; a scenario about several machines wants them to differ.

use super::Needs;
use crate::process::quote;
use std::hash::{BuildHasher, Hasher, RandomState};

/// The script that gives a machine the identity that it needs, if any; it fails as a whole.
pub(super) fn script(needs: &Needs) -> Option<String> {
    let mut script = String::from("set -e\n");
    if let Some(name) = needs.hostname {
        let name = quote(name);
        script += &format!("echo {name} >/proc/sys/kernel/hostname\necho {name} >/etc/hostname\n");
    }
    if needs.fresh_machine_id {
        script += &machine_id(&random());
    }
    (needs.hostname.is_some() || needs.fresh_machine_id).then_some(script)
}

/// Replaces machine-id(5). The journal goes on under the old number, which is in the names of its
/// directories and by which journalctl(1) looks for them, so the new one leads there.
fn machine_id(id: &str) -> String {
    format!(
        "read -r sd_old </etc/machine-id\n\
         for sd_f in /etc/machine-id /var/lib/dbus/machine-id; do\n\
         if [ -e \"$sd_f\" ]; then echo {id} >\"$sd_f\"; fi\n\
         done\n\
         for sd_d in /run/log/journal /var/log/journal; do\n\
         if [ -d \"$sd_d/$sd_old\" ]; then ln -s \"$sd_old\" \"$sd_d/{id}\"; fi\n\
         done\n"
    )
}

/// 32 hexadecimal digits. From this host: the guest's own random pool was frozen with it.
fn random() -> String {
    // The standard library's only source of randomness: a fresh `RandomState` hashes differently.
    let half = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", half(), half())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_what_nobody_asked_for() {
        assert_eq!(script(&Needs::DEFAULT), None);
        let needs = Needs { hostname: Some("node-1"), ..Needs::DEFAULT };
        let text = script(&needs).expect("something to say");
        assert!(text.contains("echo node-1 >/etc/hostname") && !text.contains("machine-id"), "{text}");
        let text = script(&Needs { hostname: Some("a'; reboot"), ..Needs::DEFAULT }).expect("as well");
        assert!(text.contains(r"echo 'a'\''; reboot' >"), "{text}");
    }

    #[test]
    fn machine_ids_are_of_their_kind_and_differ() {
        let (one, two) = (random(), random());
        assert_ne!(one, two);
        assert!(one.len() == 32 && one.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    }
}
