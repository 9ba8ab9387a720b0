//! Opens a machine that has just come up: an account, the keys that open it, an address.

use super::machine::Way;
use crate::connection::Cmd;
use crate::fault::Fault;
use crate::process::quote;
use crate::vm::Vm;
use anyhow::{Context, Result};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// It takes a twentieth of a second.
const OPEN: Duration = Duration::from_secs(60);
const SSH: u16 = 22;

/// Lets `user` in with our key and with those of whoever runs the agent, whose `ssh` to the device
/// then just works, and says where.
///
/// # Errors
/// A machine [`Fault`] when the guest does not do it, a host one when there is no way in at all.
pub(super) fn open(vm: &mut Vm, user: &str, ssh_agent: Option<PathBuf>) -> Result<Way> {
    let running = vm.running().clone();
    let (Some(ssh), serial) = (running.ssh, running.evidence.join("logs/serial.log")) else {
        return Err(Fault::host(format!("image `{}` has no way in by SSH", running.image))
            .fix("set `key` in the image's settings, or take another image for the device")
            .into());
    };
    let key = ssh.key.context(Fault::host("the key of this host's machines is in no file"))?;
    let mut keys = public_line(&key)?;
    keys += &own_keys();
    let script = Cmd::new(account(user)).stdin(keys).timeout(OPEN);
    vm.shell()?.run(script).with_context(|| Fault::machine(format!("`{user}` cannot be let in")))?;
    let own = SocketAddrV4::new(address(std::process::id()), SSH);
    let (ip, port) = match vm.forward_ssh(own)? {
        true => (*own.ip(), SSH),
        false => (Ipv4Addr::LOCALHOST, ssh.port),
    };
    Ok(Way { qemu: running.process, ip, port, user: user.to_owned(), key, ssh_agent, serial })
}

/// An address on loopback that no other keeper has: process ids have up to 22 bits (proc(5),
/// `pid_max`).
fn address(process: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 64, 0, 0).to_bits() | (process & 0x3f_ffff))
}

fn public_line(key: &Path) -> Result<String> {
    let path = key.with_extension("pub");
    std::fs::read_to_string(&path).with_context(|| Fault::host(format!("cannot read {}", path.display())))
}

/// The public keys of the user who runs us. There need be none.
fn own_keys() -> String {
    let Some(home) = std::env::var_os("HOME") else { return String::new() };
    let files = std::fs::read_dir(Path::new(&home).join(".ssh")).into_iter().flatten().flatten();
    let keys = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|ext| ext == "pub"));
    let lines = keys.filter_map(|path| std::fs::read_to_string(path).ok());
    lines.map(|text| text.trim_end().to_owned() + "\n").collect()
}

/// Makes the account where the image has none of the name: root's under another name, since a machine
/// that is gone in a moment needs no second set of rights. Its keys come on standard input.
///
/// Builtins of the shell alone, in the usual case: under emulation each program that a fresh fork
/// starts costs a tenth of a second.
fn account(user: &str) -> String {
    let user = quote(user);
    format!(
        r#"set -e
umask 077
account=
while IFS= read -r line; do
    case $line in root:*) root=${{line#root}} ;; {user}:*) account=$line ;; esac
done </etc/passwd
if [ -z "$account" ]; then
    account={user}$root
    echo "$account" >>/etc/passwd
    while IFS= read -r line; do
        case $line in root:*) echo "{user}${{line#root}}" >>/etc/shadow ;; esac
    done </etc/shadow
fi
home=${{account%:*}}
home=${{home##*:}}
[ -d "$home/.ssh" ] || mkdir -p "$home/.ssh"
while IFS= read -r key; do echo "$key"; done >>"$home/.ssh/authorized_keys"
uid=${{account#*:*:}}
[ "${{uid%%:*}}" = 0 ] || chown -R {user}: "$home/.ssh"
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_keeper_has_an_address_of_its_own() {
        assert_eq!(address(1), Ipv4Addr::new(127, 64, 0, 1));
        assert_eq!(address(4_194_303), Ipv4Addr::new(127, 127, 255, 255));
        assert!(address(u32::MAX).is_loopback());
    }
}
