//! What each request does on the host.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, ROOT_ID, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Statx, StatxFlags, fallocate, fstat,
    linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, seek, statx, symlinkat, unlinkat,
};

use super::credentials::{Owner, keep_set_id};
use super::handles::Handle;
use super::metrics::FsMetrics;
use super::nodes::{Found, Held, Node, Version};
use super::volumes::Volumes;
use super::{attributes, directory, sys};

/// How long the guest believes what it was told of names and attributes.
pub const CACHE_TIME: Duration = Duration::from_secs(1);
/// `FOPEN_NOFLUSH`: closing a file needs no request of its own.
const NO_FLUSH: u32 = 1 << 5;
/// What is of use of the flags that a file is opened with. Direct I/O would demand of the
/// guest's buffers what only the host's disk knows.
const OPEN_FLAGS: OFlags =
    OFlags::ACCMODE.union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::DSYNC).union(OFlags::SYNC);

/// The file system behind the protocol.
#[derive(Debug)]
pub struct Passthrough {
    pub(super) volumes: Arc<Volumes>,
}

/// An error by its number.
pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Which file `name` below `directory` is, and what it is like; `directory` itself if the name
/// is empty. A link is not followed.
pub(super) fn identify(directory: impl AsFd, name: &CStr) -> io::Result<(Found, Statx)> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
    let stat = statx(directory, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)?;
    let found = Found {
        mount: stat.stx_mnt_id,
        device: libc::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    };
    Ok((found, stat))
}

/// A name that a directory can hold.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        name if name.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

impl Passthrough {
    pub(super) fn node(&self, id: u64) -> io::Result<Arc<Node>> {
        // The device's own root can do less than any of them.
        if id == ROOT_ID { Err(errno(libc::EROFS)) } else { self.volumes.node(id) }
    }

    fn writable(&self, id: u64) -> io::Result<Arc<Node>> {
        let node = self.node(id)?;
        Self::check_writable(&node)?;
        Ok(node)
    }

    fn check_writable(node: &Node) -> io::Result<()> {
        if node.read_only() {
            return Err(errno(libc::EROFS));
        }
        // A volume that may be written has come since. Asked so, the guest looks the path up
        // again, and by that finds the file through it.
        if node.held().writable { Ok(()) } else { Err(errno(libc::ESTALE)) }
    }

    /// Refuses what is done within one volume only, of a file and a directory. Those of one place that are held by
    /// two of its volumes are looked up again, which makes it one.
    fn check_together(node: &Node, held: &Held, directory: &Held) -> io::Result<()> {
        let volume = &directory.volume;
        match () {
            () if !node.is_in(volume) => Err(errno(libc::EXDEV)),
            () if held.mount == directory.mount => Ok(()),
            () if volume.place.plain => Err(errno(libc::ESTALE)),
            () => Err(errno(libc::EXDEV)),
        }
    }

    fn handle(&self, id: u64, node: u64) -> io::Result<Arc<Handle>> {
        self.volumes.handles.get(id, node)
    }

    pub(super) fn entry(&self, node: &Node, stat: &Statx) -> Entry {
        Entry {
            inode: node.id,
            attr: attributes::stat(stat, self.volumes.inode(node.identity.device, stat.stx_ino)),
            attr_timeout: CACHE_TIME,
            entry_timeout: CACHE_TIME,
            ..Entry::default()
        }
    }

    /// The file `name` in a directory of a volume; the guest is told of it.
    pub(super) fn look_up(&self, parent: &Node, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let (node, stat) = self.find(parent, name)?;
        Ok(self.entry(&node, &stat))
    }

    /// The same, and what it is like.
    fn find(&self, parent: &Node, name: &CStr) -> io::Result<(Arc<Node>, Statx)> {
        // Nearly always it is known already, and needs no descriptor.
        let held = parent.held();
        let (found, stat) = identify(&*held, name)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        match self.volumes.nodes.find(&held.volume, found.mount, held.volume.identity(kind, &found)) {
            Some(node) => Ok((node, stat)),
            None => self.enter(&held, name),
        }
    }

    /// The same for a file that is not known most likely.
    fn enter(&self, parent: &Held, name: &CStr) -> io::Result<(Arc<Node>, Statx)> {
        let file = openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let (found, stat) = identify(&file, c"")?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let identity = parent.volume.identity(kind, &found);
        let held = Held::new(file, found.mount, parent.volume.clone());
        Ok((self.volumes.nodes.enter(held, kind, identity)?, stat))
    }

    /// Opens a node's file anew. Only what cannot do anything by being opened.
    fn open_node(&self, node: &Node, flags: OFlags) -> io::Result<File> {
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(errno(libc::EIO));
        }
        let held = node.held();
        let path = sys::path_of(held.as_fd());
        let file = openat(CWD, path.as_c_str(), flags | OFlags::CLOEXEC, Mode::empty())?;
        Ok(file.into())
    }

    /// What the guest is to know of a file that it opens.
    fn options(&self, node: &Node, file: &File, now: Version) -> OpenOptions {
        let mut options = OpenOptions::empty();
        options.set(OpenOptions::KEEP_CACHE, node.unchanged(now));
        if self.volumes.is_local(node.identity.device, file) {
            // SAFETY: any bits are valid, the type is a number towards the guest; the crate
            // knows an older protocol.
            options |= unsafe { OpenOptions::from_bits_unchecked(NO_FLUSH) };
        }
        options
    }

    fn attributes(&self, node: &Node, handle: Option<&Handle>) -> io::Result<(libc::stat64, Duration)> {
        let (_, stat) = match handle {
            Some(handle) => identify(&handle.file, c"")?,
            None => identify(&*node.held(), c"")?,
        };
        Ok((attributes::stat(&stat, self.volumes.inode(node.identity.device, stat.stx_ino)), CACHE_TIME))
    }

    /// Makes a file by `make` and tells the guest of it.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&Held) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.writable(parent)?;
        {
            let _owner = Owner::new(ctx.uid, ctx.gid)?;
            make(&parent.held())?;
        }
        self.look_up(&parent, name)
    }
}

/// Keeps or clears set-user-id bits for the operation that follows.
fn clear_set_id(clear: bool) -> io::Result<()> {
    keep_set_id(!clear)
}

fn open_mode(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) & OPEN_FLAGS
}

fn wants_write(flags: OFlags) -> bool {
    flags & OFlags::ACCMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC)
}

impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that begins anew has forgotten everything.
        self.destroy();
        Ok(FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::MAX_PAGES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::HANDLE_KILLPRIV_V2)
    }

    fn destroy(&self) {
        self.volumes.handles.clear();
        self.volumes.nodes.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        if parent == ROOT_ID {
            let root = self.volumes.root(name.to_bytes()).ok_or_else(|| errno(libc::ENOENT))?;
            let (_, stat) = identify(&*root.held(), c"")?;
            return Ok(self.entry(&root, &stat));
        }
        let parent = self.node(parent)?;
        self.look_up(&parent, name)
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        self.volumes.nodes.forget(inode, count);
    }

    fn getattr(&self, _ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(libc::stat64, Duration)> {
        if inode == ROOT_ID {
            return Ok((attributes::device_root(), CACHE_TIME));
        }
        let node = self.node(inode)?;
        let handle = handle.map(|handle| self.handle(handle, inode)).transpose()?;
        self.attributes(&node, handle.as_deref())
    }

    fn setattr(
        &self,
        _ctx: &Context,
        inode: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let node = self.writable(inode)?;
        if valid.contains(SetattrValid::MODE) {
            keep_set_id(true)?;
            sys::chmod(node.held().as_fd(), attr.st_mode & 0o7777)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let id = |flag, id: u32| valid.contains(flag).then_some(id).filter(|id| *id != u32::MAX);
            let uid = id(SetattrValid::UID, attr.st_uid).map(rustix::fs::Uid::from_raw);
            let gid = id(SetattrValid::GID, attr.st_gid).map(rustix::fs::Gid::from_raw);
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&*node.held(), c"", uid, gid, flags)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| errno(libc::EINVAL))?;
            let handle = handle.map(|handle| self.handle(handle, inode)).transpose()?;
            clear_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle.filter(|handle| handle.writable) {
                Some(handle) => rustix::fs::ftruncate(&handle.file, size)?,
                None => rustix::fs::ftruncate(self.open_node(&node, OFlags::WRONLY)?, size)?,
            }
        }
        if let Some(times) = attributes::times(&attr, valid) {
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(&*node.held(), c"", &times, flags)?;
        }
        self.attributes(&node, None)
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let node = self.node(inode)?;
        Ok(readlinkat(&*node.held(), c"", Vec::with_capacity(256))?.into_bytes())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make(ctx, parent, name, |parent| symlinkat(target, parent, name))
    }

    fn mknod(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(mode);
        // A device file would be the host's device to the host. What is no device (a mark that
        // an overlay hides a file by) is fine.
        let allowed = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => true,
            FileType::CharacterDevice => rdev == 0,
            _ => false,
        };
        if !allowed {
            return Err(errno(libc::EPERM));
        }
        let mode = Mode::from_bits_truncate(mode & !umask);
        self.make(ctx, parent, name, |parent| mknodat(parent, name, kind, mode, 0))
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        let mode = Mode::from_bits_truncate(mode & !umask);
        self.make(ctx, parent, name, |parent| mkdirat(parent, name, mode))
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        Ok(unlinkat(&*self.writable(parent)?.held(), name, AtFlags::empty())?)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        Ok(unlinkat(&*self.writable(parent)?.held(), name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _ctx: &Context,
        from: u64,
        from_name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(from_name)?;
        check_name(to_name)?;
        let (from, to) = (self.writable(from)?, self.writable(to)?);
        let (from_held, to_held) = (from.held(), to.held());
        Self::check_together(&from, &from_held, &to_held)?;
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
        Ok(renameat_with(&*from_held, from_name, &*to_held, to_name, flags)?)
    }

    fn link(&self, _ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let (node, parent) = (self.writable(inode)?, self.writable(parent)?);
        let (file, directory) = (node.held(), parent.held());
        Self::check_together(&node, &file, &directory)?;
        // By descriptor alone, it would take a capability over the whole host.
        linkat(CWD, sys::path_of(file.as_fd()), &*directory, name, AtFlags::SYMLINK_FOLLOW)?;
        self.look_up(&parent, name)
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let node = self.node(inode)?;
        let mode = open_mode(flags);
        if wants_write(mode) {
            Self::check_writable(&node)?;
        }
        clear_set_id(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        let file = self.open_node(&node, mode)?;
        let options = self.options(&node, &file, fstat(&file)?.into());
        let handle = self.volumes.handles.add(&node, wants_write(mode), file)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        let parent = self.writable(parent)?;
        let directory = parent.held();
        let mode = open_mode(args.flags);
        let permissions = Mode::from_bits_truncate(args.mode & !args.umask);
        let made = {
            let _owner = Owner::new(ctx.uid, ctx.gid)?;
            let flags = mode | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(&*directory, name, flags, permissions)
        };
        let ((node, stat), file) = match made {
            Ok(file) => (self.enter(&directory, name)?, Some(File::from(file))),
            Err(rustix::io::Errno::EXIST) if args.flags & libc::O_EXCL as u32 == 0 => (self.find(&parent, name)?, None),
            Err(error) => return Err(error.into()),
        };
        let open = || {
            let made = file.map(|file| identify(&file, c"").map(|(found, stat)| (file, found, stat)));
            let (file, now) = match made.transpose()? {
                // Somebody on the host may have put another file there since.
                Some((file, found, stat)) if directory.volume.identity(node.kind, &found) == node.identity => {
                    (file, Version::from(stat))
                }
                _ => {
                    clear_set_id(args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
                    let file = self.open_node(&node, mode)?;
                    let now = fstat(&file)?.into();
                    (file, now)
                }
            };
            let options = self.options(&node, &file, now);
            Ok((self.volumes.handles.add(&node, wants_write(mode), file)?, options))
        };
        match open() {
            Ok((handle, options)) => Ok((self.entry(&node, &stat), Some(handle), options, None)),
            Err(error) => {
                self.volumes.nodes.forget(node.id, 1);
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(handle, inode)?;
        let count = w.write_from(&mut *borrowed(&handle.file), size as usize, offset)?;
        FsMetrics::count(&self.volumes.metrics.read_bytes, count);
        Ok(count)
    }

    fn write(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(handle, inode)?;
        clear_set_id(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let count = r.read_to(&mut *borrowed(&handle.file), size as usize, offset)?;
        FsMetrics::count(&self.volumes.metrics.written_bytes, count);
        Ok(count)
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        // Where the host's file system does something at a close it is done here, for the
        // caller to see whether it worked.
        let copy = self.handle(handle, inode)?.file.try_clone()?;
        close(copy.into())
    }

    fn fsync(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let handle = self.handle(handle, inode)?;
        if datasync { handle.file.sync_data() } else { handle.file.sync_all() }
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handle(handle, inode)?;
        let mode = FallocateFlags::from_bits(mode).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        Ok(fallocate(&handle.file, mode, offset, length)?)
    }

    fn release(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.volumes.handles.close(handle, inode);
        Ok(())
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        if inode == ROOT_ID {
            return Ok(attributes::device_statfs());
        }
        sys::statvfs(self.node(inode)?.held().as_fd())
    }

    fn setxattr(&self, _ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let node = self.writable(inode)?;
        attributes::check_xattr(name)?;
        let flags = i32::try_from(flags).map_err(|_| errno(libc::EINVAL))?;
        sys::setxattr(node.held().as_fd(), name, value, flags)
    }

    fn getxattr(&self, _ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let node = self.node(inode)?;
        let mut value = vec![0; attributes::xattr_buffer(size)];
        let length = sys::getxattr(node.held().as_fd(), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(length).map_err(|_| errno(libc::E2BIG))?));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let node = self.node(inode)?;
        let mut names = vec![0; attributes::xattr_buffer(size)];
        let length = sys::listxattr(node.held().as_fd(), &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(u32::try_from(length).map_err(|_| errno(libc::E2BIG))?));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let node = self.writable(inode)?;
        attributes::check_xattr(name)?;
        sys::removexattr(node.held().as_fd(), name)
    }

    fn opendir(&self, _ctx: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if inode == ROOT_ID {
            return Ok((None, OpenOptions::empty()));
        }
        let node = self.node(inode)?;
        let file = self.open_node(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok((Some(self.volumes.handles.add(&node, false, file)?), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // The names of the volumes are the agent's business.
        if inode == ROOT_ID {
            return Ok(());
        }
        let (node, handle) = (self.node(inode)?, self.handle(handle, inode)?);
        directory::read(&handle, size, offset, |entry| {
            let ino = self.volumes.inode(node.identity.device, entry.inode(node.identity.inode));
            add_entry(DirEntry { ino, ..entry.of_protocol() })
        })
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if inode == ROOT_ID {
            return Ok(());
        }
        let (node, handle) = (self.node(inode)?, self.handle(handle, inode)?);
        // Each entry takes some 128 bytes more here than in the host's own list.
        directory::read(&handle, size / 4, offset, |entry| {
            let ino = self.volumes.inode(node.identity.device, entry.inode(node.identity.inode));
            // The guest looks at an entry without a number itself, if it needs to.
            let found = match entry.is_dot() {
                true => Entry::default(),
                false => self.look_up(&node, entry.name).unwrap_or_default(),
            };
            let added = add_entry(DirEntry { ino, ..entry.of_protocol() }, found);
            if !matches!(added, Ok(count) if count > 0) {
                self.volumes.nodes.forget(found.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fsync(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, _ctx: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.volumes.handles.close(handle, inode);
        Ok(())
    }

    fn lseek(&self, _ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.handle(handle, inode)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // All others the guest's kernel knows by itself.
            _ => return Err(errno(libc::EINVAL)),
        };
        let _position = handle.position.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(seek(&handle.file, position)?)
    }
}

/// A file as the crate wants it, which is not closed when it is dropped.
fn borrowed(file: &File) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is open for as long as the borrow, and never closed by this.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}

/// Closes a descriptor and tells what came of it.
fn close(file: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor was owned, and nobody has it any more.
    match unsafe { libc::close(file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
