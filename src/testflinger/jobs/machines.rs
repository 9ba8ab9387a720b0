//! The machines file: one Canonical ID a line.

use std::collections::BTreeMap;
use std::fmt;

/// All that is wrong with a machines file, each with its line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct WrongMachines(Vec<(usize, String)>);

impl fmt::Display for WrongMachines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(|(line, what)| format!("line {line}: {what}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// True for what can be the name of a machine: it becomes the name of a directory and of a queue.
pub fn is_machine(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=64).contains(&text.len())
        && text.bytes().all(plain)
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
}

/// The machines in order. Spaces around a name, empty lines and comments from `#` on do not count.
///
/// # Errors
/// Names that are none, names that were there before, and a file without any.
pub fn parse(text: &str) -> Result<Vec<String>, WrongMachines> {
    let mut machines = Vec::new();
    let mut lines = BTreeMap::new();
    let mut wrong = Vec::new();
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let number = index + 1;
        let name = line.split('#').next().unwrap_or_default().trim();
        if name.is_empty() {
            continue;
        }
        if !is_machine(name) {
            let shown = crate::fault::visible(name);
            wrong.push((
                number,
                format!(
                    "{shown:?} is no machine: letters, digits, `-`, `_` and `.`, 64 at most, no `.` first"
                ),
            ));
        } else if let Some(first) = lines.get(name) {
            wrong.push((number, format!("{name} again, as in line {first}")));
        } else {
            lines.insert(name.to_owned(), number);
            machines.push(name.to_owned());
        }
    }
    if machines.is_empty() && wrong.is_empty() {
        wrong.push((1, "there is no machine in the file".into()));
    }
    if wrong.is_empty() { Ok(machines) } else { Err(WrongMachines(wrong)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_trimmed_and_comments_dropped() {
        let text = "\u{feff}202101-28595\r\n\n  # a rack\n\t202012-28526 # the noisy one\nrpi4.b_1";
        let machines = parse(text).expect("parses");
        assert_eq!(machines, ["202101-28595", "202012-28526", "rpi4.b_1"]);
    }

    #[test]
    fn all_faults_are_named_by_line() {
        let error = parse("a\n../b\n\na\n.c\nd e\n-f\n").expect_err("wrong").to_string();
        let lines: Vec<_> = error.lines().map(|line| line.split(':').next().unwrap_or_default()).collect();
        assert_eq!(lines, ["line 2", "line 4", "line 5", "line 6", "line 7"]);
        assert!(error.contains("a again, as in line 1"), "{error}");
        assert!(parse(" \n# none\n").expect_err("empty").to_string().contains("no machine"));
        assert!(!parse("\u{1b}[2J").expect_err("no name").to_string().contains('\u{1b}'));
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_a_plain_name_and_there_once(text in "[a-c#. /\\-\n\r\t\u{e9}]{0,60}") {
            if let Ok(machines) = parse(&text) {
                for (index, machine) in machines.iter().enumerate() {
                    prop_assert!(is_machine(machine));
                    let path = std::path::Path::new(machine);
                    prop_assert_eq!(path.components().count(), 1);
                    prop_assert_eq!(path.file_name(), Some(machine.as_ref()));
                    prop_assert!(!machines[..index].contains(machine));
                }
            }
        }
    }
}
