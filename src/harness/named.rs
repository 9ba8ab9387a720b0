//! Scenarios by their whole names, from a file: any number of them, where libtest's command line takes
//! one filter.

use super::scenario::Scenario;
use crate::fault::Fault;
use crate::nearest;
use anyhow::{Context, Result, bail};
use std::collections::HashSet;
use std::path::Path;

const VARIABLE: &str = "SHAKEDOWN_SCENARIOS";

/// Those of `all` that the file names, or all where there is no file.
pub(super) fn only(all: Vec<&'static Scenario>) -> Result<Vec<&'static Scenario>> {
    let Some(file) = std::env::var_os(VARIABLE).filter(|file| !file.is_empty()) else { return Ok(all) };
    let file = Path::new(&file);
    let text = std::fs::read_to_string(file)
        .with_context(|| Fault::host(format!("cannot read {VARIABLE}={}", file.display())))?;
    pick(all, &text).with_context(|| format!("{VARIABLE}={}", file.display()))
}

fn pick(mut all: Vec<&'static Scenario>, text: &str) -> Result<Vec<&'static Scenario>> {
    let mut names = HashSet::new();
    for (number, line) in text.lines().enumerate() {
        let (name, number) = (line.trim(), number + 1);
        if name.is_empty() {
            continue;
        }
        if !all.iter().any(|scenario| scenario.name == name) {
            let guess = nearest::guess(name, all.iter().map(|scenario| scenario.name));
            let guess = guess.map(|guess| format!("; did you mean `{guess}`?")).unwrap_or_default();
            bail!("line {number}: no scenario `{name}`{guess}");
        }
        if !names.insert(name) {
            bail!("line {number}: `{name}` stands there twice");
        }
    }
    // Everything would run, or nothing: neither is what an empty list means to everybody.
    if names.is_empty() {
        bail!("no scenario stands there");
    }
    all.retain(|scenario| names.contains(scenario.name));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::Body;

    fn all() -> Vec<&'static Scenario> {
        let scenario = |name| Scenario {
            name,
            markers: &[],
            machine: None,
            timeout: None,
            ignore: None,
            file: "",
            line: 1,
            body: Body::Plain(|| Ok(())),
        };
        ["boot::bios", "boot::uefi", "disks"].map(|name| &*Box::leak(Box::new(scenario(name)))).to_vec()
    }

    fn names(text: &str) -> Result<Vec<&'static str>> {
        Ok(pick(all(), text)?.iter().map(|scenario| scenario.name).collect())
    }

    #[test]
    fn those_that_are_named_remain_in_their_order() {
        assert_eq!(names("disks\n\n  boot::bios\n").expect("picks"), ["boot::bios", "disks"]);
    }

    #[test]
    fn a_typo_is_an_error_with_its_line_and_the_nearest_name() {
        let error = |text| names(text).expect_err("refused").to_string();
        let typo = error("disks\nboot::uefl");
        assert!(typo.contains("line 2") && typo.contains("did you mean `boot::uefi`?"), "{typo}");
        assert!(error("disks\ndisks").contains("line 2: `disks` stands there twice"));
        assert!(error("\n").contains("no scenario stands there"));
    }
}
