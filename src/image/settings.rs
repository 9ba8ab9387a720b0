//! A project's images, as its `Cargo.toml` says them: `[package.metadata.shakedown.images.NAME]`.
//!
//! ```toml
//! [package.metadata.shakedown.images.mine]
//! recipe = "debian"
//! packages = ["nvme-cli"]   # besides those of every image
//! files = "image"           # a directory, laid over the root
//! cmdline = "quiet"         # more words for the kernel
//!
//! [package.metadata.shakedown.images.nixos]
//! recipe = "nix"
//! flake = "nix"             # the directory of a flake.nix
//! attribute = "bootImage"   # what of it builds an ISO
//! user = "nixos"            # what is known about it, as for a prebuilt image
//!
//! [package.metadata.shakedown.images.vendor]
//! file = "vendor.iso"       # a prebuilt image
//! user = "admin"            # what is known about it: here, or else in vendor.iso.toml
//! ```

use crate::fault::Fault;
use crate::nearest;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Source {
    /// Built here.
    Debian(Debian),
    /// Built by a flake.
    Nix(Nix),
    /// A file that is there, and what is said about it; nothing where that is in `FILE.toml`.
    File { file: PathBuf, description: Table },
}

/// Settings of the `debian` recipe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Debian {
    /// More packages, sorted.
    pub(super) packages: Vec<String>,
    /// A directory that is laid over the root.
    pub(super) files: Option<PathBuf>,
    /// More words for the kernel.
    pub(super) cmdline: String,
    /// Programs that Shakedown itself puts in: the path without its first slash, and the text.
    pub(super) programs: Vec<(&'static str, &'static str)>,
}

impl Debian {
    /// The built-in image `storage`: all that [`crate::storage`] makes layouts with, and the cleaner.
    pub(super) fn storage() -> Self {
        let packages = include_str!("../../fixtures/image/storage/packages").lines();
        let packages = packages.filter(|line| !line.starts_with('#'));
        let cleaner = include_str!("../../fixtures/image/storage/storage-cleanup");
        let mut own = Self {
            packages: packages.map(str::to_owned).collect(),
            programs: vec![("usr/local/sbin/storage-cleanup", cleaner)],
            // They hear of every block device that comes and goes, and have nobody to tell.
            cmdline: ["systemd-logind.service", "dbus.service", "dbus.socket"]
                .map(|unit| format!("systemd.mask={unit}"))
                .join(" "),
            ..Self::default()
        };
        own.packages.sort();
        own
    }
}

/// Settings of the `nix` recipe.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Nix {
    /// Where its `flake.nix` is.
    pub(super) directory: PathBuf,
    /// Taken as it is, whatever git has of it: nix's `path:`.
    untracked: bool,
    /// What of the flake is built.
    attribute: String,
    /// What is said about the image.
    pub(super) description: Table,
}

impl Nix {
    /// As nix's command line has it.
    pub(super) fn installable(&self) -> String {
        let scheme = if self.untracked { PATH_SCHEME } else { "" };
        format!("{scheme}{}#{}", self.directory.display(), self.attribute)
    }

    fn parse(table: &Table, base: &Path) -> Result<Self> {
        let flake = table.get("flake").map_or(Ok("nix"), |flake| text(flake, "flake"))?;
        let path = flake.strip_prefix(PATH_SCHEME).unwrap_or(flake);
        let directory: PathBuf = base.join(path).components().collect();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.+@".contains(c);
        if let Some(odd) = directory.to_string_lossy().chars().find(|c| !plain(*c)) {
            bail!(
                "`flake` is in {}, and a flake's path cannot have the character {odd:?}",
                directory.display()
            );
        }
        let attribute = table.get("attribute").map_or(Ok("bootImage"), |name| text(name, "attribute"))?;
        // Nix's identifiers: https://nix.dev/manual/nix/stable/language/identifiers
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_'".contains(c))
        };
        if !attribute.split('.').all(part) {
            bail!("`attribute` has {attribute:?}, which is no attribute of a flake");
        }
        let mut description = table.clone();
        for key in NIX_KEYS {
            description.remove(key);
        }
        super::prebuilt::check(table, &NIX_KEYS)?;
        Ok(Self { directory, untracked: path != flake, attribute: attribute.to_owned(), description })
    }
}

const PATH_SCHEME: &str = "path:";
const RECIPES: [&str; 2] = ["debian", "nix"];
const NIX_KEYS: [&str; 3] = ["recipe", "flake", "attribute"];
const DEBIAN_KEYS: [&str; 4] = ["recipe", "packages", "files", "cmdline"];

impl Source {
    /// Reads the table of image `name`; paths in it are relative to `base`.
    ///
    /// # Errors
    /// A host [`Fault`] that names the image and the key, with the nearest right one for a typo.
    pub(super) fn read(name: &str, table: &Table, base: &Path) -> Result<Self> {
        Self::parse(table, base).with_context(|| {
            Fault::host(format!("[package.metadata.shakedown.images.{name}] of Cargo.toml is wrong"))
        })
    }

    fn parse(table: &Table, base: &Path) -> Result<Self> {
        if let Some(file) = table.get("file") {
            let file = base.join(text(file, "file")?);
            let mut description = table.clone();
            description.remove("file");
            super::prebuilt::check(table, &["file"])?;
            return Ok(Self::File { file, description });
        }
        let recipe = match table.get("recipe") {
            Some(recipe) => text(recipe, "recipe")?,
            None => {
                known_keys(table, &[&DEBIAN_KEYS[..], &["file"]].concat())?;
                bail!("it needs `recipe = \"debian\"`, `recipe = \"nix\"` or `file = \"PATH\"`")
            }
        };
        if !RECIPES.contains(&recipe) {
            bail!("unknown recipe `{recipe}`{}", nearest::hint(recipe, RECIPES));
        }
        if recipe == "nix" {
            return Nix::parse(table, base).map(Self::Nix);
        }
        known_keys(table, &DEBIAN_KEYS)?;
        let mut packages = match table.get("packages") {
            None => Vec::new(),
            Some(Value::Array(list)) => list.iter().map(package).collect::<Result<Vec<_>>>()?,
            Some(_) => bail!("`packages` must be a list of package names in quotes"),
        };
        packages.sort();
        packages.dedup();
        let files =
            table.get("files").map(|files| text(files, "files")).transpose()?.map(|dir| base.join(dir));
        let cmdline =
            table.get("cmdline").map(|words| text(words, "cmdline")).transpose()?.unwrap_or_default();
        // It becomes a line of GRUB's script.
        if let Some(odd) =
            cmdline.chars().find(|c| !(c.is_ascii_alphanumeric() || " -_.,:=/@%+".contains(*c)))
        {
            bail!("`cmdline` cannot have the character {odd:?}");
        }
        Ok(Self::Debian(Debian {
            packages,
            files,
            cmdline: cmdline.split_whitespace().collect::<Vec<_>>().join(" "),
            programs: Vec::new(),
        }))
    }
}

/// A name, an architecture or a version perhaps, but nothing that apt would take for an option.
fn package(value: &Value) -> Result<String> {
    let name = text(value, "packages")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-.:=~".contains(c);
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name.chars().all(plain)
        || name.ends_with(['-', '+'])
    {
        bail!("`packages` has {name:?}, which is no package's name");
    }
    Ok(name.to_owned())
}

/// Refuses keys that nobody reads.
pub(super) fn known_keys(table: &Table, known: &[&str]) -> Result<()> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => bail!("unknown key `{key}`{}", nearest::hint(key, known.iter().copied())),
    }
}

pub(super) fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value.as_str().with_context(|| format!("`{key}` must be text in quotes, not {}", value.type_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(settings: &str) -> Result<Source> {
        Source::read("mine", &settings.parse().expect("TOML"), Path::new("/project"))
    }

    fn error(settings: &str) -> String {
        format!("{:#}", parse(settings).expect_err("is refused"))
    }

    #[test]
    fn a_recipe_s_settings_are_put_in_order() {
        let source =
            parse("recipe='debian'\npackages=['zsh','nvme-cli','zsh']\nfiles='image'\ncmdline=' a=1   b '");
        let expected = Debian {
            packages: vec!["nvme-cli".into(), "zsh".into()],
            files: Some("/project/image".into()),
            cmdline: "a=1 b".into(),
            programs: Vec::new(),
        };
        assert_eq!(source.expect("is right"), Source::Debian(expected));
    }

    #[test]
    fn a_file_is_found_from_the_project() {
        let file = |file: &str| Source::File { file: file.into(), description: Table::new() };
        assert_eq!(parse("file='a.iso'").expect("is right"), file("/project/a.iso"));
        assert_eq!(parse("file='/b.iso'").expect("is right"), file("/b.iso"));
    }

    #[test]
    fn a_flake_is_found_from_the_project() {
        let nix = |settings: &str| match parse(settings).expect("is right") {
            Source::Nix(nix) => nix,
            other => panic!("{other:?}"),
        };
        assert_eq!(nix("recipe='nix'").installable(), "/project/nix#bootImage");
        let own =
            nix("recipe='nix'\nflake='path:./a/../b'\nattribute='packages.x86_64-linux.iso'\nuser='nixos'");
        assert_eq!(own.installable(), "path:/project/a/../b#packages.x86_64-linux.iso");
        assert_eq!(own.description, "user='nixos'".parse().expect("TOML"));
    }

    #[test]
    fn mistakes_name_the_image_the_key_and_the_right_one() {
        for (settings, words) in [
            ("recipe='debian'\npackage=[]", &["images.mine", "`package`", "did you mean `packages`?"][..]),
            ("recipe='debain'", &["unknown recipe `debain`", "did you mean `debian`?"]),
            ("recipie='debian'", &["did you mean `recipe`?"]),
            ("packages=[]", &["`recipe = \"debian\"`"]),
            ("file='x'\nrecipe='debian'", &["unknown key `recipe`"]),
            ("file='x'\nusr='root'", &["did you mean `user`?"]),
            ("recipe='debian'\npackages='x'", &["must be a list"]),
            ("recipe='debian'\npackages=['--option']", &["no package's name"]),
            ("recipe='debian'\npackages=['perl-']", &["no package's name"]),
            ("recipe='debian'\ncmdline='a;b'", &["';'"]),
            ("recipe='nix'\nflke='x'", &["`flke`", "did you mean `flake`?", "`user`"]),
            ("recipe='nix'\nflake='a b'", &["/project/a b", "' '"]),
            ("recipe='nix'\nattribute='a#b'", &["`attribute`", "no attribute"]),
            ("recipe='nix'\nattribute='--impure'", &["no attribute"]),
            ("recipe='nix'\nattribute='a..b'", &["no attribute"]),
            ("recipe=1", &["must be text in quotes"]),
        ] {
            let text = error(settings);
            assert!(words.iter().all(|word| text.contains(word)), "{settings}: {text}");
        }
    }
}
