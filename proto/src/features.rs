//! Names for what an agent knows beyond the first release, as `InfoResponse` tells them.
//!
//! Each field of `agent.v1` that restricts something or is relied upon, and each call, has one
//! from its first release on; a name never changes its meaning. The proto says what an agent does
//! that lacks it.

/// The call `SetClock`.
pub const CLOCK: &str = "clock";
/// `SignalRequest.exec_tree`, and that ForgetExec kills all that a running exec has started, and one that is being started.
pub const EXEC_TREE: &str = "exec_tree";
/// `WaitResponse.oom_killed` is about the process, not about the container.
pub const OOM_OF_PROCESS: &str = "oom_of_process";
/// `ContainerInfo.starting` and `STATE_CREATING`.
pub const STARTING: &str = "starting";

/// What an agent of this release knows.
pub const ALL: [&str; 4] = [CLOCK, EXEC_TREE, OOM_OF_PROCESS, STARTING];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_explained_where_it_is_used() {
        let proto = include_str!("../proto/nacelle/agent/v1/agent.proto");
        for name in ALL {
            assert!(proto.contains(&format!("\"{name}\"")), "{name}");
        }
    }
}
