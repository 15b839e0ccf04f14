//! Page tables: the walk of one address with every entry decoded, and the whole tree as ranges.
//!
//! Specifications: RISC-V privileged specification, Sv39/Sv48/Sv57 (sections 12.4–12.6); Intel SDM volume 3 chapter 5.
//! Hypervisor stages are left out.

use mimus_arch::CpuState;
use mimus_arch::riscv::Privilege;

/// Reads an entry of 4 or 8 bytes at a physical address.
pub type ReadEntry<'a> = &'a dyn Fn(u64, usize) -> Option<u64>;

/// How addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    pub name: &'static str,
    root: u64,
    levels: u32,
    /// Bits of the index at each level but the topmost, which may have another number.
    index_bits: u32,
    top_bits: u32,
    entry: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Riscv,
    X86 { pae: bool },
}

/// An entry that a walk looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// 0 is the last level.
    pub level: u32,
    pub at: u64,
    pub value: u64,
    /// What it says, in words.
    pub text: String,
}

/// How a walk ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The physical address, and the mapping's size in bytes.
    Mapped {
        pa: u64,
        size: u64,
    },
    Fault(String),
}

/// A stretch of virtual memory that is mapped alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub va: u64,
    pub len: u64,
    pub pa: u64,
    /// `rwxug`-like.
    pub rights: String,
}

/// The scheme of a vCPU's state; `None`: addresses are physical.
pub fn scheme(state: &CpuState) -> Option<Scheme> {
    const PPN: u64 = (1 << 44) - 1;
    match state {
        CpuState::Riscv(s) => {
            let (levels, name) = match s.satp >> 60 {
                8 => (3, "Sv39"),
                9 => (4, "Sv48"),
                10 => (5, "Sv57"),
                _ => return None,
            };
            let root = (s.satp & PPN) << 12;
            Some(Scheme { name, root, levels, index_bits: 9, top_bits: 9, entry: 8, kind: Kind::Riscv })
        }
        CpuState::X86(s) => {
            const PG: u64 = 1 << 31;
            const PAE: u64 = 1 << 5;
            const LA57: u64 = 1 << 12;
            const LMA: u64 = 1 << 10;
            if s.cr0 & PG == 0 {
                return None;
            }
            let page = s.cr3 & 0x000f_ffff_ffff_f000;
            Some(match () {
                () if s.efer & LMA != 0 => {
                    let levels = if s.cr4 & LA57 != 0 { 5 } else { 4 };
                    let name = if levels == 5 { "5-level paging" } else { "4-level paging" };
                    Scheme {
                        name,
                        root: page,
                        levels,
                        index_bits: 9,
                        top_bits: 9,
                        entry: 8,
                        kind: Kind::X86 { pae: true },
                    }
                }
                () if s.cr4 & PAE != 0 => {
                    let (name, root) = ("PAE paging", s.cr3 & 0xffff_ffe0);
                    Scheme {
                        name,
                        root,
                        levels: 3,
                        index_bits: 9,
                        top_bits: 2,
                        entry: 8,
                        kind: Kind::X86 { pae: true },
                    }
                }
                () => {
                    let (name, root) = ("32-bit paging", s.cr3 & 0xffff_f000);
                    Scheme {
                        name,
                        root,
                        levels: 2,
                        index_bits: 10,
                        top_bits: 10,
                        entry: 4,
                        kind: Kind::X86 { pae: false },
                    }
                }
            })
        }
        _ => None,
    }
}

/// Whether the vCPU's current accesses are translated: not in RISC-V's machine mode.
pub fn translates(state: &CpuState) -> bool {
    !matches!(state, CpuState::Riscv(s) if s.privilege == Privilege::Machine)
}

impl Scheme {
    fn shift(&self, level: u32) -> u32 {
        12 + level * self.index_bits
    }

    fn slots(&self, level: u32) -> u64 {
        1 << if level + 1 == self.levels { self.top_bits } else { self.index_bits }
    }

    fn decode(&self, level: u32, value: u64) -> Decoded {
        match self.kind {
            Kind::Riscv => riscv(value, level),
            Kind::X86 { pae } => x86(value, level, self.levels, pae),
        }
    }

    fn rights(&self, value: u64) -> String {
        match self.kind {
            Kind::Riscv => letters(value, &[(1, 'r'), (2, 'w'), (3, 'x'), (4, 'u'), (5, 'g')]),
            Kind::X86 { pae } => x86_rights(value, pae),
        }
    }

    fn text(&self, level: u32, value: u64, d: &Decoded) -> String {
        match self.kind {
            Kind::Riscv => riscv_text(value, d),
            Kind::X86 { pae } => x86_text(value, level, pae, d),
        }
    }

    /// The same with another root: a kernel may keep two, of which programs see a part.
    pub fn with_root(self, root: u64) -> Scheme {
        Scheme { root, ..self }
    }

    /// The topmost table's physical address.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Physical address of `va` and the bytes from there to its mapping's end; of what is not mapped, the bytes that
    /// are not either.
    ///
    /// # Errors
    /// Nothing is mapped from `va` on for that many bytes.
    pub fn lookup(&self, va: u64, read: ReadEntry<'_>) -> Result<(u64, u64), u64> {
        if !self.is_canonical(va) {
            return Err(4096);
        }
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let size = 1u64 << self.shift(level);
            let index = va >> self.shift(level) & (self.slots(level) - 1);
            let hole = size - (va & (size - 1));
            let Some(value) = read(table.wrapping_add(index * self.entry as u64), self.entry) else { return Err(hole) };
            let d = self.decode(level, value);
            if !d.valid {
                return Err(hole);
            }
            if d.leaf || level == 0 {
                let size = size.max(d.span);
                if d.address & (size - 1) != 0 {
                    return Err(hole);
                }
                let offset = va & (size - 1);
                return Ok((d.address | offset, size - offset));
            }
            table = d.address;
        }
        Err(4096)
    }

    /// Every entry that is looked at for `va`.
    pub fn walk(&self, va: u64, read: ReadEntry<'_>) -> (Vec<Entry>, End) {
        let mut entries = Vec::new();
        if !self.is_canonical(va) {
            let top = self.top() - 1;
            return (entries, End::Fault(format!("it is not canonical: bits 63 to {top} are not all the same")));
        }
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let index = va >> self.shift(level) & (self.slots(level) - 1);
            let at = table + index * self.entry as u64;
            let Some(value) = read(at, self.entry) else {
                return (entries, End::Fault(format!("the table at {table:#x} is not in RAM")));
            };
            let d = self.decode(level, value);
            entries.push(Entry { level, at, value, text: self.text(level, value, &d) });
            let size = (1u64 << self.shift(level)).max(d.span);
            if !d.valid {
                return (entries, End::Fault(format!("the entry of level {level} is not present")));
            }
            if d.leaf || level == 0 {
                if d.address & (size - 1) != 0 {
                    return (entries, End::Fault(format!("the entry of level {level} is a misaligned superpage")));
                }
                return (entries, End::Mapped { pa: d.address | va & (size - 1), size });
            }
            table = d.address;
        }
        (entries, End::Fault("there are no tables".to_owned()))
    }

    /// What is mapped, neighbours put together; at most `most` ranges.
    pub fn ranges(&self, read: ReadEntry<'_>, most: usize) -> Vec<Mapping> {
        let mut found = Vec::new();
        // A damaged tree may refer to itself over and over.
        let mut budget = 1 << 20;
        self.tree(self.root, self.levels - 1, 0, read, &mut found, (most, &mut budget));
        found
    }

    fn tree(
        &self,
        table: u64,
        level: u32,
        base: u64,
        read: ReadEntry<'_>,
        found: &mut Vec<Mapping>,
        (most, budget): (usize, &mut u32),
    ) {
        let size = 1u64 << self.shift(level);
        for index in 0..self.slots(level) {
            if *budget == 0 || found.len() > most {
                return;
            }
            *budget -= 1;
            let Some(value) = read(table + index * self.entry as u64, self.entry) else { return };
            let d = self.decode(level, value);
            if !d.valid {
                continue;
            }
            let va = self.canonical(base + index * size);
            if !(d.leaf || level == 0) {
                self.tree(d.address, level - 1, base + index * size, read, found, (most, budget));
                continue;
            }
            let rights = self.rights(value);
            // Each of the 16 entries of a 64 KiB page maps its own 4 KiB of it.
            let pa = d.address | if d.span == 0 { 0 } else { va & (d.span - 1) };
            match found.last_mut() {
                Some(m) if m.va.wrapping_add(m.len) == va && m.pa.wrapping_add(m.len) == pa && m.rights == rights => {
                    m.len += size;
                }
                _ => found.push(Mapping { va, len: size, pa, rights }),
            }
        }
    }

    /// Bits of an address that is translated.
    fn top(&self) -> u32 {
        self.shift(self.levels - 1) + self.top_bits
    }

    /// Whether an address is one that there can be: of the 64-bit kinds, what is beyond the translated bits is a sign.
    fn is_canonical(&self, va: u64) -> bool {
        self.top() < 39 || self.canonical(va) == va
    }

    /// The upper half of 64-bit address spaces is at their end.
    fn canonical(&self, va: u64) -> u64 {
        let bits = self.top();
        if bits < 39 {
            return va;
        }
        ((va << (64 - bits)) as i64 >> (64 - bits)) as u64
    }
}

/// An entry in numbers.
struct Decoded {
    valid: bool,
    leaf: bool,
    address: u64,
    /// Bytes that a leaf maps, if more than its level says (Svnapot).
    span: u64,
}

fn letters(value: u64, bits: &[(u32, char)]) -> String {
    bits.iter().map(|(bit, letter)| if value >> bit & 1 != 0 { *letter } else { '-' }).collect()
}

fn riscv(value: u64, level: u32) -> Decoded {
    const NAPOT: u64 = 1 << 63;
    let address = (value >> 10 & ((1 << 44) - 1)) << 12;
    let (valid, leaf) = (value & 1 != 0, value & 0xe != 0);
    // Svnapot has 64 KiB only: PPN[3:0] is 1000.
    if level == 0 && value & NAPOT != 0 && address >> 12 & 0xf == 8 {
        return Decoded { valid, leaf, address: address & !0xffff, span: 0x1_0000 };
    }
    Decoded { valid, leaf, address, span: 0 }
}

fn riscv_text(value: u64, d: &Decoded) -> String {
    const BITS: [(u32, char); 8] = [(7, 'D'), (6, 'A'), (5, 'G'), (4, 'U'), (3, 'X'), (2, 'W'), (1, 'R'), (0, 'V')];
    let what = match (d.valid, d.leaf) {
        (false, _) => "not valid",
        (_, true) => "leaf",
        _ => "table",
    };
    let pbmt = ["", " PBMT=NC", " PBMT=IO", " PBMT=reserved"][(value >> 61 & 3) as usize];
    let napot = if value >> 63 != 0 { " N" } else { "" };
    let address = d.address;
    format!("{what} at {address:#x} {} RSW={}{pbmt}{napot}", letters(value, &BITS), value >> 8 & 3)
}

fn x86(value: u64, level: u32, levels: u32, pae: bool) -> Decoded {
    let valid = value & 1 != 0;
    let big = value >> 7 & 1 != 0;
    // Pointers to page directories of PAE paging have no size bit, nor have the two topmost levels of the others.
    let leaf = level == 0 || big && level <= 2 && !(levels == 3 && level == 2);
    let mask = match (leaf && level > 0, pae) {
        (true, true) => 0x000f_ffff_ffff_ffffu64 & !((1u64 << (12 + 9 * level)) - 1),
        (true, false) => 0xffc0_0000,
        (false, true) => 0x000f_ffff_ffff_f000,
        (false, false) => 0xffff_f000,
    };
    let mut address = value & mask;
    if leaf && level > 0 && !pae {
        // PSE-36: bits 39:32 are in bits 20:13.
        address |= (value >> 13 & 0xff) << 32;
    }
    Decoded { valid, leaf, address, span: 0 }
}

fn x86_rights(value: u64, pae: bool) -> String {
    format!(
        "r{}{}{}{}",
        if value >> 1 & 1 != 0 { 'w' } else { '-' },
        if pae && value >> 63 != 0 { '-' } else { 'x' },
        if value >> 2 & 1 != 0 { 'u' } else { '-' },
        if value >> 8 & 1 != 0 { 'g' } else { '-' }
    )
}

fn x86_text(value: u64, level: u32, pae: bool, d: &Decoded) -> String {
    const BITS: [(u32, &str); 9] =
        [(0, "P"), (1, "R/W"), (2, "U/S"), (3, "PWT"), (4, "PCD"), (5, "A"), (6, "D"), (8, "G"), (63, "XD")];
    let flags: Vec<&str> =
        BITS.iter().filter(|(bit, _)| value >> bit & 1 != 0 && (*bit < 63 || pae)).map(|(_, name)| *name).collect();
    let size = if level > 0 && d.leaf { " PS" } else { "" };
    let what = match (d.valid, d.leaf) {
        (false, _) => "not present",
        (_, true) => "page",
        _ => "table",
    };
    format!("{what} at {:#x} {}{size}", d.address, flags.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::riscv::RiscvState;
    use mimus_arch::x86::X86State;
    use std::collections::HashMap;

    fn memory(entries: &[(u64, u64)]) -> impl Fn(u64, usize) -> Option<u64> + use<> {
        let map: HashMap<u64, u64> = entries.iter().copied().collect();
        move |at, _| (at < 0x10_0000).then(|| map.get(&at).copied().unwrap_or(0))
    }

    #[test]
    fn sv39() {
        let mut s = RiscvState::new(0, 0, 0);
        s.satp = 8 << 60 | 0x10;
        let scheme = scheme(&CpuState::Riscv(Box::new(s))).unwrap();
        assert_eq!(scheme.name, "Sv39");
        let table = |pa: u64| pa >> 12 << 10 | 1;
        let leaf = |pa: u64| pa >> 12 << 10 | 0xcf;
        let read = memory(&[
            (0x10000 + 8 * 510, table(0x11000)),
            (0x11000, leaf(0x20_0000)),
            (0x11008, leaf(0x40_0000)),
            (0x11010, table(0x12000)),
            (0x12000 + 8 * 5, leaf(0x7000)),
        ]);
        let (entries, end) = scheme.walk(0xffff_ffff_8000_1234, &read);
        assert_eq!(end, End::Mapped { pa: 0x20_1234, size: 2 << 20 });
        assert_eq!(entries.len(), 2);
        assert!(entries[1].text.starts_with("leaf at 0x200000 DA--XWRV"), "{}", entries[1].text);
        assert_eq!(scheme.walk(0xffff_ffff_8040_5008, &read).1, End::Mapped { pa: 0x7008, size: 4096 });
        assert!(matches!(scheme.walk(0, &read).1, End::Fault(_)));
        let ranges = scheme.ranges(&read, 100);
        assert_eq!(ranges.len(), 2);
        assert_eq!((ranges[0].va, ranges[0].len), (0xffff_ffff_8000_0000, 4 << 20), "neighbours are one");
        assert_eq!(ranges[0].rights, "rwx--");
    }

    #[test]
    fn deeper_trees_and_addresses_that_cannot_be() {
        let table = |pa: u64| pa >> 12 << 10 | 1;
        let leaf = |pa: u64| pa >> 12 << 10 | 0xcf;
        for (mode, levels, name) in [(9u64, 4, "Sv48"), (10, 5, "Sv57")] {
            let mut s = RiscvState::new(0, 0, 0);
            s.satp = mode << 60 | 0x10;
            let scheme = scheme(&CpuState::Riscv(Box::new(s))).unwrap();
            // Each table's last entry leads to the next; the last table's first is the page.
            let mut entries: Vec<(u64, u64)> =
                (0..levels - 1).map(|i| (0x10000 + 0x1000 * i + 8 * 511, table(0x11000 + 0x1000 * i))).collect();
            entries.push((0x10000 + 0x1000 * (levels - 1), leaf(0x7000)));
            let read = memory(&entries);
            let (walked, end) = scheme.walk(0xffff_ffff_ffe0_0123, &read);
            assert_eq!((scheme.name, walked.len() as u64, end), (name, levels, End::Mapped { pa: 0x7123, size: 4096 }));
            let ranges = scheme.ranges(&read, 10);
            assert_eq!((ranges.len(), ranges[0].va, ranges[0].pa), (1, 0xffff_ffff_ffe0_0000, 0x7000));
            let wrong = scheme.walk(0xf0ff_ffff_ffe0_0123, &read).1;
            assert!(matches!(&wrong, End::Fault(why) if why.contains("not canonical")), "{wrong:?}");
            assert!(scheme.lookup(0xf0ff_ffff_ffe0_0123, &read).is_err());
        }
        let mut s = X86State::reset(true);
        (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0001, 0x1000, 0x1020, 0x500);
        let scheme = scheme(&CpuState::X86(Box::new(s))).unwrap();
        let read = memory(&[(0x1ff8, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x20_0083)]);
        let (walked, end) = scheme.walk(0xffff_0000_0000_1234, &read);
        let wanted = ("5-level paging", 4, End::Mapped { pa: 0x20_1234, size: 2 << 20 });
        assert_eq!((scheme.name, walked.len(), end), wanted);
        let wrong = scheme.walk(0x0100_0000_0000_0000, &read).1;
        assert!(matches!(&wrong, End::Fault(why) if why.contains("bits 63 to 56")), "{wrong:?}");
    }

    #[test]
    fn x86_of_all_kinds() {
        let mut s = X86State::reset(true);
        assert_eq!(scheme(&CpuState::X86(Box::new(s.clone()))), None);
        (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0001, 0x1000, 0x20, 0x500);
        let long = scheme(&CpuState::X86(Box::new(s.clone()))).unwrap();
        let read = memory(&[
            (0x1000, 0x2003),
            (0x2000, 0x3003),
            (0x3008, 0x20_0083 | 1 << 63),
            (0x3000, 0x4003),
            (0x4028, 0x9107),
        ]);
        assert_eq!(long.walk(0x20_1000, &read).1, End::Mapped { pa: 0x20_1000, size: 2 << 20 });
        assert_eq!(long.walk(0x5123, &read).1, End::Mapped { pa: 0x9123, size: 4096 });
        let ranges = long.ranges(&read, 100);
        assert_eq!(ranges.iter().map(|r| r.rights.as_str()).collect::<Vec<_>>(), ["rwxug", "rw---"]);
        (s.efer, s.cr4) = (0, 0);
        let plain = scheme(&CpuState::X86(Box::new(s.clone()))).unwrap();
        let read = memory(&[(0x1000, 0x2003), (0x2004, 0x5003), (0x1004, 0x40_0083)]);
        assert_eq!(plain.walk(0x1010, &read).1, End::Mapped { pa: 0x5010, size: 4096 });
        assert_eq!(plain.walk(0x40_0010, &read).1, End::Mapped { pa: 0x40_0010, size: 4 << 20 });
        s.cr4 = 0x20;
        let pae = scheme(&CpuState::X86(Box::new(s))).unwrap();
        let read = memory(&[(0x1000, 0x2001), (0x2000, 0x3003), (0x3008, 0x6003)]);
        assert_eq!(pae.walk(0x1abc, &read).1, End::Mapped { pa: 0x6abc, size: 4096 });
    }

    /// A table that is its own child comes to an end.
    #[test]
    fn a_tree_that_bites_its_tail() {
        let mut s = RiscvState::new(0, 0, 0);
        s.satp = 10 << 60 | 0x10;
        let scheme = scheme(&CpuState::Riscv(Box::new(s))).unwrap();
        let read = |_: u64, _: usize| Some(0x10 << 10 | 1);
        assert!(scheme.ranges(&read, 10).len() <= 11);
    }
}
