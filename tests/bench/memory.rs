//! Memory of an idle guest: what its VMM has for itself, and what the host pays in all.

use std::process::Child;

use anyhow::{Context, Result};

use crate::Setting;
use crate::boot::Guest;
use crate::report::Report;

/// Kibibytes in a mebibyte.
const MEBI: f64 = 1024.0;

/// What a process has, in MiB.
struct Usage {
    /// Private memory outside the guest's.
    own: f64,
    /// Everything: private, guest's, and the process's share of what is shared.
    all: f64,
}

/// Alternates both. An idle guest is one whose agent is ready and nothing more.
pub fn run(setting: &Setting) -> Result<Vec<Report>> {
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..setting.rounds {
        ours.push(usage(&Guest::nacelle(setting)?.process)?);
        peer.push(usage(&Guest::qemu(setting)?.process)?);
    }
    let report = |name, figure: fn(&Usage) -> f64| Report {
        name,
        unit: "MiB",
        ours: ours.iter().map(figure).collect(),
        peer: peer.iter().map(figure).collect(),
        peer_name: "QEMU microvm",
    };
    Ok(vec![report("memory-vmm", |usage| usage.own), report("memory-pod", |usage| usage.all)])
}

/// Reads /proc/PID/smaps. The guest's memory is the largest mapping.
fn usage(process: &Child) -> Result<Usage> {
    let path = format!("/proc/{}/smaps", process.id());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (mut mappings, mut all) = (Vec::new(), 0.0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let value: f64 = value.parse().unwrap_or(0.0);
        match key {
            "Size:" => mappings.push((value, 0.0)),
            "Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:" => {
                if let Some((_, private)) = mappings.last_mut() {
                    *private += value;
                }
            }
            "Pss:" => all += value,
            _ => {}
        }
    }
    let guest = mappings.iter().copied().max_by(|a, b| a.0.total_cmp(&b.0)).context("a mapping")?;
    let private: f64 = mappings.iter().map(|(_, private)| private).sum();
    Ok(Usage { own: (private - guest.1) / MEBI, all: all / MEBI })
}
