//! File content on its way into a layer image.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{BLOCK, BLOCK_SIZE};
use crate::error::Error;
use crate::layer::LayerError;
use crate::tar::{Extent, Reader};

/// Content is gathered into writes of this size.
const BUFFER: usize = 1 << 20;
const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Writes the data area of a layer image, from the second block on, each file at the start of a block.
pub(crate) struct DataWriter {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    filled: usize,
    /// Where the buffer's content goes.
    offset: u64,
    /// Bytes that may still take space on the disk.
    left: u64,
}

impl DataWriter {
    /// Starts an image in `file`, which is empty; `path` is for messages. Content may take `limit` bytes on the disk.
    pub(crate) fn new(file: File, path: &Path, limit: u64) -> Self {
        Self { file, path: path.to_owned(), buffer: vec![0; BUFFER], filled: 0, offset: BLOCK_SIZE, left: limit }
    }

    /// Bytes from the image's start to where the next byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.offset + self.filled as u64
    }

    /// Takes the current entry's content from `reader`: `extents` of a file of `size` bytes. Gives its first block.
    pub(crate) fn write_file<R: Read>(
        &mut self,
        size: u64,
        extents: &[Extent],
        reader: &mut Reader<R>,
    ) -> Result<u32, LayerError> {
        if size == 0 {
            return Ok(0);
        }
        let start = self.position();
        let block = u32::try_from(start / BLOCK_SIZE);
        let block = block.map_err(|_| LayerError::Limit("a layer of more than 16 TiB".to_owned()))?;
        for extent in extents {
            self.seek(start.saturating_add(extent.offset))?;
            let mut left = extent.length;
            while left > 0 {
                if self.filled == BUFFER {
                    self.flush()?;
                }
                let end = usize::try_from(left).map_or(BUFFER, |left| BUFFER.min(self.filled.saturating_add(left)));
                let count = match self.buffer.get_mut(self.filled..end) {
                    Some(room) => reader.read_content(room)?,
                    None => 0,
                };
                if count == 0 {
                    return Err(LayerError::Corrupt("an entry has less content than its extents".to_owned()));
                }
                self.filled += count;
                left = left.saturating_sub(count as u64);
            }
        }
        self.seek(start.saturating_add(size).next_multiple_of(BLOCK_SIZE))?;
        Ok(block)
    }

    /// Ends the data area, and gives the file and the block after it.
    pub(crate) fn finish(mut self) -> Result<(File, u32), LayerError> {
        let block = u32::try_from(self.position().div_ceil(BLOCK_SIZE));
        let block = block.map_err(|_| LayerError::Limit("a layer of more than 16 TiB".to_owned()))?;
        self.flush()?;
        Ok((self.file, block))
    }

    /// Leaves zeros up to `position`: written if they are few, a hole if they are many.
    fn seek(&mut self, position: u64) -> Result<(), LayerError> {
        let gap = position.saturating_sub(self.position());
        match usize::try_from(gap) {
            Ok(gap) if gap < BLOCK => {
                let mut left = gap;
                while left > 0 {
                    if self.filled == BUFFER {
                        self.flush()?;
                    }
                    let end = BUFFER.min(self.filled + left);
                    if let Some(room) = self.buffer.get_mut(self.filled..end) {
                        room.fill(0);
                    }
                    left -= end - self.filled;
                    self.filled = end;
                }
            }
            _ => {
                self.flush()?;
                self.offset = position;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LayerError> {
        let full = self.buffer.get(..self.filled).unwrap_or_default();
        // Long runs of zeros, of which some archives are full, need no space. The metadata that follows ends the file.
        let zeros = full.chunks(BLOCK).all(|part| ZEROS.get(..part.len()) == Some(part));
        if !zeros {
            self.left = self.left.checked_sub(full.len() as u64).ok_or_else(|| {
                LayerError::Limit("it takes far more space than it should by its compressed size".to_owned())
            })?;
            let written: io::Result<()> = self.file.write_all_at(full, self.offset);
            written.map_err(|error| LayerError::Store(Error::store("write", &self.path)(error)))?;
        }
        self.offset += self.filled as u64;
        self.filled = 0;
        Ok(())
    }
}
