//! The recipe's files, part of the program: who uses the crate has no `fixtures/`.

/// A file of the recipe, or of the root file system it makes.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecipeFile {
    /// Relative to the root directory, or to `fixtures/image/debian/`.
    pub(super) path: &'static str,
    pub(super) text: &'static str,
    pub(super) executable: bool,
}

macro_rules! file {
    ($($path:literal),+) => {
        include_str!(concat!("../../../fixtures/image/debian/", $($path),+))
    };
}

macro_rules! overlay {
    ($($path:literal $($executable:ident)?),* $(,)?) => {
        &[$(RecipeFile {
            path: $path,
            text: file!("overlay/", $path),
            executable: overlay!(@ $($executable)?),
        }),*]
    };
    (@) => { false };
    (@ executable) => { true };
}

/// Runs in the finished root, on the host.
pub(super) const CUSTOMIZE: &str = file!("customize");
/// Standard words of the kernel command line.
pub(super) const CMDLINE: &str = file!("cmdline");
/// What GRUB runs to find its configuration.
pub(super) const EARLY_CFG: &str = file!("early.cfg");
/// The configuration GRUB finds.
pub(super) const GRUB_CFG: &str = file!("grub.cfg");
/// The initramfs's first process.
pub(super) const INIT: &str = file!("init");

const EXCLUDES: &str = file!("excludes");
const MODULES: &str = file!("modules");
const PACKAGES: &str = file!("packages");

/// Laid over the installed packages.
pub(super) const OVERLAY: &[RecipeFile] = overlay![
    "etc/default/locale",
    "etc/hostname",
    "etc/hosts",
    "etc/machine-id",
    "etc/ssh/sshd_config.d/shakedown.conf",
    "etc/systemd/journald.conf.d/volatile.conf",
    "etc/systemd/network/80-ethernet.network",
    "etc/systemd/system/getty@tty1.service.d/after-ssh.conf",
    "etc/systemd/system/lan-address.path",
    "etc/systemd/system/lan-address.service",
    "etc/systemd/system/qemu-guest-agent.service.d/after-ssh.conf",
    "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf",
    "etc/systemd/system/ssh.service",
    "etc/systemd/system/systemd-logind.service.d/after-ssh.conf",
    "etc/systemd/system/systemd-udev-trigger.service.d/devices.conf",
    "root/.hushlogin",
    "usr/local/lib/shakedown/lan-address" executable,
];

/// Symbolic links of the overlay, and where they point.
pub(super) const LINKS: &[(&str, &str)] = &[("etc/resolv.conf", "/run/shakedown/resolv.conf")];

/// What dpkg leaves out; a leading `!` takes it in again.
pub(super) fn excludes() -> impl Iterator<Item = &'static str> {
    lines(EXCLUDES)
}

/// Kernel modules that the initramfs needs.
pub(super) fn modules() -> impl Iterator<Item = &'static str> {
    lines(MODULES)
}

/// Packages of every image.
pub(super) fn packages() -> impl Iterator<Item = &'static str> {
    lines(PACKAGES)
}

fn lines(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Everything that makes two builds of the same packages differ, by name.
pub(super) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    [
        ("customize", CUSTOMIZE),
        ("cmdline", CMDLINE),
        ("early.cfg", EARLY_CFG),
        ("grub.cfg", GRUB_CFG),
        ("init", INIT),
        ("excludes", EXCLUDES),
        ("modules", MODULES),
        ("packages", PACKAGES),
    ]
    .into_iter()
    .chain(OVERLAY.iter().map(|file| (file.path, file.text)))
    .chain(LINKS.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn walk(dir: &Path, base: &Path, found: &mut BTreeMap<String, bool>) {
        for entry in std::fs::read_dir(dir).expect("readable") {
            let entry = entry.expect("readable");
            let meta = entry.metadata().expect("readable");
            if meta.is_dir() {
                walk(&entry.path(), base, found);
            } else {
                let path = entry.path();
                let name = path.strip_prefix(base).expect("below").to_str().expect("UTF-8").to_owned();
                found.insert(name, meta.permissions().mode() & 0o100 != 0);
            }
        }
    }

    #[test]
    fn every_file_of_the_recipe_is_embedded_with_its_mode() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/image/debian");
        let mut found = BTreeMap::new();
        walk(&base.join("overlay"), &base.join("overlay"), &mut found);
        let embedded = OVERLAY.iter().map(|file| (file.path.to_owned(), file.executable)).collect();
        assert_eq!(found, embedded);
        let mut all: Vec<_> = all().map(|(name, _)| name).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 8 + OVERLAY.len() + LINKS.len(), "names are unique");
    }

    #[test]
    fn comments_are_no_packages() {
        assert!(packages().all(|name| !name.contains(['#', ' '])));
        assert!(packages().any(|name| name == "openssh-server"));
        assert!(modules().any(|name| name == "virtio_blk"));
    }
}
