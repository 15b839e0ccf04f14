//! What generated code calls (through the backend's stubs): see `mimus_tcg_ir::backend::RuntimeFns`.
#![allow(unsafe_code)]

use mimus_tcg_ir::backend::{
    ATOMIC_LOAD_RESERVED, ATOMIC_STORE_CONDITIONAL, ContextLayout, FaultEntry, Optimise, RANGE_SHIFT, RMW_LOCK,
    RuntimeFns, Stored, compact_access_of, rmw_of_kind,
};
use mimus_tcg_ir::flags::{self, FLAGS, Flags};
use mimus_tcg_ir::interp::extend;
use mimus_tcg_ir::{AmoOp, Ext, FpFmt, FpOp, Rm, RmwOp, Size};

use crate::access::{At, Trapped};
use crate::env::{Cpu, HEATS};
use crate::frontend::Access;
use crate::frontend::GuestFrontend;
use crate::ranges::Verdict;
use crate::translate::NoCode;

/// Times that a compact block begins before it is asked about: then a kernel's, which serves all programs, is made anew.
pub(crate) const HEAT: u16 = 160;
/// Times more that a program's begins before it is. (Of compilers, say, a good part of the code runs some hundred times and no more.)
const PATIENCE: u16 = 32;

impl<F: GuestFrontend> Cpu<F> {
    /// An access of compact code that the TLB does not serve: where the code may make it.
    fn access_of_compact(&mut self, ret: usize, va: u64, word: u32, rax: u64) -> Result<u64, Trapped> {
        let (bytes, write, aligned) = compact_access_of(word);
        let at = At::Return(ret);
        if bytes != 0 {
            // Mostly it is a page that has not been looked up yet: then the side table need not be searched.
            let goes_by_tlb = va & 4095 <= 4096 - u64::from(bytes) && (!aligned || va.is_multiple_of(bytes.into()));
            if let Some(host) = goes_by_tlb.then(|| self.host_by_tlb(va, write)).flatten() {
                return Ok(host);
            }
        }
        let mut stored = Stored::Unknown;
        if (write || F::FLAGS)
            && let Some((entry, recipe)) = self.machine.store.resolve_access(ret)
        {
            stored = entry.stored;
            if let Some(recipe) = recipe {
                let flags = recipe.flags(|slot| self.slot(slot));
                self.set_slot(FLAGS, flags.pack());
            }
        }
        if bytes == 0 {
            return Ok(self.guest_pc(ret));
        }
        if aligned && !va.is_multiple_of(bytes.into()) {
            return Err(self.carefully(ret));
        }
        let buffer = self.head.unit_buffer.0.as_ptr() as u64;
        let size = match bytes {
            1 => Some(Size::B1),
            2 => Some(Size::B2),
            4 => Some(Size::B4),
            8 => Some(Size::B8),
            _ => None,
        };
        match (write, size) {
            (false, Some(size)) => {
                let value = self.load(at, va, size, Ext::Zero)?;
                self.head.unit_buffer.0[..8].copy_from_slice(&value.to_le_bytes());
                return Ok(buffer);
            }
            (false, None) => {
                self.load_unit(at, va, u32::from(bytes).min(32))?;
                return Ok(buffer);
            }
            _ => {}
        }
        let value = match stored {
            Stored::Unknown => None,
            Stored::Scratch => Some(rax),
            Stored::Slot(slot) => Some(self.slot(slot)),
            Stored::Imm(imm) => Some(imm as u64),
        };
        if let (Some(value), Some(size)) = (value, size) {
            self.store(at, va, value, size)?;
            return Ok(buffer);
        }
        // What is stored only the code can say: the instruction is executed with care.
        Err(self.carefully(ret))
    }

    /// Where an access inside a page may be made by the code itself, once the page has been entered into the TLB if it may be.
    fn host_by_tlb(&mut self, va: u64, write: bool) -> Option<u64> {
        let access = if write { Access::Store } else { Access::Load };
        // A fault is found again by who has the side table's entry.
        let _fault = self.locate(va, access);
        let context = self.mmu.context();
        if write { context.lookup_write(va) } else { context.lookup_read(va) }
    }

    /// Has the instruction whose code called executed with care, by itself.
    fn carefully(&mut self, ret: usize) -> Trapped {
        self.head.pc = self.guest_pc(ret);
        self.head.exit_request = 1;
        self.give_back(true);
        self.step_at = Some(self.head.pc);
        self.check_events();
        Trapped
    }

    /// An `Op::Rmw`: memory, and the flags in their slot.
    fn rmw_flags(&mut self, at: At, op: RmwOp, va: u64, src: u64, (size, lock): (Size, bool)) -> Result<u64, Trapped> {
        let before = Flags::unpack(self.slot(FLAGS));
        let eval = |memory: u64| match op {
            RmwOp::Swap => (src, before),
            RmwOp::F(op) => {
                let (value, flags) = flags::eval(op, size, memory, src, before);
                (value.unwrap_or(memory), flags)
            }
        };
        let old = self.rmw(at, va, size, lock, &mut |memory| eval(memory).0)?;
        if op != RmwOp::Swap {
            self.set_slot(FLAGS, eval(old).1.pack());
        }
        Ok(old)
    }
}

/// The functions, for guest `F`.
pub(crate) fn functions<F: GuestFrontend>() -> RuntimeFns {
    RuntimeFns {
        load: load::<F> as *const () as usize,
        store: store::<F> as *const () as usize,
        atomic: atomic::<F> as *const () as usize,
        cmpxchg: cmpxchg::<F> as *const () as usize,
        unit_load: unit_load::<F> as *const () as usize,
        unit_probe: unit_probe::<F> as *const () as usize,
        unit_store: unit_store::<F> as *const () as usize,
        note: note::<F> as *const () as usize,
        fp: fp::<F> as *const () as usize,
        link: link::<F> as *const () as usize,
        trace_full: trace_full::<F> as *const () as usize,
        access: access::<F> as *const () as usize,
        warm: warm::<F> as *const () as usize,
    }
}

fn size_from(word: u32) -> Size {
    match word & 3 {
        0 => Size::B1,
        1 => Size::B2,
        2 => Size::B4,
        _ => Size::B8,
    }
}

fn ext_from(word: u32) -> Ext {
    match (word >> 8) & 0xff {
        0 => Ext::Zero,
        1 => Ext::Sign,
        _ => Ext::Ones,
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Address of the guest instruction whose code called with return address `ret`.
    pub(crate) fn guest_pc(&self, ret: usize) -> u64 {
        let entry = self.machine.store.resolve_fault(ret);
        debug_assert!(entry.is_some(), "no side-table entry for return address {ret:#x}");
        let pc = entry.map_or(0, |FaultEntry { pc, .. }| i64::from(pc.0));
        self.head.page_base.wrapping_add_signed(pc)
    }

    /// A load that missed its range entry.
    fn load_and_note(&mut self, ret: usize, va: u64, desc: u32) -> u64 {
        let (size, ext) = (size_from(desc), ext_from(desc));
        if let Some(value) = self.load_by_page(va, size, ext) {
            self.note_range(ret, va, desc);
            return value;
        }
        let Ok(value) = self.load(At::Return(ret), va, size, ext) else { return 0 };
        self.note_range(ret, va, desc);
        value
    }

    /// A store that missed its range entry.
    fn store_and_note(&mut self, ret: usize, va: u64, value: u64, desc: u32) {
        let size = size_from(desc);
        if self.store_by_page(va, value, size) || self.store(At::Return(ret), va, value, size).is_ok() {
            self.note_range(ret, va, desc);
        }
    }

    /// Fills the range entry of an access that has been made; if it missed too often, it will have none any more.
    fn note_range(&mut self, ret: usize, va: u64, desc: u32) {
        let size = size_from(desc);
        // A nanosecond for an instruction.
        let counted = self.counting.on.then(|| (self.executed() / 1000) as u32);
        let soon = self.machine.optimise == Optimise::Forced;
        let verdict = self.mmu.fill_range((desc >> RANGE_SHIFT) - 1, va, size, counted, soon);
        if verdict == Verdict::Stays {
            return;
        }
        if verdict == Verdict::Scatters || self.is_among_few_pages(va) {
            self.note_scattered(ret, va);
        }
        if self.machine.optimise.learns() {
            self.machine.store.scattered(ret, verdict == Verdict::InParts);
        }
    }

    /// An indirect jump has led elsewhere as often as its jump entry allowed: perhaps it is to have another.
    fn note_jump(&mut self, ret: usize, number: u32) {
        let counted = self.counting.on.then(|| (self.executed() / 1000) as u32);
        if self.mmu.judge_jump(number, counted) && self.machine.optimise.learns() {
            self.machine.store.jumps_far(ret, number < ContextLayout::FAR_JUMPS);
        }
    }
}

extern "C" fn load<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, desc: u32, ret: usize) -> u64 {
    // SAFETY: generated code passes its environment, which nothing else borrows while it runs.
    let cpu = unsafe { &mut *cpu };
    cpu.find_left(ret);
    if desc >> RANGE_SHIFT != 0 {
        return cpu.load_and_note(ret, va, desc);
    }
    cpu.load(At::Return(ret), va, size_from(desc), ext_from(desc)).unwrap_or(0)
}

extern "C" fn store<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, value: u64, desc: u32, ret: usize) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.find_left(ret);
    if desc >> RANGE_SHIFT != 0 {
        return cpu.store_and_note(ret, va, value, desc);
    }
    // A trap has set `exit_request`.
    let _trapped = cpu.store(At::Return(ret), va, value, size_from(desc));
}

extern "C" fn atomic<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, desc: u32, value: u64, ret: usize) -> u64 {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    let (size, ext) = (size_from(desc), ext_from(desc));
    let at = At::Return(ret);
    cpu.find_left(ret);
    match (desc >> 16) & 0xff {
        ATOMIC_LOAD_RESERVED => cpu.load_reserved(at, va, size, ext),
        ATOMIC_STORE_CONDITIONAL => cpu.store_conditional(at, va, value, size),
        kind => match rmw_of_kind(kind) {
            Some(op) => cpu.rmw_flags(at, op, va, value, (size, desc & RMW_LOCK != 0)),
            None => cpu.amo(at, amo_from(kind), va, value, size),
        },
    }
    .unwrap_or(0)
}

extern "C" fn cmpxchg<F: GuestFrontend>(
    cpu: *mut Cpu<F>,
    va: u64,
    desc: u32,
    expected: u64,
    new: u64,
    ret: usize,
) -> u64 {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.find_left(ret);
    let size = size_from(desc);
    let expected = extend(expected, size, Ext::Zero);
    let exchange = &mut |old| if old == expected { new } else { old };
    cpu.rmw(At::Return(ret), va, size, true, exchange).unwrap_or(0)
}

extern "C" fn unit_load<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, bytes: u32, ret: usize) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    // A trap has set `exit_request`.
    cpu.find_left(ret);
    let _trapped = cpu.load_unit(At::Return(ret), va, bytes.min(32));
}

extern "C" fn unit_probe<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, bytes: u32, ret: usize) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.find_left(ret);
    let _trapped = cpu.probe_unit(At::Return(ret), va, bytes.min(32));
}

extern "C" fn unit_store<F: GuestFrontend>(cpu: *mut Cpu<F>, bytes: u32) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.store_unit(bytes.min(32));
}

extern "C" fn access<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, word: u32, rax: u64, ret: usize) -> u64 {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.find_left(ret);
    cpu.access_of_compact(ret, va, word, rax).unwrap_or(0)
}

extern "C" fn warm<F: GuestFrontend>(cpu: *mut Cpu<F>, ret: usize) -> usize {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    let machine = cpu.machine.clone();
    let patient = F::address_space(cpu).1 == F::PROGRAMS;
    let Some(block) = machine.store.warm(ret, patient) else {
        debug_assert!(false, "no block around return address {ret:#x}");
        return ret;
    };
    if let Some(place) = cpu.head.heat.get_mut(block.number % HEATS) {
        *place = if block.due { HEAT } else { PATIENCE };
    }
    if !block.due {
        return ret;
    }
    cpu.head.count_left = 0;
    match cpu.make_anew(cpu.head.page_base + u64::from(block.start), block.page) {
        Ok(code) => code.host,
        // Its pages are not there: a trap has set the pc.
        Err(NoCode::Trapped) => machine.stubs.dispatch,
        // Another time.
        Err(NoCode::Later | NoCode::Careful) => ret,
    }
}

extern "C" fn note<F: GuestFrontend>(cpu: *mut Cpu<F>, va: u64, desc: u32, ret: usize) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    if let Some(number) = ContextLayout::jump_of_word(desc) {
        cpu.note_jump(ret, number);
    } else if desc >> RANGE_SHIFT != 0 {
        cpu.note_range(ret, va, desc);
    }
}

fn amo_from(op: u32) -> AmoOp {
    use AmoOp::*;
    const OPS: [AmoOp; 9] = [Swap, Add, Xor, And, Or, MinS, MaxS, MinU, MaxU];
    OPS.get(op as usize).copied().unwrap_or(Swap)
}

extern "C" fn fp<F: GuestFrontend>(cpu: *mut Cpu<F>, packed: u64) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    let [op, fmt, rm, d, a, b, c, _] = packed.to_le_bytes();
    let slot = |n: u8| cpu.head.slots[n as usize];
    let (a, b, c) = (slot(a), slot(b), slot(c));
    let fmt = if fmt == FpFmt::F32 as u8 { FpFmt::F32 } else { FpFmt::F64 };
    let value = F::fp(cpu, fp_from(op), fmt, rm_from(rm), a, b, c);
    cpu.head.slots[d as usize] = value;
}

fn rm_from(rm: u8) -> Rm {
    const MODES: [Rm; 6] = [Rm::NearestEven, Rm::ToZero, Rm::Down, Rm::Up, Rm::NearestMaxMag, Rm::Dynamic];
    MODES.get(rm as usize).copied().unwrap_or(Rm::Dynamic)
}

fn fp_from(op: u8) -> FpOp {
    use FpOp::*;
    const OPS: [FpOp; 29] = [
        Add, Sub, Mul, Div, Sqrt, MAdd, MSub, NMSub, NMAdd, Min, Max, Eq, Lt, Le, Class, Sgnj, Sgnjn, Sgnjx, ToI32,
        ToU32, ToI64, ToU64, FromI32, FromU32, FromI64, FromU64, CvtFmt, MvToInt, MvFromInt,
    ];
    OPS.get(op as usize).copied().unwrap_or(MvToInt)
}

extern "C" fn link<F: GuestFrontend>(cpu: *mut Cpu<F>, ret: usize) -> usize {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.head.count_left = 0;
    let machine = cpu.machine.clone();
    let Some(site) = machine.store.resolve_site(ret) else {
        debug_assert!(false, "no link site for return address {ret:#x}");
        return machine.stubs.dispatch;
    };
    let va = cpu.head.page_base.wrapping_add_signed(i64::from(site.to().0));
    match cpu.code_for(va, true) {
        Ok(code) => {
            cpu.head.page_base = va & !4095;
            let linked = machine.optimise != Optimise::Off;
            if linked && (!site.to().same_page() || code.page == site.page()) {
                machine.store.link(&site, code.host, code.page, |field, to| machine.emitter.link_word(field, to));
            }
            code.host
        }
        Err(no_code) => {
            // A trap has set the pc already; else the run loop goes on where the jump leads.
            if !matches!(no_code, NoCode::Trapped) {
                cpu.head.pc = va;
                cpu.check_events();
            }
            machine.stubs.dispatch
        }
    }
}

extern "C" fn trace_full<F: GuestFrontend>(cpu: *mut Cpu<F>) {
    // SAFETY: as in `load`.
    let cpu = unsafe { &mut *cpu };
    cpu.head.count_left = 0;
    cpu.trace_full();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_enums() {
        assert_eq!(fp_from(FpOp::MvFromInt as u8), FpOp::MvFromInt);
        assert_eq!(fp_from(FpOp::CvtFmt as u8), FpOp::CvtFmt);
        assert_eq!(amo_from(AmoOp::MaxU as u32), AmoOp::MaxU);
        assert_eq!(rm_from(Rm::Dynamic as u8), Rm::Dynamic);
        assert_eq!(ext_from((Ext::Ones as u32) << 8), Ext::Ones);
    }
}
