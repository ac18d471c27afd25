//! What becomes of a request: who answers it, and how what a driver does not know is refused.

use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use vm_memory::ByteValued;

use super::by_crate::ByCrate;
use super::device::NAME;
use super::metrics::FsMetrics;
use super::passthrough::Passthrough;
use super::volumes::Volumes;
use super::{credentials, short, transfer};
use crate::devices::virtio::chain::{Chain, ChainScratch};
use crate::devices::virtio::descriptors::AvailableChain;
use crate::devices::virtio::workers::{Answer, Handler, Way};

/// Most threads of a device: what a disk can do at once for a few processes.
const THREADS: usize = 4;
/// Descriptors of the longest request: as many as the longest queue has.
const CHAIN_LIMIT: usize = 512;

/// What serves the requests of a driver.
pub struct Requests {
    files: Passthrough,
    server: Server<Passthrough>,
    volumes: Arc<Volumes>,
}

impl Requests {
    /// Those for what is in these volumes.
    pub fn new(volumes: Arc<Volumes>) -> Self {
        let files = || Passthrough { volumes: volumes.clone() };
        Self { files: files(), server: Server::new(files()), volumes }
    }
}

impl Handler for Requests {
    type Room = (ChainScratch, ByCrate);

    fn name(&self) -> &'static str {
        NAME
    }

    fn threads(&self) -> usize {
        THREADS
    }

    fn room(&self) -> io::Result<Self::Room> {
        Ok((ChainScratch::new(), ByCrate::new()?))
    }

    fn enter(&self) -> io::Result<()> {
        credentials::prepare_thread()
    }

    fn serve(
        &self,
        _index: u16,
        chain: &AvailableChain,
        (scratch, by_crate): &mut Self::Room,
        way: &mut dyn Way,
    ) -> Result<Answer, String> {
        let mut request = scratch.load(chain, CHAIN_LIMIT).map_err(|error| error.to_string())?;
        let header = take_header(&mut request);
        if may_wait(header.opcode) {
            way.make();
        }
        let written = match self.answer(&header, request) {
            Some(written) => written,
            None => {
                // Part of it may be used up.
                let mut request = scratch.load(chain, CHAIN_LIMIT).map_err(|error| error.to_string())?;
                take_header(&mut request);
                self.answer_by_crate(&header, request, by_crate)
            }
        };
        // A process waits for each answer.
        Ok(Answer { written, moved: u64::MAX })
    }
}

impl Requests {
    /// Answers a request whose `header` is taken from `chain` already. Returns how many bytes
    /// the answer has; none if the request is left to the crate.
    fn answer(&self, header: &InHeader, chain: Chain<'_>) -> Option<u32> {
        FsMetrics::count(&self.volumes.metrics.requests, 1);
        if chain.faulty {
            None
        } else if transfer::serves(header.opcode) {
            transfer::answer(&self.volumes, header, chain)
        } else {
            short::answer(&self.files, header, chain)
        }
    }

    /// Answers a request that is rare or not as it should be, if only by refusing it.
    fn answer_by_crate(&self, header: &InHeader, mut chain: Chain<'_>, by_crate: &ByCrate) -> u32 {
        let known = is_known(header.opcode);
        if known
            && !chain.faulty
            && let Some(written) = by_crate.answer(&self.server, header, &mut chain)
        {
            return written;
        }
        FsMetrics::count(&self.volumes.metrics.refused, 1);
        if [Opcode::Forget as u32, Opcode::BatchForget as u32].contains(&header.opcode) {
            return 0;
        }
        let error = if known { libc::EIO } else { libc::ENOSYS };
        let answer = OutHeader { len: size_of::<OutHeader>() as u32, error: -error, unique: header.unique };
        // Where there is no room for it there is nobody to tell.
        if chain.writable.len() < size_of::<OutHeader>() {
            return 0;
        }
        chain.writable.write(answer.as_slice());
        answer.len
    }
}

/// Takes the header of a request; one of zeros, which no request has, if there is none.
fn take_header(request: &mut Chain<'_>) -> InHeader {
    request.readable.read_object().unwrap_or_default()
}

/// Requests that may take as long as a disk or another host does.
fn may_wait(opcode: u32) -> bool {
    use Opcode::{Fallocate, Flush, Fsync, Fsyncdir, Read, Write};
    [Read, Write, Fsync, Fsyncdir, Flush, Fallocate].into_iter().any(|known| known as u32 == opcode)
}

/// Requests that the device serves. Others get an answer that the driver knows: it does
/// without. The crate does not get to see them: it makes an enum of any number.
fn is_known(opcode: u32) -> bool {
    use Opcode::{
        BatchForget, Create, Destroy, Fallocate, Flush, Forget, Fsync, Fsyncdir, Getattr, Getxattr, Init, Link,
        Listxattr, Lookup, Lseek, Mkdir, Mknod, Open, Opendir, Read, Readdir, Readdirplus, Readlink, Release,
        Releasedir, Removexattr, Rename, Rename2, Rmdir, Setattr, Setxattr, Statfs, Symlink, Unlink, Write,
    };
    [
        Lookup,
        Forget,
        Getattr,
        Setattr,
        Readlink,
        Symlink,
        Mknod,
        Mkdir,
        Unlink,
        Rmdir,
        Rename,
        Link,
        Open,
        Read,
        Write,
        Statfs,
        Release,
        Fsync,
        Setxattr,
        Getxattr,
        Listxattr,
        Removexattr,
        Flush,
        Init,
        Opendir,
        Readdir,
        Releasedir,
        Fsyncdir,
        Create,
        Destroy,
        BatchForget,
        Fallocate,
        Readdirplus,
        Rename2,
        Lseek,
    ]
    .into_iter()
    .any(|known| known as u32 == opcode)
}
