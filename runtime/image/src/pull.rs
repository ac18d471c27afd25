//! A pull from reference to image.
//!
//! The manifest is fetched every time, because it says whether the caller may have the image and what the tag means
//! now. Everything below it has a digest and is fetched only if it is not here. Layers are fetched a few at a time,
//! each by a task that downloads and a blocking thread that builds; two pulls that need the same layer share it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Semaphore, watch};

use crate::digest::Digest;
use crate::erofs::{self, ErofsError};
use crate::error::{Error, ErrorKind, Result};
use crate::flight::{Flights, Seat};
use crate::image::Image;
use crate::layer::{self, Expected};
use crate::limits::Limits;
use crate::manifest::{self, Descriptor, Document};
use crate::progress::{LayerState, Progress};
use crate::reference::{Reference, Target};
use crate::registry::{self, Endpoint, Login, Repository};
use crate::store::{self, ImageRecord, LAYER_IMAGE, MadeImage, ROOTFS, Store};
use crate::tree::{MergeError, Tree};

/// Manifests that are looked at for one image: an index may offer several, and point to further indexes.
const MAX_DOCUMENTS: usize = 32;
/// Layers that are fetched at the same time, over all pulls.
pub(crate) const PARALLEL_LAYERS: usize = 3;

/// What pulls have in common.
#[derive(Debug, Clone)]
pub(crate) struct Puller {
    pub(crate) store: Arc<Store>,
    pub(crate) limits: Limits,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) flights: Flights<Digest, LayerState, Error>,
}

/// What the registry says an image is.
struct Resolved {
    /// Digest of what the reference leads to, be it manifest or index.
    digest: Digest,
    config: Descriptor,
    layers: Vec<Descriptor>,
    /// Whether an index says that it is for this host.
    chosen: bool,
}

impl Puller {
    /// Pulls `reference`: the first of `endpoints` that knows it says what it is, and the first from there on that has
    /// all of it delivers it.
    pub(crate) async fn pull(
        &self,
        reference: &Reference,
        endpoints: &[Endpoint],
        login: Option<&Login>,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Image> {
        let tag = matches!(reference.target(), Target::Tag(_));
        let mut attempts: Vec<(String, Error)> = Vec::new();
        let (mut resolved, mut deliverers) = (None, Vec::new());
        for (index, endpoint) in endpoints.iter().enumerate() {
            // Who may deliver the content of a digest also knows what the digest is.
            let asked = if tag { endpoint.resolve } else { endpoint.pull };
            if resolved.is_some() || !asked {
                deliverers.push((index, endpoint, None));
                continue;
            }
            let others = index + 1 < endpoints.len();
            let result = match Repository::new(endpoint, reference, login, others).map(Arc::new) {
                Ok(repository) => self.resolve(&repository, reference).await.map(|found| (repository, found)),
                Err(error) => Err(error),
            };
            match result {
                Ok((repository, found)) => {
                    resolved = Some(found);
                    deliverers.push((index, endpoint, Some(repository)));
                }
                Err(error) => note(&mut attempts, reference, endpoint, error)?,
            }
        }
        let Some(resolved) = resolved else { return Err(all(attempts, reference)) };
        for (index, endpoint, repository) in deliverers {
            if !endpoint.pull {
                continue;
            }
            let others = index + 1 < endpoints.len();
            let repository =
                repository.map_or_else(|| Repository::new(endpoint, reference, login, others).map(Arc::new), Ok);
            let result = match repository {
                Ok(repository) => self.fetch(repository, reference, &resolved, report).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(image) => return Ok(image),
                Err(error) => note(&mut attempts, reference, endpoint, error)?,
            }
        }
        Err(all(attempts, reference))
    }

    async fn resolve(&self, repository: &Repository, reference: &Reference) -> Result<Resolved> {
        let what = reference.to_string();
        let mut top = None;
        let mut unfit = None;
        // What is to be looked at, the best last.
        let mut pending = vec![(reference.target().clone(), false)];
        for _ in 0..MAX_DOCUMENTS {
            let Some((target, chosen)) = pending.pop() else { break };
            let found = repository.manifest(&target, self.limits.manifest_bytes).await?;
            let top = *top.get_or_insert(found.digest);
            match manifest::parse(&found.bytes, found.media_type.as_deref(), &self.limits, &what) {
                Ok(Document::Image { config, layers }) => {
                    // One of several, of which only its configuration says what it is.
                    if !chosen && !pending.is_empty() {
                        let name = format!("configuration {} of {what}", config.digest);
                        let bytes = repository.small_blob(&config.digest, config.size, &name).await?;
                        if !manifest::is_ours(&bytes) {
                            continue;
                        }
                    }
                    return Ok(Resolved { digest: top, config, layers, chosen });
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

    async fn fetch(
        &self,
        repository: Arc<Repository>,
        reference: &Reference,
        resolved: &Resolved,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Image> {
        let what = reference.to_string();
        let id = resolved.config.digest;
        let store = self.store.clone();
        let config = match blocking(what.clone(), move || Ok(store.config(&id))).await? {
            Some(config) => config,
            None => {
                let what = format!("configuration {id} of {what}");
                repository.small_blob(&id, resolved.config.size, &what).await?
            }
        };
        let (_, diff_ids) = manifest::parse_config(&config, resolved.layers.len(), resolved.chosen, &what)?;
        let _pins = self.store.pin(diff_ids.clone());
        let layers: Vec<Expected> = resolved
            .layers
            .iter()
            .zip(&diff_ids)
            .map(|(layer, diff_id)| Expected { digest: layer.digest, size: layer.size, diff_id: *diff_id })
            .collect();
        self.fetch_layers(&repository, &layers, report).await?;

        let mut references = vec![reference.with_digest(resolved.digest)];
        if matches!(reference.target(), Target::Tag(_)) {
            references.push(reference.clone());
        }
        let (store, limits) = (self.store.clone(), self.limits);
        let finish = move || loop {
            let made = match store.has_image(&id) {
                true => None,
                false => Some(make_image(&store, &limits, &what, &config, &diff_ids)?),
            };
            // None when the image was removed just now.
            if let Some(image) = store.add_image(&id, references.clone(), made)? {
                return Ok(image);
            }
        };
        blocking(reference.to_string(), finish).await
    }

    /// Brings all layers into the store.
    async fn fetch_layers(
        &self,
        repository: &Arc<Repository>,
        layers: &[Expected],
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<()> {
        let total = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        let done = std::sync::Mutex::new(vec![0u64; layers.len()]);
        let tell = |index: usize, layer: &Expected, state: LayerState| {
            let here = match state {
                LayerState::Waiting => 0,
                LayerState::Downloading { done, .. } => done.min(layer.size),
                LayerState::Complete => layer.size,
            };
            let mut all = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(slot) = all.get_mut(index) {
                *slot = here;
            }
            let done = all.iter().fold(0u64, |sum, done| sum.saturating_add(*done));
            drop(all);
            report(Progress { done, total, layer: layer.digest, index, layers: layers.len(), state });
        };
        let fetch = |(index, layer): (usize, Expected)| {
            let tell = &tell;
            async move { self.fetch_layer(repository, layer, |state| tell(index, &layer, state)).await }
        };
        let mut fetches: FuturesUnordered<_> = layers.iter().copied().enumerate().map(fetch).collect();
        while let Some(result) = fetches.next().await {
            result?;
        }
        Ok(())
    }

    /// Brings one layer into the store, or waits for whoever does.
    async fn fetch_layer(
        &self,
        repository: &Arc<Repository>,
        layer: Expected,
        tell: impl Fn(LayerState),
    ) -> Result<()> {
        loop {
            if self.store.layer(&layer.diff_id).is_some() {
                tell(LayerState::Complete);
                return Ok(());
            }
            let start = |status| {
                let (puller, repository) = (self.clone(), repository.clone());
                async move { puller.build_layer(&repository, layer, status).await }.boxed()
            };
            let Seat { mut work, mut status, first } = self.flights.join(layer.diff_id, LayerState::Waiting, start);
            tell(*status.borrow_and_update());
            let result = loop {
                tokio::select! {
                    result = &mut work => break result,
                    Ok(()) = status.changed() => tell(*status.borrow_and_update()),
                }
            };
            match result {
                // Another pull's credentials or registry failed; ours may not.
                Err(_) if !first => continue,
                Err(error) => return Err(error),
                Ok(()) => {}
            }
        }
    }

    /// Downloads a layer and builds its image at the same time.
    async fn build_layer(
        &self,
        repository: &Repository,
        layer: Expected,
        status: watch::Sender<LayerState>,
    ) -> Result<()> {
        let what = format!("layer {}", layer.digest);
        let cancelled = || Error::Cancelled { what: what.clone() };
        let _slot = self.slots.acquire().await.map_err(|_| cancelled())?;
        let (sender, reader) = registry::channel();
        let (store, limits, name) = (self.store.clone(), self.limits, what.clone());
        // The directory belongs to the thread: when this task is dropped, the reader fails, and the thread cleans up.
        let given_up = GivenUp::default();
        let flag = given_up.0.clone();
        let build = tokio::task::spawn_blocking(move || {
            let directory = store.temporary()?;
            let path = directory.path().join(LAYER_IMAGE);
            let built = layer::build(reader, &layer, &path, &limits, &flag).map_err(|error| error.about(&name))?;
            store.add_layer(layer.diff_id, &built, directory)
        });
        let total = layer.size;
        let report = |done| {
            status.send_replace(LayerState::Downloading { done, total });
        };
        let downloaded = repository.download(&layer.digest, layer.size, sender, report).await;
        let built = build.await;
        // A download that failed is why the thread failed too.
        downloaded?;
        built.map_err(|_| cancelled())?
    }
}

/// Tells a thread that nobody waits for it any more.
#[derive(Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Notes what became of asking an endpoint, or gives up if another cannot do better.
fn note(attempts: &mut Vec<(String, Error)>, reference: &Reference, endpoint: &Endpoint, error: Error) -> Result<()> {
    use ErrorKind::{Configuration, Corrupt, NotFound, Unauthorized, Unavailable};
    let hopeless = !matches!(error.kind(), NotFound | Unavailable | Unauthorized | Corrupt | Configuration);
    tracing::debug!(image = %reference, endpoint = endpoint.url, %error, "not from here");
    attempts.push((endpoint.url.clone(), error));
    if hopeless { Err(all(std::mem::take(attempts), reference)) } else { Ok(()) }
}

/// The error of a pull that no endpoint could serve.
fn all(mut attempts: Vec<(String, Error)>, reference: &Reference) -> Error {
    match (attempts.pop(), attempts.is_empty()) {
        (Some((_, only)), true) => only,
        (Some(last), false) => {
            attempts.push(last);
            Error::AllEndpoints { what: reference.to_string(), attempts }
        }
        (None, _) => Error::Unavailable {
            what: reference.to_string(),
            registry: reference.host().to_owned(),
            reason: "no server that may be asked is configured for this registry".to_owned(),
        },
    }
}

/// Merges the layers `diff_ids`, which are in the store, into the root file system of an image.
fn make_image(store: &Store, limits: &Limits, what: &str, config: &[u8], diff_ids: &[Digest]) -> Result<MadeImage> {
    let mut tree = Tree::default();
    let mut kept = tree.len();
    for (index, diff_id) in (0u16..).zip(diff_ids) {
        let upper = store.tree(diff_id)?;
        if tree.len() + upper.len() > limits.inodes {
            tree = tree.compact();
            kept = tree.len();
        }
        tree.merge(upper, index, limits.inodes).map_err(|error| match error {
            MergeError::Full => Error::limit(what, format!("more than {} files", limits.inodes)),
            _ => Error::refused(format!("layer {diff_id} of {what}"), error.to_string()),
        })?;
        // What a layer hides need not be carried on, but each look for it costs the whole tree.
        if tree.len() > 2 * kept + 10_000 {
            tree = tree.compact();
            kept = tree.len();
        }
    }
    tree = tree.compact();
    let missing = |diff_id: &Digest| Error::corrupt(format!("layer {diff_id}"), "it vanished from the store");
    let (mut disk, mut blocks) = (Vec::new(), Vec::new());
    let used: HashSet<u16> = tree.sources().map(|source| source.layer).collect();
    let mut places = Vec::new();
    for (index, diff_id) in (0u16..).zip(diff_ids) {
        // A layer that occurs twice is on the disk once, one without content not at all.
        let place = match disk.iter().position(|known| known == diff_id) {
            Some(place) => place,
            None if used.contains(&index) => {
                disk.push(*diff_id);
                blocks.push(store.layer(diff_id).ok_or_else(|| missing(diff_id))?.blocks);
                disk.len() - 1
            }
            None => 0,
        };
        places.push(u16::try_from(place).unwrap_or(u16::MAX));
    }
    for source in tree.sources_mut() {
        source.layer = places.get(usize::from(source.layer)).copied().unwrap_or(u16::MAX);
    }
    let directory = store.temporary()?;
    let path = directory.path().join(ROOTFS);
    let file = std::fs::File::create_new(&path).map_err(Error::store("create", &path))?;
    let id = Digest::of(config);
    let own = erofs::write_rootfs(&file, &tree, &blocks, id.uuid()).map_err(|error| match error {
        ErofsError::Write(error) => Error::store("write", &path)(error),
        ErofsError::TooLarge | ErofsError::Tree(_) => Error::limit(what, error.to_string()),
    })?;
    file.sync_all().map_err(Error::store("sync", &path))?;
    let joined = store::join(store, &disk, &blocks, directory.path())?;
    Ok(MadeImage { record: ImageRecord::new(diff_ids.to_vec(), disk, own, joined), config: config.to_vec(), directory })
}

/// Runs what waits for the disk where it disturbs nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    what: String,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Cancelled { what }))
}
