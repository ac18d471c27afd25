//! The file of the references.
//!
//! One that cannot be read now, or that another version wrote, is not written: the references since then are in a file
//! beside it, until it can be read again. Then they are joined. Until then every image stays.

use std::collections::{BTreeMap, BTreeSet};

use super::files::{self, Found};
use super::pending::{Pending, chain};
use super::record::{self, References};
use super::{State, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

const REFERENCES: &str = "references.json";

/// The file beside it.
fn beside() -> String {
    format!("references.{}.json", record::VERSION)
}

/// What is known of the file.
#[derive(Debug, Default)]
pub(super) struct Names {
    file: File,
    /// There is one beside it.
    beside: bool,
    /// What is in memory could not be written.
    late: bool,
    /// The last run's could not be read: an image without one is somebody's nevertheless.
    pub(super) lost: bool,
    /// Why even the one beside it must not be written.
    shut: Option<Error>,
    /// The last that was said.
    said: String,
}

/// References, and images without one that stay.
#[derive(PartialEq, Eq)]
pub(super) struct Next {
    pub(super) references: BTreeMap<Reference, Digest>,
    pub(super) unnamed: BTreeSet<Digest>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum File {
    #[default]
    Unread,
    Ours,
    Foreign,
}

impl Names {
    pub(super) fn unread(&self) -> bool {
        self.file == File::Unread || self.shut.is_some()
    }

    /// Whether those in memory are all there are.
    pub(super) fn complete(&self) -> bool {
        self.file == File::Ours && !self.beside && !self.lost
    }

    /// Those in memory have changed, and are to be written.
    pub(super) fn changed(&mut self) {
        self.late = true;
    }

    fn say(&mut self, problem: String) {
        if self.said != problem {
            tracing::warn!(problem, file = REFERENCES, "images may be shown without their names");
            self.said = problem;
        }
    }
}

impl Store {
    /// Those that are known.
    pub(super) fn names(&self) -> Next {
        let state = self.state();
        Next { references: state.references.clone(), unnamed: state.unnamed.clone() }
    }

    /// Reads the references, unless that was done.
    pub(super) fn load_names(&self, pending: &mut Pending) {
        if !pending.names.unread() {
            return;
        }
        let mut lost = true;
        pending.names.shut = None;
        let plain = match files::read_record::<References>(&self.root.join(REFERENCES)) {
            Ok(Found::Whole(record)) => {
                pending.names.file = File::Ours;
                lost = false;
                record
            }
            Ok(Found::Absent) => {
                pending.names.file = File::Ours;
                lost = false;
                References::default()
            }
            Ok(Found::Incomplete(reason)) => {
                pending.names.file = File::Ours;
                pending.names.say(reason);
                References::default()
            }
            Ok(Found::Foreign(reason)) => {
                pending.names.file = File::Foreign;
                pending.names.say(reason);
                References::default()
            }
            Err(error) => {
                pending.names.say(chain(&error));
                References::default()
            }
        };
        let beside = match files::read_record(&self.root.join(beside())) {
            Ok(Found::Whole(record)) => {
                pending.names.beside = true;
                record
            }
            Ok(_) => References::default(),
            Err(error) => {
                pending.names.say(chain(&error));
                // What is in it is more than what is in memory.
                pending.names.shut = (pending.names.file != File::Ours).then_some(error);
                References::default()
            }
        };
        pending.names.lost = lost;
        let mut state = self.state();
        let State { images, references, unnamed, .. } = &mut *state;
        // Joined with what was written or is known only since.
        pending.names.late |= pending.names.file == File::Ours && (pending.names.beside || !references.is_empty());
        let since = std::mem::take(references);
        references.extend(plain.parsed().chain(beside.parsed()).chain(since));
        references.retain(|_, id| images.contains_key(id) || pending.image_later(id));
        unnamed.clear();
        match lost {
            true => unnamed.extend(images.keys()),
            false => unnamed.extend(plain.unnamed.iter().chain(&beside.unnamed)),
        }
        unnamed.retain(|id| {
            (images.contains_key(id) || pending.image_later(id)) && !references.values().any(|named| named == id)
        });
    }

    /// Makes these the references, on the disk and then in memory.
    pub(super) fn write_names(&self, pending: &mut Pending, next: Next) -> Result<()> {
        let Next { references, unnamed } = next;
        if let Some(error) = &pending.names.shut {
            return Err(error.clone());
        }
        let ours = pending.names.file == File::Ours;
        let path = if ours { self.root.join(REFERENCES) } else { self.root.join(beside()) };
        files::replace_record(&path, &References::new(&references, &unnamed), &self.root.join("tmp"))?;
        if ours && pending.names.beside {
            // If it stays, it is joined once more.
            pending.names.beside = files::remove_file(&self.root.join(beside())).is_err();
        } else if !ours {
            pending.names.beside = true;
        }
        pending.names.late = false;
        let mut state = self.state();
        state.references = references;
        state.unnamed = unnamed;
        Ok(())
    }

    /// Writes what is known in memory alone, if there is such; what cannot be written now is said once.
    pub(super) fn write_late_names(&self, pending: &mut Pending) {
        if !pending.names.late {
            return;
        }
        let now = self.names();
        if let Err(error) = self.write_names(pending, now) {
            pending.names.say(chain(&error));
        }
    }
}
