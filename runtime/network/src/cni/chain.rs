//! The plugins of a list, in order (specification, section 3).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::list::{NetworkList, Version};
use super::plugin::{Call, Plugins};
use super::result::AddResult;
use crate::{Error, Result};

/// A plugin's way to say that it knows of no such container, so that there is nothing to undo (specification, section 5).
const NOTHING_TO_UNDO: u64 = 3;

/// A pod's part in one network: all that ADD, CHECK and DEL need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network as it was when the pod joined it.
    pub list: NetworkList,
    /// The pod's interface.
    pub interface: String,
    /// The sandbox id.
    pub container_id: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// What a plugin is told if it says that it can make use of it, by capability.
    pub capabilities: Map<String, Value>,
    /// The result of ADD, once there is one.
    pub result: Option<Value>,
    /// The plugins that have undone what they did.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub deleted: BTreeSet<usize>,
    /// What is known of the plugins' CHECK.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub checks: BTreeMap<usize, Check>,
}

/// What a plugin's CHECK of an attachment can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// It has found the attachment in order: if it finds something amiss, it is amiss.
    Passed,
    /// It found something amiss in what had just been made: it tells nothing.
    Wrong,
}

impl Attachment {
    /// Of a pod that is about to join.
    #[must_use]
    pub fn new(
        list: NetworkList,
        interface: String,
        container_id: String,
        args: String,
        capabilities: Map<String, Value>,
    ) -> Self {
        let (deleted, checks) = (BTreeSet::new(), BTreeMap::new());
        Self { list, interface, container_id, args, capabilities, result: None, deleted, checks }
    }
}

/// An attachment that plugins shall not forget (specification, `cni.dev/valid-attachments`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Valid {
    /// The sandbox id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The pod's interface.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// The plugins with what they are run for.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a> {
    plugins: &'a Plugins,
}

impl<'a> Chain<'a> {
    /// Runs these plugins.
    #[must_use]
    pub fn new(plugins: &'a Plugins) -> Self {
        Self { plugins }
    }

    /// Joins the network and keeps the result in the attachment. After a failure
    /// [`Chain::del`] has to undo what was done. Blocks.
    ///
    /// # Errors
    /// The first plugin that fails, or one whose result makes no sense.
    pub fn add(&self, attachment: &mut Attachment, netns: &str) -> Result<AddResult> {
        let list = &attachment.list;
        let mut result = None;
        for plugin in &list.plugins {
            let config = derive(list, plugin, &attachment.capabilities, result.as_ref());
            let said = self.run(attachment, plugin, "ADD", netns, &config)?;
            // A plugin that prints nothing has nothing to add.
            if said.is_some() {
                result = said;
            }
        }
        let value = result.unwrap_or_else(|| Value::Object(Map::new()));
        let parsed = AddResult::parse(&value).map_err(|reason| Error::Plugin {
            plugin: list.plugins.last().map(NetworkList::kind).unwrap_or_default().into(),
            network: list.name.clone(),
            command: "ADD",
            message: format!("its result makes no sense: {reason}"),
            code: None,
        })?;
        attachment.result = Some(value);
        Ok(parsed)
    }

    /// Asks every plugin whether all is as ADD left it, whatever the one before says; nobody where there is nothing to
    /// ask by. Returns what each says, by its place in the list. Blocks.
    #[must_use]
    pub fn check(&self, attachment: &Attachment, netns: &str) -> Vec<(usize, Result<()>)> {
        let list = &attachment.list;
        if list.version < Version::V0_4_0 || list.disable_check || attachment.result.is_none() {
            return Vec::new();
        }
        let asked = list.plugins.iter().enumerate().map(|(index, plugin)| {
            let config = derive(list, plugin, &attachment.capabilities, attachment.result.as_ref());
            (index, self.run(attachment, plugin, "CHECK", netns, &config).map(drop))
        });
        asked.collect()
    }

    /// Leaves the network, last plugin first, and keeps in the attachment which plugins have done so; `netns` is empty
    /// if the namespace is gone. A plugin that fails keeps no other from its turn. Blocks.
    ///
    /// Doing it again asks those that have failed. The others are not asked twice: plugins may take back what they know
    /// by the pod's address only (firewall does), and the address may be another pod's by then.
    ///
    /// A plugin that is not installed any more can undo nothing, which is said and passed over.
    ///
    /// Returns the failures.
    #[must_use]
    pub fn del(&self, attachment: &mut Attachment, netns: &str) -> Vec<Error> {
        let list = &attachment.list;
        let result = attachment.result.as_ref().filter(|_| list.version >= Version::V0_4_0);
        let mut failures = Vec::new();
        for (index, plugin) in list.plugins.iter().enumerate().rev() {
            if attachment.deleted.contains(&index) {
                continue;
            }
            let config = derive(list, plugin, &attachment.capabilities, result);
            match self.run(attachment, plugin, "DEL", netns, &config) {
                Ok(_) | Err(Error::Plugin { code: Some(NOTHING_TO_UNDO), .. }) => {
                    attachment.deleted.insert(index);
                }
                Err(error @ Error::PluginMissing { .. }) => {
                    tracing::warn!(sandbox = attachment.container_id, %error, "what it has made is left");
                }
                Err(error) => failures.push(error),
            }
        }
        failures
    }

    /// Looks whether the programs are there.
    ///
    /// # Errors
    /// The first that is missing.
    pub fn find(&self, list: &NetworkList) -> Result<()> {
        list.plugins.iter().try_for_each(|plugin| self.plugins.find(NetworkList::kind(plugin), &list.name).map(drop))
    }

    /// Asks whether pods can join now: since version 1.1.0, plugins say so. Blocks.
    ///
    /// # Errors
    /// The first plugin that is not ready.
    pub fn status(&self, list: &NetworkList) -> Result<()> {
        if list.version < Version::V1_1_0 {
            return Ok(());
        }
        for plugin in &list.plugins {
            let kind = NetworkList::kind(plugin);
            let config = derive(list, plugin, &Map::new(), None);
            let call = Call { command: "STATUS", network: &list.name, variables: &[] };
            self.plugins.run(kind, &call, &config)?;
        }
        Ok(())
    }

    /// Tells the plugins which attachments to this network there are; they remove what they
    /// keep for others. Versions before 1.1.0 have no such command, and a list may forbid it.
    /// Blocks.
    ///
    /// # Errors
    /// The first failure, after all plugins had their turn.
    pub fn gc(&self, list: &NetworkList, valid: &[Valid]) -> Result<()> {
        if list.version < Version::V1_1_0 || list.disable_gc {
            return Ok(());
        }
        let valid = serde_json::json!(valid);
        let mut first = Ok(());
        for plugin in &list.plugins {
            let mut config = derive(list, plugin, &Map::new(), None);
            config.insert("cni.dev/valid-attachments".into(), valid.clone());
            let call = Call { command: "GC", network: &list.name, variables: &[] };
            let done = self.plugins.run(NetworkList::kind(plugin), &call, &config).map(drop);
            first = first.and(done);
        }
        first
    }

    fn run(
        &self,
        attachment: &Attachment,
        plugin: &Map<String, Value>,
        command: &'static str,
        netns: &str,
        config: &Map<String, Value>,
    ) -> Result<Option<Value>> {
        let variables = [
            ("CNI_CONTAINERID", attachment.container_id.as_str()),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", attachment.interface.as_str()),
            ("CNI_ARGS", attachment.args.as_str()),
        ];
        let call = Call { command, network: &attachment.list.name, variables: &variables };
        self.plugins.run(NetworkList::kind(plugin), &call, config)
    }
}

/// A plugin's configuration for one run, from its part of the list.
pub(super) fn derive(
    list: &NetworkList,
    plugin: &Map<String, Value>,
    capabilities: &Map<String, Value>,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    config.insert("name".into(), list.name.clone().into());
    config.insert("cniVersion".into(), list.version.name().into());
    // Keys that are the runtime's, whatever the file says.
    for key in ["runtimeConfig", "prevResult", "cniVersions"] {
        config.remove(key);
    }
    config.retain(|key, _| !key.starts_with("cni.dev/"));
    if let Some(Value::Object(wanted)) = config.remove("capabilities") {
        let wanted = wanted.into_iter().filter(|(_, on)| on.as_bool() == Some(true));
        let runtime: Map<_, _> =
            wanted.filter_map(|(name, _)| capabilities.get(&name).map(|value| (name, value.clone()))).collect();
        if !runtime.is_empty() {
            config.insert("runtimeConfig".into(), runtime.into());
        }
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone());
    }
    config
}
