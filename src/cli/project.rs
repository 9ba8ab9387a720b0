//! The project that the current directory is in.

use anyhow::{Context, Result};
use shakedown::harness::Settings;
use shakedown::record::Environment;
use std::path::PathBuf;

/// What the project and the environment say. Outside of a project all settings are the defaults.
pub(crate) struct Project {
    pub(crate) environment: Environment,
    pub(crate) settings: Settings,
}

impl Project {
    pub(crate) fn here() -> Result<Self> {
        let here = std::env::current_dir().context("cannot tell the current directory")?;
        let (directory, settings) = match find()? {
            Some(directory) => {
                let manifest = directory.join("Cargo.toml");
                let text = std::fs::read_to_string(&manifest)
                    .with_context(|| format!("cannot read {}", manifest.display()))?;
                (directory, Settings::parse(&text)?)
            }
            None => (here, Settings::default()),
        };
        Ok(Self { environment: Environment::read(&directory)?, settings })
    }
}

/// Its directory: the nearest one upwards with a `Cargo.toml`.
fn find() -> Result<Option<PathBuf>> {
    let here = std::env::current_dir().context("cannot tell the current directory")?;
    Ok(here.ancestors().find(|dir| dir.join("Cargo.toml").is_file()).map(Into::into))
}
