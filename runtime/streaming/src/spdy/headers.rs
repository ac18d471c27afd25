//! Header blocks: name and value pairs, compressed by zlib with a preset dictionary, one
//! compression context for each direction of a connection (SPDY/3.1, section 2.6.10).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Largest header block after decompression, in bytes.
pub const BLOCK_LIMIT: usize = 16 * 1024;
/// Most headers in a block.
pub const COUNT_LIMIT: usize = 64;

/// Words at the beginning of the dictionary, each after its length.
const WORDS: &[&str] = &[
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
    "origin",
];
/// Its end.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 \
    Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 \
    Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept \
    Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,\
    application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
    charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The preset dictionary.
fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS {
        bytes.extend(u32::try_from(word.len()).unwrap_or_default().to_be_bytes());
        bytes.extend(word.as_bytes());
    }
    bytes.extend(TAIL.as_bytes());
    bytes
}

/// What is wrong with a header block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The compressed data is no zlib stream of this dictionary.
    #[error("the header block cannot be decompressed")]
    Compression,
    /// See [`BLOCK_LIMIT`] and [`COUNT_LIMIT`].
    #[error("the header block has more than {COUNT_LIMIT} headers or {BLOCK_LIMIT} bytes")]
    TooLarge,
    /// Lengths do not fit, or a name is not lower-case text, or is there twice.
    #[error("the header block is malformed")]
    Malformed,
}

/// Headers in their order; names are lower-case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// These headers.
    #[must_use]
    pub fn new(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(name, value)| (name.to_lowercase(), (*value).to_owned())).collect())
    }

    /// The first value of a header, by its lower-case name; empty if it is not there.
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        let value = self.0.iter().find(|(found, _)| found == name).map_or("", |(_, value)| value);
        value.split('\0').next().unwrap_or_default()
    }

    fn parse(mut block: &[u8]) -> Result<Self, HeaderError> {
        let number = |block: &mut &[u8]| {
            let (bytes, rest) = block.split_first_chunk::<4>().ok_or(HeaderError::Malformed)?;
            *block = rest;
            Ok(u32::from_be_bytes(*bytes) as usize)
        };
        let text = |block: &mut &[u8]| {
            let length = number(block)?;
            let (bytes, rest) = block.split_at_checked(length).ok_or(HeaderError::Malformed)?;
            *block = rest;
            String::from_utf8(bytes.to_vec()).map_err(|_| HeaderError::Malformed)
        };
        let count = number(&mut block)?;
        if count > COUNT_LIMIT {
            return Err(HeaderError::TooLarge);
        }
        let mut headers = Self::default();
        for _ in 0..count {
            let (name, value) = (text(&mut block)?, text(&mut block)?);
            let proper =
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic() && !byte.is_ascii_uppercase());
            if !proper || headers.0.iter().any(|(known, _)| *known == name) {
                return Err(HeaderError::Malformed);
            }
            headers.0.push((name, value));
        }
        if block.is_empty() { Ok(headers) } else { Err(HeaderError::Malformed) }
    }

    fn block(&self) -> Vec<u8> {
        let length = |length: usize| u32::try_from(length).unwrap_or_default().to_be_bytes();
        let mut block = length(self.0.len()).to_vec();
        for part in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend(length(part.len()));
            block.extend(part.as_bytes());
        }
        block
    }
}

/// Decompresses the header blocks of one direction.
#[derive(Debug)]
pub struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// The headers of the next block.
    ///
    /// # Errors
    /// See [`HeaderError`]. The context cannot be used any further then.
    pub fn headers(&mut self, compressed: &[u8]) -> Result<Headers, HeaderError> {
        let mut block = vec![0; BLOCK_LIMIT + 1];
        let (start_in, start_out) = (self.0.total_in(), self.0.total_out());
        loop {
            let taken = usize::try_from(self.0.total_in() - start_in).unwrap_or(usize::MAX);
            let made = usize::try_from(self.0.total_out() - start_out).unwrap_or(usize::MAX);
            let (input, output) = (compressed.get(taken..), block.get_mut(made..));
            let (Some(input), Some(output)) = (input, output) else { return Err(HeaderError::Compression) };
            if output.is_empty() {
                return Err(HeaderError::TooLarge);
            }
            match self.0.decompress(input, output, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(HeaderError::Compression),
                Ok(Status::Ok | Status::BufError) => {
                    let (now_in, now_out) = (self.0.total_in() - start_in, self.0.total_out() - start_out);
                    if now_in as usize == compressed.len() && (now_out as usize) < block.len() {
                        block.truncate(now_out as usize);
                        return Headers::parse(&block);
                    }
                    if (now_in as usize, now_out as usize) == (taken, made) {
                        return Err(HeaderError::Compression);
                    }
                }
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&dictionary()).map_err(|_| HeaderError::Compression)?;
                }
                Err(_) => return Err(HeaderError::Compression),
            }
        }
    }
}

/// Compresses the header blocks of one direction.
#[derive(Debug)]
pub struct Deflater(Compress);

impl Default for Deflater {
    fn default() -> Self {
        let mut compress = Compress::new(Compression::fast(), true);
        // It can fail only after the first byte was compressed.
        let _ = compress.set_dictionary(&dictionary());
        Self(compress)
    }
}

impl Deflater {
    /// The next block.
    pub fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let block = headers.block();
        let mut compressed = Vec::with_capacity(block.len() + 64);
        let start = self.0.total_in();
        loop {
            let taken = usize::try_from(self.0.total_in() - start).unwrap_or(usize::MAX);
            let rest = block.get(taken..).unwrap_or_default();
            let result = self.0.compress_vec(rest, &mut compressed, FlushCompress::Sync);
            // With room left over, everything is flushed.
            if result.is_err() || compressed.len() < compressed.capacity() {
                return compressed;
            }
            compressed.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_the_published_one() {
        let dictionary = dictionary();
        assert_eq!(dictionary.len(), 1423);
        // Its Adler-32, which each zlib stream that needs it names.
        assert_eq!(Compress::new(Compression::fast(), true).set_dictionary(&dictionary).unwrap(), 0xe3c6_a7c2);
    }

    #[test]
    fn a_block_that_would_unpack_to_more_than_the_limit_is_refused() {
        let huge = Headers::new(&[("a", &"x".repeat(1 << 20))]);
        let compressed = Deflater::default().block(&huge);
        assert!(compressed.len() < BLOCK_LIMIT, "{}", compressed.len());
        assert_eq!(Inflater::default().headers(&compressed), Err(HeaderError::TooLarge));
        let pairs: Vec<_> = (0..=COUNT_LIMIT).map(|n| n.to_string()).collect();
        let many = Headers::new(&pairs.iter().map(|name| (name.as_str(), "")).collect::<Vec<_>>());
        assert_eq!(Inflater::default().headers(&Deflater::default().block(&many)), Err(HeaderError::TooLarge));
    }

    #[test]
    fn a_name_twice_or_in_capitals_is_refused() {
        for headers in [Headers(vec![("A".into(), String::new())]), Headers(vec![("a".into(), "x".into()); 2])] {
            assert_eq!(Inflater::default().headers(&Deflater::default().block(&headers)), Err(HeaderError::Malformed));
        }
    }

    proptest! {
        #[test]
        fn blocks_of_one_connection_read_back(
            blocks in prop::collection::vec(prop::collection::btree_map("[a-z-]{1,12}", "[ -~]{0,40}", 0..8), 1..6)
        ) {
            let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
            for block in blocks {
                let headers = Headers(block.into_iter().collect());
                prop_assert_eq!(inflater.headers(&deflater.block(&headers)), Ok(headers));
            }
        }

        #[test]
        fn no_bytes_can_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = Inflater::default().headers(&bytes);
            let _ = Headers::parse(&bytes);
            // Behind a proper beginning, too.
            let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
            inflater.headers(&deflater.block(&Headers::new(&[("a", "b")]))).unwrap();
            let _ = inflater.headers(&bytes);
        }
    }
}
