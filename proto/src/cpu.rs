//! Processor shares, as the interface has them, in cgroup v2's words.

/// Shares that stand for the least and the most weight.
const SHARES: std::ops::RangeInclusive<u64> = 2..=262_144;

/// The `cpu.weight` (1 to 10,000) for shares of cgroup v1, by the curve that runc 1.3.2, crun and libcontainer 0.7 have:
/// one through 2 and 1, 1024 and 100 (what a group has that nobody sets anything for), 262,144 and 10,000. A straight line
/// through its ends would give a whole processor's 1024 shares 39, and so less than half of what an unset neighbour has.
#[must_use]
pub fn weight(shares: u64) -> u64 {
    let logarithm = match shares.clamp(*SHARES.start(), *SHARES.end()) {
        2 => return 1,
        262_144 => return 10_000,
        // Exact: what is below 2^18 is well within a double's 53 bits.
        #[allow(clippy::cast_precision_loss)]
        shares => (shares as f64).log2(),
    };
    let exponent = (logarithm * logarithm + 125.0 * logarithm) / 612.0 - 7.0 / 34.0;
    // Between 1 and 10,000, where no double is lost.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let weight = 10_f64.powf(exponent).ceil() as u64;
    weight.clamp(1, 10_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_the_weights_that_other_runtimes_give_them() {
        for (shares, expected) in
            [(0, 1), (1, 1), (2, 1), (1024, 100), (262_143, 10_000), (262_144, 10_000), (u64::MAX, 10_000)]
        {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        // 100 and 500 thousandths of a processor, 4 processors.
        assert_eq!((weight(102), weight(512), weight(4096)), (17, 59, 303));
    }

    #[test]
    fn more_shares_never_weigh_less() {
        let weights: Vec<_> = (0..=262_144).map(weight).collect();
        assert!(weights.is_sorted() && weights.iter().all(|weight| (1..=10_000).contains(weight)));
    }
}
