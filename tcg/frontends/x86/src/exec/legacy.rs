//! Integer instructions that are rare: decimal arithmetic, BOUND, ENTER, PUSHA, wide compare-and-exchange, division with
//! its exceptions, forms of stack instructions that touch segments or memory.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::*;
use mimus_tcg_ir::flags::{Flags, after_division, eval};
use mimus_tcg_ir::{FlagOp, Size};

use super::Exec;
use crate::exception::{Exception, Result};
use crate::frontend::{X86Cpu, taken};
use crate::host::Host;
use crate::segment;
use crate::stack::{Stack, selector_bytes};
use crate::state::{FS, GS, SS, mask, sext};
use crate::translate::{is_high, segment_number};

type Run = fn(&mut Exec<'_>) -> Result<()>;

pub(super) fn find(insn: &Instruction) -> Option<Run> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Div | M::Idiv => divide,
        M::Aaa | M::Aas => ascii_adjust,
        M::Aam | M::Aad => ascii_multiply,
        M::Daa | M::Das => decimal_adjust,
        M::Salc => |x| {
            let carry = x.flags().contains(Flags::CF);
            x.set_reg(Register::AL, if carry { 0xff } else { 0 });
            Ok(())
        },
        M::Xlatb => |x| {
            let value = x.read(if x.insn.op_kind(0) == OpKind::Memory { 0 } else { 1 }, 1)?;
            x.set_reg(Register::AL, value);
            Ok(())
        },
        M::Bound => bound,
        M::Enter => enter,
        M::Leave => leave,
        M::Pusha | M::Pushad => push_all,
        M::Popa | M::Popad => pop_all,
        M::Push => |x| {
            let bytes = x.insn.stack_pointer_increment().unsigned_abs();
            let segment = x.insn.op_kind(0) == OpKind::Register && x.insn.op_register(0).is_segment_register();
            let value = if segment {
                u64::from(x.cpu.guest.st.seg[segment_number(x.insn.op_register(0))].selector)
            } else {
                x.read(0, bytes)?
            };
            let written = if segment { selector_bytes(bytes, x.cpu.guest.st.features.amd) } else { bytes };
            let mut stack = Stack::current(x.cpu);
            stack.push_into(x.cpu, bytes, value, written)?;
            stack.commit(x.cpu);
            Ok(())
        },
        M::Pop => pop,
        M::Cmpxchg8b => compare_exchange_8,
        M::Cmpxchg16b => compare_exchange_16,
        M::Cmpxchg => compare_exchange_register,
        M::Shld | M::Shrd => double_shift,
        M::Crc32 if insn.op_kind(1) == OpKind::Register && is_high(insn.op_register(1)) => crc32_of_high_byte,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => super::vector::masked_move,
        _ => return None,
    })
}

/// DIV and IDIV with #DE (SDM volume 2).
fn divide(x: &mut Exec<'_>) -> Result<()> {
    let bytes = x.bytes(0);
    let b = x.read(0, bytes)?;
    let (low, high) = match bytes {
        1 => (x.reg(Register::AL), x.reg(Register::AH)),
        2 => (x.reg(Register::AX), x.reg(Register::DX)),
        4 => (x.reg(Register::EAX), x.reg(Register::EDX)),
        _ => (x.reg(Register::RAX), x.reg(Register::RDX)),
    };
    let width = bytes * 8;
    let dividend = u128::from(high) << width | u128::from(low);
    let (q, r) = if x.insn.mnemonic() == Mnemonic::Div {
        if b == 0 {
            return Err(Exception::DE);
        }
        (dividend / u128::from(b), dividend % u128::from(b))
    } else {
        let shift = 128 - 2 * width;
        let a = (dividend << shift) as i128 >> shift;
        let b = i128::from(sext(b, bytes) as i64);
        if b == 0 {
            return Err(Exception::DE);
        }
        let q = a.checked_div(b).ok_or(Exception::DE)?;
        let fits = i128::from(sext(q as u64, bytes) as i64) == q;
        if !fits {
            return Err(Exception::DE);
        }
        ((q as u128) & u128::from(mask(bytes)), (a % b) as u128 & u128::from(mask(bytes)))
    };
    if q > u128::from(mask(bytes)) {
        return Err(Exception::DE);
    }
    let (to, rest) = match bytes {
        1 => (Register::AL, Register::AH),
        2 => (Register::AX, Register::DX),
        4 => (Register::EAX, Register::EDX),
        _ => (Register::RAX, Register::RDX),
    };
    x.set_reg(to, q as u64);
    x.set_reg(rest, r as u64);
    let flags = after_division(x.flags());
    x.set_flags(flags);
    Ok(())
}

fn with(flags: Flags, which: Flags, on: bool) -> Flags {
    flags.replace(which, if on { which } else { Flags::NONE })
}

/// Sign, zero and parity of AL.
fn result_flags(flags: Flags, al: u64) -> Flags {
    let al = al as u8;
    let flags = with(flags, Flags::SF, al & 0x80 != 0);
    let flags = with(flags, Flags::ZF, al == 0);
    with(flags, Flags::PF, al.count_ones().is_multiple_of(2))
}

fn ascii_adjust(x: &mut Exec<'_>) -> Result<()> {
    let flags = x.flags();
    let ax = x.reg(Register::AX);
    let adjust = ax & 15 > 9 || flags.contains(Flags::AF);
    let sub = x.insn.mnemonic() == Mnemonic::Aas;
    // What is undefined is what the sum of 16 bits gives.
    let op = if sub { FlagOp::Sub } else { FlagOp::Add };
    let (new, flags) = eval(op, Size::B2, ax, if adjust { 0x106 } else { 0 }, flags);
    x.set_reg(Register::AX, new.unwrap_or(ax) & 0xff0f);
    x.set_flags(with(flags, Flags::CF.union(Flags::AF), adjust));
    Ok(())
}

fn ascii_multiply(x: &mut Exec<'_>) -> Result<()> {
    let base = u64::from(x.insn.immediate8());
    let ax = x.reg(Register::AX);
    if x.insn.mnemonic() == Mnemonic::Aad {
        // What is undefined is what the sum gives.
        let (new, flags) = eval(FlagOp::Add, Size::B1, ax & 0xff, (ax >> 8).wrapping_mul(base) & 0xff, x.flags());
        x.set_reg(Register::AX, new.unwrap_or_default() & 0xff);
        x.set_flags(flags);
        return Ok(());
    }
    if base == 0 {
        return Err(Exception::DE);
    }
    let al = ax & 0xff;
    let new = ((al / base) << 8) | (al % base);
    x.set_reg(Register::AX, new);
    x.set_flags(result_flags(Flags::NONE, new));
    Ok(())
}

fn decimal_adjust(x: &mut Exec<'_>) -> Result<()> {
    let flags = x.flags();
    let old = x.reg(Register::AL);
    let sub = x.insn.mnemonic() == Mnemonic::Das;
    let by = |value: u64, n: u64| if sub { value.wrapping_sub(n) } else { value.wrapping_add(n) };
    let carry = flags.contains(Flags::CF);
    let mut al = old;
    let mut new_carry = false;
    let low = old & 15 > 9 || flags.contains(Flags::AF);
    if low {
        new_carry = carry || by(al, 6) > 0xff;
        al = by(al, 6) & 0xff;
    }
    let high = old > 0x99 || carry;
    if high {
        al = by(al, 0x60) & 0xff;
    }
    x.set_reg(Register::AL, al);
    // OF, which is undefined, is that of one addition of it all.
    let correction = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let op = if sub { FlagOp::Sub } else { FlagOp::Add };
    let (_, whole) = eval(op, Size::B1, old, correction, flags);
    let flags = with(whole.and(Flags::OF), Flags::AF, low);
    // A borrow of the low digit stays a borrow of DAS.
    let flags = with(flags, Flags::CF, high || sub && new_carry);
    x.set_flags(result_flags(flags, al));
    Ok(())
}

fn bound(x: &mut Exec<'_>) -> Result<()> {
    let bytes = x.insn.op_register(0).size() as u32;
    // The second bound is looked at when the first one has been loaded.
    let at = x.address(bytes, false)?;
    let lower = sext(x.load(at, bytes)?, bytes) as i64;
    let index = sext(x.reg(x.insn.op_register(0)), bytes) as i64;
    if index < lower && !x.cpu.guest.st.features.amd {
        // Intel's processors look no further (measured).
        return Err(Exception::plain(VECTOR_BR));
    }
    let at = x.aligned_address(2 * bytes, bytes, false)?;
    let at = x.cpu.wrap(at.wrapping_add(u64::from(bytes)));
    let upper = sext(x.load(at, bytes)?, bytes) as i64;
    if index < lower || index > upper { Err(Exception::plain(VECTOR_BR)) } else { Ok(()) }
}

/// The frame pointer's register by the stack's width.
fn frame(stack: &Stack, bp: u64) -> u64 {
    bp & stack.mask
}

fn enter(x: &mut Exec<'_>) -> Result<()> {
    let size = u64::from(x.insn.immediate16());
    let level = u32::from(x.insn.immediate8_2nd()) & 31;
    let (bytes, bp) = match x.insn.code() {
        Code::Enterw_imm16_imm8 => (2, Register::BP),
        Code::Enterd_imm16_imm8 => (4, Register::EBP),
        _ => (8, Register::RBP),
    };
    let mut stack = Stack::current(x.cpu);
    let old = x.cpu.gpr(RBP);
    stack.push(x.cpu, old, bytes)?;
    let top = stack.sp;
    if level > 0 {
        let mut from = stack;
        from.sp = frame(&stack, old);
        for _ in 1..level {
            from.skip(u64::from(bytes).wrapping_neg());
            let mut reader = from;
            let value = reader.pop(x.cpu, bytes)?;
            stack.push(x.cpu, value, bytes)?;
        }
        stack.push(x.cpu, top, bytes)?;
    }
    stack.skip(size.wrapping_neg());
    // The new top must be writable.
    stack.probe(x.cpu, bytes)?;
    stack.commit(x.cpu);
    x.set_reg(bp, top);
    Ok(())
}

fn leave(x: &mut Exec<'_>) -> Result<()> {
    let (bytes, bp) = match x.insn.code() {
        Code::Leavew => (2, Register::BP),
        Code::Leaved => (4, Register::EBP),
        _ => (8, Register::RBP),
    };
    let mut stack = Stack::current(x.cpu);
    stack.sp = frame(&stack, x.cpu.gpr(RBP));
    let value = stack.pop(x.cpu, bytes)?;
    stack.commit(x.cpu);
    x.set_reg(bp, value);
    Ok(())
}

fn push_all(x: &mut Exec<'_>) -> Result<()> {
    let bytes = if x.insn.mnemonic() == Mnemonic::Pusha { 2 } else { 4 };
    let mut stack = Stack::current(x.cpu);
    for n in 0..8 {
        let value = x.cpu.gpr(n);
        stack.push(x.cpu, value, bytes)?;
    }
    stack.commit(x.cpu);
    Ok(())
}

fn pop_all(x: &mut Exec<'_>) -> Result<()> {
    let bytes = if x.insn.mnemonic() == Mnemonic::Popa { 2 } else { 4 };
    let mut stack = Stack::current(x.cpu);
    let mut values = [0; 8];
    for n in (0..8).rev() {
        values[n] = stack.pop(x.cpu, bytes)?;
    }
    stack.commit(x.cpu);
    for (n, value) in values.into_iter().enumerate().filter(|(n, _)| *n != RSP) {
        let old = x.cpu.gpr(n);
        x.cpu.set_gpr(n, if bytes == 2 { old & !0xffff | value } else { value });
    }
    Ok(())
}

/// POP to a segment register, not CS.
pub(super) fn pop_segment(cpu: &mut X86Cpu, seg: usize, bytes: u32) -> Result<()> {
    let mut stack = Stack::current(cpu);
    let read = selector_bytes(bytes, cpu.guest.st.features.amd);
    let selector = stack.pop_from(cpu, bytes, read)? as u16;
    // The stack pointer changes when the segment register has been loaded.
    segment::load(cpu, seg, selector)?;
    stack.commit(cpu);
    if seg == SS {
        super::system::inhibit_behind_ss(cpu);
    }
    Ok(())
}

fn pop(x: &mut Exec<'_>) -> Result<()> {
    let bytes = x.insn.stack_pointer_increment().unsigned_abs();
    if x.insn.op_kind(0) == OpKind::Register && x.insn.op_register(0).is_segment_register() {
        return pop_segment(x.cpu, segment_number(x.insn.op_register(0)), bytes);
    }
    let mut stack = Stack::current(x.cpu);
    let value = stack.pop(x.cpu, bytes)?;
    if x.insn.op_kind(0) == OpKind::Register {
        let r = x.insn.op_register(0);
        stack.commit(x.cpu);
        x.set_reg(r, value);
        return Ok(());
    }
    // The address is made with the stack pointer after the pop.
    if x.insn.memory_base().full_register() == Register::RSP {
        let width = x.insn.memory_base().size() as u32;
        x.offset = x.offset.wrapping_add(u64::from(bytes)) & mask(width);
    }
    x.write(0, bytes, value)?;
    stack.commit(x.cpu);
    Ok(())
}

fn compare_exchange_8(x: &mut Exec<'_>) -> Result<()> {
    let at = x.address(8, true)?;
    let old = x.reg(Register::EAX) | x.reg(Register::EDX) << 32;
    let new = x.reg(Register::EBX) | x.reg(Register::ECX) << 32;
    let found = x
        .cpu
        .try_rmw(at, Size::B8, &mut |found| if found == old { new } else { found })
        .map_err(|_| taken(x.cpu, at))?;
    finish_exchange(x, found == old, found & 0xffff_ffff, found >> 32, Register::EAX, Register::EDX);
    Ok(())
}

fn finish_exchange(x: &mut Exec<'_>, same: bool, low: u64, high: u64, a: Register, d: Register) {
    let flags = with(x.flags(), Flags::ZF, same);
    x.set_flags(flags);
    if !same {
        x.set_reg(a, low);
        x.set_reg(d, high);
    }
}

fn compare_exchange_16(x: &mut Exec<'_>) -> Result<()> {
    // Alignment comes first.
    let seg = x.segment();
    let base = if matches!(seg, FS | GS) { x.cpu.guest.st.seg[seg].base } else { 0 };
    if !x.offset.wrapping_add(base).is_multiple_of(16) {
        return Err(Exception::GP0);
    }
    let at = x.aligned_address(16, 1, true)?;
    if at % 16 != 0 {
        return Err(Exception::GP0);
    }
    let wide = |low: u64, high: u64| u128::from(low) | u128::from(high) << 64;
    let old = wide(x.cpu.gpr(RAX), x.cpu.gpr(RDX));
    let new = wide(x.cpu.gpr(RBX), x.cpu.gpr(RCX));
    let found = match x.cpu.compare_exchange_16(at, old, new) {
        Ok(found) => found.unwrap_or(!0),
        Err(_) => return Err(taken(x.cpu, at)),
    };
    finish_exchange(x, found == old, found as u64, (found >> 64) as u64, Register::RAX, Register::RDX);
    Ok(())
}

/// CMPXCHG between registers.
fn compare_exchange_register(x: &mut Exec<'_>) -> Result<()> {
    let (to, from) = (x.insn.op_register(0), x.insn.op_register(1));
    let bytes = to.size() as u32;
    let accumulator = match bytes {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    let (a, old, new) = (x.reg(accumulator), x.reg(to), x.reg(from));
    let size = crate::translate::size(bytes);
    let (_, flags) = eval(FlagOp::Sub, size, a, old, x.flags());
    x.set_flags(flags);
    if a == old {
        x.set_reg(to, new);
    } else {
        // The upper half of a 32-bit destination stays, as on the processors of one maker.
        x.set_reg(accumulator, old);
    }
    Ok(())
}

/// CRC32 of AH, CH, DH or BH, which no stub can name: polynomial 0x1edc6f41, reflected.
fn crc32_of_high_byte(x: &mut Exec<'_>) -> Result<()> {
    let to = x.insn.op_register(0);
    let mut crc = x.reg(to) as u32 ^ x.reg(x.insn.op_register(1)) as u32;
    for _ in 0..8 {
        crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
    }
    x.set_reg(to, crc.into());
    Ok(())
}

/// SHLD and SHRD of memory.
fn double_shift(x: &mut Exec<'_>) -> Result<()> {
    super::vector::integer(x)
}
