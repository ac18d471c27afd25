//! `nacelle daemon`: serves the CRI until it is told to end. Pods outlive it.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nacelle_cri::{Connection, Handler, Health, Images, Pods, Runtime};
use nacelle_image::ImageStore;
use nacelle_proto::runtime::v1::image_service_server::ImageServiceServer;
use nacelle_proto::runtime::v1::runtime_service_server::RuntimeServiceServer;
use nacelle_sandbox::Manager;
use nacelle_streaming::Server;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;

use crate::check;
use crate::config::Config;
use crate::{directories, gate, health, logging, notify};

/// Largest message accepted, in bytes.
const MESSAGE_LIMIT: usize = 16 << 20;
/// How long what a killed daemon had may stay in use: a process that it was about to start has all of it until that
/// becomes another program.
const LEAVING: Duration = Duration::from_secs(1);
/// How often it is looked at.
const AGAIN: Duration = Duration::from_millis(20);
/// How long calls under way may take to end once the daemon is told to.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or SIGINT.
pub fn main(config: Config) -> anyhow::Result<ExitCode> {
    logging::start(&config.log)?;
    #[cfg(feature = "failpoints")]
    nacelle_sandbox::set_failpoints();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
    runtime.block_on(serve(config))?;
    // Calls that did not end in time must not keep the process.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let patience = Instant::now() + LEAVING.mul_f64(config.timeout_scale);
    outlast(patience, |_| true, async || refuse_second(&config.socket).await).await?;
    directories::check(&config)?;
    // For the next daemon. A full disk keeps this one from nothing.
    if let Err(error) = directories::claim(&config) {
        tracing::warn!(error = format!("{error:#}"), "not written down where the pods are");
    }
    let program = std::env::current_exe().context("find this program")?;
    let images = config.root.join("images");
    let store = outlast(
        patience,
        |error| matches!(error, nacelle_image::Error::Locked { .. }),
        async || ImageStore::open_with(&images, config.image_options()),
    )
    .await?;
    let manager = outlast(
        patience,
        |error| matches!(error, nacelle_sandbox::Error::Locked { .. }),
        async || Manager::open(config.manager(program.clone())).await,
    )
    .await?;
    let streaming = Server::bind(config.streaming.options(config.timeout_scale)).await?;
    let door = streaming.door();
    let listener = listen(&config.socket)?;
    // The default one first.
    let others = config.handlers.keys().filter(|name| **name != config.default_handler);
    let handlers = std::iter::once(&config.default_handler).chain(others);
    let handlers = handlers.map(|name| Handler { name: name.clone() }).collect();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    tokio::spawn(streaming.serve(Arc::new(Pods::new(manager.clone()))));
    let (events, recovering) = (manager.clone(), manager.clone());
    let images = Images::new(store.clone(), manager.clone(), &config.images.pinned);
    let runtime = Runtime::new(manager, store, handlers, version.clone(), health(&config), door)
        .with_handlers_health(handlers_health(&config))
        .with_unset_seccomp(config.unset_seccomp.into())
        .with_timeout_scale(config.timeout_scale);
    if let Err(error) = check::handlers_can_run(&config.guest_handlers()) {
        tracing::warn!(error, "handlers that cannot make pods");
    }
    tracing::info!(socket = %config.socket.display(), version, "ready");
    let (key, gate) = gate::closed();
    let server = tonic::transport::Server::builder()
        .layer(gate)
        .add_service(RuntimeServiceServer::new(runtime).max_decoding_message_size(MESSAGE_LIMIT))
        .add_service(ImageServiceServer::new(images).max_decoding_message_size(MESSAGE_LIMIT));
    notify::ready();
    // Only now: what takes long, or does not work, keeps nobody from asking.
    let (give_up, gave_up) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        if let Err(error) = recovering.read_records().await {
            let _ = give_up.send(error);
            return;
        }
        key.turn();
        recovering.prepare_template();
        recovering.recover().await;
        recovering.collect_network_garbage();
    });
    let (farewell, begun) = tokio::sync::oneshot::channel();
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending; pods go on");
        notify::stopping();
        // Calls that would never end by themselves.
        events.end_events();
        let _ = farewell.send(());
    };
    let clients = UnixListenerStream::new(listener).map(|client| client.map(Connection::new));
    let serve = server.serve_with_incoming_shutdown(clients, stop);
    tokio::select! {
        result = serve => result.context("serve the CRI")?,
        Ok(error) = gave_up => return Err(error.into()),
        () = async { let _ = begun.await; tokio::time::sleep(FAREWELL).await } => {
            tracing::warn!("calls under way did not end within {FAREWELL:?}");
        }
    }
    let _ = std::fs::remove_file(&config.socket);
    Ok(())
}

/// Whether guests can run on this host, as those of pods without a RuntimeClass.
fn health(config: &Config) -> Health {
    let guest = config.default_guest();
    asked(health::Health::new("/dev/kvm", move || check::guests_can_run(&guest), config.timeout_scale))
}

/// Whether the handlers have what their guests start from.
fn handlers_health(config: &Config) -> Health {
    let handlers = config.guest_handlers();
    asked(health::Health::new("the handlers", move || check::handlers_can_run(&handlers), config.timeout_scale))
}

fn asked(health: health::Health) -> Health {
    Arc::new(move || {
        let health = health.clone();
        Box::pin(async move { health.now().await })
    })
}

/// Attempts something until it fails for another reason than that a killed daemon still has it, or until `patience`
/// is over.
async fn outlast<T, E>(
    patience: Instant,
    still_there: impl Fn(&E) -> bool,
    attempt: impl AsyncFn() -> Result<T, E>,
) -> Result<T, E> {
    loop {
        match attempt().await {
            Err(error) if still_there(&error) && Instant::now() < patience => tokio::time::sleep(AGAIN).await,
            result => return result,
        }
    }
}

/// Fails if somebody listens on the socket.
async fn refuse_second(socket: &Path) -> anyhow::Result<()> {
    if UnixStream::connect(socket).await.is_ok() {
        bail!("{} is in use by another process: stop it or configure another socket", socket.display());
    }
    Ok(())
}

/// Listens on the socket in place of one that nobody listens on any more. Only root may
/// connect: whoever can, owns the host.
fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = socket.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("create directory {}", directory.display()))?;
    }
    match std::fs::symlink_metadata(socket) {
        Ok(metadata) if !std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()) => {
            bail!("{} is there and is no socket: remove it or configure another socket", socket.display());
        }
        Ok(_) => std::fs::remove_file(socket).with_context(|| format!("remove stale {}", socket.display()))?,
        Err(_) => {}
    }
    // Bound under another name first, so that nobody can connect before the mode is set.
    let mut private: PathBuf = socket.into();
    private.set_extension("new");
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private).with_context(|| format!("listen on {}", socket.display()))?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o600))
        .and_then(|()| std::fs::rename(&private, socket))
        .with_context(|| format!("listen on {}", socket.display()))?;
    Ok(listener)
}
