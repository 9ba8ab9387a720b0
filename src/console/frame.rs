//! The frames in which the guest's agent answers, and putting an output together from them.
//!
//! A frame is `@NONCE:ID:BODY.` somewhere in a line; whatever stands before or after it, and any
//! line without one, is noise. Requests never contain `@NONCE:`, so an echo is no frame. Pure
//! functions of bytes: does not read or type.
//!
//! Noise only ever *adds* bytes to a line. A frame with something in its middle fails its form or
//! its exact length, and is asked for again; the POSIX `cksum` over each stream has the last word.

use crate::connection::{Exit, MOST_KEPT, Output, signal_name};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use std::collections::BTreeMap;

/// Bytes in one line of `base64`, which has 76 characters unless it is the last.
const LINE_BYTES: u64 = 57;
const LINE_CHARS: usize = 76;
/// No stream that is kept has more: what a guest says beyond it is not held.
const MOST_LINES: usize = MOST_KEPT / LINE_BYTES as usize + 1;
/// More holes than this are asked for as one.
const MOST_GAPS: usize = 16;

/// The body of the frame in `line`, if there is one for request `id`.
pub(crate) fn parse<'a>(line: &'a [u8], nonce: &str, id: u64) -> Option<&'a str> {
    let marker = format!("@{nonce}:{id}:");
    let start = line.windows(marker.len()).rposition(|window| window == marker.as_bytes())?;
    let body = &line[start + marker.len()..];
    let end = body.iter().position(|&byte| byte == b'.')?;
    std::str::from_utf8(&body[..end]).ok()
}

/// What came in answer to one request.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Lines of base64 by their number from 1: standard output, standard error.
    lines: [BTreeMap<u64, String>; 2],
    /// What the answer ends with.
    pub(crate) reply: Option<Reply>,
    /// Which of our questions the reply is for: 0 for the request itself.
    pub(crate) round: u64,
    /// Frames so far: grows as long as the guest is talking.
    pub(crate) frames: u64,
}

/// The last frame of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The agent may be typed.
    Go,
    /// The agent runs, as this user; the tools that it lacks.
    Ready { user_id: u32, missing: String },
    /// It waits for a request.
    Sync,
    /// A piece of standard input came.
    Put,
    /// All of standard input came, whole or not.
    Load { whole: bool },
    /// The command ended; checksum and size of standard output and of standard error.
    End { exit: Exit, sums: [(u32, u64); 2] },
}

/// A hole in an output: stream (`o`, `e`), first and last line.
pub(crate) type Gap = (char, u64, u64);

impl Answer {
    /// Takes in one frame's body. What does not have the right form is dropped.
    pub(crate) fn accept(&mut self, body: &str) {
        let Some((head, data)) = body.split_once(':') else { return };
        let number = head.get(1..).and_then(|digits| digits.parse().ok());
        match (head.as_bytes().first(), number) {
            (Some(b'o'), Some(number)) => self.hold(0, number, data),
            (Some(b'e'), Some(number)) => self.hold(1, number, data),
            _ => {
                let Some((reply, round)) = body.rsplit_once(':') else { return };
                let (Some(reply), Ok(round)) = (Reply::parse(reply), round.parse()) else { return };
                (self.reply, self.round) = (Some(reply), round);
            }
        }
        self.frames += 1;
    }

    /// Keeps a line of output, if it can be one and there is room.
    fn hold(&mut self, stream: usize, number: u64, data: &str) {
        let lines = &mut self.lines[stream];
        if data.len() <= LINE_CHARS && (lines.len() < MOST_LINES || lines.contains_key(&number)) {
            lines.insert(number, data.to_owned());
        }
    }

    /// Whether the command has ended and printed more than is kept.
    pub(crate) fn is_too_long(&self) -> bool {
        let most = MOST_KEPT as u64;
        matches!(&self.reply, Some(Reply::End { sums, .. }) if sums.iter().any(|(_, size)| *size > most))
    }

    /// The output once it is complete and right; else what must be asked for again.
    ///
    /// `None` without a valid end.
    pub(crate) fn assemble(&mut self) -> Option<Result<Output, Vec<Gap>>> {
        let Some(Reply::End { exit, sums }) = self.reply.clone() else { return None };
        let mut gaps = Vec::new();
        let mut streams = [Vec::new(), Vec::new()];
        for (index, name) in ['o', 'e'].into_iter().enumerate() {
            let (crc, size) = sums[index];
            let lines = &mut self.lines[index];
            lines.retain(|&number, data| line_fits(number, data, size));
            let holes = holes(lines, size.div_ceil(LINE_BYTES));
            if holes.is_empty() {
                match decode(lines.values(), size, crc) {
                    Some(bytes) => streams[index] = bytes,
                    None => {
                        lines.clear();
                        gaps.push((name, 1, size.div_ceil(LINE_BYTES)));
                    }
                }
            } else {
                gaps.extend(holes.into_iter().map(|(from, to)| (name, from, to)));
            }
        }
        let [stdout, stderr] = streams;
        Some(if gaps.is_empty() { Ok(Output { exit, stdout, stderr }) } else { Err(gaps) })
    }
}

/// Whether a line has exactly the length that it must have in a stream of `size` bytes.
///
/// The last line may be longer: a process that the command left behind can still be writing. What
/// it writes after the end does not count.
fn line_fits(number: u64, data: &str, size: u64) -> bool {
    let last = size.div_ceil(LINE_BYTES);
    let rest = size.saturating_sub(last.saturating_sub(1) * LINE_BYTES);
    let chars = usize::try_from(rest.div_ceil(3) * 4).unwrap_or(usize::MAX);
    let alphabet = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
    let length = data.len();
    let right = match number {
        0 => false,
        n if n < last => length == LINE_CHARS,
        n if n == last => (chars..=LINE_CHARS).contains(&length),
        _ => false,
    };
    right && data.bytes().all(alphabet)
}

/// Runs of numbers from 1 to `last` that `lines` lacks.
fn holes(lines: &BTreeMap<u64, String>, last: u64) -> Vec<(u64, u64)> {
    let mut holes = Vec::new();
    let mut next = 1;
    for &number in lines.keys().chain([&(last + 1)]) {
        if number > next {
            holes.push((next, number - 1));
        }
        next = number + 1;
    }
    if holes.len() > MOST_GAPS {
        let (first, last) = (holes[MOST_GAPS - 1].0, holes[holes.len() - 1].1);
        holes.truncate(MOST_GAPS - 1);
        holes.push((first, last));
    }
    holes
}

fn decode<'a>(lines: impl Iterator<Item = &'a String>, size: u64, crc: u32) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for line in lines {
        bytes.extend(BASE64.decode(line).ok()?);
    }
    bytes.truncate(usize::try_from(size).ok()?);
    (bytes.len() as u64 == size && cksum(&bytes) == crc).then_some(bytes)
}

impl Reply {
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<_> = text.split(':').collect();
        Some(match fields[..] {
            ["go"] => Self::Go,
            ["sync"] => Self::Sync,
            ["put"] => Self::Put,
            ["load", "ok"] => Self::Load { whole: true },
            ["load", "bad"] => Self::Load { whole: false },
            ["ready", uid, missing] => {
                Self::Ready { user_id: uid.parse().ok()?, missing: missing.trim().into() }
            }
            // The sums guard themselves; the status stands twice.
            ["end", status, how, crc, size, err_crc, err_size, again] if status == again => {
                let sums = [
                    (crc.parse().ok()?, size.parse().ok()?),
                    (err_crc.parse().ok()?, err_size.parse().ok()?),
                ];
                Self::End { exit: exit(status.parse().ok()?, how)?, sums }
            }
            _ => return None,
        })
    }
}

/// A shell says 128+n of a command that signal n ended, ksh 256+n; the agent knows whether it was
/// one. Nothing else comes from a shell.
fn exit(status: i32, how: &str) -> Option<Exit> {
    match (how, status) {
        ("exit", 0..=511) => Some(Exit::Code(status)),
        ("signal", 129..=511) => Some(Exit::Signal(signal_name(status - 128))),
        _ => None,
    }
}

/// The checksum of POSIX `cksum`: CRC-32 with polynomial 0x04C11DB7, most significant bit first,
/// the length appended, complemented.
pub(crate) fn cksum(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut crc = (index as u32) << 24;
            let mut bit = 0;
            while bit < 8 {
                crc = (crc << 1) ^ if crc >> 31 == 1 { 0x04C1_1DB7 } else { 0 };
                bit += 1;
            }
            table[index] = crc;
            index += 1;
        }
        table
    };
    let length = bytes.len().to_le_bytes();
    let significant = length.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let all = bytes.iter().chain(&length[..significant]);
    !all.fold(0, |crc: u32, &byte| (crc << 8) ^ TABLE[usize::from((crc >> 24) as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cksum_is_that_of_posix() {
        assert_eq!(cksum(b""), 4_294_967_295);
        assert_eq!(cksum(b"123456789"), 930_766_865);
        assert_eq!(cksum(&[b'a'; 300]), 1_664_553_091);
    }

    #[test]
    fn frames_are_found_between_noise_and_echoes_are_none() {
        let body = |line: &[u8]| parse(line, "k1", 7).map(str::to_owned);
        assert_eq!(body(b"@k1:7:sync:0.\r"), Some("sync:0".into()));
        assert_eq!(body(b"# foo@k1:7:o1:YQ==.[   12.5] usb 1-1: new\r"), Some("o1:YQ==".into()));
        assert_eq!(body(b"@k1:7:o1:Y@k1:7:o1:YQ==."), Some("o1:YQ==".into()));
        assert_eq!(body(b"k1 run 7 - echo @k1"), None);
        assert_eq!(body(b"@k1:8:sync:0."), None);
        assert_eq!(body(b"@k1:7:sync:0"), None);
    }

    #[test]
    fn real_exit_statuses_differ_from_signals() {
        assert_eq!(exit(137, "exit"), Some(Exit::Code(137)));
        assert_eq!(exit(137, "signal"), Some(Exit::Signal("KILL".into())));
        // Real-time signals have no name in RFC 4254.
        assert_eq!(exit(128 + 34, "signal"), Some(Exit::Signal("34".into())));
        assert_eq!(exit(0, "sixit"), None);
        for absurd in [i32::MIN, -1, 128, 512, i32::MAX] {
            assert_eq!(exit(absurd, "signal"), None);
        }
    }

    /// The frames of an output as the agent prints them.
    fn frames(stdout: &[u8], stderr: &[u8], status: i32) -> Vec<String> {
        let mut frames = Vec::new();
        for (name, bytes) in [('o', stdout), ('e', stderr)] {
            for (index, line) in bytes.chunks(57).enumerate() {
                frames.push(format!("@k:1:{name}{}:{}.\r\n", index + 1, BASE64.encode(line)));
            }
        }
        let end = format!(
            "@k:1:end:{status}:exit:{}:{}:{}:{}:{status}:0.\r\n",
            cksum(stdout),
            stdout.len(),
            cksum(stderr),
            stderr.len()
        );
        frames.extend([end.clone(), end]);
        frames
    }

    fn read(text: &[u8]) -> Answer {
        let mut answer = Answer::default();
        for body in text.split(|&b| b == b'\n').filter_map(|line| parse(line, "k", 1)) {
            answer.accept(body);
        }
        answer
    }

    /// Answers gaps from a clean copy, as the agent would, until the output is complete.
    fn complete(mut answer: Answer, clean: &[String]) -> Option<Output> {
        for _ in 0..4 {
            match answer.assemble()? {
                Ok(output) => return Some(output),
                Err(gaps) => {
                    for (name, from, to) in gaps {
                        for number in from..=to {
                            let start = format!("@k:1:{name}{number}:");
                            let line =
                                clean.iter().find(|f| f.starts_with(&start)).expect("asked for what is");
                            answer.accept(parse(line.trim_end().as_bytes(), "k", 1).expect("a frame"));
                        }
                    }
                }
            }
        }
        None
    }

    #[test]
    fn noise_at_any_byte_is_found_and_repaired() {
        let (stdout, stderr) = ([7u8; 200], b"warning\n");
        let clean = frames(&stdout, stderr, 3);
        let text = clean.concat().into_bytes();
        for noise in [&b"[   12.345678] usb 1-1: new device.\r\n"[..], b"x", b"A", b"\r\n", b":1:", b"."] {
            for cut in 0..=text.len() {
                let noisy = [&text[..cut], noise, &text[cut..]].concat();
                let output = complete(read(&noisy), &clean).expect("repaired");
                assert_eq!((&output.stdout[..], &output.stderr[..]), (&stdout[..], &stderr[..]), "at {cut}");
                assert_eq!(output.exit, Exit::Code(3), "at {cut}, {noise:?}");
            }
        }
    }

    #[test]
    fn absurd_sizes_cost_nothing() {
        let max = u64::MAX - 60;
        let mut answer = Answer::default();
        answer.accept(&format!("end:0:exit:1:{max}:1:{max}:0:0"));
        assert!(matches!(answer.assemble(), Some(Err(gaps)) if gaps.len() == 2));
        assert!(answer.is_too_long());
    }

    #[test]
    fn a_guest_that_prints_without_end_is_not_held() {
        let mut answer = Answer::default();
        answer.accept(&format!("o1:{}", "A".repeat(LINE_CHARS + 1)));
        assert!(answer.lines[0].is_empty(), "no line is that long");
        for number in 1..=MOST_LINES as u64 + 10 {
            answer.accept(&format!("e{number}:"));
        }
        assert_eq!((answer.lines[1].len(), answer.frames), (MOST_LINES, MOST_LINES as u64 + 11));
    }

    proptest! {
        #[test]
        fn outputs_come_back_exactly(stdout: Vec<u8>, stderr: Vec<u8>, status in 0i32..256) {
            let mut answer = read(frames(&stdout, &stderr, status).concat().as_bytes());
            let output = answer.assemble().expect("has an end").expect("is complete");
            prop_assert_eq!((output.stdout, output.stderr), (stdout, stderr));
        }

        #[test]
        fn lost_lines_are_named(bytes in prop::collection::vec(any::<u8>(), 1..3000), lost: prop::sample::Index) {
            let clean = frames(&bytes, b"", 0);
            let mut some = clean.clone();
            some.remove(lost.index(clean.len() - 2));
            let output = complete(read(some.concat().as_bytes()), &clean).expect("repaired");
            prop_assert_eq!(output.stdout, bytes);
        }

        #[test]
        fn no_number_is_too_odd(
            status in prop_oneof![any::<i32>(), -1000i32..1000, Just(i32::MIN)],
            signal: bool,
            sums: [u64; 4],
            line in prop_oneof![any::<u64>(), 0u64..4],
        ) {
            let how = if signal { "signal" } else { "exit" };
            let [a, b, c, d] = sums;
            let mut answer = Answer::default();
            answer.accept(&format!("o{line}:YQ=="));
            answer.accept(&format!("e-{line}:YQ=="));
            answer.accept(&format!("end:{status}:{how}:{}:{b}:{}:{d}:{status}:0", a as u32, c as u32));
            let end = answer.reply.clone();
            prop_assert_eq!(end.is_some(), if signal { (129..512).contains(&status) } else { (0..512).contains(&status) });
            prop_assert!(!matches!(answer.assemble(), Some(Ok(_))), "no checksum is right by chance");
        }

        #[test]
        fn garbage_is_no_output(bodies in prop::collection::vec("(o|e|end|ready)[0-9:a=]{0,20}", 0..6)) {
            let mut answer = Answer::default();
            bodies.iter().for_each(|body| answer.accept(body));
            prop_assert!(!matches!(answer.assemble(), Some(Ok(output)) if !output.stdout.is_empty()));
        }
    }
}
