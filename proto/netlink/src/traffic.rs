//! Traffic that goes from one interface to another, past the network stack between them.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterMatchAll, TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};

use crate::link::Link;
use crate::{Netlink, Result};

/// Every protocol (`ETH_P_ALL`), as it is on the wire.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();
/// The filter's place among those of its interface.
const PRIORITY: u32 = 1;

impl Netlink {
    /// Sends everything that arrives at `from` out of `to`.
    ///
    /// # Errors
    /// If the kernel refuses: it lacks `sch_ingress`, `cls_matchall` or `act_mirred`, or
    /// `from` has an ingress queue already.
    pub fn redirect(&mut self, from: &Link, to: &Link) -> Result<()> {
        let mut queue = of(from);
        queue.header.parent = TcHandle::INGRESS;
        queue.header.handle = TcHandle { major: u16::MAX, minor: 0 };
        queue.attributes.push(TcAttribute::Kind("ingress".into()));
        let action = format!("add an ingress queue to {} (is the kernel module sch_ingress there?)", from.name);
        self.request(&action, RouteNetlinkMessage::NewQueueDiscipline(queue), NLM_F_CREATE | NLM_F_EXCL)?;

        let mut filter = of(from);
        filter.header.parent = TcHandle { major: u16::MAX, minor: 0 };
        filter.header.info = PRIORITY << 16 | u32::from(ALL_PROTOCOLS);
        filter.attributes.push(TcAttribute::Kind(TcFilterMatchAll::KIND.into()));
        let options = vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![out_of(to)]))];
        filter.attributes.push(TcAttribute::Options(options));
        let action = format!(
            "redirect {} to {} (are the kernel modules cls_matchall and act_mirred there?)",
            from.name, to.name
        );
        self.request(&action, RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE | NLM_F_EXCL)
    }
}

fn of(link: &Link) -> TcMessage {
    // Numbers of interfaces are positive in the kernel, too.
    TcMessage::with_index(i32::try_from(link.index).unwrap_or(0))
}

/// The action: out of that interface, and nothing else happens to the packet.
fn out_of(link: &Link) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = link.index;
    mirror.generic.action = TcActionType::Stolen;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}
