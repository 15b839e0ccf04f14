//! The interpreter: executes a block on the spot, one operation after the other.
//!
//! It is the meaning of the IR: a host backend is right when it does what [`run`] does. So it favours being
//! obvious over being fast, keeps no state of its own (registers, memory and the guest's hot state belong to
//! the [`InterpHost`]) and is total: it cannot panic, whatever the block.

mod flagged;

use crate::flags::Flags;
use crate::op::*;
use crate::unit::UnitInsn;

/// A memory access faulted. The host has already recorded the trap; the guest instruction is abandoned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault;

/// What a helper wants after it returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallOutcome {
    /// Go on with the next operation.
    Continue,
    /// Leave the block now: the helper has set the guest's program counter. Only a
    /// [`CallKind::MayExit`] call may ask for this.
    Leave,
}

/// What a block runs on.
pub trait InterpHost {
    /// The 64 bits of a slot. Called only with slots that the block names.
    fn slot(&self, slot: Slot) -> u64;
    /// Sets a slot.
    fn set_slot(&mut self, slot: Slot, value: u64);
    /// Virtual address of the page that the block begins in.
    fn page_base(&self) -> u64;
    /// A guest instruction of `len` bytes at `pc` begins: faults and helper calls from here on are its.
    fn begin_insn(&mut self, pc: PagePc, len: u8);
    /// Asked before each guest instruction: whether the block is to be left here, because what it was made from
    /// has changed.
    fn stops(&mut self) -> bool {
        false
    }
    /// Loads `size` bytes at virtual address `va`, extended by `ext`.
    ///
    /// # Errors
    /// The access faulted.
    fn load(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault>;
    /// Stores the low `size` bytes of `val` at virtual address `va`.
    ///
    /// # Errors
    /// The access faulted; then nothing was written.
    fn store(&mut self, va: u64, val: u64, size: Size) -> Result<(), Fault>;
    /// Loads and sets this vCPU's reservation.
    ///
    /// # Errors
    /// The access faulted or `va` is misaligned.
    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault>;
    /// Stores if the reservation holds: 0 on success, 1 on failure.
    ///
    /// # Errors
    /// The access faulted or `va` is misaligned.
    fn store_conditional(&mut self, va: u64, val: u64, size: Size) -> Result<u64, Fault>;
    /// Atomic read-modify-write; the old value, sign-extended. [`amo`] computes the new one.
    ///
    /// # Errors
    /// The access faulted or `va` is misaligned.
    fn amo(&mut self, op: AmoOp, va: u64, val: u64, size: Size) -> Result<u64, Fault>;
    /// Atomic exchange of `size` bytes for what `new` makes of them (zeros above; it may be called more than
    /// once, and only its last call counts); the old value, zeros above. Without `lock` it need not be atomic.
    ///
    /// # Errors
    /// The access faulted, as a store.
    fn rmw(&mut self, va: u64, size: Size, lock: bool, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault>;
    /// Flags were written: of `written`, those in `undefined` as the manuals leave open, those in `dropped` nobody
    /// looks at. For hosts that compare executors.
    fn flags_written(&mut self, written: Flags, undefined: Flags, dropped: Flags) {
        let _ = (written, undefined, dropped);
    }
    /// Guest code begins at multiples of this many bytes: 1 or 2.
    fn code_align(&self) -> u64 {
        2
    }
    /// Orders every earlier access before every later one.
    fn fence(&mut self);
    /// A floating-point operation; flags accumulate in the host. Operands that `op` does not use are
    /// whatever their slots hold.
    fn fp(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64;
    /// The byte at `off` of the guest's hot state.
    fn env_byte(&self, off: i32) -> u8;
    /// Sets the byte at `off` of the guest's hot state.
    fn set_env_byte(&mut self, off: i32, val: u8);
    /// Executes an [`Op::Unit`]; `va` is the address of its memory operand, if it has one. `false`: nothing happened, and
    /// the instruction wants careful mode.
    ///
    /// # Errors
    /// It faulted, or trapped in another way.
    fn unit(&mut self, insn: &UnitInsn, d: Option<Slot>, a: Val, va: u64) -> Result<bool, Fault>;
    /// Calls helper number `helper`.
    fn call(&mut self, helper: u16, args: [u64; 3]) -> (u64, CallOutcome);
}

/// How a block ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Continue at this virtual address.
    Next(u64),
    /// A helper has set the guest's program counter: continue there.
    Dispatch,
    /// A memory access faulted; the host recorded the trap.
    Faulted,
    /// The instruction at this virtual address, of which nothing was executed, wants careful mode.
    Careful(u64),
}

/// Executes `block` until it ends. Runs each operation at most once, so it always returns.
///
/// A block without a terminal (which the verifier refuses) ends at the address after its code.
pub fn run<H: InterpHost>(block: &Block, host: &mut H) -> Outcome {
    let mut insn = PagePc(i32::from(block.start));
    for op in &block.ops {
        if let Op::Insn { pc, .. } = op {
            if host.stops() {
                return Outcome::Next(pc_va(host, *pc));
            }
            insn = *pc;
        }
        match step(op, insn, block.narrow, host) {
            Ok(None) => {}
            Ok(Some(outcome)) => return outcome,
            Err(Fault) => return Outcome::Faulted,
        }
    }
    Outcome::Next(pc_va(host, PagePc(i32::from(block.start) + i32::from(block.len))))
}

/// Executes one operation of the guest instruction at `insn`; `Some` ends the block.
fn step<H: InterpHost>(op: &Op, insn: PagePc, narrow: bool, host: &mut H) -> Result<Option<Outcome>, Fault> {
    match *op {
        Op::Insn { pc, len } => host.begin_insn(pc, len),
        Op::Alu { op, ty, d, a, b } => {
            let result = alu(op, ty, value(host, a), value(host, b));
            host.set_slot(d, result);
        }
        Op::Un { op, ty, d, a } => {
            let result = un(op, ty, value(host, a));
            host.set_slot(d, result);
        }
        Op::GetPc { d, pc } => {
            let va = pc_va(host, pc);
            host.set_slot(d, va);
        }
        Op::Fence => host.fence(),
        // The host hears of all that they are about by itself.
        Op::Count { .. } | Op::TraceBlock { .. } | Op::TraceAccess { .. } | Op::TraceValue { .. } => {}
        Op::Fp { op, fmt, rm, d, a, b, c } => {
            let (a, b, c) = (host.slot(a), host.slot(b), host.slot(c));
            let result = host.fp(op, fmt, rm, a, b, c);
            host.set_slot(d, result);
        }
        Op::SetEnvByte { off, val } => host.set_env_byte(off, val),
        Op::Load { .. } | Op::Store { .. } | Op::LoadReserved { .. } | Op::StoreConditional { .. } | Op::Amo { .. } => {
            access(op, narrow, host)?
        }
        Op::Lea { .. }
        | Op::SetPart { .. }
        | Op::GetHigh { .. }
        | Op::SetHigh { .. }
        | Op::LoadEnv { .. }
        | Op::StoreEnv { .. } => flagged::plain(op, host),
        Op::AluF { .. }
        | Op::ShiftDoubleF { .. }
        | Op::MulWideF { .. }
        | Op::SetCondF { .. }
        | Op::CMovF { .. }
        | Op::GetFlags { .. }
        | Op::SetFlags { .. }
        | Op::FlipFlags { .. }
        | Op::DeadFlags { .. } => flagged::step(op, host),
        Op::Rmw { .. } | Op::CmpXchg { .. } => flagged::access(op, narrow, host)?,
        // Doing nothing is always right.
        Op::Rep(_) => {}
        Op::Unit { insn: unit, d, a, off } => {
            let va = address(host, narrow, a, off);
            if !host.unit(&unit, d, a, va)? {
                return Ok(Some(Outcome::Careful(pc_va(host, insn))));
            }
        }
        _ => return Ok(control(op, insn, host)),
    }
    Ok(None)
}

/// The operations on memory.
fn access<H: InterpHost>(op: &Op, narrow: bool, host: &mut H) -> Result<(), Fault> {
    match *op {
        Op::Load { d, base, off, size, ext } => {
            let result = host.load(address(host, narrow, base, off), size, ext)?;
            host.set_slot(d, result);
        }
        Op::Store { src, base, off, size } => {
            host.store(address(host, narrow, base, off), value(host, src), size)?;
        }
        Op::LoadReserved { d, base, size, ext } => {
            let result = host.load_reserved(value(host, base), size, ext)?;
            host.set_slot(d, result);
        }
        Op::StoreConditional { d, src, base, size } => {
            let result = host.store_conditional(value(host, base), value(host, src), size)?;
            host.set_slot(d, result);
        }
        Op::Amo { op, d, src, base, size } => {
            let old = host.amo(op, value(host, base), value(host, src), size)?;
            if let Some(d) = d {
                host.set_slot(d, old);
            }
        }
        _ => {}
    }
    Ok(())
}

/// The operations that may end the block.
fn control<H: InterpHost>(op: &Op, insn: PagePc, host: &mut H) -> Option<Outcome> {
    match *op {
        Op::GuardEnv { off, mask } => (host.env_byte(off) & mask != 0).then(|| Outcome::Careful(pc_va(host, insn))),
        Op::Guard { cond: c, a, b } => {
            cond(c, value(host, a), value(host, b)).then(|| Outcome::Careful(pc_va(host, insn)))
        }
        Op::GuardFits { a, bits } => {
            let (a, unused) = (value(host, a), 64 - u32::from(bits.clamp(1, 63)));
            let fits = ((a << unused) as i64 >> unused) as u64 == a;
            (!fits).then(|| Outcome::Careful(pc_va(host, insn)))
        }
        Op::Call { helper, kind, ret, args } => {
            let args = args.map(|arg| value(host, arg));
            let (result, outcome) = host.call(helper, args);
            if kind == CallKind::MayExit && outcome == CallOutcome::Leave {
                return Some(Outcome::Dispatch);
            }
            if let Some(ret) = ret {
                host.set_slot(ret, result);
            }
            None
        }
        Op::Branch { cond: c, a, b, to } => {
            cond(c, value(host, a), value(host, b)).then(|| Outcome::Next(pc_va(host, to)))
        }
        Op::BranchF { cond, to, dead } => {
            let taken = flagged::branch(host, cond, dead);
            taken.then(|| Outcome::Next(pc_va(host, to)))
        }
        Op::DivWideF { .. } => (!flagged::divide(op, host)).then(|| Outcome::Careful(pc_va(host, insn))),
        Op::Jump { to } => Some(Outcome::Next(pc_va(host, to))),
        Op::JumpReg { base, off, link, .. } => {
            // The base is read first: it may be the link register.
            let target = host.slot(base).wrapping_add(off as i64 as u64) & host.code_align().wrapping_neg();
            if let Some((d, pc)) = link {
                let va = pc_va(host, pc);
                host.set_slot(d, va);
            }
            Some(Outcome::Next(target))
        }
        Op::Dispatch => Some(Outcome::Dispatch),
        _ => None,
    }
}

fn value<H: InterpHost>(host: &H, val: Val) -> u64 {
    match val {
        Val::Slot(slot) => host.slot(slot),
        Val::Imm(imm) => imm as u64,
    }
}

/// `narrow`: see [`Block::narrow`].
fn address<H: InterpHost>(host: &H, narrow: bool, base: Val, off: i32) -> u64 {
    let va = value(host, base).wrapping_add(off as i64 as u64);
    if narrow { va & 0xffff_ffff } else { va }
}

fn pc_va<H: InterpHost>(host: &H, pc: PagePc) -> u64 {
    host.page_base().wrapping_add(pc.0 as i64 as u64)
}

/// Whether a branch condition holds.
pub fn cond(cond: Cond, a: u64, b: u64) -> bool {
    match cond {
        Cond::Eq => a == b,
        Cond::Ne => a != b,
        Cond::LtS => (a as i64) < b as i64,
        Cond::GeS => a as i64 >= b as i64,
        Cond::LtU => a < b,
        Cond::GeU => a >= b,
    }
}

/// The value of a slot loaded with the low `size` bytes of `raw`.
pub fn extend(raw: u64, size: Size, ext: Ext) -> u64 {
    let bits = size.bytes() * 8;
    if bits == 64 {
        return raw;
    }
    let low = (1u64 << bits) - 1;
    match ext {
        Ext::Zero => raw & low,
        Ext::Sign => (((raw << (64 - bits)) as i64) >> (64 - bits)) as u64,
        Ext::Ones => raw | !low,
    }
}

/// The new value of memory that an atomic operation of `size` makes from `old` and `src`; only the low `size`
/// bytes count, of the operands as of the result.
pub fn amo(op: AmoOp, size: Size, old: u64, src: u64) -> u64 {
    let signed = |v| extend(v, size, Ext::Sign) as i64;
    let unsigned = |v| extend(v, size, Ext::Zero);
    let new = match op {
        AmoOp::Swap => src,
        AmoOp::Add => old.wrapping_add(src),
        AmoOp::Xor => old ^ src,
        AmoOp::And => old & src,
        AmoOp::Or => old | src,
        AmoOp::MinS => signed(old).min(signed(src)) as u64,
        AmoOp::MaxS => signed(old).max(signed(src)) as u64,
        AmoOp::MinU => unsigned(old).min(unsigned(src)),
        AmoOp::MaxU => unsigned(old).max(unsigned(src)),
    };
    unsigned(new)
}

/// Whether the operation exists at 64 bits only ([`alu`] then ignores the type).
pub const fn is_64_bit_only(op: AluOp) -> bool {
    use AluOp::*;
    matches!(op, MulHiS | MulHiU | MulHiSU | SetLtS | SetLtU | Sh1Add | Sh2Add | Sh3Add)
}

/// The result of a two-operand operation, as it fills the slot.
pub fn alu(op: AluOp, ty: Ty, a: u64, b: u64) -> u64 {
    if is_64_bit_only(op) {
        return alu64(op, a, b);
    }
    match ty {
        Ty::I64 => alu64(op, a, b),
        Ty::I32 => alu32(op, a as u32, b as u32) as i32 as i64 as u64,
        Ty::U32 => u64::from(alu32(op, a as u32, b as u32)),
    }
}

fn alu64(op: AluOp, a: u64, b: u64) -> u64 {
    let (sa, sb) = (a as i64, b as i64);
    // Counts and bit numbers are modulo the width.
    let n = (b & 63) as u32;
    match op {
        AluOp::Add => a.wrapping_add(b),
        AluOp::Sub => a.wrapping_sub(b),
        AluOp::And => a & b,
        AluOp::Or => a | b,
        AluOp::Xor => a ^ b,
        AluOp::Andn => a & !b,
        AluOp::Orn => a | !b,
        AluOp::Xnor => !(a ^ b),
        AluOp::Shl => a << n,
        AluOp::Shr => a >> n,
        AluOp::Sar => (sa >> n) as u64,
        AluOp::Rol => a.rotate_left(n),
        AluOp::Ror => a.rotate_right(n),
        AluOp::Mul => a.wrapping_mul(b),
        AluOp::MulHiS => ((i128::from(sa) * i128::from(sb)) >> 64) as u64,
        AluOp::MulHiU => ((u128::from(a) * u128::from(b)) >> 64) as u64,
        AluOp::MulHiSU => ((i128::from(sa) * i128::from(b)) >> 64) as u64,
        AluOp::DivS if b == 0 => u64::MAX,
        AluOp::DivS => sa.wrapping_div(sb) as u64,
        AluOp::DivU => a.checked_div(b).unwrap_or(u64::MAX),
        AluOp::RemS if b == 0 => a,
        AluOp::RemS => sa.wrapping_rem(sb) as u64,
        AluOp::RemU => a.checked_rem(b).unwrap_or(a),
        AluOp::MinS => sa.min(sb) as u64,
        AluOp::MinU => a.min(b),
        AluOp::MaxS => sa.max(sb) as u64,
        AluOp::MaxU => a.max(b),
        AluOp::SetLtS => u64::from(sa < sb),
        AluOp::SetLtU => u64::from(a < b),
        AluOp::Sh1Add => (a << 1).wrapping_add(b),
        AluOp::Sh2Add => (a << 2).wrapping_add(b),
        AluOp::Sh3Add => (a << 3).wrapping_add(b),
        AluOp::BSet => a | 1 << n,
        AluOp::BClr => a & !(1 << n),
        AluOp::BInv => a ^ 1 << n,
        AluOp::BExt => (a >> n) & 1,
    }
}

fn alu32(op: AluOp, a: u32, b: u32) -> u32 {
    let (sa, sb) = (a as i32, b as i32);
    let n = b & 31;
    match op {
        AluOp::Shl => a << n,
        AluOp::Shr => a >> n,
        AluOp::Sar => (sa >> n) as u32,
        AluOp::Rol => a.rotate_left(n),
        AluOp::Ror => a.rotate_right(n),
        AluOp::DivS if b == 0 => u32::MAX,
        AluOp::DivS => sa.wrapping_div(sb) as u32,
        AluOp::DivU => a.checked_div(b).unwrap_or(u32::MAX),
        AluOp::RemS if b == 0 => a,
        AluOp::RemS => sa.wrapping_rem(sb) as u32,
        AluOp::RemU => a.checked_rem(b).unwrap_or(a),
        AluOp::MinS => sa.min(sb) as u32,
        AluOp::MinU => a.min(b),
        AluOp::MaxS => sa.max(sb) as u32,
        AluOp::MaxU => a.max(b),
        AluOp::BSet => a | 1 << n,
        AluOp::BClr => a & !(1 << n),
        AluOp::BInv => a ^ 1 << n,
        AluOp::BExt => (a >> n) & 1,
        // The low half of the 64-bit result depends on the low halves only.
        _ => alu64(op, u64::from(a), u64::from(b)) as u32,
    }
}

/// The result of a one-operand operation, as it fills the slot.
///
/// Under `I32` and `U32` the operation sees the low 32 bits, gives 32 bits, and those are extended.
pub fn un(op: UnOp, ty: Ty, a: u64) -> u64 {
    match ty {
        Ty::I64 => un64(op, a),
        Ty::I32 => un32(op, a as u32) as i32 as i64 as u64,
        Ty::U32 => u64::from(un32(op, a as u32)),
    }
}

fn un64(op: UnOp, a: u64) -> u64 {
    match op {
        UnOp::Mov => a,
        UnOp::SextB => extend(a, Size::B1, Ext::Sign),
        UnOp::SextH => extend(a, Size::B2, Ext::Sign),
        UnOp::SextW => extend(a, Size::B4, Ext::Sign),
        UnOp::ZextB => extend(a, Size::B1, Ext::Zero),
        UnOp::ZextH => extend(a, Size::B2, Ext::Zero),
        UnOp::ZextW => extend(a, Size::B4, Ext::Zero),
        UnOp::Clz => u64::from(a.leading_zeros()),
        UnOp::Ctz => u64::from(a.trailing_zeros()),
        UnOp::Popcnt => u64::from(a.count_ones()),
        UnOp::Bswap => a.swap_bytes(),
        UnOp::OrcB => u64::from_le_bytes(a.to_le_bytes().map(|byte| if byte == 0 { 0 } else { 0xff })),
    }
}

fn un32(op: UnOp, a: u32) -> u32 {
    match op {
        UnOp::Clz => a.leading_zeros(),
        UnOp::Ctz => a.trailing_zeros(),
        UnOp::Bswap => a.swap_bytes(),
        _ => un64(op, u64::from(a)) as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_corner_cases() {
        let min = i64::MIN as u64;
        assert_eq!(alu(AluOp::DivS, Ty::I64, min, u64::MAX), min);
        assert_eq!(alu(AluOp::RemS, Ty::I64, min, u64::MAX), 0);
        assert_eq!(alu(AluOp::DivU, Ty::I64, 7, 0), u64::MAX);
        assert_eq!(alu(AluOp::RemS, Ty::I64, 7, 0), 7);
        assert_eq!(alu(AluOp::DivS, Ty::I32, 0x8000_0000, u64::MAX), 0xffff_ffff_8000_0000);
        assert_eq!(alu(AluOp::RemS, Ty::I32, 0x8000_0000, u64::MAX), 0);
        assert_eq!(alu(AluOp::DivU, Ty::I32, 0x1_0000_0007, 1 << 32), u64::MAX);
        assert_eq!(alu(AluOp::RemU, Ty::I32, 0x8000_0000, 0), 0xffff_ffff_8000_0000);
        assert_eq!(alu(AluOp::DivU, Ty::U32, 7, 0), 0xffff_ffff);
    }

    #[test]
    fn high_products() {
        let m = u64::MAX;
        assert_eq!(alu(AluOp::MulHiS, Ty::I64, m, m), 0);
        assert_eq!(alu(AluOp::MulHiU, Ty::I64, m, m), m - 1);
        assert_eq!(alu(AluOp::MulHiSU, Ty::I64, m, m), m);
        assert_eq!(alu(AluOp::MulHiSU, Ty::I64, 1, m), 0);
    }

    #[test]
    fn counts_are_modulo_the_width() {
        assert_eq!(alu(AluOp::Shl, Ty::I64, 1, 65), 2);
        assert_eq!(alu(AluOp::Shl, Ty::I32, 1, 63), 0xffff_ffff_8000_0000);
        assert_eq!(alu(AluOp::Shl, Ty::U32, 1, 31), 0x8000_0000);
        assert_eq!(alu(AluOp::Sar, Ty::I32, 0x8000_0000, 32), 0xffff_ffff_8000_0000);
        assert_eq!(alu(AluOp::BExt, Ty::I32, 1 << 5, 37), 1);
        assert_eq!(alu(AluOp::Ror, Ty::U32, 1, 1), 0x8000_0000);
    }

    #[test]
    fn atomics_compare_at_their_size() {
        assert_eq!(amo(AmoOp::MinS, Size::B4, 0x8000_0000, 1), 0x8000_0000);
        assert_eq!(amo(AmoOp::MinU, Size::B4, 0xffff_ffff_8000_0000, 1), 1);
        assert_eq!(amo(AmoOp::MaxS, Size::B4, 0xffff_ffff, 0xffff_ffff_0000_0000), 0);
        assert_eq!(amo(AmoOp::Add, Size::B1, 0xff, 1), 0);
        assert_eq!(amo(AmoOp::MaxU, Size::B8, 1, u64::MAX), u64::MAX);
    }

    #[test]
    fn extension() {
        assert_eq!(extend(0x80, Size::B1, Ext::Sign), 0xffff_ffff_ffff_ff80);
        assert_eq!(extend(0x1ff, Size::B1, Ext::Zero), 0xff);
        assert_eq!(extend(0x3f80_0000, Size::B4, Ext::Ones), 0xffff_ffff_3f80_0000);
        assert_eq!(extend(u64::MAX, Size::B8, Ext::Zero), u64::MAX);
    }

    #[test]
    fn unary() {
        assert_eq!(un(UnOp::Clz, Ty::I32, 0), 32);
        assert_eq!(un(UnOp::Clz, Ty::I64, 0), 64);
        assert_eq!(un(UnOp::Ctz, Ty::I32, 1 << 40), 32);
        assert_eq!(un(UnOp::Popcnt, Ty::I32, u64::MAX), 32);
        assert_eq!(un(UnOp::OrcB, Ty::I64, 0x0100_0080_0000_00ff), 0xff00_00ff_0000_00ff);
        assert_eq!(un(UnOp::SextB, Ty::U32, 0x80), 0xffff_ff80);
        assert_eq!(un(UnOp::Mov, Ty::I32, 0x8000_0000), 0xffff_ffff_8000_0000);
        assert_eq!(un(UnOp::Bswap, Ty::I64, 0x0102_0304_0506_0708), 0x0807_0605_0403_0201);
    }
}
