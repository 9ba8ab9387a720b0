//! Markers: which are known, and expressions that select by them.
//!
//! Expressions are written as in Rust's `cfg`: `vm`, `all(vm, not(slow))`, `any(slow, nightly)`.

use crate::nearest;
use anyhow::{Result, bail};
use cfg_expr::expr::Logic;
use cfg_expr::{Expression, Predicate};
use std::collections::BTreeMap;

/// Markers that every project has.
pub const BUILT_IN: [(&str, &str); 4] = [
    ("vm", "drives a virtual machine; carried by every scenario that has one"),
    ("slow", "takes so long that one leaves it out while writing code"),
    ("hardware", "needs a real machine or a lab"),
    ("nightly", "too long or too broad for every change"),
];

/// The markers that scenarios and expressions may name, with what they mean.
#[derive(Clone, Debug)]
pub(crate) struct Known(BTreeMap<String, String>);

impl Default for Known {
    fn default() -> Self {
        Self(BUILT_IN.map(|(name, meaning)| (name.to_owned(), meaning.to_owned())).into())
    }
}

impl Known {
    /// The built-in ones and the project's own.
    ///
    /// # Errors
    /// When a name means something else in an expression, such as `all` or `unix`.
    pub(crate) fn with(own: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let Self(mut known) = Self::default();
        for (name, meaning) in own {
            if !is_marker(&name) {
                bail!(
                    "`{name}` cannot be a marker: it is not a Rust identifier, or it means something else in an expression"
                );
            }
            known.insert(name, meaning);
        }
        Ok(Self(known))
    }

    pub(crate) fn has(&self, marker: &str) -> bool {
        self.0.contains_key(marker)
    }

    /// To be appended to what says that `marker` is unknown: the nearest and the whole list.
    pub(crate) fn hint(&self, marker: &str) -> String {
        nearest::hint(marker, self.0.keys().map(String::as_str))
    }

    /// One line per marker, for `--help`.
    pub(crate) fn describe(&self) -> String {
        let width = self.0.keys().map(String::len).max().unwrap_or(0);
        self.0.iter().map(|(name, meaning)| format!("    {name:width$}  {meaning}\n")).collect()
    }
}

/// True if `name` alone is an expression that stands for the marker `name`.
fn is_marker(name: &str) -> bool {
    let Ok(expression) = Expression::parse(name) else { return false };
    let mut predicates = expression.predicates();
    matches!((predicates.next(), predicates.next()), (Some(Predicate::Flag(flag)), None) if flag == name)
}

/// A marker expression, checked.
#[derive(Clone, Debug)]
pub(crate) struct Selection {
    expression: Expression,
    /// As it was given, for messages: `-m slow`, `SHAKEDOWN_MARKERS=slow`.
    origin: String,
}

impl Selection {
    /// Reads `text`; `origin` is how the person gave it.
    ///
    /// # Errors
    /// When it is no expression, or names something that is not a known marker.
    pub(crate) fn parse(text: &str, origin: String, known: &Known) -> Result<Self> {
        let expression = match Expression::parse(text) {
            Ok(expression) => expression,
            Err(error) => bail!(
                "{origin}: not a marker expression\n{error}\nFix: write a marker, or all(...), any(...), not(...) of markers"
            ),
        };
        for predicate in expression.predicates() {
            match predicate {
                Predicate::Flag(marker) if known.has(marker) => {}
                Predicate::Flag(marker) => {
                    bail!("{origin}: unknown marker `{marker}`{}", known.hint(marker))
                }
                _ => bail!("{origin}: only markers can stand in a marker expression{}", known.hint(text)),
            }
        }
        Ok(Self { expression, origin })
    }

    /// How it was given.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Whether a scenario with these markers is selected.
    pub(crate) fn matches(&self, markers: &[&str]) -> bool {
        self.expression.eval(|predicate| matches!(predicate, Predicate::Flag(flag) if markers.contains(flag)))
    }

    /// Whether `marker` is asked for by name: it stands in the expression, and not under a `not`.
    pub(crate) fn asks_for(&self, marker: &str) -> bool {
        self.expression
            .eval(|predicate| Mention {
                plain: matches!(predicate, Predicate::Flag(flag) if *flag == marker),
                negated: false,
            })
            .plain
    }
}

/// How an expression names one marker. "Evaluating" to this collects the mentions.
#[derive(Debug)]
struct Mention {
    plain: bool,
    negated: bool,
}

impl Logic for Mention {
    fn top() -> Self {
        Self { plain: false, negated: false }
    }

    fn bottom() -> Self {
        Self::top()
    }

    fn and(self, other: Self) -> Self {
        Self { plain: self.plain || other.plain, negated: self.negated || other.negated }
    }

    fn or(self, other: Self) -> Self {
        self.and(other)
    }

    fn not(self) -> Self {
        Self { plain: self.negated, negated: self.plain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn known() -> Known {
        Known::with([("lab_a".to_owned(), "the first lab".to_owned())]).expect("fine")
    }

    fn select(text: &str) -> Result<Selection> {
        Selection::parse(text, format!("-m {text}"), &known())
    }

    #[test]
    fn expressions_select() {
        for (text, markers, selected) in [
            ("vm", &["vm", "slow"][..], true),
            ("vm", &[], false),
            ("all(vm, not(slow))", &["vm", "slow"], false),
            ("all(vm, not(slow))", &["vm"], true),
            ("any(slow, lab_a)", &["lab_a"], true),
            ("not(vm)", &[], true),
        ] {
            assert_eq!(select(text).expect(text).matches(markers), selected, "{text} on {markers:?}");
        }
    }

    #[test]
    fn a_marker_is_asked_for_by_name_only() {
        for (text, asked) in [
            ("nightly", true),
            ("any(vm, nightly)", true),
            ("not(not(nightly))", true),
            ("vm", false),
            ("not(nightly)", false),
            ("all(vm, not(any(slow, nightly)))", false),
        ] {
            assert_eq!(select(text).expect(text).asks_for("nightly"), asked, "{text}");
        }
    }

    #[test]
    fn mistakes_list_the_known_markers_nearest_first() {
        let text = select("all(vm, slwo)").expect_err("typo").to_string();
        assert!(text.contains("-m all(vm, slwo): unknown marker `slwo`; did you mean `slow`?"), "{text}");
        assert!(text.contains("`hardware`") && text.contains("`lab_a`"), "{text}");
        assert!(select("unix").expect_err("builtin").to_string().contains("only markers"));
        assert!(select(r#"feature = "x""#).expect_err("pair").to_string().contains("only markers"));
        assert!(select("all(vm").expect_err("open").to_string().contains("not a marker expression"));
        assert!(select("").is_err() && select("vm and slow").is_err());
    }

    #[test]
    fn names_that_an_expression_cannot_say_are_refused() {
        for name in ["all", "unix", "test", "feature", "target_os", "two words", "a-b", "", "cfg(x)"] {
            assert!(Known::with([(name.to_owned(), String::new())]).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(all|any|not|vm|slow|[(),= \"a-z])*") {
            let _ = select(&text);
        }
    }
}
