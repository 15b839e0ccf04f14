//! Sequences: items that can be left out one by one, each a few instructions at any address.

use iced_x86::{Decoder, Formatter, Instruction, NasmFormatter, OpKind, Register};
use mimus_arch::x86::regs::RFLAGS_OF;
use mimus_tcg_frontend_x86::decode::maker_options;

use crate::regs::ARITHMETIC;

/// Instructions that belong together.
#[derive(Clone, Default)]
pub struct Item {
    pub bytes: Vec<u8>,
    /// Displacements from the instruction pointer, made for address 0: where they are, and their instruction.
    pub relative: Vec<(usize, usize)>,
    /// Instructions in it.
    pub count: usize,
    /// It stores an image of the x87 unit, and then clears what processors store differently.
    pub image: bool,
    /// 32-bit addresses in 32-bit code: where they are, and which place in the item each is of.
    pub absolute: Vec<(usize, usize)>,
    /// Its first instruction may skip the rest.
    pub skips: bool,
    /// Registers that have random values inside of it.
    pub random: Vec<usize>,
    /// It may lead to where nothing is.
    pub leaves: bool,
    /// It changes instructions of its own.
    pub modifies: bool,
}

impl Item {
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.count += 1;
    }
}

/// A sequence, for code of `bits` bits, at `start`.
#[derive(Clone)]
pub struct Sequence {
    pub bits: u32,
    pub start: u64,
    pub items: Vec<Item>,
}

impl Sequence {
    /// Its bytes: a NOP ends it, so that a trap of the last instruction comes before the end.
    pub fn code(&self) -> Vec<u8> {
        let mut code = Vec::new();
        for item in &self.items {
            let at = code.len();
            code.extend(&item.bytes);
            for &(offset, insn) in &item.relative {
                let place = &mut code[at + offset..at + offset + 4];
                let old = u32::from_le_bytes([place[0], place[1], place[2], place[3]]);
                place.copy_from_slice(&old.wrapping_sub((self.start + (at + insn) as u64) as u32).to_le_bytes());
            }
            for &(offset, target) in &item.absolute {
                let address = self.start as u32 + (at + target) as u32;
                code[at + offset..at + offset + 4].copy_from_slice(&address.to_le_bytes());
            }
        }
        code.push(0x90);
        code
    }

    /// The instructions, and the item of each.
    pub fn itemised(&self) -> Vec<(Instruction, &Item)> {
        let mut end = self.start;
        let ends = self.items.iter().map(|item| {
            end += item.bytes.len() as u64;
            (end, item)
        });
        let mut ends = ends.peekable();
        let mut all = Vec::new();
        for insn in self.instructions() {
            while ends.next_if(|(end, _)| *end <= insn.ip()).is_some() {}
            let Some(&(_, item)) = ends.peek() else { break };
            all.push((insn, item));
        }
        all
    }

    fn instructions(&self) -> Vec<Instruction> {
        let code = self.code();
        let mut decoder = Decoder::with_ip(self.bits, &code, self.start, maker_options(crate::select::host_is_amd()));
        let mut all = Vec::new();
        while decoder.can_decode() {
            let insn = decoder.decode();
            let bad = insn.is_invalid();
            all.push(insn);
            if bad {
                break;
            }
        }
        all
    }

    /// As assembly, with bytes.
    pub fn print(&self) -> String {
        let code = self.code();
        let mut text = format!("bits {}\n", self.bits);
        let mut formatter = NasmFormatter::new();
        for insn in self.instructions() {
            let at = (insn.ip() - self.start) as usize;
            let end = (at + insn.len().max(1)).min(code.len());
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            let bytes: Vec<String> = code[at..end].iter().map(|b| format!("{b:02x}")).collect();
            text += &format!("{:08x}  {line:<48} ; {} {:?}\n", insn.ip(), bytes.join(" "), insn.code());
        }
        text
    }

    /// Whether control or status of the x87 unit is loaded.
    pub fn loads_x87(&self) -> bool {
        use iced_x86::Mnemonic as M;
        self.instructions().iter().any(|i| matches!(i.mnemonic(), M::Fldcw | M::Fldenv | M::Frstor))
    }

    /// Whether the instruction at an address has a memory operand.
    pub fn has_operand(&self, address: u64) -> bool {
        let insn = self.instructions().into_iter().find(|i| i.ip() == address);
        insn.is_some_and(|i| (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory))
    }

    /// Whether a data segment register is loaded.
    pub fn loads_segments(&self) -> bool {
        use iced_x86::Mnemonic as M;
        self.instructions().iter().any(|i| {
            let register = i.op_count() > 0 && i.op_register(0).is_segment_register();
            crate::select::loads_far(i.mnemonic()) || register && matches!(i.mnemonic(), M::Mov | M::Pop)
        })
    }

    /// Whether the instruction at `regs.rip` adds the base of FS or GS to an address that is not canonical (with 48
    /// bits). AMD's processors refuse that, measured; the SDM asks it of the sum only (volume 1 section 3.3.7.1).
    pub fn based_from_outside(&self, regs: &crate::regs::Regs) -> bool {
        let Some(insn) = self.instructions().into_iter().find(|i| i.ip() == regs.rip) else { return false };
        let based = |r| matches!(r, Register::FS | Register::GS);
        if self.bits != 64 || !based(insn.memory_segment()) {
            return false;
        }
        let value = |r: Register| match r {
            Register::ES | Register::CS | Register::SS | Register::DS | Register::FS | Register::GS => Some(0),
            r if r.is_gpr() && r.size() >= 4 => {
                let value = regs.gpr[r.full_register().number()];
                Some(if r.size() == 8 { value } else { value & 0xffff_ffff })
            }
            _ => None,
        };
        let operands = 0..insn.op_count();
        let outside = |va: u64| (va as i64) << 16 >> 16 != va as i64;
        operands.filter_map(|n| insn.virtual_address(n, 0, |r, _, _| value(r))).any(outside)
    }

    /// Registers with random values when the instruction at `rip` is reached.
    pub fn random(&self, rip: u64) -> &[usize] {
        let mut at = self.start;
        let inside = self.items.iter().find(|item| {
            let begin = at;
            at += item.bytes.len() as u64;
            begin < rip && rip < at
        });
        inside.map_or(&[], |item| &item.random)
    }

    /// Whether memory is what it should be when the instruction at `rip` is reached: not between an image and its
    /// clearing.
    pub fn settled(&self, rip: u64) -> bool {
        let mut at = self.start;
        !self.items.iter().any(|item| {
            let inside = at < rip && rip < at + item.bytes.len() as u64;
            at += item.bytes.len() as u64;
            inside && item.image
        })
    }

    /// Flags that the manual leaves undefined when the instruction at `rip` is reached; `None` if one was read.
    pub fn undefined(&self, rip: u64) -> Option<u64> {
        let mut undefined = 0;
        let mut conditional = false;
        let mut reached = false;
        // A loop may have gone through what is behind, too.
        let again =
            self.instructions().into_iter().filter(|i| i.near_branch_target() != 0 && i.near_branch_target() <= rip);
        let loops_to = again.map(|i| i.ip()).filter(|&ip| ip >= rip).max();
        for (i, item) in self.itemised() {
            if rflags(i.rflags_read()) & undefined != 0 {
                return None;
            }
            reached |= i.ip() == rip;
            if reached {
                if loops_to.is_none_or(|end| i.ip() > end) {
                    break;
                }
                conditional = true;
            }
            // No flags tell what the result is.
            if undefined_result(&i) {
                return None;
            }
            // A count of zero, which only the run shows, changes nothing; nor may what has been changed.
            conditional |= item.modifies;
            conditional |= !matches!(i.flow_control(), iced_x86::FlowControl::Next | iced_x86::FlowControl::Exception);
            if !counted(&i) && !conditional {
                undefined &= !rflags(i.rflags_modified());
            }
            undefined |= rflags(i.rflags_undefined());
            // The decoder takes a count that is a multiple of the width and CF for none.
            if matches!(i.mnemonic(), iced_x86::Mnemonic::Rcl | iced_x86::Mnemonic::Rcr) {
                undefined |= RFLAGS_OF;
            }
            if matches!(
                i.mnemonic(),
                iced_x86::Mnemonic::Pushf | iced_x86::Mnemonic::Pushfd | iced_x86::Mnemonic::Pushfq
            ) && undefined != 0
            {
                return None;
            }
        }
        Some(undefined & ARITHMETIC)
    }
}

/// Whether an instruction may have a result that the manual leaves undefined: SHLD and SHRD of 16 bits by more.
fn undefined_result(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    let by = if i.op2_kind() == OpKind::Immediate8 { i.immediate8() & 31 } else { 31 };
    matches!(i.mnemonic(), M::Shld | M::Shrd) && i.op1_register().size() == 2 && by > 16
}

fn counted(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(i.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd)
        || i.is_string_instruction()
}

/// RFLAGS bits of iced's.
fn rflags(iced: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    use mimus_arch::x86::regs::*;
    let bits = [
        (B::OF, RFLAGS_OF),
        (B::SF, RFLAGS_SF),
        (B::ZF, RFLAGS_ZF),
        (B::AF, RFLAGS_AF),
        (B::CF, RFLAGS_CF),
        (B::PF, RFLAGS_PF),
    ];
    bits.iter().filter(|(b, _)| iced & b != 0).fold(0, |m, (_, f)| m | f)
}
