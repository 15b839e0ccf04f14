//! Accesses checked together: loads and stores off one base register that no jump or call separates, such as a
//! function's prologue and epilogue, look their page up once. `r14` then is the host address of the base as it was
//! at the group's start; what operations add to the base meanwhile (as pushes do) is accounted for.
//!
//! If the range that they span is not all in one page, or the page is not in the TLB, a copy of the operations
//! runs in which each access is checked by itself.

use super::loops::Homed;
use super::{Cold, Fixups, Insn, Lower, Opnd, writes};
use crate::asm::{Alu, Cc, R14, R15, RAX, Rm, fits32};
use dynasm::dynasm;
use dynasmrt::DynasmApi;
use mimus_tcg_ir::backend::Optimise;
use mimus_tcg_ir::unit::UnitMemory;
use mimus_tcg_ir::{AluOp, FIRST_TEMP, FlagOp, Op, Size, Slot, Ty, UnOp, Val};

/// Bytes that a group may span: the wider, the more often it leaves the page.
const MAX_SPAN: i64 = 512;
/// The same where groups are to leave it often.
const FORCED_SPAN: i64 = 4000;
/// Operations that a group may have (they are emitted twice).
const MAX_OPS: usize = 160;

/// A group being lowered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    base: Slot,
    /// What has been added to the base.
    delta: i32,
    /// An alignment that has been checked, and the offset that has it.
    aligned: Option<(u8, i32)>,
    /// Its end, and the number of its copy in [`Lower::groups`]; a stretch has a copy of its own.
    end: u32,
    slow: Option<u32>,
}

/// The copy with checks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slow {
    from: Fixups,
    lent: Option<Lent>,
    back: u32,
    /// The operations, by index.
    first: usize,
    end: usize,
    /// State at the first operation.
    insn: Insn,
    boxed: u64,
    fp_alive: bool,
    flags: super::flags::FlagState,
}

/// The range entry that a group is compared with: that of one of its accesses, which fills it in the copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent {
    /// The access, by its operation's index.
    pub op: usize,
    pub range: u32,
    pub size: Size,
}

/// What a group spans.
#[derive(Clone, Copy)]
struct Extent {
    end: usize,
    low: i64,
    high: i64,
    writes: bool,
}

impl Lower<'_> {
    /// Starts a group at operation `first` if it is the first of several accesses.
    pub(super) fn enter_group(&mut self, first: usize) {
        if self.group.is_some() || self.compact || self.be.config.optimise == Optimise::Off {
            return;
        }
        let Some((base, extent)) = self.find_group(first) else {
            return;
        };
        if self.is_stretched(base) || self.in_windows() && self.windows.any_of(first..extent.end) {
            return;
        }
        self.keep_stored(first);
        // The copy starts without knowing what `rax` holds.
        self.cached = None;
        self.last = None;
        let lent = self.lend_range(first, base, extent);
        let from = self.check_group(base, extent, lent);
        self.flags_lost();
        // The check may have overwritten `rax`.
        if self.divert(first, None, from) {
            self.group = Some(Group { base, delta: 0, aligned: None, end: extent.end as u32, slow: None });
            return;
        }
        let slow = self.groups.len() as u32;
        self.groups.push(Slow {
            from,
            lent,
            back: 0,
            first,
            end: extent.end,
            insn: self.insn,
            boxed: self.boxed,
            fp_alive: self.fp_alive,
            flags: self.flags,
        });
        self.group = Some(Group { base, delta: 0, aligned: None, end: extent.end as u32, slow: Some(slow) });
    }

    /// Ends the group if operation `next` is the first after it.
    pub(super) fn leave_group(&mut self, next: usize) {
        if let Some(group) = self.group
            && group.end as usize == next
        {
            self.group = None;
            self.cached = self.cached_behind(next);
            let Some(slow) = group.slow else { return };
            if let Some(copy) = self.groups.get_mut(slow as usize) {
                copy.back = self.asm.pos();
            }
            self.put_off(Cold::Group(slow));
        }
    }

    /// The slot that `rax` holds in both copies of the code before operation `next`.
    pub(super) fn cached_behind(&self, next: usize) -> Option<Slot> {
        // What a load has left there.
        let last = self.ops.get(next.wrapping_sub(1));
        self.cached.filter(|slot| matches!(last, Some(Op::Load { d, .. }) if d == slot))
    }

    /// Before code is emitted twice: a temporary that the first operation stores is put into its memory if it is in `rax`
    /// alone.
    pub(super) fn keep_stored(&mut self, first: usize) {
        if let (Some(t), Some(&Op::Store { src, .. })) = (self.cached, self.ops.get(first))
            && t.0 >= FIRST_TEMP
            && src == Val::Slot(t)
        {
            self.asm.mov_rm_r(true, Rm::Env(self.be.slot_disp(t)), RAX);
        }
    }

    /// Where an access at `base + off` is, if it belongs to the group, or to a window or a stretch.
    pub(super) fn grouped(&mut self, base: Val, off: i32) -> Option<Rm> {
        if let Some(place) = self.windowed(base, off) {
            return Some(place);
        }
        let Some(group) = self.group.filter(|group| Val::Slot(group.base) == base) else {
            return self.in_stretch(base, off);
        };
        debug_assert!(self.next <= group.end as usize);
        Some(Rm::Mem { base: R14, index: None, disp: off.wrapping_add(group.delta) })
    }

    /// Whether what is at `disp` from `r14` is known to be aligned to `bytes`; it will be checked now if not.
    pub(super) fn group_is_aligned(&mut self, bytes: u8, disp: i32) -> bool {
        let Some(group) = &mut self.group else { return false };
        let known =
            group.aligned.is_some_and(|(align, at)| align >= bytes && (at ^ disp) & (i32::from(bytes) - 1) == 0);
        if !known {
            group.aligned = Some((bytes, disp));
        }
        known
    }

    /// After an operation of a group.
    #[inline]
    pub(super) fn adjust_group(&mut self, op: &Op) {
        if let Some(group) = &mut self.group
            && let Some(by) = adjustment(op, group.base, self.narrow)
        {
            group.delta = group.delta.wrapping_add(by);
        }
    }

    /// The longest run of operations from `first` on that can be a group, cut after its last access.
    fn find_group(&self, first: usize) -> Option<(Slot, Extent)> {
        let ops = self.ops.get(first..)?;
        let (base, ..) = access(ops.first()?)?;
        if base.0 >= FIRST_TEMP {
            return None;
        }
        let mut extent: Option<Extent> = None;
        let (mut accesses, mut delta) = (0, 0i64);
        let max_span = if self.be.config.optimise == Optimise::Forced { FORCED_SPAN } else { MAX_SPAN };
        for (i, op) in ops.iter().enumerate().take(MAX_OPS) {
            match access(op) {
                Some((b, off, size, write)) if b == base => {
                    let low = i64::from(off) + delta;
                    let high = low + i64::from(size);
                    let old = extent.unwrap_or(Extent { end: 0, low, high, writes: false });
                    let new = Extent {
                        end: first + i + 1,
                        low: old.low.min(low),
                        high: old.high.max(high),
                        writes: old.writes || write,
                    };
                    if new.high - new.low > max_span || !fits32(new.low) || !fits32(new.high) {
                        break;
                    }
                    extent = Some(new);
                    accesses += 1;
                }
                _ if self.keeps_r14(op) => {}
                _ => break,
            }
            if writes(op, base) {
                match adjustment(op, base, self.narrow) {
                    Some(by) => delta += i64::from(by),
                    None => break,
                }
            }
        }
        // Not all of them: groups would hide range entries.
        let enough = if self.be.config.optimise == Optimise::Forced && first.is_multiple_of(2) { 1 } else { 2 };
        extent.filter(|_| accesses >= enough).map(|extent| (base, extent))
    }

    /// The range entry for a group's check, in code that runs often.
    fn lend_range(&mut self, first: usize, base: Slot, extent: Extent) -> Option<Lent> {
        if self.leaves_windows(first..extent.end) {
            return None;
        }
        let lender = self.find_lender(first, base, (extent.end, extent.writes))?;
        let given = self.given_range(lender.op);
        if given.is_none() {
            self.give_range(lender.op, lender.range);
        }
        Some(Lent { range: given.unwrap_or(lender.range), ..lender })
    }

    /// The first access off `base` of this kind in operations `first` to `end`; none if any of them does not stay in a
    /// range: the others would not either. (There are read-modify-writes in a stretch only.)
    pub(super) fn find_lender(&self, first: usize, base: Slot, (end, writes): (usize, bool)) -> Option<Lent> {
        let mut pc = self.insn.pc;
        let mut lender = None;
        for (op, what) in self.ops.iter().enumerate().take(end).skip(first) {
            if let Op::Insn { pc: at, .. } = *what {
                pc = at;
            }
            let found = super::stretch::access(what).filter(|(b, ..)| *b == base);
            let Some((_, _, bytes, write)) = found else { continue };
            if !self.stays_in_range(pc.0) {
                return None;
            }
            if lender.is_none() && write == writes {
                lender = Some((op, size_within(bytes)));
            }
        }
        lender.map(|(op, size)| Lent { op, range: self.be.new_range(size, writes, false), size })
    }

    /// Looks the page up for the whole range; `r14` is the base's host address after it.
    fn check_group(&mut self, base: Slot, extent: Extent, lent: Option<Lent>) -> Fixups {
        let context = self.be.config.context;
        let home = self.home(base);
        // Offsets are those of instructions: their span and bounds fit 32 bits.
        let extra = lent.map_or(0, |lent| extent.high - extent.low - i64::from(lent.size.bytes()));
        let low = (extent.low + extra) as i32;
        match home {
            Opnd::Reg(r) => self.asm.lea(true, R15, r, low),
            _ => {
                self.mov(R15, home);
                if low != 0 {
                    self.asm.alu_rm_i(Alu::Add, true, Rm::Reg(R15), low);
                }
            }
        }
        if let Some(Lent { range, .. }) = lent {
            let miss = self.compare_span(range, extra as i32);
            self.alu_r(Alu::Add, true, R14, home);
            return miss;
        }
        // What may be written may be read.
        let tag = if extent.writes { context.write_tag } else { context.read_tag };
        dynasm!(self.asm ; .arch x64
            ; mov r14d, r15d
            ; shr r14d, 12
            ; gs xor r15, [r14*8 + tag]
        );
        let limit = 4096 - (extent.high - extent.low) as i32;
        dynasm!(self.asm ; .arch x64 ; cmp r15, limit);
        let miss = self.asm.jcc(Cc::A);
        dynasm!(self.asm ; .arch x64 ; gs mov r14, [r14*8 + context.addend]);
        self.alu_r(Alu::Add, true, R14, home);
        Fixups::one(miss)
    }

    /// The copy of a group with a check per access.
    pub(super) fn slow_group(&mut self, number: u32) {
        let Some(&slow) = self.groups.get(number as usize) else { return };
        self.bind(slow.from);
        self.lent = slow.lent;
        (self.insn, self.boxed, self.flags) = (slow.insn, slow.boxed, slow.flags);
        self.fp_alive = slow.fp_alive;
        (self.cached, self.last) = (None, None);
        self.skip = 0;
        self.in_slow_group = true;
        self.compact = self.copies_compactly(&slow);
        self.copy_end = slow.end;
        for i in slow.first..slow.end {
            if let Some(op) = self.ops.get(i).filter(|_| i >= self.skip) {
                self.flags_before(i);
                self.next = i + 1;
                self.op(op);
            }
        }
        self.lent = None;
        self.in_slow_group = false;
        self.compact = false;
        self.copy_end = usize::MAX;
        self.asm.jmp_back(slow.back);
    }

    /// Whether the accesses of a copy are those of compact code: it runs seldom, and is a good part of a block's bytes
    /// otherwise. Not in code that runs often, with its range entries, or that counts; nor where a fault's flags are not to be had by what
    /// the runtime can look at, or registers have a loop's homes.
    fn copies_compactly(&self, slow: &Slow) -> bool {
        let product = |op: &Op| matches!(op, Op::AluF { op: FlagOp::Mul, .. } | Op::MulWideF { .. });
        let ops = self.ops.get(slow.first..slow.end).unwrap_or_default();
        !self.info.hints.hot
            && !self.counting
            && slow.lent.is_none()
            && self.homed == Homed::Not
            && !slow.flags.is_product()
            && !ops.iter().any(product)
    }
}

/// The largest size of an integer that has no more bytes.
pub(super) fn size_within(bytes: u32) -> Size {
    match bytes {
        0 | 1 => Size::B1,
        2 | 3 => Size::B2,
        4..=7 => Size::B4,
        _ => Size::B8,
    }
}

/// A load's or store's base, offset, size in bytes, and whether it writes.
pub(super) fn access(op: &Op) -> Option<(Slot, i32, u32, bool)> {
    match *op {
        Op::Load { base: Val::Slot(base), off, size, .. } => Some((base, off, size.bytes(), false)),
        Op::Store { base: Val::Slot(base), off, size, .. } => Some((base, off, size.bytes(), true)),
        Op::Unit { insn, a: Val::Slot(base), off, .. } if insn.memory != UnitMemory::None => {
            Some((base, off, insn.bytes.into(), insn.memory == UnitMemory::Store))
        }
        _ => None,
    }
}

/// What an operation adds to `base`, if that is all it does to it. `narrow`: modulo 2^32, which makes no difference
/// to a group's accesses: their range does not wrap.
pub(super) fn adjustment(op: &Op, base: Slot, narrow: bool) -> Option<i32> {
    let same = Val::Slot(base);
    let (whole_size, whole_ty) = if narrow { (Size::B4, Ty::U32) } else { (Size::B8, Ty::I64) };
    let by = match *op {
        Op::Lea { d, base: a, index: Val::Imm(0), disp, size, .. } if d == base && a == same && size == whole_size => {
            disp.into()
        }
        Op::Alu { op, ty, d, a, b: Val::Imm(imm) } if d == base && a == same && ty == whole_ty => match op {
            AluOp::Add => imm,
            AluOp::Sub => imm.wrapping_neg(),
            _ => return None,
        },
        Op::AluF { op, size, d, a, b: Val::Imm(imm) } if d == Some(base) && a == same && size == whole_size => match op
        {
            FlagOp::Add => imm,
            FlagOp::Sub => imm.wrapping_neg(),
            _ => return None,
        },
        _ => return None,
    };
    if narrow { Some(by as i32) } else { i32::try_from(by).ok() }
}

/// Whether a constant, and its negative (subtractions are additions), is an instruction's.
fn small(val: Val) -> bool {
    match val {
        Val::Slot(_) => true,
        Val::Imm(imm) => fits32(imm) && fits32(imm.wrapping_neg()),
    }
}

impl Lower<'_> {
    /// Whether lowering an operation leaves `r14` alone, calls nothing and does not jump on.
    pub(super) fn keeps_r14(&self, op: &Op) -> bool {
        match *op {
            Op::Insn { .. }
            | Op::GetPc { .. }
            | Op::SetEnvByte { .. }
            | Op::GuardEnv { .. }
            | Op::SetPart { .. }
            | Op::GetHigh { .. }
            | Op::SetHigh { .. }
            | Op::LoadEnv { .. } => true,
            Op::Unit { insn, .. } => insn.memory == UnitMemory::None && insn.reads_flags.is_empty(),
            Op::StoreEnv { src, .. } => small(src),
            Op::Alu { op, a, b, .. } => match op {
                AluOp::Add | AluOp::Sub | AluOp::And | AluOp::Or | AluOp::Xor | AluOp::SetLtS | AluOp::SetLtU => {
                    small(a) && small(b)
                }
                AluOp::Shl | AluOp::Shr | AluOp::Sar => matches!((a, b), (Val::Slot(_), Val::Imm(_))),
                AluOp::Mul => matches!((a, b), (Val::Slot(_), Val::Slot(_))),
                _ => false,
            },
            Op::Un { op, a, .. } => {
                let simple = matches!(
                    op,
                    UnOp::Mov | UnOp::SextB | UnOp::SextH | UnOp::SextW | UnOp::ZextB | UnOp::ZextH | UnOp::ZextW
                );
                simple && small(a)
            }
            Op::Lea { base, index, .. } => {
                let pinned = |slot| self.pin_of(slot).is_some();
                matches!(base, Val::Slot(_))
                    && match index {
                        Val::Slot(slot) => pinned(slot),
                        Val::Imm(imm) => imm == 0,
                    }
            }
            Op::AluF { op, a, b, .. } => match op {
                FlagOp::Add | FlagOp::Sub | FlagOp::And | FlagOp::Or | FlagOp::Xor | FlagOp::Neg | FlagOp::Not => {
                    small(a) && small(b)
                }
                // By a constant that is not zero: no flag stays.
                FlagOp::Shl | FlagOp::Shr | FlagOp::Sar => {
                    matches!(b, Val::Imm(n) if n & 31 != 0)
                }
                _ => false,
            },
            _ => false,
        }
    }
}
