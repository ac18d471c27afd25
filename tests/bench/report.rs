//! What a benchmark found.

use std::io::BufRead;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Costs of ours and of the peer, one of each a round.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// What was measured.
    pub name: String,
    /// Unit of the costs.
    pub unit: String,
    /// Ours.
    pub ours: Vec<f64>,
    /// The peer's; empty where there is none.
    pub peer: Vec<f64>,
    /// Who the peer is.
    pub peer_name: String,
}

/// Puts together what several runs measured, each in lines of [`Report::samples`].
///
/// # Errors
/// If the lines cannot be read, or one is something else.
pub fn merged(lines: impl BufRead) -> Result<Vec<Report>> {
    let mut reports: Vec<Report> = Vec::new();
    for line in lines.lines() {
        let line = line?;
        let more: Report = serde_json::from_str(&line).with_context(|| format!("not what a run measured: {line}"))?;
        match reports.iter_mut().find(|known| known.name == more.name && known.peer_name == more.peer_name) {
            Some(known) => {
                known.ours.extend(more.ours);
                known.peer.extend(more.peer);
            }
            None => reports.push(more),
        }
    }
    Ok(reports)
}

impl Report {
    /// One line with the costs of each round, for [`merged`].
    ///
    /// # Errors
    /// None that a report could cause.
    pub fn samples(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Prints medians, spread (half the range, in per cent of the median) and ratio.
    pub fn print(&self, json: bool) {
        let (ours, peer) = (median(&self.ours), median(&self.peer));
        let ratio = ours / peer;
        if json {
            let number =
                |value: f64| if value.is_finite() { serde_json::json!(value) } else { serde_json::Value::Null };
            let line = serde_json::json!({
                "name": self.name, "unit": self.unit, "ours": number(ours), "peer": number(peer),
                "peer_name": self.peer_name, "ratio": number(ratio), "rounds": self.ours.len(),
            });
            println!("{line}");
            return;
        }
        let Self { name, unit, peer_name, .. } = self;
        print!("{name:<14} ours {ours:>9.2} {unit} (±{:.1} %)", spread(&self.ours));
        if peer.is_finite() {
            print!("   {peer_name} {peer:>9.2} {unit} (±{:.1} %)   ratio {ratio:.3}", spread(&self.peer));
        }
        println!("   {} rounds", self.ours.len());
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(middle), middle.checked_sub(1).and_then(|lower| sorted.get(lower))) {
        (1, Some(value), _) => *value,
        (0, Some(upper), Some(lower)) => (lower + upper) / 2.0,
        _ => f64::NAN,
    }
}

fn spread(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
    (largest - smallest) / 2.0 / median(values) * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spread_are_what_they_say() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        assert_eq!(spread(&[9.0, 10.0, 11.0]), 10.0);
    }

    #[test]
    fn rounds_of_several_runs_come_together() {
        let round = |name: &str, ours: f64, peer: Vec<f64>| {
            let (name, unit, peer_name) = (name.into(), "ms".into(), "other".into());
            Report { name, unit, ours: vec![ours], peer, peer_name }.samples().unwrap()
        };
        let lines = [round("a", 1.0, vec![4.0]), round("b", 2.0, vec![]), round("a", 3.0, vec![5.0])].join("\n");
        let reports = merged(lines.as_bytes()).unwrap();
        assert_eq!(reports.iter().map(|report| report.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(
            (reports[0].ours.as_slice(), reports[0].peer.as_slice()),
            ([1.0, 3.0].as_slice(), [4.0, 5.0].as_slice())
        );
        assert!(merged("killed".as_bytes()).is_err());
    }
}
