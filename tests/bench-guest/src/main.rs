//! Process 1 of a guest whose devices are measured: configures the one network interface that
//! it finds, and does what a connection to port 7 orders.
//!
//! An order is a letter and a count (8 bytes, least significant first): `S` takes so many bytes
//! and answers with one, `G` gives so many, `E` sends back so many bytes one by one. Those of
//! small letters are of files, see [`files`], and answered with one byte when they are done.

mod files;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nacelle_netlink::{Address, Interface, Link, Mac, Netlink};
use rustix::mount::{MountFlags, mount};

/// The guest's address.
const ADDRESS: Address = Address { ip: IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2)), prefix: 24 };
/// Its interface.
const MAC: Mac = Mac([2, 0, 0, 9, 0, 2]);
/// Where orders come.
const PORT: u16 = 7;
/// Bytes moved at once.
const PIECE: usize = 256 << 10;

fn main() {
    if let Err(error) = begun().and_then(|()| run()) {
        last_words(&error);
    }
}

/// Lets go of the console: while it is open, its port has an interrupt that a device may need.
fn begun() -> Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// Puts an error into the kernel's log, which shows it on the console. The kernel panics when
/// process 1 ends.
fn last_words(error: &anyhow::Error) {
    let _ = std::fs::write("/dev/kmsg", format!("<3>bench-guest: {error:#}"));
}

fn run() -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, target, kind, MountFlags::empty(), None).with_context(|| format!("mount {target}"))?;
    }
    let mut netlink = Netlink::open()?;
    let link = interface(&mut netlink)?;
    let wanted = Interface {
        name: link.name.clone(),
        mac: MAC,
        mtu: link.mtu,
        arp: true,
        addresses: vec![ADDRESS],
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    netlink.configure(&link, &wanted)?;
    let listener = TcpListener::bind((ADDRESS.ip, PORT))?;
    loop {
        let (stream, _) = listener.accept()?;
        // The measuring side went away: there will be another.
        let _ = serve(stream);
    }
}

/// The guest's interface; it may be put on the bus only now.
fn interface(netlink: &mut Netlink) -> Result<Link> {
    loop {
        std::fs::write("/sys/bus/pci/rescan", "1").context("rescan the PCI bus")?;
        if let Some(link) = netlink.links()?.into_iter().find(|link| link.mac == Some(MAC)) {
            return Ok(link);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut piece = vec![0; PIECE];
    loop {
        let mut order = [0; 9];
        stream.read_exact(&mut order)?;
        let [letter, count @ ..] = order;
        let mut left = u64::from_le_bytes(count);
        if letter.is_ascii_lowercase() {
            // A measure of a part of the work would be wrong: process 1 ends, with the reason.
            if let Err(error) = files::order(letter, left) {
                last_words(&error.context(format!("order {}", char::from(letter))));
                std::process::exit(1);
            }
            stream.write_all(&[1])?;
            continue;
        }
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let moved = match letter {
                b'S' => stream.read(&mut piece[..part])?,
                b'G' => stream.write(&piece[..part])?,
                b'E' => {
                    stream.read_exact(&mut piece[..1])?;
                    stream.write(&piece[..1])?
                }
                other => bail!("no order {other}"),
            };
            if moved == 0 {
                return Ok(());
            }
            left -= moved as u64;
        }
        if letter == b'S' {
            stream.write_all(&[1])?;
        }
    }
}
