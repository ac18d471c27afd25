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
    /// Counts one line, without its newline.
    pub fn add(&mut self, line: &[u8]) {
        self.whole += line.len() as u64 + 1;
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let (_, stream, tag, content) = (parts.next(), parts.next(), parts.next(), parts.next());
        let bytes = content.unwrap_or_default().len() as u64 + u64::from(tag == Some(b"F"));
        match stream {
            Some(b"stdout") => self.stdout += bytes,
            Some(b"stderr") => self.stderr += bytes,
            _ => {}
        }
    }
}

/// Counts a whole log.
pub fn measure(mut log: impl std::io::BufRead) -> std::io::Result<Measure> {
    let mut measure = Measure::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        log.read_until(b'\n', &mut line)?;
        match line.split_last() {
            Some((b'\n', line)) => measure.add(line),
            _ => return Ok(measure),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
            let measured = measure(&log[..]).unwrap();
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
        fn any_bytes_can_be_measured(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let measured = measure(&bytes[..]).unwrap();
            prop_assert!(measured.whole <= bytes.len() as u64);
        }
    }
}
