//! A host for tests: slots, paged memory, a hot state, and a few helpers.

use std::collections::BTreeMap;

use super::{NO_INSN, guest_slot};
use crate::flags::Flags;
use crate::interp::{CallOutcome, Fault, InterpHost, amo, extend};
use crate::op::{AmoOp, Ext, FpFmt, FpOp, PagePc, Rm, Size, Slot, Val};
use crate::unit::UnitInsn;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// The kind of a memory fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    Load,
    Store,
    MisalignedLoad,
    MisalignedStore,
}

/// A memory fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultRecord {
    pub kind: FaultKind,
    /// The address that faulted: that of the access, or of the second page if only that is not mapped.
    pub va: u64,
    /// The guest instruction.
    pub pc: PagePc,
}

/// Byte-addressed little-endian memory, mapped by pages.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Memory {
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Memory {
    /// Maps the pages of `len` bytes (at least one) at `va`; new ones hold zeros.
    pub fn map(&mut self, va: u64, len: u64) {
        let last = va.wrapping_add(len.saturating_sub(1)) & !(PAGE - 1);
        let mut page = va & !(PAGE - 1);
        loop {
            self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
            if page == last {
                return;
            }
            page = page.wrapping_add(PAGE);
        }
    }

    /// The mapped pages: address and contents, ascending.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8; PAGE as usize])> {
        self.pages.iter().map(|(va, bytes)| (*va, &**bytes))
    }

    /// The contents of the page at `va`, if it is mapped.
    pub fn page_mut(&mut self, va: u64) -> Option<&mut [u8; PAGE as usize]> {
        self.pages.get_mut(&va).map(|bytes| &mut **bytes)
    }

    /// The first address of `size` bytes at `va` that is not mapped, as a page fault would report it.
    fn unmapped(&self, va: u64, size: Size) -> Option<u64> {
        let last = va.wrapping_add(u64::from(size.bytes()) - 1) & !(PAGE - 1);
        if !self.pages.contains_key(&(va & !(PAGE - 1))) {
            return Some(va);
        }
        (!self.pages.contains_key(&last)).then_some(last)
    }

    /// Reads `size` bytes, zero-extended; bytes that are not mapped read as 0.
    pub fn read(&self, va: u64, size: Size) -> u64 {
        (0..u64::from(size.bytes())).fold(0, |value, i| {
            let at = va.wrapping_add(i);
            let byte = self.pages.get(&(at & !(PAGE - 1))).map_or(0, |page| page[(at % PAGE) as usize]);
            value | u64::from(byte) << (8 * i)
        })
    }

    /// Writes the low `size` bytes of `value`; bytes that are not mapped are dropped.
    pub fn write(&mut self, va: u64, value: u64, size: Size) {
        for i in 0..u64::from(size.bytes()) {
            let at = va.wrapping_add(i);
            if let Some(page) = self.pages.get_mut(&(at & !(PAGE - 1))) {
                page[(at % PAGE) as usize] = (value >> (8 * i)) as u8;
            }
        }
    }

    /// What of `got` is not as in `self`: a line for each of the first few places.
    pub(super) fn difference(&self, got: &Memory) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.pages.keys().eq(got.pages.keys()) {
            lines.push("memory: not the same pages are mapped".to_string());
        }
        for (va, page) in &self.pages {
            let Some(other) = got.pages.get(va) else { continue };
            let differ = (0..PAGE as usize).filter(|i| page[*i] != other[*i]);
            lines.extend(
                differ
                    .take(8)
                    .map(|i| format!("mem {:#x}: expected {:#04x}, got {:#04x}", va + i as u64, page[i], other[i])),
            );
        }
        lines
    }
}

/// Computes a floating-point operation, with RISC-V's rules and [`Rm::Dynamic`] standing for nearest-even, and
/// adds the flags it raises (in RISC-V's encoding) to the last argument.
pub type FpFn = fn(FpOp, FpFmt, Rm, u64, u64, u64, &mut u8) -> u64;

/// What a test helper does. A pure one does nothing but give a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HelperEffect {
    pub result: u64,
    /// A guest slot to set.
    pub slot: Option<(Slot, u64)>,
    /// The guest's program counter to set.
    pub pc: Option<u64>,
    /// Whether to leave the block.
    pub leave: bool,
}

/// The test helpers, by number:
///
/// * 0: pure; gives `a + 3 * b - c`;
/// * 1: sets guest slot `a % 64` to `b`, gives `c`;
/// * 2: sets guest slot `a % 64` to `b` and, if `c` is odd, the pc to `c - 1` and leaves; gives `!c`;
/// * 3: sets the pc to `a`, gives 0.
///
/// Any other number does nothing and gives 0.
pub fn helper(number: u16, [a, b, c]: [u64; 3]) -> HelperEffect {
    let mut effect = HelperEffect { result: 0, slot: None, pc: None, leave: false };
    match number {
        0 => effect.result = a.wrapping_add(b.wrapping_mul(3)).wrapping_sub(c),
        1 => {
            effect.slot = Some((guest_slot(a), b));
            effect.result = c;
        }
        2 => {
            effect.slot = Some((guest_slot(a), b));
            effect.result = !c;
            effect.leave = c & 1 == 1;
            effect.pc = effect.leave.then(|| c - 1);
        }
        3 => effect.pc = Some(a),
        _ => {}
    }
    effect
}

/// A host with a flat address space of its own.
///
/// The reservation is by address and value, as in the runtime: a store-conditional to the reserved address
/// stores if the memory's bytes, at its size, still equal the low bytes of the value loaded. It faults like a
/// store whether or not the reservation holds.
#[derive(Clone, Debug)]
pub struct TestHost {
    /// By number; 256 so that no block, verified or not, can name one outside.
    pub slots: [u64; 256],
    pub memory: Memory,
    /// Bytes of the hot state that were ever set.
    pub env: BTreeMap<i32, u8>,
    pub page_base: u64,
    /// Set by helpers.
    pub pc: u64,
    /// The guest instruction last begun.
    pub insn: PagePc,
    /// The last fault.
    pub fault: Option<FaultRecord>,
    /// Floating-point flags, in RISC-V's encoding.
    pub fp_flags: u8,
    /// Guest code is aligned to this many bytes.
    pub code_align: u64,
    /// Condition flags whose values the manuals leave open.
    pub undefined: Flags,
    /// Condition flags whose values the block leaves open.
    pub dropped: Flags,
    /// Address and value of the reservation.
    pub reservation: Option<(u64, u64)>,
    fp: FpFn,
}

impl TestHost {
    /// A host with all slots 0 and no memory.
    pub fn new(page_base: u64, fp: FpFn) -> TestHost {
        TestHost {
            slots: [0; 256],
            memory: Memory::default(),
            env: BTreeMap::new(),
            page_base,
            pc: 0,
            insn: NO_INSN,
            fault: None,
            fp_flags: 0,
            code_align: 2,
            undefined: Flags::NONE,
            dropped: Flags::NONE,
            reservation: None,
            fp,
        }
    }

    fn fault(&mut self, kind: FaultKind, va: u64) -> Fault {
        self.fault = Some(FaultRecord { kind, va, pc: self.insn });
        Fault
    }

    fn check(&mut self, va: u64, size: Size, kind: FaultKind) -> Result<(), Fault> {
        match self.memory.unmapped(va, size) {
            Some(at) => Err(self.fault(kind, at)),
            None => Ok(()),
        }
    }

    fn check_aligned(&mut self, va: u64, size: Size, kind: FaultKind) -> Result<(), Fault> {
        if va.is_multiple_of(u64::from(size.bytes())) {
            return self.check(va, size, kind);
        }
        let kind = match kind {
            FaultKind::Load => FaultKind::MisalignedLoad,
            _ => FaultKind::MisalignedStore,
        };
        Err(self.fault(kind, va))
    }
}

impl InterpHost for TestHost {
    fn slot(&self, slot: Slot) -> u64 {
        self.slots[usize::from(slot.0)]
    }

    fn set_slot(&mut self, slot: Slot, value: u64) {
        self.slots[usize::from(slot.0)] = value;
    }

    fn page_base(&self) -> u64 {
        self.page_base
    }

    fn begin_insn(&mut self, pc: PagePc, _len: u8) {
        self.insn = pc;
    }

    fn load(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        self.check(va, size, FaultKind::Load)?;
        Ok(extend(self.memory.read(va, size), size, ext))
    }

    fn store(&mut self, va: u64, val: u64, size: Size) -> Result<(), Fault> {
        self.check(va, size, FaultKind::Store)?;
        self.memory.write(va, val, size);
        Ok(())
    }

    fn load_reserved(&mut self, va: u64, size: Size, ext: Ext) -> Result<u64, Fault> {
        self.check_aligned(va, size, FaultKind::Load)?;
        let value = extend(self.memory.read(va, size), size, ext);
        self.reservation = Some((va, value));
        Ok(value)
    }

    fn store_conditional(&mut self, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        let reservation = self.reservation.take();
        self.check_aligned(va, size, FaultKind::Store)?;
        let now = self.memory.read(va, size);
        let holds = reservation.is_some_and(|(at, value)| at == va && extend(value, size, Ext::Zero) == now);
        if holds {
            self.memory.write(va, val, size);
        }
        Ok(u64::from(!holds))
    }

    fn amo(&mut self, op: AmoOp, va: u64, val: u64, size: Size) -> Result<u64, Fault> {
        self.check_aligned(va, size, FaultKind::Store)?;
        let old = self.memory.read(va, size);
        self.memory.write(va, amo(op, size, old, val), size);
        Ok(extend(old, size, Ext::Sign))
    }

    fn rmw(&mut self, va: u64, size: Size, _lock: bool, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        self.check(va, size, FaultKind::Store)?;
        let old = self.memory.read(va, size);
        self.memory.write(va, new(old), size);
        Ok(old)
    }

    fn flags_written(&mut self, written: Flags, undefined: Flags, dropped: Flags) {
        self.undefined = self.undefined.without(written).union(undefined);
        self.dropped = self.dropped.without(written).union(dropped);
    }

    fn code_align(&self) -> u64 {
        self.code_align
    }

    fn fence(&mut self) {}

    fn fp(&mut self, op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64) -> u64 {
        (self.fp)(op, fmt, rm, a, b, c, &mut self.fp_flags)
    }

    /// Nothing here has the units: careful mode is to do it.
    fn unit(&mut self, _: &UnitInsn, _: Option<Slot>, _: Val, _: u64) -> Result<bool, Fault> {
        Ok(false)
    }
    fn env_byte(&self, off: i32) -> u8 {
        self.env.get(&off).copied().unwrap_or(0)
    }

    fn set_env_byte(&mut self, off: i32, val: u8) {
        self.env.insert(off, val);
    }

    fn call(&mut self, number: u16, args: [u64; 3]) -> (u64, CallOutcome) {
        let effect = helper(number, args);
        if let Some((slot, value)) = effect.slot {
            self.set_slot(slot, value);
        }
        self.pc = effect.pc.unwrap_or(self.pc);
        (effect.result, if effect.leave { CallOutcome::Leave } else { CallOutcome::Continue })
    }
}
