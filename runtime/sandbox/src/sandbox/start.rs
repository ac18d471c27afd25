//! From a record to a guest that is ready.

use std::fs;
use std::sync::Arc;

use nacelle_proto::agent::v1 as api;
use tokio::net::UnixListener;

use super::{Sandbox, make_directory, network, remove_directory};
use crate::cgroup::{self, Cgroup};
use crate::clock;
use crate::model::SandboxState;
use crate::sizing::GuestSize;
use crate::vm::Vm;
use crate::{Error, Result, scratch, user_namespace};

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
        let socket = self.paths.ready_socket();
        let listener = UnixListener::bind(&socket).map_err(Error::io("listen on", &socket))?;
        let vm = Arc::new(Vm::spawn(&self.manager, &self.id, &self.paths, size, cgroup.as_ref())?);
        self.lock().vm = Some(vm.clone());
        self.update(|record| record.vmm = Some(vm.process()))?;
        // While the guest boots, its disk and its network are made.
        let disk = self.paths.scratch();
        let copy = tokio::task::spawn_blocking(move || {
            let template = scratch::template(&manager.root.join("templates"), manager.guest.scratch_mib)?;
            scratch::create(&template, &disk)
        });
        let ready = vm.ready(listener, self.manager.boot_deadline());
        let (attached, ready) = tokio::join!(self.attach_network(&config, &vm), ready);
        let attached = attached?;
        ready?;
        let _ = fs::remove_file(&socket);
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
        };
        let mut client = self.agent.client();
        let configured = self.agent.call("configure the sandbox", client.configure_sandbox(request));
        tokio::select! {
            result = configured => result.map(drop)?,
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
