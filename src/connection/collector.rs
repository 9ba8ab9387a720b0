//! What becomes of a command's output: it is kept, within a limit, and shown to the command's sink.

use super::{ConnectionError, Exit, MOST_KEPT, Output, Sink, Stream};

/// What stays of standard error where the output is only streamed: enough for a message.
const TAIL: usize = 64 << 10;
/// How to have the output of a command that prints more than is kept.
const STREAM_IT: &str =
    "let it print into a file, or take the output as it comes, by `Cmd::on_output` and `Cmd::discard_stdout`";

/// Gathers a command's output for a transport: keeps it and shows it to the command's sink.
pub(crate) struct Collector<'a> {
    keep: bool,
    sink: Option<Sink<'a>>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    most: usize,
    overflowed: bool,
}

impl<'a> Collector<'a> {
    /// As a command wants it, by its `keep` and `on_output`.
    pub(crate) fn new(keep: bool, sink: Option<Sink<'a>>) -> Self {
        let (stdout, stderr) = (Vec::new(), Vec::new());
        Self { keep, sink, stdout, stderr, most: MOST_KEPT, overflowed: false }
    }

    /// Takes bytes of one stream, in their order.
    pub(crate) fn take(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some(see) = &mut self.sink {
            see(stream, bytes);
        }
        match stream {
            _ if self.overflowed => {}
            Stream::Stdout if self.keep => keep(&mut self.stdout, bytes, self.most, &mut self.overflowed),
            Stream::Stdout => {}
            Stream::Stderr if self.keep => keep(&mut self.stderr, bytes, self.most, &mut self.overflowed),
            Stream::Stderr => {
                self.stderr.extend_from_slice(bytes);
                // Not with each piece: what is behind the surplus has to be moved.
                if self.stderr.len() > 2 * TAIL {
                    self.stderr.drain(..self.stderr.len() - TAIL);
                }
            }
        }
    }

    /// Whether the command printed more than can be kept. To be asked after each piece: the command
    /// is then to be ended, with [`Collector::too_much`].
    pub(crate) fn overflowed(&self) -> bool {
        self.overflowed
    }

    /// The error for a command that printed more than can be kept.
    pub(crate) fn too_much(line: String, peer: String) -> ConnectionError {
        ConnectionError::TooMuch { line, peer, limit: MOST_KEPT as u64, instead: STREAM_IT }
    }

    /// The whole output of a command that ended.
    pub(crate) fn finish(mut self, exit: Exit) -> Output {
        if !self.keep {
            self.stderr.drain(..self.stderr.len().saturating_sub(TAIL));
        }
        Output { exit, stdout: self.stdout, stderr: self.stderr }
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], most: usize, overflowed: &mut bool) {
    *overflowed = kept.len() + bytes.len() > most;
    if !*overflowed {
        kept.extend_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut collector = Collector { most: 100, ..Collector::new(true, None) };
            collector.take(stream, &[b'x'; 100]);
            assert!(!collector.overflowed(), "{stream:?}");
            collector.take(stream, b"y");
            assert!(collector.overflowed(), "{stream:?}");
        }
    }

    #[test]
    fn of_a_stream_the_end_of_standard_error_stays() {
        let mut seen = 0;
        let mut collector = Collector::new(false, Some(Box::new(|_, bytes: &[u8]| seen += bytes.len())));
        for number in 0..100_000 {
            collector.take(Stream::Stdout, b"out");
            collector.take(Stream::Stderr, format!("{number:09}\n").as_bytes());
            assert!(collector.stderr.len() <= 2 * TAIL);
        }
        let output = collector.finish(Exit::Code(0));
        assert_eq!((output.stdout.len(), output.stderr.len(), seen), (0, TAIL, 1_300_000));
        assert!(output.stderr.ends_with(b"000099999\n"));
    }
}
