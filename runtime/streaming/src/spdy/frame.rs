//! Frames on the wire (SPDY/3.1, section 2.2): eight bytes of header, then a payload.

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::headers::{Deflater, HeaderError, Headers, Inflater};

/// Largest control frame accepted, in bytes of payload.
pub const CONTROL_LIMIT: usize = 16 * 1024;
/// Largest piece in which data is handed on, in bytes.
pub const DATA_PIECE: usize = 16 * 1024;
/// Highest stream id.
const ID_MASK: u32 = 0x7fff_ffff;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 1;
const SETTINGS_INITIAL_WINDOW: u32 = 7;

/// Why a stream is reset.
pub mod reset {
    /// The client broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// Data for a stream that is not open.
    pub const INVALID_STREAM: u32 = 2;
    /// The stream was not looked at.
    pub const REFUSED_STREAM: u32 = 3;
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// Its id.
        id: u32,
        /// Whether its opener sends nothing on it.
        fin: bool,
        /// What it is for.
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /// Its id.
        id: u32,
        /// Whether the sender sends nothing on it.
        fin: bool,
        /// Further headers.
        headers: Headers,
    },
    /// Ends a stream in both directions.
    Reset {
        /// Its id.
        id: u32,
        /// See [`mod@reset`].
        status: u32,
    },
    /// Settings of the connection, of which one matters.
    Settings {
        /// The sender's window of every stream, in bytes.
        initial_window: Option<u32>,
    },
    /// To be sent back by whoever did not begin it.
    Ping(u32),
    /// No further streams.
    GoAway {
        /// Last stream that the sender looked at.
        last: u32,
        /// 0 if in good order.
        status: u32,
    },
    /// Further headers of a stream.
    Headers {
        /// Its id.
        id: u32,
        /// Whether the sender sends nothing more.
        fin: bool,
    },
    /// More may be sent.
    WindowUpdate {
        /// The stream, or 0 for the whole connection.
        id: u32,
        /// By how many bytes.
        delta: u32,
    },
    /// Data of a stream.
    Data {
        /// Its id.
        id: u32,
        /// Whether the sender sends nothing more.
        fin: bool,
        /// A piece of it.
        data: Bytes,
    },
}

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The transport failed, or ended within a frame.
    #[error("the connection broke: {0}")]
    Io(#[from] std::io::Error),
    /// Another version of the protocol.
    #[error("version {0} of SPDY instead of 3")]
    Version(u16),
    /// See [`CONTROL_LIMIT`].
    #[error("a control frame of {0} bytes, more than {CONTROL_LIMIT}")]
    TooLarge(usize),
    /// A frame of this type is not as long, or has not the content, that it must have.
    #[error("a malformed frame of type {0}")]
    Malformed(u16),
    /// Its headers cannot be read.
    #[error(transparent)]
    Headers(#[from] HeaderError),
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    source: R,
    inflater: Inflater,
    /// The data frame that is under way: its id, its flag, bytes to come.
    data: Option<(u32, bool, usize)>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `source`.
    pub fn new(source: R) -> Self {
        Self { source, inflater: Inflater::default(), data: None }
    }

    /// The next frame, or piece of a data frame; nothing at the end of the connection.
    /// Frames of unknown types are passed over.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some((id, fin, rest)) = self.data.take() {
                return self.data(id, fin, rest).await.map(Some);
            }
            let mut header = [0; 8];
            if self.source.read(&mut header[..1]).await? == 0 {
                return Ok(None);
            }
            self.source.read_exact(&mut header[1..]).await?;
            let [a, b, c, d, flags, high, middle, low] = header;
            let length = u32::from_be_bytes([0, high, middle, low]) as usize;
            let word = u32::from_be_bytes([a, b, c, d]);
            if word & !ID_MASK == 0 {
                self.data = Some((word, flags & FLAG_FIN != 0, length));
                continue;
            }
            let (version, kind) = (u16::from_be_bytes([a & 0x7f, b]), u16::from_be_bytes([c, d]));
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
            if length > CONTROL_LIMIT {
                return Err(FrameError::TooLarge(length));
            }
            let mut payload = vec![0; length];
            self.source.read_exact(&mut payload).await?;
            if let Some(frame) = control(kind, flags & FLAG_FIN != 0, &payload, &mut self.inflater)? {
                return Ok(Some(frame));
            }
        }
    }

    async fn data(&mut self, id: u32, fin: bool, rest: usize) -> Result<Frame, FrameError> {
        let mut piece = vec![0; rest.min(DATA_PIECE)];
        self.source.read_exact(&mut piece).await?;
        let rest = rest - piece.len();
        if rest > 0 {
            self.data = Some((id, fin, rest));
        }
        Ok(Frame::Data { id, fin: fin && rest == 0, data: piece.into() })
    }

    /// The transport, at whatever place it is.
    pub fn into_inner(self) -> R {
        self.source
    }
}

/// A control frame from its payload; nothing if it is of no interest.
fn control(kind: u16, fin: bool, payload: &[u8], inflater: &mut Inflater) -> Result<Option<Frame>, FrameError> {
    let malformed = || FrameError::Malformed(kind);
    let number = |at: usize| {
        let bytes = payload.get(at..).and_then(|rest| rest.first_chunk::<4>()).ok_or_else(malformed)?;
        Ok::<_, FrameError>(u32::from_be_bytes(*bytes))
    };
    let id = || match number(0)? & ID_MASK {
        0 => Err(malformed()),
        id => Ok(id),
    };
    let block = |at: usize| payload.get(at..).ok_or_else(malformed);
    Ok(Some(match kind {
        1 => Frame::SynStream { id: id()?, fin, headers: inflater.headers(block(10)?)? },
        2 => Frame::SynReply { id: id()?, fin, headers: inflater.headers(block(4)?)? },
        3 => Frame::Reset { id: id()?, status: number(4)? },
        4 => {
            let entries = number(0)? as usize;
            if entries.checked_mul(8) != Some(payload.len().saturating_sub(4)) {
                return Err(malformed());
            }
            let mut initial_window = None;
            for entry in payload.get(4..).unwrap_or_default().chunks_exact(8) {
                let [_, high, middle, low, a, b, c, d] = *entry else { continue };
                if u32::from_be_bytes([0, high, middle, low]) == SETTINGS_INITIAL_WINDOW {
                    initial_window = Some(u32::from_be_bytes([a, b, c, d]) & ID_MASK);
                }
            }
            Frame::Settings { initial_window }
        }
        6 => Frame::Ping(number(0)?),
        7 => Frame::GoAway { last: number(0)? & ID_MASK, status: number(4)? },
        8 => {
            // Nothing is in them for us, but they are part of the compressed stream.
            let id = id()?;
            inflater.headers(block(4)?)?;
            Frame::Headers { id, fin }
        }
        9 => Frame::WindowUpdate { id: number(0)? & ID_MASK, delta: number(4)? & ID_MASK },
        _ => return Ok(None),
    }))
}

impl Frame {
    /// Appends the frame as it goes over the wire. Data must be shorter than 16 MiB.
    pub fn encode(&self, deflater: &mut Deflater, out: &mut Vec<u8>) {
        let mut put = |kind: u16, fin: bool, parts: &[&[u8]]| {
            let [version, kind] = [VERSION | 0x8000, kind].map(u16::to_be_bytes);
            out.extend(version.into_iter().chain(kind));
            header_end(out, fin, parts.iter().map(|part| part.len()).sum());
            parts.iter().for_each(|part| out.extend(*part));
        };
        match self {
            Self::SynStream { id, fin, headers } => {
                put(1, *fin, &[&id.to_be_bytes(), &[0; 6], &deflater.block(headers)]);
            }
            Self::SynReply { id, fin, headers } => put(2, *fin, &[&id.to_be_bytes(), &deflater.block(headers)]),
            Self::Reset { id, status } => put(3, false, &[&id.to_be_bytes(), &status.to_be_bytes()]),
            Self::Settings { initial_window } => {
                let count = u32::from(initial_window.is_some());
                let window = initial_window.unwrap_or_default().to_be_bytes();
                let entry = [&SETTINGS_INITIAL_WINDOW.to_be_bytes()[..], &window].concat();
                put(4, false, &[&count.to_be_bytes(), if count == 0 { &[] } else { &entry }]);
            }
            Self::Ping(id) => put(6, false, &[&id.to_be_bytes()]),
            Self::GoAway { last, status } => put(7, false, &[&last.to_be_bytes(), &status.to_be_bytes()]),
            Self::Headers { id, fin } => {
                put(8, *fin, &[&id.to_be_bytes(), &deflater.block(&Headers::default())]);
            }
            Self::WindowUpdate { id, delta } => put(9, false, &[&id.to_be_bytes(), &delta.to_be_bytes()]),
            Self::Data { id, fin, data } => {
                out.extend((id & ID_MASK).to_be_bytes());
                header_end(out, *fin, data.len());
                out.extend(data);
            }
        }
    }
}

/// Flags and length, the last half of a frame's header.
fn header_end(out: &mut Vec<u8>, fin: bool, length: usize) {
    let [_, high, middle, low] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    out.extend([u8::from(fin), high, middle, low]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    async fn read_all(bytes: &[u8]) -> (Vec<Frame>, Option<FrameError>) {
        let mut reader = FrameReader::new(bytes);
        let mut frames = Vec::new();
        loop {
            match reader.next().await {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => return (frames, None),
                Err(error) => return (frames, Some(error)),
            }
        }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let id = || 1..=ID_MASK;
        let headers = || {
            prop::collection::btree_map("[a-z]{1,9}", "[ -~]{0,20}", 0..5).prop_map(|map| {
                Headers::new(&map.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>())
            })
        };
        prop_oneof![
            (id(), any::<bool>(), headers()).prop_map(|(id, fin, headers)| Frame::SynStream { id, fin, headers }),
            (id(), any::<bool>(), headers()).prop_map(|(id, fin, headers)| Frame::SynReply { id, fin, headers }),
            (id(), any::<u32>()).prop_map(|(id, status)| Frame::Reset { id, status }),
            prop::option::of(0..=ID_MASK).prop_map(|initial_window| Frame::Settings { initial_window }),
            any::<u32>().prop_map(Frame::Ping),
            (0..=ID_MASK, any::<u32>()).prop_map(|(last, status)| Frame::GoAway { last, status }),
            (id(), any::<bool>()).prop_map(|(id, fin)| Frame::Headers { id, fin }),
            (0..=ID_MASK, 0..=ID_MASK).prop_map(|(id, delta)| Frame::WindowUpdate { id, delta }),
            (0..=ID_MASK, any::<bool>(), prop::collection::vec(any::<u8>(), 0..DATA_PIECE))
                .prop_map(|(id, fin, data)| Frame::Data { id, fin, data: data.into() }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn frames_read_back(frames in prop::collection::vec(frame(), 0..12)) {
            let (mut deflater, mut bytes) = (Deflater::default(), Vec::new());
            frames.iter().for_each(|frame| frame.encode(&mut deflater, &mut bytes));
            let (read, error) = run(read_all(&bytes));
            prop_assert!(error.is_none(), "{:?}", error);
            prop_assert_eq!(read, frames);
        }

        #[test]
        fn no_bytes_can_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            run(read_all(&bytes));
        }

        #[test]
        fn nor_can_a_frame_of_any_type_with_any_content(
            frames in prop::collection::vec((0u16..12, any::<u8>(), prop::collection::vec(any::<u8>(), 0..60)), 0..8)
        ) {
            let mut bytes = Vec::new();
            for (kind, flags, payload) in frames {
                bytes.extend([0x80, 3]);
                bytes.extend(kind.to_be_bytes());
                bytes.extend([flags, 0, 0, payload.len() as u8]);
                bytes.extend(payload);
            }
            run(read_all(&bytes));
        }
    }

    #[test]
    fn a_data_frame_of_any_length_comes_in_pieces() {
        let data: Vec<u8> = (0..3 * DATA_PIECE + 5).map(|n| n as u8).collect();
        let (mut deflater, mut bytes) = (Deflater::default(), Vec::new());
        Frame::Data { id: 1, fin: true, data: data.clone().into() }.encode(&mut deflater, &mut bytes);
        let (frames, error) = run(read_all(&bytes));
        assert!(error.is_none());
        let mut joined = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            let Frame::Data { fin, data, .. } = frame else { panic!("{frame:?}") };
            assert_eq!(*fin, index == 3, "only the last piece ends the stream");
            joined.extend_from_slice(data);
        }
        assert!(joined == data);
    }

    #[test]
    fn a_long_control_frame_and_another_version_end_the_connection() {
        let (_, error) = run(read_all(&[0x80, 3, 0, 1, 0, 1, 0, 0]));
        assert!(matches!(error, Some(FrameError::TooLarge(65536))), "{error:?}");
        let (_, error) = run(read_all(&[0x80, 2, 0, 1, 0, 0, 0, 0]));
        assert!(matches!(error, Some(FrameError::Version(2))), "{error:?}");
    }
}
