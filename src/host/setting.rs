//! Settings of the environment that cannot be meant, and variables with a fixed set of values.
//!
//! Owns the one error for all of them: the command exits with 2 for it.

use anyhow::Result;

/// A setting that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Its value is none that it can have.
    #[error("{name}={value} is not usable: it wants {wants}")]
    Value {
        /// The variable or key.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold, as a phrase.
        wants: String,
    },
    /// It looks like one of ours and is none.
    #[error("unknown environment variable {name}\nFix: did you mean {nearest}? `unset {name}` otherwise")]
    Unknown {
        /// The variable.
        name: String,
        /// The variable of ours whose name comes nearest.
        nearest: &'static str,
    },
}

/// The value of the variable `name`, one of `allowed`; `None` when it is unset or empty.
///
/// # Errors
/// [`Invalid`] for any other value.
pub fn choice(name: &'static str, allowed: &[&'static str]) -> Result<Option<&'static str>> {
    let value = std::env::var_os(name).unwrap_or_default();
    Ok(choose(name, &value.to_string_lossy(), allowed)?)
}

fn choose(
    name: &'static str,
    value: &str,
    allowed: &[&'static str],
) -> Result<Option<&'static str>, Invalid> {
    if value.is_empty() {
        return Ok(None);
    }
    match allowed.iter().find(|known| **known == value) {
        Some(known) => Ok(Some(known)),
        None => Err(Invalid::Value { name, value: value.into(), wants: allowed.join(" or ") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_known_values_pass() {
        let choose = |value| choose("SHAKEDOWN_ACCEL", value, &["tcg", "kvm"]);
        assert_eq!(choose(""), Ok(None));
        assert_eq!(choose("kvm"), Ok(Some("kvm")));
        let error = choose("KVM").expect_err("case matters").to_string();
        assert_eq!(error, "SHAKEDOWN_ACCEL=KVM is not usable: it wants tcg or kvm");
    }
}
