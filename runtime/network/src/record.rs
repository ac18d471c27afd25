//! What is known of a pod's network: written before anything of it exists, removed when
//! nothing of it does.
//!
//! What a record says decides which programs run as root, and what is unmounted. So it is looked at as strictly when
//! it is read as what it comes from was when it was made.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::cni::Attachment;
use crate::network::{NETNS, PREFIX};
use crate::{Error, Result};

/// Version of the record; a change that old daemons cannot read raises it.
const VERSION: u32 = 1;
/// The longest record in bytes.
const LENGTH_LIMIT: u64 = 64 << 20;
/// The most networks that a pod joins.
pub const NETWORKS_LIMIT: usize = 16;
/// The longest arguments of plugins in bytes: as long as the kernel takes one.
const ARGS_LIMIT: usize = 128 << 10;

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Who wrote it, for whoever cannot read it.
    #[serde(default)]
    nacelle: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// The networks it joins or has joined, in order.
    pub attachments: Vec<Attachment>,
    /// What became of taking it off, if that has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing: Option<Failing>,
}

/// Plugins that do not undo what they did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// How often they were asked.
    pub rounds: u32,
    /// What they said last.
    pub said: String,
}

/// What is found where a record should be.
#[derive(Debug)]
pub enum Found {
    /// Nothing.
    None,
    /// The beginning of a record at most: the host lost its power while it was written.
    Torn,
    /// A record.
    Whole(Record),
}

/// What every version of the record has.
#[derive(Deserialize)]
struct Head {
    version: u32,
    #[serde(default)]
    nacelle: String,
}

/// Whether a record may be lost with the host's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    Yes,
    /// It follows one that is durable, and says little more.
    No,
}

/// Whether this is the id of a sandbox: what is named by it lies where nothing else does.
pub fn is_id(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The sandbox whose record this is: its directory, or the record itself, has its name.
pub fn id_of(path: &Path) -> Option<&str> {
    let names = [path.parent().and_then(Path::file_name), path.file_stem()];
    names.into_iter().flatten().filter_map(|name| name.to_str()).find(|name| is_id(name))
}

impl Record {
    /// Of a pod that has joined nothing yet.
    pub fn new(netns: PathBuf) -> Self {
        let nacelle = env!("CARGO_PKG_VERSION").into();
        Self { version: VERSION, nacelle, netns, attachments: Vec::new(), failing: None }
    }

    /// Reads the record of the sandbox `id`, whose network namespace is usually in `netns`.
    ///
    /// # Errors
    /// It cannot be read, is of another version, or says what no record says.
    pub fn read(path: &Path, id: &str, netns: &Path) -> Result<Found> {
        let damaged = |reason: String| Error::Record { path: path.into(), reason };
        let Some(text) = text(path)? else { return Ok(Found::None) };
        // A file system may have given it its length and not its bytes.
        if text.trim_ascii().is_empty() || text.contains(&0) {
            return Ok(Found::Torn);
        }
        let head: Head = match serde_json::from_slice(&text) {
            Ok(head) => head,
            Err(error) if error.is_eof() => return Ok(Found::Torn),
            Err(error) => return Err(damaged(error.to_string())),
        };
        if head.version != VERSION {
            let nacelle = if head.nacelle.is_empty() { "that wrote it".into() } else { head.nacelle };
            return Err(Error::OtherVersion { path: path.into(), version: head.version, nacelle });
        }
        let record: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        record.validate(id, netns).map_err(damaged)?;
        Ok(Found::Whole(record))
    }

    fn validate(&self, id: &str, usual: &Path) -> std::result::Result<(), String> {
        if !is_id(id) {
            return Err(format!("{id:?} is no sandbox id, 64 hexadecimal digits"));
        }
        if self.netns.file_name() != Some(format!("{NETNS}{id}").as_ref()) {
            return Err(format!("netns: {:?} is not that of the sandbox {id}", self.netns));
        }
        let directory = self.netns.parent().unwrap_or(Path::new(""));
        if directory != usual {
            // The configuration has changed since. But the name was not made up by somebody else.
            trustworthy(directory).map_err(|reason| format!("netns: {}: {reason}", directory.display()))?;
        }
        if self.attachments.len() > NETWORKS_LIMIT {
            return Err(format!("attachments: {} are more than {NETWORKS_LIMIT}", self.attachments.len()));
        }
        for (index, attachment) in self.attachments.iter().enumerate() {
            let wrong = |what: String| format!("attachments[{index}].{what}");
            if attachment.container_id != id {
                return Err(wrong(format!("container_id: {:?} is not {id}", attachment.container_id)));
            }
            if attachment.interface != format!("{PREFIX}{index}") {
                return Err(wrong(format!("interface: {:?} is not {PREFIX}{index}", attachment.interface)));
            }
            if attachment.args.len() > ARGS_LIMIT || attachment.args.contains('\0') {
                return Err(wrong("args: are too long, or not text".into()));
            }
            attachment.list.validate().map_err(|reason| wrong(format!("list.{reason}")))?;
        }
        Ok(())
    }

    /// Writes it in place of the old one.
    pub fn write(&self, path: &Path, durable: Durable) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Record { path: path.into(), reason: error.to_string() })?;
        text.push(b'\n');
        let mut new: PathBuf = path.into();
        new.set_extension("json.new");
        let written = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&new)
            .and_then(|mut file| {
                file.write_all(&text)?;
                if durable == Durable::Yes { file.sync_all() } else { Ok(()) }
            });
        written.map_err(Error::path("write", &new))?;
        fs::rename(&new, path).map_err(Error::path("replace", path))?;
        match path.parent() {
            Some(directory) if durable == Durable::Yes => {
                let synced = File::open(directory).and_then(|directory| directory.sync_all());
                synced.map_err(Error::path("write the directory", directory))
            }
            _ => Ok(()),
        }
    }

    /// Removes it.
    pub fn remove(path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::path("remove", path)(error)),
            _ => Ok(()),
        }
    }
}

/// The text of a file of ours; none if it does not exist.
fn text(path: &Path) -> Result<Option<Vec<u8>>> {
    let opened =
        File::options().read(true).custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::path("read", path)(error)),
    };
    let found = file.metadata().map_err(Error::path("look at", path))?;
    if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(Error::Record { path: path.into(), reason: "is no file of the user of nacelle".into() });
    }
    if found.len() > LENGTH_LIMIT {
        let reason = format!("has {} bytes, at most {LENGTH_LIMIT} are possible", found.len());
        return Err(Error::Record { path: path.into(), reason });
    }
    let mut text = Vec::new();
    file.take(LENGTH_LIMIT).read_to_end(&mut text).map_err(Error::path("read", path))?;
    Ok(Some(text))
}

/// Whether nobody but us and root can put something into a directory.
fn trustworthy(directory: &Path) -> std::result::Result<(), &'static str> {
    if !directory.is_absolute()
        || !directory.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
    {
        return Err("is no absolute path without \"..\"");
    }
    let own = rustix::process::geteuid().as_raw();
    for part in directory.ancestors() {
        match fs::symlink_metadata(part) {
            // What is not there holds nothing.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Ok(found) if found.is_dir() && [0, own].contains(&found.uid()) && found.mode() & 0o022 == 0 => {}
            // In a sticky directory nobody replaces what is another's.
            Ok(found) if part != directory && found.is_dir() && found.mode() & 0o1000 != 0 => {}
            _ => {
                return Err(
                    "others can change what is there: put network.netns_directory back to it, or make it root's",
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use serde_json::{Map, Value, json};

    use super::*;
    use crate::cni::NetworkList;

    fn record(id: &str, netns: &Path) -> Record {
        let list =
            json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "bridge" }, { "type": "portmap" }] });
        let list = NetworkList::parse(Path::new("x"), list.to_string().as_bytes()).unwrap();
        let mut record = Record::new(netns.join(format!("{NETNS}{id}")));
        record.attachments.push(Attachment::new(list, "eth0".into(), id.into(), "IgnoreUnknown=1".into(), Map::new()));
        record
    }

    fn refusal(found: Result<Found>) -> String {
        found.unwrap_err().to_string()
    }

    #[test]
    fn it_is_read_as_it_was_written_and_by_the_version_before() {
        let directory = tempfile::tempdir().unwrap();
        let (path, netns, id) =
            (directory.path().join("network.json"), directory.path().join("netns"), "a5".repeat(32));
        let written = record(&id, &netns);
        assert!(matches!(Record::read(&path, &id, &netns), Ok(Found::None)));
        written.write(&path, Durable::Yes).unwrap();
        assert!(matches!(Record::read(&path, &id, &netns), Ok(Found::Whole(read)) if read == written));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // As the version before wrote it.
        let mut old: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            fields(&old["attachments"][0]),
            ["list", "interface", "container_id", "args", "capabilities", "result"]
                .map(str::to_owned)
                .into_iter()
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>(),
            "nothing more until there is something to say"
        );
        old.as_object_mut().unwrap().remove("nacelle");
        fs::write(&path, old.to_string()).unwrap();
        assert!(matches!(Record::read(&path, &id, &netns), Ok(Found::Whole(_))));
    }

    #[test]
    fn a_record_of_another_version_says_whose_it_is_and_a_torn_one_is_none_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let (path, netns, id) =
            (directory.path().join("network.json"), directory.path().join("netns"), "a5".repeat(32));
        fs::write(&path, r#"{"version":2,"nacelle":"7.1.0","netns":["a","new","form"]}"#).unwrap();
        let error = refusal(Record::read(&path, &id, &netns));
        assert!(error.contains("7.1.0") && error.contains("version 2"), "{error}");
        record(&id, &netns).write(&path, Durable::No).unwrap();
        let whole = fs::read(&path).unwrap();
        for torn in [&b""[..], b"\n", &[0; 512], &whole[..whole.len() / 2], &[&whole[..40], &[0; 40]].concat()] {
            fs::write(&path, torn).unwrap();
            let found = Record::read(&path, &id, &netns);
            assert!(matches!(found, Ok(Found::Torn)), "{:?}: {found:?}", String::from_utf8_lossy(torn));
        }
        fs::write(&path, "no record").unwrap();
        assert!(matches!(Record::read(&path, &id, &netns), Err(Error::Record { .. })));
    }

    #[test]
    fn what_no_record_says_is_refused_with_its_field() {
        let directory = tempfile::tempdir().unwrap();
        let (path, netns, id) =
            (directory.path().join("network.json"), directory.path().join("netns"), "a5".repeat(32));
        let base = serde_json::to_value(record(&id, &netns)).unwrap();
        let long = "x".repeat(256);
        for (field, value, word) in [
            ("/netns", json!("/etc/passwd"), "netns"),
            ("/netns", json!(format!("/tmp/nacelle-{id}")), "netns"),
            ("/netns", json!(format!("{}/../nacelle-{id}", netns.display())), "netns"),
            ("/netns", json!(format!("nacelle-{id}")), "netns"),
            ("/attachments/0/container_id", json!("b6".repeat(32)), "container_id"),
            ("/attachments/0/interface", json!("lo"), "interface"),
            ("/attachments/0/args", json!("a\0b"), "args"),
            ("/attachments/0/list/name", json!("../x"), "list.name"),
            ("/attachments/0/list/version", json!("9.0.0"), "9.0.0"),
            ("/attachments/0/list/plugins", json!([]), "list.plugins"),
            ("/attachments/0/list/plugins/1/type", json!("/tmp/evil/p"), "list.plugins[1].type"),
            ("/attachments/0/list/plugins/1/type", json!(".."), "list.plugins[1].type"),
            ("/attachments/0/list/plugins/1/type", json!(long), "list.plugins[1].type"),
            ("/attachments/0/list/plugins/1/type", json!(7), "list.plugins[1].type"),
            ("/attachments", json!(vec![base["attachments"][0].clone(); 17]), "attachments"),
            ("/version", json!("1"), "u32"),
        ] {
            let mut changed = base.clone();
            *changed.pointer_mut(field).unwrap() = value.clone();
            fs::write(&path, changed.to_string()).unwrap();
            let error = refusal(Record::read(&path, &id, &netns));
            assert!(error.contains(word) && error.contains("network.json"), "{field} {value}: {error}");
        }
        fs::write(&path, base.to_string()).unwrap();
        for other in ["", "../../etc", "A5", &"A5".repeat(32)] {
            Record::read(&path, other, &netns).unwrap_err();
        }
        // A link, and something else than a file.
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        Record::read(&link, &id, &netns).unwrap_err();
        Record::read(directory.path(), &id, &netns).unwrap_err();
    }

    #[test]
    fn a_namespace_in_another_directory_is_believed_where_only_root_can_have_put_it() {
        let directory = tempfile::tempdir().unwrap();
        let (path, id) = (directory.path().join("network.json"), "a5".repeat(32));
        let (before, now) = (directory.path().join("before"), directory.path().join("now"));
        fs::create_dir(&before).unwrap();
        fs::set_permissions(&before, fs::Permissions::from_mode(0o755)).unwrap();
        record(&id, &before).write(&path, Durable::No).unwrap();
        assert!(matches!(Record::read(&path, &id, &now), Ok(Found::Whole(_))));
        fs::set_permissions(&before, fs::Permissions::from_mode(0o777)).unwrap();
        let error = refusal(Record::read(&path, &id, &now));
        assert!(error.contains("network.netns_directory"), "{error}");
    }
}
