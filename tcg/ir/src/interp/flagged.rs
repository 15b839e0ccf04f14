//! The operations of guests with flags and partial registers.

use super::{Fault, InterpHost, address, extend, value};
use crate::flags::{self, FLAGS, Flags};
use crate::op::*;

fn get<H: InterpHost>(host: &H) -> Flags {
    Flags::unpack(host.slot(FLAGS))
}

fn put<H: InterpHost>(host: &mut H, flags: Flags) {
    host.set_slot(FLAGS, flags.pack());
}

/// Fills a slot with a result of `size`.
fn fill<H: InterpHost>(host: &mut H, d: Slot, size: Size, result: u64) {
    let filled = flags::merge(size, host.slot(d), result);
    host.set_slot(d, filled);
}

/// Those that have nothing to do with flags.
pub(super) fn plain<H: InterpHost>(op: &Op, host: &mut H) {
    match *op {
        Op::Lea { d, base, index, shift, disp, size } => {
            let scaled = value(host, index) << (shift & 3);
            let sum = value(host, base).wrapping_add(scaled).wrapping_add(disp as i64 as u64);
            host.set_slot(d, extend(sum, size, Ext::Zero));
        }
        Op::SetPart { d, size, a } => {
            let a = value(host, a);
            fill(host, d, size.min(Size::B2), a);
        }
        Op::GetHigh { d, a } => {
            let a = host.slot(a);
            host.set_slot(d, a >> 8 & 0xff);
        }
        Op::SetHigh { d, a } => {
            let filled = host.slot(d) & !0xff00 | (value(host, a) & 0xff) << 8;
            host.set_slot(d, filled);
        }
        Op::LoadEnv { d, off, size, ext } => {
            let raw = (0..size.bytes() as i32)
                .fold(0, |raw, i| raw | u64::from(host.env_byte(off.wrapping_add(i))) << (8 * i));
            host.set_slot(d, extend(raw, size, ext));
        }
        Op::StoreEnv { src, off, size } => {
            let bytes = value(host, src).to_le_bytes();
            for (i, byte) in (0..size.bytes() as i32).zip(bytes) {
                host.set_env_byte(off.wrapping_add(i), byte);
            }
        }
        _ => {}
    }
}

/// Those that read or write flags and do nothing else but write slots.
pub(super) fn step<H: InterpHost>(op: &Op, host: &mut H) {
    let old = get(host);
    match *op {
        Op::AluF { op, size, d, a, b } => {
            let constant = matches!(b, Val::Imm(_));
            let (a, b) = (value(host, a), value(host, b));
            let (result, new) = flags::eval(op, size, a, b, old);
            let new = if constant { flags::after_constant(op, size, b, old, new) } else { new };
            set_flags_of(host, op, size, b, new);
            if let (Some(d), Some(result)) = (d, result) {
                fill(host, d, size, result);
            }
        }
        Op::ShiftDoubleF { left, size, d, a, b, n } => {
            let (a, b, n) = (value(host, a), value(host, b), value(host, n));
            let (result, new) = flags::shift_double(left, size, a, b, n, old);
            let beyond = size == Size::B2 && flags::count(size, n) > 16;
            set_flags_of(host, FlagOp::Shl, size, n, new);
            if beyond {
                host.flags_written(Flags::NONE, Flags::ALL, Flags::NONE);
            }
            fill(host, d, size, result);
        }
        Op::MulWideF { signed, size, lo, hi, a, b } => {
            let (low, high, overflow) = flags::mul_wide(signed, size, value(host, a), value(host, b));
            put(host, flags::after_mul_wide(old, size, low, overflow));
            let undefined = flags::undefined(FlagOp::Mul);
            host.flags_written(Flags::ALL, undefined, Flags::NONE);
            if size == Size::B1 {
                fill(host, lo, Size::B2, high << 8 | low);
            } else {
                fill(host, lo, size, low);
                fill(host, hi, size, high);
            }
        }
        Op::SetCondF { cond, d } => fill(host, d, Size::B1, flags::holds(cond, old).into()),
        Op::CMovF { cond, size, d, a } => {
            let a = if flags::holds(cond, old) { value(host, a) } else { host.slot(d) };
            fill(host, d, size, a);
        }
        Op::GetFlags { d } => host.set_slot(d, old.0.into()),
        Op::SetFlags { a, mask } => {
            let from = Flags::from_eflags(value(host, a));
            change(host, mask, from);
        }
        Op::FlipFlags { mask } => change(host, mask, Flags(!old.0 & Flags::ALL.0)),
        Op::DeadFlags { mask } => host.flags_written(Flags::NONE, Flags::NONE, mask),
        _ => {}
    }
}

fn change<H: InterpHost>(host: &mut H, mask: Flags, from: Flags) {
    let mask = mask.and(Flags::ALL);
    let new = get(host).replace(mask, from);
    put(host, new);
    host.flags_written(mask, Flags::NONE, Flags::NONE);
}

/// The flags after `op` with second operand `b`.
fn set_flags_of<H: InterpHost>(host: &mut H, op: FlagOp, size: Size, b: u64, new: Flags) {
    if flags::written_by(op).is_empty() {
        return;
    }
    put(host, new);
    let counts =
        matches!(op, FlagOp::Shl | FlagOp::Shr | FlagOp::Sar | FlagOp::Rol | FlagOp::Ror | FlagOp::Rcl | FlagOp::Rcr);
    if !counts || flags::count(size, b) != 0 {
        host.flags_written(flags::written_by(op), flags::undefined(op), Flags::NONE);
    }
}

/// The read-modify-writes of memory.
///
/// # Errors
/// The access faulted; then nothing has changed.
pub(super) fn access<H: InterpHost>(op: &Op, narrow: bool, host: &mut H) -> Result<(), Fault> {
    match *op {
        Op::Rmw { op, size, lock, old, src, base, off } => {
            let constant = matches!(src, Val::Imm(_));
            let (va, src, before) = (address(host, narrow, base, off), value(host, src), get(host));
            let eval = |memory: u64| match op {
                RmwOp::Swap => (src, before),
                RmwOp::F(op) => {
                    let (result, flags) = flags::eval(op, size, memory, src, before);
                    let flags = if constant { flags::after_constant(op, size, src, before, flags) } else { flags };
                    (result.unwrap_or(memory), flags)
                }
            };
            let memory = host.rmw(va, size, lock, &mut |memory| eval(memory).0)?;
            if let RmwOp::F(op) = op {
                set_flags_of(host, op, size, src, eval(memory).1);
            }
            if let Some(old) = old {
                host.set_slot(old, memory);
            }
        }
        Op::CmpXchg { d, size, expected, new, base, off } => {
            let va = address(host, narrow, base, off);
            let (expected, new) = (extend(value(host, expected), size, Ext::Zero), value(host, new));
            let memory = host.rmw(va, size, true, &mut |old| if old == expected { new } else { old })?;
            host.set_slot(d, memory);
        }
        _ => {}
    }
    Ok(())
}

/// Whether a branch is taken.
pub(super) fn branch<H: InterpHost>(host: &mut H, cond: CondF, dead: Flags) -> bool {
    let taken = flags::holds(cond, get(host));
    if taken {
        host.flags_written(Flags::NONE, Flags::NONE, dead);
    }
    taken
}

/// Divides, if that can be done.
pub(super) fn divide<H: InterpHost>(op: &Op, host: &mut H) -> bool {
    let Op::DivWideF { signed, size, q, r, hi, lo, b } = *op else {
        return true;
    };
    let (mut hi, lo, b) = (value(host, hi), value(host, lo), value(host, b));
    if size == Size::B1 {
        hi = lo >> 8;
    }
    let Some((quotient, remainder)) = flags::div_wide(signed, size, hi, lo, b) else {
        return false;
    };
    if size == Size::B1 {
        fill(host, q, Size::B2, remainder << 8 | quotient);
    } else {
        fill(host, q, size, quotient);
        fill(host, r, size, remainder);
    }
    let new = flags::after_division(get(host));
    change(host, Flags::ALL.without(flags::KEPT_BY_DIVISION), new);
    true
}
