//! The README says what the code does: what can be checked of it, is.

use assert_cmd::Command;
use shakedown::harness::BUILT_IN_MARKERS;
use shakedown::record::environment::VARIABLES;
use std::collections::BTreeSet;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows of a table: what stands between this heading and the next blank line after them.
fn rows<'a>(text: &'a str, header: &str) -> Vec<&'a str> {
    let table = text.split_once(header).unwrap_or_else(|| panic!("no table {header}")).1;
    table.lines().skip(2).take_while(|line| line.starts_with('|')).collect()
}

#[test]
fn its_commands_are_there_each_by_itself() {
    let readme = read("README.md");
    for command in ["demo", "doctor --install && cargo test"] {
        assert!(readme.contains(&format!("\n\n    cargo run --release -- {command}\n\n")), "{command}");
    }
}

#[test]
fn its_environment_variables_are_those_there_are() {
    let expected = VARIABLES.map(|v| format!("| `{}` | {} | {} |", v.name, v.default, v.meaning));
    assert_eq!(rows(&read("README.md"), "| variable | default | meaning |"), expected);
}

#[test]
fn its_markers_are_the_built_in_ones() {
    let expected = BUILT_IN_MARKERS.map(|(name, meaning)| format!("| `{name}` | {meaning} |"));
    assert_eq!(rows(&read("README.md"), "| marker | meaning |"), expected);
}

#[test]
fn its_keys_of_a_scenario_are_those_of_the_attribute() {
    let macros = read("macros/src/lib.rs").replace("\n/// ", "\n");
    let header = "| key | value | default |";
    assert_eq!(rows(&read("README.md"), header), rows(&macros, header));
}

#[test]
fn its_scenario_is_the_one_that_is_tested() {
    let code = read("fixtures/outside/tests/scenarios.rs");
    assert!(
        read("README.md").contains(&format!("```rust\n{code}```\n")),
        "copy fixtures/outside/tests/scenarios.rs"
    );
}

#[test]
fn its_subcommands_are_those_of_the_program() {
    let readme = read("README.md");
    let named: BTreeSet<_> = rows(&readme, "| command | does |")
        .into_iter()
        .filter_map(|row| row.strip_prefix("| `shakedown ")?.split([' ', '`']).next())
        .collect();
    let help = Command::new(env!("CARGO_BIN_EXE_shakedown")).arg("-h").output().expect("it runs");
    let help = String::from_utf8(help.stdout).expect("UTF-8");
    let commands = help.split_once("Commands:\n").expect("a list of commands").1;
    let there: BTreeSet<_> = commands
        .lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert_eq!(named, there);
}
