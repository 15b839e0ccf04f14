//! How the first CPU enters a kernel without firmware: registers, descriptors and page
//! tables, as data.
//!
//! Spec: Linux `boot.rst`, "32-bit BOOT PROTOCOL" and "64-bit BOOT PROTOCOL"; Xen
//! `docs/misc/pvh.pandoc`, "x86/HVM direct boot ABI"; Intel SDM vol. 3, 3.4.5 (segment
//! descriptors) and 4.5 (4-level paging).

use mimus_core::arch::x86::regs::{RBX, RFLAGS_FIXED, RSI};
use mimus_core::arch::x86::state::attr;
use mimus_core::arch::x86::{Segment, TableRegister, X86State};

/// Where the descriptor table is.
pub const GDT: u64 = 0x500;
/// Where the page tables are, [`PAGE_TABLE_BYTES`] of them.
pub const PAGE_TABLES: u64 = 0x9000;
/// PML4, one page-directory-pointer table, four page directories.
pub const PAGE_TABLE_BYTES: u64 = 6 * PAGE;
const PAGE: u64 = 0x1000;

/// Selectors of the table, where Linux has its `__BOOT_CS`, `__BOOT_DS` and `__BOOT_TSS`.
pub const CODE: u16 = 0x10;
/// Flat data.
pub const DATA: u16 = 0x18;
/// A task state segment that is never used, which PVH asks for.
pub const TASK: u16 = 0x20;

/// A segment's descriptor (SDM vol. 3, figure 3-8).
pub const fn descriptor(s: &Segment) -> u64 {
    let limit = if s.attributes & attr::G != 0 { s.limit >> 12 } else { s.limit } as u64;
    let attributes = s.attributes as u64;
    limit & 0xffff
        | (s.base & 0xff_ffff) << 16
        | (attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes >> 12 & 0xf) << 52
        | (s.base >> 24 & 0xff) << 56
}

/// Code in 32-bit mode.
pub const CODE32: Segment = Segment::flat(CODE, attr::CODE | attr::DB);
/// Code in 64-bit mode.
pub const CODE64: Segment = Segment::flat(CODE, attr::CODE | attr::L);
/// Data.
pub const DATA32: Segment = Segment::flat(DATA, attr::DATA | attr::DB);
/// A busy 32-bit task state segment.
pub const TSS32: Segment = Segment { selector: TASK, base: 0, limit: 0x67, attributes: attr::P | 0xb };

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, no paging; `esi` is `boot_params` or `ebx` `hvm_start_info`.
    Protected { eip: u32, ebx: u32, esi: u32 },
    /// 64-bit mode, the first 4 GiB mapped to themselves; `rsi` is `boot_params`.
    Long { rip: u64, rsi: u64 },
}

impl Entry {
    /// The code segment it runs in.
    pub const fn code(&self) -> Segment {
        match self {
            Self::Protected { .. } => CODE32,
            Self::Long { .. } => CODE64,
        }
    }

    /// CR0: protection on, paging in 64-bit mode; ET and NE are fixed or as firmware
    /// leaves them.
    pub const fn cr0(&self) -> u64 {
        const PE_ET_NE: u64 = 1 | 1 << 4 | 1 << 5;
        match self {
            Self::Protected { .. } => PE_ET_NE,
            Self::Long { .. } => PE_ET_NE | 1 << 31,
        }
    }

    /// CR3.
    pub const fn cr3(&self) -> u64 {
        match self {
            Self::Protected { .. } => 0,
            Self::Long { .. } => PAGE_TABLES,
        }
    }

    /// CR4: PAE in 64-bit mode.
    pub const fn cr4(&self) -> u64 {
        match self {
            Self::Protected { .. } => 0,
            Self::Long { .. } => 1 << 5,
        }
    }

    /// IA32_EFER: LME and LMA in 64-bit mode.
    pub const fn efer(&self) -> u64 {
        match self {
            Self::Protected { .. } => 0,
            Self::Long { .. } => 1 << 8 | 1 << 10,
        }
    }

    /// The descriptor table, for [`GDT`].
    pub fn gdt(&self) -> Vec<u8> {
        let table = [0, 0, descriptor(&self.code()), descriptor(&DATA32), descriptor(&TSS32)];
        table.iter().flat_map(|d| d.to_le_bytes()).collect()
    }

    /// Limit of the descriptor table.
    const GDT_LIMIT: u16 = 5 * 8 - 1;

    /// Puts a CPU that has been reset there.
    pub fn apply(&self, s: &mut X86State) {
        (s.cr0, s.cr3, s.cr4, s.efer) = (self.cr0(), self.cr3(), self.cr4(), self.efer());
        s.gpr = [0; 16];
        s.rflags = RFLAGS_FIXED;
        (s.cs, s.ldtr, s.tr) = (self.code(), Segment::UNUSABLE, TSS32);
        for segment in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
            *segment = DATA32;
        }
        s.gdtr = TableRegister { base: GDT, limit: Self::GDT_LIMIT };
        s.idtr = TableRegister { base: 0, limit: 0 };
        match *self {
            Self::Protected { eip, ebx, esi } => {
                s.rip = eip.into();
                (s.gpr[RBX], s.gpr[RSI]) = (ebx.into(), esi.into());
            }
            Self::Long { rip, rsi } => {
                s.rip = rip;
                s.gpr[RSI] = rsi;
            }
        }
    }

    /// Page tables, for [`PAGE_TABLES`]; empty without paging.
    pub fn page_tables(&self) -> Vec<u8> {
        match self {
            Self::Protected { .. } => Vec::new(),
            Self::Long { .. } => identity_map(PAGE_TABLES),
        }
    }
}

/// Page tables at `base` that map the first 4 GiB to themselves in 2 MiB pages.
fn identity_map(base: u64) -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut words = vec![0u64; (PAGE_TABLE_BYTES / 8) as usize];
    words[0] = (base + PAGE) | PRESENT_WRITABLE;
    for i in 0..4 {
        words[512 + i] = (base + (2 + i as u64) * PAGE) | PRESENT_WRITABLE;
    }
    for i in 0..2048 {
        words[1024 + i] = (i as u64) << 21 | PRESENT_WRITABLE | LARGE;
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::bytes::u64_at;
    use super::*;

    #[test]
    fn descriptors() {
        assert_eq!(descriptor(&CODE32), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&CODE64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&DATA32), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&TSS32), 0x0000_8b00_0000_0067);
        let high = Segment { base: 0x1234_5678, ..TSS32 };
        assert_eq!(descriptor(&high), 0x1200_8b34_5678_0067);
        let gdt = Entry::Long { rip: 0, rsi: 0 }.gdt();
        assert_eq!((gdt.len(), u64_at(&gdt, 0x10)), (40, Some(descriptor(&CODE64))));
    }

    #[test]
    fn a_cpu_out_of_reset_is_put_there() {
        let mut s = X86State::reset(true);
        Entry::Long { rip: 0x10_0200, rsi: 0x7000 }.apply(&mut s);
        s.check().unwrap();
        assert_eq!((s.linear_pc(), s.gpr[RSI], s.cpl(), s.cs.selector), (0x10_0200, 0x7000, 0, 0x10));
        let mut s = X86State::reset(true);
        Entry::Protected { eip: 0x10_0040, ebx: 0x1_0000, esi: 0 }.apply(&mut s);
        s.check().unwrap();
        assert_eq!((s.linear_pc(), s.gpr[RBX], s.gpr[2], s.efer), (0x10_0040, 0x1_0000, 0, 0));
        // What the tables in memory hold is what the registers do.
        assert_eq!(s.gdtr.limit as usize + 1, Entry::Long { rip: 0, rsi: 0 }.gdt().len());
    }

    /// Every address of the first 4 GiB translates to itself, the next one to nothing.
    #[test]
    fn page_tables_map_to_themselves() {
        let tables = Entry::Long { rip: 0, rsi: 0 }.page_tables();
        assert_eq!(tables.len() as u64, PAGE_TABLE_BYTES);
        let walk = |va: u64| -> Option<u64> {
            let entry = |table: u64, index: u64| {
                let e = u64_at(&tables, (table - PAGE_TABLES + index * 8) as usize)?;
                (e & 1 != 0).then_some(e)
            };
            let pml4e = entry(PAGE_TABLES, va >> 39 & 511)?;
            let pdpte = entry(pml4e & !0xfff, va >> 30 & 511)?;
            let pde = entry(pdpte & !0xfff, va >> 21 & 511)?;
            assert_eq!(pde & 0x80, 0x80);
            Some(pde & !0x1f_ffff | va & 0x1f_ffff)
        };
        for va in [0, 0x1000, 0x20_0000, 0x1234_5678, 0x4000_0000, 0x8000_0123, 0xffff_ffff] {
            assert_eq!(walk(va), Some(va));
        }
        assert_eq!(walk(1 << 32), None);
        assert!(Entry::Protected { eip: 0, ebx: 0, esi: 0 }.page_tables().is_empty());
    }

    #[test]
    fn control_registers() {
        let long = Entry::Long { rip: 0x10_0200, rsi: 0x7000 };
        assert_eq!((long.cr0(), long.cr4(), long.efer(), long.cr3()), (0x8000_0031, 0x20, 0x500, 0x9000));
        let protected = Entry::Protected { eip: 0x10_0000, ebx: 0, esi: 0x7000 };
        assert_eq!((protected.cr0(), protected.cr4(), protected.efer(), protected.cr3()), (0x31, 0, 0, 0));
    }
}
