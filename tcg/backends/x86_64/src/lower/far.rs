//! Indirect jumps of hot code that lead to other pages.

use super::control::Unchecked;
use super::{Cold, Insn, Lower};
use crate::asm::{Alu, Cc, Fixup, R14, R15, RAX, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{ContextLayout, Optimise};

/// Where an indirect jump of hot code is expected to lead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// Into its own page; a jump entry that counts when it does not.
    Near(Option<u32>),
    /// To one place in another page: what a jump entry says.
    Far(u32),
    /// To many.
    Strays,
}

impl Lower<'_> {
    /// What has been found out about the jump being lowered.
    pub(super) fn way_of_jump(&self) -> Way {
        let hints = &self.info.hints;
        let listed = |list: &[u16]| list.iter().any(|&pc| i32::from(pc) == self.insn.pc.0);
        if listed(&hints.strays) {
            return Way::Strays;
        }
        let is_far = listed(&hints.far);
        match self.be.config.optimise {
            Optimise::Off | Optimise::Compact => Way::Near(None),
            // For tests: one kind and the other.
            Optimise::Forced => match self.be.new_jump(true) {
                jump if jump.is_multiple_of(2) => Way::Far(jump),
                jump => Way::Near(Some(jump + ContextLayout::FAR_JUMPS)),
            },
            Optimise::Usual | Optimise::Tiered if is_far => Way::Far(self.be.new_jump(true)),
            Optimise::Usual | Optimise::Tiered => Way::Near(Some(self.be.new_jump(false))),
        }
    }

    fn jump_entry(&self, jump: u32) -> i32 {
        self.be.config.context.jumps + jump as i32 * ContextLayout::JUMP_BYTES as i32
    }

    /// Continues at the address in `rax`, by the jump entry if that is for it: then it has been checked, too (also
    /// an empty entry's).
    pub(super) fn jump_far(&mut self, unchecked: Option<Unchecked>, jump: u32) {
        let entry = self.jump_entry(jump);
        dynasm!(self.asm ; .arch x64 ; gs cmp rax, [DWORD entry]);
        let from = self.asm.jcc(Cc::Ne);
        let insn = self.insn;
        self.put_off(Cold::Elsewhere { from, unchecked, jump, insn });
        self.leave_if_kicked(None);
        self.asm.alu_rm_i(Alu::And, true, Rm::Reg(RAX), -4096);
        self.set_page_base(RAX);
        dynasm!(self.asm ; .arch x64
            ; gs mov r15, [DWORD entry + 8]
            ; gs mov r14d, [DWORD entry + 16]
            ; mov eax, [r15]
        );
        self.jump_to_offset();
    }

    fn set_page_base(&mut self, reg: u8) {
        let page_base = Rm::Env(self.be.env(self.be.config.env.page_base));
        self.asm.mov_rm_r(true, page_base, reg);
    }

    /// Goes to the code at offset `eax`. `r14` is the offset of its guest address in the page.
    fn jump_to_offset(&mut self) {
        let code_base = self.be.config.code_base as i32;
        dynasm!(self.asm ; .arch x64 ; add eax, code_base ; jmp rax);
    }

    /// The look-up of an indirect jump that was not found to stay in the page.
    pub(super) fn probe_behind(&mut self, from: Fixup, unchecked: Option<Unchecked>, jump: Option<u32>, insn: Insn) {
        self.asm.bind(from);
        if self.be.config.env.page_span != 0 {
            self.leave_if_kicked(unchecked);
        }
        self.counted(jump, insn, |l| l.probe(unchecked, None));
    }

    /// The look-up of one that has led elsewhere than its entry says, which is for this place now.
    pub(super) fn elsewhere(&mut self, from: Fixup, unchecked: Option<Unchecked>, jump: u32, insn: Insn) {
        self.asm.bind(from);
        self.leave_if_kicked(unchecked);
        self.counted(Some(jump), insn, |l| l.probe(unchecked, Some(jump)));
    }

    /// Continues at the address in `rax`, whose bit 0 is ignored where code is 2-aligned. The jump entry is for it then.
    pub(super) fn probe(&mut self, unchecked: Option<Unchecked>, jump: Option<u32>) {
        let (tag, table) = (self.be.config.context.exec_tag, self.be.config.context.exec_table);
        dynasm!(self.asm ; .arch x64
            ; mov r14d, eax
            ; mov r15, rax
            ; shr r14d, 12
            ; and r15, -4096
            ; gs cmp r15, [r14*8 + tag]
        );
        self.leave_for(unchecked, self.be.stubs.probe_miss);
        self.set_page_base(R15);
        dynasm!(self.asm ; .arch x64
            ; gs mov r15d, [r14*8 + table]
            ; mov r14d, eax
        );
        // A word is 4 bytes.
        match (self.be.config.code_align, jump) {
            (1, None) => dynasm!(self.asm ; .arch x64 ; and r14d, 0xfff ; mov eax, [r15 + r14*4]),
            (1, Some(_)) => dynasm!(self.asm ; .arch x64 ; and r14d, 0xfff ; lea r15, [r15 + r14*4]),
            (_, None) => dynasm!(self.asm ; .arch x64 ; and r14d, 0xffe ; mov eax, [r15 + r14*2]),
            (_, Some(_)) => dynasm!(self.asm ; .arch x64 ; and r14d, 0xffe ; lea r15, [r15 + r14*2]),
        }
        if let Some(jump) = jump {
            let (entry, jumped) = (self.jump_entry(jump), self.be.config.context.jumped);
            dynasm!(self.asm ; .arch x64
                ; gs mov [DWORD entry], rax
                ; gs mov [DWORD entry + 8], r15
                ; gs mov [DWORD entry + 16], r14d
                ; gs mov BYTE [DWORD jumped], 1
                ; mov eax, [r15]
            );
        }
        self.jump_to_offset();
    }

    /// What `go` emits, which goes on at the address in `rax`, behind a count of how often it is executed; the runtime is told when
    /// that is as often as the jump entry allows.
    fn counted(&mut self, jump: Option<u32>, insn: Insn, go: impl FnOnce(&mut Self)) {
        let Some(jump) = jump else { return go(self) };
        let patience = self.jump_entry(jump) + ContextLayout::JUMP_PATIENCE as i32;
        dynasm!(self.asm ; .arch x64 ; gs sub DWORD [DWORD patience], 1);
        let told = self.asm.jcc(Cc::B);
        let back = self.asm.pos();
        go(self);
        self.asm.bind(told);
        dynasm!(self.asm ; .arch x64 ; mov [rsp + 8], rax);
        self.asm.mov_r_rm(true, R15, Rm::Reg(RAX));
        self.asm.mov_ri(R14, i64::from(ContextLayout::jump_word(jump)));
        self.asm.call_abs(self.be.stubs.note);
        self.fault_entry(insn);
        dynasm!(self.asm ; .arch x64 ; mov rax, [rsp + 8]);
        self.asm.jmp_back(back);
    }
}
