//! Orders about the files of a volume:
//!
//! * `m`: mount it;
//! * `d`: drop what is in the guest's memory of files;
//! * `w`: write so many bytes from a file's beginning, and to the host's disk;
//! * `r`: read so many bytes of it;
//! * `i`: write a page of it so many times in random places, and to the host's disk;
//! * `o`: read a page of it so many times in random places;
//! * `f`: make, look at and remove so many small files.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};

/// The device's name, and where it is mounted.
const TAG: &str = "nacelle";
const MOUNTED: &str = "/mnt";
const DIRECTORY: &str = "/mnt/share";
const FILE: &str = "/mnt/share/large";
/// Bytes at once from one end to the other, and in random places.
const PIECE: usize = 1 << 20;
const PAGE: usize = 4096;
/// Bytes of a small file.
const SMALL: usize = 1024;

/// Does what is ordered.
pub fn order(letter: u8, count: u64) -> Result<()> {
    match letter {
        b'm' => mounted(),
        b'd' => drop_caches(),
        b'w' => write(count),
        b'r' => read(count),
        b'i' => random_writes(count),
        b'o' => random_reads(count),
        b'f' => small_files(count),
        other => bail!("no order {other}"),
    }
}

/// The device may be put on the bus only now.
fn mounted() -> Result<()> {
    fs::create_dir_all(MOUNTED)?;
    for _ in 0..1000 {
        if mount(TAG, MOUNTED, "virtiofs", MountFlags::empty(), None).is_ok() {
            return Ok(());
        }
        fs::write("/sys/bus/pci/rescan", "1").context("rescan the PCI bus")?;
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("there is no device of files")
}

fn write(count: u64) -> Result<()> {
    let (mut file, piece) = (File::create(FILE)?, vec![7; PIECE]);
    for _ in 0..count / PIECE as u64 {
        file.write_all(&piece)?;
    }
    Ok(file.sync_all()?)
}

fn read(count: u64) -> Result<()> {
    let (mut file, mut piece) = (File::open(FILE)?, vec![0; PIECE]);
    for _ in 0..count / PIECE as u64 {
        file.read_exact(&mut piece)?;
    }
    Ok(())
}

fn random_writes(count: u64) -> Result<()> {
    let file = File::options().write(true).open(FILE)?;
    let page = [8; PAGE];
    for place in places(&file)?.take(usize::try_from(count)?) {
        file.write_all_at(&page, place)?;
    }
    Ok(file.sync_all()?)
}

fn random_reads(count: u64) -> Result<()> {
    let file = File::open(FILE)?;
    let mut page = [0; PAGE];
    for place in places(&file)?.take(usize::try_from(count)?) {
        file.read_exact_at(&mut page, place)?;
    }
    Ok(())
}

fn small_files(count: u64) -> Result<()> {
    let directory = Path::new(DIRECTORY).join("small");
    fs::create_dir(&directory)?;
    let names: Vec<_> = (0..count).map(|number| directory.join(number.to_string())).collect();
    for name in &names {
        fs::write(name, [9; SMALL])?;
    }
    for name in &names {
        if fs::metadata(name)?.len() != SMALL as u64 {
            bail!("{} has another size", name.display());
        }
    }
    for name in &names {
        fs::remove_file(name)?;
    }
    Ok(fs::remove_dir(&directory)?)
}

fn drop_caches() -> Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the caches")
}

/// Pages of the file, the same ones each time: a linear congruential generator of full period.
fn places(file: &File) -> Result<impl Iterator<Item = u64>> {
    let pages = file.metadata()?.len() / PAGE as u64;
    if pages == 0 {
        bail!("{FILE} is empty");
    }
    let mut state: u64 = 1;
    Ok(std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % pages * PAGE as u64
    }))
}
