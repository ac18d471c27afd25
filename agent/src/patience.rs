//! How long the agent waits for what should take no time: the kernel's devices, its own
//! helper, the end of killed processes.

use std::sync::OnceLock;
use std::time::Duration;

/// Word of the kernel's command line by which the host says how much slower than usual it
/// is: a factor on every time limit.
const WORD: &str = "nacelle.timeout_scale=";

/// A time limit, multiplied by the host's factor.
pub fn scaled(limit: Duration) -> Duration {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| std::fs::read_to_string("/proc/cmdline").map_or(1.0, |line| factor(&line)));
    limit.mul_f64(*factor)
}

/// 1 where the command line does not say, or nothing sensible.
fn factor(command_line: &str) -> f64 {
    let said = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix(WORD));
    let factor = said.and_then(|number| number.parse().ok()).unwrap_or(1.0);
    if (0.001..=10_000.0).contains(&factor) { factor } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_may_say_how_slow_it_is() {
        assert_eq!(factor("quiet nacelle.timeout_scale=2.5 x"), 2.5);
        for line in ["", "quiet", "nacelle.timeout_scale=", "nacelle.timeout_scale=-1", "nacelle.timeout_scale=NaN"] {
            assert_eq!(factor(line), 1.0, "{line}");
        }
    }
}
