//! The environment variables: which there are, what they mean, and that a typo in one is an error.
//!
//! Owns the one table of all of them and the values of `BOOT_IMAGE_VM_*`. The values of
//! `SHAKEDOWN_*` belong to the modules they steer; here they are only known by name.

use crate::fault::Fault;
use crate::host::setting::Invalid;
use anyhow::Result;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One variable, as `--help` and the README show it.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it holds when it is unset or empty.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

const SPAWN_TIMEOUT: Variable = Variable {
    name: "BOOT_IMAGE_VM_SPAWN_TIMEOUT",
    default: "900",
    meaning: "seconds from the start of QEMU to the first byte on its console",
};
const LOGIN_TIMEOUT: Variable = Variable {
    name: "BOOT_IMAGE_VM_LOGIN_TIMEOUT",
    default: "300",
    meaning: "seconds from the first byte on the console to the first command over SSH",
};
const LEDGER_PATH: Variable = Variable {
    name: "BOOT_IMAGE_VM_LEDGER_PATH",
    default: "notes/vm-run-ledger.jsonl",
    meaning: "the ledger; a relative path starts at the project's directory (that of its Cargo.toml)",
};
const DISABLE_LEDGER: Variable = Variable {
    name: "BOOT_IMAGE_VM_DISABLE_LEDGER",
    default: "0",
    meaning: "1, true or yes: write no ledger; 0, false or no: write it",
};
const LOG_ROOT: Variable = Variable {
    name: "BOOT_IMAGE_VM_LOG_ROOT",
    default: "notes/",
    meaning: "where run directories are made; a relative path starts at the project's directory",
};

const DEBUG: Variable = Variable {
    name: "SHAKEDOWN_DEBUG",
    default: "0",
    meaning: "1, true or yes: stop at the first failure, with the machine alive; needs a terminal",
};

const SESSION_BUDGET: Variable = Variable {
    name: "SHAKEDOWN_SESSION_BUDGET",
    default: "3000",
    meaning: "seconds that a run may take; scenarios that by the ledger's medians would end later are deferred",
};

/// All variables there are. Any other name that starts with one of [`PREFIXES`] is an error.
pub const VARIABLES: [Variable; 14] = [
    SPAWN_TIMEOUT,
    LOGIN_TIMEOUT,
    LEDGER_PATH,
    DISABLE_LEDGER,
    LOG_ROOT,
    DEBUG,
    Variable {
        name: "SHAKEDOWN_ACCEL",
        default: "probed",
        meaning: "accelerator, kvm or tcg, instead of what the probe finds usable",
    },
    Variable {
        name: "SHAKEDOWN_CACHE",
        default: "$XDG_CACHE_HOME/shakedown",
        meaning: "where images and templates are kept",
    },
    Variable {
        name: "SHAKEDOWN_IMAGE",
        default: "the project's default image",
        meaning: "a prebuilt image (ISO, raw, qcow2) to use instead of building one",
    },
    Variable {
        name: "SHAKEDOWN_MARKERS",
        default: "all but the markers that the project ignores",
        meaning: "which scenarios run, for example `all(vm, not(slow))`",
    },
    Variable {
        name: "SHAKEDOWN_PROJECT",
        default: "where the project was compiled, or else the current directory",
        meaning: "the project's directory, for a test binary that has travelled",
    },
    Variable {
        name: "SHAKEDOWN_SCENARIOS",
        default: "all",
        meaning: "a file with the names of the scenarios that there are, one a line; an unknown one is an error",
    },
    SESSION_BUDGET,
    Variable {
        name: "SHAKEDOWN_VMS",
        default: "the number of cores",
        meaning: "how many machines run at once, over all processes that share a cache",
    },
];

/// No setting: the mark by which an agent finds the processes of its jobs. These may be of ours, too.
pub const JOB_MARK: &str = "SHAKEDOWN_JOB";

/// What the names of our variables start with.
pub const PREFIXES: [&str; 2] = ["BOOT_IMAGE_VM_", "SHAKEDOWN_"];

/// The settings that the environment gives, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The project's root: the directory of its `Cargo.toml`.
    pub project: PathBuf,
    /// Bounds QEMU from its start to its first console output.
    pub spawn_timeout: Duration,
    /// Bounds the rest, up to the first command over SSH.
    pub login_timeout: Duration,
    /// Where run directories are made.
    pub log_root: PathBuf,
    /// The ledger; `None` when it is turned off.
    pub ledger: Option<PathBuf>,
    /// Stop at the first failure.
    pub debug: bool,
    /// What a run may take before the rest of it is deferred.
    pub session_budget: Duration,
    /// The variables in force, as they were given.
    pub overrides: BTreeMap<String, String>,
}

impl Environment {
    /// Reads this process's environment for the project in `project`, an absolute directory.
    ///
    /// # Errors
    /// [`Invalid`] for a variable that is none of ours, or has a value that it cannot have.
    pub fn read(project: &Path) -> Result<Self> {
        Self::from_vars(std::env::vars_os(), project)
    }

    /// As [`Environment::read`], from these variables. An empty value counts as unset.
    ///
    /// # Errors
    /// As [`Environment::read`].
    pub fn from_vars(vars: impl IntoIterator<Item = (OsString, OsString)>, project: &Path) -> Result<Self> {
        let overrides = ours(vars)?;
        if project.to_str().is_none() {
            return Err(Fault::host(format!("the project's path {} is not UTF-8", project.display()))
                .fix("move the project: its path is written into JSON files")
                .into());
        }
        let get = |variable: Variable| overrides.get(variable.name).map_or(variable.default, String::as_str);
        let disabled = switch(DISABLE_LEDGER, get(DISABLE_LEDGER))?;
        Ok(Self {
            spawn_timeout: seconds(SPAWN_TIMEOUT, get(SPAWN_TIMEOUT))?,
            login_timeout: seconds(LOGIN_TIMEOUT, get(LOGIN_TIMEOUT))?,
            log_root: project.join(get(LOG_ROOT)),
            ledger: (!disabled).then(|| project.join(get(LEDGER_PATH))),
            debug: switch(DEBUG, get(DEBUG))?,
            session_budget: seconds(SESSION_BUDGET, get(SESSION_BUDGET))?,
            project: project.to_owned(),
            overrides,
        })
    }
}

/// Refuses variables that look like ours and are not: for who reads no other setting.
///
/// # Errors
/// [`Invalid`], with the nearest name.
pub fn check_names() -> Result<(), Invalid> {
    ours(std::env::vars_os()).map(drop)
}

/// The table for `--help`: name, default and meaning of every variable.
pub fn help() -> String {
    VARIABLES
        .iter()
        .map(|v| format!("  {} [default: {}]\n      {}\n", v.name, v.default, v.meaning))
        .collect()
}

/// Our variables among `vars`, without the empty ones.
fn ours(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Result<BTreeMap<String, String>, Invalid> {
    let mut found = BTreeMap::new();
    for (name, value) in vars {
        let name = name.to_string_lossy();
        if name == JOB_MARK || !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let Some(variable) = VARIABLES.iter().find(|variable| variable.name == name) else {
            return Err(unknown(&name));
        };
        if !value.is_empty() {
            found.insert(name.into_owned(), text(*variable, value)?);
        }
    }
    Ok(found)
}

fn text(variable: Variable, value: OsString) -> Result<String, Invalid> {
    value.into_string().map_err(|value| wrong(variable, &value.to_string_lossy(), "UTF-8"))
}

fn unknown(name: &str) -> Invalid {
    let nearest = VARIABLES
        .iter()
        .map(|variable| variable.name)
        .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
        .unwrap_or_default();
    Invalid::Unknown { name: name.to_owned(), nearest }
}

fn seconds(variable: Variable, value: &str) -> Result<Duration, Invalid> {
    match value.parse::<u32>() {
        Ok(seconds @ 1..) => Ok(Duration::from_secs(seconds.into())),
        _ => Err(wrong(variable, value, "a whole number of seconds above zero")),
    }
}

fn switch(variable: Variable, value: &str) -> Result<bool, Invalid> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" => Ok(true),
        "0" | "false" | "no" => Ok(false),
        _ => Err(wrong(variable, value, "one of 1, true, yes, 0, false, no")),
    }
}

fn wrong(variable: Variable, value: &str, allowed: &str) -> Invalid {
    let wants = format!("{allowed} (default: {})", variable.default);
    Invalid::Value { name: variable.name, value: value.to_owned(), wants }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Environment> {
        let vars = vars.iter().map(|(name, value)| (name.into(), value.into()));
        Environment::from_vars(vars, Path::new("/project"))
    }

    fn error(name: &str, value: &str) -> String {
        format!("{:#}", read(&[(name, value)]).expect_err("refused"))
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let environment = read(&[("PATH", "/bin"), ("BOOT_IMAGE", "x")]).expect("reads");
        assert_eq!(environment.spawn_timeout, Duration::from_secs(900));
        assert_eq!(environment.login_timeout, Duration::from_secs(300));
        assert_eq!(environment.session_budget, Duration::from_secs(50 * 60));
        assert_eq!(environment.log_root, Path::new("/project/notes"));
        assert_eq!(environment.ledger.as_deref(), Some(Path::new("/project/notes/vm-run-ledger.jsonl")));
        assert!(environment.overrides.is_empty());
        assert_eq!(read(&[(JOB_MARK, "1/test")]).expect("a job may run us"), environment);
    }

    #[test]
    fn relative_paths_start_at_the_project() {
        let environment =
            read(&[("BOOT_IMAGE_VM_LEDGER_PATH", "l.jsonl"), ("BOOT_IMAGE_VM_LOG_ROOT", "/elsewhere")])
                .expect("reads");
        assert_eq!(environment.ledger.as_deref(), Some(Path::new("/project/l.jsonl")));
        assert_eq!(environment.log_root, Path::new("/elsewhere"));
        assert_eq!(environment.overrides["BOOT_IMAGE_VM_LOG_ROOT"], "/elsewhere");
    }

    #[test]
    fn the_ledger_is_turned_off_by_any_spelling_of_yes() {
        for (value, on) in
            [("1", false), ("True", false), ("YES", false), ("0", true), ("No", true), ("", true)]
        {
            let environment = read(&[("BOOT_IMAGE_VM_DISABLE_LEDGER", value)]).expect("reads");
            assert_eq!(environment.ledger.is_some(), on, "{value}");
        }
        let text = error("BOOT_IMAGE_VM_DISABLE_LEDGER", "on");
        assert!(text.contains("DISABLE_LEDGER=on") && text.contains("1, true, yes, 0, false, no"), "{text}");
    }

    #[test]
    fn timeouts_are_whole_seconds_above_zero() {
        for value in ["0", "-1", "1.5", "5m", " 5", "99999999999"] {
            let text = error("BOOT_IMAGE_VM_LOGIN_TIMEOUT", value);
            assert!(
                text.contains(&format!("LOGIN_TIMEOUT={value} is not usable")) && text.contains("above zero"),
                "{text}"
            );
        }
        let environment = read(&[("BOOT_IMAGE_VM_SPAWN_TIMEOUT", "5")]).expect("reads");
        assert_eq!(environment.spawn_timeout, Duration::from_secs(5));
    }

    #[test]
    fn a_typo_is_an_error_with_the_nearest_name() {
        for (typo, meant) in [
            ("BOOT_IMAGE_VM_SPAWN_TIMEUOT", "BOOT_IMAGE_VM_SPAWN_TIMEOUT"),
            ("BOOT_IMAGE_VM_LEDGER", "BOOT_IMAGE_VM_LEDGER_PATH"),
            ("SHAKEDOWN_ACCELERATOR", "SHAKEDOWN_ACCEL"),
            ("SHAKEDOWN_VM", "SHAKEDOWN_VMS"),
        ] {
            let text = error(typo, "");
            assert!(text.contains(typo) && text.contains(&format!("did you mean {meant}?")), "{text}");
        }
    }

    #[test]
    fn help_shows_every_variable() {
        let help = help();
        for variable in VARIABLES {
            assert!(help.contains(variable.name) && help.contains(variable.meaning));
        }
    }
}
