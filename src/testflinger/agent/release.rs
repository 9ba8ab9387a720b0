//! What runs on a machine that was provisioned: a label of the metrics, asked of the machine itself.

use super::job::Running;
use super::metrics::Metrics;
use super::place::read_object;
use crate::deadline::Deadline;
use crate::process;
use crate::testflinger::wire::Phase;
use std::process::Command;
use std::time::Duration;

const UNKNOWN: &str = "unknown";

/// Has `record` called with the release, at once or when the machine has told it. The job does not wait for that.
pub(super) fn measure(
    running: &Running<'_>,
    phase: Phase,
    code: u8,
    record: impl FnOnce(&Metrics, &str, &str) + Send + 'static,
) {
    let agent = running.agent;
    let (metrics, name) = (agent.metrics.clone(), agent.config.agent_id.clone());
    let address =
        (phase == Phase::Provision && code == 0 && agent.is_measured).then(|| address(running)).flatten();
    let Some(address) = address else { return record(&metrics, &name, UNKNOWN) };
    let user = running.job.test_username().unwrap_or("ubuntu").to_owned();
    let asked = std::thread::Builder::new().name("release".into()).stack_size(256 << 10).spawn(move || {
        let release = ask(&user, &address).unwrap_or_else(|| UNKNOWN.into());
        record(&metrics, &name, &release);
    });
    if let Err(error) = asked {
        agent.log.warning(format!("Cannot ask for the release: {error}"));
    }
}

fn address(running: &Running<'_>) -> Option<String> {
    let info = read_object(&running.place.rundir.join("device-info.json"))?;
    let address = info.get("device_info")?.get("device_ip")?.as_str()?;
    is_word(address).then(|| address.to_owned())
}

/// Nothing that `ssh` could take for an option.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:%".contains(c))
}

fn ask(user: &str, address: &str) -> Option<String> {
    if !is_word(user) {
        return None;
    }
    let mut command = Command::new("ssh");
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "ConnectTimeout=10",
        "BatchMode=yes",
        "LogLevel=ERROR",
    ] {
        command.args(["-o", option]);
    }
    command.arg(format!("{user}@{address}")).arg("cat /etc/os-release");
    let deadline = Deadline::after(Duration::from_secs(30), "limit for the question what runs on a machine");
    release(&process::output(command, &deadline).ok()?)
}

/// `Core 22`, `22.04.5` or `22.04`.
fn release(text: &str) -> Option<String> {
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim().trim_matches('"').to_owned())
    };
    let version = value("VERSION_ID").unwrap_or_default();
    if value("ID").as_deref() == Some("ubuntu-core") {
        return Some(format!("Core {version}"));
    }
    let full = value("VERSION").and_then(|text| text.split_whitespace().next().map(str::to_owned));
    full.filter(|full| full.starts_with(&version) && !full.is_empty())
        .or(Some(version))
        .filter(|v| !v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_named_as_in_the_original() {
        let jammy = "PRETTY_NAME=\"Ubuntu 22.04.5 LTS\"\nNAME=\"Ubuntu\"\nVERSION_ID=\"22.04\"\nVERSION=\"22.04.5 LTS (Jammy Jellyfish)\"\nID=ubuntu\n";
        assert_eq!(release(jammy).as_deref(), Some("22.04.5"));
        let core = "NAME=\"Ubuntu Core\"\nVERSION=\"22\"\nID=ubuntu-core\nVERSION_ID=\"22\"\n";
        assert_eq!(release(core).as_deref(), Some("Core 22"));
        assert_eq!(release("VERSION_ID=\"12\"\n").as_deref(), Some("12"));
        assert_eq!(release("no release"), None);
    }

    #[test]
    fn what_is_no_address_is_not_asked() {
        assert!(is_word("10.0.0.1") && is_word("fe80::1%eth0"));
        assert!(!is_word("-oProxyCommand=x") && !is_word("a b") && !is_word(""));
    }
}
