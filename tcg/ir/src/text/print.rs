//! Writing.

use std::fmt::{self, Display, Formatter};

use super::names::Named;
use crate::op::*;
use crate::unit::{UnitGpr, UnitInsn, UnitMemory};
use crate::verify::{fp_arity, is_unary};

impl Display for Block {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let narrow = if self.narrow { "narrow " } else { "" };
        writeln!(f, "block start={:#x} len={} insns={} {narrow}{{", self.start, self.len, self.insns)?;
        for op in &self.ops {
            writeln!(f, "  {op}")?;
        }
        write!(f, "}}")
    }
}

impl Display for Val {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Val::Slot(slot) => write!(f, "{slot}"),
            Val::Imm(imm) if imm < 0 => write!(f, "-{:#x}", imm.unsigned_abs()),
            Val::Imm(imm) => write!(f, "{imm:#x}"),
        }
    }
}

impl Display for PagePc {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:#x}", if self.0 < 0 { '-' } else { '+' }, self.0.unsigned_abs())
    }
}

/// ` + 0x8`, ` - 0x8` or, for 0, nothing.
struct Offset(i32);

impl Display for Offset {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            off => write!(f, " {} {:#x}", if off < 0 { '-' } else { '+' }, off.unsigned_abs()),
        }
    }
}

/// `s5 = `, or nothing.
struct Dest(Option<Slot>);

impl Display for Dest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |d| write!(f, "{d} = "))
    }
}

/// An instruction's parts: map, prefix and opcode, then what is not zero, each with its name.
struct UnitText(UnitInsn);

impl Display for UnitText {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let i = &self.0;
        write!(f, "{} {} {:#x}", i.map, i.prefix, i.opcode)?;
        let words = [(i.vex, "vex"), (i.w, "w"), (i.wide, "wide"), (i.bare, "bare"), (i.aligned, "aligned")];
        words.iter().filter(|(on, _)| *on).try_for_each(|(_, word)| write!(f, " {word}"))?;
        for (name, n) in [("reg", i.reg), ("v", i.v), ("rm", i.rm)] {
            if n != 0 {
                write!(f, " {name} {n}")?;
            }
        }
        i.imm.map_or(Ok(()), |imm| write!(f, " imm {imm:#x}"))?;
        if i.gpr != UnitGpr::None {
            write!(f, " gpr {}", i.gpr.name())?;
        }
        if i.memory != UnitMemory::None {
            write!(f, " {} {}", i.memory.name(), i.bytes)?;
        }
        if i.sets_flags {
            write!(f, " sets")?;
        }
        if i.reads_flags.is_empty() { Ok(()) } else { write!(f, " reads {}", i.reads_flags) }
    }
}

fn sign(signed: bool) -> &'static str {
    if signed { "s" } else { "u" }
}

impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Insn { pc, len } => write!(f, "insn {pc} {len}"),
            Op::Alu { op, ty, d, a, b } => write!(f, "{d} = {}.{} {a}, {b}", op.name(), ty.name()),
            Op::Un { op, ty, d, a } => write!(f, "{d} = {}.{} {a}", op.name(), ty.name()),
            Op::GetPc { d, pc } => write!(f, "{d} = getpc {pc}"),
            Op::Load { d, base, off, size, ext } => {
                write!(f, "{d} = load.{}.{} [{base}{}]", size.name(), ext.name(), Offset(off))
            }
            Op::Store { src, base, off, size } => {
                write!(f, "store.{} [{base}{}], {src}", size.name(), Offset(off))
            }
            Op::LoadReserved { d, base, size, ext } => {
                write!(f, "{d} = lr.{}.{} [{base}]", size.name(), ext.name())
            }
            Op::StoreConditional { d, src, base, size } => write!(f, "{d} = sc.{} [{base}], {src}", size.name()),
            Op::Amo { op, d, src, base, size } => {
                write!(f, "{}amo.{}.{} [{base}], {src}", Dest(d), op.name(), size.name())
            }
            Op::Fence => write!(f, "fence"),
            Op::Fp { op, fmt, rm, d, a, b, c } => {
                write!(f, "{d} = fp.{}.{}.{} {a}", op.name(), fmt.name(), rm.name())?;
                // Operands that are not used are written only if reading would not restore them.
                let count = if c != a { 3 } else { fp_arity(op).max(if b != a { 2 } else { 1 }) };
                [b, c].into_iter().take(count - 1).try_for_each(|slot| write!(f, ", {slot}"))
            }
            Op::SetEnvByte { off, val } => write!(f, "env[{}] = {val:#x}", Val::Imm(off.into())),
            Op::GuardEnv { off, mask } => write!(f, "guard env[{}] & {mask:#x}", Val::Imm(off.into())),
            Op::Guard { cond, a, b } => write!(f, "guard.{} {a}, {b}", cond.name()),
            Op::GuardFits { a, bits } => write!(f, "guard.fits {a}, {bits:#x}"),
            Op::Call { helper, kind, ret, args: [a, b, c] } => {
                write!(f, "{}call.{} {helper}({a}, {b}, {c})", Dest(ret), kind.name())
            }
            Op::Branch { cond, a, b, to } => write!(f, "br.{} {a}, {b} -> {to}", cond.name()),
            Op::Lea { d, base, index, shift, disp, size } => {
                write!(f, "{d} = lea.{} {base}, {index}, {shift}, {}", size.name(), Val::Imm(disp.into()))
            }
            Op::SetPart { d, size, a } => write!(f, "{d} = part.{} {a}", size.name()),
            Op::GetHigh { d, a } => write!(f, "{d} = gethigh {a}"),
            Op::SetHigh { d, a } => write!(f, "{d} = sethigh {a}"),
            Op::LoadEnv { d, off, size, ext } => {
                write!(f, "{d} = loadenv.{}.{} [{}]", size.name(), ext.name(), Val::Imm(off.into()))
            }
            Op::StoreEnv { src, off, size } => {
                write!(f, "storeenv.{} [{}], {src}", size.name(), Val::Imm(off.into()))
            }
            Op::AluF { op, size, d, a, b } => {
                write!(f, "{}f.{}.{} {a}", Dest(d), op.name(), size.name())?;
                if is_unary(op) && b == Val::Imm(0) { Ok(()) } else { write!(f, ", {b}") }
            }
            Op::ShiftDoubleF { left, size, d, a, b, n } => {
                write!(f, "{d} = {}.{} {a}, {b}, {n}", if left { "shld" } else { "shrd" }, size.name())
            }
            Op::MulWideF { signed, size, lo, hi, a, b } => {
                write!(f, "{lo}, {hi} = mulwide.{}.{} {a}, {b}", sign(signed), size.name())
            }
            Op::DivWideF { signed, size, q, r, hi, lo, b } => {
                write!(f, "{q}, {r} = divwide.{}.{} {hi}, {lo}, {b}", sign(signed), size.name())
            }
            Op::SetCondF { cond, d } => write!(f, "{d} = set.{}", cond.name()),
            Op::CMovF { cond, size, d, a } => write!(f, "{d} = cmov.{}.{} {a}", cond.name(), size.name()),
            Op::GetFlags { d } => write!(f, "{d} = getflags"),
            Op::SetFlags { a, mask } => write!(f, "setflags {mask}, {a}"),
            Op::FlipFlags { mask } => write!(f, "flipflags {mask}"),
            Op::DeadFlags { mask } => write!(f, "deadflags {mask}"),
            Op::Rmw { op, size, lock, old, src, base, off } => {
                let name = match op {
                    RmwOp::Swap => "swap",
                    RmwOp::F(op) => op.name(),
                };
                let lock = if lock { ".lock" } else { "" };
                write!(f, "{}rmw.{name}.{}{lock} [{base}{}], {src}", Dest(old), size.name(), Offset(off))
            }
            Op::CmpXchg { d, size, expected, new, base, off } => {
                write!(f, "{d} = cmpxchg.{} [{base}{}], {expected}, {new}", size.name(), Offset(off))
            }
            Op::Rep(Rep { size, fill, count, from, to, narrow, down, down_mask }) => {
                let wide = if narrow { "" } else { ".wide" };
                write!(f, "rep.{}{wide} [{to}], ", size.name())?;
                match fill {
                    Some(fill) => write!(f, "{fill}")?,
                    None => write!(f, "[{from}]")?,
                }
                write!(f, ", {count} unless env[{}] & {down_mask:#x}", Val::Imm(down.into()))
            }
            Op::Unit { insn, d, a, off } => write!(f, "{}unit {}, {a}{}", Dest(d), UnitText(insn), Offset(off)),
            Op::BranchF { cond, to, dead } => {
                write!(f, "brf.{} -> {to}", cond.name())?;
                if dead.is_empty() { Ok(()) } else { write!(f, " dead {dead}") }
            }
            Op::Count { insns, total } => write!(f, "count {insns} {total}"),
            Op::TraceBlock { id, entry } => write!(f, "trace.{} {id}", if entry { "entry" } else { "block" }),
            Op::TraceAccess { head, base, off } => write!(f, "trace.access {head} [{base}{}]", Offset(off)),
            Op::TraceValue { value: Some(value) } => write!(f, "trace.value {value}"),
            Op::TraceValue { value: None } => write!(f, "trace.done"),
            Op::Jump { to } => write!(f, "jump {to}"),
            Op::JumpReg { base, off, link, hint } => {
                write!(f, "jumpreg {base}{}", Offset(off))?;
                match hint {
                    JumpHint::None => {}
                    JumpHint::Call => write!(f, " call")?,
                    JumpHint::Return => write!(f, " ret")?,
                }
                link.map_or(Ok(()), |(d, pc)| write!(f, " link {d} = {pc}"))
            }
            Op::Dispatch => write!(f, "dispatch"),
        }
    }
}
