//! Entries one by one, and the content of each.

use std::io::{self, Read};

use super::extended::{MAX_EXTENDED, Overrides, header_owner};
use super::header::{Dialect, Header};
use super::sparse::{self, TextMap};
use super::{BLOCK, Entry, EntryKind, Extent, TarError};

/// Reads an archive from a stream, which is left after the last block that was needed.
pub(crate) struct Reader<R> {
    input: R,
    /// Bytes taken from `input`.
    offset: u64,
    /// Content of the current entry that is not read yet, and its padding after that.
    remaining: u64,
    padding: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, offset: 0, remaining: 0, padding: 0, ended: false }
    }

    /// The next entry, skipping what was not read of the last one; none at the archive's end.
    ///
    /// An archive may end without its two zero blocks, as GNU tar and Go accept too: that nothing is missing
    /// is for the digest to say.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut overrides = Overrides::default();
        let mut extended = false;
        let mut extended_bytes = 0u64;
        loop {
            self.skip_content()?;
            let Some(header) = self.header()? else {
                return if extended {
                    Err(self.malformed("the archive ends after an extended header"))
                } else {
                    Ok(None)
                };
            };
            let size = header.size().and_then(|size| u64::try_from(size).ok());
            let size = size.ok_or_else(|| self.malformed("the header's size is not a number"))?;
            if matches!(header.type_flag(), b'x' | b'L' | b'K') {
                extended_bytes = extended_bytes.saturating_add(size);
                if extended_bytes > MAX_EXTENDED {
                    let reason = "the extended headers of one entry exceed 1 MiB";
                    return Err(TarError::TooLarge { offset: self.offset, reason });
                }
            }
            match header.type_flag() {
                b'x' => {
                    let records = self.extended(size)?;
                    overrides.apply(&records).map_err(|reason| self.malformed(reason))?;
                    extended = true;
                }
                b'L' => {
                    overrides.name = Some(self.long_name(size)?);
                    extended = true;
                }
                b'K' => {
                    overrides.link = Some(self.long_name(size)?);
                    extended = true;
                }
                // Global defaults and volume labels describe the archive, not the file system.
                b'g' | b'V' => self.begin_content(size),
                b'M' | b'D' | b'N' => return Err(self.malformed("an entry has a type that no image layer may have")),
                _ => return self.entry(&header, overrides, size).map(Some),
            }
        }
    }

    /// Reads from the current entry's stored content; 0 at its end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let limit = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..limit).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        let count = loop {
            match self.input.read(buffer) {
                Ok(0) => return Err(self.malformed("the archive ends inside an entry's content")),
                Ok(count) => break count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        };
        self.offset = self.offset.saturating_add(count);
        self.remaining = self.remaining.saturating_sub(count);
        Ok(usize::try_from(count).unwrap_or(limit))
    }

    fn entry(&mut self, header: &Header, overrides: Overrides, header_size: u64) -> Result<Entry, TarError> {
        let name = overrides.sparse.name.clone().or(overrides.name);
        let name = name.unwrap_or_else(|| header.name());
        if name.is_empty() {
            return Err(self.malformed("an entry has no name"));
        }
        let link = overrides.link.unwrap_or_else(|| header.link().to_vec());
        let bad_owner = "an owner is not a number of 32 bits";
        let uid = overrides.uid.or(header_owner(header.uid())).ok_or_else(|| self.malformed(bad_owner))?;
        let gid = overrides.gid.or(header_owner(header.gid())).ok_or_else(|| self.malformed(bad_owner))?;
        let mode = header.mode().ok_or_else(|| self.malformed("a mode is not a number"))?;
        let mtime = match overrides.mtime {
            Some(mtime) => mtime,
            None => match header.mtime().and_then(|mtime| i64::try_from(mtime).ok()) {
                Some(mtime) => (mtime, 0),
                None => return Err(self.malformed("a modification time is not a number")),
            },
        };
        let device = || -> Option<(u32, u32)> {
            let (major, minor) = header.device()?;
            Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
        };
        let bad_device = "a device number is not a number of 32 bits";
        let kind = match header.type_flag() {
            b'1' => EntryKind::HardLink { target: link },
            b'2' => EntryKind::Symlink { target: link },
            b'3' => {
                let (major, minor) = device().ok_or_else(|| self.malformed(bad_device))?;
                EntryKind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = device().ok_or_else(|| self.malformed(bad_device))?;
                EntryKind::BlockDevice { major, minor }
            }
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            // Before ustar, a directory was a file whose name ends in a slash.
            0 if name.ends_with(b"/") => EntryKind::Directory,
            b'0' | b'7' if name.ends_with(b"/") && header.dialect() == Dialect::V7 => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            _ => return Err(self.malformed("an entry has a type that no image layer may have")),
        };
        let stored = overrides.size.unwrap_or(header_size);
        let (mut size, mut extents) = (0, Vec::new());
        match kind {
            EntryKind::File if header.type_flag() == b'S' => {
                let real = header.number(483, 12).and_then(|size| u64::try_from(size).ok());
                size = real.ok_or_else(|| self.malformed("a sparse file's size is not a number"))?;
                extents = self.gnu_map(header)?;
                self.begin_content(stored);
            }
            EntryKind::File if overrides.sparse.is_used() => {
                size = overrides.sparse.real_size.ok_or_else(|| self.malformed("a sparse file has no real size"))?;
                self.begin_content(stored);
                let in_content = overrides.sparse.map_in_content();
                extents = match overrides.sparse.map {
                    Some(map) if !in_content => map,
                    _ => self.text_map()?,
                };
            }
            EntryKind::File => {
                size = stored;
                extents.extend((stored > 0).then_some(Extent { offset: 0, length: stored }));
                self.begin_content(stored);
            }
            // Some archivers store the size of a hard link's target without its content; links, devices and
            // directories have none.
            _ => {}
        }
        sparse::check(&extents, size, self.remaining).map_err(|reason| self.malformed(reason))?;
        // The mask makes the conversion exact.
        let mode = u16::try_from(mode & 0o7777).unwrap_or(0);
        Ok(Entry { name, kind, mode, uid, gid, mtime, xattrs: overrides.xattrs, size, extents })
    }

    /// The next header that is not zeros; none at the archive's end.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let Some(block) = self.block()? else {
            self.ended = true;
            return Ok(None);
        };
        if block == [0; BLOCK] {
            self.ended = true;
            // One alone is damage: what follows must not go unnoticed.
            return match self.block()? {
                Some(second) if second != [0; BLOCK] => Err(self.malformed("an entry follows a block of zeros")),
                _ => Ok(None),
            };
        }
        Header::parse(block).map(Some).map_err(|reason| self.malformed(reason))
    }

    /// One block, or none at the end of the stream.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.malformed("the archive ends inside a block")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        self.offset = self.offset.saturating_add(BLOCK as u64);
        Ok(Some(block))
    }

    fn begin_content(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_content(&mut self) -> Result<(), TarError> {
        let mut sink = [0; 16 * BLOCK];
        while self.read_content(&mut sink)? > 0 {}
        let mut padding = std::mem::take(&mut self.padding);
        while let Some(rest) = sink.get_mut(..usize::try_from(padding).unwrap_or(0)).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                // Some archivers do not pad the last entry; nothing of it is missing.
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(count) => {
                    padding -= count as u64;
                    self.offset = self.offset.saturating_add(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        Ok(())
    }

    fn extended(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        self.begin_content(size);
        let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
        let mut filled = 0;
        while let Some(rest) = content.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += self.read_content(rest)?;
        }
        Ok(content)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut name = self.extended(size)?;
        if let Some(end) = name.iter().position(|&b| b == 0) {
            name.truncate(end);
        }
        if name.is_empty() { Err(self.malformed("a long name is empty")) } else { Ok(name) }
    }

    fn gnu_map(&mut self, header: &Header) -> Result<Vec<Extent>, TarError> {
        let mut map = Vec::new();
        let mut pairs = header.raw(386, 96).to_vec();
        let mut more = header.raw(482, 1).first() == Some(&1);
        loop {
            sparse::gnu_pairs(&pairs, &mut map).map_err(|reason| self.malformed(reason))?;
            if !more {
                return Ok(map);
            }
            let block = self.block()?.ok_or_else(|| self.malformed("the archive ends inside a sparse map"))?;
            pairs = block.get(..504).unwrap_or_default().to_vec();
            more = block.get(504) == Some(&1);
            if more && pairs.first() == Some(&0) {
                return Err(self.malformed("the sparse map has an empty block"));
            }
        }
    }

    fn text_map(&mut self) -> Result<Vec<Extent>, TarError> {
        let mut text = TextMap::default();
        loop {
            if self.remaining < BLOCK as u64 {
                return Err(self.malformed("the sparse map is cut off"));
            }
            let block = self.block()?.ok_or_else(|| self.malformed("the archive ends inside a sparse map"))?;
            self.remaining -= BLOCK as u64;
            if text.block(&block).map_err(|reason| self.malformed(reason))? {
                return Ok(text.map);
            }
        }
    }

    fn malformed(&self, reason: &'static str) -> TarError {
        TarError::Malformed { offset: self.offset, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o4755);
        header.set_uid(7);
        header.set_gid(3_000_000_000);
        header.set_mtime(1_700_000_000);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header
    }

    fn content<R: Read>(reader: &mut Reader<R>) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), [0; 100]);
        loop {
            match reader.read_content(&mut buffer).unwrap() {
                0 => return all,
                count => all.extend_from_slice(&buffer[..count]),
            }
        }
    }

    #[test]
    fn entries_of_an_ordinary_archive() {
        let long = "d/".repeat(120) + "file";
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header(tar::EntryType::Regular, 5), "a", &b"hello"[..]).unwrap();
        builder.append_pax_extensions([("mtime", &b"5.25"[..]), ("SCHILY.xattr.user.k", b"v")]).unwrap();
        builder.append_data(&mut header(tar::EntryType::Regular, 513), &long, &[9; 513][..]).unwrap();
        builder.append_link(&mut header(tar::EntryType::Symlink, 0), "l", &long).unwrap();
        builder.append_data(&mut header(tar::EntryType::Directory, 0), "dir/", io::empty()).unwrap();
        let archive = builder.into_inner().unwrap();
        let mut reader = Reader::new(&archive[..]);

        let entry = reader.next().unwrap().unwrap();
        assert_eq!((&entry.name[..], entry.size, entry.mode), (&b"a"[..], 5, 0o4755));
        assert_eq!((entry.uid, entry.gid, entry.mtime), (7, 3_000_000_000, (1_700_000_000, 0)));
        assert_eq!(content(&mut reader), b"hello");
        let entry = reader.next().unwrap().unwrap();
        assert_eq!(entry.name, long.as_bytes());
        assert_eq!(entry.mtime, (5, 250_000_000));
        assert_eq!(entry.xattrs, [(b"user.k".to_vec(), b"v".to_vec())]);
        // The content is skipped when it is not read.
        let entry = reader.next().unwrap().unwrap();
        assert_eq!(entry.kind, EntryKind::Symlink { target: long.into_bytes() });
        assert_eq!(entry.mtime, (1_700_000_000, 0));
        assert_eq!(reader.next().unwrap().unwrap().kind, EntryKind::Directory);
        assert!(reader.next().unwrap().is_none());
        assert!(reader.next().unwrap().is_none());
    }

    /// Sparse files as GNU tar itself writes them, in each of its formats.
    #[test]
    fn sparse_files_in_all_formats() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sparse");
        let file = std::fs::File::create(&path).unwrap();
        for index in 0..40u64 {
            std::os::unix::fs::FileExt::write_all_at(&file, &[index as u8 + 1; 4096], index * 65536).unwrap();
        }
        file.set_len(1 << 24).unwrap();
        let expected = std::fs::read(&path).unwrap();
        for format in [
            &["-H", "gnu"][..],
            &["-H", "pax", "--sparse-version=0.0"],
            &["-H", "pax", "--sparse-version=0.1"],
            &["-H", "pax", "--sparse-version=1.0"],
        ] {
            let output = std::process::Command::new("tar")
                .args(["-S", "-c", "-f", "-"])
                .args(format)
                .args(["-C".as_ref(), directory.path().as_os_str(), "sparse".as_ref()])
                .output()
                .unwrap();
            assert!(output.status.success());
            assert!(output.stdout.len() < 1 << 20, "{format:?} is not sparse");
            let mut reader = Reader::new(&output.stdout[..]);
            let entry = reader.next().unwrap().unwrap();
            assert_eq!((&entry.name[..], entry.size), (&b"sparse"[..], 1 << 24), "{format:?}");
            let stored = content(&mut reader);
            let mut found = vec![0; expected.len()];
            let mut at = 0;
            for extent in &entry.extents {
                let (offset, length) = (extent.offset as usize, extent.length as usize);
                found[offset..offset + length].copy_from_slice(&stored[at..at + length]);
                at += length;
            }
            assert!(found == expected, "{format:?}");
            assert!(reader.next().unwrap().is_none());
        }
    }

    #[test]
    fn a_cut_archive_is_an_error() {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header(tar::EntryType::Regular, 1000), "a", &[1; 1000][..]).unwrap();
        let archive = builder.into_inner().unwrap();
        for length in [1, 511, 513, 1000, 1511] {
            let mut reader = Reader::new(&archive[..length]);
            let result = reader.next().and_then(|_| reader.next());
            assert!(matches!(result, Err(TarError::Malformed { .. })), "{length}: {result:?}");
        }
    }

    #[test]
    fn an_archive_may_end_in_the_padding_of_its_last_entry() {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header(tar::EntryType::Regular, 1000), "a", &[1; 1000][..]).unwrap();
        let archive = builder.into_inner().unwrap();
        for length in [1512, 1535, 1536, 2048, 2560] {
            let mut reader = Reader::new(&archive[..length]);
            assert!(reader.next().unwrap().is_some());
            assert!(reader.next().unwrap().is_none(), "{length}");
        }
    }

    #[test]
    fn a_block_of_zeros_among_entries_is_damage() {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_data(&mut header(tar::EntryType::Regular, 0), "a", io::empty()).unwrap();
        let archive = builder.into_inner().unwrap();
        let damaged = [&archive[..BLOCK], &[0; BLOCK], &archive[..BLOCK], &[0; 2 * BLOCK]].concat();
        let mut reader = Reader::new(&damaged[..]);
        reader.next().unwrap();
        assert!(matches!(reader.next(), Err(TarError::Malformed { .. })));
    }

    #[test]
    fn a_device_without_a_number_is_damage() {
        let mut device = header(tar::EntryType::Char, 0);
        device.set_path("null").unwrap();
        device.as_mut_bytes()[329..337].copy_from_slice(b"garbage\0");
        device.set_cksum();
        assert!(matches!(Reader::new(&device.as_bytes()[..]).next(), Err(TarError::Malformed { .. })));
    }

    #[test]
    fn a_long_name_of_gigabytes_is_refused_unread() {
        let mut huge = header(tar::EntryType::GNULongName, 8 << 30);
        huge.set_path("x").unwrap();
        huge.set_cksum();
        let stream = huge.as_bytes().chain(io::repeat(b'a'));
        assert!(matches!(Reader::new(stream).next(), Err(TarError::TooLarge { .. })));
    }

    proptest! {
        /// Damage anywhere in a valid archive gives entries or an error, never a panic or an endless loop.
        #[test]
        fn damaged_archives_are_survived(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..20),
            fix in any::<bool>(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let mut builder = tar::Builder::new(Vec::new());
            builder.append_pax_extensions([("GNU.sparse.map", &b"0,1,5,4"[..]), ("GNU.sparse.size", b"100")]).unwrap();
            builder.append_data(&mut header(tar::EntryType::Regular, 5), "a", &b"hello"[..]).unwrap();
            builder.append_data(&mut header(tar::EntryType::Regular, 5), "b".repeat(300), &b"hello"[..]).unwrap();
            let mut archive = builder.into_inner().unwrap();
            for (at, byte) in damage {
                let at = at.index(archive.len());
                archive[at] = byte;
            }
            if fix {
                // Make the checksums right again, so that the damage gets past them.
                for block in archive.chunks_exact_mut(BLOCK) {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
            archive.truncate(cut.index(archive.len() + 1));
            let mut reader = Reader::new(&archive[..]);
            let mut entries = 0;
            while let Ok(Some(entry)) = reader.next() {
                prop_assert!(!entry.name.is_empty());
                entries += 1;
                prop_assert!(entries <= archive.len() / BLOCK);
            }
        }
    }
}
