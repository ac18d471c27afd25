//! What no pod has any more: plugins are told which pods there are, and give back the rest.
//!
//! A network may be shared: by `nacelle run`, or by another daemon with directories of its
//! own. Their pods are not on record here, but each has its network namespace, and in it the
//! interfaces that plugins made. So what is on record and what is seen are valid, both.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Instant;

use nacelle_netlink::Netlink;

use crate::cni::{Chain, Plugins, Valid};
use crate::lock::How;
use crate::netns::Netns;
use crate::network::{NETNS, Network};
use crate::record::Record;
use crate::{Error, Mode, Result};

impl Network {
    /// Tells the plugins of the configured networks which pods have joined them, so that they
    /// give back what they keep for others (GC, since version 1.1.0 of the CNI). `records`
    /// lists the records of all pods of this daemon. Pods that join or leave meanwhile wait, as long
    /// as one plugin may take at most.
    ///
    /// # Errors
    /// A record or a namespace that cannot be read: then nothing is given back. Or the first
    /// failure of a plugin, after all had their turn.
    pub async fn collect_garbage(
        &self,
        records: impl FnOnce() -> io::Result<Vec<PathBuf>> + Send + 'static,
    ) -> Result<()> {
        if self.config.cni == Mode::Off {
            return Ok(());
        }
        self.on_thread(move |network| {
            let lists = match network.lists() {
                Err(Error::NotConfigured(_)) => return Ok(()),
                lists => lists?,
            };
            let limit = network.plugins.limit;
            let _alone = network.lock(How::Alone, None)?;
            // All pods of the host wait, so that no plugin has its own time after the others have used theirs.
            let plugins = Plugins { until: Some(Instant::now() + limit), ..(*network.plugins).clone() };
            let mut valid = network.seen()?;
            for path in records().map_err(Error::system("list the records of pods"))? {
                for attachment in Record::read(&path)?.into_iter().flat_map(|record| record.attachments) {
                    valid.push(Valid { container_id: attachment.container_id, interface: attachment.interface });
                }
            }
            valid.sort();
            valid.dedup();
            let chain = Chain::new(&plugins);
            // Of an attachment to another network it does not hurt to say that it is valid.
            let mut first = Ok(());
            for list in &lists {
                first = first.and(chain.gc(list, &valid));
            }
            first
        })
        .await
    }

    /// The interfaces in the namespaces of all pods of this host.
    fn seen(&self) -> Result<Vec<Valid>> {
        let directory = &self.config.netns_directory;
        let names = match fs::read_dir(directory) {
            Ok(entries) => entries.collect::<io::Result<Vec<_>>>().map_err(Error::path("list", directory))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::path("list", directory)(error)),
        };
        let mut seen = Vec::new();
        for entry in names {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.strip_prefix(NETNS)).map(str::to_owned)
            else {
                continue;
            };
            let netns = Netns::at(entry.path());
            if !netns.exists() {
                continue;
            }
            let links = netns.enter(|| Ok(Netlink::open()?.links()?))?;
            let interfaces = links.into_iter().filter(|link| !link.loopback).map(|link| link.name);
            seen.extend(interfaces.map(|interface| Valid { container_id: id.clone(), interface }));
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::NetworkConfig;
    use crate::cni::{self, Attachment};

    /// A network whose plugin writes down what it is told.
    fn network(directory: &Path) -> Network {
        let plugin = directory.join("keeper");
        fs::write(&plugin, format!("#!/bin/sh\ncat > {}/told\n", directory.display())).unwrap();
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
        let config = NetworkConfig {
            conf_directory: directory.join("net.d"),
            plugin_directories: vec![directory.into()],
            netns_directory: directory.join("netns"),
            ..NetworkConfig::default()
        };
        let mut network = Network::new(config, 1.0);
        Arc::get_mut(&mut network.shared).unwrap().lock = directory.join("lock");
        network
    }

    fn configure(directory: &Path) {
        fs::create_dir_all(directory.join("net.d")).unwrap();
        let list = json!({ "cniVersion": "1.1.0", "name": "net", "plugins": [{ "type": "keeper" }] });
        fs::write(directory.join("net.d/10.conflist"), list.to_string()).unwrap();
    }

    fn told(directory: &Path) -> Value {
        let told: Value = serde_json::from_slice(&fs::read(directory.join("told")).unwrap()).unwrap();
        told["cni.dev/valid-attachments"].clone()
    }

    #[tokio::test]
    async fn what_is_on_record_is_valid_and_nothing_is_given_back_if_a_record_cannot_be_read() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let network = network(directory);
        network.collect_garbage(|| Ok(Vec::new())).await.expect("nothing is configured");
        configure(directory);
        let (joined, never) = (directory.join("joined"), directory.join("never-joined"));
        let mut record = Record::new(directory.join("netns/nacelle-one"));
        record.attachments.push(Attachment {
            list: cni::load(&directory.join("net.d"), 1).unwrap().remove(0),
            interface: "eth0".into(),
            container_id: "one".into(),
            args: String::new(),
            capabilities: serde_json::Map::new(),
            result: None,
        });
        record.write(&joined).unwrap();
        let records = vec![joined.clone(), never];
        let listed = records.clone();
        network.collect_garbage(move || Ok(listed)).await.unwrap();
        assert_eq!(told(directory), json!([{ "containerID": "one", "ifname": "eth0" }]));

        fs::write(&joined, "{").unwrap();
        fs::remove_file(directory.join("told")).unwrap();
        network.collect_garbage(move || Ok(records)).await.unwrap_err();
        network.collect_garbage(|| Err(io::ErrorKind::PermissionDenied.into())).await.unwrap_err();
        assert!(!directory.join("told").exists());
    }

    #[tokio::test]
    async fn what_is_in_a_pod_s_namespace_is_valid_whoever_s_pod_it_is() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let network = network(directory);
        configure(directory);
        let netns = Netns::at(directory.join("netns/nacelle-other"));
        match netns.create() {
            Err(error) if error.to_string().contains("not permitted") => {
                eprintln!("skipped: {error}");
                return;
            }
            made => made.unwrap(),
        }
        // The name of one that is gone, and one that is no pod's.
        fs::write(directory.join("netns/nacelle-gone"), "").unwrap();
        fs::write(directory.join("netns/else"), "").unwrap();
        let link = netns.enter(|| {
            let made = Command::new("ip").args(["link", "add", "eth1", "type", "bridge"]).status();
            made.map_err(Error::system("run ip"))
        });
        let seen = network.collect_garbage(|| Ok(Vec::new())).await;
        netns.remove().unwrap();
        assert!(link.unwrap().success());
        seen.unwrap();
        assert_eq!(told(directory), json!([{ "containerID": "other", "ifname": "eth1" }]));
    }

    #[tokio::test]
    async fn nobody_joins_or_leaves_meanwhile() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let network = network(directory);
        configure(directory);
        let joining = (network.lock(How::Shared, None).unwrap(), network.lock(How::Shared, None).unwrap());
        let other = network.clone();
        let collected = tokio::spawn(async move { other.collect_garbage(|| Ok(Vec::new())).await });
        // However long it takes: it cannot be there.
        tokio::task::yield_now().await;
        assert!(!directory.join("told").exists());
        drop(joining);
        collected.await.unwrap().unwrap();
        assert_eq!(told(directory), json!([]));
    }
}
