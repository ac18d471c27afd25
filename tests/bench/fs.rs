//! A volume of a guest: large reads and writes, small ones in random places, and small files
//! made, looked at and removed, with the same kernel and program on the same directory of the
//! host. The peer is QEMU with Debian's virtiofsd, each with its own defaults.

use anyhow::Result;

use crate::Setting;
use crate::guest::{self, Guest, Side, Tap};
use crate::report::Report;

/// What is measured: the order of tests/bench-guest, and how many bytes, accesses or files.
const MEASURES: [(&str, u8, u64); 5] = [
    ("fs-write", b'w', 64 << 20),
    ("fs-read", b'r', 64 << 20),
    ("fs-random-write", b'i', 2000),
    ("fs-random-read", b'o', 2000),
    ("fs-small-files", b'f', 500),
];

/// Alternates both, each time with a guest anew and an empty directory.
pub fn run(setting: &Setting) -> Result<Vec<Report>> {
    let setting = guest::setting(setting)?;
    let _tap = Tap::new()?;
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..setting.rounds {
        ours.push(measure(&setting, Side::Ours)?);
        peer.push(measure(&setting, Side::Qemu)?);
    }
    let figure = |figures: &[[f64; 5]], at: usize| figures.iter().map(|figures| figures[at]).collect();
    let report = |(at, (name, _, _)): (usize, (&'static str, u8, u64))| Report {
        name: name.into(),
        unit: "ms".into(),
        ours: figure(&ours, at),
        peer: figure(&peer, at),
        peer_name: "QEMU and virtiofsd".into(),
    };
    Ok(MEASURES.into_iter().enumerate().map(report).collect())
}

fn measure(setting: &Setting, side: Side) -> Result<[f64; 5]> {
    let share = tempfile::tempdir()?;
    std::fs::create_dir(share.path().join("share"))?;
    Guest::with(setting, side, Some(share.path()), |guest| {
        // The mount, and what is done for the first time.
        guest.done(b'm', 0)?;
        guest.done(b'f', 16)?;
        let mut figures = [0.0; 5];
        for (figure, (_, order, count)) in figures.iter_mut().zip(MEASURES) {
            // Not measured: one side keeps what a file has in the guest's memory when it is opened again, where the
            // other drops it.
            guest.done(b'd', 0)?;
            *figure = guest.done(order, count)?;
        }
        Ok(figures)
    })
}
