//! One local APIC: its state, priorities, what it accepts and what it asks of its vCPU.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use mimus_arch::x86::irqchip::{LAPIC_LVTS, LVT_ERROR, LVT_LINT0, LVT_LINT1, LVT_MASKED};
use mimus_arch::x86::msr::{APIC_BASE_ADDRESS, APIC_BASE_BSP, APIC_BASE_ENABLE, APIC_BASE_X2APIC};
use mimus_core::accel::{CpuPin, VcpuHandle, VcpuIndex};
use mimus_core::clock::Timer;
use mimus_core::device::lock;

use super::message::Delivery;
use super::timer::Count;
use super::{LINT1, LapicCpu, TscClock};

/// Vectors below are exceptions'.
const FIRST_VECTOR: u8 = 16;
/// ESR: an IPI with an illegal vector was not sent.
pub(super) const SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: an interrupt with an illegal vector came.
pub(super) const RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: there is no register at an address.
pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
/// SVR: the APIC is enabled by software.
pub(super) const SVR_ENABLE: u32 = 1 << 8;
/// LVT: level-triggered.
const LVT_LEVEL: u32 = 1 << 15;
/// LVT: a level-triggered interrupt was accepted and not ended.
pub(super) const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_MODE: u32 = 7 << 8;
const LVT_EXTINT: u32 = 7 << 8;

/// Bits of IA32_APIC_BASE that software may set: the mode, an address of up to 52 bits; and BSP, which keeps its
/// value.
const BASE_BITS: u64 = 0x000f_ffff_ffff_f000 | APIC_BASE_BSP | APIC_BASE_X2APIC | APIC_BASE_ENABLE;

/// Whether the APIC is on, and how it is programmed (section 11.12.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Mode {
    Off,
    XApic,
    X2Apic,
}

/// What others need to know to find out whether a message is for this APIC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Published {
    pub mode: Mode,
    pub id: u32,
    pub ldr: u32,
    /// Bits 31:28 of the DFR.
    pub model: u32,
    /// Enabled by software.
    pub enabled: bool,
}

/// What the vCPU alone changes.
#[derive(Debug)]
pub(super) struct Regs {
    pub base: u64,
    pub id: u32,
    pub tpr: u8,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub isr: [u32; 8],
    pub esr: u32,
    pub errors: u32,
    pub icr: u64,
    pub lvt: [u32; LAPIC_LVTS],
    pub timer_initial: u32,
    pub timer_divide: u32,
    pub tsc_deadline: u64,
    pub count: Count,
}

/// One local APIC.
pub(super) struct Apic {
    pub vcpu: Arc<dyn VcpuHandle>,
    /// The id at power-on, and always in x2APIC mode.
    initial_id: u32,
    pub bootstrap: bool,
    pub timer: Timer,
    pub tsc: Option<Arc<dyn TscClock>>,
    /// Nothing is called under it but pins and timer.
    pub regs: Mutex<Regs>,
    pub irr: [AtomicU32; 8],
    pub tmr: [AtomicU32; 8],
    /// Levels of LINT0 and LINT1.
    lint: [AtomicBool; 2],
    /// Copies of registers that others look at: [`Published`], processor priority.
    id: AtomicU32,
    ldr: AtomicU32,
    flags: AtomicU32,
    ppr: AtomicU32,
}

impl Regs {
    pub fn reset(base: u64, id: u32) -> Self {
        let mut lvt = [LVT_MASKED; LAPIC_LVTS];
        if base & APIC_BASE_BSP != 0 {
            lvt[LVT_LINT0] = LVT_EXTINT;
        }
        Self {
            base,
            id,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt,
            timer_initial: 0,
            timer_divide: 0,
            tsc_deadline: 0,
            count: Count::Stopped,
        }
    }

    pub fn mode(&self) -> Mode {
        match (self.base & APIC_BASE_ENABLE != 0, self.base & APIC_BASE_X2APIC != 0) {
            (false, _) => Mode::Off,
            (true, false) => Mode::XApic,
            (true, true) => Mode::X2Apic,
        }
    }

    /// Section 11.12.10.2: in x2APIC mode it follows from the id.
    pub fn logical_id(&self) -> u32 {
        if self.mode() == Mode::X2Apic { self.id >> 4 << 16 | 1 << (self.id & 0xf) } else { self.ldr }
    }

    /// Section 11.8.3.1: processor priority.
    pub fn ppr(&self) -> u8 {
        let served = highest(&self.isr).unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= served { self.tpr } else { served }
    }

    fn unmasked(&self, entry: usize) -> bool {
        self.lvt[entry] & LVT_MASKED == 0
    }
}

impl Apic {
    pub fn new(index: u32, cpu: LapicCpu, tsc: Option<Arc<dyn TscClock>>) -> Arc<Self> {
        let bootstrap = index == 0;
        let words = || std::array::from_fn(|_| AtomicU32::new(0));
        let apic = Arc::new(Self {
            vcpu: cpu.vcpu,
            initial_id: cpu.id,
            bootstrap,
            timer: cpu.timer,
            tsc,
            regs: Mutex::new(Regs::reset(reset_base(bootstrap), cpu.id)),
            irr: words(),
            tmr: words(),
            lint: Default::default(),
            id: AtomicU32::new(0),
            ldr: AtomicU32::new(0),
            flags: AtomicU32::new(0),
            ppr: AtomicU32::new(0),
        });
        apic.publish(&lock(&apic.regs));
        let weak = Arc::downgrade(&apic);
        apic.timer.bind(move || {
            if let Some(apic) = weak.upgrade() {
                apic.timer_fired();
            }
        });
        apic
    }

    pub fn index(&self) -> VcpuIndex {
        self.vcpu.index()
    }

    /// Changes registers and has all that follows from it happen.
    pub fn change<R>(&self, f: impl FnOnce(&mut Regs) -> R) -> R {
        let mut regs = lock(&self.regs);
        let result = f(&mut regs);
        self.update(&regs);
        result
    }

    /// After a change of registers: what others see, and the INTR pin.
    pub fn update(&self, regs: &Regs) {
        self.publish(regs);
        let wanted = self.wants_intr(regs);
        self.vcpu.set_pin(CpuPin::Intr, wanted);
        // Whoever set an IRR bit before it saw the new priority did not raise the pin, or raised it before it was
        // lowered here.
        if !wanted && self.wants_intr(regs) {
            self.vcpu.set_pin(CpuPin::Intr, true);
        }
    }

    fn publish(&self, regs: &Regs) {
        let enabled = u32::from(regs.svr & SVR_ENABLE != 0);
        self.id.store(regs.id, SeqCst);
        self.ldr.store(regs.logical_id(), SeqCst);
        self.flags.store(regs.mode() as u32 | enabled << 2 | regs.dfr >> 28 << 4, SeqCst);
        self.ppr.store(regs.ppr().into(), SeqCst);
    }

    pub fn published(&self) -> Published {
        let flags = self.flags.load(SeqCst);
        let mode = match flags & 3 {
            0 => Mode::Off,
            1 => Mode::XApic,
            _ => Mode::X2Apic,
        };
        let (id, ldr) = (self.id.load(SeqCst), self.ldr.load(SeqCst));
        Published { mode, id, ldr, model: flags >> 4, enabled: flags & 4 != 0 }
    }

    /// Processor priority, as others see it.
    pub fn priority(&self) -> u32 {
        self.ppr.load(SeqCst)
    }

    /// The requested vector that may interrupt now.
    fn deliverable(&self, regs: &Regs) -> Option<u8> {
        let vector = highest(&snapshot(&self.irr))?;
        (regs.mode() != Mode::Off && vector & 0xf0 > regs.ppr() & 0xf0).then_some(vector)
    }

    fn wants_intr(&self, regs: &Regs) -> bool {
        self.deliverable(regs).is_some() || self.passes_pic(regs)
    }

    /// LINT0 is asserted and is the PIC's INT (section 11.4.3: with the APIC off it is INTR).
    fn passes_pic(&self, regs: &Regs) -> bool {
        let extint = regs.unmasked(LVT_LINT0) && regs.lvt[LVT_LINT0] & LVT_MODE == LVT_EXTINT;
        self.lint[0].load(SeqCst) && (regs.mode() == Mode::Off || extint)
    }

    pub fn wants_pic(&self) -> bool {
        self.passes_pic(&lock(&self.regs))
    }

    /// The vector goes from requested to in service.
    pub fn acknowledge(&self) -> Option<u8> {
        self.change(|regs| {
            let vector = self.deliverable(regs)?;
            let (word, bit) = place(vector);
            self.irr[word].fetch_and(!bit, SeqCst);
            regs.isr[word] |= bit;
            Some(vector)
        })
    }

    /// Section 11.8.5: the highest interrupt in service is over. If it was level-triggered, its vector, whose end
    /// is to be broadcast.
    pub fn end_of_interrupt(&self, regs: &mut Regs) -> Option<u8> {
        let vector = highest(&regs.isr)?;
        let (word, bit) = place(vector);
        regs.isr[word] &= !bit;
        if self.tmr[word].load(SeqCst) & bit == 0 {
            return None;
        }
        for (input, entry) in [LVT_LINT0, LVT_LINT1].into_iter().enumerate() {
            if regs.lvt[entry] & LVT_REMOTE_IRR != 0 && regs.lvt[entry] as u8 == vector {
                regs.lvt[entry] &= !LVT_REMOTE_IRR;
                self.service_lint(regs, input);
            }
        }
        Some(vector)
    }

    /// Requests a vector, from any thread. False if the APIC is disabled.
    pub fn accept(&self, vector: u8, level: bool) -> bool {
        let p = self.published();
        if p.mode == Mode::Off || !p.enabled {
            return false;
        }
        if vector < FIRST_VECTOR {
            self.change(|regs| self.report(regs, RECEIVE_ILLEGAL));
        } else {
            self.request(vector, level);
        }
        true
    }

    /// Sets the IRR bit and, if it may interrupt, the pin. No lock: see [`Apic::update`].
    fn request(&self, vector: u8, level: bool) {
        let (word, bit) = place(vector);
        if level {
            self.tmr[word].fetch_or(bit, SeqCst);
        } else {
            self.tmr[word].fetch_and(!bit, SeqCst);
        }
        self.irr[word].fetch_or(bit, SeqCst);
        if u32::from(vector & 0xf0) > self.priority() & 0xf0 {
            self.vcpu.set_pin(CpuPin::Intr, true);
        }
    }

    /// Section 11.5.3: an error, which the error entry of the LVT reports.
    pub fn report(&self, regs: &mut Regs, error: u32) {
        if regs.errors & error != 0 {
            return;
        }
        regs.errors |= error;
        let vector = regs.lvt[LVT_ERROR] as u8;
        if !regs.unmasked(LVT_ERROR) {
        } else if vector < FIRST_VECTOR {
            regs.errors |= RECEIVE_ILLEGAL;
        } else {
            self.request(vector, false);
        }
    }

    /// A local interrupt; true if it is INIT, which the caller performs with no lock held.
    pub fn fire_lvt(&self, regs: &mut Regs, entry: usize) -> bool {
        let value = regs.lvt[entry];
        if !regs.unmasked(entry) {
            return false;
        }
        match Delivery::from_bits(value) {
            Some(Delivery::Fixed) if (value as u8) < FIRST_VECTOR => self.report(regs, RECEIVE_ILLEGAL),
            Some(Delivery::Fixed) => self.request(value as u8, false),
            Some(Delivery::Nmi) => self.pulse(CpuPin::Nmi),
            Some(Delivery::Smi) => self.pulse(CpuPin::Smi),
            Some(Delivery::Init) => return true,
            // ExtINT is a level; the others are reserved.
            _ => {}
        }
        false
    }

    /// An edge-triggered input of the vCPU.
    pub fn pulse(&self, pin: CpuPin) {
        self.vcpu.set_pin(pin, true);
        self.vcpu.set_pin(pin, false);
    }

    /// LINT0 or LINT1 changed; true if that is an INIT.
    pub fn set_lint(&self, pin: u32, level: bool) -> bool {
        let input = usize::from(pin == LINT1);
        let rose = level && !self.lint[input].swap(level, SeqCst);
        self.lint[input].store(level, SeqCst);
        self.change(|regs| {
            if regs.mode() == Mode::Off {
                if rose && pin == LINT1 {
                    self.pulse(CpuPin::Nmi);
                }
                return false;
            }
            let entry = LVT_LINT0 + input;
            if is_level(regs.lvt[entry]) {
                self.service_lint(regs, input);
                return false;
            }
            rose && self.fire_lvt(regs, entry)
        })
    }

    /// Requests the interrupt of a level-triggered LINT input that is asserted and not being served.
    pub fn service_lint(&self, regs: &mut Regs, input: usize) {
        let entry = LVT_LINT0 + input;
        let value = regs.lvt[entry];
        let waits = value & (LVT_MASKED | LVT_REMOTE_IRR) == 0 && is_level(value);
        if !waits || !self.lint[input].load(SeqCst) {
            return;
        }
        if (value as u8) < FIRST_VECTOR {
            return self.report(regs, RECEIVE_ILLEGAL);
        }
        regs.lvt[entry] |= LVT_REMOTE_IRR;
        self.request(value as u8, true);
    }

    /// Writes IA32_APIC_BASE; `None` for what section 11.12.5 does not allow.
    pub fn set_base(&self, value: u64) -> Option<()> {
        let mut regs = lock(&self.regs);
        let value = value & !APIC_BASE_BSP | regs.base & APIC_BASE_BSP;
        let (on, x2) = (value & APIC_BASE_ENABLE != 0, value & APIC_BASE_X2APIC != 0);
        let possible = match regs.mode() {
            Mode::Off => !x2,
            Mode::XApic => on || !x2,
            Mode::X2Apic => on == x2,
        };
        if value & !BASE_BITS != 0 || !possible {
            return None;
        }
        if on && value & !0xfff != APIC_BASE_ADDRESS {
            log::debug!(target: "guest_errors", "local APIC: its registers stay at {APIC_BASE_ADDRESS:#x}");
        }
        if !on {
            // Section 11.4.3: enabled again, it is as after power-on, but for the bootstrap processor's LINT0.
            self.clear(&mut regs, value);
            regs.lvt[LVT_LINT0] = LVT_MASKED;
        }
        regs.base = value;
        if regs.mode() == Mode::X2Apic {
            // Section 11.12.5.1: the id is the initial one again, and the ICR's upper half is cleared.
            (regs.id, regs.icr) = (self.initial_id, regs.icr & 0xffff_ffff);
        }
        self.update(&regs);
        Some(())
    }

    fn clear(&self, regs: &mut Regs, base: u64) {
        *regs = Regs::reset(base, self.initial_id);
        self.irr.iter().chain(&self.tmr).for_each(|w| w.store(0, SeqCst));
        self.timer.disarm();
    }

    /// RESET. Calls nothing.
    pub fn power_on_reset(&self) {
        let mut regs = lock(&self.regs);
        self.clear(&mut regs, reset_base(self.bootstrap));
        self.publish(&regs);
    }

    /// INIT (section 11.4.7.3): all but the id and IA32_APIC_BASE.
    pub fn init_reset(&self) {
        self.change(|regs| {
            let base = regs.base;
            self.clear(regs, base);
        });
    }

    pub fn initial_id(&self) -> u32 {
        self.initial_id
    }
}

fn reset_base(bootstrap: bool) -> u64 {
    APIC_BASE_ADDRESS | APIC_BASE_ENABLE | if bootstrap { APIC_BASE_BSP } else { 0 }
}

/// Only fixed interrupts can be level-triggered (section 11.5.1, "Trigger Mode").
pub(super) fn is_level(lvt: u32) -> bool {
    lvt & LVT_LEVEL != 0 && lvt & LVT_MODE == 0
}

/// Word and bit of a vector.
fn place(vector: u8) -> (usize, u32) {
    (usize::from(vector / 32), 1 << (vector % 32))
}

/// The highest vector in a set.
fn highest(words: &[u32; 8]) -> Option<u8> {
    let (n, word) = words.iter().enumerate().rev().find(|(_, w)| **w != 0)?;
    Some((n * 32) as u8 + 31 - word.leading_zeros() as u8)
}

pub(super) fn snapshot(words: &[AtomicU32; 8]) -> [u32; 8] {
    std::array::from_fn(|n| words[n].load(SeqCst))
}
