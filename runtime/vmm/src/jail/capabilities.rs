//! The capabilities of a VMM.

use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{JailError, failed};

/// What serving the files of volumes takes, whose owners and modes the guest's kernel has seen
/// to: see `devices::virtio::fs::credentials`. Nothing else here needs any.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// Gives up all others, for this process and whatever it might execute.
pub fn drop_all_but_needed() -> Result<(), JailError> {
    rustix::thread::clear_ambient_capability_set().map_err(failed("clear the ambient capabilities"))?;
    let sets = rustix::thread::capabilities(None).map_err(failed("read its capabilities"))?;
    // The bounding set first: changing it takes a capability that is given up next.
    for capability in (sets.permitted - NEEDED).iter() {
        rustix::thread::remove_capability_from_bounding_set(capability).map_err(failed("bound its capabilities"))?;
    }
    let kept = sets.permitted & NEEDED;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(failed("give up capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))
}
