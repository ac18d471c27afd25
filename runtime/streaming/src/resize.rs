//! Sizes of the client's terminal: JSON objects one after the other.

use serde::Deserialize;

use crate::pipe::Incoming;

/// Longest size message, in bytes.
const MESSAGE_LIMIT: usize = 4096;

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Columns.
    #[serde(alias = "width")]
    pub width: u16,
    /// Rows.
    #[serde(alias = "height")]
    pub height: u16,
}

/// The sizes that a client's terminal takes, as it takes them.
#[derive(Debug)]
pub struct Resizes {
    source: Incoming,
    held: Vec<u8>,
}

impl From<Incoming> for Resizes {
    fn from(source: Incoming) -> Self {
        Self { source, held: Vec::new() }
    }
}

impl Resizes {
    /// The next size; nothing when there will be none any more.
    pub async fn next(&mut self) -> Option<Size> {
        loop {
            match take(&mut self.held) {
                Ok(Some(size)) => return Some(size),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "the client's terminal sizes make no sense: no longer read");
                    return None;
                }
            }
            let data = self.source.next().await.ok()??;
            if self.held.len() + data.len() > MESSAGE_LIMIT {
                return None;
            }
            self.held.extend_from_slice(&data);
        }
    }
}

/// Takes a whole size from the beginning of `held`, if there is one.
fn take(held: &mut Vec<u8>) -> Result<Option<Size>, serde_json::Error> {
    let mut values = serde_json::Deserializer::from_slice(held).into_iter::<Size>();
    match values.next() {
        Some(Ok(size)) => {
            let end = values.byte_offset();
            held.drain(..end);
            Ok(Some(size))
        }
        Some(Err(error)) if !error.is_eof() => Err(error),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::pipe::pipe;

    #[tokio::test]
    async fn sizes_are_found_however_they_are_cut() {
        let text = "{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":30} {\"width\":1,\"height\":2}";
        for cut in 0..text.len() {
            let (feed, incoming) = pipe(None);
            let (first, second) = text.split_at(cut);
            feed.push(Bytes::from_static(first.as_bytes())).await;
            feed.push(Bytes::from_static(second.as_bytes())).await;
            drop(feed);
            let mut resizes = Resizes::from(incoming);
            let mut seen = Vec::new();
            while let Some(size) = resizes.next().await {
                seen.push((size.width, size.height));
            }
            assert_eq!(seen, [(80, 24), (100, 30), (1, 2)], "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_can_do_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            while let Ok(Some(_)) = take(&mut bytes) {}
        }
    }
}
