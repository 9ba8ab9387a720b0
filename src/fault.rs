//! Who is to blame: the machine under test or us.
//!
//! Owns the one error type that carries blame through `anyhow` chains, and the question asked of a
//! chain at the top. Does not decide outcomes; the harness does, from [`blame`].

use std::error::Error as StdError;
use std::fmt;

/// What an error says about whom to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The machine under test misbehaved: the scenario `failed`.
    Machine,
    /// We, the host, the image store or QEMU broke: the scenario ended in `error`.
    Host,
}

/// An error with blame, and with the fix where one is known.
///
/// Its text is the message, then `Fix: ...` on a line of its own. The source keeps the chain.
#[derive(Debug)]
pub struct Fault {
    blame: Blame,
    message: String,
    fix: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Fault {
    /// A fault of ours or of the host.
    pub fn host(message: impl Into<String>) -> Self {
        Self::new(Blame::Host, message)
    }

    /// A fault of the machine under test.
    pub fn machine(message: impl Into<String>) -> Self {
        Self::new(Blame::Machine, message)
    }

    fn new(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, message: message.into(), fix: None, source: None }
    }

    /// Says what to do about it: a command line or one sentence.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// Keeps the error that led here.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Whom to look at.
    pub fn blame(&self) -> Blame {
        self.blame
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.fix {
            Some(fix) => write!(f, "\nFix: {fix}"),
            None => Ok(()),
        }
    }
}

impl StdError for Fault {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// The outermost blame in a chain, or `None` when nothing of ours is in it.
///
/// The outermost wins because it was attached by who knew most: a transport error (host) that
/// was seen because the guest powered itself off is wrapped by a machine fault.
pub fn blame(error: &anyhow::Error) -> Option<Blame> {
    // `anyhow` finds a type used as context only by asking the error itself, a source only by
    // walking the chain.
    if let Some(fault) = error.downcast_ref::<Fault>() {
        return Some(fault.blame);
    }
    error.chain().find_map(|e| e.downcast_ref::<Fault>()).map(Fault::blame)
}

/// Text that may be a machine's, made harmless: control characters that a terminal would obey are
/// written out. Lines and tabs stay.
pub fn visible(text: &str) -> String {
    let harmless = |c: char| !c.is_control() || c == '\n' || c == '\t';
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if harmless(c) { shown.push(c) } else { shown.extend(c.escape_default()) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn blame_survives_context_on_either_side() {
        let inner = anyhow::Error::new(Fault::machine("no login prompt"));
        assert_eq!(blame(&inner.context("booting")), Some(Blame::Machine));
        let io = std::io::Error::other("disk full");
        let outer = Err::<(), _>(io).context(Fault::host("cannot write overlay"));
        assert_eq!(blame(&outer.expect_err("is an error")), Some(Blame::Host));
        assert_eq!(blame(&anyhow::anyhow!("assertion")), None);
    }

    #[test]
    fn a_terminal_is_not_told_what_to_do() {
        assert_eq!(visible("a\tb\n\x1b]0;title\x07\u{9b}2J ä"), "a\tb\n\\u{1b}]0;title\\u{7}\\u{9b}2J ä");
    }

    #[test]
    fn the_fix_is_in_the_text() {
        let text = Fault::host("qemu-img not found").fix("apt-get install qemu-utils").to_string();
        assert_eq!(text, "qemu-img not found\nFix: apt-get install qemu-utils");
    }
}
