//! Talking to whoever started us: colours, questions, JSON, errors.

use anyhow::{Context, Result};
use serde::Serialize;
use shakedown::deadline::Stop;
use shakedown::fault::visible;
use shakedown::process;
use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Duration;

/// Whether one of our streams wants colours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(bool);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    Green,
    Red,
    Dim,
}

impl Paint {
    /// Colours on a terminal, unless `NO_COLOR` (<https://no-color.org>) or `TERM=dumb` forbid them.
    pub(crate) fn of(stream: &impl IsTerminal) -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self(stream.is_terminal() && !no_color && !dumb)
    }

    #[cfg(test)]
    pub(crate) fn always() -> Self {
        Self(true)
    }

    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self(false)
    }

    pub(crate) fn paint(self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Green => 32,
            Colour::Red => 31,
            Colour::Dim => 2,
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Prints the answer of a command. A reader that has gone is an error, not a panic.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// Prints the answer of a command as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    print(&format!("{text}\n"))
}

/// A line of progress. Nobody may be listening, which is no error.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// True when a person can be asked.
pub(crate) fn interactive() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a yes-or-no question; Enter alone is yes, the end of input is no.
pub(crate) fn ask(question: &str) -> Result<bool> {
    let mut stderr = io::stderr().lock();
    write!(stderr, "{question} [Y/n] ").and_then(|()| stderr.flush()).context("cannot ask")?;
    // The signal handler does not interrupt a read, so no read may block.
    while !process::wait_readable(io::stdin(), Duration::from_millis(200))? {
        if process::interrupted() {
            return Err(Stop::Interrupted.into());
        }
    }
    let mut answer = String::new();
    let count = io::stdin().lock().read_line(&mut answer).context("cannot read the answer")?;
    Ok(count > 0 && is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes")
}

/// Prints an error: what was attempted, why it failed, and what to do.
pub(crate) fn print_error(error: &anyhow::Error) {
    let paint = Paint::of(&io::stderr());
    say(&describe(error, paint));
}

/// The chain, outermost first, and its fixes at the end, where one looks for them.
fn describe(error: &anyhow::Error, paint: Paint) -> String {
    let mut text = String::new();
    let mut fixes: Vec<String> = Vec::new();
    for (depth, link) in error.chain().enumerate() {
        let link = visible(&link.to_string());
        let (message, fix) = match link.split_once("\nFix: ") {
            Some((message, fix)) => (message, Some(fix)),
            None => (link.as_str(), None),
        };
        let head = if depth == 0 { paint.paint(Colour::Red, "error:") } else { "\n  because:".into() };
        text += &format!("{head} {message}");
        fixes.extend(fix.map(str::to_owned).filter(|fix| !fixes.contains(fix)));
    }
    for fix in fixes {
        text += &format!("\n{} {fix}", paint.paint(Colour::Green, "fix:"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use shakedown::fault::Fault;

    #[test]
    fn the_fix_comes_last() {
        let cause = Fault::host("qemu-img not found").fix("Install it");
        let error = anyhow::Error::new(cause).context("cannot make a disk");
        assert_eq!(
            describe(&error, Paint::never()),
            "error: cannot make a disk\n  because: qemu-img not found\nfix: Install it"
        );
    }

    #[test]
    fn colours_only_where_wanted() {
        assert_eq!(Paint::never().paint(Colour::Red, "x"), "x");
        assert_eq!(Paint::always().paint(Colour::Red, "x"), "\x1b[31mx\x1b[0m");
    }

    #[test]
    fn enter_means_yes_and_anything_odd_no() {
        for (answer, yes) in [("\n", true), ("Y\n", true), ("yes\n", true), ("n\n", false), ("what\n", false)]
        {
            assert_eq!(is_yes(answer), yes, "{answer:?}");
        }
    }
}
