//! A list answered in pieces: as many messages as it takes to keep each of them small.

use std::pin::Pin;

use prost::Message;
use tonic::Status;

/// A call's answer in several messages.
pub type Pieces<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Bytes that the entries of a piece come to, if it has more than one: a quarter of what
/// gRPC takes by default.
const PIECE: usize = 1 << 20;

/// `wrap` makes a message of some entries. An empty list is no message at all.
pub fn in_pieces<E, T>(entries: Vec<E>, wrap: impl Fn(Vec<E>) -> T + Send + 'static) -> Pieces<T>
where
    E: Message + Send + 'static,
    T: Send + 'static,
{
    let mut entries = entries.into_iter().peekable();
    let next = move || {
        let (mut piece, mut bytes) = (Vec::new(), 0);
        while let Some(entry) = entries.next_if(|entry| piece.is_empty() || bytes + entry.encoded_len() <= PIECE) {
            bytes += entry.encoded_len();
            piece.push(entry);
        }
        (!piece.is_empty()).then(|| Ok(wrap(piece)))
    };
    Box::pin(tokio_stream::iter(std::iter::from_fn(next)))
}

#[cfg(test)]
mod tests {
    use nacelle_proto::runtime::v1 as cri;
    use tokio_stream::StreamExt;

    use super::*;

    fn pods(sizes: &[usize]) -> Vec<cri::PodSandbox> {
        let pod = |size: &usize| cri::PodSandbox { id: "x".repeat(*size), ..Default::default() };
        sizes.iter().map(pod).collect()
    }

    async fn lengths(sizes: &[usize]) -> Vec<usize> {
        let mut pieces = in_pieces(pods(sizes), |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes });
        let mut lengths = Vec::new();
        while let Some(piece) = pieces.next().await {
            lengths.push(piece.unwrap().pod_sandboxes.len());
        }
        lengths
    }

    #[tokio::test]
    async fn pieces_are_small_and_nothing_is_lost() {
        assert_eq!(lengths(&[]).await, [0; 0]);
        assert_eq!(lengths(&[1, 1, 1]).await, [3]);
        assert_eq!(lengths(&[PIECE / 2, PIECE / 3, PIECE / 3, 1]).await, [2, 2]);
        assert_eq!(lengths(&[2 * PIECE, 1, 3 * PIECE]).await, [1, 1, 1]);
        assert_eq!(lengths(&[1000; 5000]).await.iter().sum::<usize>(), 5000);
    }
}
