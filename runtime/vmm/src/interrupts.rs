//! The routes from interrupt numbers (GSI) to the messages (MSI) that KVM delivers.
//!
//! There are no interrupt controllers but the processors' local ones, hence no pins: a
//! guest spends hundreds of accesses on finding out that nothing is behind those.
//!
//! KVM takes the table as a whole and waits for its processors each time, which costs far
//! more than an interrupt. So callers route a number when its first interrupt is due, not
//! when the guest writes the message.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

/// KVM's limit for the numbers.
const LIMIT: u32 = 4096;

/// A message-signalled interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where the message is written: which processor, how.
    pub address: u64,
    /// What is written: the vector.
    pub data: u32,
}

/// An interrupt that cannot be delivered.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No eventfd.
    #[error("cannot create an event descriptor for an interrupt")]
    Event(#[source] std::io::Error),
    /// All numbers are taken.
    #[error("all {LIMIT} interrupt numbers are in use")]
    Exhausted,
    /// KVM refused.
    #[error("cannot {what} interrupt {gsi} in KVM")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// The interrupt's number.
        gsi: u32,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// The routing table of one virtual machine.
pub struct Routes {
    vm: Arc<VmFd>,
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

/// An interrupt with a number of its own, raised by writing to its event descriptor.
pub struct Line {
    routes: Arc<Routes>,
    event: EventFd,
    gsi: u32,
    message: Option<Message>,
}

impl Routes {
    /// The table of `vm`, which has its interrupt controllers already.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: Mutex::new(BTreeMap::new()) }
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    fn route(&self, gsi: u32, message: Message) -> Result<(), RouteError> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let before = messages.insert(gsi, Some(message));
        let result = self.set(gsi, &messages);
        if result.is_err() {
            // KVM has the table of before. What it refused must not make it refuse the others' changes, too.
            match before {
                Some(before) => messages.insert(gsi, before),
                None => messages.remove(&gsi),
            };
        }
        result
    }

    /// Has KVM take the whole table, for a change to `gsi`.
    fn set(&self, gsi: u32, messages: &BTreeMap<u32, Option<Message>>) -> Result<(), RouteError> {
        let entries: Vec<_> =
            messages.iter().filter_map(|(gsi, message)| message.map(|message| entry(*gsi, message))).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| RouteError::Exhausted)?;
        self.vm.set_gsi_routing(&table).map_err(|source| RouteError::Kvm { what: "route", gsi, source })
    }
}

impl Line {
    /// A new interrupt; nothing is delivered before its first [`Line::raise`].
    pub fn new(routes: Arc<Routes>) -> Result<Self, RouteError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(RouteError::Event)?;
        let mut messages = routes.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = (0..LIMIT).find(|gsi| !messages.contains_key(gsi)).ok_or(RouteError::Exhausted)?;
        messages.insert(gsi, None);
        drop(messages);
        let line = Self { event, gsi, message: None, routes };
        line.routes.vm.register_irqfd(&line.event, gsi).map_err(|source| RouteError::Kvm {
            what: "connect",
            gsi,
            source,
        })?;
        Ok(line)
    }

    /// Delivers `message`, routing the line to it first where it differs from the last.
    pub fn raise(&mut self, message: Message) -> Result<(), RouteError> {
        if self.message != Some(message) {
            self.routes.route(self.gsi, message)?;
            self.message = Some(message);
        }
        // The only failure is a counter at its limit: an interrupt is pending anyway.
        let _ = self.event.write(1);
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Fails only if it was never connected. The stale route is harmless and goes with
        // the next table.
        let _ = self.routes.vm.unregister_irqfd(&self.event, self.gsi);
        self.routes.messages.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.gsi);
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Arc<Routes> {
        Arc::new(Routes::new(Arc::new(crate::machine::create_vm().unwrap().1)))
    }

    #[test]
    fn numbers_are_distinct_and_come_back() {
        let routes = routes();
        let first = Line::new(Arc::clone(&routes)).unwrap();
        let second = Line::new(Arc::clone(&routes)).unwrap();
        assert_eq!((first.gsi, second.gsi), (0, 1));
        drop(first);
        assert_eq!(Line::new(routes).unwrap().gsi, 0);
    }

    #[test]
    fn what_kvm_refuses_once_is_not_asked_for_with_others() {
        let routes = routes();
        let mut line = Line::new(Arc::clone(&routes)).unwrap();
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        line.raise(message).unwrap();
        // No number of an interrupt.
        assert!(matches!(routes.route(LIMIT, message), Err(RouteError::Kvm { gsi: LIMIT, .. })));
        assert_eq!(*routes.messages.lock().unwrap(), BTreeMap::from([(0, Some(message))]));
        line.raise(Message { address: 0xfee0_0000, data: 0x42 }).unwrap();
        Line::new(routes).unwrap().raise(message).unwrap();
    }

    #[test]
    fn kvm_accepts_routes_and_changes_of_them() {
        let mut line = Line::new(routes()).unwrap();
        line.raise(Message { address: 0xfee0_0000, data: 0x41 }).unwrap();
        line.raise(Message { address: 0xfee0_0000, data: 0x42 }).unwrap();
        assert_eq!(line.message, Some(Message { address: 0xfee0_0000, data: 0x42 }));
    }
}
