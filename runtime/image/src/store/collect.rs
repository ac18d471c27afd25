//! Removing images, and what nobody needs any more.
//!
//! Needs no room on the disk: the record goes first, and what has none is nobody's. The references follow.

use std::collections::HashSet;

use super::pending::Pending;
use super::{IMAGE_RECORD, LAYER_RECORD, Layer, Store, files};
use crate::digest::Digest;
use crate::error::Result;

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

    /// Removes images that nothing keeps, and layers without an image that no pull counts on. Goes on past what cannot
    /// be removed, which stays in the store, and gives the first failure.
    ///
    /// Layers that a failed pull completed stay until the next time, so that another attempt finds them.
    pub(super) fn collect(&self, pending: &mut Pending) -> Result<()> {
        let mut result = Ok(());
        for id in self.nameless() {
            result = result.and(self.drop_image(pending, &id));
        }
        for diff_id in self.unneeded(pending) {
            result = result.and(self.drop_layer(pending, &diff_id));
        }
        result
    }

    /// Removes an image, whatever leads to it. It is in the store afterwards if nothing of it could be removed.
    pub(super) fn drop_image(&self, pending: &mut Pending, id: &Digest) -> Result<()> {
        let Some(stored) = self.state().images.remove(id) else { return Ok(()) };
        if let Err(error) = files::remove_file(&stored.directory.join(IMAGE_RECORD)) {
            self.state().images.insert(*id, stored);
            return Err(error);
        }
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

    fn unneeded(&self, pending: &Pending) -> Vec<Digest> {
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
        state.layers.iter().filter(free).map(|(id, _)| *id).collect()
    }
}
