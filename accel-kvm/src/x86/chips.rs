//! Interrupt and timer chips: KVM's structs to the saved states and back.
//!
//! Where the two differ: KVM's PIC has no single and no level mode and is never uninitialised; its request
//! register holds levels and edges, told apart by the trigger mode here; its IOAPIC does not tell
//! the levels of edge-triggered inputs (the caller knows them); its PIT counts in host time.

use kvm_bindings::*;
use mimus_arch::x86::irqchip::*;

/// The master's input the slave is on.
const CASCADE: u8 = 1 << 2;

fn pic_chip_to(k: &kvm_pic_state, cascade: u8) -> PicChipState {
    PicChipState {
        lines: k.last_irr & !cascade,
        edges: k.irr & !k.elcr & !cascade,
        imr: k.imr,
        isr: k.isr,
        elcr: k.elcr & k.elcr_mask,
        base: k.irq_base & 0xf8,
        lowest: k.priority_add.wrapping_sub(1) & 7,
        next_icw: if matches!(k.init_state, 1..=3) { k.init_state + 1 } else { 0 },
        initialised: k.init_state == 0,
        icw4_follows: k.init4 != 0,
        single: false,
        level_mode: false,
        auto_eoi: k.auto_eoi != 0,
        rotate_on_auto_eoi: k.rotate_on_auto_eoi != 0,
        special_fully_nested: k.special_fully_nested_mode != 0,
        special_mask: k.special_mask != 0,
        read_isr: k.read_reg_select != 0,
        poll: k.poll != 0,
    }
}

fn pic_chip_from(s: &PicChipState, elcr_mask: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: s.lines,
        irr: s.edges & !s.elcr | s.lines & s.elcr,
        imr: s.imr,
        isr: s.isr,
        priority_add: (s.lowest + 1) & 7,
        irq_base: s.base,
        read_reg_select: s.read_isr.into(),
        poll: s.poll.into(),
        special_mask: s.special_mask.into(),
        init_state: s.next_icw.saturating_sub(1),
        auto_eoi: s.auto_eoi.into(),
        rotate_on_auto_eoi: s.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: s.special_fully_nested.into(),
        init4: s.icw4_follows.into(),
        elcr: s.elcr,
        elcr_mask,
    }
}

/// The pair.
pub fn pic_to(master: &kvm_pic_state, slave: &kvm_pic_state) -> PicState {
    PicState { master: pic_chip_to(master, CASCADE), slave: pic_chip_to(slave, 0) }
}

/// The pair. The kernel works out the cascade from the slave.
pub fn pic_from(s: &PicState) -> (kvm_pic_state, kvm_pic_state) {
    let mut master = pic_chip_from(&s.master, ELCR_MASK[0]);
    let slave = pic_chip_from(&s.slave, ELCR_MASK[1]);
    if slave.irr & !slave.imr != 0 {
        master.irr |= CASCADE;
    }
    (master, slave)
}

/// Redirection entry: delivery status, which no chip saves.
const DELIVERY_STATUS: u64 = 1 << 12;

/// `lines`: levels of the inputs as they were last driven.
pub fn ioapic_to(k: &kvm_ioapic_state, lines: u32) -> IoApicState {
    let pins = (1u32 << IOAPIC_PINS) - 1;
    let bits = |e: &kvm_ioapic_state__bindgen_ty_1| ioapic_entry_bits(e) & REDIRECTION_BITS & !DELIVERY_STATUS;
    let redirection: Vec<u64> = k.redirtbl.iter().map(bits).collect();
    let level = level_mask(&redirection);
    IoApicState {
        id: (k.id & 15) as u8,
        select: k.ioregsel as u8,
        lines: (lines & !level | k.irr & level) & pins,
        edges: k.irr & !level & pins,
        redirection,
    }
}

fn level_mask(redirection: &[u64]) -> u32 {
    redirection.iter().enumerate().filter(|(_, e)| *e & REDIRECTION_LEVEL != 0).fold(0, |m, (i, _)| m | 1 << i)
}

/// The IOAPIC at its usual place.
pub fn ioapic_from(s: &IoApicState) -> kvm_ioapic_state {
    let level = level_mask(&s.redirection);
    let mut k = kvm_ioapic_state {
        base_address: 0xfec0_0000,
        ioregsel: s.select.into(),
        id: s.id.into(),
        irr: s.edges & !level | s.lines & level,
        ..Default::default()
    };
    for (entry, bits) in k.redirtbl.iter_mut().zip(&s.redirection) {
        entry.bits = bits & !DELIVERY_STATUS;
    }
    k
}

/// The kernel's entry as a number.
fn ioapic_entry_bits(e: &kvm_ioapic_state__bindgen_ty_1) -> u64 {
    crate::sys::x86::redirection_bits(e)
}

/// Offsets in the page of a local APIC.
mod lapic {
    pub const ID: usize = 0x20;
    pub const VERSION: usize = 0x30;
    pub const TPR: usize = 0x80;
    pub const LDR: usize = 0xd0;
    pub const DFR: usize = 0xe0;
    pub const SVR: usize = 0xf0;
    pub const ISR: usize = 0x100;
    pub const TMR: usize = 0x180;
    pub const IRR: usize = 0x200;
    pub const ESR: usize = 0x280;
    pub const ICR: usize = 0x300;
    pub const ICR2: usize = 0x310;
    /// CMCI, timer, thermal, performance, LINT0, LINT1, error.
    pub const LVT: [usize; 7] = [0x2f0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
    pub const INITIAL: usize = 0x380;
    pub const CURRENT: usize = 0x390;
    pub const DIVIDE: usize = 0x3e0;
}

/// Version 0x14 with seven local vector table entries, as KVM's.
const LAPIC_VERSION: u32 = 0x0005_0014;

fn get(page: &kvm_lapic_state, at: usize) -> u32 {
    let byte = |i: usize| page.regs[at + i] as u8;
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

fn put(page: &mut kvm_lapic_state, at: usize, value: u32) {
    for (i, b) in value.to_le_bytes().into_iter().enumerate() {
        page.regs[at + i] = b as std::os::raw::c_char;
    }
}

/// `apic_base` tells the mode: x2APIC has a 32-bit id and an ICR in one piece.
pub fn lapic_to(page: &kvm_lapic_state, apic_base: u64, tsc_deadline: u64) -> LapicState {
    let x2apic = apic_base & mimus_arch::x86::msr::APIC_BASE_X2APIC != 0;
    let set = |at: usize| std::array::from_fn(|i| get(page, at + 0x10 * i));
    let id = get(page, lapic::ID);
    let initial = get(page, lapic::INITIAL);
    LapicState {
        apic_base,
        id: if x2apic { id } else { id >> 24 },
        tpr: get(page, lapic::TPR) as u8,
        ldr: get(page, lapic::LDR),
        dfr: get(page, lapic::DFR),
        svr: get(page, lapic::SVR),
        isr: set(lapic::ISR),
        tmr: set(lapic::TMR),
        irr: set(lapic::IRR),
        esr: get(page, lapic::ESR),
        errors: 0,
        icr: u64::from(get(page, lapic::ICR2)) << 32 | u64::from(get(page, lapic::ICR)),
        lvt: lapic::LVT.map(|at| get(page, at) & 0x7_f7ff),
        timer_initial: initial,
        timer_current: get(page, lapic::CURRENT).min(initial),
        timer_divide: get(page, lapic::DIVIDE) & 0xb,
        tsc_deadline,
    }
}

/// The page of a local APIC. `version` is what the kernel's own says.
pub fn lapic_from(s: &LapicState, version: u32) -> kvm_lapic_state {
    let x2apic = s.apic_base & mimus_arch::x86::msr::APIC_BASE_X2APIC != 0;
    let mut page = kvm_lapic_state { regs: [0; 1024] };
    put(&mut page, lapic::ID, if x2apic { s.id } else { s.id << 24 });
    put(&mut page, lapic::VERSION, version);
    put(&mut page, lapic::TPR, s.tpr.into());
    put(&mut page, lapic::LDR, s.ldr);
    put(&mut page, lapic::DFR, s.dfr);
    put(&mut page, lapic::SVR, s.svr);
    for (at, set) in [(lapic::ISR, &s.isr), (lapic::TMR, &s.tmr), (lapic::IRR, &s.irr)] {
        for (i, word) in set.iter().enumerate() {
            put(&mut page, at + 0x10 * i, *word);
        }
    }
    put(&mut page, lapic::ESR, s.esr);
    put(&mut page, lapic::ICR, s.icr as u32);
    put(&mut page, lapic::ICR2, (s.icr >> 32) as u32);
    for (at, lvt) in lapic::LVT.into_iter().zip(s.lvt) {
        put(&mut page, at, lvt);
    }
    put(&mut page, lapic::INITIAL, s.timer_initial);
    put(&mut page, lapic::CURRENT, s.timer_current);
    put(&mut page, lapic::DIVIDE, s.timer_divide);
    page
}

/// The version register of a page.
pub fn lapic_version(page: &kvm_lapic_state) -> u32 {
    match get(page, lapic::VERSION) {
        0 => LAPIC_VERSION,
        v => v,
    }
}

/// Read and write states of the kernel's PIT.
const RW_LSB: u8 = 1;
const RW_MSB: u8 = 2;
const RW_WORD0: u8 = 3;
const RW_WORD1: u8 = 4;
/// The kernel's mode of a channel that does not count.
const NOT_PROGRAMMED: u8 = 0xff;

/// `offset` is what to add to the kernel's time for the virtual clock's, in ns; `now` is the virtual clock's.
pub fn pit_to(k: &kvm_pit_state2, offset: i64, now: i64) -> PitState {
    let channel = |c: &kvm_pit_channel_state| PitChannelState {
        count: match c.count {
            1..=0xffff => c.count,
            _ => 0x1_0000,
        },
        mode: if c.mode > 5 { 3 } else { c.mode },
        bcd: c.bcd != 0,
        gate: c.gate != 0,
        access: c.rw_mode & 3,
        read_high: c.read_state == RW_WORD1,
        write_high: c.write_state == RW_WORD1,
        write_latch: c.write_latch,
        latched_count: (c.count_latched != 0).then_some(c.latched_count),
        // While a whole word is latched, this is WORD0 until its low byte was read, then MSB.
        latched_high: c.count_latched == RW_MSB && c.rw_mode & 3 == 3,
        latched_status: (c.status_latched != 0).then_some(c.status),
        loaded_ns: c.count_load_time.wrapping_add(offset),
        waiting: c.mode > 5,
        paused_ns: None,
    };
    PitState {
        channels: std::array::from_fn(|i| channel(&k.channels[i])),
        speaker: k.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
        irq_disabled: k.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0,
        driven_ns: now,
    }
}

/// The other way. A counter that its gate holds goes on from where it is held.
pub fn pit_from(s: &PitState, offset: i64, now: i64) -> kvm_pit_state2 {
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    let channel = |c: &PitChannelState| {
        let state = |high: bool| match c.access {
            0 | 3 if high => RW_WORD1,
            0 | 3 => RW_WORD0,
            one => one,
        };
        kvm_pit_channel_state {
            count: c.count,
            latched_count: c.latched_count.unwrap_or(0),
            count_latched: match (c.latched_count.is_some(), c.access) {
                (false, _) => 0,
                (true, RW_LSB) => RW_LSB,
                (true, RW_MSB) => RW_MSB,
                (true, _) if c.latched_high => RW_MSB,
                (true, _) => RW_WORD0,
            },
            status_latched: c.latched_status.is_some().into(),
            status: c.latched_status.unwrap_or(0),
            read_state: state(c.read_high),
            write_state: state(c.write_high),
            write_latch: c.write_latch,
            rw_mode: c.access,
            // A count that was never written would start the kernel's timer.
            mode: if c.waiting || c.access == 0 { NOT_PROGRAMMED } else { c.mode },
            bcd: c.bcd.into(),
            gate: c.gate.into(),
            count_load_time: c.paused_ns.map_or(c.loaded_ns, |held| now - held as i64).wrapping_sub(offset),
        }
    };
    kvm_pit_state2 {
        channels: std::array::from_fn(|i| channel(&s.channels[i])),
        flags: flag(s.speaker, KVM_PIT_FLAGS_SPEAKER_DATA_ON) | flag(s.irq_disabled, KVM_PIT_FLAGS_HPET_LEGACY),
        reserved: [0; 9],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pic_round_trip() {
        let mut s = PicState::reset();
        s.master.initialised = true;
        s.slave.initialised = true;
        s.master.base = 0x20;
        s.slave.base = 0x28;
        s.master.elcr = 0x08;
        s.master.lines = 0x0b;
        s.master.edges = 0x03;
        s.slave.edges = 0x10;
        s.slave.isr = 1;
        s.slave.lowest = 2;
        s.slave.special_mask = true;
        let (master, slave) = pic_from(&s);
        assert_eq!(master.irr, 0x0b | CASCADE, "an edge, a level, and the slave");
        assert_eq!(pic_to(&master, &slave), s);
        pic_to(&master, &slave).check().unwrap();
        // In the middle of the initialisation sequence.
        s.slave.initialised = false;
        s.slave.next_icw = 3;
        let (master, slave) = pic_from(&s);
        assert_eq!(slave.init_state, 2);
        assert_eq!(pic_to(&master, &slave), s);
    }

    #[test]
    fn ioapic_round_trip() {
        let mut s = IoApicState::reset();
        s.id = 3;
        s.redirection[4] = 0x0100_0000_0000_0031;
        s.redirection[11] = 0x0300_0000_0000_0000 | REDIRECTION_LEVEL | REDIRECTION_REMOTE_IRR | 0x55;
        s.lines = 1 << 11 | 1 << 4;
        s.edges = 1 << 4;
        let back = ioapic_to(&ioapic_from(&s), s.lines);
        assert_eq!(back, s);
        back.check().unwrap();
    }

    #[test]
    fn lapic_round_trip() {
        for base in [0xfee0_0800u64, 0xfee0_0c00] {
            let mut s = LapicState::reset(if base & 0x400 != 0 { 300 } else { 5 });
            s.apic_base = base;
            s.svr = 0x1ff;
            s.irr[7] = 0x8000_0001;
            s.isr[1] = 2;
            s.icr = 0x0200_0000_0000_4031;
            s.lvt[LVT_TIMER] = 0x2_0040;
            s.timer_initial = 1000;
            s.timer_current = 999;
            s.timer_divide = 0xb;
            s.tsc_deadline = 77;
            let page = lapic_from(&s, LAPIC_VERSION);
            assert_eq!(lapic_to(&page, base, 77), s);
            assert_eq!(lapic_version(&page), LAPIC_VERSION);
        }
    }

    #[test]
    fn pit_round_trip() {
        let mut s = PitState::reset();
        s.channels[0] = PitChannelState {
            count: 1193,
            mode: 2,
            gate: true,
            access: 3,
            write_high: true,
            write_latch: 9,
            loaded_ns: 12345,
            ..Default::default()
        };
        s.channels[2].access = 3;
        s.channels[2].latched_count = Some(0xabcd);
        s.channels[2].latched_high = true;
        s.channels[1].access = 1;
        s.channels[1].latched_status = Some(0x34);
        s.speaker = true;
        s.driven_ns = 20000;
        let k = pit_from(&s, -500, 20000);
        assert_eq!(k.channels[0].count_load_time, 12845);
        assert_eq!(pit_to(&k, -500, 20000), s);
    }
}
