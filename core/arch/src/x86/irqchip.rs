//! The saved states of the interrupt and timer chips of a PC, whoever runs them: a device model or the
//! kernel. The serialised form is the contract; times are of the machine's virtual clock.
//!
//! Spec: Intel 8259A data sheet; 82093AA (IOAPIC) data sheet; 8254 data sheet; SDM volume 3 chapter 11
//! (APIC).

use super::msr;
use serde::{Deserialize, Serialize};

/// What is impossible in a saved state: the field, and why.
pub type Invalid = (&'static str, String);

/// Schema names of the chips, all version 1.
pub const SCHEMA_PIC: &str = "i8259";
pub const SCHEMA_IOAPIC: &str = "ioapic";
pub const SCHEMA_PIT: &str = "i8254";
pub const SCHEMA_LAPIC: &str = "lapic";

/// Pins of an IOAPIC (82093AA).
pub const IOAPIC_PINS: usize = 24;

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicChipState {
    /// Levels of the inputs; of the master's cascade input always 0.
    pub lines: u8,
    /// Edges not acknowledged yet.
    pub edges: u8,
    pub imr: u8,
    pub isr: u8,
    pub elcr: u8,
    /// Vector of input 0.
    pub base: u8,
    /// Input with the lowest priority.
    pub lowest: u8,
    /// Which ICW the next write of port 1 is, 2 to 4; 0: it is OCW1.
    pub next_icw: u8,
    /// All ICWs were written.
    pub initialised: bool,
    pub icw4_follows: bool,
    pub single: bool,
    pub level_mode: bool,
    pub auto_eoi: bool,
    pub rotate_on_auto_eoi: bool,
    pub special_fully_nested: bool,
    pub special_mask: bool,
    pub read_isr: bool,
    pub poll: bool,
}

/// The pair of a PC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicState {
    /// Inputs 0 to 7.
    pub master: PicChipState,
    /// Inputs 8 to 15.
    pub slave: PicChipState,
}

/// Inputs that can be level-triggered: not the timer, keyboard, cascade, RTC and FPU.
pub const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

impl PicState {
    /// Both chips at power-on.
    pub fn reset() -> Self {
        let chip = PicChipState { lowest: 7, ..PicChipState::default() };
        Self { master: chip.clone(), slave: chip }
    }

    /// Checks what no pair could be in.
    pub fn check(&self) -> Result<(), Invalid> {
        for (chip, mask) in [(&self.master, ELCR_MASK[0]), (&self.slave, ELCR_MASK[1])] {
            if chip.lowest > 7 {
                return Err(("lowest", format!("no input {}", chip.lowest)));
            }
            if !matches!(chip.next_icw, 0 | 2..=4) {
                return Err(("next_icw", format!("no ICW{}", chip.next_icw)));
            }
            if chip.initialised && chip.next_icw != 0 {
                return Err(("initialised", "inside the initialisation sequence".to_owned()));
            }
            if chip.base & 7 != 0 || chip.elcr & !mask != 0 {
                return Err(("base, elcr", format!("{:#04x}, {:#04x}", chip.base, chip.elcr)));
            }
        }
        if (self.master.lines | self.master.edges) & 1 << 2 != 0 {
            return Err(("lines", "the cascade input is not a line".to_owned()));
        }
        Ok(())
    }
}

/// An IOAPIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// Its APIC id, 4 bits.
    pub id: u8,
    /// The index register (IOREGSEL).
    pub select: u8,
    /// Levels of the inputs.
    pub lines: u32,
    /// Edges of edge-triggered inputs that were not delivered yet.
    pub edges: u32,
    /// Redirection entries, [`IOAPIC_PINS`] of them; bit 12 (delivery status) is 0, bit 14
    /// (remote IRR) as it is.
    pub redirection: Vec<u64>,
}

/// Redirection entry: masked.
pub const REDIRECTION_MASKED: u64 = 1 << 16;
/// Redirection entry: level-triggered.
pub const REDIRECTION_LEVEL: u64 = 1 << 15;
/// Redirection entry: the level interrupt was delivered and not ended yet.
pub const REDIRECTION_REMOTE_IRR: u64 = 1 << 14;
/// Bits of a redirection entry that exist.
pub const REDIRECTION_BITS: u64 = 0xff00_0000_0001_ffff;

impl IoApicState {
    /// At power-on: all masked.
    pub fn reset() -> Self {
        Self { id: 0, select: 0, lines: 0, edges: 0, redirection: vec![REDIRECTION_MASKED; IOAPIC_PINS] }
    }

    /// Checks what no IOAPIC could be in.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.redirection.len() != IOAPIC_PINS {
            return Err(("redirection", format!("{} entries", self.redirection.len())));
        }
        if let Some(e) = self.redirection.iter().find(|e| **e & !REDIRECTION_BITS != 0) {
            return Err(("redirection", format!("{e:#x}")));
        }
        if self.id > 15 {
            return Err(("id", self.id.to_string()));
        }
        if (self.lines | self.edges) >> IOAPIC_PINS != 0 {
            return Err(("lines, edges", format!("{:#x}, {:#x}", self.lines, self.edges)));
        }
        Ok(())
    }
}

/// Number of local vector table entries saved.
pub const LAPIC_LVTS: usize = 7;

/// The local APIC of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LapicState {
    /// IA32_APIC_BASE: whether the APIC is on, and its mode. The same as in
    /// [`X86State`](super::X86State) if the kernel runs the chip.
    pub apic_base: u64,
    /// Its id: 8 bits in xAPIC mode, 32 in x2APIC mode.
    pub id: u32,
    /// Task priority.
    pub tpr: u8,
    /// Logical destination (register 0xd0).
    pub ldr: u32,
    /// Destination format (register 0xe0).
    pub dfr: u32,
    /// Spurious vector and software enable (register 0xf0).
    pub svr: u32,
    /// Vectors in service, 32 per word.
    pub isr: [u32; 8],
    /// Vectors whose last interrupt was level-triggered.
    pub tmr: [u32; 8],
    /// Vectors requested.
    pub irr: [u32; 8],
    /// Error status, as read.
    pub esr: u32,
    /// Errors since the register was written last; 0 from a kernel that does not tell.
    pub errors: u32,
    /// Interrupt command; the destination is in the upper half (xAPIC: bits 63:56).
    pub icr: u64,
    /// Local vector table: CMCI (0x2f0), timer (0x320), thermal (0x330), performance (0x340),
    /// LINT0 (0x350), LINT1 (0x360), error (0x370).
    pub lvt: [u32; LAPIC_LVTS],
    /// Initial count.
    pub timer_initial: u32,
    /// Count at the time of saving, 0 if the timer does not run (or is in TSC-deadline mode).
    pub timer_current: u32,
    /// Divide configuration (register 0x3e0).
    pub timer_divide: u32,
    /// IA32_TSC_DEADLINE, 0 if not armed.
    pub tsc_deadline: u64,
}

/// Indices in [`LapicState::lvt`].
pub const LVT_CMCI: usize = 0;
pub const LVT_TIMER: usize = 1;
pub const LVT_THERMAL: usize = 2;
pub const LVT_PERFORMANCE: usize = 3;
pub const LVT_LINT0: usize = 4;
pub const LVT_LINT1: usize = 5;
pub const LVT_ERROR: usize = 6;
/// Local vector table entry: masked.
pub const LVT_MASKED: u32 = 1 << 16;

impl LapicState {
    /// At power-on (SDM volume 3 section 11.4.7.1), of an application processor.
    pub fn reset(id: u32) -> Self {
        Self {
            apic_base: msr::APIC_BASE_ADDRESS | msr::APIC_BASE_ENABLE,
            id,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; LAPIC_LVTS],
            timer_initial: 0,
            timer_current: 0,
            timer_divide: 0,
            tsc_deadline: 0,
        }
    }

    /// Checks what no local APIC could be in.
    pub fn check(&self) -> Result<(), Invalid> {
        if self.timer_divide & !0xb != 0 {
            return Err(("timer_divide", format!("{:#x}", self.timer_divide)));
        }
        if self.timer_current > self.timer_initial {
            let (now, first) = (self.timer_current, self.timer_initial);
            return Err(("timer_current", format!("{now} of {first}")));
        }
        // Only an enabled APIC can be in x2APIC mode.
        if self.apic_base & (msr::APIC_BASE_ENABLE | msr::APIC_BASE_X2APIC) == msr::APIC_BASE_X2APIC {
            return Err(("apic_base", format!("{:#x}", self.apic_base)));
        }
        // Vectors 0 to 15 cannot be requested.
        for (field, words) in [("isr", &self.isr), ("tmr", &self.tmr), ("irr", &self.irr)] {
            if words[0] & 0xffff != 0 {
                return Err((field, format!("vectors below 16: {:#x}", words[0])));
            }
        }
        if let Some(lvt) = self.lvt.iter().find(|l| **l & !0x7_f7ff != 0) {
            return Err(("lvt", format!("{lvt:#x}")));
        }
        Ok(())
    }
}

/// The local APICs of all vCPUs, in index order: the saved form of the device `lapic`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LapicsState {
    pub apics: Vec<LapicState>,
}

/// One counter of an 8254.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitChannelState {
    /// Initial count, 1 to 65536.
    pub count: u32,
    /// Mode 0 to 5.
    pub mode: u8,
    pub bcd: bool,
    /// GATE input.
    pub gate: bool,
    /// Read/write mode: 1 low byte, 2 high byte, 3 both, 0 never programmed.
    pub access: u8,
    /// The next read gives the high byte (of `access` 3).
    pub read_high: bool,
    /// The next write is the high byte (of `access` 3).
    pub write_high: bool,
    /// Low byte written, waiting for the high one.
    pub write_latch: u8,
    /// Count latched by a command and not read yet.
    pub latched_count: Option<u16>,
    /// The high byte of the latched count is next, the low byte was read.
    pub latched_high: bool,
    /// Status latched by a read-back command and not read yet.
    pub latched_status: Option<u8>,
    /// Virtual time at which the count was loaded (or the gate triggered), in ns.
    pub loaded_ns: i64,
    /// Nothing is counted yet: the count was not written since the control word was, or, in
    /// modes 1 and 5, the gate did not trigger. A kernel does not know: false.
    pub waiting: bool,
    /// GATE holds the counter: what it had counted until then, in ns. A kernel does not know:
    /// `None`.
    pub paused_ns: Option<u64>,
}

/// An 8254 as a PC wires it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    pub channels: [PitChannelState; 3],
    /// Port 0x61 bit 1: the speaker hears channel 2.
    pub speaker: bool,
    /// Channel 0's interrupt is replaced by the HPET's.
    pub irq_disabled: bool,
    /// Virtual time up to which channel 0 has interrupted, in ns. Of a kernel: when it was saved.
    pub driven_ns: i64,
}

impl PitState {
    /// At power-on. The 8254 is undefined then; channels do not count until programmed.
    pub fn reset() -> Self {
        let channel = |gate| PitChannelState { count: 0x1_0000, mode: 3, gate, waiting: true, ..Default::default() };
        Self { channels: [channel(true), channel(true), channel(false)], ..Self::default() }
    }

    /// Checks what no 8254 could be in.
    pub fn check(&self) -> Result<(), Invalid> {
        for c in &self.channels {
            if !(1..=0x1_0000).contains(&c.count) {
                return Err(("count", c.count.to_string()));
            }
            if c.mode > 5 {
                return Err(("mode", c.mode.to_string()));
            }
            if c.access > 3 {
                return Err(("access", c.access.to_string()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_states_are_valid() {
        PicState::reset().check().unwrap();
        IoApicState::reset().check().unwrap();
        LapicState::reset(300).check().unwrap();
        PitState::reset().check().unwrap();
    }

    #[test]
    fn hostile_states() {
        let mut pic = PicState::reset();
        pic.master.lines = 4;
        assert_eq!(pic.check().unwrap_err().0, "lines");
        let mut ioapic = IoApicState::reset();
        ioapic.redirection.push(0);
        assert_eq!(ioapic.check().unwrap_err().0, "redirection");
        let mut lapic = LapicState::reset(0);
        lapic.irr[0] = 1;
        assert_eq!(lapic.check().unwrap_err().0, "irr");
        lapic = LapicState::reset(0);
        lapic.timer_current = 1;
        assert_eq!(lapic.check().unwrap_err().0, "timer_current");
        let mut pit = PitState::reset();
        pit.channels[1].count = 0;
        assert_eq!(pit.check().unwrap_err().0, "count");
    }
}
