//! The 512-byte header block: fixed fields, octal and base-256 numbers.

use super::BLOCK;

/// A header whose checksum holds.
#[derive(Clone)]
pub(super) struct Header([u8; BLOCK]);

/// Which dialect decides what the bytes beyond 257 mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
}

impl Header {
    /// Takes a block that is not all zeros.
    pub(super) fn parse(block: [u8; BLOCK]) -> Result<Self, &'static str> {
        let header = Self(block);
        let stored = header.number(148, 8).ok_or("the header's checksum is not a number")?;
        let (mut unsigned, mut signed) = (0u64, 0i64);
        for (at, &byte) in header.0.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { byte };
            unsigned += u64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        // Some historic archivers summed signed bytes.
        if stored == i128::from(unsigned) || stored == i128::from(signed) {
            Ok(header)
        } else {
            Err("the header's checksum is wrong")
        }
    }

    fn field(&self, offset: usize, length: usize) -> &[u8] {
        self.0.get(offset..offset + length).unwrap_or_default()
    }

    /// The bytes of a field that only some types have.
    pub(super) fn raw(&self, offset: usize, length: usize) -> &[u8] {
        self.field(offset, length)
    }

    /// Bytes up to the first NUL.
    pub(super) fn text(&self, offset: usize, length: usize) -> &[u8] {
        let field = self.field(offset, length);
        field.split(|&b| b == 0).next().unwrap_or_default()
    }

    /// A numeric field; an empty one is 0. None when it is no number or outside 64 bits.
    pub(super) fn number(&self, offset: usize, length: usize) -> Option<i128> {
        number(self.field(offset, length))
    }

    pub(super) fn dialect(&self) -> Dialect {
        match self.field(257, 8) {
            b"ustar  \0" => Dialect::Gnu,
            magic if magic.starts_with(b"ustar\0") => Dialect::Ustar,
            _ => Dialect::V7,
        }
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or(0)
    }

    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = if self.dialect() == Dialect::Ustar { self.text(345, 155) } else { &[] };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> &[u8] {
        self.text(157, 100)
    }

    pub(super) fn mode(&self) -> Option<i128> {
        self.number(100, 8)
    }

    pub(super) fn uid(&self) -> Option<i128> {
        self.number(108, 8)
    }

    pub(super) fn gid(&self) -> Option<i128> {
        self.number(116, 8)
    }

    pub(super) fn size(&self) -> Option<i128> {
        self.number(124, 12)
    }

    pub(super) fn mtime(&self) -> Option<i128> {
        self.number(136, 12)
    }

    /// Major and minor of a device, which V7 headers do not have. None when they are no numbers.
    pub(super) fn device(&self) -> Option<(i128, i128)> {
        if self.dialect() == Dialect::V7 { Some((0, 0)) } else { Some((self.number(329, 8)?, self.number(337, 8)?)) }
    }
}

/// Octal text padded by spaces and NULs, or, with the top bit set, a big-endian two's complement.
pub(super) fn number(field: &[u8]) -> Option<i128> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (at, &byte) in field.iter().enumerate() {
            let byte = match (at, negative) {
                (0, false) => byte & 0x7f,
                _ => byte,
            };
            value = value.checked_mul(256)? | i128::from(byte);
            if i64::try_from(value).is_err() {
                return None;
            }
        }
        return Some(value);
    }
    // Padded on either side, as Go reads it.
    let begin = field.iter().position(|b| !matches!(b, 0 | b' ')).unwrap_or(field.len());
    let text = field.get(begin..).and_then(|rest| rest.split(|&b| b == 0).next()).unwrap_or_default().trim_ascii();
    let mut value = 0i128;
    for &digit in text {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        value = value * 8 + i128::from(digit - b'0');
        if i64::try_from(value).is_err() {
            return None;
        }
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        for (field, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"    644 ", Some(0o644)),
            (b"644\0\0\0\0x", Some(0o644)),
            (b"\0\0 0001750", Some(0o1750)),
            (b"\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777777", Some(0o77_777_777_777)),
            (b"648\0", None),
            (b"-1\0\0", None),
            (b"\x80\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff", Some(-1)),
            (b"\x80\0\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX as i128)),
            (b"\x80\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x7f", None),
            (b"", None),
        ] {
            assert_eq!(number(field), expected, "{field:?}");
        }
    }

    #[test]
    fn a_flipped_bit_breaks_the_checksum() {
        let mut good = tar::Header::new_ustar();
        good.set_size(3);
        good.set_cksum();
        let mut block = *good.as_bytes();
        assert!(Header::parse(block).is_ok());
        block[0] ^= 1;
        assert!(Header::parse(block).is_err());
    }
}
