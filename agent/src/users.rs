//! Who a container runs as: the image's words for a user made into numbers.
//!
//! /etc/passwd and /etc/group belong to the image and are hostile: they are opened so
//! that no symbolic link leads out of the image, read up to a limit, and every line that
//! makes no sense is skipped.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

use crate::error::{Error, Result};

/// What is read of a database at most, in bytes.
const LIMIT: u64 = 4 << 20;

/// A user as a process needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Groups that /etc/group adds, ascending.
    pub groups: Vec<u32>,
    /// Home directory, `/` where none is known.
    pub home: String,
}

/// The user databases of one image.
#[derive(Debug, Default)]
pub struct Databases {
    users: Vec<User>,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct User {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

#[derive(Debug)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

impl Databases {
    /// Reads the databases of the image mounted at `root`. A database that is missing is
    /// empty.
    pub fn read(root: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, root, flags, Mode::empty())
            .map_err(|error| Error::path("open the root file system", root)(error.into()))?;
        let read = |name: &'static str| {
            read_inside(directory.as_fd(), name).map_err(Error::path("read the image's", format!("/{name}")))
        };
        Ok(Self::parse(&read("etc/passwd")?, &read("etc/group")?))
    }

    fn parse(passwd: &str, group: &str) -> Self {
        Self {
            users: passwd.lines().filter_map(parse_user).collect(),
            groups: group.lines().filter_map(parse_group).collect(),
        }
    }

    /// Makes `name`, `uid`, `name:group` or `uid:gid` into numbers. A name must be in the
    /// database; a number need not be, and is never taken for a name: an image could make root
    /// of the number that a pod runs as.
    pub fn resolve(&self, wanted: &str) -> Result<Identity> {
        let (user, group) = match wanted.split_once(':') {
            Some((user, "")) => (user, None),
            Some((user, group)) => (user, Some(group)),
            None => (wanted, None),
        };
        let found = match number(user) {
            Some(uid) => self.users.iter().find(|entry| entry.uid == uid),
            None => self.users.iter().find(|entry| entry.name == user),
        };
        let (uid, mut gid) = match (found, number(user)) {
            (Some(entry), _) => (entry.uid, entry.gid),
            (None, Some(uid)) => (uid, 0),
            (None, None) => {
                return Err(Error::invalid("user", format!("the image's /etc/passwd has no user {user:?}")));
            }
        };
        if let Some(group) = group {
            let named = || self.groups.iter().find(|entry| entry.name == group).map(|entry| entry.gid);
            gid = number(group)
                .or_else(named)
                .ok_or_else(|| Error::invalid("user", format!("the image's /etc/group has no group {group:?}")))?;
        }
        let mut groups: Vec<u32> = match found {
            Some(user) => {
                let member = |group: &&Group| group.members.contains(&user.name);
                self.groups.iter().filter(member).map(|group| group.gid).collect()
            }
            None => Vec::new(),
        };
        groups.sort_unstable();
        groups.dedup();
        Ok(Identity { uid, gid, groups, home: self.home(uid) })
    }

    /// Home directory of a user id, `/` where none is known.
    pub fn home(&self, uid: u32) -> String {
        let home = self.users.iter().find(|entry| entry.uid == uid).map(|entry| entry.home.as_str());
        home.filter(|home| home.starts_with('/')).unwrap_or("/").to_owned()
    }
}

/// Reads a file below `root`, every symbolic link on the way taken as the image's own.
fn read_inside(root: rustix::fd::BorrowedFd<'_>, path: &str) -> io::Result<String> {
    // Not blocking: the image may put a FIFO there.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::from(file).take(LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn number(text: &str) -> Option<u32> {
    // u32::MAX means "no change" to the system calls that set ids.
    text.parse().ok().filter(|number| *number != u32::MAX)
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = number(fields.nth(1)?)?;
    let gid = number(fields.next()?)?;
    let home = fields.nth(1).unwrap_or_default();
    Some(User { name: name.to_owned(), uid, gid, home: home.to_owned() })
}

fn parse_group(line: &str) -> Option<Group> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = number(fields.nth(1)?)?;
    let members = fields.next().unwrap_or_default().split(',').filter(|member| !member.is_empty());
    Some(Group { name: name.to_owned(), gid, members: members.map(str::to_owned).collect() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        junk\n:x:5:5::/nameless:\nbad:x:minus:1::/:\n\
        www:x:33:33:www:/var/www:/sbin/nologin\n\
        1000:x:0:0::/named-like-a-number:\nshort:x:44:45\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\nadm:x:4:www,root\nssl:x:110:www\nssl2:x:110:www\nodd:x:no:www\nstaff:x:50:\n77:x:0:1000\n";

    fn resolve(wanted: &str) -> Result<Identity> {
        Databases::parse(PASSWD, GROUP).resolve(wanted)
    }

    fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
        Identity { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn names_and_numbers_mean_the_same_user() {
        let www = identity(33, 33, &[4, 110], "/var/www");
        assert_eq!(resolve("www").unwrap(), www);
        assert_eq!(resolve("33").unwrap(), www);
    }

    #[test]
    fn an_explicit_group_replaces_the_primary_one() {
        assert_eq!(resolve("www:staff").unwrap(), identity(33, 50, &[4, 110], "/var/www"));
        assert_eq!(resolve("www:4000").unwrap(), identity(33, 4000, &[4, 110], "/var/www"));
    }

    #[test]
    fn numbers_need_no_entry_but_names_do() {
        assert_eq!(resolve("4242:17").unwrap(), identity(4242, 17, &[], "/"));
        assert!(matches!(resolve("nobody"), Err(Error::Invalid { field: "user", .. })));
        assert!(matches!(resolve("www:nogroup"), Err(Error::Invalid { field: "user", .. })));
        assert!(matches!(resolve("4294967295"), Err(Error::Invalid { .. })));
        assert!(matches!(resolve("-1"), Err(Error::Invalid { .. })));
        assert!(matches!(resolve(""), Err(Error::Invalid { .. })));
    }

    /// CVE-2016-3697.
    #[test]
    fn a_number_is_never_a_name() {
        assert_eq!(resolve("1000").unwrap(), identity(1000, 0, &[], "/"));
        assert_eq!(resolve("1000:77").unwrap(), identity(1000, 77, &[], "/"));
        assert_eq!(resolve("www:77").unwrap().gid, 77);
    }

    #[test]
    fn a_group_without_a_name_is_none() {
        assert_eq!(resolve("www:").unwrap(), resolve("www").unwrap());
        assert_eq!(resolve("4242:").unwrap(), identity(4242, 0, &[], "/"));
    }

    #[test]
    fn a_line_without_a_home_means_the_root_directory() {
        assert_eq!(resolve("short").unwrap(), identity(44, 45, &[], "/"));
    }

    #[test]
    fn links_stay_inside_the_image() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("passwd"), "evil:x:0:0::/:\n").unwrap();
        let image = tempfile::tempdir().unwrap();
        fs::create_dir(image.path().join("etc")).unwrap();
        fs::create_dir(image.path().join("real")).unwrap();
        fs::write(image.path().join("real/group"), "inside:x:77:\n").unwrap();
        symlink(outside.path().join("passwd"), image.path().join("etc/passwd")).unwrap();
        symlink("/../../real/group", image.path().join("etc/group")).unwrap();
        let databases = Databases::read(image.path()).unwrap();
        assert!(databases.resolve("evil").is_err());
        assert_eq!(databases.resolve("0:inside").unwrap().gid, 77);
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let image = tempfile::tempdir().unwrap();
        fs::create_dir_all(image.path().join("etc/passwd")).unwrap();
        let error = Databases::read(image.path()).unwrap_err();
        assert!(error.to_string().contains("/etc/passwd"), "{error}");
    }

    #[test]
    fn an_image_without_databases_has_numbers_only() {
        let image = tempfile::tempdir().unwrap();
        let databases = Databases::read(image.path()).unwrap();
        assert_eq!(databases.resolve("5").unwrap(), identity(5, 0, &[], "/"));
        assert!(databases.resolve("root").is_err());
    }

    proptest! {
        #[test]
        fn no_database_and_no_request_can_make_it_panic(passwd in "(?s).{0,200}", group in "[a-c:,0-9\n]{0,200}", user in "(?s).{0,20}") {
            let _ = Databases::parse(&passwd, &group).resolve(&user);
        }

        #[test]
        fn a_number_always_resolves_to_itself(passwd in "[a-c:0-9\n]{0,200}", uid in 0..u32::MAX) {
            let databases = Databases::parse(&passwd, "");
            prop_assert_eq!(databases.resolve(&uid.to_string()).unwrap().uid, uid);
        }
    }
}
