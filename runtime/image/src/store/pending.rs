//! What on the disk is not as it should be, and waits for the next change.
//!
//! The store opens, and its images can be used, whatever is wrong with the disk. What is *absent or cut* is what a
//! crash of ours leaves: it is removed, and if that fails, tried again. What *cannot be read now* (no descriptor left,
//! a failing disk) stays, and is looked at again. What *another version* wrote, or somebody else put there, stays until
//! the version that knows it is back; it is not even listed. Each is said once.
//!
//! What is in the way of something new is left where it is: the new one is made beside it, as `HEX.VERSION`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use super::files::{self, Found};
use super::load::{self, Lookup};
use super::names::Names;
use super::{Store, lock, record};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// How long what cannot be read now is left alone while nothing changes.
const AGAIN: Duration = Duration::from_secs(10);

/// What is to be tried again. Belongs to whoever changes the store.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) layers: BTreeMap<PathBuf, Unusable>,
    pub(super) images: BTreeMap<PathBuf, Unusable>,
    pub(super) names: Names,
    /// What is nobody's and could not be removed, and whether that was said.
    garbage: BTreeMap<PathBuf, bool>,
    /// Layers of earlier runs: an image that cannot be looked at may have them.
    pub(super) inherited: HashSet<Digest>,
    /// Layers of images that were removed since layers were last looked at.
    pub(super) freed: HashSet<Digest>,
}

/// A directory of a layer or an image that is there and cannot be used.
#[derive(Debug)]
pub(super) struct Unusable {
    id: Digest,
    /// Another version's: not looked at again.
    foreign: bool,
    /// The last that was said of it.
    reason: String,
}

/// What is to become of a directory.
enum Verdict<T> {
    Use(T),
    Keep,
    Remove,
    Forget,
}

impl Unusable {
    /// One that nobody has looked at.
    pub(super) fn new(id: Digest) -> Self {
        Self { id, foreign: false, reason: String::new() }
    }

    /// What is to become of it, looked at by `load` unless that is settled.
    fn look<T>(&mut self, path: &Path, load: impl FnOnce(&Path) -> Result<Found<T>>) -> Verdict<T> {
        if self.foreign {
            return Verdict::Keep;
        }
        match load(path) {
            Ok(Found::Whole(found)) => Verdict::Use(found),
            Ok(Found::Absent) => Verdict::Forget,
            Ok(Found::Incomplete(reason)) => {
                tracing::warn!(path = %path.display(), reason, "incomplete, as a crash leaves it: removed");
                Verdict::Remove
            }
            Ok(Found::Foreign(reason)) => {
                self.say(path, true, reason);
                Verdict::Keep
            }
            Err(error) => {
                self.say(path, false, chain(&error));
                Verdict::Keep
            }
        }
    }

    fn say(&mut self, path: &Path, foreign: bool, reason: String) {
        if self.reason != reason {
            match foreign {
                true => {
                    tracing::warn!(path = %path.display(), reason, "left alone: not this version's to use or remove")
                }
                false => tracing::warn!(path = %path.display(), reason, "cannot be used now; kept, and tried again"),
            }
            self.reason = reason;
        }
        self.foreign = foreign;
    }
}

impl Pending {
    /// Takes note of something to remove.
    pub(super) fn discard(&mut self, path: PathBuf) {
        self.garbage.entry(path).or_default();
    }

    /// Removes what nobody can find any more, now or later.
    pub(super) fn remove(&mut self, path: &Path) -> Result<()> {
        files::remove(path).inspect_err(|_| self.discard(path.to_owned()))
    }

    /// Removes what is nobody's, as far as that is possible now.
    fn sweep(&mut self) {
        self.garbage.retain(|path, said| match files::remove(path) {
            Ok(()) => false,
            Err(error) => {
                if !*said {
                    tracing::warn!(error = chain(&error), "nobody's, and cannot be removed now; tried again");
                }
                *said = true;
                true
            }
        });
    }

    fn layer_later(&self, id: &Digest) -> bool {
        self.layers.values().any(|unusable| unusable.id == *id)
    }

    pub(super) fn image_later(&self, id: &Digest) -> bool {
        self.images.values().any(|unusable| unusable.id == *id)
    }

    /// Whether there are images that cannot be looked at now, and whether there are another version's.
    pub(super) fn unusable_images(&self) -> (bool, bool) {
        let any = |foreign: bool| self.images.values().any(|unusable| unusable.foreign == foreign);
        (any(false), any(true))
    }

    /// Where to publish what is called `path`: there, or beside what must stay there.
    pub(super) fn place(&mut self, path: PathBuf) -> Result<PathBuf> {
        let beside = path.with_extension(record::VERSION.to_string());
        let mut reason = String::new();
        for candidate in [&path, &beside] {
            if self.garbage.contains_key(candidate) {
                self.sweep();
            }
            match self.layers.get(candidate).or_else(|| self.images.get(candidate)) {
                Some(unusable) => reason.clone_from(&unusable.reason),
                None if self.garbage.contains_key(candidate) => "it cannot be removed".clone_into(&mut reason),
                None => return Ok(candidate.clone()),
            }
        }
        Err(Error::store("replace", &beside)(std::io::Error::other(reason)))
    }
}

impl Store {
    /// Waits for its turn to change the store, and first does what could not be done before.
    ///
    /// # Errors
    /// If the store cannot be had at all: another process has it, or its directories cannot be listed.
    pub(super) fn change(&self) -> Result<MutexGuard<'_, Pending>> {
        let mut pending = self.changes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.settle(&mut pending)?;
        Ok(pending)
    }

    /// Looks again at what cannot be read, on a thread of its own, if it is time to. For look-ups, which wait for
    /// nothing.
    pub(super) fn look_again(self: &Arc<Self>) {
        {
            let mut state = self.state();
            let now = Instant::now();
            if state.again.is_none_or(|again| now < again) {
                return;
            }
            state.again = Some(now + AGAIN);
        }
        let store = self.clone();
        let again = move || match store.changes.try_lock() {
            Ok(mut pending) => {
                let _ = store.settle(&mut pending);
            }
            Err(TryLockError::Poisoned(poisoned)) => {
                let _ = store.settle(&mut poisoned.into_inner());
            }
            // Whoever has it has just looked.
            Err(TryLockError::WouldBlock) => {}
        };
        // Without a thread, later.
        let _ = std::thread::Builder::new().name("images".to_owned()).spawn(again);
    }

    /// Does what could not be done before, as far as it can be done now.
    pub(super) fn settle(&self, pending: &mut Pending) -> Result<()> {
        let settled = self.prepare(pending).map(|()| {
            self.load_layers(pending);
            self.load_images(pending);
            self.load_names(pending);
            pending.sweep();
            self.write_late_names(pending);
        });
        let waiting = |unusable: &BTreeMap<_, Unusable>| unusable.values().any(|unusable| !unusable.foreign);
        let again = settled.is_err() || waiting(&pending.layers) || waiting(&pending.images) || pending.names.unread();
        self.state().again = again.then(|| Instant::now() + AGAIN);
        settled
    }

    /// Takes the lock, and notes what is there.
    fn prepare(&self, pending: &mut Pending) -> Result<()> {
        if self.lock.get().is_some() {
            return Ok(());
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(Error::store("make directory", &self.root))?;
        let lock = lock::Lock::take(&self.root)?;
        let list = |name: &str| {
            let path = self.root.join(name);
            match files::make_directory(&path) {
                // It is made when it is needed.
                Err(error) if path.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) => {
                    tracing::warn!(error = chain(&error), "not made now; tried again");
                    Ok(Vec::new())
                }
                result => result.and_then(|()| files::entries(&path)),
            }
        };
        let (layers, images) = (list("layers")?, list("images")?);
        let tmp = list("tmp").unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "what a crash left there stays until the next start");
            Vec::new()
        });
        let known = |paths: Vec<PathBuf>| {
            let known = |path: PathBuf| {
                let id = digest(&path);
                if id.is_none() {
                    tracing::warn!(path = %path.display(), "left alone: this version makes nothing of that name");
                }
                id.map(|id| (path, Unusable::new(id)))
            };
            paths.into_iter().filter_map(known).collect::<BTreeMap<_, _>>()
        };
        pending.layers = known(layers);
        pending.images = known(images);
        tmp.into_iter().for_each(|path| pending.discard(path));
        // Nobody else sets it: whoever is here has the changes.
        let _ = self.lock.set(lock);
        Ok(())
    }

    fn load_layers(&self, pending: &mut Pending) {
        for (path, mut unusable) in std::mem::take(&mut pending.layers) {
            match unusable.look(&path, load::layer) {
                Verdict::Use(layer) => {
                    pending.inherited.insert(unusable.id);
                    match self.state().layers.entry(unusable.id) {
                        // Made anew beside it since.
                        Entry::Occupied(_) => pending.discard(path),
                        Entry::Vacant(entry) => _ = entry.insert(layer),
                    }
                }
                Verdict::Keep => drop(pending.layers.insert(path, unusable)),
                Verdict::Remove => pending.discard(path),
                Verdict::Forget => {}
            }
        }
    }

    pub(super) fn load_images(&self, pending: &mut Pending) {
        for (path, mut unusable) in std::mem::take(&mut pending.images) {
            let (id, layer) = (unusable.id, |digest: &Digest| self.find_layer(pending, digest));
            match unusable.look(&path, |path| load::image(path, &id, layer)) {
                Verdict::Use(stored) => {
                    let mut state = self.state();
                    if state.images.contains_key(&id) {
                        pending.discard(path);
                        continue;
                    }
                    state.images.insert(id, Arc::new(stored));
                    if pending.names.lost && !state.references.values().any(|named| *named == id) {
                        state.unnamed.insert(id);
                    }
                }
                Verdict::Keep => drop(pending.images.insert(path, unusable)),
                Verdict::Remove => pending.discard(path),
                Verdict::Forget => {}
            }
        }
    }

    pub(super) fn find_layer(&self, pending: &Pending, digest: &Digest) -> Lookup {
        match self.state().layers.get(digest) {
            Some(layer) => Lookup::There(layer.clone()),
            None if pending.layer_later(digest) => Lookup::Later,
            None => Lookup::Missing,
        }
    }
}

/// The id in the name of a directory: `HEX`, or `HEX.VERSION` for what lies beside another of its name.
fn digest(path: &Path) -> Option<Digest> {
    let name = path.file_name()?.to_str()?;
    let hex = name.strip_suffix(&format!(".{}", record::VERSION)).unwrap_or(name);
    Digest::from_hex(hex).ok()
}

/// An error with its causes.
pub(super) fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
