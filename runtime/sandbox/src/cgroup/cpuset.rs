//! Lists of processors and memory nodes of the host, as cpuset takes them: `0-3,7`.
//!
//! A kubelet with a static CPU manager names the host's processors for every container, those
//! that are left for all included. They mean nothing in a guest, which has processors of its
//! own; the threads that are these run on the host, in the VMM's cgroup, with all that the
//! pod's containers were given.

use std::collections::BTreeSet;
use std::fmt::Write;

/// The lists of all of these together; empty, which means no restriction, if one of them is
/// empty, or if there is none.
pub fn union<'a>(lists: impl IntoIterator<Item = &'a str>) -> String {
    let mut all = BTreeSet::new();
    for list in lists {
        if list.trim().is_empty() {
            return String::new();
        }
        all.extend(list.split(',').flat_map(numbers));
    }
    written(&all)
}

/// Of `3` or `0-3`; none of what is neither.
fn numbers(part: &str) -> std::ops::RangeInclusive<u16> {
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) => first..=last,
        #[allow(clippy::reversed_empty_ranges, reason = "an empty one is meant")]
        _ => 1..=0,
    }
}

fn written(numbers: &BTreeSet<u16>) -> String {
    let mut text = String::new();
    let mut rest = numbers.iter().copied().peekable();
    while let Some(first) = rest.next() {
        let mut last = first;
        while let Some(next) = rest.next_if(|next| last.checked_add(1) == Some(*next)) {
            last = next;
        }
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a string does not fail.
        let _ = match last == first {
            true => write!(text, "{comma}{first}"),
            false => write!(text, "{comma}{first}-{last}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_has_what_any_of_its_containers_has() {
        for (lists, all) in [
            (&["0-3", "2,7", "5"][..], "0-3,5,7"),
            (&["4-5", "6"], "4-6"),
            (&["1"], "1"),
            (&["65535,0-1"], "0-1,65535"),
            (&["0-1", ""], ""),
            (&[], ""),
            (&["3-1,x"], ""),
        ] {
            assert_eq!(union(lists.iter().copied()), all, "{lists:?}");
        }
    }
}
