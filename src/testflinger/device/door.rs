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
    Ok(Way { ip, port, user: user.to_owned(), key, ssh_agent, serial })
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
fn account(user: &str) -> String {
    let user = quote(user);
    format!(
        "set -e\numask 077\n\
         if ! grep -q ^{user}: /etc/passwd; then\n\
         for f in passwd shadow; do line=$(sed -n s/^root:/{user}:/p /etc/$f); echo \"$line\" >>/etc/$f; done\n\
         fi\n\
         home=$(sed -n 's/^{user}:.*:\\(.*\\):[^:]*$/\\1/p' /etc/passwd)\n\
         mkdir -p \"$home/.ssh\"\ncat >>\"$home/.ssh/authorized_keys\"\n\
         chown -R {user}: \"$home/.ssh\"\n"
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
