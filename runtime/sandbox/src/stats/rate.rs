//! CPU time a second, from two readings of CPU time.

use std::time::Duration;

use nacelle_proto::agent::v1::GroupUsage;

/// The shortest time that a rate is taken over, in nanoseconds: however often somebody asks,
/// it means something.
const SHORTEST: u64 = Duration::from_secs(1).as_nanos() as u64;
/// The longest: what was before says nothing about the present.
const LONGEST: u64 = Duration::from_secs(300).as_nanos() as u64;

/// The readings of one group.
#[derive(Debug, Default)]
pub struct Rate {
    /// What the next reading is compared with.
    base: Option<Reading>,
    /// What will be, once it is old enough.
    last: Option<Reading>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    /// Both in nanoseconds.
    at: u64,
    used: u64,
}

impl Rate {
    /// Nanoseconds of CPU time a second; none until there are two readings apart. The
    /// readings of a guest may be anything.
    pub fn of(&mut self, group: &GroupUsage) -> Option<u64> {
        let used = group.cpu.as_ref()?.usage.saturating_mul(1000);
        let now = Reading { at: group.read_at, used };
        let Some(last) = self.last.filter(|last| last.at <= now.at && last.used <= now.used) else {
            *self = Self { base: None, last: Some(now) };
            return None;
        };
        if now.at - last.at >= SHORTEST {
            self.base = Some(last);
            self.last = Some(now);
        }
        let base = self.base.filter(|base| now.at.saturating_sub(base.at) <= LONGEST)?;
        let (used, time) = (now.used.saturating_sub(base.used), now.at.saturating_sub(base.at));
        let rate = u128::from(used) * 1_000_000_000 / u128::from(time.max(1));
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use nacelle_proto::agent::v1::CpuUsage;

    use super::*;

    fn reading(milliseconds: u64, used_milliseconds: u64) -> GroupUsage {
        let cpu = CpuUsage { usage: used_milliseconds * 1000, ..CpuUsage::default() };
        GroupUsage { read_at: milliseconds * 1_000_000, cpu: Some(cpu), ..GroupUsage::default() }
    }

    #[test]
    fn a_rate_is_of_a_second_at_least_however_often_one_asks() {
        let mut rate = Rate::default();
        assert_eq!(rate.of(&reading(10_000, 500)), None);
        assert_eq!(rate.of(&reading(10_100, 600)), None, "too soon to tell");
        assert_eq!(rate.of(&reading(12_000, 1500)), Some(500_000_000));
        // Compared with the reading at 10 s, not with the one just now.
        assert_eq!(rate.of(&reading(12_001, 1501)), Some(1001 * 1_000_000_000 / 2001));
        assert_eq!(rate.of(&reading(14_000, 1501)), Some(1_000_000 * 1000 / 2000));
        assert_eq!(rate.of(&reading(16_000, 1501)), Some(0));
    }

    #[test]
    fn what_goes_backwards_or_was_long_ago_is_no_rate() {
        let mut rate = Rate::default();
        rate.of(&reading(10_000, 500));
        assert_eq!(rate.of(&reading(20_000, 400)), None);
        assert_eq!(rate.of(&reading(30_000, 5400)), Some(500_000_000));
        assert_eq!(rate.of(&reading(29_000, 5500)), None);
        assert_eq!(rate.of(&reading(1_000_000, 6000)), None);
        assert_eq!(rate.of(&GroupUsage::default()), None);
        let all =
            |n| GroupUsage { read_at: n, cpu: Some(CpuUsage { usage: n, ..Default::default() }), ..Default::default() };
        assert_eq!(Rate::default().of(&all(u64::MAX)), None);
        let mut rate = Rate::default();
        rate.of(&all(0));
        assert_eq!(rate.of(&all(LONGEST)), Some(1000 * 1_000_000_000));
    }
}
