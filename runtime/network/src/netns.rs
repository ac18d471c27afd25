//! Network namespaces with a name: a file that the namespace is mounted on.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread;

use nacelle_netlink::Netlink;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::{Error, Result};

/// A network namespace's name on the host.
#[derive(Debug, Clone)]
pub struct Netns {
    path: PathBuf,
}

impl Netns {
    /// The namespace of that name, whether it is there or not.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, with nothing but its loopback interface. Blocks.
    pub fn create(&self) -> Result<()> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory).map_err(Error::path("create the directory", directory))?;
        }
        File::options()
            .write(true)
            .create_new(true)
            .open(&self.path)
            .map_err(Error::path("create the network namespace", &self.path))?;
        let made = on_thread(|| {
            // SAFETY: the thread shares nothing with others that the network namespace holds,
            // and ends with this.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Error::system("make a network namespace"))?;
            let mut netlink = Netlink::open()?;
            if let Some(loopback) = netlink.links()?.iter().find(|link| link.loopback) {
                netlink.set_up(loopback, true)?;
            }
            mount_bind("/proc/thread-self/ns/net", &self.path)
                .map_err(Error::path("name the network namespace", &self.path))
        });
        if made.is_err() {
            let _ = self.remove();
        }
        made
    }

    /// Whether a namespace is there, not only its name.
    pub fn exists(&self) -> bool {
        // A namespace lies on a file system of its own kind, not on that of its directory.
        const NSFS: i64 = 0x6e73_6673;
        rustix::fs::statfs(&self.path).is_ok_and(|found| found.f_type == NSFS)
    }

    /// Runs `work` inside, on a thread of its own. Blocks.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(&self.path).map_err(Error::path("open the network namespace", &self.path))?;
        on_thread(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(Error::path("enter the network namespace", &self.path))?;
            work()
        })
    }

    /// Takes the name away, and with it the namespace once nobody is in it. Nothing happens
    /// if there is none.
    pub fn remove(&self) -> Result<()> {
        loop {
            match unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // Mounted more than once is possible, if only by hand.
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
                Err(error) => return Err(Error::path("unmount the network namespace", &self.path)(error)),
            }
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::path("remove the network namespace", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Runs `work` on a thread that ends with it.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(_) => Err(Error::System {
            action: "finish what was begun in a network namespace",
            source: ErrorKind::Other.into(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_a_loopback_interface_that_is_up_and_goes_without_a_trace() {
        let directory = tempfile::tempdir().unwrap();
        let netns = Netns::at(directory.path().join("pod"));
        match netns.create() {
            Err(error) if error.to_string().contains("not permitted") => {
                eprintln!("skipped: {error}");
                return;
            }
            made => made.unwrap(),
        }
        assert!(netns.exists());
        let links = netns.enter(|| Ok(Netlink::open()?.links()?)).unwrap();
        assert!(links.iter().any(|link| link.name == "lo" && link.up), "{links:?}");
        assert!(netns.create().is_err(), "the name is taken");
        netns.remove().unwrap();
        netns.remove().expect("again is no error");
        assert!(!netns.exists() && !netns.path().exists());
    }
}
