//! Lowering of a block, an operation at a time: [`alu`] integer arithmetic, [`mem`] and [`atomic`] guest
//! memory, [`fp`] floating point, [`control`] jumps and calls, [`compact`] what is shorter in code that is made first. What seldom runs is put behind the block's
//! body ([`Cold`]).

mod alu;
mod atomic;
mod compact;
mod control;
mod edge;
mod far;
mod flagged;
mod flags;
mod folded;
mod fp;
mod fuse;
mod group;
mod instrument;
mod loops;
mod mem;
mod overwritten;
mod push;
mod quiet;
mod rep;
mod rmw;
mod stretch;
mod sums;
mod unit;
mod wide;
mod windows;
mod words;

#[cfg(test)]
pub use fp::result_is_float;

use self::flags::Routine;
use crate::asm::{Alu, Asm, Cc, Fixup, RAX, Rm, fits32};
use crate::{UNPINNED, X86_64};
use dynasm::dynasm;
use mimus_tcg_ir::backend::{Emitted, FaultEntry, Optimise, Stored};
use mimus_tcg_ir::verify::{for_each_read, for_each_written};
use mimus_tcg_ir::{AluOp, Block, CallKind, Ext, FpFmt, Op, PagePc, SLOTS, Size, Slot, Ty, UnOp, Val};
use std::cell::Cell;

/// An operand as the host has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Opnd {
    /// A general register.
    Reg(u8),
    /// Memory at `rbp + disp`.
    Mem(i32),
    Imm(i64),
}

/// Jumps to a piece of cold code.
#[derive(Clone, Copy, Debug, Default)]
struct Fixups([Option<Fixup>; 6]);

impl Fixups {
    fn one(fixup: Fixup) -> Fixups {
        Fixups([Some(fixup), None, None, None, None, None])
    }

    fn add(&mut self, fixup: Fixup) {
        if let Some(free) = self.0.iter_mut().find(|f| f.is_none()) {
            *free = Some(fixup);
        }
    }
}

/// The guest instruction being lowered.
#[derive(Clone, Copy, Debug)]
struct Insn {
    pc: PagePc,
    len: u8,
    /// Instructions after it that have been taken from the budget.
    left: u16,
}

/// Code to emit behind the block's body.
#[derive(Clone, Copy, Debug)]
enum Cold {
    Load(mem::Slow),
    Store(mem::Slow),
    Atomic(atomic::Slow),
    Rmw(rmw::Slow),
    Unit(unit::Slow),
    Rep(rep::Slow),
    Revive(unit::Revive),
    Division(wide::SlowDivision),
    DivideByHost(alu::OtherDivisor),
    /// Leaves before a division that the host cannot do.
    CarefulDivision {
        from: Fixups,
        insn: Insn,
        flags: Routine,
    },
    /// The routine that computes flags and saves them.
    Flags {
        recipe: mimus_tcg_ir::flags::Recipe,
        number: u32,
    },
    /// `call` of the link stub. `guard`: see [`mimus_tcg_ir::backend::LinkSite`].
    Link {
        from: Fixups,
        site: Fixup,
        guard: u32,
        to: PagePc,
    },
    /// The operations of a group, each with a check of its own.
    Group(u32),
    /// Those of a stretch.
    Copy(u32),
    /// Exit because of the kick word; continue at `to`.
    Kick {
        from: Fixup,
        to: PagePc,
        flags: Routine,
    },
    /// The taken side of a branch out of a loop with homes of its own.
    LeaveLoop {
        from: Fixup,
        to: PagePc,
    },
    /// A loop's windows are not to be had: a round of the block's own code.
    LeaveWindows {
        from: Fixups,
        flags: Routine,
    },
    /// The taken side of a branch ahead, in a block that has gone back before, so that it may close a loop.
    Ahead {
        from: Fixup,
        to: PagePc,
    },
    /// The taken side of a branch to another page.
    Cross {
        from: Fixup,
        to: PagePc,
    },
    /// The look-up of an indirect jump's target that is not in the block's page.
    Probe {
        from: Fixup,
        unchecked: Option<control::Unchecked>,
        jump: Option<u32>,
        insn: Insn,
    },
    /// The look-up of one that has led elsewhere than its jump entry says.
    Elsewhere {
        from: Fixup,
        unchecked: Option<control::Unchecked>,
        jump: u32,
        insn: Insn,
    },
    /// An indirect jump on its way to a stub: its target has to be checked first.
    Check {
        from: Fixup,
        unchecked: control::Unchecked,
        stub: usize,
    },
    /// The taken side of a branch that saves the flags.
    SaveAndGo {
        from: Fixup,
        to: PagePc,
    },
    /// Exit to execute an instruction in careful mode.
    Careful {
        from: Fixups,
        insn: Insn,
        flags: Routine,
    },
    /// The same in compact code: the side table has the instruction and the recipe for the flags.
    CarefulByTable {
        from: Fixups,
        insn: Insn,
        recipe: u16,
    },
    /// The budget is smaller than the block.
    Budget {
        from: Fixup,
    },
    /// The trace's buffer is full.
    TraceFull {
        from: Fixup,
        back: u32,
    },
    /// The trace goes on in another page.
    TracePage {
        from: Fixup,
        back: u32,
    },
    /// The whole operation in software.
    Fp {
        from: Fixups,
        packed: u64,
        back: u32,
    },
    /// The helper for floating-point flags changes them: to `r14`.
    FpFlags {
        from: Fixup,
        stub: usize,
        revive: bool,
        back: u32,
    },
    /// Floating-point flags become those in `was` again, behind a comparison of unordered operands.
    RestoreFpFlags {
        from: Fixup,
        was: Opnd,
        stub: usize,
        back: u32,
    },
    /// The canonical NaN to vector register `t`.
    Nan {
        from: Fixup,
        fmt: FpFmt,
        t: u8,
        back: u32,
    },
    /// Floating-point flags to a slot.
    ReadFpFlags {
        from: Fixups,
        to: Slot,
        back: u32,
    },
    /// The taken side of a branch, with floating-point flags in a slot.
    LateFpFlags {
        from: Fixup,
        slot: Slot,
        to: PagePc,
    },
    /// Loads vector registers with what their slots' memory holds.
    ReviveFp {
        from: Fixup,
        back: u32,
    },
}

/// Lowers `block`; see [`mimus_tcg_ir::backend::HostBackend::emit`].
pub fn lower(be: &X86_64, block: &Block, at: usize, entry_guard: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted) {
    info.sites.clear();
    info.faults.clear();
    info.recipes.clear();
    let compact = match be.config.optimise {
        Optimise::Compact => !info.hints.hot,
        Optimise::Tiered => info.hints.compact,
        Optimise::Off | Optimise::Usual | Optimise::Forced => false,
    };
    let start = PagePc(i32::from(block.start));
    let loops = be.config.flags && be.config.optimise != Optimise::Off && !compact;
    let (looped, windows) = match (start.same_page(), loops) {
        (true, true) => {
            let mut looped = loops::find(&block.ops, start);
            let body = looped.and_then(|l| block.ops.get(..=l.edge)).filter(|_| be.copies_loops(&info.hints));
            let mut windows = body.map(|body| windows::Windows::find_beside_flags(body, block.narrow));
            if let (Some(body), Some(windows), Some(looped)) = (body, &mut windows, &mut looped) {
                loops::house_windows(be, body, windows, looped);
            }
            (looped, windows)
        }
        (true, false) if !compact && be.copies_loops(&info.hints) => loops::find_plain(be, &block.ops, start).unzip(),
        _ => (None, None),
    };
    let edge = looped.map(|l| l.edge);
    let Kept { cold, mut needs, routines } = KEPT.take();
    if be.config.flags {
        flags::needs(&block.ops, edge, &mut needs);
    }
    let mut l = Lower {
        be,
        asm: Asm::new(out, at),
        info,
        ops: &block.ops,
        next: 0,
        compact,
        cold,
        pin: be.pin,
        homed: loops::Homed::Not,
        start: PagePc(i32::from(block.start)),
        insn: Insn { pc: PagePc(i32::from(block.start)), len: 0, left: 0 },
        went_back: false,
        counting: false,
        boxed: 0,
        fp_alive: false,
        compared: None,
        restored: None,
        unread: None,
        promised: Vec::new(),
        has_fp_pins: !be.config.fp_pin_order.is_empty(),
        cached: None,
        last: None,
        before: None,
        group: None,
        groups: Vec::new(),
        flagged: be.config.flags,
        needs,
        flags: flags::FlagState::default(),
        kept: false,
        skip: 0,
        product: false,
        kept_half: None,
        routines,
        looped,
        extended: Vec::new(),
        windows: windows.unwrap_or_default(),
        windowed_top: None,
        narrow: block.narrow,
        unchecked: None,
        lent: None,
        stretch: None,
        in_copy: None,
        in_slow_group: false,
        copy_end: usize::MAX,
        copies: Vec::new(),
        unwritten: None,
        before_op: stretch::Before::default(),
        folded: None,
        head: None,
        page: None,
        in_cold: false,
    };
    l.count_beginnings();
    match entry_guard {
        Some(guard) => l.entry_guard(guard),
        None => l.find_head(),
    }
    for i in 0..block.ops.len() {
        if compact {
            l.lower_simply(i);
            continue;
        }
        l.note_head(i);
        l.lower_at(i);
        l.note_loop_end(i);
    }
    if !block.ops.last().is_some_and(Op::is_terminal) {
        // The verifier refuses such a block; fall through to what follows it.
        l.jump(PagePc(i32::from(block.start) + i32::from(block.len)));
    }
    l.copy_loop();
    l.finish_cold();
    let Lower { mut cold, mut needs, mut routines, .. } = l;
    cold.clear();
    needs.clear();
    routines.clear();
    KEPT.set(Kept { cold, needs, routines });
}

/// Vectors of [`Lower`], empty, kept from block to block.
#[derive(Default)]
struct Kept {
    cold: Vec<(Cold, loops::Homed)>,
    needs: Vec<flags::Needs>,
    routines: Vec<u32>,
}

thread_local! {
    static KEPT: Cell<Kept> = Cell::default();
}

/// The state of lowering one block.
struct Lower<'a> {
    be: &'a X86_64,
    asm: Asm<'a>,
    info: &'a mut Emitted,
    ops: &'a [Op],
    /// Index of the operation after the one being lowered.
    next: usize,
    /// See [`compact`].
    compact: bool,
    /// What was put off, and whether registers have the loop's homes there.
    cold: Vec<(Cold, loops::Homed)>,
    /// Host register of each slot, or [`UNPINNED`].
    pin: [u8; SLOTS],
    /// Which of the loop's homes registers have.
    homed: loops::Homed,
    start: PagePc,
    insn: Insn,
    /// The block has gone on before its start.
    went_back: bool,
    /// Instructions are counted.
    counting: bool,
    /// Slots known to hold a NaN-boxed single, a bit each.
    boxed: u64,
    /// Whether vector registers are known to hold the values of their slots.
    fp_alive: bool,
    /// A slot that was computed by a condition of the host's flags, and the index behind that operation.
    compared: Option<(Slot, Cc, usize)>,
    /// Index of the write of floating-point flags that the comparison before it has done already.
    restored: Option<usize>,
    /// Floating-point flags that have not been read yet.
    unread: Option<quiet::Unread>,
    /// Range entries of operations that come later.
    promised: Vec<(usize, u32)>,
    has_fp_pins: bool,
    /// The slot whose value `rax` also holds after the operation being lowered.
    cached: Option<Slot>,
    /// The same after the operation before it.
    last: Option<Slot>,
    /// The same before the operation being lowered, and what comes with it.
    before: Option<Slot>,
    /// Accesses that were checked together, while among them.
    group: Option<group::Group>,
    /// The groups' copies.
    groups: Vec<group::Slow>,
    /// Whether the block has to do with flags.
    flagged: bool,
    /// The flags needed after each operation; empty if the block has none.
    needs: Vec<flags::Needs>,
    /// Where the flags are.
    flags: flags::FlagState,
    /// Whether the operation being lowered leaves the host's flags alone if it can.
    kept: bool,
    /// Operations with lower numbers have been lowered.
    skip: usize,
    /// The operation being lowered is a product of which only OF is kept.
    product: bool,
    /// One more than the index of a division whose result a division before it has kept.
    kept_half: Option<usize>,
    /// Offsets of the routines that save flags, by number.
    routines: Vec<u32>,
    /// The block's loop.
    looped: Option<loops::Loop>,
    /// Operations of its copies that extend what is extended already.
    extended: Vec<usize>,
    /// Its windows, and where rounds of the copy with windows begin that need no look at them.
    windows: windows::Windows,
    windowed_top: Option<u32>,
    /// [`Block::narrow`]. A TLB entry's tag has 32 bits then, so what is past them misses, and cold code takes the
    /// address modulo 2^32.
    narrow: bool,
    /// The check of an indirect jump's target that has been put off.
    unchecked: Option<control::Unchecked>,
    /// The range entry of an access that its group has compared too.
    lent: Option<group::Lent>,
    /// The stretch being lowered, the number of the one whose copy is, and all copies.
    stretch: Option<stretch::Stretch>,
    in_copy: Option<usize>,
    /// The operations being lowered are a group's copy's.
    in_slow_group: bool,
    /// The operation behind it: no operation of the copy may do what that does.
    copy_end: usize,
    copies: Vec<stretch::Copy>,
    /// The temporary that is in `rax` alone, if [`Lower::cached`] is one; and what a stretch has before the operation being lowered.
    unwritten: Option<Slot>,
    before_op: stretch::Before,
    /// The address of the load that comes next, if it is left to it.
    folded: Option<folded::Folded>,
    /// What jumps to the block's start may do themselves, and the page they may use.
    head: Option<edge::Head>,
    page: Option<edge::Page>,
    /// What was put off is being emitted.
    in_cold: bool,
}

impl Lower<'_> {
    /// [`Lower::lower_at`] in compact code, which has neither groups nor loops.
    #[inline]
    fn lower_simply(&mut self, i: usize) {
        if let Some(op) = self.ops.get(i).filter(|_| i >= self.skip) {
            self.flags_before(i);
            self.before = self.cached;
            self.next = i + 1;
            self.op(op);
        }
    }

    /// The operation with number `i`, unless it has been lowered with one before it.
    #[inline]
    fn lower_at(&mut self, i: usize) {
        if let Some(op) = self.ops.get(i).filter(|_| i >= self.skip) {
            self.flags_before(i);
            self.join_copy(i);
            self.before = self.cached;
            self.note_before();
            if !self.fold_sums(i) {
                self.enter_stretch(i);
                self.enter_group(i);
                self.next = i + 1;
                self.op(op);
            }
        }
        self.leave_group(i + 1);
        self.leave_stretch(i + 1);
    }

    #[inline]
    fn op(&mut self, op: &Op) {
        if let Op::Insn { pc, len } = *op {
            self.went_back |= pc < self.start;
            self.insn = Insn { pc, len, left: self.insn.left.saturating_sub(1) };
            return;
        }
        self.keep_page(op);
        self.last = self.cached.take();
        if self.flagged {
            return self.op_beside_flags(op);
        }
        self.lower(op);
    }

    /// An operation of a block that has to do with flags.
    #[inline(never)]
    fn op_beside_flags(&mut self, op: &Op) {
        if let Op::Load { d, base, off, size, .. } = *op
            && let Some(fused) = self.fusable(d, size)
        {
            return self.load_fused(fused, base, off, size);
        }
        if let Op::GetPc { .. } = *op
            && self.compact_push_of_pc(self.next.wrapping_sub(1))
        {
            return;
        }
        if let Op::GetPc { .. } = *op
            && let Some(push) = self.push_at(self.next.wrapping_sub(1))
        {
            let ops = self.ops;
            self.kept = false;
            self.push(push);
            return if let Some(store) = ops.get(push.store) {
                self.flags_after(store, self.own_now());
            };
        }
        let stays = match self.last {
            Some(slot) if self.keeps_rax(op) && !writes(op, slot) => self.last,
            _ => None,
        };
        self.kept = self.keep_flags();
        let own = self.own_now();
        self.lower(op);
        self.cached = self.cached.or(stays);
        self.flags_after(op, own);
    }

    fn lower(&mut self, op: &Op) {
        let reload = self.has_fp_pins && self.settle_fp_pins(op);
        match *op {
            Op::Insn { .. } => {}
            Op::Alu { op, ty, d, a, b } => self.alu(op, ty, d, a, b),
            Op::Un { op, ty, d, a } => self.un(op, ty, d, a),
            Op::GetPc { d, pc } => self.get_pc(d, pc),
            Op::Load { d, base, off, size, ext } => self.load(d, base, off, size, ext),
            Op::Store { src, base, off, size } => self.store(src, base, off, size),
            Op::LoadReserved { d, base, size, ext } => self.load_reserved(d, base, size, ext),
            Op::StoreConditional { d, src, base, size } => {
                self.store_conditional(d, src, base, size);
            }
            Op::Amo { op, d, src, base, size } => self.amo(op, d, src, base, size),
            Op::Fence => self.fence(),
            Op::Fp { op, fmt, rm, d, a, b, c } => self.fp(op, fmt, rm, d, [a, b, c]),
            Op::SetEnvByte { off, val } => self.set_env_byte(off, val),
            Op::GuardEnv { off, mask } => self.guard_env(off, mask),
            Op::Guard { cond, a, b } => self.guard(cond, a, b),
            Op::GuardFits { a, bits } => self.guard_fits(a, bits),
            Op::Call { helper, kind, ret, args } => self.call(helper, kind, ret, args),
            Op::Branch { cond, a, b, to } => self.branch(cond, a, b, to),
            Op::Lea { d, base, index, shift, disp, size } => self.lea_op(d, (base, index, shift), disp, size),
            Op::SetPart { d, size, a } => self.set_part(d, size, a),
            Op::GetHigh { d, a } => self.get_high(d, a),
            Op::SetHigh { d, a } => self.set_high(d, a),
            Op::LoadEnv { d, off, size, ext } => self.load_env(d, off, size, ext),
            Op::StoreEnv { src, off, size } => self.store_env(src, off, size),
            Op::AluF { op, size, d, a, b } => self.alu_f(op, size, d, a, b),
            Op::ShiftDoubleF { left, size, d, a, b, n } => self.shift_double(left, size, d, [a, b, n]),
            Op::MulWideF { signed, size, lo, hi, a, b } => self.mul_wide(signed, size, (lo, hi), a, b),
            Op::DivWideF { signed, size, q, r, hi, lo, b } => {
                self.div_wide(signed, size, (q, r), [hi, lo, b]);
            }
            Op::SetCondF { cond, d } => self.set_cond(cond, d),
            Op::CMovF { cond, size, d, a } => self.cmov(cond, size, d, a),
            Op::GetFlags { d } => self.get_flags(d),
            Op::SetFlags { a, mask } => self.set_flags(op, a, mask),
            Op::FlipFlags { mask } => self.flip_flags(op, mask),
            Op::DeadFlags { .. } => {}
            Op::Rmw { .. } => self.rmw(op),
            Op::CmpXchg { d, size, expected, new, base, off } => {
                self.cmpxchg(d, size, [expected, new, base], off);
            }
            Op::Unit { .. } => self.unit(op),
            Op::Rep(ref rep) => self.rep(rep),
            Op::BranchF { cond, to, dead } => self.branch_f(cond, to, dead),
            Op::Jump { to } => {
                if !self.loop_jump(to) {
                    self.jump(to);
                }
            }
            Op::JumpReg { base, off, link, hint } => self.jump_reg(base, off, link, hint),
            Op::Dispatch => self.asm.jmp_abs(self.be.stubs.dispatch),
            Op::Count { insns, total } => self.count_insns(insns, total),
            Op::TraceBlock { id, entry } => self.trace_block(id, entry),
            Op::TraceAccess { head, base, off } => self.trace_access(head, base, off),
            Op::TraceValue { value } => self.trace_value(value),
        }
        if reload {
            self.reload_fp(op);
        }
        if self.group.is_some() {
            self.adjust_group(op);
        }
        if self.stretch.is_some() {
            self.adjust_stretch(op);
        }
        if let Some(d) = self.boxes(op) {
            self.boxed |= boxed_bit(d);
        } else if self.boxed != 0 {
            for_each_written(op, |d| self.boxed &= !boxed_bit(d));
        }
    }

    /// The slot in whose memory an operation leaves a NaN-boxed single.
    fn boxes(&self, op: &Op) -> Option<Slot> {
        let d = match *op {
            Op::Fp { op, fmt: FpFmt::F32, d, .. } if fp::result_is_float(op) => d,
            Op::Load { d, size: Size::B4, ext: Ext::Ones, .. } => d,
            _ => return None,
        };
        Some(d).filter(|d| self.pin_of(*d).is_none())
    }

    /// The host register of a slot, if it has one.
    #[inline]
    fn pin_of(&self, slot: Slot) -> Option<u8> {
        self.pin.get(usize::from(slot.0)).copied().filter(|&reg| reg != UNPINNED)
    }

    /// Emits something behind the block's body.
    #[inline]
    fn put_off(&mut self, cold: Cold) {
        self.cold.push((cold, self.homed));
    }

    /// Where a slot lives.
    #[inline]
    fn rm(&self, slot: Slot) -> Rm {
        match self.pin_of(slot) {
            Some(reg) => Rm::Reg(reg),
            None => Rm::Env(self.be.slot_disp(slot)),
        }
    }

    /// A slot's value in its home.
    #[inline]
    fn home(&self, slot: Slot) -> Opnd {
        match self.rm(slot) {
            Rm::Reg(reg) => Opnd::Reg(reg),
            _ => Opnd::Mem(self.be.slot_disp(slot)),
        }
    }

    /// A value, not looking at what `rax` happens to hold: for operations that overwrite `rax` first.
    #[inline]
    fn home_val(&self, val: Val) -> Opnd {
        match val {
            Val::Slot(slot) => self.home(slot),
            Val::Imm(imm) => Opnd::Imm(imm),
        }
    }

    /// A value; `rax` if the previous operation left it there.
    #[inline]
    fn val(&self, val: Val) -> Opnd {
        match val {
            Val::Slot(slot) if self.last == Some(slot) => Opnd::Reg(RAX),
            _ => self.home_val(val),
        }
    }

    /// `mov reg, operand`, nothing if it is there already.
    fn mov(&mut self, reg: u8, from: Opnd) {
        match from {
            Opnd::Reg(r) if r == reg => {}
            Opnd::Reg(r) => self.asm.mov_r_rm(true, reg, Rm::Reg(r)),
            Opnd::Mem(disp) => self.asm.mov_r_rm(true, reg, Rm::Env(disp)),
            Opnd::Imm(imm) => self.asm.mov_ri(reg, imm),
        }
    }

    /// The low 32 bits of an operand to a register.
    fn mov32(&mut self, reg: u8, from: Opnd) {
        match from {
            Opnd::Reg(r) => self.asm.mov_r_rm(false, reg, Rm::Reg(r)),
            Opnd::Mem(disp) => self.asm.mov_r_rm(false, reg, Rm::Env(disp)),
            Opnd::Imm(imm) => self.asm.mov_ri(reg, i64::from(imm as u32)),
        }
    }

    /// An operand in a register, `scratch` if it is not in one.
    fn in_reg(&mut self, from: Opnd, scratch: u8) -> u8 {
        if let Opnd::Reg(r) = from {
            return r;
        }
        self.mov(scratch, from);
        scratch
    }

    /// An operand that an instruction may have as its register-or-memory one; constants go to `scratch`.
    fn as_rm(&mut self, from: Opnd, scratch: u8) -> Rm {
        match from {
            Opnd::Reg(r) => Rm::Reg(r),
            Opnd::Mem(disp) => Rm::Env(disp),
            Opnd::Imm(imm) => {
                self.asm.mov_ri(scratch, imm);
                Rm::Reg(scratch)
            }
        }
    }

    /// The same operand, with constants beyond 32 bits in `scratch`.
    fn imm32(&mut self, from: Opnd, scratch: u8) -> Opnd {
        match from {
            Opnd::Imm(imm) if !fits32(imm) => {
                self.asm.mov_ri(scratch, imm);
                Opnd::Reg(scratch)
            }
            other => other,
        }
    }

    /// `op reg, operand`; constants fit 32 bits.
    fn alu_r(&mut self, op: Alu, w: bool, reg: u8, b: Opnd) {
        match b {
            Opnd::Reg(r) => self.asm.alu_r_rm(op, w, reg, Rm::Reg(r)),
            Opnd::Mem(disp) => self.asm.alu_r_rm(op, w, reg, Rm::Env(disp)),
            Opnd::Imm(imm) => self.asm.alu_rm_i(op, w, Rm::Reg(reg), imm as i32),
        }
    }

    /// The register in which to compute a slot's new value.
    #[inline]
    fn target(&self, d: Slot) -> u8 {
        self.pin_of(d).unwrap_or(RAX)
    }

    /// Ends an operation that computed `d` in [`Lower::target`].
    fn finish(&mut self, d: Slot) {
        if self.pin_of(d).is_some() {
            return;
        }
        self.cached = Some(d);
        self.unwritten = Some(d);
        if !self.dies_at_next(d) {
            self.unwritten = None;
            self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(d)), RAX);
        }
    }

    /// The same for a 32-bit result, extended as `ty` says.
    fn finish_ty(&mut self, d: Slot, ty: Ty) {
        if ty == Ty::I32 {
            let t = self.target(d);
            self.asm.movsxd(t, Rm::Reg(t));
        }
        self.finish(d);
    }

    /// A register's value to a slot.
    fn set(&mut self, d: Slot, from: u8) {
        match self.pin_of(d) {
            Some(reg) => self.mov(reg, Opnd::Reg(from)),
            None => {
                self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(d)), from);
                if from == RAX {
                    (self.cached, self.unwritten) = (Some(d), None);
                }
            }
        }
    }

    /// A constant to a slot.
    fn set_imm(&mut self, d: Slot, imm: i64) {
        match self.pin_of(d) {
            Some(reg) if imm == 0 && !self.kept => {
                self.asm.alu_r_rm(Alu::Xor, false, reg, Rm::Reg(reg));
            }
            Some(reg) => self.asm.mov_ri(reg, imm),
            None if fits32(imm) => {
                self.asm.mov_rm_i(true, Rm::Env(self.be.slot_disp(d)), imm as i32);
            }
            None => {
                self.asm.mov_ri(RAX, imm);
                self.finish(d);
            }
        }
    }

    /// Whether lowering an operation leaves `rax` alone whatever its operands are, and saves no flags.
    fn keeps_rax(&self, op: &Op) -> bool {
        let pinned = |d: Slot| self.pin_of(d).is_some();
        // Other guests are not worth the time.
        if !self.flagged {
            return false;
        }
        match *op {
            Op::DeadFlags { .. } => true,
            Op::Lea { d, .. } => pinned(d),
            Op::Un { op: UnOp::Mov | UnOp::SextW | UnOp::ZextW, d, .. } => pinned(d),
            Op::Alu { op: AluOp::Add | AluOp::Sub, d, b: Val::Imm(_), .. } => pinned(d),
            _ => false,
        }
    }

    /// Whether lowering `op`, number `index`, reads `d` through [`Lower::val`] wherever it reads it, and before `rax`
    /// changes.
    fn reads_from_rax(&self, index: usize, op: &Op, d: Slot) -> bool {
        let v = Val::Slot(d);
        match *op {
            Op::Alu { op, a, b, .. } => alu::reads_operands_first(op) && (a == v || b == v),
            Op::Un { a, .. } => a == v,
            Op::Load { base, .. } => base == v,
            Op::Store { src, base: Val::Slot(base), .. } if src == v => self.pin_of(base).is_some(),
            Op::Store { base, .. } => base == v,
            Op::Branch { a, b, .. } | Op::Guard { a, b, .. } => a == v || b == v,
            Op::GuardFits { a, .. } => a == v,
            Op::JumpReg { base, .. } => base == d,
            Op::Unit { a, .. } => a == v,
            Op::Lea { base, index, .. } => base == v || index == v,
            // A destination of which a part stays is read from its memory.
            Op::AluF { size, d: to, a, b, .. } => {
                (a == v || b == v) && !(to == Some(d) && size < Size::B4) && self.takes_rax(index, op)
            }
            _ => false,
        }
    }

    /// Whether the next operation reads `d` and could have it from `rax`.
    fn next_reads(&self, d: Slot) -> bool {
        let rest = self.ops.iter().enumerate().skip(self.next);
        let mut rest = rest.skip_while(|(_, op)| matches!(op, Op::Insn { .. }));
        rest.next().is_some_and(|(index, op)| self.reads_from_rax(index, op, d))
    }

    /// Records that the call just emitted belongs to the guest instruction `insn`.
    fn fault_entry(&mut self, insn: Insn) {
        let host = self.asm.pos();
        let (stored, recipe) = (Stored::Unknown, flags::NOT_NOTED);
        self.info.faults.push(FaultEntry { host, pc: insn.pc, len: insn.len, left: insn.left, stored, recipe });
    }

    /// Makes jumps lead here.
    fn bind(&mut self, from: Fixups) {
        for fixup in from.0.into_iter().flatten() {
            self.asm.bind(fixup);
        }
    }

    /// Emits what was put off. Cold code may put off more.
    fn finish_cold(&mut self) {
        self.in_cold = true;
        let mut i = 0;
        while let Some(&(cold, homed)) = self.cold.get(i) {
            i += 1;
            self.have_homes(homed);
            match cold {
                Cold::Load(slow) => self.slow_load(slow),
                Cold::Store(slow) => self.slow_store(slow),
                Cold::Atomic(slow) => self.slow_atomic(slow),
                Cold::Rmw(slow) => self.slow_rmw(slow),
                Cold::Unit(slow) => self.slow_unit(slow),
                Cold::Rep(slow) => self.slow_rep(slow),
                Cold::Revive(revive) => {
                    if let Some(layout) = self.be.config.vector {
                        self.revive(revive, layout);
                    }
                }
                Cold::Division(slow) => self.slow_division(slow),
                Cold::DivideByHost(other) => self.divide_by_other(other),
                Cold::CarefulDivision { from, insn, flags } => self.careful_division(from, insn, flags),
                Cold::Flags { recipe, number } => self.flags_routine(recipe, number),
                Cold::Group(slow) => self.slow_group(slow),
                Cold::Copy(number) => self.slow_stretch(number as usize),
                Cold::Link { from, site, guard, to } => self.unlinked(from, site, guard, to),
                Cold::Kick { from, to, flags } => {
                    self.asm.bind(from);
                    self.save_at_fault(flags);
                    self.leave_homes();
                    self.exit_at(to, self.be.stubs.kicked);
                }
                Cold::LeaveLoop { from, to } => {
                    self.asm.bind(from);
                    self.leave_homes();
                    self.have_homes(loops::Homed::Not);
                    self.jump(to);
                }
                Cold::LeaveWindows { from, flags } => {
                    self.bind(from);
                    self.save_at_fault(flags);
                    self.leave_homes();
                    self.asm.jmp_back(0);
                }
                Cold::Ahead { from, to } => {
                    self.asm.bind(from);
                    self.jump_back(to);
                }
                Cold::Cross { from, to } => {
                    self.asm.bind(from);
                    self.cross_page(to);
                }
                Cold::Probe { from, unchecked, jump, insn } => self.probe_behind(from, unchecked, jump, insn),
                Cold::Elsewhere { from, unchecked, jump, insn } => self.elsewhere(from, unchecked, jump, insn),
                Cold::SaveAndGo { from, to } => self.save_and_go(from, to),
                Cold::Check { from, unchecked, stub } => self.check_late(from, unchecked, stub),
                Cold::Careful { from, insn, flags } => {
                    self.bind(from);
                    self.save_at_fault(flags);
                    self.leave_homes();
                    self.leave_carefully(insn);
                }
                Cold::CarefulByTable { from, insn, recipe } => {
                    self.bind(from);
                    self.careful_by_table(insn, recipe);
                }
                Cold::Budget { from } => {
                    self.asm.bind(from);
                    self.exit_at(self.start, self.be.stubs.careful);
                }
                Cold::TraceFull { from, back } => self.trace_full(from, back),
                Cold::TracePage { from, back } => self.trace_page(from, back),
                Cold::Fp { from, packed, back } => {
                    self.bind(from);
                    self.call_fp(packed);
                    self.asm.jmp_back(back);
                }
                Cold::FpFlags { from, stub, revive, back } => self.change_fp_flags(from, stub, revive, back),
                Cold::RestoreFpFlags { from, was, stub, back } => self.restore_fp_flags(from, was, stub, back),
                Cold::Nan { from, fmt, t, back } => self.canonical_nan(from, fmt, t, back),
                Cold::ReadFpFlags { from, to, back } => self.read_fp_flags(from, to, back),
                Cold::LateFpFlags { from, slot, to } => self.late_fp_flags(from, slot, to),
                Cold::ReviveFp { from, back } => {
                    self.asm.bind(from);
                    self.asm.call_abs(self.be.stubs.revive);
                    self.asm.jmp_back(back);
                }
            }
        }
        // A trap, so that the return address of a call at the end is still inside the block.
        dynasm!(self.asm ; .arch x64 ; int3);
    }
}

/// The bit of a slot in [`Lower::boxed`].
fn boxed_bit(slot: Slot) -> u64 {
    1u64.checked_shl(u32::from(slot.0)).unwrap_or(0)
}

/// Whether an operation writes a slot, but for what a helper does.
fn writes(op: &Op, slot: Slot) -> bool {
    let mut writes = false;
    for_each_written(op, |d| writes |= d == slot);
    writes
}

/// Whether an operation may read a slot.
fn reads(op: &Op, slot: Slot) -> bool {
    let mut reads = matches!(op, Op::Call { kind: CallKind::MayExit, .. });
    for_each_read(op, |s| reads |= s == slot);
    reads
}
