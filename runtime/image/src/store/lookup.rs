//! Finding images by whatever they are called.

use std::sync::Arc;

use super::{Store, Stored};
use crate::digest::Digest;
use crate::image::Image;
use crate::reference::{Reference, Target};

impl Store {
    /// All images, by id.
    pub(crate) fn images(self: &Arc<Self>) -> Vec<Image> {
        self.look_again();
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
        Some(describe(id, &stored, &references))
    }

    /// The image that `name` means: a tag or digest in any spelling, an id, or the start of exactly one id.
    pub(crate) fn find(self: &Arc<Self>, name: &str) -> Option<Image> {
        self.look_again();
        self.image(&self.id(name)?)
    }

    /// The id of that image, which may be one that cannot be used now.
    pub(super) fn id(&self, name: &str) -> Option<Digest> {
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

fn describe(id: &Digest, stored: &Stored, references: &[Reference]) -> Image {
    let named = |wanted: fn(&Target) -> bool| {
        references.iter().filter(|reference| wanted(reference.target())).map(ToString::to_string).collect()
    };
    Image {
        id: id.to_string(),
        repo_tags: named(|target| matches!(target, Target::Tag(_))),
        repo_digests: named(|target| matches!(target, Target::Digest(_))),
        size: stored.size,
        config: stored.config.clone(),
        pulled_at: stored.record.pulled_at(),
        rootfs: stored.rootfs.clone(),
    }
}
