//! A guest's network: bytes to it, bytes from it, and requests of one byte, by TCP between the
//! host and the guest over the same tap, with the same kernel and program. The peer is QEMU's
//! virtio-net, once as QEMU itself serves it and once with the host kernel's help (vhost-net).

use std::io::{Read, Write};
use std::process::Command;

use anyhow::{Result, bail};

use crate::Setting;
use crate::guest::{self, Guest, Side, Tap};
use crate::report::Report;

/// Bytes to the guest and from it, and round trips of a byte.
const BYTES: u64 = 64 << 20;
const ROUND_TRIPS: u64 = 500;
/// Bytes given or taken by one call. Less would measure the host's system calls.
const PIECE: usize = 256 << 10;

/// Alternates all, each time with a guest anew.
pub fn run(setting: &Setting) -> Result<Vec<Report>> {
    let setting = guest::setting(setting)?;
    let _tap = Tap::new()?;
    let vhost = Command::new("modprobe").arg("vhost_net").status().is_ok_and(|status| status.success());
    let mut figures = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..setting.rounds {
        for (side, figures) in [Side::Ours, Side::Qemu, Side::Vhost].into_iter().zip(&mut figures) {
            if side != Side::Vhost || vhost {
                figures.push(Guest::with(&setting, side, None, measure)?);
            }
        }
    }
    let [ours, qemu, vhost] = figures;
    let mut reports = Vec::new();
    for (peer_name, peer) in [("QEMU virtio-net", qemu), ("QEMU vhost-net", vhost)] {
        for (at, name) in ["net-to-guest", "net-from-guest", "net-latency"].into_iter().enumerate() {
            let figure = |figures: &[[f64; 3]]| figures.iter().map(|figures| figures[at]).collect();
            if !peer.is_empty() {
                let (ours, peer) = (figure(&ours), figure(&peer));
                reports.push(Report { name: name.into(), unit: "ms".into(), ours, peer, peer_name: peer_name.into() });
            }
        }
    }
    Ok(reports)
}

/// Milliseconds for the bytes to the guest, for those from it, and for the round trips.
fn measure(guest: &mut Guest) -> Result<[f64; 3]> {
    // What is done for the first time costs more: windows open, pages are touched.
    send(guest, BYTES / 16)?;
    receive(guest, BYTES / 16)?;
    round_trips(guest, ROUND_TRIPS / 16)?;
    Ok([send(guest, BYTES)?, receive(guest, BYTES)?, round_trips(guest, ROUND_TRIPS)?])
}

fn send(guest: &mut Guest, bytes: u64) -> Result<f64> {
    let begun = guest.order(b'S', bytes)?;
    // Whole pieces.
    let piece = vec![7; PIECE];
    for _ in 0..bytes / PIECE as u64 {
        guest.stream.write_all(&piece)?;
    }
    guest.stream.read_exact(&mut [0])?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn receive(guest: &mut Guest, bytes: u64) -> Result<f64> {
    let begun = guest.order(b'G', bytes)?;
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let count = guest.stream.read(&mut piece)?;
        if count == 0 {
            bail!("the guest closed the connection");
        }
        left = left.saturating_sub(count as u64);
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn round_trips(guest: &mut Guest, count: u64) -> Result<f64> {
    let begun = guest.order(b'E', count)?;
    for _ in 0..count {
        guest.stream.write_all(&[1])?;
        guest.stream.read_exact(&mut [0])?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}
