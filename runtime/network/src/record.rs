//! What is known of a pod's network: written before anything of it exists, removed when
//! nothing of it does.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cni::Attachment;
use crate::{Error, Result};

/// Version of the record; a change that old daemons cannot read raises it.
const VERSION: u32 = 1;

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Its network namespace.
    pub netns: PathBuf,
    /// The networks it joins or has joined, in order.
    pub attachments: Vec<Attachment>,
}

impl Record {
    /// Of a pod that has joined nothing yet.
    pub fn new(netns: PathBuf) -> Self {
        Self { version: VERSION, netns, attachments: Vec::new() }
    }

    /// Reads it; none if it does not exist.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::path("read", path)(error)),
        };
        let damaged = |reason: String| Error::Record { path: path.into(), reason };
        let record: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            let reason = format!("version {} is not {VERSION}: use the nacelle that wrote it", record.version);
            return Err(damaged(reason));
        }
        Ok(Some(record))
    }

    /// Writes it in place of the old one.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Record { path: path.into(), reason: error.to_string() })?;
        text.push(b'\n');
        let mut new: PathBuf = path.into();
        new.set_extension("json.new");
        fs::write(&new, text).map_err(Error::path("write", &new))?;
        fs::rename(&new, path).map_err(Error::path("replace", path))
    }

    /// Removes it.
    pub fn remove(path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::path("remove", path)(error)),
            _ => Ok(()),
        }
    }
}
