//! What no pod has any more: plugins are told which pods there are, and give back the rest.
//!
//! A network may be shared: by `nacelle run`, or by another daemon with directories of its
//! own. Their pods are not on record here, but each has its network namespace, and in it the
//! interfaces that plugins made. So what is on record and what is seen are valid, both.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nacelle_netlink::Netlink;

use crate::cni::{Chain, Plugins, Valid};
use crate::lock::How;
use crate::netns::Netns;
use crate::network::{NETNS, Network, PREFIX};
use crate::record::{Found, NETWORKS_LIMIT, Record, id_of};
use crate::{Error, Mode, Result};

impl Network {
    /// Tells the plugins of the configured networks which pods have joined them, so that they
    /// give back what they keep for others (GC, since version 1.1.0 of the CNI). `records`
    /// lists the records of all pods of this daemon. Pods that join or leave meanwhile wait, as long as one plugin
    /// may take at most. What a pod that is gone has left is tried again, too, in the background.
    ///
    /// # Errors
    /// The records or namespaces cannot be listed: then nothing is given back. Or the first failure of a plugin, after
    /// all had their turn.
    pub async fn collect_garbage(
        &self,
        records: impl FnOnce() -> io::Result<Vec<PathBuf>> + Send + 'static,
    ) -> Result<()> {
        if self.config.cni == Mode::Off {
            return Ok(());
        }
        let collected = self.on_thread(move |network| {
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
                valid.extend(network.recorded(&path)?);
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
        });
        let collected = collected.await;
        self.settle_later(Duration::ZERO);
        collected
    }

    /// What is valid by the record of a pod. One that cannot be read stands for all that a pod could have joined: it
    /// keeps that from being given back, and nothing else.
    fn recorded(&self, path: &Path) -> Result<Vec<Valid>> {
        // A directory that is no pod's has no record of one's network.
        let Some(id) = id_of(path) else { return Ok(Vec::new()) };
        let of = |interface: String| Valid { container_id: id.into(), interface };
        match Record::read(path, id, &self.config.netns_directory) {
            Ok(Found::None) => Ok(Vec::new()),
            Ok(Found::Whole(record)) => {
                Ok(record.attachments.into_iter().map(|attachment| of(attachment.interface)).collect())
            }
            unknown => {
                let error = unknown.err().map_or_else(|| "is torn".into(), |error| error.to_string());
                tracing::warn!(sandbox = id, error, "whatever its network has, plugins shall keep it");
                Ok((0..NETWORKS_LIMIT).map(|number| of(format!("{PREFIX}{number}"))).collect())
            }
        }
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
            let of = |interface: String| Valid { container_id: id.clone(), interface };
            match netns.enter(|| Ok(Netlink::open()?.links()?)) {
                Ok(links) => seen.extend(links.into_iter().filter(|link| !link.loopback).map(|link| of(link.name))),
                Err(error) => {
                    tracing::warn!(sandbox = id, %error, "whatever its network has, plugins shall keep it");
                    seen.extend((0..NETWORKS_LIMIT).map(|number| of(format!("{PREFIX}{number}"))));
                }
            }
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::NetworkConfig;
    use crate::cni::{self, Attachment};
    use crate::record::Durable;

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
        let mut network = Network::new(config, directory.join("left"), 1.0);
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
    async fn what_is_on_record_is_valid_and_a_record_that_cannot_be_read_stands_for_all_there_may_be() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path();
        let network = network(directory);
        network.collect_garbage(|| Ok(Vec::new())).await.expect("nothing is configured");
        configure(directory);
        let ids = ["1a", "2b", "3c"].map(|byte| byte.repeat(32));
        let records: Vec<_> = ids.iter().map(|id| directory.join("pods").join(id).join("network.json")).collect();
        for path in &records {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
        }
        let mut record = Record::new(directory.join(format!("netns/nacelle-{}", ids[0])));
        let list = cni::load(&directory.join("net.d"), 1).unwrap().remove(0);
        record.attachments.push(Attachment::new(
            list,
            "eth0".into(),
            ids[0].clone(),
            String::new(),
            serde_json::Map::new(),
        ));
        record.write(&records[0], Durable::No).unwrap();
        let mut listed = records.clone();
        // Not a pod's.
        listed.push(directory.join("pods/else/network.json"));
        let again = listed.clone();
        network.collect_garbage(move || Ok(listed)).await.unwrap();
        let one = json!({ "containerID": ids[0], "ifname": "eth0" });
        assert_eq!(told(directory), json!([one]));

        for damage in ["", "{", "no record", r#"{"version":2}"#] {
            fs::write(&records[1], damage).unwrap();
            let listed = again.clone();
            network.collect_garbage(move || Ok(listed)).await.unwrap();
            let told = told(directory);
            let told = told.as_array().unwrap();
            assert!(told.contains(&one) && told.len() == 1 + NETWORKS_LIMIT, "{damage}: {told:?}");
            for number in 0..NETWORKS_LIMIT {
                assert!(told.contains(&json!({ "containerID": ids[1], "ifname": format!("eth{number}") })));
            }
        }
        fs::remove_file(directory.join("told")).unwrap();
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
