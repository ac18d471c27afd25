//! What the pods of a host consist of, as their records say: for those who ask without a daemon.

use std::collections::BTreeMap;
use std::path::Path;

use crate::id::is_id;
use crate::layout::Layout;
use crate::model::SandboxState;
use crate::record::{self, SandboxRecord, Versions};
use crate::{Result, recovery};

/// How many running pods there are of each kind, and of how many nothing can be told. Blocks.
///
/// # Errors
/// The directory of pods cannot be listed.
pub fn versions_on_record(root: &Path, run: &Path) -> Result<(BTreeMap<Versions, usize>, usize)> {
    let layout = Layout::new(root, run)?;
    let (mut known, mut unknown) = (BTreeMap::new(), 0);
    for id in recovery::names(&layout.pods_root())?.into_iter().filter(|id| is_id(id)) {
        match record::read::<SandboxRecord>(&layout.pod(&id).record(), &id) {
            Ok(record) if record.state == SandboxState::Ready => *known.entry(record.versions).or_default() += 1,
            Ok(_) | Err(record::Unusable::Absent) => {}
            Err(_) => unknown += 1,
        }
    }
    Ok((known, unknown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_pods_are_counted_by_what_they_consist_of() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path(), directory.path()).unwrap();
        assert_eq!(versions_on_record(directory.path(), directory.path()).unwrap(), (BTreeMap::new(), 0));
        let pods = [("1", r#""ready""#, "1.0"), ("2", r#""ready""#, "1.0"), ("3", r#""not_ready""#, "2.0")];
        for (digit, state, agent) in pods {
            let id = digit.repeat(64);
            std::fs::create_dir_all(layout.pod(&id).root).unwrap();
            let mut record = record::sketch_sandbox(&layout.pod(&id).record(), &id);
            record.state = serde_json::from_str(state).unwrap();
            record.versions.agent = agent.into();
            record::write(&layout.pod(&id).record(), &record).unwrap();
        }
        let torn = layout.pod(&"4".repeat(64));
        std::fs::create_dir_all(&torn.root).unwrap();
        std::fs::write(torn.record(), "{").unwrap();
        std::fs::create_dir_all(layout.pods_root().join("lost+found")).unwrap();
        let (known, unknown) = versions_on_record(directory.path(), directory.path()).unwrap();
        let of = |agent: &str| Versions { agent: agent.into(), ..Versions::default() };
        assert_eq!((known, unknown), (BTreeMap::from([(of("1.0"), 2)]), 1));
    }
}
