//! Message-signalled interrupts: a write of `data` to `address` by a device.

use super::controller::IrqController;
use crate::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult, Requester};
use crate::memory::AddressSpace;
use std::fmt;
use std::sync::Arc;

/// Where messages of a bus go.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult;
}

/// Messages handed straight to a controller.
struct ToController(Arc<dyn IrqController>);

impl MsiSink for ToController {
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        self.0.msi(address, data, requester)
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
