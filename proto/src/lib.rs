//! The two protocols Nacelle speaks, generated once and used by both of their sides.
//!
//! * [`runtime::v1`]: the Container Runtime Interface, kubelet to daemon.
//! * [`agent::v1`]: daemon to guest agent, over vsock.
//! * [`cpu`]: processor shares in cgroup v2's words.
//! * [`features`]: what an agent may know beyond the first release.
//! * [`power`]: how the guest says that it powers off.
//! * [`stdio`]: the raw streams beside `agent.v1` that carry standard input and output.
//! * [`usage`]: what a control group uses, read into `agent.v1`'s words on both sides.

pub mod cpu;
pub mod features;
pub mod port_forward;
pub mod power;
pub mod stdio;
pub mod usage;

/// The Container Runtime Interface.
pub mod runtime {
    /// `runtime.v1` as published with cri-api 0.37.
    #[allow(missing_docs, unused_qualifications, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("runtime.v1");
    }
}

/// The guest agent's interface.
pub mod agent {
    /// `agent.v1`, see `proto/nacelle/agent/v1/agent.proto`.
    #[allow(missing_docs, unused_qualifications, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("nacelle.agent.v1");
    }
}
