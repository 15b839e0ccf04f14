//! Unit tests of the architecture's rules, by section of the SDM.

mod control;
mod events;
mod makers;
mod pages;
mod registers;
mod smm;
mod tasks;
mod transfers;

use crate::state::{CS, DS, ES, SS};
use crate::testing::TestHost;
use mimus_arch::x86::regs::*;
use mimus_arch::x86::state::{Segment, attr};

/// Where the tests' GDT and IDT are.
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// Selectors of the tests' GDT.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x18 | 3;
pub const DATA3: u16 = 0x20 | 3;
pub const LONG0: u16 = 0x28;
pub const TSS32: u16 = 0x30;
pub const LONG3: u16 = 0x40 | 3;
pub const GATE: u16 = 0x48;
pub const ABSENT: u16 = 0x58;

pub fn flat(attributes: u64) -> u64 {
    0x000f_0000_0000_ffff | (attributes & 0xff) << 40 | (attributes >> 12 & 0xf) << 52
}

pub const fn gate(selector: u16, offset: u64, kind: u64, dpl: u64) -> u64 {
    offset & 0xffff | (selector as u64) << 16 | (0x80 | dpl << 5 | kind) << 40 | (offset >> 16 & 0xffff) << 48
}

/// Flat 32-bit protected mode at privilege level 0, with a GDT, an IDT of 32-bit interrupt gates to
/// 0x8000 + 16 × vector, and a TSS whose level 0 stack is at 0x7000.
pub fn protected() -> TestHost {
    let mut h = TestHost::new();
    let entries = [
        0,
        flat(0xc09b),
        flat(0xc093),
        flat(0xc0fb),
        flat(0xc0f3),
        flat(0xa09b),
        0x0000_8900_3000_0067,
        0,
        flat(0xa0fb),
        gate(CODE0, 0x9000, 12, 3),
        0,
        flat(0xc013),
    ];
    for (i, e) in entries.into_iter().enumerate() {
        h.put(GDT + 8 * i as u64, 8, e);
    }
    for v in 0..256u64 {
        h.put(IDT + 8 * v, 8, gate(CODE0, 0x8000 + 16 * v, 14, if v == 0x80 { 3 } else { 0 }));
    }
    h.put(TSS + 4, 4, 0x7000);
    h.put(TSS + 8, 4, u64::from(DATA0));
    h.st.cr0 = CR0_PE | CR0_ET;
    h.st.gdtr.base = GDT;
    h.st.gdtr.limit = 0x5f;
    h.st.idtr.base = IDT;
    h.st.idtr.limit = 0x7ff;
    h.st.tr = Segment { selector: TSS32, base: TSS, limit: 0x67, attributes: attr::P | 0xb };
    h.st.seg[CS] = Segment::flat(CODE0, attr::CODE | attr::DB);
    for s in [SS, DS, ES] {
        h.st.seg[s] = Segment::flat(DATA0, attr::DATA | attr::DB);
    }
    h.gpr[RSP] = 0x6000;
    h
}

/// Moves a protected-mode host to privilege level 3.
pub fn to_user(h: &mut TestHost) {
    h.st.cpl = 3;
    h.st.seg[CS] = Segment::flat(CODE3, attr::CODE | attr::DB | 3 << attr::DPL_SHIFT);
    for s in [SS, DS, ES] {
        h.st.seg[s] = Segment::flat(DATA3, attr::DATA | attr::DB | 3 << attr::DPL_SHIFT);
    }
}

/// 64-bit mode at privilege level 0: 4-level tables at 0x10000 map the first 2 MiB to themselves, for users too.
pub fn long() -> TestHost {
    let mut h = protected();
    h.put(0x10000, 8, 0x11007);
    h.put(0x11000, 8, 0x12007);
    h.put(0x12000, 8, 0x13007);
    for i in 0..256u64 {
        h.put(0x13000 + 8 * i, 8, i << 12 | 7);
    }
    for v in 0..128u64 {
        let ist = if v == 8 { 1 } else { 0 };
        h.put(IDT + 16 * v, 8, gate(LONG0, 0x8000 + 16 * v, 14, if v == 3 { 3 } else { 0 }) | ist << 32);
        h.put(IDT + 16 * v + 8, 8, 0);
    }
    h.put(TSS + 4, 8, 0x7000);
    h.put(TSS + 0x24, 8, 0x7800);
    h.st.cr0 |= CR0_PG;
    h.st.cr3 = 0x10000;
    h.st.cr4 = CR4_PAE;
    h.st.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    h.st.seg[CS] = Segment::flat(LONG0, attr::CODE | attr::L);
    h
}
