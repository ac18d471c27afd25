//! The `:authority` in a header block of HPACK (RFC 7541), and one that is a host's name in its place.
//!
//! A block is walked field by field and copied. Nothing of it is decoded but numbers and the lengths of strings: Huffman's
//! code matters in names only, and of those only one.
//!
//! The server's table of fields that a block can refer to must go on to match the client's. So a field that enters the
//! table still does. Its new value is no longer than the client's: then a field may stay in the server's table for longer
//! than in the client's, which refers to it no more, but never leaves it earlier. (An empty value becomes one byte longer, if
//! a client enters one although it could name the pair of name and empty value that the static table has.)

use std::collections::VecDeque;

/// The fields that the static table has (RFC 7541, appendix A).
const STATIC: usize = 61;
/// The first of them is `:authority`, with an empty value.
const AUTHORITY: usize = 1;
const NAME: &[u8] = b":authority";
/// The same in Huffman's code (RFC 7541, appendix B).
const NAME_CODED: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// The new value, a string of one byte that is not coded.
const VALUE: [u8; 2] = [1, b'n'];
/// As many fields has the table of a server that says nothing of its size, 4096, of which each takes 32 beside its name and
/// value.
const TABLE: usize = 4096 / 32;

/// What the blocks of one connection have led to.
#[derive(Debug, Default)]
pub struct Authorities {
    /// Of the fields in the table, the newest first, which is an `:authority`.
    table: VecDeque<bool>,
}

/// A block ends in the middle of a field, or has a number that is none.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

impl Authorities {
    /// A block without the client's `:authority`, or with a host's in its place. Blocks have to come in their order.
    ///
    /// # Errors
    /// If it is no block.
    pub fn replace(&mut self, block: &[u8]) -> Result<Vec<u8>, Malformed> {
        let (mut out, mut input) = (Vec::with_capacity(block.len() + VALUE.len()), Input { rest: block });
        while let Some(first) = input.rest.first().copied() {
            let start = input.rest;
            match first {
                // A whole field of a table. That of the static one is empty, which no host is.
                0x80.. => {
                    if input.number(7)? == AUTHORITY {
                        continue;
                    }
                }
                // One that enters the table.
                0x40.. => {
                    let authority = self.name(&mut input, 6)?;
                    let name = consumed(start, &input);
                    input.string()?;
                    self.table.push_front(authority);
                    self.table.truncate(TABLE);
                    if authority {
                        out.extend_from_slice(name);
                        out.extend_from_slice(&VALUE);
                        continue;
                    }
                }
                // A new size of the table.
                0x20.. => drop(input.number(5)?),
                // One that does not enter it. A request needs none.
                _ => {
                    let authority = self.name(&mut input, 4)?;
                    input.string()?;
                    if authority {
                        continue;
                    }
                }
            }
            out.extend_from_slice(consumed(start, &input));
        }
        Ok(out)
    }

    /// Takes the name of a field, by number or in letters, and returns whether it is `:authority`.
    fn name(&self, input: &mut Input<'_>, bits: u32) -> Result<bool, Malformed> {
        match input.number(bits)? {
            0 => {
                let (coded, name) = input.string()?;
                Ok(name == if coded { NAME_CODED } else { NAME })
            }
            index => Ok(match index.checked_sub(STATIC + 1) {
                Some(index) => self.table.get(index).copied().unwrap_or_default(),
                None => index == AUTHORITY,
            }),
        }
    }
}

/// What has been taken since `start`.
fn consumed<'a>(start: &'a [u8], input: &Input<'_>) -> &'a [u8] {
    start.get(..start.len().saturating_sub(input.rest.len())).unwrap_or_default()
}

struct Input<'a> {
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.rest.split_first().ok_or(Malformed)?;
        self.rest = rest;
        Ok(*first)
    }

    /// A number that begins in the lowest `bits` of the next byte (RFC 7541, 5.1).
    fn number(&mut self, bits: u32) -> Result<usize, Malformed> {
        let most = (1_u8 << bits) - 1;
        let first = self.byte()? & most;
        let mut number = usize::from(first);
        if first < most {
            return Ok(number);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            number += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed)
    }

    /// A string as it is written, and whether it is in Huffman's code (RFC 7541, 5.2).
    fn string(&mut self) -> Result<(bool, &'a [u8]), Malformed> {
        let coded = self.rest.first().ok_or(Malformed)? & 0x80 != 0;
        let length = self.number(7)?;
        let (string, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok((coded, string))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replaced(blocks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut authorities = Authorities::default();
        blocks.iter().map(|block| authorities.replace(block).unwrap()).collect()
    }

    /// A literal with a name of a table.
    fn literal(first: u8, value: &[u8]) -> Vec<u8> {
        [&[first, value.len() as u8][..], value].concat()
    }

    #[test]
    fn a_path_becomes_a_host_and_other_fields_stay() {
        let path = literal(0x41, b"/run/nacelle/nacelle.sock");
        let rest = [0x83, 0x86, 0x44, 2, b'/', b'a', 0x5f, 0x82, 0x11, 0x22];
        let block = [&[0x3f, 0xe1, 0x1f][..], &path, &rest].concat();
        let expected = [&[0x3f, 0xe1, 0x1f, 0x41, 1, b'n'][..], &rest].concat();
        assert_eq!(replaced(&[&block]), [expected]);
    }

    #[test]
    fn one_that_enters_no_table_is_left_out() {
        for first in [0x01, 0x11] {
            let block = [&[0x83][..], &literal(first, b"a%2Fb"), &[0x86]].concat();
            assert_eq!(replaced(&[&block]), [[0x83, 0x86]]);
        }
        // Empty, as old clients in Go have it.
        assert_eq!(replaced(&[&[0x83, 0x81, 0x86]]), [[0x83, 0x86]]);
    }

    #[test]
    fn the_name_is_known_however_it_is_written() {
        let coded = [&[0x40, 0x88][..], NAME_CODED].concat();
        let plain = [&[0x40, 10][..], NAME].concat();
        for name in [coded, plain] {
            let block = [&name[..], b"\x02/x"].concat();
            assert_eq!(replaced(&[&block]), [[&name[..], b"\x01n"].concat()]);
        }
        // By its number in the table, which a field that came later has moved: that has the lowest now.
        let first = [&literal(0x41, b"/x")[..], b"\x40\x02te\x08trailers"].concat();
        let second = [&[0x7f, 0x00][..], b"\x02/y", &literal(0x7f, b"")[..1], b"\x00\x01z"].concat();
        let expected = [0x7f, 0x00, 1, b'n', 0x7f, 0x00, 1, b'z'];
        assert_eq!(replaced(&[&first, &second])[1], expected, "63 is `te` after the field was entered again");
        let third = [&first[..], &literal(0x7e, b"z")].concat();
        assert_eq!(
            replaced(&[&third])[0],
            [b"\x41\x01n\x40\x02te\x08trailers".as_slice(), &literal(0x7e, b"z")].concat()
        );
    }

    #[test]
    fn the_coded_name_is_what_the_code_makes_of_it() {
        // Codes and their lengths in bits of the letters, from the table in RFC 7541.
        let code = |letter| match letter {
            b':' => (0x5c, 7),
            b'a' => (0x3, 5),
            b'u' => (0x2d, 6),
            b't' => (0x9, 5),
            b'h' => (0x27, 6),
            b'o' => (0x7, 5),
            b'r' => (0x2c, 6),
            b'i' => (0x6, 5),
            _ => (0x7a, 7),
        };
        let (bits, length) = NAME.iter().fold((0_u64, 0), |(bits, length), letter| {
            let (code, width) = code(*letter);
            (bits << width | code, length + width)
        });
        let padding = usize::next_multiple_of(length, 8) - length;
        let coded = bits << padding | ((1 << padding) - 1);
        assert_eq!(&coded.to_be_bytes()[8 - (length + padding) / 8..], NAME_CODED);
    }

    #[test]
    fn what_is_cut_off_is_malformed() {
        let whole = [&literal(0x41, b"/run/x")[..], b"\x40\x02te\x08trailers"].concat();
        for length in [1, 2, 5, 9, 11, 13, whole.len() - 1] {
            assert_eq!(Authorities::default().replace(&whole[..length]), Err(Malformed), "{length}");
        }
        assert_eq!(Authorities::default().replace(&[0xff; 6]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn what_has_been_replaced_stays(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..4)) {
            let (mut once, mut twice) = (Authorities::default(), Authorities::default());
            for block in blocks {
                let Ok(out) = once.replace(&block) else { break };
                prop_assert_eq!(twice.replace(&out), Ok(out));
            }
        }
    }
}
