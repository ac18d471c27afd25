//! The way in: attaching pods to their networks.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use nacelle_netlink::Interface;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::cancel::Cancel;
use crate::check::Checks;
use crate::cni::{self, AddResult, Attachment, Chain, NetworkList, Plugins};
use crate::join::{self, Joined};
use crate::lock::{self, Held, How, LOCK};
use crate::netns::Netns;
use crate::parameters::{self, Parameters};
use crate::record::{Durable, NETWORKS_LIMIT, Record, is_id};
use crate::status::Status;
use crate::turn::Turns;
use crate::{Dns, Error, Mode, NetworkConfig, Pod, Result};

/// Names of a pod's interfaces, with a number after it.
pub(crate) const PREFIX: &str = "eth";
/// Names of pods' network namespaces, with the sandbox id after it.
pub(crate) const NETNS: &str = "nacelle-";

/// A guest's interface.
#[derive(Debug)]
pub struct GuestInterface {
    /// What is configured on it.
    pub interface: Interface,
    /// Its other end, for the VMM. The interface's cable is cut when all copies are closed.
    pub tap: OwnedFd,
}

/// What a pod has in the end.
#[derive(Debug, Default)]
pub struct Attached {
    /// Its interfaces; eth0 first.
    pub interfaces: Vec<GuestInterface>,
    /// Its addresses, the one it is known by first.
    pub ips: Vec<IpAddr>,
    /// Name resolution as its networks know it.
    pub dns: Dns,
    /// Kernel parameters that its plugins have set for it.
    pub parameters: Parameters,
}

/// The networks of the host. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) config: Arc<NetworkConfig>,
    pub(crate) plugins: Arc<Plugins>,
    pub(crate) shared: Arc<Shared>,
}

/// What is one for all clones.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The factor of time limits.
    pub(crate) scale: f64,
    /// How long a pod stays whose plugins do not take it off.
    pub(crate) del_limit: Duration,
    /// Directory of the records of pods that are gone, and that plugins did not take off.
    pub(crate) left: PathBuf,
    /// Whether there may be some.
    pub(crate) left_behind: AtomicBool,
    /// Whether there is a task for them.
    pub(crate) settling: AtomicBool,
    /// The lock of all networks.
    pub(crate) lock: PathBuf,
    pub(crate) turns: Turns,
    pub(crate) checks: Checks,
    pub(crate) status: Status,
}

impl Network {
    /// By this configuration; every time limit is multiplied by `timeout_scale`. The records of pods that are gone
    /// although plugins did not take them off are kept in the directory `left`, which need not be there.
    #[must_use]
    pub fn new(config: NetworkConfig, left: PathBuf, timeout_scale: f64) -> Self {
        let seconds = |seconds| Duration::from_secs(seconds).mul_f64(timeout_scale);
        let plugins = Plugins {
            directories: config.plugin_directories.clone(),
            limit: seconds(config.plugin_seconds),
            until: None,
            cancel: None,
        };
        let shared = Shared {
            scale: timeout_scale,
            del_limit: seconds(config.del_seconds),
            left,
            left_behind: AtomicBool::new(false),
            settling: AtomicBool::new(false),
            lock: LOCK.into(),
            turns: Turns::default(),
            checks: Checks::default(),
            status: Status::default(),
        };
        Self { config: Arc::new(config), plugins: Arc::new(plugins), shared: Arc::new(shared) }
    }

    /// The networks that pods join, and what is left of pods that are gone, in the form that CRI clients show.
    pub async fn describe(&self) -> Value {
        let seen = self.on_thread(|network| Ok((network.lists().unwrap_or_default(), network.describe_left())));
        let seen = tokio::time::timeout(self.patience(), seen).await.ok().and_then(Result::ok);
        let (lists, left) = seen.unwrap_or_default();
        let networks: Vec<_> = lists
            .iter()
            .enumerate()
            .map(|(number, list)| {
                let plugins: Vec<_> = list.plugins.iter().map(|plugin| json!({ "Network": plugin })).collect();
                json!({
                    "Config": {
                        "Name": list.name,
                        "CNIVersion": list.version.name(),
                        "Plugins": plugins,
                        "Source": list.source,
                    },
                    "IFName": format!("{PREFIX}{number}"),
                })
            })
            .collect();
        json!({
            "PluginDirs": self.config.plugin_directories,
            "PluginConfDir": self.config.conf_directory,
            "PluginMaxConfNum": self.config.networks,
            "Prefix": PREFIX,
            "Networks": networks,
            "Left": left,
        })
    }

    /// Makes the pod's network namespace, attaches it to its networks and joins its
    /// interfaces to taps. `record` is where what is done is written down. None if pods have
    /// no network. When it fails, nothing of it is left, unless the error says so.
    ///
    /// When the future is dropped, what is being done is ended and undone in the background.
    ///
    /// # Errors
    /// There is no network, a plugin fails, or a guest cannot have what they made.
    /// [`Error::Left`]: and what was made cannot be undone. Then [`Network::detach`] has to be called until it works.
    pub async fn attach(&self, pod: Pod, record: PathBuf) -> Result<Option<Attached>> {
        if self.config.cni == Mode::Off {
            return Ok(None);
        }
        let cancel = Arc::new(Cancel::new()?);
        // Asking what is over does nothing.
        let _when_dropped = AskOnDrop(cancel.clone());
        self.on_thread(move |network| match network.lists() {
            Err(Error::NotConfigured(_)) if network.config.cni == Mode::Optional => Ok(None),
            Err(error) => Err(error),
            Ok(lists) => network.attach_to(&pod, lists, &record, cancel).map(Some),
        })
        .await
    }

    pub(crate) fn lists(&self) -> Result<Vec<NetworkList>> {
        cni::load(&self.config.conf_directory, self.config.networks.min(NETWORKS_LIMIT))
    }

    /// Takes the lock of all networks, as long as one plugin may take.
    pub(crate) fn lock(&self, how: How, cancel: Option<&Cancel>) -> Result<Held> {
        lock::take(&self.shared.lock, how, self.plugins.limit, cancel)
    }

    fn attach_to(&self, pod: &Pod, lists: Vec<NetworkList>, path: &Path, cancel: Arc<Cancel>) -> Result<Attached> {
        if !is_id(&pod.id) {
            return Err(Error::Invalid(format!("{:?} is no sandbox id, 64 hexadecimal digits", pod.id)));
        }
        let (args, capabilities) = (pod.args()?, pod.capabilities()?);
        let _starting = self.shared.checks.starting();
        let turn = self.shared.turns.take(path, cancel.clone(), self.plugins.limit)?;
        let _with_others = self.lock(How::Shared, Some(&cancel))?;
        let netns = Netns::at(self.config.netns_directory.join(format!("{NETNS}{}", pod.id)));
        let mut record = Record::new(netns.path().into());
        record.write(path, Durable::No)?;
        let plugins = Plugins { cancel: Some(cancel.clone()), ..(*self.plugins).clone() };
        let attached = netns.create().and_then(|()| {
            let mut results = Vec::new();
            let before = match parameters::may_change(&lists) {
                true => Some(netns.enter(|| Ok(parameters::read()))?),
                false => None,
            };
            for (number, list) in lists.into_iter().enumerate() {
                let (args, capabilities) = (args.clone(), capabilities.clone());
                let interface = format!("{PREFIX}{number}");
                record.attachments.push(Attachment::new(list, interface, pod.id.clone(), args, capabilities));
                // From here on there is something that outlives the host's power.
                record.write(path, Durable::Yes)?;
                if let Some(attachment) = record.attachments.last_mut() {
                    results.push(Chain::new(&plugins).add(attachment, &netns.path().to_string_lossy())?);
                }
                record.write(path, Durable::No)?;
            }
            let named: Vec<_> = results.iter().flat_map(AddResult::in_sandbox).map(str::to_owned).collect();
            let (joined, parameters) = netns.enter(|| {
                // Before there are taps, which are nothing of the plugins'.
                let set =
                    before.map_or_else(Parameters::new, |before| parameters::changed(&before, parameters::read()));
                Ok((join::join_all(&pod.id, &named)?, set))
            })?;
            if cancel.asked() {
                Err(Error::Cancelled)
            } else {
                Ok(Attached { parameters, ..summary(joined, &results) })
            }
        });
        let attached = attached.map_err(|add| match self.undo(&mut record, path) {
            Ok(()) => add,
            Err(undo) => Error::Left { add: Box::new(add), undo: Box::new(undo) },
        });
        drop(turn);
        if attached.is_ok() {
            self.check_later(&pod.id, path);
        }
        attached
    }

    /// Runs `work` on a thread that is there as long as it takes, whatever becomes of the
    /// caller: plugins die with the thread that started them.
    pub(crate) async fn on_thread<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Self) -> Result<T> + Send + 'static,
    {
        let network = self.clone();
        let (answer, done) = oneshot::channel();
        std::thread::Builder::new()
            .name("network".into())
            .spawn(move || drop(answer.send(work(&network))))
            .map_err(Error::system("start a thread"))?;
        done.await.map_err(|_| Error::System {
            action: "finish an operation on a pod's network",
            source: std::io::ErrorKind::Other.into(),
        })?
    }
}

/// Asks an operation to end when nobody waits for it any more.
struct AskOnDrop(Arc<Cancel>);

impl Drop for AskOnDrop {
    fn drop(&mut self) {
        self.0.ask();
    }
}

fn summary(joined: Vec<Joined>, results: &[AddResult]) -> Attached {
    let mut ips = results.first().map(|result| result.addresses(&format!("{PREFIX}0"))).unwrap_or_default();
    if ips.is_empty() {
        // Not every plugin tells; the kernel knows.
        let first = joined.first().map(|joined| joined.interface.addresses.as_slice()).unwrap_or_default();
        ips = first.iter().map(|address| address.ip).collect();
    }
    let dns = results.iter().map(|result| &result.dns).find(|dns| !dns.nameservers.is_empty());
    let dns = dns.map_or_else(Dns::default, |dns| Dns {
        servers: dns.nameservers.clone(),
        searches: dns.search.clone(),
        options: dns.options.clone(),
    });
    let interfaces = joined.into_iter().map(|Joined { interface, tap }| GuestInterface { interface, tap }).collect();
    Attached { interfaces, ips, dns, parameters: Parameters::new() }
}
