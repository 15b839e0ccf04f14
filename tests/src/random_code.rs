//! Random RISC-V code from the decoder's own tables: any instruction with any operands, but such that a case
//! mostly runs through. Branches go forward or close counted loops; some registers are only read, so that loads
//! and stores find memory.

use mimus_tcg_frontend_riscv::decode::{PATTERNS, Pattern, find16, find32};

use crate::random::Random;
use crate::riscv::{self, reg};

/// Points into data; only read.
pub const DATA_POINTERS: [u32; 2] = [reg::SP, reg::S1];
/// Points to the case's first instruction; only read.
pub const CODE_POINTER: u32 = reg::T5;
/// Holds an instruction to write into the code; only read.
pub const PATCH: u32 = reg::T4;
/// Counts loops.
pub const COUNTER: u32 = reg::T6;

/// What can be in a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An instruction that goes on to the next.
    Plain { insn: u32, len: u8 },
    /// A conditional branch, forward over `skip` items; `half` is a `c.beqz` or `c.bnez`.
    Branch { insn: u32, skip: usize, half: bool },
    /// `jal` (or `c.j`) forward.
    Jump { rd: u32, skip: usize, half: bool },
    /// `auipc` and `jalr` forward.
    Indirect { rd: u32, skip: usize },
    /// Sets the loop counter.
    LoopStart { times: u32 },
    /// Back to `items` items before.
    LoopEnd { items: usize },
    /// Writes [`PATCH`] over the item `ahead` of it, a plain one of 4 bytes, and `fence.i`.
    Patch { ahead: usize },
}

impl Item {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Item::Plain { len, .. } => u64::from(*len),
            Item::Branch { half: true, .. } | Item::Jump { half: true, .. } => 2,
            Item::Branch { .. } | Item::Jump { .. } | Item::LoopStart { .. } => 4,
            Item::Indirect { .. } | Item::LoopEnd { .. } | Item::Patch { .. } => 8,
        }
    }

    /// Never: for clippy's sake.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Instructions that the generator makes in its own ways, or not at all: what leaves the case, and what reads
/// clocks or counters, of which each run has its own.
fn left_out(p: &Pattern) -> bool {
    const NAMES: [&str; 24] = [
        "jal",
        "beq",
        "bne",
        "blt",
        "bge",
        "bltu",
        "bgeu",
        "c.j",
        "c.beqz",
        "c.bnez",
        "c.addi16sp",
        "wrs.nto",
        "wrs.sto",
        "wfi",
        "mret",
        "sret",
        "ecall",
        "ebreak",
        "c.ebreak",
        "jalr",
        "c.jr",
        "c.jalr",
        "dret",
        "c.ret",
    ];
    p.reserved || NAMES.contains(&p.name)
}

/// CSRs that change nothing about how the case goes on.
const CSRS: [u32; 14] =
    [0x001, 0x002, 0x003, 0x140, 0x141, 0x142, 0x143, 0x340, 0x341, 0x342, 0x343, 0x301, 0xf14, 0x106];

/// Makes cases.
pub struct Generator {
    narrow: Vec<&'static Pattern>,
    wide: Vec<&'static Pattern>,
    /// Instructions that trap, rarely put in.
    leaving: Vec<&'static Pattern>,
}

impl Default for Generator {
    fn default() -> Generator {
        let of = |width| PATTERNS.iter().filter(move |p| p.width == width && !left_out(p)).collect();
        const LEAVING: [&str; 10] =
            ["mret", "sret", "ecall", "ebreak", "c.ebreak", "jalr", "c.jr", "c.jalr", "wfi", "wrs.sto"];
        let leaving = PATTERNS.iter().filter(|p| !p.reserved && LEAVING.contains(&p.name)).collect();
        Generator { narrow: of(16), wide: of(32), leaving }
    }
}

impl Generator {
    /// A case of about `n` items.
    pub fn case(&self, random: &mut Random, n: usize) -> Vec<Item> {
        let mut items = Vec::new();
        // Where an open loop began.
        let mut open = None;
        while items.len() < n {
            let skip = 1 + random.below(5) as usize;
            let rd = random.pick(&[0, 1, 1, 5, 12]);
            let half = random.one_in(2);
            let item = match random.below(40) {
                0..=2 => {
                    let insn = if half {
                        // c.beqz, c.bnez of x8 or x10 to x15
                        0xc001 | (random.below(2) as u32) << 13 | random.pick(&[0, 2, 3, 4, 5, 6, 7]) << 7
                    } else {
                        let funct3 = random.pick(&[0, 1, 4, 5, 6, 7]);
                        riscv::b(funct3, random.below(32) as u32, random.below(32) as u32, 0)
                    };
                    Item::Branch { insn, skip, half }
                }
                3 => Item::Jump { rd: if half { 0 } else { rd }, skip, half },
                4 => Item::Indirect { rd, skip },
                5 if open.is_none() => {
                    open = Some(items.len() + 1);
                    Item::LoopStart { times: 1 + random.below(6) as u32 }
                }
                5..=7 => match open.take() {
                    Some(start) if items.len() > start => Item::LoopEnd { items: items.len() - start },
                    _ => continue,
                },
                8 if random.one_in(3) => Item::Patch { ahead: skip },
                9 if random.one_in(8) => plain(random.pick(&self.leaving), random),
                10..=20 => plain(random.pick(&self.narrow), random),
                _ => plain(random.pick(&self.wide), random),
            };
            items.push(item);
        }
        if let Some(start) = open.filter(|start| items.len() > *start) {
            items.push(Item::LoopEnd { items: items.len() - start });
        }
        items
    }
}

/// Operands for a pattern.
fn plain(p: &Pattern, random: &mut Random) -> Item {
    loop {
        let mut insn = p.value | random.u64() as u32 & !p.mask;
        let free = |mask: u32| p.mask & mask == 0;
        if p.width == 32 {
            let low = insn & 0x7f;
            let memory = matches!(low, 0x03 | 0x07 | 0x23 | 0x27 | 0x2f) || p.name.starts_with("cbo");
            // Rarely from any other register, but not into the code: what is executed after a store there and before
            // `fence.i` is the processor's own affair.
            if memory && free(31 << 15) && (!random.one_in(20) || insn >> 15 & 31 == CODE_POINTER) {
                insn = insn & !(31 << 15) | random.pick(&DATA_POINTERS) << 15;
            }
            if low == 0x73 && insn >> 12 & 3 != 0 {
                insn = insn & 0x000f_ffff | random.pick(&CSRS) << 20;
            }
            // Rounding modes 5 and 6 are illegal: rarely.
            if matches!(low, 0x43 | 0x47 | 0x4b | 0x4f | 0x53) && free(7 << 12) && !random.one_in(50) {
                insn = insn & !(7 << 12) | random.pick(&[0, 1, 2, 3, 4, 7, 7, 7]) << 12;
            }
            if find32(insn, |_| true) != Some(p) || writes_reserved(insn >> 7 & 31) && !matches!(low, 0x23 | 0x27) {
                continue;
            }
        } else {
            insn &= 0xffff;
            let clobbers = match insn & 3 {
                0 => writes_reserved(8 + (insn >> 2 & 7)) && insn >> 13 < 4,
                1 => {
                    insn >> 13 >= 4 && writes_reserved(8 + (insn >> 7 & 7))
                        || insn >> 13 < 4 && writes_reserved(insn >> 7 & 31)
                }
                _ => insn >> 13 < 5 && writes_reserved(insn >> 7 & 31),
            };
            if clobbers || find16(insn as u16, |_| true) != Some(p) {
                continue;
            }
            // Register-based compressed accesses: from the one data pointer they can name.
            if insn & 3 == 0 && insn >> 13 != 0 && !random.one_in(20) && insn >> 7 & 7 != 1 {
                continue;
            }
        }
        return Item::Plain { insn, len: p.width / 8 };
    }
}

fn writes_reserved(rd: u32) -> bool {
    DATA_POINTERS.contains(&rd) || [CODE_POINTER, PATCH, COUNTER].contains(&rd)
}

/// Machine code of a case, which an `ebreak` ends.
pub fn encode(items: &[Item]) -> Vec<u8> {
    let mut starts = vec![0u64];
    for item in items {
        starts.push(starts[starts.len() - 1] + item.len());
    }
    let last = items.len();
    let at = |i: usize| starts[i.min(last)] as i32;
    let mut code = Vec::new();
    let mut put = |insn: u32, len: u64| code.extend(&insn.to_le_bytes()[..len as usize]);
    for (i, item) in items.iter().enumerate() {
        let to = |skip: usize| at(i + 1 + skip) - at(i);
        match item {
            Item::Plain { insn, len } => put(*insn, u64::from(*len)),
            Item::Branch { insn, skip, half: false } => put(insn | riscv::b_offset(to(*skip)), 4),
            Item::Branch { insn, skip, half: true } => put(insn | cb_offset(to(*skip)), 2),
            Item::Jump { rd, skip, half: false } => put(riscv::jal(*rd, to(*skip)), 4),
            Item::Jump { skip, half: true, .. } => put(0xa001 | cj_offset(to(*skip)), 2),
            Item::Indirect { rd, skip } => {
                put(0x17 | reg::RA << 7, 4);
                put(riscv::jalr(*rd, reg::RA, to(*skip)), 4);
            }
            Item::LoopStart { times } => put(riscv::addi(COUNTER, 0, *times as i32), 4),
            Item::LoopEnd { items } => {
                put(riscv::addi(COUNTER, COUNTER, -1), 4);
                // Below zero when a branch led past the start: then no more rounds.
                put(riscv::b(4, 0, COUNTER, at(i - items) - at(i) - 4), 4);
            }
            Item::Patch { ahead } => {
                let target = i + 1 + ahead;
                let plain = matches!(items.get(target), Some(Item::Plain { len: 4, .. }));
                put(if plain { riscv::sw(PATCH, CODE_POINTER, at(target)) } else { riscv::insn::NOP }, 4);
                put(riscv::insn::FENCE_I, 4);
            }
        }
    }
    put(riscv::insn::EBREAK, 4);
    code
}

/// Offset of a CB-format branch, vol. I, 27.4.
fn cb_offset(offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 8 & 1) << 12 | (o >> 3 & 3) << 10 | (o >> 6 & 3) << 5 | (o >> 1 & 3) << 3 | (o >> 5 & 1) << 2
}

/// Offset of a CJ-format jump.
fn cj_offset(offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 11 & 1) << 12
        | (o >> 4 & 1) << 11
        | (o >> 8 & 3) << 9
        | (o >> 10 & 1) << 8
        | (o >> 6 & 1) << 7
        | (o >> 7 & 1) << 6
        | (o >> 1 & 7) << 3
        | (o >> 5 & 1) << 2
}

/// The same case without item `i`: as long, so that nothing moves.
pub fn without(items: &[Item], i: usize) -> Option<Vec<Item>> {
    let nop = if items[i].len() == 2 { 1 } else { riscv::insn::NOP };
    let gone = Item::Plain { insn: nop, len: items[i].len().min(4) as u8 };
    if items[i] == gone || items[i].len() == 8 {
        return None;
    }
    let mut fewer = items.to_vec();
    fewer[i] = gone;
    Some(fewer)
}
