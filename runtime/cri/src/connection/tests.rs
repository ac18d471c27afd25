//! A real server behind the connection, and requests as clients write them, byte by byte.

use std::time::Duration;

use nacelle_proto::runtime::v1 as cri;
use nacelle_proto::runtime::v1::image_service_server::{ImageService, ImageServiceServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

use super::*;

struct Empty;

#[tonic::async_trait]
impl ImageService for Empty {
    type StreamImagesStream = tokio_stream::Empty<Result<cri::StreamImagesResponse, Status>>;

    async fn list_images(
        &self,
        _: Request<cri::ListImagesRequest>,
    ) -> Result<Response<cri::ListImagesResponse>, Status> {
        Ok(Response::new(cri::ListImagesResponse::default()))
    }
    async fn stream_images(
        &self,
        _: Request<cri::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn image_status(
        &self,
        _: Request<cri::ImageStatusRequest>,
    ) -> Result<Response<cri::ImageStatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn pull_image(&self, _: Request<cri::PullImageRequest>) -> Result<Response<cri::PullImageResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn remove_image(
        &self,
        _: Request<cri::RemoveImageRequest>,
    ) -> Result<Response<cri::RemoveImageResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn image_fs_info(
        &self,
        _: Request<cri::ImageFsInfoRequest>,
    ) -> Result<Response<cri::ImageFsInfoResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A string that is not coded.
fn string(text: &str) -> Vec<u8> {
    [&[text.len() as u8], text.as_bytes()].concat()
}

/// A request for ListImages with this field, or none, for its authority.
fn request(stream: u32, authority: &[u8]) -> Vec<u8> {
    let path = string("/runtime.v1.ImageService/ListImages");
    let (kind, grpc) = (string("content-type"), string("application/grpc"));
    // POST, http, the path, which stays out of the table; then the authority, the last of the pseudo headers.
    let fields = [&[0x83, 0x86, 0x04][..], &path, authority, &[0x40], &kind, &grpc].concat();
    [frame(1, 4, stream, &fields), frame(0, 1, stream, &[0; 5])].concat()
}

/// What comes back on `stream` first: the kind of a frame and its payload.
async fn answer(client: &mut UnixStream, stream: u32) -> (u8, Vec<u8>) {
    loop {
        let mut header = [0; 9];
        client.read_exact(&mut header).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
        client.read_exact(&mut payload).await.unwrap();
        if header[5..] == stream.to_be_bytes() {
            return (header[3], payload);
        }
    }
}

#[tokio::test]
async fn every_authority_of_a_socket_is_answered() {
    let (mut client, server) = UnixStream::pair().unwrap();
    // No further client comes; a server without a listener would end.
    let incoming = tokio_stream::once(Ok::<_, io::Error>(Connection::new(server))).chain(tokio_stream::pending());
    let served = tonic::transport::Server::builder().add_service(ImageServiceServer::new(Empty));
    let served = tokio::spawn(served.serve_with_incoming(incoming));
    let literal = |first: u8, text: &str| [&[first][..], &string(text)].concat();
    let by_name = [&[0x40][..], &string(":authority"), &string("/run/nacelle.sock")].concat();
    let authorities = [
        Vec::new(),
        literal(0x41, "localhost"),
        literal(0x41, "/run/nacelle/nacelle.sock"),
        literal(0x01, "%2Frun%2Fnacelle%2Fnacelle.sock"),
        literal(0x11, "unix:/run/nacelle/nacelle.sock"),
        by_name,
        // Without a value, by the static table and in letters.
        vec![0x81],
        literal(0x01, ""),
        // Huffman's code for "/run/x".
        vec![0x41, 0x85, 0x62, 0xcb, 0x6a, 0x63, 0xcf],
        // What the one before left in the table, and a name from there. With each request a type of content came after it.
        vec![0xbf],
        [&[0x7f, 0x01][..], &string("@abstract")].concat(),
    ];
    client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    client.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    for (stream, authority) in (1..).step_by(2).zip(authorities) {
        client.write_all(&request(stream, &authority)).await.unwrap();
        let answered = tokio::time::timeout(Duration::from_secs(10), answer(&mut client, stream)).await.unwrap();
        // HEADERS that begin with the status 200, not RST_STREAM.
        assert_eq!((answered.0, answered.1.first()), (1, Some(&0x88)), "{authority:02x?}");
    }
    served.abort();
}
