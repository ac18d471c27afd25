//! One pass over a layer: verify, decompress, read, write.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::LayerError;
use super::compression::Decoder;
use super::intake::intake;
use crate::digest::{Digest, Hasher};
use crate::erofs::{self, DataWriter, ErofsError};
use crate::error::Error;
use crate::limits::Limits;
use crate::tree::Tree;

/// What the manifest and the configuration promise about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    /// Of the bytes in the registry.
    pub(crate) digest: Digest,
    /// Their number.
    pub(crate) size: u64,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
}

/// A layer whose image is written and whose digests are right.
pub(crate) struct BuiltLayer {
    pub(crate) tree: Tree,
    /// Length of the image in blocks.
    pub(crate) blocks: u32,
}

/// Makes the EROFS image of the layer that `input` brings in the new file `path`, which is not synced to the disk.
///
/// Ends soon after `given_up` is set, whatever the layer holds. On an error the file may be left behind, unfinished. When
/// `input` fails or ends early, the error is
/// [`LayerError::Input`] or [`LayerError::Corrupt`]; whoever feeds it knows better, and should be asked first.
pub(crate) fn build(
    input: impl Read,
    expected: &Expected,
    path: &Path,
    limits: &Limits,
    given_up: &AtomicBool,
) -> Result<BuiltLayer, LayerError> {
    let store = |action| move |error| LayerError::Store(Error::store(action, path)(error));
    let file = File::create_new(path).map_err(store("create"))?;
    let mut compressed = Hashing::new(input);
    match build_inner(&mut compressed, expected, file, path, limits, given_up) {
        // Wrong bytes show in many ways further up; the digest is the plain one.
        Err(error @ (LayerError::Corrupt(_) | LayerError::Input(_))) if !given_up.load(Ordering::Relaxed) => {
            if io::copy(&mut compressed, &mut io::sink()).is_ok() {
                let length = compressed.hasher.length();
                let found = compressed.hasher.finish();
                if found != expected.digest {
                    return Err(LayerError::Corrupt(format!(
                        "expected digest {} of {} bytes, found {found} of {length}",
                        expected.digest, expected.size
                    )));
                }
            }
            Err(error)
        }
        other => other,
    }
}

fn build_inner(
    compressed: &mut Hashing<impl Read>,
    expected: &Expected,
    file: File,
    path: &Path,
    limits: &Limits,
    given_up: &AtomicBool,
) -> Result<BuiltLayer, LayerError> {
    let decoder = Decoder::new(&mut *compressed)?;
    let limit = limits.unpacked(expected.size);
    let mut archive = Hashing::new(Limited { input: decoder, left: limit, given_up });
    let mut data = DataWriter::new(file, path, limits.written(expected.size));
    let too_large = |error| match error {
        LayerError::Input(error) if error.get_ref().is_some_and(|inner| inner.is::<TooLarge>()) => {
            LayerError::Limit(format!("its archive is larger than {limit} bytes"))
        }
        other => other,
    };
    let tree = intake(&mut archive, &mut data, limits).map_err(too_large)?;
    // Archives are padded beyond their end, and the digest covers that.
    io::copy(&mut archive, &mut io::sink()).map_err(|error| too_large(LayerError::Input(error)))?;
    let Hashing { input: Limited { input: decoder, .. }, hasher } = archive;
    decoder.drain().map_err(LayerError::Input)?;
    let diff_id = hasher.finish();
    let length = compressed.hasher.length();
    let found = compressed.hasher.clone().finish();
    if found != expected.digest {
        let Expected { digest, size, .. } = expected;
        let reason = format!("expected digest {digest} of {size} bytes, found {found} of {length}");
        return Err(LayerError::Corrupt(reason));
    }
    if diff_id != expected.diff_id {
        let reason = format!("its archive has digest {diff_id}, the image's configuration says {}", expected.diff_id);
        return Err(LayerError::Corrupt(reason));
    }
    let (file, data_end) = data.finish()?;
    let blocks = erofs::write_layer(&file, &tree, data_end, expected.diff_id.uuid()).map_err(|error| match error {
        ErofsError::Write(error) => LayerError::Store(Error::store("write", path)(error)),
        ErofsError::TooLarge | ErofsError::Tree(_) => LayerError::Limit(error.to_string()),
    })?;
    Ok(BuiltLayer { tree, blocks })
}

/// More bytes came than may.
#[derive(Debug, thiserror::Error)]
#[error("the archive is too large")]
struct TooLarge;

/// Hashes what is read through it.
struct Hashing<R> {
    input: R,
    hasher: Hasher,
}

impl<R> Hashing<R> {
    fn new(input: R) -> Self {
        Self { input, hasher: Hasher::default() }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Fails when more than `left` bytes come, and once nobody wants them any more.
struct Limited<'a, R> {
    input: R,
    left: u64,
    given_up: &'a AtomicBool,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("the pull was given up"));
        }
        let count = self.input.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| io::Error::other(TooLarge))?;
        Ok(count)
    }
}
