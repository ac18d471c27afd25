//! What the ids in the pod's user namespace are in the guest.

use nacelle_proto::agent::v1 as api;

use crate::error::{Error, Result};

/// Ids from 0 inside, and what they are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    first: u32,
    length: u32,
}

impl Ids {
    /// What id `inside` is outside, if it is mapped.
    pub fn outside(self, inside: u32) -> Option<u32> {
        (inside < self.length).then(|| self.first.checked_add(inside)).flatten()
    }

    /// How the kernel takes it in `/proc/PID/uid_map`, and shows it there.
    pub fn line(self) -> String {
        format!("0 {} {}\n", self.first, self.length)
    }

    /// Whether that is what a mapping of the specification says.
    pub fn is(self, inside: u32, outside: u32, length: u32) -> bool {
        inside == 0 && outside == self.first && length == self.length
    }

    fn parse(field: &'static str, mapping: Option<&api::IdMapping>) -> Result<Self> {
        let mapping = mapping.ok_or_else(|| Error::invalid(field, "there is none"))?;
        let (first, length) = (mapping.host_id, mapping.length);
        // The largest id means "none" to the kernel.
        if length == 0 || u64::from(first) + u64::from(length) > u64::from(u32::MAX) {
            let reason =
                format!("{length} ids from {first} are none, or more than there are: ids end at {}", u32::MAX - 1);
            return Err(Error::invalid(field, reason));
        }
        Ok(Self { first, length })
    }
}

/// Users and groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// Users.
    pub uids: Ids,
    /// Groups.
    pub gids: Ids,
}

impl IdMap {
    /// Reads and checks what the host asks for.
    pub fn parse(asked: &api::UserNamespace) -> Result<Self> {
        Ok(Self {
            uids: Ids::parse("user_namespace.uids", asked.uids.as_ref())?,
            gids: Ids::parse("user_namespace.gids", asked.gids.as_ref())?,
        })
    }

    /// What the pod's root is outside.
    pub fn root(self) -> (u32, u32) {
        (self.uids.first, self.gids.first)
    }

    /// What a group is outside; where it is not mapped, what root's is.
    pub fn group_or_root(self, inside: u32) -> u32 {
        self.gids.outside(inside).unwrap_or(self.gids.first)
    }

    /// Refuses a process's ids of which one is not mapped.
    pub fn check(self, uid: u32, gids: &[u32]) -> Result<()> {
        let unmapped = |kind: &str, id: u32, ids: Ids| {
            let reason = format!("{kind} {id} is not in the pod's user namespace, which has {} of them", ids.length);
            Err(Error::invalid("user", reason))
        };
        match gids.iter().find(|gid| self.gids.outside(**gid).is_none()) {
            _ if self.uids.outside(uid).is_none() => unmapped("user", uid, self.uids),
            Some(gid) => unmapped("group", *gid, self.gids),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(first: u32, length: u32) -> Result<IdMap> {
        let ids = Some(api::IdMapping { host_id: first, length });
        IdMap::parse(&api::UserNamespace { uids: ids, gids: ids })
    }

    #[test]
    fn ids_are_mapped_up_to_the_length_and_no_further() {
        let map = map(100_000, 65_536).unwrap();
        assert_eq!((map.root(), map.uids.line().as_str()), ((100_000, 100_000), "0 100000 65536\n"));
        assert_eq!((map.uids.outside(65_535), map.uids.outside(65_536)), (Some(165_535), None));
        assert!(
            map.uids.is(0, 100_000, 65_536) && !map.uids.is(0, 100_000, 65_535) && !map.uids.is(1, 100_000, 65_536)
        );
        map.check(0, &[0, 65_535]).unwrap();
        let refused = |uid, gids: &[u32]| map.check(uid, gids).unwrap_err().to_string();
        assert!(refused(65_536, &[]).contains("user 65536"));
        assert!(refused(0, &[5, 70_000]).contains("group 70000"));
        assert_eq!((map.group_or_root(6), map.group_or_root(70_000)), (100_006, 100_000));
    }

    #[test]
    fn a_mapping_that_cannot_be_is_refused_by_its_field() {
        for (first, length) in [(0, 0), (5, 0), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(matches!(map(first, length), Err(Error::Invalid { field: "user_namespace.uids", .. })), "{first}");
        }
        map(0, u32::MAX).unwrap();
        let one = Some(api::IdMapping { host_id: 5, length: 1 });
        let halved = IdMap::parse(&api::UserNamespace { uids: one, gids: None });
        assert!(matches!(halved, Err(Error::Invalid { field: "user_namespace.gids", .. })));
    }
}
