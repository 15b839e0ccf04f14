//! Message-signalled interrupts: a write of `data` to `address` by a device.

use super::controller::IrqController;
use crate::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult, Requester};
use crate::memory::AddressSpace;
use std::fmt;
use std::sync::Arc;

/// A message's own way to a controller, for messages that are sent often and changed seldom. Dropped, it is given
/// back. Leaf: calls nobody back.
pub trait MsiRoute: Send + Sync {
    /// [`MsiRoute::signal`] sends this message from now on; false, and nothing is connected, if it cannot.
    fn connect(&self, address: u64, data: u32) -> bool;
    /// What was signalled is delivered when this returns. Nothing is signalled any more.
    fn disconnect(&self);
    /// Sends the message, now or very soon. Only while connected.
    fn signal(&self);
}

/// Where messages of a bus go.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult;
    /// A way of its own for one message, if there are any.
    fn route(&self) -> Option<Arc<dyn MsiRoute>> {
        None
    }
}

/// Messages handed straight to a controller.
struct ToController(Arc<dyn IrqController>);

impl MsiSink for ToController {
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        self.0.msi(address, data, requester)
    }

    fn route(&self) -> Option<Arc<dyn MsiRoute>> {
        self.0.msi_route()
    }
}

/// Messages that are plain memory writes, decoded by a region (IMSIC, GIC ITS frames).
impl MsiSink for AddressSpace {
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        let attrs = MemTxAttrs { requester, ..MemTxAttrs::default() };
        // The sender holds its lock: map changes wait for whoever dispatched to it.
        self.write_uncommitted(GuestPhys(address), AccessSize::B4, data.into(), attrs)
    }
}

/// One device's way to send messages.
#[derive(Clone)]
pub struct MsiTarget {
    sink: Arc<dyn MsiSink>,
    requester: Requester,
}

impl MsiTarget {
    /// Messages as `requester` into `controller`.
    pub fn new(controller: Arc<dyn IrqController>, requester: Requester) -> Self {
        Self { sink: Arc::new(ToController(controller)), requester }
    }

    /// Messages as `requester` into `sink`.
    pub fn to_sink(sink: Arc<dyn MsiSink>, requester: Requester) -> Self {
        Self { sink, requester }
    }

    /// The same sink for another requester.
    pub fn for_requester(&self, requester: Requester) -> Self {
        Self { sink: self.sink.clone(), requester }
    }

    /// A way of its own for one message, if the controller has any.
    pub fn route(&self) -> Option<Arc<dyn MsiRoute>> {
        self.sink.route()
    }

    /// Sends a message. A message nothing takes is lost, as on the bus.
    pub fn send(&self, address: u64, data: u32) {
        let result = self.sink.deliver(address, data, self.requester);
        if !result.is_ok() {
            log::debug!("MSI {data:#x} to {address:#x} from {:?} is lost: {result:?}", self.requester);
        }
    }
}

impl fmt::Debug for MsiTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MsiTarget({:?})", self.requester)
    }
}
