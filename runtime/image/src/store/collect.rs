//! Removing images, and what nobody needs any more.

use std::collections::HashSet;

use super::{Store, files};
use crate::digest::Digest;
use crate::error::Result;

impl Store {
    /// Removes the image that `name` means, with all its tags and digests, and the layers that only it has. True if
    /// there was one.
    pub(crate) fn remove(&self, name: &str) -> Result<bool> {
        {
            let _change = self.change();
            let Some(id) = self.find(name) else { return Ok(false) };
            let before = {
                let mut state = self.state();
                let before = state.references.clone();
                state.references.retain(|_, image| *image != id);
                before
            };
            if let Err(error) = self.write_references() {
                self.state().references = before;
                return Err(error);
            }
        }
        self.collect()?;
        Ok(true)
    }

    /// Removes images without a reference, and layers without an image that no pull counts on.
    ///
    /// Layers that a failed pull completed stay until the next time, so that another attempt finds them.
    pub(crate) fn collect(&self) -> Result<()> {
        let _change = self.change();
        let (images, layers) = self.garbage();
        let tmp = self.root.join("tmp");
        for id in images {
            self.state().images.remove(&id);
            files::discard(&self.image_path(&id), &tmp)?;
        }
        for diff_id in layers {
            // A pull may have come to count on it since.
            {
                let mut state = self.state();
                if state.pins.contains_key(&diff_id) {
                    continue;
                }
                state.layers.remove(&diff_id);
            }
            files::discard(&self.layer_path(&diff_id), &tmp)?;
        }
        Ok(())
    }

    fn garbage(&self) -> (Vec<Digest>, Vec<Digest>) {
        let state = self.state();
        let referenced: HashSet<&Digest> = state.references.values().collect();
        let images: Vec<Digest> = state.images.keys().filter(|id| !referenced.contains(id)).copied().collect();
        let kept = state.images.iter().filter(|(id, _)| referenced.contains(id));
        let needed: HashSet<&Digest> = kept.flat_map(|(_, stored)| &stored.record.layers).collect();
        let free = |layer: &&Digest| !needed.contains(layer) && !state.pins.contains_key(layer);
        let layers = state.layers.keys().filter(free).copied().collect();
        (images, layers)
    }
}
