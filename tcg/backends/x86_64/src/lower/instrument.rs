//! Instrumentation: counting instructions and writing the trace. In the middle of a block it leaves the host's flags
//! and `rax` alone (`mov` and `lea` only); at its entry nobody has anything in either.

use super::{Cold, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, R14, R15, Rm};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::Val;
use mimus_tcg_ir::backend::trace;

impl Lower<'_> {
    fn env_rm(&self, offset: i32) -> Rm {
        Rm::Env(self.be.env(offset))
    }

    pub(super) fn count_insns(&mut self, insns: u16, total: u16) {
        self.counting = true;
        self.insn.left = insns.saturating_sub(1);
        let budget = self.env_rm(self.be.config.env.budget);
        if total != 0 {
            self.asm.alu_rm_i(Alu::Cmp, false, budget, total.into());
            let from = self.asm.jcc(Cc::L);
            self.put_off(Cold::Budget { from });
            self.asm.alu_rm_i(Alu::Sub, false, budget, insns.into());
        } else {
            self.asm.mov_r_rm(false, R14, budget);
            self.asm.lea(false, R14, R14, -i32::from(insns));
            self.asm.mov_rm_r(false, budget, R14);
        }
        self.cached = self.last;
    }

    /// Before a call of a helper: tells it what has been counted too early.
    pub(super) fn note_left(&mut self) {
        if self.counting {
            let left = self.env_rm(self.be.config.env.count_left);
            self.asm.mov_rm_i(false, left, self.insn.left.into());
        }
    }

    /// Leaves for careful execution of `insn`, of which nothing has been done.
    pub(super) fn leave_carefully(&mut self, insn: Insn) {
        if self.counting && insn.len != 0 {
            let budget = self.env_rm(self.be.config.env.budget);
            self.asm.alu_rm_i(Alu::Add, false, budget, i32::from(insn.left) + 1);
        }
        self.exit_at(insn.pc, self.be.stubs.careful);
    }

    /// `r14` = where the trace goes on.
    fn trace_next(&mut self) {
        let next = self.env_rm(self.be.config.env.trace_next);
        self.asm.mov_r_rm(true, R14, next);
    }

    /// The trace goes on `bytes` behind `r14`.
    fn trace_on(&mut self, bytes: i32) {
        let next = self.env_rm(self.be.config.env.trace_next);
        self.asm.lea(true, R14, R14, bytes);
        self.asm.mov_rm_r(true, next, R14);
    }

    pub(super) fn trace_block(&mut self, id: u32, entry: bool) {
        let env = &self.be.config.env;
        let (limit, page, page_base) =
            (self.env_rm(env.trace_limit), self.env_rm(env.trace_page), self.env_rm(env.page_base));
        if entry {
            let again = self.asm.pos();
            self.trace_next();
            self.asm.alu_r_rm(Alu::Cmp, true, R14, limit);
            let full = self.asm.jcc(Cc::A);
            self.put_off(Cold::TraceFull { from: full, back: again });
            self.asm.mov_r_rm(true, R15, page_base);
            self.asm.alu_r_rm(Alu::Cmp, true, R15, page);
            let other = self.asm.jcc(Cc::Ne);
            let back = self.asm.pos();
            self.put_off(Cold::TracePage { from: other, back });
        } else {
            self.trace_next();
        }
        dynasm!(self.asm ; .arch x64 ; mov DWORD [r14], id as i32);
        self.trace_on(4);
        self.cached = self.last;
    }

    /// The buffer is taken away; then the block begins again.
    pub(super) fn trace_full(&mut self, from: Fixup, back: u32) {
        self.asm.bind(from);
        self.asm.call_abs(self.be.stubs.trace_full);
        self.asm.jmp_back(back);
    }

    /// Writes the page in `r15`.
    pub(super) fn trace_page(&mut self, from: Fixup, back: u32) {
        self.asm.bind(from);
        let page = self.env_rm(self.be.config.env.trace_page);
        self.asm.mov_rm_r(true, page, R15);
        dynasm!(self.asm ; .arch x64
            ; mov DWORD [r14], trace::PAGE as i32
            ; mov [r14 + 4], r15
            ; lea r14, [r14 + 12]
        );
        self.asm.jmp_back(back);
    }

    /// The address is behind the trace's end until the access has been made: one that faults leaves nothing.
    pub(super) fn trace_access(&mut self, head: u32, base: Val, off: i32) {
        match self.val(base) {
            Opnd::Imm(imm) => {
                let at = self.constant_address(imm, off);
                self.asm.mov_ri(R15, at);
            }
            from => {
                let reg = self.in_reg(from, R15);
                if off != 0 {
                    self.asm.lea(!self.narrow, R15, reg, off);
                } else {
                    self.mov(R15, Opnd::Reg(reg));
                }
            }
        }
        self.trace_next();
        dynasm!(self.asm ; .arch x64
            ; mov DWORD [r14], head as i32
            ; mov [r14 + 4], r15
        );
        self.cached = self.last;
    }

    pub(super) fn trace_value(&mut self, value: Option<Val>) {
        match value.map(|value| self.val(value)) {
            None => {
                self.trace_next();
                self.trace_on(12);
            }
            Some(value) => {
                self.trace_next();
                let place = Rm::Mem { base: R14, index: None, disp: 12 };
                let reg = self.in_reg(value, R15);
                self.asm.mov_rm_r(true, place, reg);
                self.trace_on(20);
            }
        }
        self.cached = self.last;
    }
}
