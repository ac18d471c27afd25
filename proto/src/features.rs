//! Names for what an agent knows beyond the first release, as `InfoResponse` tells them.
//!
//! Each field of `agent.v1` that restricts something or is relied upon, and each call, has one
//! from its first release on; a name never changes its meaning. The proto says what an agent does
//! that lacks it.

/// The call `SetClock`.
pub const CLOCK: &str = "clock";
/// `SignalRequest.exec_tree`, and that ForgetExec kills all that a running exec has started, and one that is being started.
pub const EXEC_TREE: &str = "exec_tree";
/// `CreateContainerRequest.image_volumes` and `image_volumes_writable`.
pub const IMAGE_VOLUMES: &str = "image_volumes";
/// `WaitResponse.oom_killed` is about the process, not about the container.
pub const OOM_OF_PROCESS: &str = "oom_of_process";
/// `ContainerInfo.starting` and `STATE_CREATING`.
pub const STARTING: &str = "starting";

/// What an agent of this release knows.
pub const ALL: [&str; 5] = [CLOCK, EXEC_TREE, IMAGE_VOLUMES, OOM_OF_PROCESS, STARTING];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The names of a definition, those of fields with their numbers, each with the comment that stands above it.
    fn names(proto: &str) -> Vec<(String, String)> {
        let (mut names, mut within, mut comment) = (Vec::new(), Vec::<&str>::new(), String::new());
        for line in proto.lines().map(str::trim) {
            if line.starts_with("//") {
                comment.push_str(line);
                continue;
            }
            let comment = std::mem::take(&mut comment);
            let line = line.split("//").next().unwrap_or_default().trim();
            let words: Vec<_> = line.split_whitespace().collect();
            let full = |within: &[&str], name: &str| {
                let within = within.iter().filter(|word| !word.is_empty());
                within.copied().chain([name]).collect::<Vec<_>>().join(".")
            };
            match words[..] {
                [kind @ ("message" | "enum" | "service" | "oneof"), name, ..] => {
                    // A choice is no part of its fields' names.
                    if kind != "oneof" {
                        names.push((full(&within, name), comment));
                    }
                    within.push(if kind == "oneof" { "" } else { name });
                    if line.ends_with('}') {
                        within.pop();
                    }
                }
                ["}", ..] => drop(within.pop()),
                ["rpc", call, ..] => names.push((full(&within, call.split('(').next().unwrap()), comment)),
                [.., name, "=", number] if !within.is_empty() => {
                    names.push((format!("{} = {}", full(&within, name), number.trim_end_matches(';')), comment));
                }
                _ => {}
            }
        }
        names
    }

    #[test]
    fn what_came_after_the_first_release_says_what_holds_without_it() {
        let first: HashSet<_> = include_str!("first_release.txt").lines().map(str::to_owned).collect();
        let today = names(include_str!("../proto/nacelle/agent/v1/agent.proto"));
        let there: HashSet<_> = today.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(first.difference(&there).collect::<Vec<_>>(), [""; 0], "an agent of the first release knows these");
        for (name, comment) in today {
            // What is part of something new is explained there.
            let of_old = name.rsplit_once('.').is_some_and(|(whole, _)| first.contains(whole));
            let explained = ["eature \"", "first release"].iter().any(|word| comment.contains(word));
            assert!(first.contains(&name) || !of_old || explained, "{name} does not name its feature: {comment}");
        }
    }

    #[test]
    fn every_feature_is_explained_where_it_is_used() {
        let proto = include_str!("../proto/nacelle/agent/v1/agent.proto");
        for name in ALL {
            assert!(proto.contains(&format!("\"{name}\"")), "{name}");
        }
    }
}
