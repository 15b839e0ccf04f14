//! Delivery of messages, and what a write of a register has others do.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use mimus_core::accel::{CpuPin, VcpuIndex};

use super::Lapics;
use super::apic::Apic;
use super::message::{Delivery, Message};

/// What is left to do after a register was written, with no lock held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    Send(Message),
    /// The end of a level-triggered interrupt.
    EndOfInterrupt(u8),
}

impl Lapics {
    pub(super) fn perform(&self, sender: &Arc<Apic>, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Send(message) => {
                self.deliver(&message, Some(sender));
            }
            Effect::EndOfInterrupt(vector) => (self.links.end_of_interrupt)(vector),
        }
    }

    /// Delivers a message, of the APIC `sender` if it is an IPI. False if nobody accepts it.
    pub(super) fn deliver(&self, message: &Message, sender: Option<&Arc<Apic>>) -> bool {
        let is_for = |apic: &&Arc<Apic>| {
            let own = sender.is_some_and(|s| Arc::ptr_eq(s, apic));
            message.is_for(&apic.published(), own)
        };
        if message.delivery == Delivery::LowestPriority {
            return self.deliver_to_lowest(message, is_for);
        }
        let mut accepted = false;
        for apic in self.apics.iter().filter(is_for) {
            accepted |= self.deliver_to(message, apic);
        }
        accepted
    }

    /// Section 11.6.2.4: to the one with the lowest processor priority; in turn among equals.
    fn deliver_to_lowest(&self, message: &Message, is_for: impl Fn(&&Arc<Apic>) -> bool) -> bool {
        let count = self.apics.len();
        let first = self.turn.fetch_add(1, Relaxed) as usize % count.max(1);
        let in_turn = (0..count).map(|n| &self.apics[(first + n) % count]);
        let able = in_turn.filter(|a| is_for(a) && a.published().enabled);
        let taker = able.min_by_key(|a| a.priority() >> 4);
        taker.is_some_and(|apic| apic.accept(message.vector, message.level))
    }

    fn deliver_to(&self, message: &Message, apic: &Arc<Apic>) -> bool {
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => return apic.accept(message.vector, message.level),
            Delivery::Nmi => apic.pulse(CpuPin::Nmi),
            Delivery::Smi => apic.pulse(CpuPin::Smi),
            Delivery::Init => self.init(apic),
            // The bootstrap processor never waits for one.
            Delivery::StartUp if apic.bootstrap => {}
            Delivery::StartUp => self.links.processors.start_up(apic.index(), message.vector),
        }
        true
    }

    pub(super) fn init(&self, apic: &Arc<Apic>) {
        if self.links.processors.stop(apic.index()) {
            apic.init_reset();
            self.links.processors.init(apic.index());
        }
    }

    /// The vCPU takes an INIT that was held.
    pub fn take_init(&self, vcpu: VcpuIndex) {
        if let Some(apic) = self.apic(vcpu) {
            self.init(apic);
        }
    }
}
