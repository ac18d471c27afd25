//! Maps of sparse files: which stretches of a file are stored.

use super::Extent;
use super::extended::{decimal, sparse_number};

/// Extents that one file may have; with more, the map would cost more than it saves.
const MAX_EXTENTS: usize = 1 << 16;

/// Adds an extent, keeping the map ascending and free of overlaps. Empty extents only mark the end and are dropped.
pub(super) fn push(map: &mut Vec<Extent>, extent: Extent) -> Result<(), &'static str> {
    let end = extent.offset.checked_add(extent.length).ok_or("a sparse extent ends beyond 64 bits")?;
    let begin = map.last().map_or(0, |last| last.offset + last.length);
    if extent.offset < begin {
        return Err("the sparse map is not in order");
    }
    if map.len() >= MAX_EXTENTS {
        return Err("the sparse map has more than 65536 extents");
    }
    if end > extent.offset {
        map.push(extent);
    }
    Ok(())
}

/// Checks that a finished map describes exactly `stored` bytes within a file of `size` bytes.
pub(super) fn check(map: &[Extent], size: u64, stored: u64) -> Result<(), &'static str> {
    let total = map.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.length));
    if total != Some(stored) {
        return Err("the sparse map does not match the stored size");
    }
    match map.last() {
        Some(last) if last.offset + last.length > size => Err("the sparse map reaches beyond the file's end"),
        _ => Ok(()),
    }
}

/// Reads the (offset, length) pairs of 24 bytes in an old GNU header or its continuation.
pub(super) fn gnu_pairs(fields: &[u8], map: &mut Vec<Extent>) -> Result<(), &'static str> {
    for pair in fields.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if length.first() == Some(&0) && offset.first() == Some(&0) {
            break;
        }
        let offset = sparse_number(offset).ok_or("a sparse offset is not a number")?;
        let length = sparse_number(length).ok_or("a sparse length is not a number")?;
        push(map, Extent { offset, length })?;
    }
    Ok(())
}

/// The text map of pax sparse format 1.0: the number of extents, then offsets and lengths, a line each.
#[derive(Default)]
pub(super) struct TextMap {
    line: Vec<u8>,
    expected: Option<u64>,
    offset: Option<u64>,
    pub(super) map: Vec<Extent>,
    seen: u64,
}

impl TextMap {
    /// Takes one block of the map; true when the map is complete.
    pub(super) fn block(&mut self, block: &[u8]) -> Result<bool, &'static str> {
        for &byte in block {
            if byte != b'\n' {
                if self.line.len() >= 20 {
                    return Err("a line of the sparse map is too long");
                }
                self.line.push(byte);
                continue;
            }
            let number = decimal(&self.line).ok_or("the sparse map holds something else than numbers")?;
            self.line.clear();
            match (self.expected, self.offset.take()) {
                (None, _) => self.expected = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => {
                    push(&mut self.map, Extent { offset, length: number })?;
                    self.seen += 1;
                    // Empty extents are not kept, so they are bounded here.
                    if self.seen > MAX_EXTENTS as u64 {
                        return Err("the sparse map has more than 65536 extents");
                    }
                }
            }
            if self.expected == Some(self.seen) && self.offset.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_ordered_and_bounded() {
        let mut map = vec![Extent { offset: 0, length: 10 }];
        assert!(push(&mut map, Extent { offset: 9, length: 1 }).is_err());
        assert!(push(&mut map, Extent { offset: u64::MAX, length: 1 }).is_err());
        push(&mut map, Extent { offset: 20, length: 5 }).unwrap();
        push(&mut map, Extent { offset: 30, length: 0 }).unwrap();
        assert_eq!(map.len(), 2);
        assert!(check(&map, 25, 15).is_ok());
        assert!(check(&map, 24, 15).is_err());
        assert!(check(&map, 25, 16).is_err());
    }

    #[test]
    fn text_maps_end_where_they_say() {
        let mut text = TextMap::default();
        assert_eq!(text.block(b"2\n0\n5\n1"), Ok(false));
        assert_eq!(text.block(b"0\n7\n"), Ok(true));
        assert_eq!(text.map, [Extent { offset: 0, length: 5 }, Extent { offset: 10, length: 7 }]);
        assert_eq!(TextMap::default().block(b"0\n"), Ok(true));
        assert!(TextMap::default().block(b"x\n").is_err());
        assert!(TextMap::default().block(&[b'1'; 100]).is_err());
    }
}
