//! Output that may still have to be sent again.

use std::collections::VecDeque;

/// The part of a stream between what the host has made durable and what the process has
/// written. Offsets count bytes from the start of the stream.
#[derive(Debug)]
pub struct Buffer {
    bytes: VecDeque<u8>,
    start: u64,
    capacity: usize,
}

/// An offset outside of what the buffer holds.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is not in the {start} to {end} that the stream holds")]
pub struct OutOfRange {
    offset: u64,
    start: u64,
    end: u64,
}

impl OutOfRange {
    /// First byte that is held, if the one asked for lies before it.
    pub fn acknowledged(&self) -> Option<u64> {
        (self.offset < self.start).then_some(self.start)
    }
}

impl Buffer {
    /// An empty buffer for up to `capacity` bytes. It takes memory as it fills.
    pub fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), start: 0, capacity }
    }

    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// How many bytes still fit.
    pub fn free(&self) -> usize {
        self.capacity.saturating_sub(self.bytes.len())
    }

    /// Appends as much of `bytes` as fits; answers how much that was.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let taken = &bytes[..bytes.len().min(self.free())];
        self.bytes.extend(taken);
        taken.len()
    }

    /// Drops everything below `offset`. Acknowledging less than before is fine.
    pub fn acknowledge(&mut self, offset: u64) -> Result<(), OutOfRange> {
        if offset > self.end() {
            return Err(self.out_of_range(offset));
        }
        let count = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.drain(..count.min(self.bytes.len()));
        self.start = self.start.max(offset);
        // A burst should not pin its memory for the rest of the process's life.
        if self.bytes.is_empty() && self.bytes.capacity() > self.capacity / 8 {
            self.bytes = VecDeque::new();
        }
        Ok(())
    }

    /// Bytes from `offset` on: not all of them, but some unless `offset` is the end.
    pub fn bytes_from(&self, offset: u64) -> Result<&[u8], OutOfRange> {
        if offset < self.start || offset > self.end() {
            return Err(self.out_of_range(offset));
        }
        let skip = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let (front, back) = self.bytes.as_slices();
        let bytes = if skip < front.len() { front.get(skip..) } else { back.get(skip - front.len()..) };
        Ok(bytes.unwrap_or_default())
    }

    fn out_of_range(&self, offset: u64) -> OutOfRange {
        OutOfRange { offset, start: self.start, end: self.end() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Push(Vec<u8>),
        Acknowledge(u64),
        Read(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Push),
            (0u64..200).prop_map(Step::Acknowledge),
            (0u64..200).prop_map(Step::Read),
        ]
    }

    proptest! {
        /// Against the obvious model: the whole stream in one vector.
        #[test]
        fn holds_exactly_what_is_not_acknowledged(steps in proptest::collection::vec(step(), 0..60), capacity in 1usize..64) {
            let mut buffer = Buffer::new(capacity);
            let mut stream: Vec<u8> = Vec::new();
            let mut acknowledged = 0usize;
            for step in steps {
                match step {
                    Step::Push(bytes) => {
                        let room = capacity - (stream.len() - acknowledged);
                        let taken = buffer.push(&bytes);
                        prop_assert_eq!(taken, bytes.len().min(room));
                        stream.extend(&bytes[..taken]);
                    }
                    Step::Acknowledge(offset) => {
                        let result = buffer.acknowledge(offset);
                        prop_assert_eq!(result.is_ok(), offset <= stream.len() as u64);
                        if result.is_ok() {
                            acknowledged = acknowledged.max(offset as usize);
                        }
                    }
                    Step::Read(offset) => {
                        let held = (acknowledged as u64..=stream.len() as u64).contains(&offset);
                        match buffer.bytes_from(offset) {
                            Ok(bytes) => {
                                prop_assert!(held);
                                let rest = &stream[offset as usize..];
                                prop_assert!(rest.starts_with(bytes));
                                prop_assert_eq!(bytes.is_empty(), rest.is_empty());
                            }
                            Err(_) => prop_assert!(!held),
                        }
                    }
                }
                prop_assert_eq!(buffer.end(), stream.len() as u64);
                prop_assert_eq!(buffer.free(), capacity - (stream.len() - acknowledged));
            }
        }
    }

    #[test]
    fn an_emptied_buffer_gives_its_memory_back() {
        let mut buffer = Buffer::new(1 << 20);
        buffer.push(&vec![1; 1 << 20]);
        buffer.acknowledge(1 << 20).unwrap();
        assert_eq!(buffer.bytes.capacity(), 0);
    }
}
