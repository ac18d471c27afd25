//! Calls that wait until the daemon knows its pods.
//!
//! A daemon listens before it has read what is on record: reading may take long, or hang with a disk. Who asks whether it is
//! there has an answer meanwhile; whatever else is asked waits.

use std::future::{Future, pending};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::watch;
use tonic::codegen::http::Request;
use tower::{Layer, Service};

/// Calls that need nothing of what is on record.
const FREE: [&str; 3] = [
    "/runtime.v1.RuntimeService/Version",
    "/runtime.v1.RuntimeService/Status",
    "/runtime.v1.RuntimeService/RuntimeConfig",
];

/// Lets the calls in.
#[derive(Debug)]
pub struct Key(watch::Sender<bool>);

/// What calls wait at.
#[derive(Debug, Clone)]
pub struct Gate(watch::Receiver<bool>);

/// A service behind a gate.
#[derive(Debug, Clone)]
pub struct Gated<S> {
    inner: S,
    gate: Gate,
}

/// A gate that is closed until its key is turned; for ever if the key is lost.
pub fn closed() -> (Key, Gate) {
    let (key, gate) = watch::channel(false);
    (Key(key), Gate(gate))
}

impl Key {
    /// Opens the gate.
    pub fn turn(self) {
        let _ = self.0.send(true);
    }
}

impl Gate {
    async fn pass(mut self) {
        if self.0.wait_for(|open| *open).await.is_err() {
            pending::<()>().await;
        }
    }

    fn lets_in(&self, path: &str) -> bool {
        FREE.contains(&path) || *self.0.borrow()
    }
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, gate: self.clone() }
    }
}

impl<S, B> Service<Request<B>> for Gated<S>
where
    S: Service<Request<B>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if self.gate.lets_in(request.uri().path()) {
            return Box::pin(self.inner.call(request));
        }
        // The service that has said it is ready is the one that is called.
        let next = self.inner.clone();
        let mut ready = std::mem::replace(&mut self.inner, next);
        let gate = self.gate.clone();
        Box::pin(async move {
            gate.pass().await;
            ready.call(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use tokio::time::timeout;
    use tower::service_fn;

    use super::*;

    fn ask(path: &str) -> Request<()> {
        Request::builder().uri(format!("http://node/runtime.v1.{path}")).body(()).unwrap()
    }

    #[tokio::test]
    async fn calls_that_need_the_records_wait_for_them_and_others_do_not() {
        let (key, gate) = closed();
        let mut service = gate.layer(service_fn(|request: Request<()>| async move {
            Ok::<_, Infallible>(request.uri().path().rsplit('/').next().unwrap().to_owned())
        }));
        for free in ["Version", "Status", "RuntimeConfig"] {
            assert_eq!(service.call(ask(&format!("RuntimeService/{free}"))).await.unwrap(), free);
        }
        for waits in ["RuntimeService/ListPodSandbox", "ImageService/RemoveImage"] {
            let answer = timeout(Duration::from_millis(50), service.call(ask(waits))).await;
            assert!(answer.is_err(), "{waits} was answered");
        }
        let waiting = tokio::spawn(service.call(ask("RuntimeService/ListPodSandbox")));
        key.turn();
        assert_eq!(waiting.await.unwrap().unwrap(), "ListPodSandbox");
        assert_eq!(service.call(ask("ImageService/RemoveImage")).await.unwrap(), "RemoveImage");
    }
}
