//! What a reference means: from a tag or a digest to one image's manifest, by the registry's word or by what was kept.

use std::collections::HashMap;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::manifest::{self, Descriptor, Document};
use crate::pull::{Puller, blocking};
use crate::reference::{Reference, Target};
use crate::registry::{self, Repository};
use crate::store::Kept;
use crate::verify::Subject;

/// Manifests that are looked at for one image: an index may offer several, and point to further indexes.
const MAX_DOCUMENTS: usize = 32;

/// What the registry says an image is.
pub(crate) struct Resolved {
    /// Digest of what the reference leads to, be it manifest or index.
    pub(crate) digest: Digest,
    /// That, for verifiers.
    pub(crate) subject: Subject,
    /// What was fetched to know it, for the next time.
    pub(crate) documents: Vec<Kept>,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    /// Whether an index says that it is for this host.
    pub(crate) chosen: bool,
}

/// Where manifests come from.
pub(crate) enum Manifests<'a> {
    Registry(&'a Repository),
    Kept(HashMap<Digest, Kept>),
}

impl Manifests<'_> {
    async fn manifest(&self, target: &Target, limits: &Limits) -> Result<registry::Manifest> {
        let kept = match (self, target) {
            (Self::Registry(repository), _) => return repository.manifest(target, limits.manifest_bytes).await,
            (Self::Kept(kept), Target::Digest(digest)) => kept.get(digest).map(|kept| (*digest, kept)),
            (Self::Kept(_), Target::Tag(_)) => None,
        };
        let (digest, Kept { media_type, text }) =
            kept.ok_or_else(|| Error::corrupt("manifest", "it is not in the store"))?;
        Ok(registry::Manifest { bytes: text.clone().into_bytes(), digest, media_type: media_type.clone() })
    }
}

impl Puller {
    pub(crate) async fn resolve(&self, repository: &Repository, reference: &Reference) -> Result<Resolved> {
        let what = reference.to_string();
        match self.resolve_known(repository, reference, &what).await {
            Some(known) => Ok(known),
            None => self.resolve_from(&Manifests::Registry(repository), reference.target(), &what).await,
        }
    }

    /// What `reference` means, if the registry says that it is what was kept. Nothing was fetched then.
    async fn resolve_known(&self, repository: &Repository, reference: &Reference, what: &str) -> Option<Resolved> {
        if !self.store.has_some_of(reference) {
            return None;
        }
        let digest = repository.head(reference.target()).await?;
        let store = self.store.clone();
        let kept = blocking(what.to_owned(), move || Ok(store.manifests(&digest))).await.ok()??;
        let kept = kept.into_iter().map(|kept| (Digest::of(kept.text.as_bytes()), kept)).collect();
        let known = self.resolve_from(&Manifests::Kept(kept), &Target::Digest(digest), what).await.ok()?;
        Some(Resolved { documents: Vec::new(), ..known })
    }

    async fn resolve_from(&self, manifests: &Manifests<'_>, target: &Target, what: &str) -> Result<Resolved> {
        let (mut subject, mut documents, mut unfit) = (None, Vec::new(), None);
        // What is to be looked at, the best last.
        let mut pending = vec![(target.clone(), false)];
        for _ in 0..MAX_DOCUMENTS {
            let Some((target, chosen)) = pending.pop() else { break };
            let found = manifests.manifest(&target, &self.limits).await?;
            let subject: &Subject = subject.get_or_insert_with(|| Subject {
                media_type: found.media_type.clone().unwrap_or_default(),
                digest: found.digest,
                size: found.bytes.len() as u64,
            });
            let parsed = manifest::parse(&found.bytes, found.media_type.as_deref(), &self.limits, what);
            // What is no text cannot be read either.
            documents
                .push(Kept { media_type: found.media_type, text: String::from_utf8(found.bytes).unwrap_or_default() });
            match parsed {
                Ok(Document::Image { config, layers }) => {
                    // One of several, of which only its configuration says what it is.
                    if !chosen
                        && !pending.is_empty()
                        && !manifest::is_ours(&self.config(manifests, &config, what).await?)
                    {
                        continue;
                    }
                    let (digest, subject) = (subject.digest, subject.clone());
                    return Ok(Resolved { digest, subject, documents, config, layers, chosen });
                }
                Ok(Document::Index { candidates }) => {
                    let further = candidates.into_iter().rev().map(|next| (Target::Digest(next.digest), next.chosen));
                    pending.extend(further);
                }
                // Another that an index offers may do.
                Err(error) => _ = unfit.get_or_insert(error),
            }
        }
        match pending.is_empty() {
            true => Err(unfit.unwrap_or_else(|| Error::refused(what, "none of what it offers is for linux/amd64"))),
            false => Err(Error::refused(what, "its index leads to further indexes without end")),
        }
    }

    /// A configuration, from the store if it is there.
    pub(crate) async fn config(&self, manifests: &Manifests<'_>, config: &Descriptor, what: &str) -> Result<Vec<u8>> {
        let (store, id) = (self.store.clone(), config.digest);
        let what = format!("configuration {id} of {what}");
        match (blocking(what.clone(), move || Ok(store.config(&id))).await?, manifests) {
            (Some(config), _) => Ok(config),
            (None, Manifests::Registry(repository)) => repository.small_blob(&id, config.size, &what).await,
            (None, Manifests::Kept(_)) => Err(Error::corrupt(what, "it is not in the store")),
        }
    }
}
