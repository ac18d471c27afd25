//! Disks of more layers than a virtual machine takes files.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rustix::fs::SeekFrom as Seeking;
use rustix::io::Errno;

use super::record::Joined;
use super::{JOINED, LAYER_IMAGE, Store};
use crate::digest::Digest;
use crate::erofs::BLOCK_SIZE;
use crate::error::{Error, Result};

/// Files of a disk, the image's own two included; a VMM takes a few more.
const MOST_FILES: usize = 240;

/// Copies the last layers of `disk`, whose lengths are `blocks`, to a file in the image's `directory`, if the disk
/// would have too many files without. Takes the space of those layers once more.
pub(crate) fn join(store: &Store, disk: &[Digest], blocks: &[u32], directory: &Path) -> Result<Option<Joined>> {
    if disk.len() < MOST_FILES {
        return Ok(None);
    }
    let from = MOST_FILES - 2;
    let path = directory.join(JOINED);
    let mut out = File::create_new(&path).map_err(Error::store("create", &path))?;
    let mut length = 0u64;
    for (digest, blocks) in disk.iter().zip(blocks).skip(from) {
        let layer = store.state().layers.get(digest).cloned();
        let layer = layer.ok_or_else(|| Error::corrupt(format!("layer {digest}"), "it vanished from the store"))?;
        let image = layer.directory.join(LAYER_IMAGE);
        let mut file = File::open(&image).map_err(Error::store("open", &image))?;
        copy(&mut file, &mut out, length).map_err(Error::store("copy", &image))?;
        length += u64::from(*blocks) * BLOCK_SIZE;
    }
    out.set_len(length).and_then(|()| out.sync_all()).map_err(Error::store("write", &path))?;
    let blocks = u32::try_from(length / BLOCK_SIZE);
    let blocks = blocks.map_err(|_| Error::limit("an image of so many layers", "more than 16 TiB"))?;
    Ok(Some(Joined { from, blocks }))
}

/// Copies what has content to `offset` and on, and leaves holes holes.
fn copy(from: &mut File, to: &mut File, offset: u64) -> io::Result<()> {
    let end = from.metadata()?.len();
    let mut at = 0;
    while at < end {
        let begin = match rustix::fs::seek(&*from, Seeking::Data(at)) {
            Ok(begin) => begin,
            // Nothing but a hole.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(&*from, Seeking::Hole(begin))?;
        from.seek(SeekFrom::Start(begin))?;
        to.seek(SeekFrom::Start(offset + begin))?;
        io::copy(&mut Read::by_ref(from).take(at - begin), to)?;
    }
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn holes_stay_holes() {
        let mut from = tempfile::tempfile().unwrap();
        from.write_all_at(b"begin", 0).unwrap();
        from.write_all_at(b"end", 64 << 20).unwrap();
        from.set_len(128 << 20).unwrap();
        let mut to = tempfile::tempfile().unwrap();
        to.write_all_at(b"before", 0).unwrap();
        copy(&mut from, &mut to, 4096).unwrap();
        let read = |at: u64, length: usize| {
            let mut buffer = vec![0; length];
            to.read_exact_at(&mut buffer, at).unwrap();
            buffer
        };
        assert_eq!(
            (read(0, 6), read(4096, 5), read(4096 + (64 << 20), 3)),
            (b"before".into(), b"begin".into(), b"end".into())
        );
        assert!(to.metadata().unwrap().blocks() < 1000);
    }
}
