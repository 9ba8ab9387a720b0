//! The project's settings: `[package.metadata.shakedown]` in its `Cargo.toml`.
//!
//! ```toml
//! [package.metadata.shakedown]
//! image = "debian"                   # the default image
//! ignore = ["hardware", "nightly"]   # markers whose scenarios run only when asked for
//!
//! [package.metadata.shakedown.markers]
//! lab_a = "needs the rack in lab A"  # the project's own markers
//!
//! [package.metadata.shakedown.images.debian]
//! recipe = "debian"                  # read by the image module
//!
//! [package.metadata.shakedown.tools]
//! iperf3 = "iperf3"                  # a program or /a/file that the tests need here, and its package
//! ```
//!
//! Owns which keys there are. What an image's table means is the image module's business.

use super::marker::Known;
use crate::host::apt::is_package_name;
use crate::nearest;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use toml::{Table, Value};

const KEYS: [&str; 5] = ["image", "ignore", "markers", "images", "tools"];

/// What is wrong is in the chain below it.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the settings in [package.metadata.shakedown] of Cargo.toml are wrong")]
pub struct WrongSettings;

/// The settings of a project, checked.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The image of scenarios that name none.
    pub image: Option<String>,
    /// Markers whose scenarios are ignored unless they are asked for.
    pub ignore: Vec<String>,
    /// The project's images by name, each as its table says it.
    pub images: BTreeMap<String, Table>,
    /// What the tests need of the host, by name or absolute path, each with its Debian package.
    /// `shakedown doctor` looks for it.
    pub tools: BTreeMap<String, String>,
    pub(crate) markers: Known,
}

impl Settings {
    /// Reads the text of a `Cargo.toml`. One without our section has the default settings.
    ///
    /// # Errors
    /// [`WrongSettings`] on a cause that names the key, and the nearest right one for a typo.
    pub fn parse(manifest: &str) -> Result<Self> {
        Self::read(manifest).context(WrongSettings)
    }

    /// Whether an image of the project is built by the recipe of this name.
    pub fn has_recipe(&self, recipe: &str) -> bool {
        self.images.values().any(|image| image.get("recipe").and_then(Value::as_str) == Some(recipe))
    }

    fn read(manifest: &str) -> Result<Self> {
        let manifest: Table = manifest.parse().context("Cargo.toml is not TOML")?;
        let section = ["package", "metadata", "shakedown"]
            .iter()
            .try_fold(&manifest, |table, key| table.get(*key).and_then(Value::as_table));
        let empty = Table::new();
        let section = section.unwrap_or(&empty);
        if let Some(key) = section.keys().find(|key| !KEYS.contains(&key.as_str())) {
            bail!("unknown key `{key}`{}", nearest::hint(key, KEYS));
        }
        let own = strings(table(section, "markers")?, "markers")?;
        let markers = Known::with(own)?;
        let ignore = match section.get("ignore") {
            None => Vec::new(),
            Some(value) => list(value).context("`ignore` must be a list of markers in quotes")?,
        };
        if let Some(marker) = ignore.iter().find(|marker| !markers.has(marker)) {
            bail!("`ignore` names the unknown marker `{marker}`{}", markers.hint(marker));
        }
        let images = tables(table(section, "images")?, "images")?;
        let image = match section.get("image") {
            None => None,
            Some(Value::String(name)) => Some(name.clone()),
            Some(_) => bail!("`image` must be an image's name in quotes"),
        };
        let tools = strings(table(section, "tools")?, "tools")?;
        for (name, package) in &tools {
            if name.is_empty() || (name.contains('/') && !name.starts_with('/')) {
                bail!("`tools` has {name:?}, which is neither a program's name nor an absolute path");
            }
            if !is_package_name(package) {
                bail!("`tools.{name}` has {package:?}, which is no package's name");
            }
        }
        Ok(Self { image, ignore, images, tools: tools.into_iter().collect(), markers })
    }
}

fn table<'a>(section: &'a Table, key: &str) -> Result<Option<&'a Table>> {
    match section.get(key) {
        None => Ok(None),
        Some(Value::Table(table)) => Ok(Some(table)),
        Some(_) => bail!("`{key}` must be a table: [package.metadata.shakedown.{key}]"),
    }
}

fn list(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

fn strings(table: Option<&Table>, of: &str) -> Result<Vec<(String, String)>> {
    let entry = |(key, value): (&String, &Value)| match value {
        Value::String(text) => Ok((key.clone(), text.clone())),
        _ => bail!("`{of}.{key}` must be text in quotes"),
    };
    table.into_iter().flatten().map(entry).collect()
}

fn tables(table: Option<&Table>, of: &str) -> Result<BTreeMap<String, Table>> {
    let entry = |(key, value): (&String, &Value)| match value {
        Value::Table(table) => Ok((key.clone(), table.clone())),
        _ => bail!("`{of}.{key}` must be a table: [package.metadata.shakedown.{of}.{key}]"),
    };
    table.into_iter().flatten().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(section: &str) -> Result<Settings> {
        Settings::parse(&format!("[package]\nname = 'x'\n[package.metadata.shakedown]\n{section}"))
    }

    #[test]
    fn a_whole_section_is_read() {
        let settings = parse(
            "image = 'mine'\nignore = ['nightly', 'lab']\nmarkers = { lab = 'our lab' }\nimages.mine.recipe = 'debian'\ntools.sshd = 'openssh-server'",
        )
        .expect("reads");
        assert_eq!(settings.image.as_deref(), Some("mine"));
        assert_eq!(settings.ignore, ["nightly", "lab"]);
        assert!(settings.markers.has("lab") && settings.markers.has("vm"));
        assert_eq!(settings.images["mine"]["recipe"].as_str(), Some("debian"));
        assert_eq!(settings.tools["sshd"], "openssh-server");
        assert!(settings.has_recipe("debian") && !settings.has_recipe("nix"));
    }

    #[test]
    fn no_section_is_fine() {
        assert!(Settings::parse("[workspace]").expect("reads").ignore.is_empty());
    }

    #[test]
    fn mistakes_name_the_key_and_the_right_one() {
        for (section, message) in [
            ("ignored = []", "unknown key `ignored`; did you mean `ignore`?"),
            ("ignore = 'slow'", "list of markers"),
            ("ignore = ['slo']", "unknown marker `slo`; did you mean `slow`?"),
            ("markers = ['lab']", "`markers` must be a table"),
            ("markers.lab = 1", "`markers.lab` must be text"),
            ("tools = ['sshd']", "`tools` must be a table"),
            ("tools.'bin/x' = 'x'", "neither a program's name nor an absolute path"),
            ("tools.x = '--reinstall'", "`tools.x` has \"--reinstall\", which is no package's name"),
            ("markers.unix = 'x'", "`unix` cannot be a marker"),
            ("images.mine = 'x.qcow2'", "`images.mine` must be a table"),
            ("image = 1", "`image` must be"),
        ] {
            let text = format!("{:#}", parse(section).expect_err(section));
            assert!(text.contains(message), "{section}: {text}");
        }
    }
}
