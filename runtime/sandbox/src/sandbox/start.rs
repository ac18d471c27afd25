//! From a record to a guest that is ready.

use std::fs;
use std::sync::Arc;

use nacelle_network::Attached;
use nacelle_proto::agent::v1 as api;
use nacelle_vmm::config::Start;

use super::{Sandbox, make_directory, network, remove_directory};
use crate::cgroup::{self, Cgroup};
use crate::clock;
use crate::failpoint::step;
use crate::handlers::GuestKind;
use crate::model::{SandboxConfig, SandboxState};
use crate::sizing::GuestSize;
use crate::vm::{Sign, Vm};
use crate::{Error, Result, oom, scratch, user_namespace};

/// As much as the guest's generator has state.
const ENTROPY_BYTES: usize = 32;

impl Sandbox {
    /// Makes the guest. On failure nothing of it is left; or, where its network cannot be taken down, the pod stays, to
    /// be stopped: its state tells.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        match self.try_start().await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.discard(&error).await;
                Err(error)
            }
        }
    }

    async fn try_start(self: &Arc<Self>) -> Result<()> {
        // The record comes first: whatever exists under this id has an owner.
        make_directory(&self.paths.root)?;
        step!("start.directory");
        self.save().await?;
        step!("start.record");
        make_directory(&self.paths.run)?;
        let config = self.record().config;
        let manager = self.manager.clone();
        let bounds = cgroup::bounds(&config.cgroup_parent)?;
        let guest = manager.guest_of(&config)?;
        let size = GuestSize::of(&config, &guest, bounds)?;
        let kind = GuestKind { guest, size };
        if let Some(shortage) = size.shortage(&config) {
            tracing::warn!(sandbox = %self.id, namespace = config.namespace, pod = config.name, "{shortage}");
        }
        self.update(|record| record.size = Some(size)).await?;
        let cgroup = Cgroup::create(&config.cgroup_parent, &self.id)?;
        if let Some(cgroup) = &cgroup {
            cgroup.limit(&config.resources, &config.overhead)?;
        }
        step!("start.cgroup");
        let origin = self.templates.origin(&kind).await;
        let cloned = matches!(origin, Start::Clone(_));
        let (vm, sign) = self.launch(&kind, origin, cgroup.as_ref()).await?;
        // While the guest starts, its disk and its network are made.
        let (disk, scratch_mib) = (self.paths.scratch(), kind.guest.scratch_mib);
        let copy = tokio::task::spawn_blocking(move || {
            let template = scratch::template(&manager.root.join("templates"), scratch_mib)?;
            scratch::create(&template, &disk)
        });
        let guest = self.connect_guest(&config, vm, sign, &kind, cloned, cgroup.as_ref()).await;
        // Whatever became of the guest: who removes the directory must not meet somebody who writes to it.
        let copied = tokio::time::timeout(self.manager.boot_deadline(), copy).await;
        let (vm, attached) = guest?;
        copied
            .map_err(|_| Error::Deadline {
                action: "making the pod's disk".into(),
                limit: self.manager.boot_deadline(),
            })?
            .map_err(|e| Error::Internal(e.to_string()))??;
        step!("start.scratch");
        let path = self.paths.scratch();
        let disk = fs::File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        let slot = vm.add_scratch(disk).await?;
        let interfaces = self.add_interfaces(&vm, attached.as_ref()).await?;
        step!("start.devices");
        let now = clock::now();
        let request = api::ConfigureSandboxRequest {
            hostname: config.host_name(),
            resolv_conf: network::resolv_conf(&config.dns, attached.as_ref()).into_bytes(),
            hosts: network::hosts(&config, attached.as_ref()).into_bytes(),
            sysctls: network::sysctls(&config, attached.as_ref()),
            scratch: Some(api::Device { slot: slot.into() }),
            clock_seconds: now.div_euclid(1_000_000_000),
            clock_nanoseconds: i32::try_from(now.rem_euclid(1_000_000_000)).unwrap_or(0),
            interfaces,
            pids_limit: bounds.pids.unwrap_or(0),
            hugepages: config.resources.hugepages.iter().cloned().collect(),
            user_namespace: config.user_namespace.map(user_namespace::request),
            entropy: entropy()?,
        };
        let mut client = self.agent.client();
        let configured = self.agent.call("configure the sandbox", client.configure_sandbox(request));
        tokio::select! {
            result = configured => {
                if result.is_err() && cloned {
                    // It may be the template's fault: the next one boots.
                    self.templates.forget(&kind);
                }
                result.map(drop)?;
            }
            end = vm.wait_exit() => {
                return Err(Error::Boot { id: self.id.clone(), reason: end.reason, console: vm.console() });
            }
        }
        step!("start.configured");
        let ips = attached.map(|attached| attached.ips).unwrap_or_default();
        self.record.change(|record| {
            record.ips = ips;
            record.state = SandboxState::Ready;
        });
        if let Err(error) = self.save().await {
            self.record.change(|record| record.state = SandboxState::Creating);
            return Err(error);
        }
        self.tell_change(SandboxState::Creating, SandboxState::Ready);
        step!("start.ready");
        self.watch(vm.clone());
        self.learn_versions(vm);
        self.attend();
        Ok(())
    }

    /// Waits until the guest is ready, and attaches it to its networks meanwhile.
    async fn connect_guest(
        self: &Arc<Self>,
        config: &SandboxConfig,
        vm: Arc<Vm>,
        sign: Sign,
        kind: &GuestKind,
        cloned: bool,
        cgroup: Option<&Cgroup>,
    ) -> Result<(Arc<Vm>, Option<Attached>)> {
        let ready = vm.ready(sign, self.manager.boot_deadline());
        let (attached, ready) = tokio::join!(self.attach_network(config, &vm), ready);
        let attached = attached?;
        step!("start.attached");
        match ready {
            Ok(()) => Ok((vm, attached)),
            Err(error) if cloned => {
                tracing::warn!(sandbox = %self.id, %error, "the guest does not start as a clone: booting it");
                self.templates.forget(kind);
                Ok((self.boot_instead(&vm, kind, cgroup).await?, attached))
            }
            Err(error) => Err(error),
        }
    }

    /// Starts the VMM and puts it on record.
    async fn launch(
        self: &Arc<Self>,
        kind: &GuestKind,
        origin: Start,
        cgroup: Option<&Cgroup>,
    ) -> Result<(Arc<Vm>, Sign)> {
        let score = oom::of_parent(&self.record.lock().config.cgroup_parent);
        let (vm, sign) = Vm::spawn(&self.manager, &self.id, &self.paths, kind, origin, cgroup, score).await?;
        let vm = Arc::new(vm);
        self.lock().vm = Some(vm.clone());
        self.update(|record| record.vmm = Some(vm.process().clone())).await?;
        step!("start.launched");
        Ok((vm, sign))
    }

    /// Boots a guest in place of one that did not start.
    async fn boot_instead(self: &Arc<Self>, failed: &Vm, kind: &GuestKind, cgroup: Option<&Cgroup>) -> Result<Arc<Vm>> {
        failed.kill().await?;
        remove_directory(&self.paths.run)?;
        make_directory(&self.paths.run)?;
        let (vm, sign) = self.launch(kind, Start::Boot, cgroup).await?;
        vm.ready(sign, self.manager.boot_deadline()).await?;
        Ok(vm)
    }

    /// Removes what a start that failed for `reason` has made.
    async fn discard(self: &Arc<Self>, reason: &Error) {
        let mut results = Vec::new();
        let vm = self.lock().vm.clone();
        if let Some(vm) = vm {
            results.push(vm.kill().await);
        }
        // What the network's plugins did not undo just now they need not be asked again at once.
        match reason {
            Error::Network(error) if error.is_left() => results.push(Err(Error::Internal(error.to_string()))),
            _ => results.push(self.detach_network().await),
        }
        results.push(self.release().await);
        if results.iter().all(Result::is_ok) {
            let root = self.paths.root.clone();
            results.push(super::blocking(move || remove_directory(&root)).await);
        }
        let failed: Vec<_> = results.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
        if !failed.is_empty() {
            let failed = failed.join("; ");
            tracing::error!(target: "nacelle::sandbox", sandbox = %self.id, pod = self.name(), error = failed,
                "a pod that did not start is left, to be stopped");
            // As a pod that ended, so that whoever asked for it stops it: what is left is tried again then.
            self.change(|record| {
                record.state = SandboxState::NotReady;
                record.message = format!("it did not start ({reason}), and not all of it could be removed: {failed}");
            });
            self.attend();
        }
    }
}

/// What the guest's random number generator starts over from: without it, the clones of one
/// template would draw the same numbers.
fn entropy() -> Result<Vec<u8>> {
    let mut bytes = vec![0; ENTROPY_BYTES];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // The kernel gives as little at once as this in one piece.
    got.map_err(|error| Error::Internal(format!("the host gives no random numbers: {error}")))?;
    Ok(bytes)
}
