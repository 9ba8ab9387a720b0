//! Output on its way to the log: bytes become text, secrets become marks, both across reads.

use aho_corasick::{AhoCorasick, MatchKind};
use sha2::{Digest, Sha256};

/// Decodes UTF-8 as it comes: a character that is cut by a read is whole again with the next one.
#[derive(Debug, Default)]
struct Decoder {
    /// The beginning of a character: at most three bytes.
    cut: Vec<u8>,
}

impl Decoder {
    /// Appends the text of `bytes`; what is not UTF-8 becomes U+FFFD.
    fn decode(&mut self, bytes: &[u8], text: &mut String) {
        let joined;
        let mut rest = if self.cut.is_empty() {
            bytes
        } else {
            joined = [&self.cut[..], bytes].concat();
            self.cut.clear();
            &joined
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => return text.push_str(valid),
                Err(error) => {
                    let (valid, other) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &other[length..];
                        }
                        None => {
                            self.cut.extend_from_slice(other);
                            return;
                        }
                    }
                }
            }
        }
    }

    fn finish(&mut self, text: &mut String) {
        if !self.cut.is_empty() {
            self.cut.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Replaces secrets, taken literally, by `**` and six digits of their digest.
#[derive(Debug)]
pub(super) struct Mask {
    secrets: Vec<String>,
    search: Option<AhoCorasick>,
}

impl Mask {
    /// Empty secrets are none.
    pub(super) fn new(secrets: impl IntoIterator<Item = String>) -> Self {
        let secrets: Vec<_> = secrets.into_iter().filter(|secret| !secret.is_empty()).collect();
        let search = (!secrets.is_empty())
            .then(|| AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&secrets).ok())
            .flatten();
        Self { secrets, search }
    }

    /// A whole text.
    #[cfg(test)]
    fn apply(&self, text: &str) -> String {
        let mut masked = String::new();
        self.replace(text, &mut masked);
        masked
    }

    fn replace(&self, text: &str, masked: &mut String) {
        let Some(search) = &self.search else { return masked.push_str(text) };
        search.replace_all_with(text, masked, |_, secret, masked| {
            let digest = Sha256::digest(secret.as_bytes());
            masked.push_str(&format!("**{:02x}{:02x}{:02x}**", digest[0], digest[1], digest[2]));
            true
        });
    }

    /// How much of `text` is safe to let go: what follows may be the beginning of a secret, or a
    /// secret that is the beginning of a longer one.
    fn settled(&self, text: &str) -> usize {
        let longest = self.secrets.iter().map(String::len).max().unwrap_or(0);
        let first = text.len().saturating_sub(longest.saturating_sub(1));
        let open = (first..text.len()).find(|&at| {
            let tail = &text.as_bytes()[at..];
            self.secrets.iter().any(|secret| secret.len() > tail.len() && secret.as_bytes().starts_with(tail))
        });
        let Some(open) = open else { return text.len() };
        // A whole secret that reaches into the open end goes with it.
        let within = self.search.iter().flat_map(|search| search.find_iter(text));
        within
            .map(|found| found.range())
            .find(|range| range.contains(&open))
            .map_or(open, |range| range.start)
    }
}

/// Both, for one stream.
#[derive(Debug)]
pub(super) struct Filter<'a> {
    decoder: Decoder,
    mask: &'a Mask,
    held: String,
}

impl<'a> Filter<'a> {
    pub(super) fn new(mask: &'a Mask) -> Self {
        Self { decoder: Decoder::default(), mask, held: String::new() }
    }

    /// Takes what was read and gives what can be shown; the rest comes with a later read.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        if self.mask.search.is_none() {
            let mut text = String::with_capacity(bytes.len() + 3);
            self.decoder.decode(bytes, &mut text);
            return text;
        }
        self.decoder.decode(bytes, &mut self.held);
        let settled = self.mask.settled(&self.held);
        let rest = self.held.split_off(settled);
        let mut shown = String::with_capacity(settled);
        self.mask.replace(&self.held, &mut shown);
        self.held = rest;
        shown
    }

    /// What was held back, at the end.
    pub(super) fn finish(&mut self) -> String {
        self.decoder.finish(&mut self.held);
        let mut shown = String::new();
        self.mask.replace(&self.held, &mut shown);
        self.held.clear();
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn in_pieces(bytes: &[u8], mask: &Mask, sizes: &[usize]) -> String {
        let mut filter = Filter::new(mask);
        let mut shown = String::new();
        let mut rest = bytes;
        for size in sizes.iter().chain([&usize::MAX]) {
            let (piece, other) = rest.split_at((*size).min(rest.len()));
            shown += &filter.push(piece);
            rest = other;
        }
        shown + &filter.finish()
    }

    #[test]
    fn a_secret_is_literal_and_masked_by_its_digest() {
        let mask = Mask::new(["a.c(".to_owned(), String::new()]);
        assert_eq!(mask.apply("abc( a.c( x"), "abc( **8c27fd** x".replace("8c27fd", &digest("a.c(")));
        assert_eq!(Mask::new([String::new()]).apply("text"), "text");
    }

    fn digest(secret: &str) -> String {
        let digest = Sha256::digest(secret.as_bytes());
        format!("{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2])
    }

    #[test]
    fn a_secret_cut_by_reads_is_masked() {
        let mask = Mask::new(["hunter2".to_owned()]);
        let shown = in_pieces(b"pw hunter2 end hunt", &mask, &[5, 3, 1]);
        assert_eq!(shown, format!("pw **{}** end hunt", digest("hunter2")));
    }

    #[test]
    fn what_cannot_become_a_secret_is_shown_at_once() {
        let mask = Mask::new(["hunter2".to_owned()]);
        let mut filter = Filter::new(&mask);
        assert_eq!(filter.push(b"a prompt> "), "a prompt> ");
        assert_eq!(filter.push(b"hu"), "");
        assert_eq!(filter.push(b"man"), "human");
    }

    #[test]
    fn a_character_cut_by_a_read_stays_whole() {
        let none = Mask::new([]);
        assert_eq!(in_pieces("zwölf €".as_bytes(), &none, &[3, 4, 1, 1]), "zwölf €");
        assert_eq!(in_pieces(b"a\xff\xe2\x82", &none, &[1, 1, 1]), "a\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn reads_make_no_difference(
            text in "[ab]{0,40}",
            secrets in prop::collection::vec("[ab]{1,5}", 0..3),
            sizes in prop::collection::vec(0_usize..6, 0..20),
        ) {
            let mask = Mask::new(secrets);
            prop_assert_eq!(in_pieces(text.as_bytes(), &mask, &sizes), mask.apply(&text));
        }

        #[test]
        fn any_bytes_decode_as_if_they_came_at_once(
            bytes in prop::collection::vec(any::<u8>(), 0..60),
            sizes in prop::collection::vec(0_usize..6, 0..20),
        ) {
            let none = Mask::new([]);
            prop_assert_eq!(in_pieces(&bytes, &none, &sizes), String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
