//! What can go wrong with a pod's network.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of this crate. The message names the thing and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no network to join.
    #[error("no CNI configuration in {}: install a network plugin", .0.display())]
    NotConfigured(PathBuf),
    /// A file of the configuration makes no sense.
    #[error("CNI configuration {}: {reason}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A plugin is not installed.
    #[error("CNI plugin {plugin:?} of the network {network:?} is not in {directories}: install it there")]
    PluginMissing {
        /// Its `type`.
        plugin: String,
        /// The network.
        network: String,
        /// Where it was looked for.
        directories: String,
    },
    /// A plugin said no.
    #[error("CNI plugin {plugin:?} of the network {network:?} failed to {command}: {message}")]
    Plugin {
        /// Its `type`.
        plugin: String,
        /// The network.
        network: String,
        /// The command: ADD, CHECK, DEL, GC or STATUS.
        command: &'static str,
        /// Its words, with details and code where it gave them.
        message: String,
        /// The code, where it gave one.
        code: Option<u64>,
    },
    /// A plugin did not end.
    #[error(
        "CNI plugin {plugin:?} of the network {network:?} did not {command} within {limit:?} and was killed; if it is only slow, raise network.plugin_seconds"
    )]
    Timeout {
        /// Its `type`.
        plugin: String,
        /// The network.
        network: String,
        /// The command.
        command: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// Whoever wanted it does not want it any more.
    #[error("ended before it was done: the pod is being stopped")]
    Cancelled,
    /// Plugins do not undo what they did. What others made is undone; the record stays.
    #[error(
        "{}; asked again whenever the pod is stopped, and without the pod once network.del_seconds have passed",
        .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    )]
    NotUndone(Vec<Self>),
    /// A pod could not join its networks, and what was made cannot be undone. The record stays: stopping the pod
    /// undoes it.
    #[error("{add}; what was made for the pod until then is left: {undo}")]
    Left {
        /// Why the pod could not join.
        add: Box<Self>,
        /// Why it cannot be undone.
        undo: Box<Self>,
    },
    /// Plugins have been asked for long, and have not answered yet.
    #[error("asking the CNI plugins for their status takes long: it is not over after {0:?}")]
    Asking(Duration),
    /// What the plugins made cannot be given to a guest.
    #[error("network interface {interface:?}: {reason}")]
    Interface {
        /// Its name in the pod's network namespace.
        interface: String,
        /// Why not.
        reason: String,
    },
    /// Something that was asked for the pod makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] nacelle_netlink::Error),
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Something else is being done with the pods' networks, and does not end.
    #[error(
        "the lock {} was not free within {limit:?}: it is held by {holders}; a plugin that hangs holds it up", path.display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long it was waited for.
        limit: Duration,
        /// Who has it, in words.
        holders: String,
    },
    /// Something else is being done with the pod's network, and does not end.
    #[error("what else is being done with the pod's network did not end within {limit:?} (record {})", record.display())]
    Busy {
        /// The record of the pod's network.
        record: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The record of a pod's network is of another version.
    #[error("record {} is of version {version}: use the nacelle {nacelle} to take the pod off its networks", path.display())]
    OtherVersion {
        /// The record.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// The version of the nacelle that wrote it, or "that wrote it".
        nacelle: String,
    },
    /// The record of a pod's network cannot be read.
    #[error(
        "record {} cannot be used ({reason}): repair it, or empty it and the pod is taken off the networks that are configured now", path.display()
    )]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// Whether something of the pod's network is left, for which the pod has to stay until taking it off has worked.
    #[must_use]
    pub fn is_left(&self) -> bool {
        matches!(self, Self::Left { .. } | Self::NotUndone(_))
    }

    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { action, source: source.into() }
    }

    pub(crate) fn path<E: Into<io::Error>>(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Path { action, path, source: source.into() }
    }
}
