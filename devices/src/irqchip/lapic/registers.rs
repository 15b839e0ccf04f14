//! The register map: memory-mapped (table 11-1) and as MSRs (table 11-6).

use mimus_arch::x86::irqchip::{LVT_ERROR, LVT_LINT0, LVT_LINT1, LVT_MASKED, LVT_TIMER};
use mimus_arch::x86::msr;
use mimus_core::device::lock;

use super::apic::{Apic, ILLEGAL_REGISTER, LVT_REMOTE_IRR, Mode, Regs, SEND_ILLEGAL, SVR_ENABLE, is_level, snapshot};
use super::ipi::Effect;
use super::message::{Delivery, Destination, Message};

/// Register numbers: offset / 16, MSR - 0x800.
mod reg {
    pub const ID: u8 = 0x02;
    pub const VERSION: u8 = 0x03;
    pub const TPR: u8 = 0x08;
    pub const APR: u8 = 0x09;
    pub const PPR: u8 = 0x0a;
    pub const EOI: u8 = 0x0b;
    pub const RRD: u8 = 0x0c;
    pub const LDR: u8 = 0x0d;
    pub const DFR: u8 = 0x0e;
    pub const SVR: u8 = 0x0f;
    pub const ISR: u8 = 0x10;
    pub const TMR: u8 = 0x18;
    pub const IRR: u8 = 0x20;
    pub const IRR_END: u8 = 0x28;
    pub const ESR: u8 = 0x28;
    pub const ICR: u8 = 0x30;
    pub const ICR_HIGH: u8 = 0x31;
    pub const LVT_FIRST: u8 = 0x32;
    pub const LVT_LAST: u8 = 0x37;
    pub const INITIAL_COUNT: u8 = 0x38;
    pub const CURRENT_COUNT: u8 = 0x39;
    pub const DIVIDE: u8 = 0x3e;
    pub const SELF_IPI: u8 = 0x3f;
}

/// An integrated APIC with six LVT entries.
const VERSION: u32 = 0x0005_0014;
const SVR_BITS: u32 = 0xff | SVR_ENABLE;
/// Vector, delivery mode, destination mode, level, trigger, shorthand.
const ICR_BITS: u32 = 0x000c_cfff;
const DIVIDE_BITS: u32 = 0xb;
const DFR_FIXED: u32 = 0x0fff_ffff;
const LDR_BITS: u32 = 0xff00_0000;

impl Apic {
    /// Index in the LVT of a register, and the bits that can be written there.
    fn lvt_entry(&self, register: u8) -> (usize, u32) {
        let entry = usize::from(register - reg::LVT_FIRST) + LVT_TIMER;
        let bits = match entry {
            LVT_TIMER => self.timer_entry_bits(),
            // Polarity and trigger mode too.
            LVT_LINT0 | LVT_LINT1 => LVT_MASKED | 0xa7ff,
            LVT_ERROR => LVT_MASKED | 0xff,
            _ => LVT_MASKED | 0x7ff,
        };
        (entry, bits)
    }

    /// What both forms have; `None` for what is write-only, different or not there.
    fn read(&self, regs: &mut Regs, register: u8) -> Option<u32> {
        Some(match register {
            reg::VERSION => VERSION,
            reg::TPR => regs.tpr.into(),
            reg::PPR => regs.ppr().into(),
            reg::LDR => regs.logical_id(),
            reg::SVR => regs.svr,
            reg::ISR..reg::TMR => regs.isr[usize::from(register - reg::ISR)],
            reg::TMR..reg::IRR => snapshot(&self.tmr)[usize::from(register - reg::TMR)],
            reg::IRR..reg::IRR_END => snapshot(&self.irr)[usize::from(register - reg::IRR)],
            reg::ESR => regs.esr,
            reg::LVT_FIRST..=reg::LVT_LAST => regs.lvt[self.lvt_entry(register).0],
            reg::INITIAL_COUNT => regs.timer_initial,
            reg::CURRENT_COUNT => {
                self.catch_up(regs);
                regs.current_count(self.timer.now())
            }
            reg::DIVIDE => regs.timer_divide,
            _ => return None,
        })
    }

    /// Bits of a register that can be written in both forms; `None` if it is read-only or not there.
    fn writable(&self, register: u8) -> Option<u32> {
        Some(match register {
            reg::TPR => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => SVR_BITS,
            reg::LVT_FIRST..=reg::LVT_LAST => self.lvt_entry(register).1,
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => DIVIDE_BITS,
            _ => return None,
        })
    }

    /// Writes a register that [`Apic::writable`] has, with nothing but those bits.
    fn write(&self, regs: &mut Regs, register: u8, value: u32) -> Effect {
        match register {
            reg::TPR => regs.tpr = value as u8,
            reg::EOI => return self.end_of_interrupt(regs).map_or(Effect::Nothing, Effect::EndOfInterrupt),
            reg::SVR => self.set_spurious(regs, value),
            // Section 11.5.3: a write shows what happened since the last.
            reg::ESR => regs.esr = std::mem::take(&mut regs.errors),
            reg::LVT_FIRST..=reg::LVT_LAST => self.set_lvt(regs, self.lvt_entry(register).0, value),
            reg::INITIAL_COUNT => self.set_initial_count(regs, value),
            reg::DIVIDE => self.set_divide(regs, value),
            _ => {}
        }
        Effect::Nothing
    }

    /// Section 11.4.7.2: disabled, all LVT entries are masked and stay so.
    fn set_spurious(&self, regs: &mut Regs, value: u32) {
        let disabled = regs.svr & !value & SVR_ENABLE != 0;
        regs.svr = value;
        if disabled {
            self.set_timer_entry(regs, regs.lvt[LVT_TIMER] | LVT_MASKED);
            regs.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    fn set_lvt(&self, regs: &mut Regs, entry: usize, value: u32) {
        let masked = if regs.svr & SVR_ENABLE == 0 { LVT_MASKED } else { 0 };
        if entry == LVT_TIMER {
            return self.set_timer_entry(regs, value | masked);
        }
        let served = if is_level(value) { regs.lvt[entry] & LVT_REMOTE_IRR } else { 0 };
        regs.lvt[entry] = value | masked | served;
        if matches!(entry, LVT_LINT0 | LVT_LINT1) {
            self.service_lint(regs, entry - LVT_LINT0);
        }
    }

    /// The IPI that a write of the ICR's lower half or of SELF IPI sends.
    fn send(&self, regs: &mut Regs, message: Option<Message>) -> Effect {
        let Some(message) = message else { return Effect::Nothing };
        if message.delivery.has_vector() && message.vector < 16 {
            self.report(regs, SEND_ILLEGAL);
            return Effect::Nothing;
        }
        Effect::Send(message)
    }

    /// Reads a memory-mapped register; all ones where the APIC does not decode the page.
    pub fn read_xapic(&self, offset: u64) -> u32 {
        let Some(register) = register_at(offset) else { return 0 };
        let mut regs = lock(&self.regs);
        if regs.mode() != Mode::XApic {
            return u32::MAX;
        }
        let value = match register {
            reg::ID => regs.id << 24,
            reg::DFR => regs.dfr,
            reg::ICR => regs.icr as u32,
            reg::ICR_HIGH => (regs.icr >> 32) as u32,
            // Write-only, or of older APICs.
            reg::EOI | reg::APR | reg::RRD => 0,
            _ => match self.read(&mut regs, register) {
                Some(value) => value,
                None => {
                    self.report(&mut regs, ILLEGAL_REGISTER);
                    0
                }
            },
        };
        self.update(&regs);
        value
    }

    /// Writes a memory-mapped register. Reserved bits are ignored.
    pub fn write_xapic(&self, offset: u64, value: u32) -> Effect {
        let Some(register) = register_at(offset) else { return Effect::Nothing };
        self.change(|regs| {
            if regs.mode() != Mode::XApic {
                return Effect::Nothing;
            }
            match register {
                reg::LDR => regs.ldr = value & LDR_BITS,
                reg::DFR => regs.dfr = value | DFR_FIXED,
                reg::ICR_HIGH => regs.icr = regs.icr & 0xffff_ffff | u64::from(value & LDR_BITS) << 32,
                reg::ICR => {
                    let low = value & ICR_BITS;
                    regs.icr = regs.icr & !0xffff_ffff | u64::from(low);
                    let destination = (regs.icr >> 56) as u32;
                    return self.send(regs, Message::from_icr(low, destination, false));
                }
                _ => match self.writable(register) {
                    Some(bits) => return self.write(regs, register, value & bits),
                    None if is_read_only(register) => {}
                    None => self.report(regs, ILLEGAL_REGISTER),
                },
            }
            Effect::Nothing
        })
    }

    /// Reads an x2APIC MSR; `None` is `#GP`.
    pub fn read_x2apic(&self, index: u32) -> Option<u64> {
        let register = u8::try_from(index - msr::X2APIC_FIRST).ok()?;
        let mut regs = lock(&self.regs);
        if regs.mode() != Mode::X2Apic {
            return None;
        }
        let value = match register {
            reg::ID => Some(regs.id.into()),
            reg::ICR => Some(regs.icr),
            _ => self.read(&mut regs, register).map(u64::from),
        };
        self.update(&regs);
        value
    }

    /// Writes an x2APIC MSR; `None` is `#GP`: reserved bits too.
    pub fn write_x2apic(&self, index: u32, value: u64) -> Option<Effect> {
        let register = u8::try_from(index - msr::X2APIC_FIRST).ok()?;
        self.change(|regs| {
            if regs.mode() != Mode::X2Apic {
                return None;
            }
            let (low, high) = (value as u32, (value >> 32) as u32);
            match register {
                reg::ICR if low & !ICR_BITS == 0 => {
                    regs.icr = value;
                    Some(self.send(regs, Message::from_icr(low, high, true)))
                }
                reg::SELF_IPI if value <= 0xff => Some(self.send(regs, Some(self_ipi(low as u8)))),
                _ => {
                    let bits = self.writable(register)?;
                    (high == 0 && low & !(bits | read_only(register)) == 0)
                        .then(|| self.write(regs, register, low & bits))
                }
            }
        })
    }
}

/// Bits that may be written but do not change: an LVT entry's delivery status and remote IRR (figure 11-8).
fn read_only(register: u8) -> u32 {
    match register {
        reg::LVT_FIRST..=reg::LVT_LAST => 1 << 12 | LVT_REMOTE_IRR,
        _ => 0,
    }
}

fn self_ipi(vector: u8) -> Message {
    Message { destination: Destination::Sender, delivery: Delivery::Fixed, vector, level: false }
}

/// The register at an offset: the first four bytes of each sixteen (section 11.4.1).
fn register_at(offset: u64) -> Option<u8> {
    (offset & 0xf == 0 && offset < super::SIZE).then_some((offset >> 4) as u8)
}

fn is_read_only(register: u8) -> bool {
    matches!(
        register,
        reg::ID | reg::VERSION | reg::APR | reg::PPR | reg::RRD | reg::ISR..reg::IRR_END | reg::CURRENT_COUNT
    )
}
