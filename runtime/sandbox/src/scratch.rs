//! The pod's writable disk: a sparse file with an ext4 file system, which bounds what the
//! containers of a pod can write.
//!
//! Formatting takes longer than a pod may: an empty disk is formatted once for each size
//! and copied, holes left out, for every pod. It has no journal: a scratch disk never
//! outlives its guest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{SeekFrom, seek};

use crate::{Error, Result, oom};

/// Makes sure the template of this size exists and returns its path.
///
/// # Errors
/// `mkfs.ext4` missing or failing, the disk full.
pub fn template(directory: &Path, mib: u64) -> Result<PathBuf> {
    let path = directory.join(format!("scratch-{mib}.ext4"));
    if path.exists() {
        return Ok(path);
    }
    // The first pod may come while the daemon makes it.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    let temporary = directory.join(format!("scratch-{mib}.new"));
    let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
    file.set_len(mib << 20).map_err(Error::io("size", &temporary))?;
    let failed = |message: String| Error::Program { program: "mkfs.ext4", message };
    let mut command = Command::new("mkfs.ext4");
    oom::prepare(&mut command, oom::NEUTRAL);
    let output = command
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-L", "scratch"])
        .args(["-O", "^has_journal,^resize_inode,sparse_super2"])
        .args(["-E", "lazy_itable_init=1,nodiscard,packed_meta_blocks=1,num_backup_sb=0,root_owner=0:0"])
        .arg(&temporary)
        .output()
        .map_err(|e| failed(format!("{e}: install the package e2fsprogs")))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    fs::rename(&temporary, &path).map_err(Error::io("rename", &temporary))?;
    Ok(path)
}

/// Copies a template for one pod.
pub fn create(template: &Path, target: &Path) -> Result<()> {
    copy_sparse(template, target).map_err(Error::io("create scratch disk", target))
}

/// Copies the written extents only.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::options().write(true).create_new(true).open(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; 128 * 1024];
    let mut offset = 0;
    while offset < length {
        let start = match seek(&source, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&source, SeekFrom::Hole(start))?;
        offset = start;
        while offset < end {
            let want = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
            let got = source.read_at(&mut buffer[..want], offset)?;
            if got == 0 {
                return Ok(());
            }
            // A template's tables are mostly zeros that were written: leave them as holes.
            for (index, block) in buffer[..got].chunks(4096).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    target.write_all_at(block, offset + (index * 4096) as u64)?;
                }
            }
            offset += got as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_has_the_same_content_and_stays_sparse() {
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("from");
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"start", 0).unwrap();
        file.write_all_at(b"middle", (33 << 20) + 5).unwrap();
        let to = directory.path().join("to");
        copy_sparse(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn a_template_is_a_file_system_and_costs_little() {
        let directory = tempfile::tempdir().unwrap();
        let path = template(directory.path(), 10 * 1024).unwrap();
        let copy = directory.path().join("pod");
        create(&path, &copy).unwrap();
        let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&copy).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        let used = fs::metadata(&copy).unwrap().blocks() * 512;
        assert!(used < 1 << 20, "{used} bytes for an empty scratch disk");
    }
}
