//! Which segment an access that faulted was in.
//!
//! An address that is not canonical is `#SS(0)` by way of the stack segment and `#GP(0)` by any other (SDM volume 3
//! section 3.3.7.1, interrupts 12 and 13). Translated code in 64-bit mode knows addresses only: the instruction is looked
//! at again.

use iced_x86::{Instruction, OpKind};
use mimus_tcg_exec::frontend::Access;

use crate::decode::{MAX_LEN, decode};
use crate::exception::Exception;
use crate::frontend::X86Cpu;
use crate::host::Host;
use crate::native::asks_for_alignment;
use crate::paging;
use crate::state::SS;
use crate::translate::segment_of;

/// What the address `va`, which is not canonical, raises when the instruction at `pc` accesses it.
pub(crate) fn not_canonical(cpu: &mut X86Cpu, pc: u64, va: u64, access: Access) -> Exception {
    match instruction(cpu, pc) {
        // Alignment that an instruction asks for itself comes first.
        Some(insn)
            if asks_for_alignment(&insn, &cpu.guest.st) && !va.is_multiple_of(insn.memory_size().size() as u64) =>
        {
            Exception::GP0
        }
        Some(insn) if access != Access::Fetch && in_stack(&insn, access) => Exception::ss(0),
        _ => Exception::GP0,
    }
}

/// The instruction at `pc`, if it can be fetched and is one.
pub(crate) fn instruction(cpu: &mut X86Cpu, pc: u64) -> Option<Instruction> {
    let user = cpu.user();
    let mut bytes = [0; MAX_LEN];
    let mut have = 0;
    for (i, byte) in bytes.iter_mut().enumerate() {
        let at = cpu.wrap(pc.wrapping_add(i as u64));
        let Ok(leaf) = paging::peek(cpu, at, paging::Access::Fetch, user) else { break };
        *byte = cpu.phys_read(leaf.pa, 1) as u8;
        have += 1;
    }
    let st = &cpu.guest.st;
    let insn = decode(&bytes[..have], st.code_bits(), pc, &st.features);
    (!insn.is_invalid()).then_some(insn)
}

/// Whether the access that failed was one of the stack's.
fn in_stack(insn: &Instruction, access: Access) -> bool {
    let explicit = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let named = explicit && segment_of(insn, true) == SS;
    if !insn.is_stack_instruction() {
        return named;
    }
    // Of PUSH and CALL the stack is what is stored to; of POP it is what is loaded from.
    let pushes = insn.stack_pointer_increment() < 0;
    if !explicit || pushes == (access == Access::Store) { true } else { named }
}
