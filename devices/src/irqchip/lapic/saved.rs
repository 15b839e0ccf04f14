//! Saving and restoring, in the form that a kernel-run chip saves too.

use std::sync::atomic::Ordering::SeqCst;

use mimus_arch::x86::irqchip::{LapicState, LapicsState};
use mimus_arch::x86::msr::APIC_BASE_BSP;
use mimus_core::accel::irqchip::LAPIC_SCHEMA;
use mimus_core::device::lock;
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};

use super::Lapics;
use super::apic::{Apic, Regs, snapshot};
use crate::virtio::device::decode_payload;

impl Apic {
    fn save(&self) -> LapicState {
        let mut regs = lock(&self.regs);
        // What has come due and was not told yet would be lost.
        self.catch_up(&mut regs);
        LapicState {
            apic_base: regs.base,
            id: regs.id,
            tpr: regs.tpr,
            ldr: regs.logical_id(),
            dfr: regs.dfr,
            svr: regs.svr,
            isr: regs.isr,
            tmr: snapshot(&self.tmr),
            irr: snapshot(&self.irr),
            esr: regs.esr,
            errors: regs.errors,
            icr: regs.icr,
            lvt: regs.lvt,
            timer_initial: regs.timer_initial,
            timer_current: regs.current_count(self.timer.now()),
            timer_divide: regs.timer_divide,
            tsc_deadline: regs.tsc_deadline,
        }
    }

    fn restore(&self, s: &LapicState) {
        let mut regs = lock(&self.regs);
        let bsp = regs.base & APIC_BASE_BSP;
        *regs = Regs {
            base: s.apic_base & !APIC_BASE_BSP | bsp,
            id: s.id,
            tpr: s.tpr,
            ldr: s.ldr,
            dfr: s.dfr,
            svr: s.svr,
            isr: s.isr,
            esr: s.esr,
            errors: s.errors,
            icr: s.icr,
            lvt: s.lvt,
            timer_initial: s.timer_initial,
            timer_divide: s.timer_divide,
            tsc_deadline: s.tsc_deadline,
            ..Regs::reset(0, 0)
        };
        regs.count = Apic::restored_count(&regs, s.timer_current);
        for (word, saved) in self.irr.iter().zip(s.irr).chain(self.tmr.iter().zip(s.tmr)) {
            word.store(saved, SeqCst);
        }
        self.timer.disarm();
        self.update(&regs);
    }

    fn check(&self, s: &LapicState) -> Result<(), (&'static str, String)> {
        s.check()?;
        if s.id != self.initial_id() && s.id > 0xff {
            return Err(("id", format!("{} instead of {}", s.id, self.initial_id())));
        }
        if s.tsc_deadline != 0 && self.tsc.is_none() {
            return Err(("tsc_deadline", "this machine has no TSC-deadline mode".to_owned()));
        }
        Ok(())
    }
}

impl Snapshot for Lapics {
    fn schema(&self) -> Schema {
        LAPIC_SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let apics = self.apics.iter().map(|apic| apic.save()).collect();
        Payload::encode(LAPIC_SCHEMA, &LapicsState { apics })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: LapicsState = decode_payload(LAPIC_SCHEMA, payload)?;
        let invalid = |(field, reason)| SnapshotError::invalid(LAPIC_SCHEMA, field, reason);
        if state.apics.len() != self.apics.len() {
            let reason = format!("{} instead of {}", state.apics.len(), self.apics.len());
            return Err(invalid(("apics", reason)));
        }
        let pairs = || self.apics.iter().zip(&state.apics);
        pairs().try_for_each(|(apic, s)| apic.check(s)).map_err(invalid)?;
        pairs().for_each(|(apic, s)| apic.restore(s));
        Ok(())
    }
}
