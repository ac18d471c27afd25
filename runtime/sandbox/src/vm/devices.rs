//! What a guest is given while it runs, by its VMM's control socket.
//!
//! A device is named by its place on the bus and by whose it is: a removal that is repeated after its answer was lost
//! never takes what came into that place since. VMMs of the first release know places alone.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nacelle_vmm::control::message::{
    DeviceInfo, FEATURE_DEVICES, FEATURE_OWNERS, FEATURE_PLAIN_VOLUMES, FEATURE_VOLATILE,
};
use nacelle_vmm::control::{Access, Client, ClientError, Request, Response};

use super::Vm;
use crate::beneath::Directory;
use crate::{Error, Result};

/// What a VMM says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Its version.
    pub version: String,
    /// What it knows beyond the first release.
    pub names: Vec<String>,
}

impl Features {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
    }

    /// Whether devices are known by whose they are.
    pub fn owners(&self) -> bool {
        self.has(FEATURE_OWNERS)
    }
}

/// What is on a guest's bus.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// The devices, by place.
    pub devices: Vec<DeviceInfo>,
    /// The volumes' names; not all of them if there are very many.
    pub volumes: Vec<String>,
}

impl Vm {
    /// What the VMM knows; asked once.
    pub async fn features(&self) -> Result<Features> {
        let ask = || self.ask_features(self.call_deadline);
        self.features.get_or_try_init(ask).await.cloned()
    }

    pub(super) async fn ask_features(&self, limit: Duration) -> Result<Features> {
        match self.call_within(limit, "ask the VMM what it knows", Request::Features, Vec::new()).await {
            Ok(Response::Features { version, features }) => Ok(Features { version, names: features }),
            Ok(other) => Err(unexpected("what it knows", &other)),
            // One of the first release, which tells its version alone.
            Err(Error::Vmm { source: ClientError::Refused(_), .. }) => {
                match self.call_within(limit, "ask the VMM who it is", Request::Status, Vec::new()).await? {
                    Response::Status { version, .. } => Ok(Features { version, names: Vec::new() }),
                    other => Err(unexpected("who it is", &other)),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// What is on the guest's bus; none if the VMM cannot tell.
    pub async fn devices(&self) -> Result<Option<Devices>> {
        if !self.features().await?.has(FEATURE_DEVICES) {
            return Ok(None);
        }
        match self.call("list the guest's devices", Request::Devices, Vec::new()).await? {
            Response::Devices { devices, volumes, .. } => Ok(Some(Devices { devices, volumes })),
            other => Err(unexpected("list its devices", &other)),
        }
    }

    /// Puts a disk of `owner`'s on the guest's bus and returns its slot.
    pub async fn add_disk(&self, owner: String, read_only: bool, files: Vec<File>) -> Result<u8> {
        let owner = if self.features().await?.owners() { owner } else { String::new() };
        let request = Request::AddDisk { read_only, volatile: false, owner };
        self.added(self.call("add a disk", request, files).await?)
    }

    /// Puts the disk for what containers write on the guest's bus and returns its slot. It never outlives the guest.
    pub async fn add_scratch(&self, file: File) -> Result<u8> {
        let features = self.features().await?;
        let owner = if features.owners() { "scratch".into() } else { String::new() };
        let request = Request::AddDisk { read_only: false, volatile: features.has(FEATURE_VOLATILE), owner };
        self.added(self.call("add the scratch disk", request, vec![file]).await?)
    }

    /// Puts a network interface of `owner`'s on the guest's bus and returns its slot.
    pub async fn add_net(&self, owner: String, mac: [u8; 6], mtu: u16, tap: File) -> Result<u8> {
        let owner = if self.features().await?.owners() { owner } else { String::new() };
        let request = Request::AddNet { mac, mtu, owner };
        self.added(self.call("add a network interface", request, vec![tap]).await?)
    }

    /// Puts the device of volumes on the guest's bus, unless it is there, and returns its slot.
    pub async fn add_fs(&self) -> Result<u8> {
        self.added(self.call("add the device of volumes", Request::AddFs, Vec::new()).await?)
    }

    fn added(&self, answer: Response) -> Result<u8> {
        match answer {
            Response::Device { slot } => Ok(slot),
            other => Err(unexpected("add a device", &other)),
        }
    }

    /// Gives the guest a volume, which is `plain` if nothing is mounted below it, now and later. A VMM from before that made a
    /// difference takes it for one of its own, as it did.
    pub async fn add_volume(&self, name: String, access: Access, plain: bool, file: File) -> Result<()> {
        let plain = plain && self.features().await?.has(FEATURE_PLAIN_VOLUMES);
        self.call("add a volume", Request::AddVolume { name, access, plain }, vec![file]).await.map(drop)
    }

    /// Takes a volume away. One that is not there is fine.
    pub async fn remove_volume(&self, name: String) -> Result<()> {
        self.call("remove a volume", Request::RemoveVolume { name }, Vec::new()).await.map(drop)
    }

    /// Takes a device off the guest's bus. With an owner, one that has gone already is fine; without, whatever is in
    /// the slot goes.
    pub async fn remove_device(&self, slot: u8, owner: String) -> Result<()> {
        self.call("remove a device", Request::RemoveDevice { slot, owner }, Vec::new()).await.map(drop)
    }

    /// Saves the machine, a template, and waits until it has ended.
    pub async fn save(&self) -> Result<()> {
        self.call("save the machine", Request::Save, Vec::new()).await?;
        self.wait_or_kill(self.call_deadline).await
    }

    async fn call(&self, action: &'static str, request: Request, files: Vec<File>) -> Result<Response> {
        self.call_within(self.call_deadline, action, request, files).await
    }

    async fn call_within(
        &self,
        limit: Duration,
        action: &'static str,
        request: Request,
        files: Vec<File>,
    ) -> Result<Response> {
        let run = self.paths.run.clone();
        let call = tokio::task::spawn_blocking(move || ask(run, limit, action, &request, &files));
        call.await.map_err(|e| Error::Internal(e.to_string()))?
    }
}

/// Asks the VMM whose sockets are in the directory `run`. Blocks.
fn ask(run: PathBuf, limit: Duration, action: &'static str, request: &Request, files: &[File]) -> Result<Response> {
    let failed = move |source| Error::Vmm { action: action.to_owned(), source };
    // VMMs of the first release may write to this directory: a name in it is no more than that.
    let socket = Directory::open(&run)?.socket("control")?;
    let mut client = Client::connect(&socket.address(), Instant::now()).map_err(failed)?;
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    client.call(request, &files, limit).map_err(failed)
}

/// Ends whatever machine is behind a control socket, as far as it listens. Blocks.
pub fn stop(run: PathBuf, limit: Duration) -> Result<()> {
    ask(run, limit, "end the machine", &Request::Stop, &[]).map(drop)
}

fn unexpected(asked: &str, answer: &Response) -> Error {
    Error::Internal(format!("the VMM was asked to {asked} and answered {answer:?}"))
}
