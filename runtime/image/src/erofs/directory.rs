//! Directory content: entries and names, packed into blocks.
//!
//! A block holds its entries first, sorted by the bytes of their names, then the names in the same order. Blocks are
//! in order too, so that a lookup is two binary searches.

use super::format::{BLOCK, DIRENT, Encoder};

/// A name and what it stands for.
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Bytes of a directory with these names, which must be sorted: full blocks and a shorter last one.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut blocks, mut used) = (0u64, 0);
    for name in names {
        let entry = DIRENT + name.len();
        if used + entry > BLOCK {
            blocks += 1;
            used = 0;
        }
        used += entry;
    }
    blocks * BLOCK as u64 + used as u64
}

/// The content itself, of the length that [`size`] gives.
pub(super) fn encode(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut content = Encoder::default();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fitting = rest.iter().take_while(|entry| {
            used += DIRENT + entry.name.len();
            used <= BLOCK
        });
        let (block, after) = rest.split_at(fitting.count());
        if block.is_empty() {
            // Names have at most 255 bytes, so that one always fits.
            break;
        }
        content.pad(content.0.len().next_multiple_of(BLOCK));
        let mut name_offset = block.len() * DIRENT;
        for entry in block {
            let offset = u16::try_from(name_offset).unwrap_or(u16::MAX);
            content.u64(entry.nid).u16(offset).u8(entry.file_type).u8(0);
            name_offset += entry.name.len();
        }
        for entry in block {
            content.bytes(entry.name);
        }
        rest = after;
    }
    content.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn size_is_what_is_written(lengths in proptest::collection::vec(1usize..=255, 1..300)) {
            let names: Vec<Vec<u8>> = lengths.iter().map(|length| vec![b'n'; *length]).collect();
            let entries: Vec<Entry<'_>> = names.iter().map(|name| Entry { name, nid: 1, file_type: 1 }).collect();
            prop_assert_eq!(size(names.iter().map(Vec::as_slice)), encode(&entries).len() as u64);
        }
    }
}
