//! Memory of an idle guest: what its VMM has for itself, what the host pays in all, and what it pays for one more
//! that is cloned.

use std::process::Child;

use anyhow::{Context, Result};

use crate::Setting;
use crate::boot::Guest;
use crate::clone::Template;
use crate::report::Report;

/// Kibibytes in a mebibyte.
const MEBI: f64 = 1024.0;

/// What a process has, in MiB.
struct Usage {
    /// Private memory outside the guest's.
    own: f64,
    /// Everything: private, guest's, and the process's share of what is shared.
    all: f64,
    /// The same, without the memory that clones share: of the guest's only what it has written.
    more: f64,
}

/// Alternates both. An idle guest is one whose agent is ready and nothing more.
pub fn run(setting: &Setting) -> Result<Vec<Report>> {
    let template = Template::make(setting)?;
    let (mut ours, mut clones, mut peer) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..setting.rounds {
        ours.push(usage(&Guest::nacelle(setting)?.process)?);
        clones.push(usage(&template.start(setting)?.process)?);
        peer.push(usage(&Guest::qemu(setting)?.process)?);
    }
    let report = |name, ours: &[Usage], figure: fn(&Usage) -> f64, peers: fn(&Usage) -> f64| Report {
        name,
        unit: "MiB",
        ours: ours.iter().map(figure).collect(),
        peer: peer.iter().map(peers).collect(),
        peer_name: "QEMU microvm",
    };
    Ok(vec![
        report("memory-vmm", &ours, |usage| usage.own, |usage| usage.own),
        report("memory-pod", &ours, |usage| usage.all, |usage| usage.all),
        report("memory-clone", &clones, |usage| usage.more, |usage| usage.all),
    ])
}

/// Reads /proc/PID/smaps. The guest's memory is the largest mapping.
fn usage(process: &Child) -> Result<Usage> {
    #[derive(Default)]
    struct Mapping {
        size: f64,
        private: f64,
        written: f64,
        share: f64,
    }
    let path = format!("/proc/{}/smaps", process.id());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let value = value.parse::<f64>().unwrap_or(0.0) / MEBI;
        if key == "Size:" {
            mappings.push(Mapping { size: value, ..Mapping::default() });
        }
        let Some(last) = mappings.last_mut() else { continue };
        match key {
            "Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:" => last.private += value,
            "Anonymous:" => last.written += value,
            "Pss:" => last.share += value,
            _ => {}
        }
    }
    let largest = (0..mappings.len()).max_by(|a, b| mappings[*a].size.total_cmp(&mappings[*b].size));
    let guest = mappings.swap_remove(largest.context("a mapping")?);
    let share: f64 = mappings.iter().map(|mapping| mapping.share).sum();
    Ok(Usage {
        own: mappings.iter().map(|mapping| mapping.private).sum(),
        all: share + guest.share,
        more: share + guest.written,
    })
}
