//! Finding images by whatever they are called.

use super::{LAYER_IMAGE, ROOTFS, Store, Stored};
use crate::digest::Digest;
use crate::image::Image;
use crate::reference::{Reference, Target};

impl Store {
    /// All images, by id.
    pub(crate) fn images(&self) -> Vec<Image> {
        let ids: Vec<Digest> = self.state().images.keys().copied().collect();
        ids.iter().filter_map(|id| self.image(id)).collect()
    }

    /// The image with this id.
    pub(crate) fn image(&self, id: &Digest) -> Option<Image> {
        let (stored, references) = {
            let state = self.state();
            let stored = state.images.get(id)?.clone();
            let of_image = state.references.iter().filter(|(_, image)| *image == id);
            (stored, of_image.map(|(reference, _)| reference.clone()).collect::<Vec<_>>())
        };
        Some(self.describe(id, &stored, &references))
    }

    fn describe(&self, id: &Digest, stored: &Stored, references: &[Reference]) -> Image {
        let named = |wanted: fn(&Target) -> bool| {
            references.iter().filter(|reference| wanted(reference.target())).map(ToString::to_string).collect()
        };
        let mut rootfs = vec![self.image_path(id).join(ROOTFS)];
        rootfs.extend(stored.record.disk.iter().map(|layer| self.layer_path(layer).join(LAYER_IMAGE)));
        Image {
            id: id.to_string(),
            repo_tags: named(|target| matches!(target, Target::Tag(_))),
            repo_digests: named(|target| matches!(target, Target::Digest(_))),
            size: stored.size,
            config: stored.config.clone(),
            pulled_at: stored.record.pulled_at(),
            rootfs,
        }
    }

    /// The image that `name` means: a tag or digest in any spelling, an id, or the start of exactly one id.
    pub(crate) fn find(&self, name: &str) -> Option<Digest> {
        let state = self.state();
        let reference: Option<Reference> = name.parse().ok();
        if let Some(id) = reference.and_then(|reference| state.references.get(&reference)) {
            return Some(*id);
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.is_empty() || digits.len() > 64 || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut found = state.images.keys().filter(|id| id.hex().starts_with(digits));
        match (found.next(), found.next()) {
            (Some(id), None) => Some(*id),
            _ => None,
        }
    }
}
