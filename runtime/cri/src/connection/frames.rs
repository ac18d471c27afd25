//! The frames that a client sends (RFC 9113, 4.1), with the `:authority` of its requests replaced.
//!
//! A header block is held back until it is whole. Everything else passes as it comes. What is no HTTP/2, or breaks a rule
//! that matters here, passes from there on as it is: the server finds the fault and ends the connection.

use super::authority::Authorities;

/// What a client begins with (RFC 9113, 3.4).
const PREFACE: usize = 24;
const HEADER: usize = 9;
/// Longest payload of a frame, as long as the server says nothing else.
const PAYLOAD: usize = 16 << 10;
/// Longest header block in bytes, with its frames: more than the server takes.
const BLOCK: usize = 64 << 10;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
/// Bytes that a stream's priority takes.
const PRIORITY_SIZE: usize = 5;

/// What passes on one connection.
#[derive(Debug)]
pub struct Frames {
    authorities: Authorities,
    state: State,
    /// Of the frame that comes: its header, and its payload if it belongs to a header block.
    frame: Vec<u8>,
    block: Option<Block>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// So many bytes pass.
    Passing(usize),
    /// So many bytes of a frame's header are missing.
    Header(usize),
    /// So many bytes of the payload of a header block's frame are missing.
    Fragment(usize),
    /// Everything passes.
    Blind,
}

/// A header block whose end has not come.
#[derive(Debug)]
struct Block {
    flags: u8,
    stream: [u8; 4],
    priority: Vec<u8>,
    fields: Vec<u8>,
    /// The frames as they came.
    frames: Vec<u8>,
}

impl Default for Frames {
    fn default() -> Self {
        let authorities = Authorities::default();
        Self { authorities, state: State::Passing(PREFACE), frame: Vec::new(), block: None }
    }
}

impl Frames {
    /// Takes what has come, and appends what the server is to have of it.
    pub fn pass(&mut self, mut data: &[u8], out: &mut Vec<u8>) {
        while !data.is_empty() {
            let wanted = match self.state {
                State::Blind => data.len(),
                State::Passing(left) | State::Header(left) | State::Fragment(left) => left,
            };
            let (now, rest) = data.split_at(wanted.min(data.len()));
            data = rest;
            let left = wanted - now.len();
            match self.state {
                State::Blind => out.extend_from_slice(now),
                State::Passing(_) => {
                    out.extend_from_slice(now);
                    self.state = passing(left);
                }
                State::Header(_) => {
                    self.frame.extend_from_slice(now);
                    self.state = State::Header(left);
                    if left == 0 {
                        self.header(out);
                    }
                }
                State::Fragment(_) => {
                    self.frame.extend_from_slice(now);
                    self.state = State::Fragment(left);
                    if left == 0 {
                        self.fragment(out);
                    }
                }
            }
        }
    }

    /// The header of a frame is there.
    fn header(&mut self, out: &mut Vec<u8>) {
        let Ok([high, middle, low, kind, _, stream @ ..]) = <[u8; HEADER]>::try_from(self.frame.as_slice()) else {
            return self.give_up(out);
        };
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        let belongs = match &self.block {
            None => kind == HEADERS,
            // Nothing else may come in between.
            Some(block) if kind != CONTINUATION || stream != block.stream => return self.give_up(out),
            Some(_) => true,
        };
        if !belongs {
            out.append(&mut self.frame);
            self.state = passing(length);
        } else if length > PAYLOAD {
            self.give_up(out);
        } else if length == 0 {
            self.fragment(out);
        } else {
            self.state = State::Fragment(length);
        }
    }

    /// A whole frame of a header block is there.
    fn fragment(&mut self, out: &mut Vec<u8>) {
        self.state = State::Header(HEADER);
        let Some((header, payload)) = self.frame.split_first_chunk::<HEADER>() else { return self.give_up(out) };
        let [.., flags, s0, s1, s2, s3] = *header;
        let stream = [s0, s1, s2, s3];
        match &mut self.block {
            Some(block) => {
                block.fields.extend_from_slice(payload);
                block.frames.append(&mut self.frame);
            }
            None => {
                let Some((priority, fields)) = strip(flags, payload) else { return self.give_up(out) };
                let (priority, fields) = (priority.to_vec(), fields.to_vec());
                let frames = std::mem::take(&mut self.frame);
                self.block = Some(Block { flags, stream, priority, fields, frames });
            }
        }
        if self.block.as_ref().is_some_and(|block| block.frames.len() > BLOCK) {
            return self.give_up(out);
        }
        if flags & END_HEADERS == 0 {
            return;
        }
        let Some(block) = self.block.take() else { return };
        match self.authorities.replace(&block.fields) {
            Ok(fields) => block.write(&fields, out),
            Err(_) => {
                self.block = Some(block);
                self.give_up(out);
            }
        }
    }

    /// Lets through what is held back, and all that comes.
    fn give_up(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.block.take().map(|block| block.frames).unwrap_or_default());
        out.append(&mut self.frame);
        self.state = State::Blind;
    }
}

fn passing(left: usize) -> State {
    if left == 0 { State::Header(HEADER) } else { State::Passing(left) }
}

/// The priority, which may be none, and the fields in the payload of a HEADERS frame (RFC 9113, 6.2).
fn strip(flags: u8, payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let payload = match flags & PADDED {
        0 => payload,
        _ => {
            let (padding, rest) = payload.split_first()?;
            rest.get(..rest.len().checked_sub(usize::from(*padding))?)?
        }
    };
    payload.split_at_checked(if flags & PRIORITY == 0 { 0 } else { PRIORITY_SIZE })
}

impl Block {
    /// Writes the block with other fields.
    fn write(&self, fields: &[u8], out: &mut Vec<u8>) {
        let mut rest = [&self.priority, fields].concat();
        let mut kind = HEADERS;
        loop {
            let next = rest.split_off(rest.len().min(PAYLOAD));
            let flags = match kind {
                HEADERS => self.flags & !(PADDED | END_HEADERS),
                _ => 0,
            };
            let flags = if next.is_empty() { flags | END_HEADERS } else { flags };
            let [_, length @ ..] = (rest.len() as u32).to_be_bytes();
            out.extend_from_slice(&length);
            out.extend_from_slice(&[kind, flags]);
            out.extend_from_slice(&self.stream);
            out.append(&mut rest);
            if next.is_empty() {
                return;
            }
            (rest, kind) = (next, CONTINUATION);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRI: &[u8; PREFACE] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const PATH: &[u8] = b"\x83\x41\x02/x";
    const HOST: &[u8] = b"\x83\x41\x01n";

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// What the server gets, if all comes in pieces of `size`.
    fn passed(frames: &[Vec<u8>], size: usize) -> Vec<u8> {
        let (mut all, mut out) = (Frames::default(), Vec::new());
        let sent = [&PRI[..], &frames.concat()].concat();
        sent.chunks(size).for_each(|piece| all.pass(piece, &mut out));
        out.split_off(PREFACE)
    }

    #[test]
    fn requests_have_a_host_and_all_else_stays() {
        let settings = frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]);
        let data = frame(0, 1, 1, PATH);
        let empty = frame(4, 1, 0, &[]);
        let sent = [settings.clone(), empty.clone(), frame(HEADERS, 4, 1, PATH), data.clone(), empty.clone()];
        let expected = [settings, empty.clone(), frame(HEADERS, 4, 1, HOST), data, empty].concat();
        for size in 1..40 {
            assert_eq!(passed(&sent, size), expected, "in pieces of {size}");
        }
    }

    #[test]
    fn blocks_in_pieces_padded_and_with_a_priority_are_put_together() {
        let priority = [0, 0, 0, 0, 7];
        let first = [&[2][..], &priority, &PATH[..2], &[0, 0]].concat();
        let sent = [
            frame(HEADERS, PADDED | PRIORITY | 1, 3, &first),
            frame(CONTINUATION, 0, 3, &[]),
            frame(CONTINUATION, END_HEADERS, 3, &PATH[2..]),
        ];
        let expected = frame(HEADERS, PRIORITY | 1 | END_HEADERS, 3, &[&priority, HOST].concat());
        assert_eq!(passed(&sent, 7), expected);
    }

    #[test]
    fn a_long_block_is_cut_again() {
        let long = [&b"\x00\x01a\x7f\xe1\x9a\x01"[..], &vec![b'v'; 20_000 - 224 + 224]].concat();
        let mut long = long;
        // The length of the value, 20000, is 127 + 19873.
        long[4..7].copy_from_slice(&[0x80 | (19_873_u32 & 0x7f) as u8, 0x80 | (19_873_u32 >> 7 & 0x7f) as u8, 1]);
        let (head, tail) = long.split_at(10_000);
        let sent = [frame(HEADERS, 0, 1, head), frame(CONTINUATION, END_HEADERS, 1, tail)];
        let (head, tail) = long.split_at(PAYLOAD);
        let expected = [frame(HEADERS, 0, 1, head), frame(CONTINUATION, END_HEADERS, 1, tail)].concat();
        assert_eq!(passed(&sent, 4096), expected);
    }

    #[test]
    fn what_breaks_the_rules_passes_as_it_is() {
        let cut_off = frame(HEADERS, END_HEADERS, 1, &PATH[..3]);
        let padding = frame(HEADERS, END_HEADERS | PADDED, 1, &[9, 0]);
        let too_long = frame(HEADERS, END_HEADERS, 1, &vec![0x83; PAYLOAD + 1]);
        let between = [frame(HEADERS, 0, 1, PATH), frame(0, 0, 1, b"x")].concat();
        let endless = [frame(HEADERS, 0, 1, PATH), frame(CONTINUATION, 0, 1, &[0x83; 9000]).repeat(8)].concat();
        for broken in [cut_off, padding, too_long, between, endless] {
            let sent = [broken, frame(HEADERS, END_HEADERS, 3, PATH)];
            assert_eq!(passed(&sent, 1000), sent.concat());
        }
    }

    proptest! {
        #[test]
        fn nothing_depends_on_the_pieces(noise in proptest::collection::vec(0_u8..12, 0..200), size in 1_usize..64) {
            prop_assert_eq!(passed(std::slice::from_ref(&noise), size), passed(std::slice::from_ref(&noise), 4096));
        }
    }
}
