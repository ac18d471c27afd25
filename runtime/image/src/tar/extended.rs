//! Pax extended headers: records that override the fields of the next header.

use super::header::number as octal;
use super::{Extent, sparse};

/// The pax headers and GNU long names of one entry may have this many bytes together. Linux limits a path to 4096 bytes and an attribute's
/// value to 65536, so an honest header is far smaller.
pub(super) const MAX_EXTENDED: u64 = 1 << 20;

/// Extended attributes of one entry; Linux cannot list more than 64 KiB of names.
const MAX_XATTRS: usize = 1024;

/// What the extended headers before an entry said about it.
#[derive(Default)]
pub(super) struct Overrides {
    pub(super) name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` records.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    pub(super) map: Option<Vec<Extent>>,
    pending_offset: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
}

impl Overrides {
    /// Applies the records of a pax header. An empty value takes a record back, as POSIX says.
    pub(super) fn apply(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        while !records.is_empty() {
            let (key, value, rest) = record(records).ok_or("a pax record is malformed")?;
            self.apply_record(key, value)?;
            records = rest;
        }
        Ok(())
    }

    fn apply_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let given = !value.is_empty();
        match key {
            b"path" => self.name = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = if given { Some(decimal(value).ok_or("a pax size is not a number")?) } else { None },
            b"uid" => self.uid = owner(value)?,
            b"gid" => self.gid = owner(value)?,
            b"mtime" => self.mtime = if given { Some(time(value).ok_or("a pax mtime is not a time")?) } else { None },
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    if self.xattrs.len() >= MAX_XATTRS {
                        return Err("an entry has more than 1024 extended attributes");
                    }
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.apply_record(key, value)?;
                }
            }
        }
        Ok(())
    }
}

impl PaxSparse {
    fn apply_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || decimal(value).ok_or("a GNU.sparse record is not a number");
        match key {
            b"name" => self.name = text(value)?,
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"map" => {
                let mut numbers = value.split(|&b| b == b',');
                let mut map = Vec::new();
                while let Some(offset) = numbers.next().filter(|text| !text.is_empty()) {
                    let length = numbers.next().and_then(decimal).ok_or("the sparse map has an odd count")?;
                    let offset = decimal(offset).ok_or("the sparse map holds something else than numbers")?;
                    sparse::push(&mut map, Extent { offset, length })?;
                }
                self.map = Some(map);
            }
            b"offset" => self.pending_offset = Some(number()?),
            b"numbytes" => {
                let offset = self.pending_offset.take().ok_or("a sparse extent has no offset")?;
                sparse::push(self.map.get_or_insert_default(), Extent { offset, length: number()? })?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Version 1.0: the map stands before the content.
    pub(super) fn map_in_content(&self) -> bool {
        (self.major, self.minor) == (Some(1), Some(0))
    }

    /// Whether the entry is sparse in one of the pax ways.
    pub(super) fn is_used(&self) -> bool {
        self.map_in_content() || self.map.is_some()
    }
}

/// Splits off `LENGTH KEY=VALUE\n`; the length counts itself.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let digits = records.iter().take(20).position(|&b| b == b' ')?;
    let length = usize::try_from(decimal(records.get(..digits)?)?).ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let body = record.get(digits + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&b| b == b'=')?;
    let (key, value) = (body.get(..equals)?, body.get(equals + 1..)?);
    (!key.is_empty()).then_some((key, value, rest))
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
    if value.contains(&0) {
        return Err("a name holds a NUL byte");
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn owner(value: &[u8]) -> Result<Option<u32>, &'static str> {
    if value.is_empty() {
        return Ok(None);
    }
    let id = decimal(value).and_then(|id| u32::try_from(id).ok());
    id.map(Some).ok_or("an owner is not a number of 32 bits")
}

/// Plain decimal digits.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    let mut value = 0u64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))?;
    }
    Some(value)
}

/// `[-]SECONDS[.FRACTION]`, rounded down to nanoseconds.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&b| b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    let (mut nanoseconds, mut unit, mut lost) = (0u32, 100_000_000u32, false);
    for digit in fraction {
        if !digit.is_ascii_digit() {
            return None;
        }
        nanoseconds += u32::from(digit - b'0') * unit;
        lost |= unit == 0 && *digit != b'0';
        unit /= 10;
    }
    if !negative {
        return Some((seconds, nanoseconds));
    }
    // Rounding down a negative time moves away from zero.
    let nanoseconds = nanoseconds + u32::from(lost);
    match nanoseconds {
        0 => Some((-seconds, 0)),
        1_000_000_000 => Some((-seconds - 1, 0)),
        _ => Some((-seconds - 1, 1_000_000_000 - nanoseconds)),
    }
}

/// An owner in a header. Some systems' nobody is negative: Linux has the same 32 bits for it. -1 is nobody's id, and means
/// what an unpacker's own files have.
pub(super) fn header_owner(field: Option<i128>) -> Option<u32> {
    match field? {
        -1 => Some(0),
        value => u32::try_from(value).ok().or_else(|| i32::try_from(value).ok().map(i32::cast_unsigned)),
    }
}

/// A number of a GNU sparse map in a header.
pub(super) fn sparse_number(field: &[u8]) -> Option<u64> {
    octal(field).and_then(|value| u64::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pax(key: &str, value: &[u8]) -> Vec<u8> {
        let body = 3 + key.len() + value.len();
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn records_override_and_take_back() {
        let mut overrides = Overrides::default();
        let records = [
            pax("path", b"a/b"),
            pax("uid", b"4294967295"),
            pax("mtime", b"1.5"),
            pax("comment", b"x=y"),
            pax("SCHILY.xattr.user.a", b"1\n2\0"),
            pax("SCHILY.xattr.user.a", b"3"),
        ];
        overrides.apply(&records.concat()).unwrap();
        assert_eq!(overrides.name.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(overrides.uid, Some(u32::MAX));
        assert_eq!(overrides.mtime, Some((1, 500_000_000)));
        assert_eq!(overrides.xattrs, [(b"user.a".to_vec(), b"3".to_vec())]);
        overrides.apply(&pax("path", b"")).unwrap();
        assert_eq!(overrides.name, None);
    }

    #[test]
    fn owners_have_32_bits_of_either_sign() {
        for (field, owner) in [
            (Some(7), Some(7)),
            (Some(4_294_967_295), Some(u32::MAX)),
            (Some(-2), Some(4_294_967_294)),
            (Some(-1), Some(0)),
            (Some(1 << 32), None),
            (Some(-(1 << 31) - 1), None),
            (None, None),
        ] {
            assert_eq!(header_owner(field), owner, "{field:?}");
        }
    }

    #[test]
    fn the_version_of_a_sparse_file_has_no_order() {
        let parts = [pax("GNU.sparse.major", b"1"), pax("GNU.sparse.minor", b"0")];
        for order in [[0, 1], [1, 0]] {
            let mut overrides = Overrides::default();
            overrides.apply(&order.map(|part: usize| parts[part].clone()).concat()).unwrap();
            assert!(overrides.sparse.map_in_content());
        }
    }

    #[test]
    fn times_round_down() {
        for (text, expected) in [
            ("0", Some((0, 0))),
            ("12.000000001", Some((12, 1))),
            ("12.0000000019", Some((12, 1))),
            ("-1", Some((-1, 0))),
            ("-1.5", Some((-2, 500_000_000))),
            ("-0.9999999999", Some((-1, 0))),
            ("", None),
            (".", None),
            ("1.x", None),
            ("--1", None),
            ("9999999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Overrides::default().apply(&bytes);
        }

        #[test]
        fn any_record_is_read_back(key in "[a-z.A-Z]{1,30}", value in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = pax(&key, &value);
            let (read_key, read_value, rest) = record(&bytes).expect("well-formed");
            prop_assert_eq!(read_key, key.as_bytes());
            prop_assert_eq!(read_value, &value[..]);
            prop_assert!(rest.is_empty());
        }
    }
}
