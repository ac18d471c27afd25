//! From a record to a guest that is ready.

use std::fs;
use std::sync::Arc;

use nacelle_proto::agent::v1 as api;
use nacelle_vmm::config::Start;

use super::{Sandbox, make_directory, network, remove_directory};
use crate::cgroup::{self, Cgroup};
use crate::clock;
use crate::model::SandboxState;
use crate::sizing::GuestSize;
use crate::vm::{Sign, Vm};
use crate::{Error, Result, scratch, user_namespace};

/// As much as the guest's generator has state.
const ENTROPY_BYTES: usize = 32;

impl Sandbox {
    /// Makes the guest. On failure nothing of it is left.
    pub async fn start(self: &Arc<Self>) -> Result<()> {
        match self.try_start().await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.discard().await;
                Err(error)
            }
        }
    }

    async fn try_start(self: &Arc<Self>) -> Result<()> {
        // The record comes first: whatever exists under this id has an owner.
        make_directory(&self.paths.root)?;
        make_directory(&self.paths.run)?;
        self.update(|_| {})?;
        let config = self.lock().record.config.clone();
        let manager = self.manager.clone();
        let bounds = cgroup::bounds(&config.cgroup_parent)?;
        let size = GuestSize::of(&config, &manager.guest, bounds)?;
        self.update(|record| record.size = Some(size))?;
        let cgroup = Cgroup::create(&config.cgroup_parent, &self.id)?;
        if let Some(cgroup) = &cgroup {
            cgroup.limit(&config.resources, &config.overhead)?;
        }
        let origin = self.templates.origin(size).await;
        let cloned = matches!(origin, Start::Clone(_));
        let (vm, sign) = self.launch(size, origin, cgroup.as_ref())?;
        // While the guest starts, its disk and its network are made.
        let disk = self.paths.scratch();
        let copy = tokio::task::spawn_blocking(move || {
            let template = scratch::template(&manager.root.join("templates"), manager.guest.scratch_mib)?;
            scratch::create(&template, &disk)
        });
        let ready = vm.ready(sign, self.manager.boot_deadline());
        let (attached, ready) = tokio::join!(self.attach_network(&config, &vm), ready);
        let attached = attached?;
        let vm = match ready {
            Ok(()) => vm,
            Err(error) if cloned => {
                tracing::warn!(sandbox = %self.id, %error, "the guest does not start as a clone: booting it");
                self.templates.forget(size);
                self.boot_instead(&vm, size, cgroup.as_ref()).await?
            }
            Err(error) => return Err(error),
        };
        copy.await.map_err(|e| Error::Internal(e.to_string()))??;
        let path = self.paths.scratch();
        let disk = fs::File::options().read(true).write(true).open(&path).map_err(Error::io("open", &path))?;
        let slot = vm.add_disk(false, vec![disk]).await?;
        let interfaces = self.add_interfaces(&vm, attached.as_ref()).await?;
        let now = clock::now();
        let request = api::ConfigureSandboxRequest {
            hostname: config.host_name(),
            resolv_conf: network::resolv_conf(&config.dns, attached.as_ref()).into_bytes(),
            hosts: network::hosts(&config, attached.as_ref()).into_bytes(),
            sysctls: config.sysctls.clone().into_iter().collect(),
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
                    self.templates.forget(size);
                }
                result.map(drop)?;
            }
            end = vm.wait_exit() => {
                return Err(Error::Boot { id: self.id.clone(), reason: end.reason, console: vm.console() });
            }
        }
        let ips = attached.map(|attached| attached.ips).unwrap_or_default();
        self.update(|record| {
            record.ips = ips;
            record.state = SandboxState::Ready;
        })?;
        self.watch(vm);
        Ok(())
    }

    /// Starts the VMM and puts it on record.
    fn launch(&self, size: GuestSize, origin: Start, cgroup: Option<&Cgroup>) -> Result<(Arc<Vm>, Sign)> {
        let (vm, sign) = Vm::spawn(&self.manager, &self.id, &self.paths, size, origin, cgroup)?;
        let vm = Arc::new(vm);
        self.lock().vm = Some(vm.clone());
        self.update(|record| record.vmm = Some(vm.process()))?;
        Ok((vm, sign))
    }

    /// Boots a guest in place of one that did not start.
    async fn boot_instead(&self, failed: &Vm, size: GuestSize, cgroup: Option<&Cgroup>) -> Result<Arc<Vm>> {
        failed.kill().await;
        remove_directory(&self.paths.run)?;
        make_directory(&self.paths.run)?;
        let (vm, sign) = self.launch(size, Start::Boot, cgroup)?;
        vm.ready(sign, self.manager.boot_deadline()).await?;
        Ok(vm)
    }

    /// Removes what a start that failed has made.
    async fn discard(&self) {
        let vm = self.lock().vm.take();
        if let Some(vm) = vm {
            vm.kill().await;
        }
        let detached = self.detach_network().await;
        // What its network takes to undo is in the directory.
        let root = if detached.is_ok() { remove_directory(&self.paths.root) } else { Ok(()) };
        let results =
            [detached, self.cgroup().and_then(|cgroup| cgroup.remove()), remove_directory(&self.paths.run), root];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::error!(sandbox = %self.id, %error, "left for the sweep at the next start");
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
