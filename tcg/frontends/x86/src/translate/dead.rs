//! Which flags nobody looks at where a block is left: found by looking at the code there.
//!
//! Only instructions on registers are looked at: those before which nothing can happen that shows the flags, but an
//! interrupt, whose handler puts them back. What is looked at becomes part of what the block was made from.

use iced_x86::{Instruction, Mnemonic, OpKind};
use mimus_tcg_exec::frontend::CodeWindow;
use mimus_tcg_ir::flags::{Flags, read_by};
use mimus_tcg_ir::verify::uses_flags;
use mimus_tcg_ir::{Block, Op, PagePc};

use super::moves::{condition, is_cmov, is_setcc};
use crate::cpuid::Features;
use crate::decode::{MAX_LEN, decode, decoder, fetch, to_model};

/// Most instructions to look at.
const DEPTH: usize = 4;

/// Says at the block's exits within the page which flags are dead there.
pub(super) fn mark(block: &mut Block, code: CodeWindow<'_>, bits: u32, features: &Features) {
    if !block.ops.iter().any(uses_flags) {
        return;
    }
    let mut granules = 0;
    let mut known: [(i32, Flags); 4] = [(-1, Flags::NONE); 4];
    let mut look = |to: PagePc| {
        if let Some((_, dead)) = known.iter().find(|(at, _)| *at == to.0) {
            return *dead;
        }
        let (dead, seen) = dead_at(code, to, bits, features);
        granules |= seen;
        known.rotate_right(1);
        known[0] = (to.0, dead);
        dead
    };
    for op in &mut block.ops {
        if let Op::BranchF { to, dead, .. } = op {
            *dead = look(*to);
        }
    }
    if let Some(Op::Jump { to }) = block.ops.last().copied() {
        let mask = look(to);
        if !mask.is_empty() {
            block.ops.insert(block.ops.len() - 1, Op::DeadFlags { mask });
        }
    }
    block.granules |= granules;
}

/// The flags that are dead at `to`, and the granules of the page that say so.
fn dead_at(code: CodeWindow<'_>, to: PagePc, bits: u32, features: &Features) -> (Flags, u64) {
    let (mut dead, mut read, mut seen) = (Flags::NONE, Flags::NONE, 0);
    let mut at = to;
    if !to.same_page() {
        return (dead, seen);
    }
    let within = code.page_from(to.0 as u16);
    let mut decoder = decoder(within, bits, to.0 as u64, features);
    let mut insn = Instruction::default();
    for _ in 0..DEPTH {
        if !at.same_page() {
            break;
        }
        let done = (at.0 - to.0) as usize;
        match within.get(done..done + MAX_LEN) {
            Some(bytes) => {
                decoder.decode_out(&mut insn);
                to_model(&mut insn, bytes, bits, features);
            }
            None => {
                let mut bytes = [0; MAX_LEN];
                let have = fetch(code, at.0 as u32, &mut bytes);
                insn = decode(&bytes[..have], bits, at.0 as u64, features);
            }
        }
        let next = PagePc(at.0 + insn.len() as i32);
        if insn.is_invalid() || next.0 > 4096 || insn.has_lock_prefix() {
            break;
        }
        let on_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
        if on_memory && insn.mnemonic() != Mnemonic::Lea {
            break;
        }
        let Some((reads, kills)) = effect(&insn) else { break };
        for granule in at.0 / 64..=(next.0 - 1) / 64 {
            seen |= 1 << granule;
        }
        read = read.union(reads.without(dead));
        dead = dead.union(kills.without(read));
        if dead.union(read) == Flags::ALL {
            break;
        }
        at = next;
    }
    (dead, if dead.is_empty() { 0 } else { seen })
}

/// The flags that an instruction on registers reads, and those that it sets whatever its operands are; `None`: not to
/// be looked at, or past.
fn effect(insn: &iced_x86::Instruction) -> Option<(Flags, Flags)> {
    use Mnemonic as M;
    let plain = |i: u32| {
        let r = insn.op_register(i);
        insn.op_kind(i) != OpKind::Register || r.is_gpr()
    };
    if !(0..insn.op_count()).all(plain) {
        return None;
    }
    let masked = if insn.op_count() > 0 && insn.op_register(0).size() == 8 { 63 } else { 31 };
    Some(match insn.mnemonic() {
        M::Add | M::Sub | M::Cmp | M::Test | M::And | M::Or | M::Xor | M::Neg => (Flags::NONE, Flags::ALL),
        M::Shl | M::Shr | M::Sar
            if insn.op_kind(1) == OpKind::Immediate8 && u32::from(insn.immediate8()) & masked != 0 =>
        {
            (Flags::NONE, Flags::ALL)
        }
        M::Inc | M::Dec => (Flags::NONE, Flags::ALL.without(Flags::CF)),
        M::Adc | M::Sbb => (Flags::CF, Flags::ALL),
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Not | M::Nop | M::Endbr32 | M::Endbr64 => {
            (Flags::NONE, Flags::NONE)
        }
        m if is_cmov(m) || is_setcc(m) => (read_by(condition(insn.condition_code())?), Flags::NONE),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::{CpuModel, GuestArch};

    fn dead(code: &[u8]) -> (Flags, u64) {
        let CpuModel::X86(model) = CpuModel::parse(GuestArch::X86_64, "max").unwrap() else { unreachable!() };
        let features = Features::new(&model, 0);
        let mut page = [0xcc; 4096];
        page[0x3e..0x3e + code.len()].copy_from_slice(code);
        dead_at(CodeWindow::new(&page, None), PagePc(0x3e), 32, &features)
    }

    #[test]
    fn the_code_ahead_says_what_is_dead() {
        // cmp eax, ebx
        assert_eq!(dead(&[0x39, 0xd8]), (Flags::ALL, 1));
        // mov eax, ebx; cmp eax, ebx: the second granule too
        assert_eq!(dead(&[0x89, 0xd8, 0x39, 0xd8]), (Flags::ALL, 3));
        // inc eax; int3
        assert_eq!(dead(&[0x40]).0, Flags::ALL.without(Flags::CF));
        // adc eax, ebx
        assert_eq!(dead(&[0x11, 0xd8]).0, Flags::ALL.without(Flags::CF));
        // setz al; add eax, ebx
        assert_eq!(dead(&[0x0f, 0x94, 0xc0, 0x01, 0xd8]).0, Flags::ALL.without(Flags::ZF));
        // shl eax, 3; shl eax, 32; shl eax, cl
        assert_eq!(dead(&[0xc1, 0xe0, 3]).0, Flags::ALL);
        assert_eq!(dead(&[0xc1, 0xe0, 32]).0, Flags::NONE);
        assert_eq!(dead(&[0xd3, 0xe0]).0, Flags::NONE);
        // add eax, [ebx] may fault first; mov ds, eax is more than a move
        assert_eq!(dead(&[0x03, 0x03]), (Flags::NONE, 0));
        assert_eq!(dead(&[0x8e, 0xd8, 0x39, 0xd8]), (Flags::NONE, 0));
    }
}
