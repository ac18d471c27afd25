//! Reads large JSON values from memory.

use std::fs::File;
use std::io::{self, BufReader, Seek, Write};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::de::DeserializeOwned;

/// Reads a value that libcontainer reads, too, or is part of one: by a file in memory, with
/// the very code that it reads its files with. A specification's takes a quarter of a
/// megabyte for each kind of source, and would be in the agent twice.
///
/// # Errors
/// If it is not such a value, as `serde_json` says it (its position may be one byte further), or if there is no memory.
pub fn read<T: DeserializeOwned>(json: &[u8]) -> io::Result<T> {
    let mut file = File::from(memfd_create(c"json", MemfdFlags::CLOEXEC)?);
    file.write_all(json)?;
    file.rewind()?;
    read_file(file)
}

/// Reads it from a file.
///
/// # Errors
/// As [`read`].
pub fn read_file<T: DeserializeOwned>(file: File) -> io::Result<T> {
    Ok(serde_json::from_reader(BufReader::new(file))?)
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::{LinuxResources, Spec};
    use proptest::prelude::*;

    use super::*;

    /// From a file, what was looked at but not taken counts as read.
    fn without_position(error: &dyn std::error::Error) -> String {
        let text = error.to_string();
        text.split_once(" at line ").map_or(text.as_str(), |(before, _)| before).to_owned()
    }

    #[test]
    fn it_is_what_it_is_from_memory() {
        let json = br#"{"ociVersion": "1.1.0", "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}, "args": ["caf\u00e9 \ud83d\ude00", "\n"]}}"#;
        assert_eq!(read::<Spec>(json).unwrap(), serde_json::from_slice(json).unwrap());
        let large = format!("{{\"ociVersion\": \"{}\"}}", "x".repeat(1 << 20));
        assert_eq!(read::<Spec>(large.as_bytes()).unwrap().version().len(), 1 << 20);
    }

    #[test]
    fn errors_say_the_same_as_from_memory() {
        for json in [
            "",
            "{",
            "nonsense",
            "{\"ociVersion\": 7}",
            "{\"ociVersion\": \"1.1.0\",\n \"mounts\": {}}",
            "{\"ociVersion\": \"1.1.0\"",
            "{\"ociVersion\": \"1.1.0\"}\n}",
            "{\"ociVersion\": \"1.1.0\", \"process\": {}}",
            "{\"ociVersion\": \"1.1.0\\q\"}",
            "{\"ociVersion\": \"1.1.0\n\"}",
            "{\"ociVersion\": \"1.1.0\", \"linux\": {\"resources\": {\"memory\": {\"limit\": 1e99}}}}",
        ] {
            let expected = serde_json::from_slice::<Spec>(json.as_bytes()).unwrap_err();
            let found = read::<Spec>(json.as_bytes()).unwrap_err();
            assert_eq!(without_position(&found), without_position(&expected), "{json}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_as_from_memory(json in "[{}\\[\\]:, \n\"0-9a-e.-]{0,40}") {
            let expected = serde_json::from_slice::<LinuxResources>(json.as_bytes());
            let expected = expected.map_err(|error| without_position(&error));
            prop_assert_eq!(read::<LinuxResources>(json.as_bytes()).map_err(|error| without_position(&error)), expected);
        }
    }
}
