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
const HUGE_PAGE: u64 = 2 << 20;

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
    let report = |name: &str, ours: &[Usage], figure: fn(&Usage) -> f64, peers: fn(&Usage) -> f64| Report {
        name: name.into(),
        unit: "MiB".into(),
        ours: ours.iter().map(figure).collect(),
        peer: peer.iter().map(peers).collect(),
        peer_name: "QEMU microvm".into(),
    };
    Ok(vec![
        report("memory-vmm", &ours, |usage| usage.own, |usage| usage.own),
        report("memory-pod", &ours, |usage| usage.all, |usage| usage.all),
        report("memory-clone", &clones, |usage| usage.more, |usage| usage.all),
    ])
}

/// Reads /proc/PID/smaps. The guest's memory is in the mappings that are named so, or comes from what a guest was
/// saved in; where there are none, it is the largest mapping and those beside it that are whole huge
/// pages: one mapping has as many entries as there are kinds of advice for parts of it.
fn usage(process: &Child) -> Result<Usage> {
    #[derive(Default)]
    struct Mapping {
        start: u64,
        end: u64,
        private: f64,
        written: f64,
        share: f64,
        named: bool,
    }
    let path = format!("/proc/{}/smaps", process.id());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let value = value.parse::<f64>().unwrap_or(0.0) / MEBI;
        if !key.ends_with(':') {
            let named = line.ends_with("[anon:nacelle-guest]") || line.ends_with("/memory");
            let range = key.split_once('-').and_then(|(start, end)| {
                Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
            });
            let (start, end) = range.with_context(|| format!("a range of addresses in {path}: {line:?}"))?;
            mappings.push(Mapping { named, start, end, ..Mapping::default() });
        }
        let Some(last) = mappings.last_mut() else { continue };
        match key {
            "Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:" => last.private += value,
            "Anonymous:" => last.written += value,
            "Pss:" => last.share += value,
            _ => {}
        }
    }
    if !mappings.iter().any(|mapping| mapping.named) {
        let largest = (0..mappings.len()).max_by_key(|index| mappings[*index].end - mappings[*index].start);
        let largest = largest.context("a mapping")?;
        // Huge pages begin at both ends of each part.
        let part = |mapping: &Mapping| (mapping.start | mapping.end).is_multiple_of(HUGE_PAGE);
        let mut first = largest;
        while first > 0 && mappings[first - 1].end == mappings[first].start && part(&mappings[first - 1]) {
            first -= 1;
        }
        let mut last = largest;
        while last + 1 < mappings.len() && mappings[last].end == mappings[last + 1].start && part(&mappings[last + 1]) {
            last += 1;
        }
        mappings[first..=last].iter_mut().for_each(|mapping| mapping.named = true);
    }
    let (guest, own): (Vec<_>, Vec<_>) = mappings.into_iter().partition(|mapping| mapping.named);
    let sum = |mappings: &[Mapping], figure: fn(&Mapping) -> f64| mappings.iter().map(figure).sum::<f64>();
    let share = sum(&own, |mapping| mapping.share);
    Ok(Usage {
        own: sum(&own, |mapping| mapping.private),
        all: share + sum(&guest, |mapping| mapping.share),
        more: share + sum(&guest, |mapping| mapping.written),
    })
}
