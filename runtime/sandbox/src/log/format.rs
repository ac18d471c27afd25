//! Output of a process to lines of a log, and back to byte counts.

use nacelle_proto::stdio::Stream;

use crate::clock::rfc3339_nanos;

/// Longest content of one line of the log, in bytes.
pub const LINE_BYTES: usize = 16 * 1024;

/// Cuts one stream into lines.
#[derive(Debug)]
pub struct Splitter {
    stream: Stream,
    held: Vec<u8>,
}

impl Splitter {
    /// A splitter for output that arrives from now on.
    pub fn new(stream: Stream) -> Self {
        Self { stream, held: Vec::new() }
    }

    /// Takes output and appends the log lines that are complete to `out`.
    pub fn push(&mut self, mut data: &[u8], nanos: i64, out: &mut Vec<u8>) {
        while !data.is_empty() {
            let room = LINE_BYTES.saturating_sub(self.held.len());
            match data.iter().position(|byte| *byte == b'\n') {
                Some(end) if end <= room => {
                    let (line, rest) = data.split_at(end);
                    self.held.extend_from_slice(line);
                    self.emit(b'F', nanos, out);
                    data = rest.get(1..).unwrap_or_default();
                }
                _ => {
                    let (piece, rest) = data.split_at(room.min(data.len()));
                    self.held.extend_from_slice(piece);
                    data = rest;
                    if !data.is_empty() {
                        self.emit(b'P', nanos, out);
                    }
                }
            }
        }
    }

    /// The stream has ended: what is held becomes a partial line.
    pub fn finish(&mut self, nanos: i64, out: &mut Vec<u8>) {
        if !self.held.is_empty() {
            self.emit(b'P', nanos, out);
        }
    }

    /// Bytes taken but not in any line yet.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    fn emit(&mut self, tag: u8, nanos: i64, out: &mut Vec<u8>) {
        out.extend_from_slice(rfc3339_nanos(nanos).as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.stream.to_string().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.append(&mut self.held);
        out.push(b'\n');
    }
}

/// What a log holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measure {
    /// Bytes of standard output.
    pub stdout: u64,
    /// Bytes of standard error.
    pub stderr: u64,
    /// Length of the log up to the end of its last whole line.
    pub whole: u64,
}

impl Measure {
    /// Counts one line of `length` bytes without its newline, which begins with `head`.
    fn add(&mut self, head: &[u8], length: u64) {
        self.whole = self.whole.saturating_add(length).saturating_add(1);
        let mut parts = head.splitn(4, |byte| *byte == b' ');
        let (_, stream, tag, content) = (parts.next(), parts.next(), parts.next(), parts.next());
        let before = content.map_or(length, |content| (head.len() - content.len()) as u64);
        let bytes = length.saturating_sub(before) + u64::from(tag == Some(b"F"));
        match stream {
            Some(b"stdout") => self.stdout = self.stdout.saturating_add(bytes),
            Some(b"stderr") => self.stderr = self.stderr.saturating_add(bytes),
            _ => {}
        }
    }
}

/// As much of a line as tells what it is: a time, the longer stream and a tag take 40 bytes.
const HEAD_BYTES: usize = 64;

/// Counts a log piece by piece. Of a line, however long, it keeps the head.
#[derive(Debug, Default)]
pub struct Counter {
    measure: Measure,
    head: Vec<u8>,
    /// Length of the line so far.
    length: u64,
}

impl Counter {
    /// Counts the next bytes.
    pub fn push(&mut self, data: &[u8]) {
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            let (line, ends) = piece.strip_suffix(b"\n").map_or((piece, false), |line| (line, true));
            let room = HEAD_BYTES.saturating_sub(self.head.len()).min(line.len());
            self.head.extend_from_slice(line.get(..room).unwrap_or_default());
            self.length = self.length.saturating_add(line.len() as u64);
            if ends {
                self.measure.add(&self.head, self.length);
                self.head.clear();
                self.length = 0;
            }
        }
    }

    /// Counts so many zero bytes.
    pub fn push_zeros(&mut self, count: u64) {
        let room = HEAD_BYTES.saturating_sub(self.head.len()) as u64;
        self.head.resize(self.head.len() + room.min(count) as usize, 0);
        self.length = self.length.saturating_add(count);
    }

    /// What was counted, up to the end of the last whole line.
    pub fn measure(&self) -> Measure {
        self.measure
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn measure(log: &[u8]) -> Measure {
        let mut counter = Counter::default();
        counter.push(log);
        counter.measure()
    }

    fn split(chunks: &[Vec<u8>]) -> Vec<u8> {
        let mut splitter = Splitter::new(Stream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, 0, &mut out);
        }
        splitter.finish(0, &mut out);
        out
    }

    #[test]
    fn whole_and_partial_lines_are_told_apart() {
        let log = split(&[b"one\ntw".to_vec(), b"o\n\nend".to_vec()]);
        let text = String::from_utf8(log).unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["stdout F one", "stdout F two", "stdout F ", "stdout P end"]);
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_whole_and_a_longer_one_is_cut() {
        let text = |bytes: usize| String::from_utf8(split(&[[vec![b'x'; bytes], vec![b'\n']].concat()])).unwrap();
        let tags = |text: &str| text.lines().filter_map(|l| l.split(' ').nth(2).map(str::to_owned)).collect::<Vec<_>>();
        assert_eq!(tags(&text(LINE_BYTES)), ["F"]);
        assert_eq!(tags(&text(LINE_BYTES + 1)), ["P", "F"]);
    }

    proptest! {
        // Each case makes and cuts up to 100 kB.
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_log_tells_exactly_what_it_holds(
            chunks in prop::collection::vec(prop::collection::vec(prop_oneof![Just(b'\n'), Just(b' '), any::<u8>()], 0..20_000), 0..6)
        ) {
            let log = split(&chunks);
            let output = chunks.concat();
            let measured = measure(&log);
            prop_assert_eq!(measured.stdout, output.len() as u64);
            prop_assert_eq!(measured.whole, log.len() as u64);
            let mut back = Vec::new();
            for line in log.split_inclusive(|b| *b == b'\n') {
                let content = line.splitn(4, |b| *b == b' ').collect::<Vec<_>>();
                let body = &content[3][..content[3].len() - 1];
                prop_assert!(body.len() <= LINE_BYTES);
                back.extend_from_slice(body);
                if content[2] == b"F" { back.push(b'\n'); }
            }
            prop_assert_eq!(back, output);
        }

        #[test]
        fn any_bytes_can_be_measured_in_any_pieces(
            chunks in prop::collection::vec(prop_oneof![
                prop::collection::vec(prop_oneof![Just(b'\n'), Just(b' '), any::<u8>()], 0..300),
                Just(b"t stdout F x".to_vec()), Just(b"t stderr P y\n".to_vec()), Just(vec![0; 200]),
            ], 0..12)
        ) {
            let bytes = chunks.concat();
            let (mut counter, mut with_holes) = (Counter::default(), Counter::default());
            for chunk in &chunks {
                counter.push(chunk);
                match chunk.iter().all(|byte| *byte == 0) {
                    true => with_holes.push_zeros(chunk.len() as u64),
                    false => with_holes.push(chunk),
                }
            }
            prop_assert_eq!(counter.measure(), measure(&bytes));
            prop_assert_eq!(with_holes.measure(), measure(&bytes));
            prop_assert!(counter.measure().whole <= bytes.len() as u64);
            prop_assert!(counter.head.capacity() <= 4 * HEAD_BYTES);
        }
    }
}
