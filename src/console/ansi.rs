//! Takes terminal control sequences out of a stream of bytes.
//!
//! A state machine after <https://vt100.net/emu/dec_ansi_parser>, one byte at a time, so that a
//! sequence may be cut anywhere. Owns no text: what comes out is appended to the caller's buffer.
//!
//! Written by hand rather than on the `vte` parser, because that one lets an unterminated OSC,
//! APC or PM swallow (and the OSC also store) all that follows. Here a string ends at its line.
//!
//! 8-bit C1 controls are not recognised: in UTF-8, which every current console speaks, the bytes
//! 0x80-0x9F are parts of letters.

/// No sequence is longer than this many bytes; one that is was not a sequence.
const LONGEST: usize = 4096;

const BEL: u8 = 0x07;
const CAN: u8 = 0x18;
const SUB: u8 = 0x1a;
const ESC: u8 = 0x1b;

/// Removes CSI, OSC, DCS, SOS, PM, APC and two-character sequences, and control characters other
/// than tab, newline and carriage return.
#[derive(Debug, Default)]
pub struct Filter {
    state: State,
    length: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Ground,
    /// After ESC, or after ESC and intermediates.
    Escape,
    /// After `ESC [`.
    Csi,
    /// Inside OSC, DCS, SOS, PM or APC.
    Text,
    /// After ESC inside such a string: `\` ends it, anything else begins a new sequence.
    TextEscape,
}

impl Filter {
    /// Appends what is text in `bytes` to `text`.
    pub fn feed(&mut self, bytes: &[u8], text: &mut Vec<u8>) {
        for &byte in bytes {
            if self.step(byte) {
                text.push(byte);
            }
        }
    }

    /// Takes one byte; true when it is text.
    fn step(&mut self, byte: u8) -> bool {
        if self.state == State::Ground {
            return self.ground(byte);
        }
        self.length += 1;
        // A newline never belongs to a sequence that a console gets: the sequence was cut short,
        // by a kernel message or by the death of its writer.
        if byte == b'\n' || byte == CAN || byte == SUB || self.length > LONGEST {
            self.state = State::Ground;
            return self.ground(byte);
        }
        self.state = match (self.state, byte) {
            (State::Text, ESC) => State::TextEscape,
            (State::Text, BEL) | (State::TextEscape, b'\\') => State::Ground,
            (State::Text, _) => State::Text,
            (_, ESC) => State::Escape,
            (State::Escape | State::TextEscape, b'[') => State::Csi,
            (State::Escape | State::TextEscape, b']' | b'P' | b'X' | b'^' | b'_') => State::Text,
            (State::Escape | State::TextEscape, 0x20..=0x2f) => State::Escape,
            (State::Csi, 0x20..=0x3f) => State::Csi,
            // Final bytes.
            (_, 0x30..=0x7e) => State::Ground,
            // Other controls are obeyed by a terminal in mid-sequence; none of them is text.
            (state, 0x00..=0x1f | 0x7f) => state,
            // Not ASCII: text begins again.
            (_, _) => {
                self.state = State::Ground;
                return true;
            }
        };
        false
    }

    fn ground(&mut self, byte: u8) -> bool {
        if byte == ESC {
            self.state = State::Escape;
            self.length = 0;
        }
        matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filter(pieces: &[&[u8]]) -> Vec<u8> {
        let (mut filter, mut text) = (Filter::default(), Vec::new());
        for piece in pieces {
            filter.feed(piece, &mut text);
        }
        text
    }

    #[test]
    fn prompts_of_real_systems_lose_their_colours_and_titles() {
        // NixOS, bash.
        let nixos = b"\x1b[?2004h\r\n\x1b[1;31m[\x1b]0;root@nixos: ~\x07root@nixos:~]#\x1b[0m ";
        assert_eq!(filter(&[nixos]), b"\r\n[root@nixos:~]# ");
        // systemd.
        let status = b"[\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mssh.service\x1b[0m.\r\n";
        assert_eq!(filter(&[status]), b"[  OK  ] Started ssh.service.\r\n");
        // systemd 257 puts shell contexts into OSC 3008; tmux speaks DCS, screen titles are APC-like.
        assert_eq!(filter(&[b"a\x1b]3008;start=1\x1b\\b\x1bPtmux;x\x1b\\c\x1bkt\x1b\\d\x1b(Be"]), b"abctde");
    }

    #[test]
    fn a_string_that_never_ends_costs_its_line_only() {
        assert_eq!(filter(&[b"a\x1b]0;title lost\nnext"]), b"a\nnext");
        let long = [b"\x1b_".as_slice(), &[b'x'; 2 * LONGEST], b"end"].concat();
        let text = filter(&[&long]);
        assert!(text.ends_with(b"xend") && text.len() < LONGEST + 10);
    }

    #[test]
    fn can_and_sub_abort_a_sequence() {
        assert_eq!(filter(&[b"a\x1b[3\x18b\x1b]0;t\x1ac"]), b"abc");
    }

    fn sequence() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            "\x1b\\[[0-9;?]{0,8}[@-~]".prop_map(String::into_bytes),
            "\x1b[\\]PX^_][ -~é]{0,20}(\x1b\\\\|\x07)".prop_map(String::into_bytes),
            "\x1b[ -/]{0,2}[a-jl-z0-9]".prop_map(String::into_bytes),
        ]
    }

    proptest! {
        #[test]
        fn a_cut_at_any_byte_changes_nothing(bytes: Vec<u8>, cut in 0usize..100) {
            let cut = cut.min(bytes.len());
            prop_assert_eq!(filter(&[&bytes[..cut], &bytes[cut..]]), filter(&[&bytes]));
        }

        #[test]
        fn escapes_and_controls_cut_anywhere(
            bytes in prop::collection::vec(prop::sample::select(b"\x1b\x07\x18\n[]P_\\;0mA\xc3\xa9".to_vec()), 0..40),
            cut in 0usize..40,
        ) {
            let cut = cut.min(bytes.len());
            prop_assert_eq!(filter(&[&bytes[..cut], &bytes[cut..]]), filter(&[&bytes]));
        }

        #[test]
        fn plain_text_passes_unchanged(text in "[\\t\\r\\n -~é→𝄞]{0,60}") {
            prop_assert_eq!(filter(&[text.as_bytes()]), text.as_bytes());
        }

        #[test]
        fn sequences_never_leak(parts in prop::collection::vec(("[ -~é\\n]{0,8}", sequence()), 0..8)) {
            let mixed: Vec<u8> = parts.iter().flat_map(|(t, s)| [t.as_bytes(), s].concat()).collect();
            let plain: String = parts.iter().map(|(t, _)| t.as_str()).collect();
            prop_assert_eq!(filter(&[&mixed]), plain.as_bytes());
        }
    }
}
