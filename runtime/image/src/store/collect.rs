//! Removing images, and what nobody needs any more.
//!
//! Needs no room on the disk: the record goes first, and what has none is nobody's. The references follow.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::partial::space;
use super::pending::Pending;
use super::{IMAGE_RECORD, LAYER_RECORD, Layer, Store, files};
use crate::digest::Digest;
use crate::error::Result;

/// How long what a failed pull left is kept for another attempt.
pub(super) const KEEP: Duration = Duration::from_secs(24 * 3600);
/// The share of the file system that is free, below which nothing is kept: one in this many.
const SHORT: u64 = 10;

/// Whether the file in `path` was made or written to `age` before `now`, or longer ago. One that cannot be looked at is
/// not.
pub(super) fn is_old(path: &Path, now: SystemTime, age: Duration) -> bool {
    let written = path.symlink_metadata().and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| now.duration_since(written).is_ok_and(|since| since >= age))
}

impl Store {
    /// Removes the image that `name` means, with all its tags and digests, and the layers that only it has. True if
    /// there was one.
    pub(crate) fn remove(&self, name: &str) -> Result<bool> {
        let mut pending = self.change()?;
        let Some(id) = self.id(name).filter(|id| self.has_image(id)) else { return Ok(false) };
        let removed = self.drop_image(&mut pending, &id);
        if self.has_image(&id) {
            return removed.map(|()| false);
        }
        {
            let mut state = self.state();
            state.references.retain(|_, image| *image != id);
            // Nobody has removed the one that cannot be used now.
            match pending.image_later(&id) {
                true => state.unnamed.insert(id),
                false => state.unnamed.remove(&id),
            };
        }
        let collected = self.collect(&mut pending);
        // A reference to nothing is none, should this have to wait.
        pending.names.changed();
        self.write_late_names(&mut pending);
        removed.and(collected).map(|()| true)
    }

    /// Removes images that nothing keeps, with their layers, and layers of no image that are a day old, or all such if
    /// space is short. Goes on past what cannot be removed, which stays in the store, and gives the first failure.
    ///
    /// Layers that a failed pull completed stay so long, so that another attempt finds them, and so does the beginning
    /// of one that it did not.
    pub(super) fn collect(&self, pending: &mut Pending) -> Result<()> {
        let short = space(&self.root).is_some_and(|(free, all)| free < all / SHORT);
        self.collect_now(pending, short)
    }

    fn collect_now(&self, pending: &mut Pending, short: bool) -> Result<()> {
        let mut result = Ok(());
        for id in self.nameless() {
            result = result.and(self.drop_image(pending, &id));
        }
        let now = SystemTime::now();
        for (diff_id, record) in self.unneeded(pending) {
            if short || pending.freed.contains(&diff_id) || is_old(&record, now, KEEP) {
                result = result.and(self.drop_layer(pending, &diff_id));
            }
        }
        pending.freed.clear();
        result.and(self.collect_manifests(pending)).and(self.collect_partial(short))
    }

    /// Removes all that no image needs. True if that may have made room.
    pub(crate) fn make_room(&self) -> Result<bool> {
        let before = space(&self.root);
        let mut pending = self.change()?;
        self.collect_now(&mut pending, true)?;
        Ok(space(&self.root).map(|(free, _)| free) > before.map(|(free, _)| free))
    }

    /// Bytes that are free for the store.
    pub(super) fn free(&self) -> Option<u64> {
        space(&self.root).map(|(free, _)| free)
    }

    /// Removes an image, whatever leads to it. It is in the store afterwards if nothing of it could be removed.
    pub(super) fn drop_image(&self, pending: &mut Pending, id: &Digest) -> Result<()> {
        let Some(stored) = self.state().images.remove(id) else { return Ok(()) };
        if let Err(error) = files::remove_file(&stored.directory.join(IMAGE_RECORD)) {
            self.state().images.insert(*id, stored);
            return Err(error);
        }
        // Unlike those of a pull that failed, they are not for later.
        pending.freed.extend(&stored.record.layers);
        pending.remove(&stored.directory)
    }

    fn drop_layer(&self, pending: &mut Pending, diff_id: &Digest) -> Result<()> {
        let layer = {
            let mut state = self.state();
            // A pull may have come to count on it since.
            if state.pins.contains_key(diff_id) {
                return Ok(());
            }
            state.layers.remove(diff_id)
        };
        let Some(layer) = layer else { return Ok(()) };
        if let Err(error) = files::remove_file(&layer.directory.join(LAYER_RECORD)) {
            self.state().layers.insert(*diff_id, layer);
            return Err(error);
        }
        pending.inherited.remove(diff_id);
        pending.remove(&layer.directory)
    }

    fn nameless(&self) -> Vec<Digest> {
        let state = self.state();
        let named: HashSet<&Digest> = state.references.values().chain(&state.unnamed).collect();
        state.images.keys().filter(|id| !named.contains(id)).copied().collect()
    }

    /// Layers that no image and no pull needs, and the paths of their records.
    fn unneeded(&self, pending: &Pending) -> Vec<(Digest, PathBuf)> {
        let state = self.state();
        let needed: HashSet<&Digest> = state.images.values().flat_map(|stored| &stored.record.layers).collect();
        // An image that cannot be looked at has we know not which layers; another version's has none of those that were
        // made beside its own.
        let (ours, foreign) = pending.unusable_images();
        let doubtful = |id: &Digest, layer: &Layer| {
            pending.inherited.contains(id) && (ours || (foreign && layer.directory.extension().is_none()))
        };
        let free = |(id, layer): &(&Digest, &Layer)| {
            !needed.contains(id) && !state.pins.contains_key(id) && !doubtful(id, layer)
        };
        state.layers.iter().filter(free).map(|(id, layer)| (*id, layer.directory.join(LAYER_RECORD))).collect()
    }
}
