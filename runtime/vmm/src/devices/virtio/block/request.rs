//! One request: what the guest asks, and the answer (virtio 1.2, section 5.2.6).

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{DISCARD_RANGES_LIMIT, DISCARD_SECTORS_LIMIT, ZEROES_RANGES_LIMIT, ZEROES_SECTORS_LIMIT};
use super::disk::{Disk, SECTOR};
use super::metrics::BlockMetrics;
use crate::devices::virtio::chain::{Chain, GuestBytes};
use crate::devices::virtio::workers::Way;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_SIZE: usize = 16;
/// Bytes of one range of a discard or write-zeroes request: sector, count, flags.
const RANGE_SIZE: usize = 16;

/// Why a request was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// It failed, or asks for what is not on the disk.
    Failed,
    /// The device does not know it.
    Unsupported,
}

impl From<std::io::Error> for Refusal {
    fn from(_: std::io::Error) -> Self {
        Self::Failed
    }
}

/// Serves the request in `chain`. Returns how many bytes the driver may expect written, or
/// none if the request has no status byte to answer in. Makes `way` before it does what may take as long as a disk.
pub fn serve(
    disk: &Disk,
    mut chain: Chain<'_>,
    write_through: bool,
    metrics: &BlockMetrics,
    way: &mut dyn Way,
) -> Option<u32> {
    let status = chain.writable.pop_last()?;
    let room = chain.writable.len();
    match execute(disk, &mut chain, write_through, metrics, way) {
        Ok(()) => {
            status.set(VIRTIO_BLK_S_OK as u8);
            let written = room - chain.writable.len();
            Some(u32::try_from(written).map_or(u32::MAX, |written| written.saturating_add(1)))
        }
        Err(refusal) => {
            count(&metrics.errors, 1);
            status.set(match refusal {
                Refusal::Failed => VIRTIO_BLK_S_IOERR as u8,
                Refusal::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            });
            Some(1)
        }
    }
}

fn execute(
    disk: &Disk,
    chain: &mut Chain<'_>,
    write_through: bool,
    metrics: &BlockMetrics,
    way: &mut dyn Way,
) -> Result<(), Refusal> {
    if chain.faulty {
        return Err(Refusal::Failed);
    }
    let header: [u8; HEADER_SIZE] = chain.readable.read_array().ok_or(Refusal::Failed)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => {
            let length = chain.writable.len() as u64;
            let offset = disk.range(sector, length).ok_or(Refusal::Failed)?;
            disk.read(offset, &mut chain.writable, way)?;
            count(&metrics.reads, 1);
            count(&metrics.read_bytes, length);
        }
        VIRTIO_BLK_T_OUT => {
            let length = chain.readable.len() as u64;
            let offset = disk.range(sector, length).ok_or(Refusal::Failed)?;
            way.make();
            disk.write(offset, &mut chain.readable)?;
            if write_through {
                disk.flush()?;
            }
            count(&metrics.writes, 1);
            count(&metrics.write_bytes, length);
        }
        VIRTIO_BLK_T_FLUSH => {
            if disk.has_to_last() {
                way.make();
            }
            disk.flush()?;
            count(&metrics.flushes, 1);
        }
        VIRTIO_BLK_T_GET_ID => {
            chain.writable.write(disk.id());
        }
        VIRTIO_BLK_T_DISCARD => {
            way.make();
            for_each_range(disk, &mut chain.readable, DISCARD_RANGES_LIMIT, |disk, range| {
                if range.unmap {
                    return Err(Refusal::Unsupported);
                }
                let offset = range.offset(disk, DISCARD_SECTORS_LIMIT)?;
                Ok(disk.discard(offset, range.length())?)
            })?;
            count(&metrics.discards, 1);
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            way.make();
            for_each_range(disk, &mut chain.readable, ZEROES_RANGES_LIMIT, |disk, range| {
                let offset = range.offset(disk, ZEROES_SECTORS_LIMIT)?;
                Ok(disk.write_zeroes(offset, range.length(), range.unmap)?)
            })?;
            count(&metrics.discards, 1);
        }
        _ => return Err(Refusal::Unsupported),
    }
    Ok(())
}

/// One range of a discard or write-zeroes request.
struct Range {
    sector: u64,
    sectors: u32,
    unmap: bool,
}

impl Range {
    fn length(&self) -> u64 {
        u64::from(self.sectors) * SECTOR
    }

    fn offset(&self, disk: &Disk, limit: u32) -> Result<u64, Refusal> {
        if self.sectors > limit {
            return Err(Refusal::Failed);
        }
        disk.range(self.sector, self.length()).ok_or(Refusal::Failed)
    }
}

/// Reads the ranges of a request and does each. Those before a refused one stay done: a
/// request that fails has undefined effects within the ranges it names.
fn for_each_range(
    disk: &Disk,
    data: &mut GuestBytes<'_>,
    limit: u32,
    mut each: impl FnMut(&Disk, Range) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    if disk.read_only()
        || data.is_empty()
        || !data.len().is_multiple_of(RANGE_SIZE)
        || data.len() / RANGE_SIZE > limit as usize
    {
        return Err(Refusal::Failed);
    }
    while let Some([s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..]) = data.read_array::<RANGE_SIZE>() {
        let flags = u32::from_le_bytes(flags);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Refusal::Unsupported);
        }
        let range = Range {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            unmap: flags != 0,
        };
        // The kernel refuses to punch a hole of no bytes; there is nothing to do.
        if range.sectors > 0 {
            each(disk, range)?;
        }
    }
    Ok(())
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
