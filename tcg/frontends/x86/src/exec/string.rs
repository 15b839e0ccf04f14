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
use crate::translate::size;

const PAGE: u64 = 4096;
/// Most bytes that are moved or stored before the vCPU looks up.
const MOST: u64 = 64 << 10;

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

/// Whether a repeated instruction has more to do behind the element that it is at.
pub(super) fn goes_on(x: &Exec<'_>) -> bool {
    let mask = (0..x.insn.op_count()).find_map(|i| address_mask(x.insn.op_kind(i))).unwrap_or(!0);
    x.cpu.gpr(RCX) & mask > 1
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
    let op = Op { kind, bytes, mask, seg: x.segment(), until, down };
    if matches!(kind, Kind::Ins | Kind::Outs) {
        // Even if nothing is left to do.
        let port = x.reg(Register::DX) as u16;
        crate::task::check_io(x.cpu, port, bytes)?;
    }
    if !rep {
        return element(x, &op).map(drop);
    }
    x.cpu.guest.repeats = None;
    let before = x.flags();
    let finished = repeat(x, &op);
    // Until comparisons have come to their end Intel's processors leave the flags as they were: where one faults (SDM
    // volume 2 "REP"), and at single steps (measured).
    if !matches!(finished, Ok(true)) && compares && !x.cpu.guest.st.features.amd {
        x.set_flags(before);
    }
    finished.map(drop)
}

/// Whether it has come to its end.
fn repeat(x: &mut Exec<'_>, op: &Op) -> Result<bool> {
    // Debug exceptions come after each repetition.
    let single = crate::debugging::steps(&x.cpu.guest.st);
    loop {
        let count = x.cpu.gpr(RCX) & op.mask;
        if count == 0 {
            return Ok(true);
        }
        let at_once = if single { 0 } else { chunk(x, op, count)? };
        let done = match at_once {
            0 => {
                let equal = element(x, op)?;
                if op.until.is_some_and(|wanted| wanted != equal) {
                    advance(x, RCX, op, 1, true);
                    return Ok(true);
                }
                1
            }
            n => n,
        };
        advance(x, RCX, op, done, true);
        if count > done && (single || x.cpu.kicked() || x.cpu.code_changed()) {
            // Goes on with the rest afterwards.
            let pc = x.pc;
            x.cpu.guest.repeats = Some(pc);
            x.cpu.jump(pc);
            return Ok(false);
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
    let va = segment::linear(&x.cpu.guest.st, op.seg, x.cpu.gpr(RSI) & op.mask, bytes, false)?;
    x.cpu.guest.st.check_alignment(va, bytes)?;
    Ok(va)
}

fn target(x: &Exec<'_>, op: &Op, bytes: u32, write: bool) -> Result<u64> {
    let va = segment::linear(&x.cpu.guest.st, ES, x.cpu.gpr(RDI) & op.mask, bytes, write)?;
    x.cpu.guest.st.check_alignment(va, bytes)?;
    Ok(va)
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
            // All that the source can fault with comes before the target is looked at.
            let from = source(x, op, bytes)?;
            let value = x.load(from, bytes)?;
            let to = target(x, op, bytes, true)?;
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
            let (left, right) = operands(x, op, bytes)?;
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

/// What CMPS compares. AMD's processors load the first operand first, Intel's the second (both measured).
fn operands(x: &mut Exec<'_>, op: &Op, bytes: u32) -> Result<(u64, u64)> {
    let first = |x: &mut Exec<'_>| source(x, op, bytes).and_then(|from| x.load(from, bytes));
    let second = |x: &mut Exec<'_>| target(x, op, bytes, false).and_then(|with| x.load(with, bytes));
    if x.cpu.guest.st.features.amd {
        let left = first(x)?;
        return Ok((left, second(x)?));
    }
    let right = second(x)?;
    Ok((first(x)?, right))
}

fn compare(x: &mut Exec<'_>, bytes: u32, a: u64, b: u64) -> bool {
    let (_, flags) = eval(FlagOp::Sub, size(bytes), a, b, x.flags());
    x.set_flags(flags);
    flags.contains(Flags::ZF)
}

/// Elements from an offset on, in the direction of the instruction, that neither wrap around nor leave the page.
fn in_page(offset: u64, va: u64, op: &Op) -> u64 {
    let (bytes, at) = (u64::from(op.bytes), va & (PAGE - 1));
    if !op.down {
        let before_wrap = (op.mask - offset).saturating_add(1);
        return (PAGE - at).min(before_wrap) / bytes;
    }
    if at + bytes > PAGE || op.mask - offset < bytes - 1 {
        return 0;
    }
    at.min(offset) / bytes + 1
}

/// One side of a chunk: where it is, and how many elements it can have.
#[derive(Clone, Copy)]
struct Side {
    seg: usize,
    offset: u64,
    va: u64,
    write: bool,
}

impl Side {
    /// Host address of the lowest of `n` elements; `None` if an element has to be looked at alone.
    fn host(&self, x: &mut Exec<'_>, op: &Op, n: u64) -> Result<Option<*mut u8>> {
        let rest = (n - 1) * u64::from(op.bytes);
        let below = if op.down { rest } else { 0 };
        let (first, last) = (self.offset - below, self.offset - below + rest + u64::from(op.bytes) - 1);
        // The whole chunk is inside the segment, or single elements find out where it ends.
        let st = &x.cpu.guest.st;
        if [first, last].iter().any(|&at| segment::linear(st, self.seg, at, 1, self.write).is_err()) {
            return Ok(None);
        }
        // A fault is that of the first element.
        let host = if self.write {
            x.cpu.host_for_store(self.va)
        } else {
            x.cpu.host_for_load(self.va).map(|host| host.map(<*const u8>::cast_mut))
        };
        let host = host.map_err(|_| taken(x.cpu, self.va))?;
        Ok(host.map(|host| host.wrapping_sub(below as usize)))
    }

    /// Whether `bytes` bytes from its first on, upwards, are inside the segment and do not wrap around.
    fn has(&self, x: &Exec<'_>, op: &Op, bytes: u64) -> bool {
        let last = bytes - 1;
        let is_last = |va| va == self.va.wrapping_add(last);
        last <= op.mask - self.offset
            && segment::linear(&x.cpu.guest.st, self.seg, self.offset + last, 1, self.write).is_ok_and(is_last)
    }
}

/// Moves or stores on, behind `done` of `count` elements, for as long as the TLB has the pages and nothing else is to be looked
/// at; how many elements.
fn onwards(x: &Exec<'_>, op: &Op, sides: [Option<Side>; 2], done: u64, count: u64) -> u64 {
    let (bytes, first) = (u64::from(op.bytes), done * u64::from(op.bytes));
    let end = count.min(MOST / bytes) * bytes;
    if end <= first || sides.iter().flatten().any(|side| !side.has(x, op, end)) {
        return 0;
    }
    let value = x.reg(accumulator(op.bytes));
    let mut at = first;
    while at < end {
        let mut piece = end - at;
        let mut hosts = [std::ptr::null_mut(); 2];
        for (host, side) in hosts.iter_mut().zip(sides) {
            let Some(side) = side else { continue };
            let va = side.va.wrapping_add(at);
            let Some(found) = x.cpu.host_at_once(va, side.write) else { return (at - first) / bytes };
            *host = found;
            piece = piece.min(PAGE - (va & (PAGE - 1)));
        }
        let n = piece / bytes;
        match op.kind {
            // An element in two pages.
            _ if n == 0 => break,
            Kind::Movs if copy(x, hosts, op, n) == 0 => break,
            Kind::Movs => {}
            _ => fill(hosts[1], op.bytes, n as usize, value),
        }
        at += n * bytes;
    }
    (at - first) / bytes
}

/// Executes as many elements as can be at once; 0 if an element has to be looked at alone.
fn chunk(x: &mut Exec<'_>, op: &Op, count: u64) -> Result<u64> {
    if count < 2 || matches!(op.kind, Kind::Ins | Kind::Outs) {
        return Ok(0);
    }
    let mut n = count;
    // What cannot be reached at all is for the single element, which knows what comes first.
    let mut side = |x: &Exec<'_>, register: usize, seg: usize, write: bool| -> Option<Side> {
        let offset = x.cpu.gpr(register) & op.mask;
        let va = segment::linear(&x.cpu.guest.st, seg, offset, op.bytes, write).ok()?;
        x.cpu.guest.st.check_alignment(va, op.bytes).ok()?;
        n = n.min(in_page(offset, va, op));
        Some(Side { seg, offset, va, write })
    };
    let uses_source = matches!(op.kind, Kind::Movs | Kind::Cmps | Kind::Lods);
    let uses_target = op.kind != Kind::Lods;
    let writes = matches!(op.kind, Kind::Movs | Kind::Stos);
    let source = if uses_source { side(x, RSI, op.seg, false) } else { None };
    let target = if uses_target { side(x, RDI, ES, writes) } else { None };
    if (source.is_some(), target.is_some()) != (uses_source, uses_target) {
        return Ok(0);
    }
    if n < 2 {
        return Ok(0);
    }
    let mut hosts = [std::ptr::null_mut(); 2];
    let mut sides = [(0, source), (1, target)];
    if op.kind == Kind::Cmps && !x.cpu.guest.st.features.amd {
        // Faults come in the order of `operands`.
        sides.reverse();
    }
    for (i, side) in sides {
        let Some(side) = side else { continue };
        match side.host(x, op, n)? {
            Some(found) => hosts[i] = found,
            None => return Ok(0),
        }
    }
    let mut done = match op.kind {
        Kind::Movs => copy(x, hosts, op, n),
        Kind::Stos => {
            fill(hosts[1], op.bytes, n as usize, x.reg(accumulator(op.bytes)));
            n
        }
        // Only the last one stays.
        Kind::Lods => n - 1,
        _ => {
            let value = x.reg(accumulator(op.bytes));
            let run = run_length(hosts, op, n, value);
            // The last comparison is the one that the flags are of.
            if run == n { n - 1 } else { run }
        }
    };
    if writes && !op.down && done == n && n < count {
        done += onwards(x, op, [source, target], n, count);
    }
    for (register, side) in [(RSI, source), (RDI, target)] {
        if let Some(side) = side {
            let bytes = done * u64::from(op.bytes);
            let below = if op.down { bytes.saturating_sub(op.bytes.into()) } else { 0 };
            x.cpu.trace_bulk(side.write, side.va.wrapping_sub(below), bytes);
            advance(x, register, op, done, false);
        }
    }
    Ok(done)
}

/// Copies `n` elements; 0 if that has to be done one by one.
fn copy(x: &Exec<'_>, [source, target]: [*mut u8; 2], op: &Op, n: u64) -> u64 {
    let bytes = n * u64::from(op.bytes);
    // A page may have two addresses, which do not show what overlaps.
    let [source, target] = x.cpu.comparable([source, target]);
    let ahead = (target as u64).wrapping_sub(source as u64);
    let behind = ahead.wrapping_neg();
    let repeats = if op.down { behind != 0 && behind < bytes } else { ahead != 0 && ahead < bytes };
    if !repeats {
        // SAFETY: `bytes` bytes inside a page each, that the TLB grants loads from and stores to.
        unsafe { std::ptr::copy(source, target, bytes as usize) };
        return n;
    }
    // A target a little further on repeats what is in between: so does the host's instruction, byte by byte, if no
    // element overlaps itself.
    if op.down || ahead < u64::from(op.bytes) {
        return 0;
    }
    // SAFETY: as above; the direction flag is clear in Rust code.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rsi") source => _, inout("rdi") target => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags)
        );
    }
    n
}

/// How many of the first `n` elements a comparison goes on after.
fn run_length(hosts: [*mut u8; 2], op: &Op, n: u64, value: u64) -> u64 {
    let n = n as usize;
    let length = match op.bytes {
        1 => run_of::<1>(hosts, op, n, value),
        2 => run_of::<2>(hosts, op, n, value),
        4 => run_of::<4>(hosts, op, n, value),
        _ => run_of::<8>(hosts, op, n, value),
    };
    length as u64
}

/// Bytes compared at once.
const BLOCK: usize = 64;

fn run_of<const N: usize>([source, target]: [*mut u8; 2], op: &Op, n: usize, value: u64) -> usize {
    let wanted = op.until == Some(true);
    let mut constant = [0; N];
    constant.copy_from_slice(&value.to_le_bytes()[..N]);
    let cmps = op.kind == Kind::Cmps;
    // SAFETY: inside pages that the TLB grants loads of, which hold `n` elements; a torn copy is what racing processors
    // get.
    let element = |i: usize| unsafe {
        let at = if op.down { n - 1 - i } else { i } * N;
        let with = target.add(at).cast::<[u8; N]>().read_unaligned();
        let from = if cmps { source.add(at).cast::<[u8; N]>().read_unaligned() } else { constant };
        (from == with) == wanted
    };
    let mut i = 0;
    let per_block = BLOCK / N;
    while !op.down && i + per_block <= n {
        // SAFETY: as above.
        let goes_on = unsafe {
            let with = target.add(i * N).cast::<[u8; BLOCK]>().read_unaligned();
            let from = if cmps { source.add(i * N).cast::<[u8; BLOCK]>().read_unaligned() } else { [0; BLOCK] };
            let (with, _) = with.as_chunks::<N>();
            let (from, _) = from.as_chunks::<N>();
            // Without a way out in the middle, so that it is done in vectors.
            if cmps {
                from.iter().zip(with).fold(true, |all, (a, b)| all & ((a == b) == wanted))
            } else {
                with.iter().fold(true, |all, b| all & ((*b == constant) == wanted))
            }
        };
        if !goes_on {
            break;
        }
        i += per_block;
    }
    while i < n && element(i) {
        i += 1;
    }
    i
}

/// Stores `n` elements from `target` up.
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
