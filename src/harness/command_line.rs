//! The command line of a test binary: libtest's, `-m` and `--deferred`.
//!
//! Ours are taken out before libtest-mimic reads the rest. Nextest passes no options of its own to
//! test binaries, so the environment variable does the same as `-m`.

use super::marker::{Known, Selection};
use anyhow::{Result, bail};
use libtest_mimic::Arguments;
use std::ffi::OsString;

/// What `-m` does, for where there is no command line.
pub(crate) const MARKERS_VARIABLE: &str = "SHAKEDOWN_MARKERS";

/// The arguments without ours, and the value of `-m`.
#[derive(Debug, Default, PartialEq)]
struct Split {
    rest: Vec<OsString>,
    markers: Option<String>,
    deferred: bool,
    help: bool,
}

/// What the command line says.
#[derive(Debug)]
pub(crate) struct CommandLine {
    pub(crate) arguments: Arguments,
    pub(crate) selection: Option<Selection>,
    /// Only what earlier runs put off.
    pub(crate) deferred: bool,
}

fn split(arguments: impl IntoIterator<Item = OsString>) -> Result<Split> {
    let mut split = Split::default();
    let mut arguments = arguments.into_iter();
    split.rest.extend(arguments.next()); // the program
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        let value = match text.as_str() {
            "--" => {
                split.rest.push(argument);
                split.rest.extend(arguments);
                break;
            }
            "--deferred" => {
                split.deferred = true;
                continue;
            }
            "-m" | "--markers" => match arguments.next() {
                Some(value) => value.to_string_lossy().into_owned(),
                None => bail!("{text} needs a marker expression, as in: {text} 'all(vm, not(slow))'"),
            },
            _ => match text.strip_prefix("--markers=").or_else(|| text.strip_prefix("-m")) {
                Some(value) => value.trim_start_matches('=').to_owned(),
                None => {
                    split.help |= matches!(text.as_str(), "-h" | "--help");
                    split.rest.push(argument);
                    continue;
                }
            },
        };
        if let Some(first) = split.markers.replace(value) {
            bail!("-m is given twice; join the expressions: -m 'all({first}, ...)'");
        }
    }
    Ok(split)
}

/// Reads the command line. Prints help or libtest-mimic's own complaints and exits where it must.
///
/// # Errors
/// When the marker expression is wrong, or options contradict each other.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>, known: &Known) -> Result<CommandLine> {
    let split = split(arguments)?;
    if split.help {
        print!("{}", help(known));
    }
    let selection = match split.markers {
        Some(text) => Some(Selection::parse(&text, format!("-m '{text}'"), known)?),
        None => match std::env::var(MARKERS_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => {
                Some(Selection::parse(&text, format!("{MARKERS_VARIABLE}='{text}'"), known)?)
            }
            _ => None,
        },
    };
    let arguments = Arguments::from_iter(split.rest);
    if split.deferred && arguments.ignored {
        bail!("--deferred and --ignored exclude each other: what is deferred was asked for");
    }
    Ok(CommandLine { arguments, selection, deferred: split.deferred })
}

fn help(known: &Known) -> String {
    format!(
        "Besides all that `cargo test` knows, scenarios can be selected by:\n\n\
         \x20 -m, --markers <EXPRESSION>  `slow`, `all(vm, not(slow))`, `any(slow, nightly)`.\n\
         \x20                             Scenarios with a marker that it names run even where the\n\
         \x20                             settings ignore that marker. {MARKERS_VARIABLE} does\n\
         \x20                             the same; -m wins.\n\
         \x20     --deferred              Only those that earlier runs put off because of\n\
         \x20                             SHAKEDOWN_SESSION_BUDGET, the oldest first.\n\n\
         Markers:\n{}\n",
        known.describe()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(arguments: &[&str]) -> Result<Split> {
        split(["test"].iter().chain(arguments).map(OsString::from))
    }

    #[test]
    fn markers_are_taken_out_in_every_spelling() {
        for arguments in [&["-m", "vm"][..], &["-mvm"], &["-m=vm"], &["--markers", "vm"], &["--markers=vm"]] {
            let arguments = [&["--list"], arguments, &["name"]].concat();
            let split = of(&arguments).expect("splits");
            assert_eq!(split.markers.as_deref(), Some("vm"), "{arguments:?}");
            assert_eq!(split.rest, ["test", "--list", "name"], "{arguments:?}");
        }
    }

    #[test]
    fn what_was_deferred_is_asked_for_by_a_flag() {
        let split = of(&["--deferred", "name"]).expect("splits");
        assert!(split.deferred);
        assert_eq!(split.rest, ["test", "name"]);
        assert!(!of(&["--", "--deferred"]).expect("splits").deferred);
        let known = Known::default();
        let parse = |arguments: &[&str]| parse(["test"].iter().chain(arguments).map(OsString::from), &known);
        let error = parse(&["--deferred", "--ignored"]).expect_err("contradicts").to_string();
        assert!(error.contains("exclude each other"), "{error}");
        assert!(parse(&["--deferred", "--include-ignored"]).expect("is fine").deferred);
    }

    #[test]
    fn nothing_behind_the_double_dash_is_ours() {
        assert_eq!(of(&["--", "-m"]).expect("splits").rest, ["test", "--", "-m"]);
    }

    #[test]
    fn half_and_double_options_are_refused() {
        assert!(of(&["-m"]).expect_err("half").to_string().contains("needs a marker expression"));
        assert!(of(&["-m", "vm", "-mslow"]).expect_err("double").to_string().contains("given twice"));
    }
}
