//! The table that turns interrupt numbers (GSIs) into pins and messages.

use crate::error::errno;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use mimus_core::accel::AccelError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a message interrupt writes where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

impl Message {
    /// The upper half of the address as KVM wants it: bits 31:8 of the destination, which 15-bit destinations
    /// (`kvm-msi-ext-dest-id`) have in bits 11:5 of the lower half.
    pub fn halves(self) -> (u32, u32) {
        let (low, high) = (self.address as u32, (self.address >> 32) as u32);
        let extended = low >> 5 & 0x7f;
        if high == 0 && extended != 0 { (low & !0xfe0, extended << 8) } else { (low, high) }
    }
}

/// An interrupt number that stands for a pin of a chip in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinRoute {
    pub gsi: u32,
    pub chip: u32,
    pub pin: u32,
}

#[derive(Default)]
struct Table {
    pins: Vec<PinRoute>,
    messages: BTreeMap<u32, Message>,
}

/// The routing table of a VM. Its lock is a leaf.
pub struct Routing {
    vm: Arc<VmFd>,
    /// First number for messages; those below are pins, or reserved.
    first: u32,
    limit: u32,
    table: Mutex<Table>,
}

impl Routing {
    /// An empty table of at most `limit` numbers; messages get those from `first` on.
    pub fn new(vm: Arc<VmFd>, first: u32, limit: u32) -> Self {
        Self { vm, first, limit: limit.min(KVM_MAX_IRQ_ROUTES as u32), table: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, table: &Table) -> Result<(), AccelError> {
        let pin = |r: &PinRoute| {
            let mut e = kvm_irq_routing_entry { gsi: r.gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            e.u.irqchip.irqchip = r.chip;
            e.u.irqchip.pin = r.pin;
            e
        };
        let message = |(gsi, m): (&u32, &Message)| {
            let mut e = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let (low, high) = m.halves();
            e.u.msi.address_lo = low;
            e.u.msi.address_hi = high;
            e.u.msi.data = m.data;
            e
        };
        let entries: Vec<_> = table.pins.iter().map(pin).chain(table.messages.iter().map(message)).collect();
        let list = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| AccelError::Other(format!("kvm: more than {KVM_MAX_IRQ_ROUTES} interrupt routes")))?;
        self.vm.set_gsi_routing(&list).map_err(errno("set interrupt routes"))
    }

    /// Sets the pins.
    pub fn set_pins(&self, pins: Vec<PinRoute>) -> Result<(), AccelError> {
        let mut table = self.lock();
        table.pins = pins;
        self.commit(&table)
    }

    /// Gives number `gsi` a message.
    pub fn set_message(&self, gsi: u32, message: Message) -> Result<(), AccelError> {
        let mut table = self.lock();
        if table.messages.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.commit(&table)
    }

    /// A new number for a message.
    pub fn add_message(&self, message: Message) -> Result<u32, AccelError> {
        let mut table = self.lock();
        let free = (self.first..self.limit).find(|gsi| !table.messages.contains_key(gsi));
        let gsi =
            free.ok_or_else(|| AccelError::Other(format!("kvm: all {} interrupt numbers are used", self.limit)))?;
        table.messages.insert(gsi, message);
        self.commit(&table)?;
        Ok(gsi)
    }

    /// Number of messages that have a number of their own (those of an IOAPIC outside included).
    pub fn messages(&self) -> u64 {
        self.lock().messages.len() as u64
    }

    /// True if the number stands for a message.
    pub fn is_message(&self, gsi: u32) -> bool {
        self.lock().messages.contains_key(&gsi)
    }

    /// Gives a number back; false if it was not a message's.
    pub fn remove_message(&self, gsi: u32) -> Result<bool, AccelError> {
        let mut table = self.lock();
        if table.messages.remove(&gsi).is_none() {
            return Ok(false);
        }
        self.commit(&table)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let halves = |address| Message { address, data: 0 }.halves();
        assert_eq!(halves(0xfee0_1000), (0xfee0_1000, 0));
        // Destination 0x101: low byte in bits 19:12, the rest in bits 11:5.
        assert_eq!(halves(0xfee0_1020), (0xfee0_1000, 0x100));
        assert_eq!(halves(0x0000_0100_fee0_1000), (0xfee0_1000, 0x100));
    }
}
