//! String instructions: whole chunks of pages at once where that is the same.
//!
//! Spec: SDM volume 2 "REP"; volume 1 section 7.3.9. An interrupt or a fault in between finds the registers as far as
//! the instruction got.
#![allow(unsafe_code)]

use iced_x86::{Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::*;
use mimus_tcg_ir::FlagOp;
use mimus_tcg_ir::flags::{Flags, eval};

use super::Exec;
use super::system::{port_in, port_out};
use crate::exception::Result;
use crate::frontend::taken;
use crate::host::Host;
use crate::segment;
use crate::state::{ES, mask};
use crate::translate::{segment_number, size};

const PAGE: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

/// A string instruction taken apart.
struct Op {
    kind: Kind,
    /// Bytes of an element.
    bytes: u32,
    /// Mask of the address size.
    mask: u64,
    /// Segment of the source.
    seg: usize,
    /// Ends when ZF is not this.
    until: Option<bool>,
    down: bool,
}

fn kind(m: Mnemonic) -> (Kind, u32) {
    use Mnemonic as M;
    match m {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        M::Insb => (Kind::Ins, 1),
        M::Insw => (Kind::Ins, 2),
        M::Insd => (Kind::Ins, 4),
        M::Outsb => (Kind::Outs, 1),
        M::Outsw => (Kind::Outs, 2),
        _ => (Kind::Outs, 4),
    }
}

fn address_mask(kind: OpKind) -> Option<u64> {
    use OpKind as K;
    Some(match kind {
        K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => 0xffff,
        K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => 0xffff_ffff,
        K::MemorySegRSI | K::MemorySegRDI | K::MemoryESRDI => !0,
        _ => return None,
    })
}

/// Executes a string instruction.
pub(super) fn run(x: &mut Exec<'_>) -> Result<()> {
    let insn = x.insn;
    let (kind, bytes) = kind(insn.mnemonic());
    let mask = (0..insn.op_count()).find_map(|i| address_mask(insn.op_kind(i))).unwrap_or(!0);
    let compares = matches!(kind, Kind::Scas | Kind::Cmps);
    let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
    let until = compares.then_some(insn.has_rep_prefix());
    let down = x.cpu.guest.st.flags & RFLAGS_DF != 0;
    let op = Op { kind, bytes, mask, seg: segment_number(insn.memory_segment()), until, down };
    if !rep {
        return element(x, &op).map(drop);
    }
    loop {
        let count = x.cpu.gpr(RCX) & op.mask;
        if count == 0 {
            return Ok(());
        }
        let done = match chunk(x, &op, count)? {
            0 => {
                let equal = element(x, &op)?;
                if op.until.is_some_and(|wanted| wanted != equal) {
                    advance(x, RCX, &op, 1, true);
                    return Ok(());
                }
                1
            }
            n => n,
        };
        advance(x, RCX, &op, done, true);
        if count > done && (x.cpu.kicked() || x.cpu.code_changed()) {
            // Goes on with the rest afterwards.
            let pc = x.pc;
            x.cpu.jump(pc);
            return Ok(());
        }
    }
}

/// Adds `elements` to an index register, or takes them from the counter.
fn advance(x: &mut Exec<'_>, register: usize, op: &Op, elements: u64, counter: bool) {
    let old = x.cpu.gpr(register);
    let step = match (counter, op.down) {
        (true, _) => elements.wrapping_neg(),
        (false, false) => elements * u64::from(op.bytes),
        (false, true) => (elements * u64::from(op.bytes)).wrapping_neg(),
    };
    let new = old.wrapping_add(step) & op.mask;
    // A 32-bit register is written whole.
    x.cpu.set_gpr(register, if op.mask == 0xffff { old & !0xffff | new } else { new });
}

fn source(x: &Exec<'_>, op: &Op, bytes: u32) -> Result<u64> {
    segment::linear(&x.cpu.guest.st, op.seg, x.cpu.gpr(RSI) & op.mask, bytes, false)
}

fn target(x: &Exec<'_>, op: &Op, bytes: u32, write: bool) -> Result<u64> {
    segment::linear(&x.cpu.guest.st, ES, x.cpu.gpr(RDI) & op.mask, bytes, write)
}

fn accumulator(bytes: u32) -> Register {
    match bytes {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    }
}

/// One element; for comparisons, whether they were equal.
fn element(x: &mut Exec<'_>, op: &Op) -> Result<bool> {
    let bytes = op.bytes;
    let a = accumulator(bytes);
    let mut equal = true;
    match op.kind {
        Kind::Movs => {
            let from = source(x, op, bytes)?;
            let to = target(x, op, bytes, true)?;
            let value = x.load(from, bytes)?;
            x.store(to, bytes, value)?;
        }
        Kind::Stos => {
            let to = target(x, op, bytes, true)?;
            let value = x.reg(a);
            x.store(to, bytes, value)?;
        }
        Kind::Lods => {
            let from = source(x, op, bytes)?;
            let value = x.load(from, bytes)?;
            x.set_reg(a, value);
        }
        Kind::Scas => {
            let from = target(x, op, bytes, false)?;
            let value = x.load(from, bytes)?;
            equal = compare(x, bytes, x.reg(a), value);
        }
        Kind::Cmps => {
            let from = source(x, op, bytes)?;
            let with = target(x, op, bytes, false)?;
            let (left, right) = (x.load(from, bytes)?, x.load(with, bytes)?);
            equal = compare(x, bytes, left, right);
        }
        Kind::Ins => {
            let to = target(x, op, bytes, true)?;
            // The port is read only if its value can be stored.
            if x.cpu.host_for_store(to).is_err() {
                return Err(taken(x.cpu, to));
            }
            let port = x.reg(Register::DX) as u16;
            let value = port_in(x, port, bytes)?;
            x.store(to, bytes, value)?;
        }
        Kind::Outs => {
            let from = source(x, op, bytes)?;
            let value = x.load(from, bytes)?;
            let port = x.reg(Register::DX) as u16;
            port_out(x, port, bytes, value)?;
        }
    }
    if matches!(op.kind, Kind::Movs | Kind::Lods | Kind::Cmps | Kind::Outs) {
        advance(x, RSI, op, 1, false);
    }
    if matches!(op.kind, Kind::Movs | Kind::Stos | Kind::Scas | Kind::Cmps | Kind::Ins) {
        advance(x, RDI, op, 1, false);
    }
    Ok(equal)
}

fn compare(x: &mut Exec<'_>, bytes: u32, a: u64, b: u64) -> bool {
    let (_, flags) = eval(FlagOp::Sub, size(bytes), a, b, x.flags());
    x.set_flags(flags);
    flags.contains(Flags::ZF)
}

/// Elements from an offset on that neither wrap around nor leave the page.
fn in_page(offset: u64, va: u64, op: &Op) -> u64 {
    let left = PAGE - (va & (PAGE - 1));
    let before_wrap = (op.mask - offset).saturating_add(1);
    left.min(before_wrap) / u64::from(op.bytes)
}

/// Moves or stores as many elements as can be at once; 0 if an element has to be looked at alone.
fn chunk(x: &mut Exec<'_>, op: &Op, count: u64) -> Result<u64> {
    if op.down || !matches!(op.kind, Kind::Movs | Kind::Stos) {
        return Ok(0);
    }
    let to_offset = x.cpu.gpr(RDI) & op.mask;
    let to = target(x, op, op.bytes, true)?;
    let mut n = count.min(in_page(to_offset, to, op));
    let from_offset = x.cpu.gpr(RSI) & op.mask;
    let from = if op.kind == Kind::Movs { source(x, op, op.bytes)? } else { to };
    if op.kind == Kind::Movs {
        n = n.min(in_page(from_offset, from, op));
    }
    if n < 2 {
        return Ok(0);
    }
    let bytes = n * u64::from(op.bytes);
    // The whole chunk is inside the segments, or single elements find out where they end.
    let last = bytes - 1;
    let st = &x.cpu.guest.st;
    if segment::linear(st, ES, to_offset + last, 1, true).is_err()
        || op.kind == Kind::Movs && segment::linear(st, op.seg, from_offset + last, 1, false).is_err()
    {
        return Ok(0);
    }
    let source = if op.kind == Kind::Movs {
        match x.cpu.host_for_load(from) {
            Ok(Some(host)) => Some(host),
            Ok(None) => return Ok(0),
            Err(_) => return Err(taken(x.cpu, from)),
        }
    } else {
        None
    };
    let target = match x.cpu.host_for_store(to) {
        Ok(Some(host)) => host,
        Ok(None) => return Ok(0),
        Err(_) => return Err(taken(x.cpu, to)),
    };
    if let Some(source) = source {
        // A target a little above the source repeats what is in between.
        let ahead = (target as u64).wrapping_sub(source as u64);
        if ahead != 0 && ahead < bytes {
            return Ok(0);
        }
        // SAFETY: `bytes` bytes inside a page each, that the TLB grants loads from and stores to.
        unsafe { std::ptr::copy(source, target, bytes as usize) };
        x.cpu.trace_bulk(false, from, bytes);
        advance(x, RSI, op, n, false);
    } else {
        let value = x.reg(accumulator(op.bytes));
        fill(target, op.bytes, n as usize, value);
    }
    x.cpu.trace_bulk(true, to, bytes);
    advance(x, RDI, op, n, false);
    Ok(n)
}

/// Stores `n` elements.
fn fill(target: *mut u8, bytes: u32, n: usize, value: u64) {
    let low = value as u8;
    let uniform = value & mask(bytes) == u64::from_le_bytes([low; 8]) & mask(bytes);
    // SAFETY: `n * bytes` bytes inside a page that the TLB grants stores to (see `chunk`).
    unsafe {
        if uniform {
            return std::ptr::write_bytes(target, low, n * bytes as usize);
        }
        for i in 0..n {
            let at = target.add(i * bytes as usize);
            std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), at, bytes as usize);
        }
    }
}
