//! Huge pages set aside for the pod.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};

/// Sets aside pages of `size` ("2MB") for `bytes`, below `root` (sysfs's
/// `kernel/mm/hugepages`). None are, where none are wanted.
pub fn reserve(root: &Path, size: &str, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let invalid = |problem: &str| Error::invalid("hugepages", format!("{size:?} {problem}"));
    let kilobytes = kilobytes(size).ok_or_else(|| invalid("is not a size like 2MB"))?;
    let file = root.join(format!("hugepages-{kilobytes}kB/nr_hugepages"));
    let pages = bytes.div_ceil(kilobytes << 10);
    fs::write(&file, pages.to_string()).map_err(|_| invalid("is no size of pages that the guest's kernel has"))?;
    let text = fs::read_to_string(&file).map_err(Error::path("read", &file))?;
    match text.trim().parse::<u64>() {
        Ok(got) if got >= pages => Ok(()),
        _ => Err(Error::State(format!(
            "the guest has memory for {} pages of {size} only, not for {pages}: it is too small",
            text.trim()
        ))),
    }
}

fn kilobytes(size: &str) -> Option<u64> {
    let (digits, shift) = [("KB", 0), ("MB", 10), ("GB", 20)]
        .iter()
        .find_map(|(unit, shift)| size.strip_suffix(unit).map(|digits| (digits, *shift)))?;
    let number: u64 = digits.parse().ok().filter(|number| (1..=1 << 20).contains(number))?;
    Some(number << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_kernel_s_names() {
        assert_eq!((kilobytes("2MB"), kilobytes("1GB"), kilobytes("64KB")), (Some(2048), Some(1 << 20), Some(64)));
        for bad in ["", "MB", "2Mi", "-1MB", "0MB", "99999999999GB", "2MB "] {
            assert_eq!(kilobytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn pages_are_counted_up_and_a_size_that_is_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("hugepages-2048kB");
        fs::create_dir(&directory).unwrap();
        reserve(root.path(), "2MB", (4 << 20) + 1).unwrap();
        assert_eq!(fs::read_to_string(directory.join("nr_hugepages")).unwrap(), "3");
        reserve(root.path(), "1GB", 0).unwrap();
        assert!(reserve(root.path(), "1GB", 1).unwrap_err().to_string().contains("1GB"));
    }
}
