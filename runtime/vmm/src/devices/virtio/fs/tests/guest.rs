//! A guest that speaks FUSE to a device.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, EntryOut, GetattrIn, InHeader, InitIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn,
    ReleaseIn, RenameIn, SetattrIn, WriteIn,
};
use fuse_backend_rs::api::filesystem::SetattrValid;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::{Access, Fs, Volumes};
use crate::devices::virtio::testing::{Driver, FEATURES, Interrupts, activation, memory, readable, writable};

const HIGH_BASE: u64 = 0x10_0000;
const REQUEST_BASE: u64 = 0x20_0000;
const INPUT: u64 = 0x40_0000;
const OUTPUT: u64 = 0x60_0000;
/// Room for an answer.
pub const OUTPUT_SIZE: u32 = 0x10_0000;
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// The device's root.
pub const ROOT: u64 = 1;

pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub volumes: Arc<Volumes>,
    pub fs: Fs,
    pub high: Driver,
    pub requests: Driver,
    pub notifications: Vec<EventFd>,
    unique: u64,
    /// Whom it asks as.
    pub user: (u32, u32),
}

impl Guest {
    /// A guest whose file system is not set up yet.
    pub fn raw() -> Self {
        let memory = memory(0x80_0000);
        let volumes = Arc::new(Volumes::new());
        let mut fs = Fs::new(volumes.clone()).unwrap();
        let notifications: Vec<_> = (0..2).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
        assert!(fs.take_notifications(&notifications).unwrap());
        let high = Driver::new(&memory, HIGH_BASE, 128);
        let requests = Driver::new(&memory, REQUEST_BASE, 512);
        let interrupt = Arc::<Interrupts>::default();
        fs.activate(activation(&memory, &[&high, &requests], FEATURES, &interrupt)).unwrap();
        Self { memory, volumes, fs, high, requests, notifications, unique: 1, user: (0, 0) }
    }

    /// A guest that has mounted the device.
    pub fn new() -> Self {
        let mut guest = Self::raw();
        let init = InitIn { major: 7, minor: 40, max_readahead: 1 << 17, flags: !(1 << 30) };
        guest.call(Opcode::Init, 0, init.as_slice()).unwrap();
        guest
    }

    pub fn share(&self, name: &str, path: &Path, access: Access) {
        self.volumes.add(name, held(path), access, true).unwrap();
    }

    /// Sends a message; answers what came back without its header, or the error's number.
    pub fn call(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            unique: self.unique,
            nodeid: node,
            uid: self.user.0,
            gid: self.user.1,
            pid: 1,
            padding: 0,
        };
        self.memory.write_slice(header.as_slice(), GuestAddress(INPUT)).unwrap();
        self.memory.write_slice(body, GuestAddress(INPUT + 0x1000)).unwrap();
        let mut buffers = vec![readable(INPUT, size_of::<InHeader>() as u32)];
        if !body.is_empty() {
            buffers.push(readable(INPUT + 0x1000, body.len() as u32));
        }
        buffers.push(writable(OUTPUT, size_of::<OutHeader>() as u32));
        buffers.push(writable(OUTPUT + 0x1000, OUTPUT_SIZE));
        let head = self.requests.add(&buffers);
        self.notify(1);
        let (used, written) = self.wait();
        assert_eq!(used, head);
        let answer: OutHeader = self.memory.read_obj(GuestAddress(OUTPUT)).unwrap();
        assert_eq!((answer.unique, answer.len), (self.unique, written), "{opcode:?}");
        if answer.error != 0 {
            return Err(-answer.error);
        }
        let mut data = vec![0; written as usize - size_of::<OutHeader>()];
        self.memory.read_slice(&mut data, GuestAddress(OUTPUT + 0x1000)).unwrap();
        Ok(data)
    }

    pub fn notify(&self, queue: usize) {
        self.notifications[queue].write(1).unwrap();
    }

    pub fn wait(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.requests.take() {
                return used;
            }
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let name = CString::new(name).unwrap();
        self.call(Opcode::Lookup, parent, name.as_bytes_with_nul()).map(|data| object(&data))
    }

    /// Looks a path below the device's root up.
    pub fn walk(&mut self, path: &str) -> Result<EntryOut, i32> {
        let mut entry = EntryOut { nodeid: ROOT, ..EntryOut::default() };
        for part in path.split('/') {
            entry = self.lookup(entry.nodeid, part)?;
        }
        Ok(entry)
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        let data = self.call(Opcode::Getattr, node, GetattrIn::default().as_slice())?;
        Ok(object::<AttrOut>(&data).attr)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<OpenOut, i32> {
        let open = OpenIn { flags: flags as u32, fuse_flags: 0 };
        self.call(Opcode::Open, node, open.as_slice()).map(|data| object(&data))
    }

    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(EntryOut, OpenOut), i32> {
        let create = CreateIn { flags: libc::O_RDWR as u32, mode, umask: 0o22, fuse_flags: 0 };
        let data = self.call(Opcode::Create, parent, &named(create.as_slice(), &[name]))?;
        let (entry, open) = data.split_at(size_of::<EntryOut>());
        Ok((object(entry), object(open)))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let read = ReadIn { fh, offset, size, ..ReadIn::default() };
        self.call(Opcode::Read, node, read.as_slice())
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<(), i32> {
        self.write_as(node, fh, offset, data, 0)
    }

    pub fn write_as(&mut self, node: u64, fh: u64, offset: u64, data: &[u8], fuse_flags: u32) -> Result<(), i32> {
        let write = WriteIn { fh, offset, size: data.len() as u32, fuse_flags, ..WriteIn::default() };
        let body = [write.as_slice(), data].concat();
        self.call(Opcode::Write, node, &body).map(|answer| assert_eq!(answer[..4], (data.len() as u32).to_le_bytes()))
    }

    pub fn release(&mut self, node: u64, fh: u64) {
        self.call(Opcode::Release, node, ReleaseIn { fh, ..ReleaseIn::default() }.as_slice()).unwrap();
    }

    pub fn truncate(&mut self, node: u64, size: u64) -> Result<(), i32> {
        let set = SetattrIn { valid: SetattrValid::SIZE.bits(), size, ..SetattrIn::default() };
        self.call(Opcode::Setattr, node, set.as_slice()).map(drop)
    }

    /// Sends what is not answered.
    pub fn forget(&mut self, node: u64, body: &[u8]) {
        let length = (size_of::<InHeader>() + body.len()) as u32;
        let header =
            InHeader { len: length, opcode: Opcode::Forget as u32, unique: 9, nodeid: node, ..InHeader::default() };
        self.memory.write_slice(&[header.as_slice(), body].concat(), GuestAddress(0x30_0000)).unwrap();
        self.high.add(&[readable(0x30_0000, length)]);
        self.notify(0);
        let deadline = Instant::now() + PATIENCE;
        while self.high.take().is_none() {
            assert!(Instant::now() < deadline, "the device does not take it");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn rename(&mut self, from: u64, name: &str, to: u64, new: &str) -> Result<(), i32> {
        let rename = RenameIn { newdir: to };
        self.call(Opcode::Rename, from, &named(rename.as_slice(), &[name, new])).map(drop)
    }
}

/// A file held by `O_PATH`.
pub fn held(path: &Path) -> OwnedFd {
    use rustix::fs::{Mode, OFlags, open};
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Arguments and the names that follow them.
pub fn named(arguments: &[u8], names: &[&str]) -> Vec<u8> {
    let mut body = arguments.to_vec();
    for name in names {
        body.extend_from_slice(name.as_bytes());
        body.push(0);
    }
    body
}

/// What the bytes of an answer are.
pub fn object<T: ByteValued + Default>(data: &[u8]) -> T {
    let mut object = T::default();
    let size = size_of::<T>();
    object.as_mut_slice().copy_from_slice(&data[..size]);
    object
}

/// A directory with some files.
pub fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "content").unwrap();
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    File::create(directory.path().join("sub/empty")).unwrap();
    directory
}
