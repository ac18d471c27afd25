//! What a benchmark found.

/// Costs of ours and of the peer, one of each a round.
pub struct Report {
    /// What was measured.
    pub name: &'static str,
    /// Unit of the costs.
    pub unit: &'static str,
    /// Ours.
    pub ours: Vec<f64>,
    /// The peer's; empty where there is none.
    pub peer: Vec<f64>,
    /// Who the peer is.
    pub peer_name: &'static str,
}

impl Report {
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
}
