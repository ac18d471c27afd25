//! Whether pods can join a network now, for whoever cannot wait for plugins: the kubelet asks every few seconds, and
//! takes silence for a dead runtime.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::cni::{Chain, NetworkList};
use crate::network::Network;
use crate::{Error, Mode};

/// How long whoever asks waits.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How long plugins are believed. What can be seen without them is looked at every time.
const FRESH: Duration = Duration::from_secs(10);

type Answer = Result<(), Arc<Error>>;

/// What is known of the networks.
#[derive(Debug, Default)]
pub struct Status {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Closed when the answer is there; plugins are never asked twice at once.
    asking: Option<watch::Receiver<()>>,
    answer: Option<Answer>,
    /// What the plugins of these networks said, and when.
    said: Option<(Instant, Vec<NetworkList>, Answer)>,
}

impl Status {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Network {
    /// Whether pods can join a network now. Returns within 2 s (times the scale of time limits): if plugins take longer,
    /// the answer before, while they go on. What they say counts for 10 s.
    ///
    /// # Errors
    /// Why not: no configuration, a plugin that is missing or not ready, or has not answered yet.
    pub async fn status(&self) -> Answer {
        if self.config.cni == Mode::Off {
            let words = "networking is switched off by network.cni = \"off\": pods have their loopback interface only";
            return Err(Arc::new(Error::Invalid(words.into())));
        }
        let patience = self.patience();
        let mut asking = self.ask();
        // It is closed, never changed.
        let _ = tokio::time::timeout(patience, asking.changed()).await;
        let late = || Err(Arc::new(Error::Asking(patience)));
        self.shared.status.state().answer.clone().unwrap_or_else(late)
    }

    pub(crate) fn patience(&self) -> Duration {
        PATIENCE.mul_f64(self.shared.scale)
    }

    /// Begins to ask, unless that has been begun.
    fn ask(&self) -> watch::Receiver<()> {
        let mut state = self.shared.status.state();
        // One that has ended without an answer is closed, too.
        if let Some(asking) = state.asking.as_ref().filter(|asking| asking.has_changed().is_ok()) {
            return asking.clone();
        }
        let (asks, asking) = watch::channel(());
        state.asking = Some(asking.clone());
        drop(state);
        let network = self.clone();
        let ask = move || {
            let answer = network.status_now();
            let mut state = network.shared.status.state();
            state.answer = Some(answer);
            state.asking = None;
            drop(state);
            drop(asks);
        };
        if let Err(error) = std::thread::Builder::new().name("network-status".into()).spawn(ask) {
            self.shared.status.state().answer = Some(Err(Arc::new(Error::system("start a thread")(error))));
        }
        asking
    }

    fn status_now(&self) -> Answer {
        let lists = self.lists()?;
        let chain = Chain::new(&self.plugins);
        lists.iter().try_for_each(|list| chain.find(list))?;
        let fresh = |(at, of, _): &&(Instant, Vec<NetworkList>, Answer)| at.elapsed() < FRESH && *of == lists;
        if let Some((_, _, said)) = self.shared.status.state().said.as_ref().filter(fresh) {
            return said.clone();
        }
        let said = lists.iter().try_for_each(|list| chain.status(list)).map_err(Arc::new);
        self.shared.status.state().said = Some((Instant::now(), lists, said.clone()));
        said
    }
}
