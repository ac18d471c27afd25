//! What the service manager is told, if it asks (`Type=notify`, `WatchdogSec=`).

use sd_notify::NotifyState;

/// Calls are answered from now on. A watchdog is told that the daemon goes on, by the same threads that serve calls, for
/// as long as they do.
pub fn ready() {
    tell(NotifyState::Ready);
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(limit / 3);
        loop {
            ticks.tick().await;
            tell(NotifyState::Watchdog);
        }
    });
}

/// The daemon is about to end.
pub fn stopping() {
    tell(NotifyState::Stopping);
}

/// Does nothing if nobody asks.
fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "service manager not told");
    }
}
