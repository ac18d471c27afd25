//! Manifests and indexes as they came, so that what is here need not be fetched again.
//!
//! `manifests/HEX.json` has what the digest HEX is of, and everything that leads from there to the image. A file proves
//! itself by its digests each time that it is read, so it needs no sync, and one that is lost or damaged is fetched
//! again. It stays as long as a reference leads to it.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::files::{self, Found};
use super::pending::Pending;
use super::{Store, record};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::{Reference, Target};

const MANIFESTS: &str = "manifests";

/// A manifest or an index, byte by byte.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// What the registry called it.
    pub(crate) media_type: Option<String>,
    pub(crate) text: String,
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    documents: Vec<Kept>,
}

impl Store {
    /// Whether there is anything of the repository of `reference`.
    pub(crate) fn has_some_of(&self, reference: &Reference) -> bool {
        let same = |known: &&Reference| known.host() == reference.host() && known.path() == reference.path();
        self.state().references.keys().any(|known| same(&known))
    }

    /// What the digest `top` is of, first, and what it leads to, if that was kept.
    pub(crate) fn manifests(&self, top: &Digest) -> Option<Vec<Kept>> {
        let Ok(Found::Whole(record)) = files::read_record::<Record>(&self.place_of(top)) else { return None };
        let proven = record.documents.first().is_some_and(|first| Digest::of(first.text.as_bytes()) == *top);
        proven.then_some(record.documents)
    }

    /// Keeps what the digest `top` is of, and what it leads to.
    ///
    /// # Errors
    /// [`Error::Store`] if it cannot be written; nothing depends on it.
    pub(crate) fn keep_manifests(&self, top: &Digest, documents: Vec<Kept>) -> Result<()> {
        let path = self.place_of(top);
        let _changing = self.change()?;
        files::make_directory(&self.root.join(MANIFESTS))?;
        if let Ok(Found::Foreign(_)) = files::read_record::<Record>(&path) {
            return Ok(());
        }
        let tmp = self.root.join("tmp");
        files::make_directory(&tmp)?;
        let new = tempfile::NamedTempFile::new_in(&tmp).map_err(Error::store("make a file in", &tmp))?;
        serde_json::to_writer(new.as_file(), &Record { version: record::VERSION, documents })
            .map_err(|error| Error::store("write", &path)(error.into()))?;
        new.persist(&path).map_err(|error| Error::store("replace", &path)(error.error))?;
        Ok(())
    }

    /// Removes what no reference leads to any more.
    pub(super) fn collect_manifests(&self, pending: &mut Pending) -> Result<()> {
        if !pending.names.complete() {
            return Ok(());
        }
        let needed: HashSet<Digest> = {
            let state = self.state();
            let digests = state.references.keys().filter_map(|reference| match reference.target() {
                Target::Digest(digest) => Some(*digest),
                Target::Tag(_) => None,
            });
            digests.collect()
        };
        let mut result = Ok(());
        for path in files::entries(&self.root.join(MANIFESTS))? {
            // What has another name is another version's.
            let name = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json"));
            let Some(Ok(top)) = name.map(Digest::from_hex) else { continue };
            let foreign = || matches!(files::read_record::<Record>(&path), Ok(Found::Foreign(_)));
            if !needed.contains(&top) && !foreign() {
                result = result.and(files::remove_file(&path));
            }
        }
        result
    }

    fn place_of(&self, top: &Digest) -> std::path::PathBuf {
        self.root.join(MANIFESTS).join(format!("{}.json", top.hex()))
    }
}
