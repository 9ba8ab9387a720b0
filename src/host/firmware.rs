//! Where this host keeps its UEFI firmware for x86_64 machines.
//!
//! QEMU's firmware descriptors (`docs/interop/firmware.json` in QEMU) are the standard way to ask;
//! well-known places are the second try. Copies of the variable store are the machine's affair.

use super::check::{Check, State};
use super::tools::{Part, install_fix};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// OVMF without Secure Boot: the code, and the template of the variable store.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Ovmf {
    /// Read-only code, pflash unit 0.
    pub code: Flash,
    /// To be copied for each machine, pflash unit 1.
    pub vars: Flash,
}

/// A flash image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Flash {
    /// The file.
    #[serde(rename = "filename")]
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// Formats of flash images; Fedora has them as qcow2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Plain bytes.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl Format {
    /// As QEMU writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Directories of descriptors; a file in a later one replaces its namesake in an earlier one.
const DESCRIPTORS: [&str; 3] =
    ["/usr/share/qemu/firmware", "/usr/local/share/qemu/firmware", "/etc/qemu/firmware"];

/// Code and variable store where there is no descriptor: Debian, Ubuntu; Fedora; Arch; openSUSE.
const PLACES: [(&str, &str); 5] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
];

/// The UEFI firmware of this host.
///
/// # Errors
/// A host fault with the command that installs it.
pub fn require() -> Result<Ovmf> {
    find().ok_or_else(|| check().fault().into())
}

/// What is there of it.
pub fn check() -> Check {
    let check = Check::new("OVMF", Part::Machines, "is the firmware of UEFI machines").package("ovmf");
    match find() {
        Some(ovmf) => check.path(&ovmf.code.path).ok("present"),
        None => check.bad(State::Missing, "not found", install_fix("ovmf")),
    }
}

fn find() -> Option<Ovmf> {
    described(&DESCRIPTORS.map(Path::new)).or_else(|| {
        let flash = |path: &str| Flash { path: path.into(), format: Format::Raw };
        let pairs = PLACES.iter().map(|(code, vars)| Ovmf { code: flash(code), vars: flash(vars) });
        pairs.into_iter().find(Ovmf::exists)
    })
}

impl Ovmf {
    fn exists(&self) -> bool {
        self.code.path.is_file() && self.vars.path.is_file()
    }
}

/// The first fitting descriptor by file name, which is how a distribution orders them.
fn described(dirs: &[&Path]) -> Option<Ovmf> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "json") {
                files.insert(entry.file_name(), entry.path());
            }
        }
    }
    let texts = files.values().filter_map(|path| std::fs::read_to_string(path).ok());
    texts.filter_map(|text| fitting(&text)).find(Ovmf::exists)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    interface_types: Vec<String>,
    mapping: Mapping,
    targets: Vec<Target>,
    features: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mapping {
    device: String,
    /// `split` (the default), `combined` or `stateless`.
    mode: Option<String>,
    executable: Flash,
    nvram_template: Flash,
}

#[derive(Deserialize)]
struct Target {
    architecture: String,
    machines: Vec<String>,
}

/// The files of a descriptor for a plain UEFI on q35: split flash, and no Secure Boot, which would
/// refuse kernels and boot loaders that are not signed.
fn fitting(text: &str) -> Option<Ovmf> {
    let descriptor: Descriptor = serde_json::from_str(text).ok()?;
    let Descriptor { interface_types, mapping, targets, features } = descriptor;
    let q35 = |target: &Target| {
        target.architecture == "x86_64" && target.machines.iter().any(|machine| machine.starts_with("pc-q35"))
    };
    let unwanted = ["secure-boot", "requires-smm", "enrolled-keys", "amd-sev-snp", "intel-tdx"];
    let fits = interface_types.iter().any(|kind| kind == "uefi")
        && mapping.device == "flash"
        && mapping.mode.as_deref().is_none_or(|mode| mode == "split")
        && targets.iter().any(q35)
        && !features.iter().any(|feature| unwanted.contains(&feature.as_str()));
    fits.then_some(Ovmf { code: mapping.executable, vars: mapping.nvram_template })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn descriptor(dir: &Path, features: &str) -> String {
        let dir = dir.display();
        format!(
            r#"{{"description": "UEFI", "interface-types": ["uefi"],
            "mapping": {{"device": "flash",
                "executable": {{"filename": "{dir}/code.fd", "format": "raw"}},
                "nvram-template": {{"filename": "{dir}/vars.fd", "format": "qcow2"}}}},
            "targets": [{{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}}],
            "features": [{features}], "tags": []}}"#
        )
    }

    fn firmware(dir: &Path) {
        for name in ["code.fd", "vars.fd"] {
            std::fs::write(dir.join(name), name).expect("writes");
        }
    }

    #[test]
    fn the_first_plain_descriptor_whose_files_exist_is_taken() {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = temp.path();
        firmware(dir);
        let write = |name: &str, text: String| std::fs::write(dir.join(name), text).expect("writes");
        write("40-secure.json", descriptor(dir, r#""secure-boot", "requires-smm""#));
        write("50-gone.json", descriptor(Path::new("/nowhere"), ""));
        write("55-odd.json", "{".into());
        assert_eq!(described(&[dir]), None);
        write("60-plain.json", descriptor(dir, r#""acpi-s3", "verbose-dynamic""#));
        let ovmf = described(&[dir]).expect("is found");
        assert_eq!(ovmf.code, Flash { path: dir.join("code.fd"), format: Format::Raw });
        assert_eq!(ovmf.vars, Flash { path: dir.join("vars.fd"), format: Format::Qcow2 });
    }

    #[test]
    fn a_namesake_in_a_later_directory_replaces() {
        let (low, high) = (tempfile::tempdir().expect("temp dir"), tempfile::tempdir().expect("temp dir"));
        firmware(low.path());
        std::fs::write(low.path().join("60.json"), descriptor(low.path(), "")).expect("writes");
        assert!(described(&[low.path(), high.path()]).is_some());
        std::fs::write(high.path().join("60.json"), "").expect("masks");
        assert_eq!(described(&[low.path(), high.path()]), None);
    }

    #[test]
    fn descriptors_of_other_kinds_do_not_fit() {
        let good = descriptor(Path::new("/x"), "");
        assert!(fitting(&good).is_some());
        for (from, to) in [
            (r#"["uefi"]"#, r#"["bios"]"#),
            (r#""flash""#, r#""memory""#),
            ("x86_64", "aarch64"),
            ("pc-q35-*", "microvm"),
            (r#""device": "flash","#, r#""device": "flash", "mode": "stateless","#),
        ] {
            assert!(good.contains(from), "{from}");
            assert_eq!(fitting(&good.replace(from, to)), None, "{to}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*") {
            let _ = fitting(&text);
        }
    }
}
