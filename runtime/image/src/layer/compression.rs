//! Compression of a layer, told by its first bytes: media types in the wild are not reliable.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use super::LayerError;

const GZIP: [u8; 3] = [0x1f, 0x8b, 0x08];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Skippable frames may come first; the low nibble of the first byte varies.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// Largest zstd window, as a power of two: what `zstd` itself accepts without being told. Bounds memory.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Compressions that are none of a layer's, but are made now and then: how they begin, and their names.
const OTHERS: [(&[u8], &str); 3] = [(b"\xfd7zXZ\0", "xz"), (b"BZh91AY&SY", "bzip2"), (b"\x04\x22\x4d\x18", "lz4")];

type Input<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// The archive within a layer's bytes.
pub(super) enum Decoder<R: Read> {
    Plain(Input<R>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(Box<zstd::Decoder<'static, Input<R>>>),
}

impl<R: Read> Decoder<R> {
    /// Looks at the first bytes of `input`.
    ///
    /// # Errors
    /// [`LayerError::Compression`] with the name of a compression that layers may not have, or why `input` cannot be
    /// read.
    pub(super) fn new(mut input: R) -> Result<Self, LayerError> {
        let mut start = Vec::with_capacity(10);
        input.by_ref().take(10).read_to_end(&mut start).map_err(LayerError::Input)?;
        if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(LayerError::Compression(name));
        }
        let gzip = start.starts_with(&GZIP);
        let skippable = start.first().is_some_and(|b| b & 0xf0 == 0x50) && start.get(1..4) == Some(&ZSTD_SKIPPABLE[..]);
        let zstd = start.starts_with(&ZSTD) || skippable;
        let input = BufReader::with_capacity(64 << 10, Cursor::new(start).chain(input));
        if gzip {
            return Ok(Self::Gzip(Box::new(MultiGzDecoder::new(input))));
        }
        if zstd {
            let mut decoder = zstd::Decoder::with_buffer(input).map_err(LayerError::Input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(LayerError::Input)?;
            return Ok(Self::Zstd(Box::new(decoder)));
        }
        Ok(Self::Plain(input))
    }

    /// Reads what is left of the compressed stream after its end, and gives its length.
    pub(super) fn drain(self) -> io::Result<u64> {
        let mut input = match self {
            Self::Plain(input) => input,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        };
        let mut rest = 0;
        loop {
            let length = input.fill_buf()?.len();
            if length == 0 {
                return Ok(rest);
            }
            rest += length as u64;
            input.consume(length);
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(input) => input.read(buffer),
            Self::Gzip(input) => input.read(buffer),
            Self::Zstd(input) => input.read(buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn decode(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::new(bytes).map_err(io::Error::other)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_is_recognised() {
        let text = vec![7; 100_000];
        let zstd = zstd::encode_all(&text[..], 3).unwrap();
        let skippable = [&[0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zstd].concat();
        let half = text.len() / 2;
        // Parallel compressors write several members.
        let members = [gzip(&text[..half]), gzip(&text[half..])].concat();
        for encoded in [text.clone(), gzip(&text), members, zstd.clone(), skippable, [&zstd[..], &zstd].concat()] {
            let decoded = decode(&encoded).unwrap();
            assert!(decoded == text || decoded == [&text[..], &text].concat());
        }
        assert_eq!(decode(b"").unwrap(), b"");
    }

    #[test]
    fn other_compressions_are_told_by_their_names() {
        for (bytes, name) in [(&b"\xfd7zXZ\0\0\x04"[..], "xz"), (b"BZh91AY&SY\x12", "bzip2")] {
            assert!(decode(bytes).unwrap_err().to_string().contains(name));
        }
        // A name in an archive may begin like that.
        assert_eq!(decode(b"BZh9").unwrap(), b"BZh9");
    }

    #[test]
    fn cut_and_damaged_streams_are_errors() {
        let text: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        for encoded in [gzip(&text), zstd::encode_all(&text[..], 3).unwrap()] {
            assert!(decode(&encoded[..encoded.len() / 2]).is_err());
            let mut damaged = encoded.clone();
            let middle = damaged.len() / 2;
            damaged[middle] ^= 0xff;
            assert!(decode(&damaged).map_or(true, |decoded| decoded != text));
        }
    }

    #[test]
    fn a_window_of_gigabytes_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(30).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.write_all(&[1; 1000]).unwrap();
        encoder.flush().unwrap();
        let encoded = encoder.finish().unwrap();
        assert!(decode(&encoded).is_err());
    }
}
