//! Steps that are more than an instruction: to the next jump, call or return.

use iced_x86::{Decoder, DecoderOptions, FlowControl};

use crate::trace::report::{Transfer, transfer};

/// What a step ends after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// Any instruction.
    Instruction,
    /// One after which execution goes on elsewhere.
    Branch,
    /// A call.
    Call,
    /// A return.
    Return,
}

impl StepKind {
    /// By its name in `step N NAME`.
    pub fn by_name(name: &str) -> Option<StepKind> {
        Some(match name {
            "insn" | "instruction" => StepKind::Instruction,
            "branch" | "jump" => StepKind::Branch,
            "call" => StepKind::Call,
            "return" => StepKind::Return,
            _ => return None,
        })
    }

    /// Whether the instruction that `bytes` begin with, at `before`, ends such a step: `after` is where execution
    /// goes on. `bits` is 0 for RISC-V.
    pub fn ends(self, bytes: &[u8], bits: u8, before: u64, after: u64) -> bool {
        let len = length(bytes, bits);
        let Some(insn) = bytes.get(..len) else { return self == StepKind::Instruction };
        match self {
            StepKind::Instruction => true,
            // One round of a repeated instruction is no jump.
            StepKind::Branch => after != before.wrapping_add(len as u64) && (after != before || jumps(insn, bits)),
            StepKind::Call => transfer(insn, &[len as u8], bits) == Transfer::Call,
            StepKind::Return => transfer(insn, &[len as u8], bits) == Transfer::Return,
        }
    }
}

/// Bytes of the first instruction.
fn length(bytes: &[u8], bits: u8) -> usize {
    match (bits, bytes.first()) {
        (0, Some(first)) => 2 + 2 * usize::from(first & 3 == 3),
        (0, None) => 0,
        _ => Decoder::new(bits.into(), bytes, DecoderOptions::NONE).decode().len(),
    }
}

fn jumps(insn: &[u8], bits: u8) -> bool {
    bits == 0 || Decoder::new(bits.into(), insn, DecoderOptions::NONE).decode().flow_control() != FlowControl::Next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        let (nop, ret) = ([0x13, 0, 0, 0], [0x82, 0x80, 0, 0]);
        assert!(!StepKind::Branch.ends(&nop, 0, 0x100, 0x104));
        assert!(StepKind::Branch.ends(&nop, 0, 0x100, 0x40), "a trap leads elsewhere");
        assert!(StepKind::Return.ends(&ret, 0, 0x100, 0x40) && !StepKind::Call.ends(&ret, 0, 0x100, 0x40));
        // rep movsb, call $+5, jmp $
        assert!(!StepKind::Branch.ends(&[0xf3, 0xa4], 64, 0x10, 0x10));
        assert!(StepKind::Call.ends(&[0xe8, 0, 0, 0, 0], 64, 0x10, 0x15));
        assert!(StepKind::Branch.ends(&[0xeb, 0xfe], 64, 0x10, 0x10));
        assert!(!StepKind::Call.ends(&[], 64, 0, 0) && StepKind::Instruction.ends(&[], 0, 0, 0));
        assert_eq!(StepKind::by_name("call"), Some(StepKind::Call));
    }
}
