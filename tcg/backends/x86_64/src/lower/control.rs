//! Jumps, exits, calls of helpers, and what leaves a block.

use super::far::Way;
use super::flags::Routine;
use super::loops::Homed;
use super::{Cold, Fixups, Insn, Lower, Opnd};
use crate::asm::{Alu, Cc, Fixup, Map, R14, R15, RAX, Rm, Shift};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::{LinkSite, pack_insn};
use mimus_tcg_ir::flags::Flags;
use mimus_tcg_ir::{AluOp, CallKind, Cond, JumpHint, Op, PagePc, Slot, Ty, Val};

/// The host's condition behind a compare.
fn cc_of(cond: Cond) -> Cc {
    match cond {
        Cond::Eq => Cc::E,
        Cond::Ne => Cc::Ne,
        Cond::LtS => Cc::L,
        Cond::GeS => Cc::Ge,
        Cond::LtU => Cc::B,
        Cond::GeU => Cc::Ae,
    }
}

/// An indirect jump whose target is checked only where no page of code is found there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unchecked {
    insn: Insn,
    /// Bits of an address.
    bits: u8,
    /// What the instruction has added to a register before it jumps.
    added: Option<(Slot, i32)>,
}

impl Lower<'_> {
    /// Checks that the page after the block's own is the one that its last instruction's tail is from.
    pub(super) fn entry_guard(&mut self, guard: u32) {
        let (tag, table) = (self.be.config.context.exec_tag, self.be.config.context.exec_table);
        self.page_va(RAX, PagePc(4096));
        dynasm!(self.asm ; .arch x64
            ; mov r14d, eax
            ; shr r14d, 12
            ; gs cmp rax, [r14*8 + tag]
        );
        let mut from = Fixups::one(self.asm.jcc(Cc::Ne));
        dynasm!(self.asm ; .arch x64 ; gs cmp DWORD [r14*8 + table], guard as i32);
        from.add(self.asm.jcc(Cc::Ne));
        let insn = Insn { pc: self.start, len: 0, left: 0 };
        self.put_off(Cold::Careful { from, insn, flags: Routine::NONE });
    }

    /// `cmp dword [kick], 0`.
    pub(super) fn test_kick(&mut self) {
        let kick = Rm::Env(self.be.env(self.be.config.env.kick));
        self.asm.alu_rm_i(Alu::Cmp, false, kick, 0);
    }

    /// Goes to `exit`, which takes an address in `rax`, with that of `pc`.
    pub(super) fn exit_at(&mut self, pc: PagePc, exit: usize) {
        if self.compact {
            // The stub before it takes an offset.
            self.asm.mov_ri(RAX, i64::from(pc.0 as u32));
            self.asm.jmp_abs(self.be.stubs.with_offset(exit));
            return;
        }
        self.page_va(RAX, pc);
        self.asm.jmp_abs(exit);
    }

    /// Whether a jump to `to` closes a loop, and so must notice the kick word.
    fn is_backward(&self, to: PagePc) -> bool {
        to <= self.insn.pc || self.went_back
    }

    /// Whether it may close one only because the block has gone back before: mostly it leads out of it.
    fn is_ahead(&self, to: PagePc) -> bool {
        to > self.insn.pc && !self.is_self(to) && self.went_back && !self.compact
    }

    /// Whether `to` is the block itself.
    fn is_self(&self, to: PagePc) -> bool {
        to == self.start && to.same_page()
    }

    pub(super) fn branch(&mut self, cond: Cond, a: Val, b: Val, to: PagePc) {
        let known = match (cond, a, b) {
            (Cond::Ne | Cond::Eq, Val::Slot(d), Val::Imm(0)) => self.still_compared(d),
            _ => None,
        };
        let cc = match known {
            Some(cc) => {
                if cond == Cond::Ne {
                    cc
                } else {
                    cc.invert()
                }
            }
            None => {
                let cc = self.compare(cc_of(cond), a, b);
                self.flags_lost();
                cc
            }
        };
        // A compare leaves every register alone.
        self.cached = self.last;
        if !self.loop_branch(cc, to, Flags::ALL) {
            self.branch_on(cc, to);
        }
    }

    /// A side exit if the host's flags are so.
    pub(super) fn branch_on(&mut self, cc: Cc, to: PagePc) {
        if self.branch_past_flags(cc, to) {
            // The flags come first.
        } else if self.homed != Homed::Not {
            let from = self.asm.jcc(cc);
            self.put_off(Cold::LeaveLoop { from, to });
        } else if !to.same_page() {
            let from = self.asm.jcc(cc);
            self.put_off(Cold::Cross { from, to });
        } else if self.is_ahead(to) {
            let from = self.asm.jcc(cc);
            self.put_off(Cold::Ahead { from, to });
        } else if self.is_backward(to) || self.is_self(to) {
            let over = self.asm.jcc(cc.invert());
            let in_host = self.flagged && self.flags.has_in_host(Flags::ALL);
            if !(self.is_self(to) && self.jump_round(in_host)) {
                self.jump_back(to);
            }
            self.asm.bind(over);
        } else {
            self.asm.pad_jump(2);
            let site = self.asm.jcc(cc);
            self.link_site(Fixups::default(), site, u32::MAX, to);
        }
    }

    /// The same, with the flags going to their slot on that side.
    pub(super) fn branch_and_save(&mut self, cc: Cc, to: PagePc) {
        let back = to.same_page() && (self.is_backward(to) || self.is_self(to));
        if self.compact && !back && self.flags.has_in_host(Flags::ALL) {
            // Fewer bytes than a way of its own; saving them leaves the host's alone.
            self.save_flags();
            return self.branch_on(cc, to);
        }
        if self.homed == Homed::Not && back && !self.is_ahead(to) {
            let over = self.asm.jcc(cc.invert());
            self.save_at_exit();
            if !(self.is_self(to) && self.jump_round(true)) {
                self.jump_back(to);
            }
            self.asm.bind(over);
        } else {
            let from = self.asm.jcc(cc);
            self.put_off(Cold::SaveAndGo { from, to });
        }
    }

    /// The taken side of a branch for which flags are saved.
    pub(super) fn save_and_go(&mut self, from: Fixup, to: PagePc) {
        self.asm.bind(from);
        self.save_at_exit();
        if self.homed != Homed::Not {
            self.leave_homes();
            self.have_homes(Homed::Not);
            self.jump(to);
        } else if !to.same_page() {
            self.cross_page(to);
        } else if self.went_back {
            self.jump_back(to);
        } else {
            self.site_jump(to);
        }
    }

    /// A jump that closes a loop.
    pub(super) fn jump_back(&mut self, to: PagePc) {
        self.test_kick();
        if self.is_self(to) {
            self.asm.jcc_back(Cc::E, 0);
            let from = self.asm.jmp();
            self.put_off(Cold::Kick { from, to, flags: Routine::NONE });
        } else {
            let from = self.asm.jcc(Cc::Ne);
            self.put_off(Cold::Kick { from, to, flags: Routine::NONE });
            self.site_jump(to);
        }
    }

    /// A linkable jump within the page.
    fn site_jump(&mut self, to: PagePc) {
        self.asm.pad_jump(1);
        let site = self.asm.jmp();
        self.link_site(Fixups::default(), site, u32::MAX, to);
    }

    fn link_site(&mut self, from: Fixups, site: Fixup, guard: u32, to: PagePc) {
        self.put_off(Cold::Link { from, site, guard, to });
    }

    /// The cold code of a link site, entered at `unlinked` from the jump and by `from` from its checks.
    pub(super) fn unlinked(&mut self, from: Fixups, site: Fixup, guard: u32, to: PagePc) {
        self.asm.bind(site);
        let unlinked = self.asm.pos();
        if guard != u32::MAX {
            // The page has been entered already: another thread unlinked the jump after its guard was passed.
            let page_base = Rm::Env(self.be.env(self.be.config.env.page_base));
            self.asm.alu_rm_i(Alu::Add, true, page_base, (to.0 & !0xfff).wrapping_neg());
        }
        self.bind(from);
        self.asm.call_abs(self.be.stubs.link);
        let return_offset = self.asm.pos();
        self.info.sites.push(LinkSite { patch: site.0, unlinked, return_offset, guard, to });
    }

    pub(super) fn jump(&mut self, to: PagePc) {
        if !to.same_page() {
            self.cross_page(to);
        } else if self.is_backward(to) || self.is_self(to) {
            self.jump_back(to);
        } else {
            self.site_jump(to);
        }
    }

    /// A linkable jump to another page: taken if the context still maps that page to the entry table that the
    /// link was made for.
    pub(super) fn cross_page(&mut self, to: PagePc) {
        if self.compact {
            return self.compact_cross(to);
        }
        let page_base = self.be.env(self.be.config.env.page_base);
        let (tag, table) = (self.be.config.context.exec_tag, self.be.config.context.exec_table);
        self.page_va(RAX, PagePc(to.0 & !0xfff));
        dynasm!(self.asm ; .arch x64
            ; mov r14d, eax
            ; shr r14d, 12
            ; gs cmp rax, [r14*8 + tag]
        );
        let mut from = Fixups::one(self.asm.jcc(Cc::Ne));
        // gs cmp dword [r14*8 + table], 0 with the constant, the guard, aligned.
        self.asm.pad_nop(9);
        for byte in [0x65, 0x42, 0x81, 0x3c, 0xf5] {
            self.asm.push(byte);
        }
        self.asm.push_i32(table);
        let guard = self.asm.pos();
        self.asm.push_i32(0);
        from.add(self.asm.jcc(Cc::Ne));
        self.test_kick();
        let kicked = self.asm.jcc(Cc::Ne);
        self.put_off(Cold::Kick { from: kicked, to, flags: Routine::NONE });
        self.asm.mov_rm_r(true, Rm::Env(page_base), RAX);
        self.asm.pad_jump(1);
        let site = self.asm.jmp();
        self.link_site(from, site, guard, to);
    }

    /// Indirect jump: the context's code arrays give the page's entry table, which gives the code.
    pub(super) fn jump_reg(&mut self, base: Slot, off: i32, link: Option<(Slot, PagePc)>, hint: JumpHint) {
        match self.val(Val::Slot(base)) {
            Opnd::Reg(r) if off != 0 && r != RAX => self.asm.lea(true, RAX, r, off),
            from => {
                self.mov(RAX, from);
                if off != 0 {
                    self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(RAX), off);
                }
            }
        }
        if let Some((d, pc)) = link {
            let t = self.pin_of(d).unwrap_or(R14);
            self.page_va(t, pc);
            self.set(d, t);
        }
        if self.compact {
            let stubs = &self.be.stubs;
            self.asm.call_abs(if hint == JumpHint::Return { stubs.back } else { stubs.indirect });
            dynasm!(self.asm ; .arch x64 ; jmp rax);
            return;
        }
        let unchecked = self.unchecked.take();
        let in_page = self.info.hints.hot && self.info.table != 0;
        let way = if in_page { self.way_of_jump() } else { Way::Strays };
        let looks_late = match way {
            Way::Near(_) => self.be.config.env.page_span != 0,
            Way::Far(_) => true,
            Way::Strays => false,
        };
        if !looks_late {
            self.leave_if_kicked(unchecked);
        }
        // A return leads to where it was called from, and there are as many as calls: to remember them costs a program
        // that does little else a quarter of its speed.
        if hint != JumpHint::Return {
            self.note_jump();
        }
        match way {
            Way::Near(jump) => self.jump_in_page(unchecked, jump),
            Way::Far(jump) => self.jump_far(unchecked, jump),
            Way::Strays => self.probe(unchecked, None),
        }
    }

    pub(super) fn leave_if_kicked(&mut self, unchecked: Option<Unchecked>) {
        self.test_kick();
        self.leave_for(unchecked, self.be.stubs.kicked);
    }

    /// Goes to `stub` if the host's condition is `ne`; an address that has not been checked is checked before.
    pub(super) fn leave_for(&mut self, unchecked: Option<Unchecked>, stub: usize) {
        match unchecked {
            None => self.asm.jcc_abs(Cc::Ne, stub),
            Some(unchecked) => {
                let from = self.asm.jcc(Cc::Ne);
                self.put_off(Cold::Check { from, unchecked, stub });
            }
        }
    }

    /// Remembers where an indirect jump leads: `rax`.
    fn note_jump(&mut self) {
        if self.be.config.env.jumps != 0 {
            let (ring, at) = (self.be.env(self.be.config.env.jumps), self.be.env(self.be.config.env.jumps_at));
            dynasm!(self.asm ; .arch x64
                ; movzx r14d, BYTE [rbp + at]
                ; mov [rbp + r14*8 + ring], rax
                ; inc BYTE [rbp + at]
            );
        }
    }

    /// Continues at the address in `rax`, by the page's own entry table if it is in the block's page. Such a jump needs no
    /// look-up of the page, for the same reason as linked jumps within it.
    fn jump_in_page(&mut self, unchecked: Option<Unchecked>, jump: Option<u32>) {
        let page_base = Rm::Env(self.be.env(self.be.config.env.page_base));
        let (table, code_base) = (self.info.table as i32, self.be.config.code_base as i32);
        self.asm.mov_r_rm(true, R14, Rm::Reg(RAX));
        self.asm.alu_r_rm(Alu::Sub, true, R14, page_base);
        match self.be.config.env.page_span {
            0 => self.asm.alu_rm_i(Alu::Cmp, true, Rm::Reg(R14), 4096),
            // The kick word is looked at where this fails.
            span => self.asm.alu_r_rm(Alu::Cmp, true, R14, Rm::Env(self.be.env(span))),
        }
        let from = self.asm.jcc(Cc::Ae);
        let insn = self.insn;
        self.put_off(Cold::Probe { from, unchecked, jump, insn });
        if self.be.config.code_align == 1 {
            dynasm!(self.asm ; .arch x64 ; mov eax, [r14*4 + table]);
        } else {
            dynasm!(self.asm ; .arch x64 ; and r14d, 0xffe ; mov eax, [r14*2 + table]);
        }
        dynasm!(self.asm ; .arch x64
            ; add eax, code_base
            ; jmp rax
        );
    }

    /// Leaves an indirect jump for `stub`, or to careful mode before the instruction if the address in `rax` is none.
    pub(super) fn check_late(&mut self, from: Fixup, unchecked: Unchecked, stub: usize) {
        self.asm.bind(from);
        let unused = 64 - unchecked.bits;
        self.asm.mov_r_rm(true, R14, Rm::Reg(RAX));
        self.asm.shift_i(Shift::Shl, true, Rm::Reg(R14), unused);
        self.asm.shift_i(Shift::Sar, true, Rm::Reg(R14), unused);
        self.asm.alu_r_rm(Alu::Cmp, true, R14, Rm::Reg(RAX));
        self.asm.jcc_abs(Cc::E, stub);
        if let Some((slot, added)) = unchecked.added {
            let place = self.rm(slot);
            self.asm.alu_rm_i(Alu::Sub, true, place, added);
        }
        self.leave_carefully(unchecked.insn);
    }

    /// The check of operation `index`, if it can be put off until no code is found where the jump leads: nothing but a
    /// register that is added to changes before the jump. Flags are in their slot at jumps.
    fn late_check(&self, index: usize) -> Option<(u8, Option<(Slot, i32)>)> {
        // The jumps of compact code are a stub.
        if self.compact {
            return None;
        }
        let [Op::GuardFits { a: Val::Slot(a), bits }, rest @ ..] = self.ops.get(index..)? else { return None };
        match rest {
            [Op::JumpReg { base, off: 0, link: None, .. }, ..] if base == a => Some((*bits, None)),
            [
                Op::Alu { op: AluOp::Add, ty: Ty::I64, d, a: Val::Slot(from), b: Val::Imm(by) },
                Op::JumpReg { base, off: 0, link: None, .. },
                ..,
            ] if base == a && d == from && d != a && self.pin_of(*d).is_some() => {
                Some((*bits, Some((*d, i32::try_from(*by).ok()?))))
            }
            _ => None,
        }
    }

    /// Whether operation `index` is a check that is put off.
    pub(super) fn puts_check_off(&self, index: usize) -> bool {
        self.late_check(index).is_some()
    }

    pub(super) fn set_env_byte(&mut self, off: i32, val: u8) {
        self.cached = self.last;
        if self.guarded_by_loop() && !self.be.config.flags {
            return;
        }
        let place = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(off)));
        self.asm.ins(Map::Base, false, 0xc6, 0, place);
        self.asm.push(val);
    }

    pub(super) fn guard_env(&mut self, off: i32, mask: u8) {
        if self.be.config.vector.is_some_and(|v| off == v.guard && mask & v.vector != 0) {
            return self.guard_vectors(mask);
        }
        if self.guarded_by_loop() && !self.be.config.flags {
            self.cached = self.last;
            return;
        }
        let place = Rm::Env(self.be.env(self.be.config.env.guest.wrapping_add(off)));
        self.asm.ins(Map::Base, false, 0xf6, 0, place);
        self.asm.push(mask);
        let from = Fixups::one(self.asm.jcc(Cc::Ne));
        self.careful_if(from);
        self.cached = self.last;
    }

    /// Jumps that leave to careful mode before the instruction.
    fn careful_if(&mut self, from: Fixups) {
        let insn = self.insn;
        let cold = if self.compact && !self.counting {
            Cold::CarefulByTable { from, insn, recipe: self.recipe_at_fault() }
        } else {
            Cold::Careful { from, insn, flags: self.flags_at_fault() }
        };
        self.put_off(cold);
    }

    /// Leaves to careful mode if the condition holds.
    pub(super) fn guard(&mut self, cond: Cond, a: Val, b: Val) {
        let cc = self.compare(cc_of(cond), a, b);
        self.cached = self.last;
        let from = Fixups::one(self.asm.jcc(cc));
        self.careful_if(from);
    }

    /// Leaves to careful mode unless `a` is the sign extension of its low bits.
    pub(super) fn guard_fits(&mut self, a: Val, bits: u8) {
        if let Some((bits, added)) = self.late_check(self.next.wrapping_sub(1)) {
            self.unchecked = Some(Unchecked { insn: self.insn, bits, added });
            self.cached = self.last;
            return;
        }
        let a = self.val(a);
        let unused = 64 - bits;
        self.mov(R14, a);
        self.asm.shift_i(Shift::Shl, true, Rm::Reg(R14), unused);
        self.asm.shift_i(Shift::Sar, true, Rm::Reg(R14), unused);
        match a {
            // A constant may have any width.
            Opnd::Imm(_) => {
                self.mov(R15, a);
                self.asm.alu_r_rm(Alu::Cmp, true, R14, Rm::Reg(R15));
            }
            a => self.alu_r(Alu::Cmp, true, R14, a),
        }
        self.cached = self.last;
        let from = Fixups::one(self.asm.jcc(Cc::Ne));
        self.careful_if(from);
    }

    /// Only a store followed by a load may be reordered here (the host is TSO), and any locked instruction
    /// prevents that; this one is cheaper than `mfence`.
    pub(super) fn fence(&mut self) {
        dynasm!(self.asm ; .arch x64 ; lock or DWORD [rsp], BYTE 0);
        self.cached = self.last;
    }

    pub(super) fn call(&mut self, helper: u16, kind: CallKind, ret: Option<Slot>, args: [Val; 3]) {
        let stubs = match kind {
            CallKind::Pure => &self.be.stubs.helpers_pure,
            CallKind::MayExit => &self.be.stubs.helpers_may_exit,
        };
        let Some(&stub) = stubs.get(usize::from(helper)) else {
            // The frontend's table does not have it: leave before the instruction.
            return self.exit_at(self.insn.pc, self.be.stubs.careful);
        };
        if self.fp_flags_in_line(helper, kind, ret, args) {
            return;
        }
        if kind == CallKind::MayExit {
            let word = pack_insn(self.insn.pc, self.insn.len) as i32;
            let cur_insn = Rm::Env(self.be.env(self.be.config.env.cur_insn));
            self.asm.mov_rm_i(false, cur_insn, word);
            self.boxed = 0;
        }
        self.note_left();
        for (reg, arg) in [RAX, R14, R15].into_iter().zip(args) {
            let arg = self.home_val(arg);
            match arg {
                Opnd::Imm(0) => self.asm.alu_r_rm(Alu::Xor, false, reg, Rm::Reg(reg)),
                arg => self.mov(reg, arg),
            }
        }
        self.asm.call_abs(stub);
        self.fp_alive = false;
        if let Some(ret) = ret {
            self.set(ret, RAX);
        }
    }

    /// Calls the runtime's floating-point function.
    pub(super) fn call_fp(&mut self, packed: u64) {
        self.asm.mov_ri(R14, packed as i64);
        self.leave_homes();
        self.asm.call_abs(self.be.stubs.fp);
        self.return_home();
    }
}
