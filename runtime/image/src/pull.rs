//! A pull from reference to image.
//!
//! The registry is asked every time, because it says whether the caller may have the image and what the tag means now.
//! Everything else has a digest and is fetched only if it is not here: a pull with nothing new is one HEAD. Of each image, a few layers are fetched
//! at a time, each by a task that downloads and a thread that builds. Two pulls that need the same layer of the same
//! server share it; of two servers, each is asked, and both pulls go on when the first has given it, so that nobody
//! holds up a layer that others have, too.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::digest::Digest;
use crate::erofs::{self, ErofsError};
use crate::error::{Error, ErrorKind, Result};
use crate::flight::{Flights, Seat};
use crate::image::Image;
use crate::layer::{self, Expected};
use crate::limits::Limits;
use crate::manifest;
use crate::processors::Processors;
use crate::progress::{LayerState, Progress};
use crate::reference::{Reference, Target};
use crate::registry::{self, Endpoint, Login, Pace, Repository};
use crate::resolve::{Manifests, Resolved};
use crate::store::{self, ImageRecord, LAYER_IMAGE, MadeImage, Partial, ROOTFS, Store};
use crate::tree::{MergeError, Tree};
use crate::verify::Verifiers;

/// A layer on its way: its diff_id, its digest, and the server that it comes from.
pub(crate) type Source = (Digest, Digest, String);

/// What pulls have in common.
#[derive(Debug, Clone)]
pub(crate) struct Puller {
    pub(crate) store: Arc<Store>,
    pub(crate) limits: Limits,
    pub(crate) pace: Pace,
    /// Layers of one image that are fetched at the same time.
    pub(crate) downloads: usize,
    pub(crate) processors: Processors,
    pub(crate) verifiers: Option<Verifiers>,
    /// Numbers the pulls.
    pub(crate) pulls: Arc<AtomicU64>,
    pub(crate) flights: Flights<Source, LayerState, Error>,
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
            let result = match Repository::new(endpoint, reference, login, others, self.pace).map(Arc::new) {
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
        self.verify(reference, &resolved).await?;
        for (index, endpoint, repository) in deliverers {
            if !endpoint.pull {
                continue;
            }
            let others = index + 1 < endpoints.len();
            let repository = repository
                .map_or_else(|| Repository::new(endpoint, reference, login, others, self.pace).map(Arc::new), Ok);
            let result = match repository {
                Ok(repository) => {
                    let fetched = self.fetch(repository.clone(), reference, &resolved, report).await;
                    match fetched {
                        // What nobody needs is first to go.
                        Err(error) if error.is_full() && self.make_room(reference).await => {
                            self.fetch(repository, reference, &resolved, report).await
                        }
                        fetched => fetched,
                    }
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(image) => return Ok(image),
                Err(error) => note(&mut attempts, reference, endpoint, error)?,
            }
        }
        Err(all(attempts, reference))
    }

    /// Asks the verifiers, if there are any.
    async fn verify(&self, reference: &Reference, resolved: &Resolved) -> Result<()> {
        let Some(verifiers) = self.verifiers.clone() else { return Ok(()) };
        let (name, subject) = (reference.to_string(), resolved.subject.clone());
        blocking(name.clone(), move || verifiers.judge(&name, &subject)).await
    }

    async fn make_room(&self, reference: &Reference) -> bool {
        let store = self.store.clone();
        blocking(reference.to_string(), move || store.make_room()).await.unwrap_or(false)
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
        let config = self.config(&Manifests::Registry(&repository), &resolved.config, &what).await?;
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
        let (top, documents) = (resolved.digest, resolved.documents.clone());
        let finish = move || loop {
            let made = match store.has_image(&id) {
                true => None,
                false => Some(make_image(&store, &limits, &what, &config, &diff_ids)?),
            };
            // None when the image was removed just now.
            if let Some(image) = store.add_image(&id, references.clone(), made)? {
                if !documents.is_empty()
                    && let Err(error) = store.keep_manifests(&top, documents)
                {
                    tracing::debug!(%error, "manifests are fetched again next time");
                }
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
        let (slots, pull) = (Semaphore::new(self.downloads), self.pulls.fetch_add(1, Ordering::Relaxed));
        let slots = &slots;
        let fetch = |(index, layer): (usize, Expected)| {
            let tell = &tell;
            async move {
                let _slot = slots.acquire().await;
                self.fetch_layer(repository, pull, layer, |state| tell(index, &layer, state)).await
            }
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
        pull: u64,
        layer: Expected,
        tell: impl Fn(LayerState),
    ) -> Result<()> {
        let mut arrivals = self.store.arrivals();
        loop {
            if self.store.layer(&layer.diff_id).is_some() {
                tell(LayerState::Complete);
                return Ok(());
            }
            let start = |status| {
                let (puller, repository) = (self.clone(), repository.clone());
                async move { puller.build_layer(&repository, pull, layer, status).await }.boxed()
            };
            let source = (layer.diff_id, layer.digest, repository.source());
            let Seat { mut work, mut status, first } = self.flights.join(source, LayerState::Waiting, start);
            tell(*status.borrow_and_update());
            let result = loop {
                tokio::select! {
                    result = &mut work => break result,
                    // It may have come from another server.
                    Ok(()) = arrivals.changed() => if self.store.layer(&layer.diff_id).is_some() { break Ok(()) },
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

    /// Downloads a layer and builds its image at the same time, from where an interrupted download ended.
    async fn build_layer(
        &self,
        repository: &Repository,
        pull: u64,
        layer: Expected,
        status: watch::Sender<LayerState>,
    ) -> Result<()> {
        let (store, digest) = (self.store.clone(), layer.digest);
        let found = move || Ok(store.partial(&digest, layer.size));
        let partial = blocking(format!("layer {digest}"), found).await?;
        let resumed = partial.as_ref().is_some_and(|partial| partial.length() > 0);
        match self.build_from(repository, pull, layer, partial, &status).await {
            // What was here need not have been right.
            Err(error) if resumed && error.kind() == ErrorKind::Corrupt => {
                tracing::debug!(%error, "the interrupted download was wrong, and begins anew");
                self.build_from(repository, pull, layer, None, &status).await
            }
            result => result,
        }
    }

    async fn build_from(
        &self,
        repository: &Repository,
        pull: u64,
        layer: Expected,
        partial: Option<Partial>,
        status: &watch::Sender<LayerState>,
    ) -> Result<()> {
        let what = format!("layer {}", layer.digest);
        let cancelled = || Error::Cancelled { what: what.clone() };
        let offset = partial.as_ref().map_or(0, Partial::length);
        let (sender, mut reader) = registry::channel(self.processors.place(pull), partial);
        let (store, limits, name) = (self.store.clone(), self.limits, what.clone());
        // The directory belongs to the thread: when this task is dropped, the reader fails, and the thread cleans up.
        let given_up = GivenUp::default();
        let flag = given_up.0.clone();
        let build = on_thread(move || {
            let directory = store.temporary()?;
            let path = directory.path().join(LAYER_IMAGE);
            let built = layer::build(&mut reader, &layer, &path, &limits, &flag).map_err(|error| error.about(&name));
            // A store that fails may do better another time, but for one without room.
            let again = built.as_ref().is_err_and(|error| error.kind() == ErrorKind::Store);
            reader.close(again || flag.load(Ordering::Relaxed));
            store.add_layer(layer.diff_id, &built?, directory)
        })
        .map_err(|error| Error::limit(what.clone(), format!("there is no thread for it: {error}")))?;
        let total = layer.size;
        let report = |done| {
            status.send_replace(LayerState::Downloading { done, total });
        };
        let downloaded = repository.download(&layer.digest, layer.size, offset, sender, report).await;
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

/// Runs what may wait for a registry on a thread of its own: those of the pool are for what ends soon, and limited.
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    let run = move || _ = sender.send(work());
    std::thread::Builder::new().name("layer".to_owned()).spawn(run)?;
    Ok(receiver)
}

/// Runs what waits for the disk where it disturbs nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    what: String,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Cancelled { what }))
}
