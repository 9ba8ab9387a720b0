//! What nix's errors mean and what to do about them, where that is known.

use crate::fault::Fault;
use anyhow::Error;

/// Words that all stand in one line of an error of nix, what they mean, and the fix.
struct Known(&'static [&'static str], &'static str, &'static str);

/// In the order in which they are tried: the first that fits is told.
const KNOWN: &[Known] = &[
    Known(
        &["experimental Nix feature", "is disabled"],
        "flakes are not enabled here",
        "put `experimental-features = nix-command flakes` into /etc/nix/nix.conf",
    ),
    Known(
        &["unrecognised flag", "experimental-features"],
        "this nix is too old for flakes",
        "install nix 2.4 or newer",
    ),
    Known(
        &["build-users-group", "does not exist"],
        "there are no users for nix's builds",
        "install Debian's nix-setup-systemd, which makes them, or put `build-users-group =` into /etc/nix/nix.conf",
    ),
    Known(
        &["cannot connect to socket"],
        "nix's daemon does not run",
        "start it (`systemctl start nix-daemon`), or run as root without NIX_REMOTE",
    ),
    Known(
        &["error:", "/nix/", "Permission denied"],
        "this user has no access to nix's store",
        "start nix's daemon (Debian: install nix-setup-systemd, join the group nix-users), or run as root",
    ),
    Known(
        &["creating directory '/nix'"],
        "this user cannot make nix's store",
        "start nix's daemon, or run as root",
    ),
    Known(
        &["is not tracked by Git"],
        "git does not have the flake, and nix sees only what git has",
        "`git add` its files, or write `flake = \"path:DIRECTORY\"`",
    ),
    // Older ones only miss the file in their copy of what git has.
    Known(
        &["getting status of", "-source/", "No such file or directory"],
        "git does not have the flake, and nix sees only what git has",
        "`git add` its files, or write `flake = \"path:DIRECTORY\"`",
    ),
    Known(
        &["does not provide attribute"],
        "the flake has no such image",
        "correct `attribute` of the image; `nix flake show` lists what there is",
    ),
    Known(
        &["executing", "No such file or directory"],
        "a builder is a program of this host, and nix's sandbox hides it",
        "put `sandbox = false` into /etc/nix/nix.conf, or have the flake bring the program",
    ),
    Known(
        &["error:", "Operation not permitted"],
        "this host does not let nix make its sandbox",
        "put `sandbox = false` into /etc/nix/nix.conf, or allow user namespaces",
    ),
    Known(
        &["resolve host"],
        "nix cannot reach what it has to fetch",
        "connect to the network; what an earlier build or `nix flake archive` has fetched needs none",
    ),
    Known(
        &["unable to download"],
        "nix cannot fetch what it needs",
        "look at the address in its message; behind a proxy, set https_proxy",
    ),
    Known(
        &["No space left on device"],
        "the disk of nix's store or of its builds is full",
        "`nix-collect-garbage`, or free some space otherwise",
    ),
];

/// The error as a fault that says `what` failed, why, and what to do.
pub(super) fn explain(error: Error, what: &str) -> Error {
    let text = format!("{error:#}");
    let fault = match text.lines().filter_map(own).find_map(known) {
        Some(Known(_, why, fix)) => Fault::host(format!("{what}: {why}")).fix(*fix),
        None => Fault::host(what),
    };
    error.context(fault)
}

/// A line of nix's own, and no warning: a cache that cannot be reached need not matter. What a
/// builder says has its name before it, `boot-image> ...`.
fn own(line: &str) -> Option<&str> {
    let line = line.trim();
    let builder = line.split_once("> ").is_some_and(|(name, _)| !name.is_empty() && !name.contains(' '));
    (!builder && !line.starts_with("warning:")).then_some(line)
}

fn known(line: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|Known(words, ..)| words.iter().all(|word| line.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    fn explained(said: &str) -> String {
        let error = explain(anyhow!("`nix build` failed with exit status 1\n  {said}"), "nix cannot build x");
        format!("{error:#}")
    }

    #[test]
    fn what_nix_really_says_is_understood() {
        for (said, words) in [
            (
                "error: experimental Nix feature 'nix-command' is disabled; use '--extra-experimental-features nix-command' to override",
                "flakes are not enabled",
            ),
            (
                "error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': No such file or directory",
                "daemon does not run",
            ),
            (
                "error: getting status of /nix/var/nix/daemon-socket/socket: Permission denied",
                "no access to nix's store",
            ),
            (
                "error: flake 'path:/t' does not provide attribute 'packages.x86_64-linux.nope', 'legacyPackages.x86_64-linux.nope' or 'nope'",
                "no such image",
            ),
            (
                "       >        Error                  Error   D       executing '/bin/sh': No such file or directory",
                "sandbox hides it",
            ),
            ("error: cloning builder process: Operation not permitted", "make its sandbox"),
            (
                "error: the group 'nixbld' specified in 'build-users-group' does not exist",
                "no users for nix's builds",
            ),
            (
                "error: unable to download 'https://api.github.com/repos/NixOS/nixpkgs/commits/nixos-24.11': Couldn't resolve host name (6)",
                "cannot reach",
            ),
            ("error: unable to download 'https://example.org/x': HTTP error 404", "cannot fetch"),
            (
                "error: getting status of '/nix/store/0ccnxa25whszw7mgbgyzdm4nqc0zwnm8-source/n': No such file or directory",
                "git does not have the flake",
            ),
            ("error: path '/x/flake.nix' is not tracked by Git", "git does not have the flake"),
        ] {
            let text = explained(said);
            assert!(
                text.starts_with("nix cannot build x: ") && text.contains(words) && text.contains("\nFix: "),
                "{text}"
            );
            assert!(text.contains(said), "nothing is lost: {text}");
        }
    }

    #[test]
    fn what_is_not_known_is_passed_on() {
        let text = explained("error: builder for '/nix/store/x.drv' failed with exit code 3");
        assert!(text.starts_with("nix cannot build x: `nix build`") && !text.contains("Fix:"), "{text}");
        let text = explained(
            "warning: error: unable to download 'https://cache.nixos.org/nix-cache-info': Couldn't resolve host name (6); retrying in 265 ms",
        );
        assert!(!text.contains("Fix:"), "a warning explains nothing: {text}");
        let text = explained("boot-image> error: chown /x: Operation not permitted");
        assert!(!text.contains("Fix:"), "a builder may fail in its own ways: {text}");
    }
}
