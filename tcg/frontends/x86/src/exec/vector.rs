//! Instructions that run on the host's units: memory and its faults, and floating-point exceptions around a stub.
#![allow(unsafe_code)]

use std::arch::asm;

use iced_x86::{Mnemonic, OpKind, Register};
use mimus_arch::x86::regs::*;
use mimus_tcg_ir::flags::Flags;

use super::{Exec, exact};
use crate::exception::{Exception, Result};
use crate::frontend::taken;
use crate::host::Host;
use crate::native::{Built, Memory, Unit, asks_for_alignment, uses_mmx};
use crate::state::{CS, FS, GS, MXCSR_MASKS, Mode};
use crate::{debugging, fpu, segment};

/// Exception flags.
pub(super) const MXCSR_FLAGS: u32 = 0x3f;
/// Invalid operation, denormal operand, division by zero.
pub(super) const BEFORE_COMPUTING: u32 = 7;
pub(super) const UNDERFLOW: u32 = 0x10;
/// Exceptions that, unmasked, keep the x87 unit from storing: invalid operation, overflow, underflow.
const KEEP_BACK: u16 = 0x19;
/// Flush to zero.
pub(super) const MXCSR_FTZ: u32 = 0x8000;

/// A memory operand, if the guest's own cannot be used in place.
#[repr(C, align(64))]
struct Buffer([u8; 128]);

/// An instruction of a floating-point or vector unit.
pub(super) fn run(x: &mut Exec<'_>) -> Result<()> {
    if x.insn.is_vsib() {
        check_unit(x, Unit::Avx)?;
        return gather(x);
    }
    if matches!(x.insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        check_unit(x, Unit::Avx)?;
        let count = if x.cpu.guest.st.is_64bit() { 16 } else { 8 };
        let from = if x.insn.mnemonic() == Mnemonic::Vzeroall { 0 } else { 2 };
        x.cpu.guest.st.vec[..count].iter_mut().for_each(|v| v[from..].fill(0));
        return Ok(());
    }
    if masks_memory(x.insn.mnemonic()) {
        check_unit(x, Unit::Avx)?;
        return masked(x);
    }
    let built = built(x)?;
    check_unit(x, built.unit)?;
    execute(x, &built)
}

/// An integer instruction.
pub(super) fn integer(x: &mut Exec<'_>) -> Result<()> {
    let built = built(x)?;
    execute(x, &built)
}

fn built(x: &mut Exec<'_>) -> Result<Built> {
    let generation = x.cpu.guest.native.generation();
    if let Some((built, of)) = x.built
        && of == generation
    {
        return Ok(built);
    }
    let Some(built) = x.cpu.guest.native.build(&x.insn) else {
        log::warn!("no way to execute {:?} at {:#x}: #UD", x.insn.code(), x.pc);
        return Err(Exception::UD);
    };
    let generation = x.cpu.guest.native.generation();
    super::keep(x, (built, generation));
    Ok(built)
}

/// Whether the unit may be used (SDM volume 3 section 2.5, table 2-2; volume 1 section 13.5).
pub(super) fn check_unit(x: &Exec<'_>, unit: Unit) -> Result<()> {
    let st = &x.cpu.guest.st;
    let available = match unit {
        Unit::Integer => return Ok(()),
        Unit::X87 if st.cr0 & CR0_EM != 0 => return Err(Exception::NM),
        Unit::X87 => true,
        Unit::Mmx => st.cr0 & CR0_EM == 0,
        Unit::Sse => st.cr0 & CR0_EM == 0 && st.cr4 & CR4_OSFXSR != 0,
        Unit::Avx => {
            let on = st.cr4 & CR4_OSXSAVE != 0 && st.xcr0 & 6 == 6;
            on && !matches!(st.mode(), Mode::Real | Mode::V86)
        }
    };
    if !available {
        return Err(Exception::UD);
    }
    if st.cr0 & CR0_TS != 0 {
        return Err(Exception::NM);
    }
    // MOVQ2DQ and its like touch both register files.
    let x87 = matches!(unit, Unit::X87 | Unit::Mmx) || unit == Unit::Sse && uses_mmx(&x.insn);
    if x87 && fpu::pending(&x.cpu.guest) && waits(x.insn.mnemonic()) {
        return Err(Exception::plain(VECTOR_MF));
    }
    Ok(())
}

/// Instructions that do not look at pending exceptions.
fn waits(m: Mnemonic) -> bool {
    use Mnemonic as M;
    !matches!(
        m,
        M::Fninit
            | M::Fnclex
            | M::Fnstcw
            | M::Fnstsw
            | M::Fnstenv
            | M::Fnsave
            // Which do nothing at all.
            | M::Fneni
            | M::Fndisi
            | M::Fnsetpm
    )
}

fn execute(x: &mut Exec<'_>, built: &Built) -> Result<()> {
    let done = attempt(x, built);
    let stores = !matches!(built.memory, Memory::None | Memory::Read);
    if done.is_err() && stores && fpu::minds_faults_of_stores(&x.cpu.guest) {
        fpu::after_fault_of_store(&mut x.cpu.guest, Some(x.insn));
    }
    done
}

fn attempt(x: &mut Exec<'_>, built: &Built) -> Result<()> {
    let mut buffer = Buffer([0; 128]);
    let bytes = built.bytes as usize;
    let mut store_at = None;
    let mut memory = std::ptr::null_mut();
    if built.memory != Memory::None {
        let write = built.memory != Memory::Read;
        // Where an operand must be aligned, that is another exception, and the first.
        let seg = x.segment();
        let aligned = built.aligned && asks_for_alignment(&x.insn, &x.cpu.guest.st);
        let based = !x.cpu.guest.st.is_64bit() || matches!(seg, FS | GS);
        let base = if based { x.cpu.guest.st.seg[seg].base } else { 0 };
        if aligned && !x.offset.wrapping_add(base).is_multiple_of(built.bytes.into()) {
            return Err(Exception::GP0);
        }
        let first = computes_first(x, built);
        let excepted = aligned || first || x.insn.mnemonic() == Mnemonic::Vcvtph2ps && !x.cpu.guest.st.features.amd;
        let va = operand_address(x, built.bytes, if excepted { 1 } else { built.bytes }, write);
        if first {
            return compute_and_store(x, built, va);
        }
        let va = va?;
        if aligned && va % u64::from(built.bytes) != 0 {
            return Err(Exception::GP0);
        }
        // What the guest's processor does not ask for, the host's may.
        let excused = built.aligned && !va.is_multiple_of(built.bytes.into());
        let inside = va & 4095 <= 4096 - built.bytes as u64 && !excused;
        if stores_eight(x, built, va) {
            return compute_and_store(x, built, Ok(va));
        }
        memory = operand(x, va, built, inside, &mut buffer)?;
        if memory == buffer.0.as_mut_ptr() && write {
            store_at = Some(va);
        }
    }
    compute(x, built, memory)?;
    if let Some(va) = store_at {
        store(x, va, &buffer.0[..bytes])?;
    }
    Ok(())
}

fn compute(x: &mut Exec<'_>, built: &Built, memory: *mut u8) -> Result<()> {
    match built.unit {
        Unit::X87 => x87(x, built, memory)?,
        Unit::Sse | Unit::Avx | Unit::Mmx if built.mxcsr => with_mxcsr(x, built, memory)?,
        _ => call(x, built, memory),
    }
    Ok(())
}

/// Whether exceptions of a computation come before those of the store of its result: with Intel's processors (measured).
fn computes_first(x: &Exec<'_>, built: &Built) -> bool {
    let st = &x.cpu.guest.st;
    let raises = match built.unit {
        Unit::X87 => st.fcw & 0x3f != 0x3f,
        _ => x.insn.mnemonic() == Mnemonic::Vcvtps2ph,
    };
    raises && built.memory == Memory::Write && !st.features.amd
}

/// Whether eight of ten bytes stay stored if the page of the rest is missing: with Intel's processors (measured).
fn stores_eight(x: &Exec<'_>, built: &Built, va: u64) -> bool {
    let at_end = matches!(va & 4095, 4087 | 4088);
    at_end && built.bytes == 10 && built.memory == Memory::Write && !x.cpu.guest.st.features.amd
}

/// Computes, and stores the result unless an x87 exception keeps it back. A fault of the store leaves the x87 unit as it
/// was, but not MXCSR's flags.
fn compute_and_store(x: &mut Exec<'_>, built: &Built, va: Result<u64>) -> Result<()> {
    let mut buffer = Buffer([0; 128]);
    let before = (built.unit == Unit::X87).then(|| (fpu::image(&x.cpu.guest), x.cpu.guest.st.fpu_pointers));
    compute(x, built, buffer.0.as_mut_ptr())?;
    // Unmasked, these keep results back (SDM volume 1 section 8.5).
    if before.is_some() && fpu::host_status() & !x.cpu.guest.st.fcw & KEEP_BACK != 0 {
        return Ok(());
    }
    let bytes = built.bytes as usize;
    let stored = va.and_then(|va| store_result(x, built, va, &buffer.0[..bytes]));
    if let (Err(_), Some((image, pointers))) = (&stored, before) {
        fpu::load_image(&mut x.cpu.guest, &image);
        x.cpu.guest.st.fpu_pointers = pointers;
    }
    stored
}

/// The linear address of the memory operand. Of ten bytes to be stored the processor looks at eight, and then at two: a
/// page that is missing is told before a limit that only the two are beyond (measured).
fn operand_address(x: &mut Exec<'_>, bytes: u32, alignment: u32, write: bool) -> Result<u64> {
    let whole = x.aligned_address(bytes, alignment, write);
    if whole.is_err() && bytes == 10 && write {
        let first = x.aligned_address(8, alignment, write)?;
        for at in [first, x.cpu.wrap(first.wrapping_add(7))] {
            if x.cpu.host_for_store(at).is_err() {
                return Err(taken(x.cpu, at));
            }
        }
    }
    whole
}

fn store_result(x: &mut Exec<'_>, built: &Built, va: u64, result: &[u8]) -> Result<()> {
    if built.unit == Unit::X87 {
        x.cpu.guest.st.check_alignment(va, built.bytes)?;
    }
    let there = look_at_ends(x, va, result.len());
    match there {
        Err(fault) if stores_eight(x, built, va) => store(x, va, &result[..8]).and(Err(fault)),
        _ => there.and_then(|()| store(x, va, result)),
    }
}

/// Faults if the first or the last byte cannot be stored, in this order.
fn look_at_ends(x: &mut Exec<'_>, va: u64, bytes: usize) -> Result<()> {
    let last = if va & 4095 > 4096 - bytes as u64 { x.cpu.wrap(page_behind(va)) } else { va };
    for at in [va, last] {
        if x.cpu.host_for_store(at).is_err() {
            return Err(taken(x.cpu, at));
        }
    }
    Ok(())
}

/// Where the stub finds the memory operand: the guest's RAM if it is in one page of it, else the buffer.
fn operand(x: &mut Exec<'_>, va: u64, built: &Built, inside: bool, buffer: &mut Buffer) -> Result<*mut u8> {
    let bytes = built.bytes as usize;
    if inside && built.memory == Memory::Read {
        match x.cpu.host_for_load(va) {
            Ok(Some(host)) => {
                x.cpu.trace_bulk(false, va, bytes as u64);
                return Ok(host.cast_mut());
            }
            Ok(None) => {}
            Err(_) => return Err(taken(x.cpu, va)),
        }
    }
    if inside && built.memory != Memory::Read {
        match x.cpu.host_for_store(va) {
            Ok(Some(host)) => {
                x.cpu.trace_bulk(true, va, bytes as u64);
                return Ok(host);
            }
            Ok(None) => {}
            Err(_) => return Err(taken(x.cpu, va)),
        }
    }
    if built.memory != Memory::Read && !inside {
        // Nothing is computed unless its result can be stored.
        for at in [va, x.cpu.wrap(page_behind(va))] {
            if x.cpu.host_for_store(at).is_err() {
                return Err(taken(x.cpu, at));
            }
        }
    }
    // An x87 instruction may find out that it stores nothing.
    if built.memory != Memory::Write || built.unit == Unit::X87 {
        load(x, va, &mut buffer.0[..bytes])?;
    }
    Ok(buffer.0.as_mut_ptr())
}

/// The page behind that of an address: where an access that leaves its page faults.
const fn page_behind(va: u64) -> u64 {
    (va | 4095).wrapping_add(1)
}

/// Loads bytes, over a page's end if need be.
pub(super) fn load(x: &mut Exec<'_>, va: u64, to: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < to.len() {
        let at = x.cpu.wrap(va.wrapping_add(done as u64));
        let n = (to.len() - done).min((4096 - (at & 4095)) as usize);
        if x.cpu.load_bytes(at, &mut to[done..done + n]).is_err() {
            return Err(taken(x.cpu, at));
        }
        done += n;
    }
    Ok(())
}

/// Stores bytes, over a page's end if need be; nothing, if any cannot be.
pub(super) fn store(x: &mut Exec<'_>, va: u64, from: &[u8]) -> Result<()> {
    let behind = x.cpu.wrap(page_behind(va));
    if (va & 4095) + from.len() as u64 > 4096 && x.cpu.host_for_store(behind).is_err() {
        return Err(taken(x.cpu, behind));
    }
    let mut done = 0;
    while done < from.len() {
        let at = x.cpu.wrap(va.wrapping_add(done as u64));
        let n = (from.len() - done).min((4096 - (at & 4095)) as usize);
        if x.cpu.store_bytes(at, &from[done..done + n]).is_err() {
            return Err(taken(x.cpu, at));
        }
        done += n;
    }
    Ok(())
}

/// Calls the stub.
fn call(x: &mut Exec<'_>, built: &Built, memory: *mut u8) {
    let flags = u64::from(x.flags().0) | 2;
    let slots = x.cpu.head.slots.as_mut_ptr();
    let vectors = x.cpu.guest.st.vec.as_mut_ptr();
    let flags = (built.run)(slots, memory, vectors, flags);
    if built.sets_flags {
        x.set_flags(Flags::from_eflags(flags));
    }
}

/// What an instruction can write, to be put back if it faults after all.
struct Undo {
    vec: [[u64; 4]; 16],
    slots: [u64; 16],
    flags: Flags,
    /// Of instructions with MMX registers.
    x87: Option<crate::state::FxArea>,
    memory: [u8; 32],
}

/// Bytes of a memory operand that is written.
fn written(built: &Built) -> usize {
    if matches!(built.memory, Memory::Write | Memory::ReadWrite) { (built.bytes as usize).min(32) } else { 0 }
}

impl Undo {
    fn take(x: &Exec<'_>, built: &Built, memory: *mut u8) -> Undo {
        let mut slots = [0; 16];
        slots.copy_from_slice(&x.cpu.head.slots[..16]);
        let mut undo = Undo {
            vec: x.cpu.guest.st.vec,
            slots,
            flags: x.flags(),
            x87: uses_mmx(&x.insn).then(|| fpu::image(&x.cpu.guest)),
            memory: [0; 32],
        };
        let bytes = written(built);
        if bytes > 0 {
            // SAFETY: the memory operand's bytes.
            unsafe { std::ptr::copy_nonoverlapping(memory, undo.memory.as_mut_ptr(), bytes) };
        }
        undo
    }

    fn put_back(&self, x: &mut Exec<'_>, built: &Built, memory: *mut u8) {
        x.cpu.guest.st.vec = self.vec;
        x.cpu.head.slots[..16].copy_from_slice(&self.slots);
        x.set_flags(self.flags);
        if let Some(image) = &self.x87 {
            // The registers are MMX registers from before the computation on.
            fpu::load_image(&mut x.cpu.guest, image);
            fpu::enter_mmx(&mut x.cpu.guest);
        }
        let bytes = written(built);
        if bytes > 0 {
            // SAFETY: as in `take`.
            unsafe { std::ptr::copy_nonoverlapping(self.memory.as_ptr(), memory, bytes) };
        }
    }
}

/// Calls the stub under an MXCSR with every exception masked; answers the MXCSR after it.
fn call_with(x: &mut Exec<'_>, built: &Built, memory: *mut u8, mxcsr: u32) -> u32 {
    let mut host = 0u32;
    let mut after = 0u32;
    let quiet = mxcsr | MXCSR_MASKS;
    // SAFETY: every exception is masked, and the host's own word is put back; no Rust arithmetic happens in between.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &mut host, options(nostack));
        asm!("ldmxcsr [{}]", in(reg) &quiet, options(nostack));
        call(x, built, memory);
        asm!("stmxcsr [{}]", in(reg) &mut after, options(nostack));
        asm!("ldmxcsr [{}]", in(reg) &host, options(nostack));
    }
    after
}

/// Runs under the guest's MXCSR, and raises #XM if an exception that it does not mask came up: then the destination stays
/// as it was (SDM volume 1 section 11.5.2).
fn with_mxcsr(x: &mut Exec<'_>, built: &Built, memory: *mut u8) -> Result<()> {
    let mxcsr = x.cpu.guest.st.mxcsr;
    if mxcsr & MXCSR_MASKS == MXCSR_MASKS {
        let after = call_with(x, built, memory, mxcsr);
        x.cpu.guest.st.mxcsr = mxcsr | after & MXCSR_FLAGS;
        return Ok(());
    }
    let unmasked = !(mxcsr >> 7) & MXCSR_FLAGS;
    let undo = Undo::take(x, built, memory);
    let mut flags = 0;
    if unmasked & UNDERFLOW != 0 {
        // Unmasked, a tiny result is an underflow even if it is exact: flushing to zero shows all of them.
        flags = if x.insn.mnemonic() == Mnemonic::Vcvtps2ph {
            // Where halves come out nothing is flushed.
            exact::raised(x, memory, mxcsr).unwrap_or(0) & UNDERFLOW
        } else {
            call_with(x, built, memory, mxcsr & !MXCSR_FLAGS | MXCSR_FTZ) & UNDERFLOW
        };
        undo.put_back(x, built, memory);
    }
    let zero = if unmasked & UNDERFLOW != 0 { MXCSR_FTZ } else { 0 };
    flags |= call_with(x, built, memory, mxcsr & !MXCSR_FLAGS & !zero) & MXCSR_FLAGS;
    // What is found before computing keeps the rest from being found.
    if flags & unmasked & BEFORE_COMPUTING != 0 {
        flags &= BEFORE_COMPUTING;
    }
    if flags & unmasked == 0 {
        x.cpu.guest.st.mxcsr = mxcsr | flags;
        return Ok(());
    }
    undo.put_back(x, built, memory);
    x.cpu.guest.st.mxcsr = mxcsr | exact::raised(x, memory, mxcsr).unwrap_or(flags);
    let vector = if x.cpu.guest.st.cr4 & CR4_OSXMMEXCPT != 0 { VECTOR_XM } else { VECTOR_UD };
    Err(Exception::plain(vector))
}

/// An x87 computation. With exceptions unmasked the host's unit computes under the guest's control word: what comes up
/// waits, and results are those of unmasked exceptions (SDM volume 1 section 8.5). The unit never gets to an
/// instruction that would take it: FNSTENV, which masks everything, comes first.
fn x87(x: &mut Exec<'_>, built: &Built, memory: *mut u8) -> Result<()> {
    let fcw = x.cpu.guest.st.fcw;
    if fcw & 0x3f == 0x3f {
        call(x, built, memory);
        return Ok(());
    }
    let mut environment = [0u8; 28];
    // SAFETY: no exception that the new control word does not mask is pending (see `check_unit`), nor is one when Rust
    // code goes on.
    unsafe {
        asm!("fldcw [{}]", in(reg) &fcw, options(nostack));
        call(x, built, memory);
        asm!("fnstenv [{}]", in(reg) &mut environment, options(nostack));
    }
    let seg = x.segment();
    let st = &mut x.cpu.guest.st;
    let p = &mut st.fpu_pointers;
    p.cs = st.seg[CS].selector;
    p.ip = x.next.wrapping_sub(x.insn.len() as u64);
    p.opcode = opcode(&x.packed);
    if built.memory != Memory::None {
        p.dp = x.offset;
        p.ds = st.seg[seg].selector;
    }
    Ok(())
}

/// The eleven bits of the opcode that the x87 unit keeps.
fn opcode(packed: &[u64; 2]) -> u16 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&packed[0].to_le_bytes());
    bytes[8..].copy_from_slice(&packed[1].to_le_bytes());
    // The last byte is the length; no prefix looks like one of these.
    let at = bytes[..14].iter().position(|b| (0xd8..=0xdf).contains(b)).unwrap_or(0);
    u16::from(bytes[at] & 7) << 8 | u16::from(bytes[at + 1])
}

/// MASKMOVQ and MASKMOVDQU: the bytes of the first operand whose mask has its top bit set go to DS:rDI.
pub(super) fn masked_move(x: &mut Exec<'_>) -> Result<()> {
    let mmx = x.insn.mnemonic() == Mnemonic::Maskmovq;
    let unit = match x.insn.mnemonic() {
        Mnemonic::Maskmovq => Unit::Mmx,
        Mnemonic::Maskmovdqu => Unit::Sse,
        _ => Unit::Avx,
    };
    check_unit(x, unit)?;
    if mmx {
        fpu::enter_mmx(&mut x.cpu.guest);
    }
    let count = if mmx { 8 } else { 16 };
    let (a, b) = (x.insn.op_register(1), x.insn.op_register(2));
    let value = |x: &Exec<'_>, r: Register| -> [u8; 16] {
        let mut bytes = [0; 16];
        if mmx {
            let image = fpu::image(&x.cpu.guest);
            // The registers are relative to the top of the stack.
            let top = (fpu::word(&image.0, 2) >> 11 & 7) as usize;
            let at = 32 + 16 * ((r.number() + 8 - top) % 8);
            bytes[..8].copy_from_slice(&image.0[at..at + 8]);
        } else {
            bytes[..8].copy_from_slice(&x.cpu.guest.st.vec[r.number()][0].to_le_bytes());
            bytes[8..].copy_from_slice(&x.cpu.guest.st.vec[r.number()][1].to_le_bytes());
        }
        bytes
    };
    let (data, mask) = (value(x, a), value(x, b));
    let width = match x.insn.op_kind(0) {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let seg = x.segment();
    // All of it must be there, whatever the mask; a half after the other, with Intel's processors the second first
    // (measured).
    let halves: &[u64] = match (mmx, x.cpu.guest.st.features.amd) {
        (true, _) => &[0],
        (false, true) => &[0, 8],
        (false, false) => &[8, 0],
    };
    for &half in halves {
        let offset = x.cpu.gpr(RDI).wrapping_add(half) & crate::state::mask(width);
        let first = segment::linear(&x.cpu.guest.st, seg, offset, 8, true)?;
        x.cpu.guest.st.check_alignment(first, 8)?;
        let last = x.cpu.wrap(first.wrapping_add(7));
        let pages = if first & !4095 == last & !4095 { [first, first] } else { [first, last & !4095] };
        for page in pages {
            if x.cpu.host_for_store(page).is_err() {
                return Err(taken(x.cpu, page));
            }
        }
    }
    for i in 0..count {
        if mask[i] & 0x80 != 0 {
            let offset = x.cpu.gpr(RDI).wrapping_add(i as u64) & crate::state::mask(width);
            let at = segment::linear(&x.cpu.guest.st, seg, offset, 1, true)?;
            x.store(at, 1, u64::from(data[i]))?;
        }
    }
    Ok(())
}

/// Whether an instruction leaves out parts of its memory operand.
pub(super) fn masks_memory(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(m, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// VMASKMOV and VPMASKMOV: elements whose mask has its top bit set; the others are not accessed at all.
fn masked(x: &mut Exec<'_>) -> Result<()> {
    let bytes = if matches!(x.insn.mnemonic(), Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd) { 4 } else { 8 };
    let stores = x.insn.op_kind(0) == OpKind::Memory;
    let register = x.insn.op_register(if stores { 2 } else { 0 });
    let mask = x.cpu.guest.st.vec[x.insn.op_register(1).number()];
    let elements = register.size() / bytes;
    let wanted: Vec<usize> = (0..elements).filter(|&i| part(&mask, i, bytes) >> (8 * bytes - 1) & 1 != 0).collect();
    let offset = x.offset;
    let place = |x: &Exec<'_>, i: usize| {
        let seg = x.segment();
        let at = offset.wrapping_add((i * bytes) as u64) & x.cpu.guest.st.ip_mask();
        segment::linear(&x.cpu.guest.st, seg, at, bytes as u32, stores)
    };
    if stores {
        for &i in &wanted {
            let va = place(x, i)?;
            for at in [va, x.cpu.wrap(va.wrapping_add(bytes as u64 - 1)) & !4095] {
                if x.cpu.host_for_store(at).is_ok() {
                    continue;
                }
                let fault = taken(x.cpu, at);
                // Of a page that is there, and not the first, Intel's processors tell the last byte (measured).
                let begin = place(x, *wanted.first().unwrap_or(&i))?;
                let last = place(x, *wanted.last().unwrap_or(&i))?;
                let last = x.cpu.wrap(last.wrapping_add(bytes as u64 - 1));
                let over = begin & !4095 != at & !4095 && last & !4095 == at & !4095;
                if over
                    && fault.error.unwrap_or(0) & 1 != 0
                    && !x.cpu.guest.st.features.amd
                    && x.cpu.host_for_store(last).is_err()
                {
                    return Err(taken(x.cpu, last));
                }
                return Err(fault);
            }
        }
        let data = x.cpu.guest.st.vec[register.number()];
        for &i in &wanted {
            let va = place(x, i)?;
            x.store(va, bytes as u32, part(&data, i, bytes))?;
        }
        return Ok(());
    }
    let mut loaded = [0; 4];
    for &i in &wanted {
        let va = place(x, i)?;
        let value = x.load(va, bytes as u32)?;
        set_part(&mut loaded, i, bytes, value);
    }
    x.cpu.guest.st.vec[register.number()] = loaded;
    Ok(())
}

/// Gathers: element by element, the mask says what is left to do (SDM volume 2 "VGATHERDPD").
fn gather(x: &mut Exec<'_>) -> Result<()> {
    use Mnemonic as M;
    let (index_bytes, element_bytes) = match x.insn.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (8, 8),
        _ => return Err(Exception::UD),
    };
    let (to, mask) = (x.insn.op_register(0).number(), x.insn.op_register(2).number());
    let index = x.insn.memory_index();
    if to == mask || to == index.number() || mask == index.number() {
        return Err(Exception::UD);
    }
    let wide = x.insn.op_register(0).is_ymm() || index.is_ymm();
    let vector = if wide { 32 } else { 16 };
    let elements = vector / usize::max(index_bytes, element_bytes);
    let scale = u64::from(x.insn.memory_index_scale());
    let base_register = x.insn.memory_base();
    let base = if base_register == Register::None { 0 } else { x.reg(base_register) };
    let displacement = x.insn.memory_displacement64();
    let seg = x.segment();
    let limit = if x.cpu.guest.st.is_64bit() && base_register.size() != 4 { !0 } else { 0xffff_ffff };
    // What breakpoints the elements have hit, once there is one.
    let mut loaded = None;
    for i in 0..elements {
        let wanted = part(&x.cpu.guest.st.vec[mask], i, element_bytes) >> (8 * element_bytes - 1) & 1 != 0;
        if wanted {
            let raw = part(&x.cpu.guest.st.vec[index.number()], i, index_bytes);
            let step = crate::state::sext(raw, index_bytes as u32).wrapping_mul(scale);
            let offset = base.wrapping_add(step).wrapping_add(displacement) & limit;
            let at = segment::linear(&x.cpu.guest.st, seg, offset, element_bytes as u32, false);
            let (at, value) = match at.and_then(|at| Ok((at, x.load(at, element_bytes as u32)?))) {
                Ok(found) => found,
                Err(fault) => {
                    if !x.cpu.guest.st.features.amd {
                        settle_mask(&mut x.cpu.guest.st.vec[mask], vector, element_bytes);
                        if loaded.is_some() && vector == 16 {
                            x.cpu.guest.st.vec[to][2..].fill(0);
                        }
                    }
                    let pending = loaded.and_then(|hits| debugging::pending_in_between(x.cpu, x.pc, hits));
                    return Err(pending.unwrap_or(fault));
                }
            };
            *loaded.get_or_insert(0) |= debugging::load_hits(&x.cpu.guest.st, at, element_bytes as u64);
            set_part(&mut x.cpu.guest.st.vec[to], i, element_bytes, value);
        }
        set_part(&mut x.cpu.guest.st.vec[mask], i, element_bytes, 0);
    }
    let written = elements * element_bytes;
    for register in [to, mask] {
        let words = &mut x.cpu.guest.st.vec[register];
        for (w, word) in words.iter_mut().enumerate() {
            if w * 8 >= written {
                *word = 0;
            }
        }
    }
    Ok(())
}

/// The mask of a gather of `vector` bytes that faults, as Intel's processors leave it (measured): elements are all ones or
/// all zeros, and what is behind the vector is zero.
fn settle_mask(mask: &mut [u64; 4], vector: usize, element_bytes: usize) {
    for i in 0..32 / element_bytes {
        let left =
            (i + 1) * element_bytes <= vector && part(mask, i, element_bytes) >> (8 * element_bytes - 1) & 1 != 0;
        set_part(mask, i, element_bytes, if left { !0 } else { 0 });
    }
}

fn part(vector: &[u64; 4], i: usize, bytes: usize) -> u64 {
    let word = vector[i * bytes / 8];
    if bytes == 8 { word } else { word >> (32 * (i % 2)) & 0xffff_ffff }
}

fn set_part(vector: &mut [u64; 4], i: usize, bytes: usize, value: u64) {
    let word = &mut vector[i * bytes / 8];
    *word = if bytes == 8 {
        value
    } else {
        let shift = 32 * (i % 2);
        *word & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift
    };
}
