//! Jumps that a block goes on at.
//!
//! An interpreter's operations end with a jump to the place that looks for the next one, where compilers have made one of what was
//! a jump in each. A block that goes on there jumps through a register by itself: it closes no loop on its way there, and
//! the host foretells its own jump better than one that all of them share.

use iced_x86::{FlowControl, Instruction, OpKind};
use mimus_tcg_exec::frontend::CodeWindow;

use crate::cpuid::Features;
use crate::decode::{MAX_LEN, decode, fetch};

/// Most instructions from there to the jump through a register or memory.
const SHORT: usize = 8;
const PAGE: u32 = 4096;

/// If `insn` at `pc`, of a block that begins at `start` and has followed no jump, jumps to where a jump through a register or
/// memory is near: where to.
pub(super) fn dispatches(
    code: CodeWindow<'_>,
    start: u32,
    pc: u32,
    insn: &Instruction,
    bits: u32,
    features: &Features,
) -> Option<u32> {
    let wide = insn.op_kind(0) != OpKind::NearBranch16;
    if !insn.is_jmp_short_or_near() || !wide || insn.near_branch_target() >= PAGE.into() {
        return None;
    }
    let to = insn.near_branch_target() as u32;
    // Not an instruction of the block once more.
    let end = if to < start { start } else { PAGE };
    if (start..pc + insn.len() as u32).contains(&to) {
        return None;
    }
    let (mut at, mut exits) = (to, 0);
    for _ in 0..SHORT {
        let mut bytes = [0; MAX_LEN];
        let have = fetch(code, at, &mut bytes);
        let insn = decode(&bytes[..have], bits, at.into(), features);
        let next = at + insn.len() as u32;
        if insn.is_invalid() || next > end || code.has_block(at) {
            return None;
        }
        match insn.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch if exits == 0 => exits += 1,
            FlowControl::IndirectBranch => return insn.is_jmp_near_indirect().then_some(to),
            _ => return None,
        }
        at = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::{CpuModel, GuestArch};

    #[test]
    fn short_ways_to_a_jump_by_register() {
        let CpuModel::X86(model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { unreachable!() };
        let features = Features::new(&model, 0);
        let leads = |code: &[u8], start: u32| {
            let mut page = [0xcc; 4096];
            page[0x100..0x100 + code.len()].copy_from_slice(code);
            let window = CodeWindow::new(&page, None);
            // jmp 0x100
            let jump = decode(&[0xe9, 0xfb, 0xfe, 0xff, 0xff], 64, 0x200, &features);
            dispatches(window, start, 0x200, &jump, 64, &features)
        };
        // mov eax, [rbx]; cmp eax, 5; ja +2; jmp rax
        let way = [0x8b, 0x03, 0x83, 0xf8, 0x05, 0x77, 0x02, 0xff, 0xe0];
        assert_eq!(leads(&way, 0x1f0), Some(0x100));
        assert_eq!(leads(&way, 0x109), Some(0x100));
        assert_eq!(leads(&way, 0x108), None, "the jump is the block's first instruction");
        assert_eq!(leads(&way, 0x100), None, "a loop");
        // ret; call rax; jmp +0; two branches; too far
        for other in
            [&[0xc3][..], &[0xff, 0xd0], &[0xeb, 0x00, 0xff, 0xe0], &[0x77, 0, 0x77, 0, 0xff, 0xe0], &[0x90; 9]]
        {
            assert_eq!(leads(other, 0x1f0), None, "{other:x?}");
        }
    }
}
