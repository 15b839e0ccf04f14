//! Where the flags are: in the [`FLAGS`] slot or in the host's own.

use super::Lower;
use super::flagged::needs_flags;
use crate::asm::{Alu, Map, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::flags::{FLAGS, Flags};
use mimus_tcg_ir::verify::flags_written;
use mimus_tcg_ir::{Op, Slot, Val};

/// The bits of the slot that hold a set of flags.
fn slot_bits(mask: Flags) -> i32 {
    mask.pack() as i32 & !0x200
}

impl Lower<'_> {
    /// Displacement of the slot.
    pub(super) fn flags_disp(&self) -> i32 {
        self.be.slot_disp(FLAGS)
    }

    /// Before an operation: the flags it needs to the host's. Clobbers `rax`.
    pub(super) fn flags_for(&mut self, op: &Op) {
        if needs_flags(op) {
            self.restore_flags();
        }
    }

    /// After an operation, its result in place: the flags it set to the slot. Clobbers `rax`.
    pub(super) fn flags_from(&mut self, op: &Op) {
        if !flags_written(op).0.is_empty() {
            self.save_flags();
        }
    }

    /// The host's flags from the slot. Clobbers `rax`.
    pub(super) fn restore_flags(&mut self) {
        let disp = self.flags_disp();
        // 127 + 1 overflows.
        dynasm!(self.asm ; .arch x64
            ; movzx eax, WORD [rbp + disp]
            ; add al, 127
            ; sahf
        );
    }

    /// The host's flags to the slot. Clobbers `rax`.
    pub(super) fn save_flags(&mut self) {
        let disp = self.flags_disp();
        dynasm!(self.asm ; .arch x64
            ; lahf
            ; seto al
            ; mov [rbp + disp], ax
        );
    }

    pub(super) fn get_flags(&mut self, d: Slot) {
        let disp = self.flags_disp();
        dynasm!(self.asm ; .arch x64
            ; movzx r14d, BYTE [rbp + disp]
            ; shl r14d, 11
            ; movzx eax, BYTE [rbp + disp + 1]
            ; and eax, 0xd5
            ; or eax, r14d
        );
        self.set(d, RAX);
    }

    pub(super) fn set_flags(&mut self, a: Val, mask: Flags) {
        let disp = self.flags_disp();
        let bits = slot_bits(mask);
        if let Val::Imm(imm) = a {
            let value = slot_bits(Flags::from_eflags(imm as u64)) & bits;
            if bits != value {
                dynasm!(self.asm ; .arch x64 ; and DWORD [rbp + disp], !bits | value);
            }
            if value != 0 {
                dynasm!(self.asm ; .arch x64 ; or DWORD [rbp + disp], value);
            }
            return;
        }
        let a = self.home_val(a);
        self.mov(R14, a);
        dynasm!(self.asm ; .arch x64
            ; mov r15d, r14d
            ; shr r15d, 11
            ; and r15d, 1
            ; shl r14d, 8
            ; or r14d, r15d
        );
        self.asm.alu_rm_i(Alu::And, false, Rm::Reg(R14), bits);
        self.asm.mov_r_rm(false, R15, Rm::Env(disp));
        self.asm.alu_rm_i(Alu::And, false, Rm::Reg(R15), !bits);
        self.asm.alu_r_rm(Alu::Or, false, R15, Rm::Reg(R14));
        self.asm.mov_rm_r(false, Rm::Env(disp), R15);
    }

    pub(super) fn flip_flags(&mut self, mask: Flags) {
        let place = Rm::Env(self.flags_disp());
        self.asm.ins(Map::Base, false, 0x81, Alu::Xor as u8, place);
        self.asm.push_i32(slot_bits(mask));
    }
}
