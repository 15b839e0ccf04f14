//! Guest memory accesses that the inline TLB probe does not serve: TLB fills, devices, page crossings,
//! pages that hold translated code, faults.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use mimus_core::memory::{FlatKind, PAGE_CODE, RamBlock};
use mimus_tcg_ir::backend::pack_insn;
use mimus_tcg_ir::{AmoOp, Ext, Size};

use crate::claim::mark_of;
use crate::context::DataFill;
use crate::env::Cpu;
use crate::frontend::{Access, GuestFrontend, Leaf, MemFault};

const PAGE: u64 = 4096;
/// Kinds of an access: whether it reads, whether it writes.
const READS: (bool, bool) = (true, false);
const WRITES: (bool, bool) = (false, true);

/// The access has been turned into a trap: `head.pc` is its handler's.
pub struct Trapped;

/// The range of RAM that was found last, page-aligned: nearly all accesses are to one.
#[derive(Clone, Copy)]
pub(crate) struct RamWindow {
    base: u64,
    len: u64,
    host: *mut u8,
    block: *const RamBlock,
    offset: u64,
}

impl RamWindow {
    /// No range.
    pub const NONE: RamWindow = RamWindow { base: 0, len: 0, host: ptr::null_mut(), block: ptr::null(), offset: 0 };
}

/// Which guest instruction an access belongs to.
#[derive(Clone, Copy)]
pub(crate) enum At {
    /// The one at this address.
    Pc(u64),
    /// The one whose generated code called with this return address. Looked up only if the access traps.
    Return(usize),
}

/// Where an access ends up.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// Host memory; the block and the offset in it for stores.
    Ram {
        host: *mut u8,
        readonly: bool,
        block: *const RamBlock,
        offset: u64,
    },
    Io(GuestPhys),
}

fn size_of_access(size: Size) -> AccessSize {
    match size {
        Size::B1 => AccessSize::B1,
        Size::B2 => AccessSize::B2,
        Size::B4 => AccessSize::B4,
        Size::B8 => AccessSize::B8,
    }
}

fn extend(value: u64, size: Size, ext: Ext) -> u64 {
    let bits = size.bytes() * 8;
    if bits == 64 {
        return value;
    }
    let low = value & ((1 << bits) - 1);
    match ext {
        Ext::Zero => low,
        Ext::Sign => (((low << (64 - bits)) as i64) >> (64 - bits)) as u64,
        Ext::Ones => low | !0 << bits,
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// Translates, and enters the page into the TLB if it is RAM.
    pub(crate) fn locate(&mut self, va: u64, access: Access) -> Result<Place, MemFault> {
        let leaf = F::walk(self, va, access)?;
        let Some((host, readonly, block, offset, whole_page)) = self.ram_at(leaf.pa, access) else {
            if self.refuses_devices() {
                return Err(MemFault::Access);
            }
            return Ok(Place::Io(GuestPhys(leaf.pa)));
        };
        // What another engine's guest has in its page tables is not for long.
        if leaf.cacheable && whole_page && self.lent.is_none() {
            self.enter(va, &leaf, host, readonly, block, offset);
        }
        Ok(Place::Ram { host, readonly, block, offset })
    }

    /// The RAM at `pa`: host address, whether stores are ignored, the block, the offset in it, and whether the
    /// whole page is there. `None` for devices and for nothing.
    pub(crate) fn ram_at(&self, pa: u64, access: Access) -> Option<(*mut u8, bool, *const RamBlock, u64, bool)> {
        let found = self.find_ram(pa, access);
        if access == Access::Store
            && let Some(lent) = &self.lent
            && let Some((_, false, block, offset, _)) = found
        {
            // SAFETY: `self.view` keeps the block alive.
            lent.note_store(unsafe { &*block }, offset);
        }
        found
    }

    fn find_ram(&self, pa: u64, access: Access) -> Option<(*mut u8, bool, *const RamBlock, u64, bool)> {
        let window = self.ram_window.get();
        let at = pa.wrapping_sub(window.base);
        if at < window.len {
            // SAFETY: the window is inside the block's mapping, and the view keeps the block alive.
            let host = unsafe { window.host.add(at as usize) };
            return Some((host, false, window.block, window.offset + at, true));
        }
        let range = self.view.lookup(GuestPhys(pa))?;
        let (block, offset) = range.ram_at(GuestPhys(pa))?;
        let readonly = match &range.kind {
            FlatKind::Ram { readonly, .. } => *readonly,
            FlatKind::RomDevice { .. } if access == Access::Store => return None,
            _ => true,
        };
        let page = pa & !(PAGE - 1);
        let whole = page >= range.base.0 && page + PAGE <= range.end();
        if !readonly && (range.base.0 | range.len) & (PAGE - 1) == 0 {
            let (block, offset) = range.ram_at(range.base)?;
            let host = block.host_ptr(offset);
            self.ram_window.set(RamWindow { base: range.base.0, len: range.len, host, block: &**block, offset });
        }
        Some((block.host_ptr(offset), readonly, &**block, offset, whole))
    }

    fn enter(&mut self, va: u64, leaf: &Leaf, host: *mut u8, readonly: bool, block: *const RamBlock, offset: u64) {
        let (may_read, may_write) = self.debug.tlb_may(va);
        let read = leaf.read && may_read;
        // Who may store without a call may load: generated code looks no further for accesses of both kinds. (Page tables have no
        // other pages; what a PMP entry with a reserved configuration covers is written by calls.)
        let mut write = leaf.write && read && !readonly && may_write;
        if write {
            // SAFETY: `self.view` keeps the block alive.
            let flags = unsafe { &*block }.page_flags(offset / PAGE);
            // Announced first, so that whoever turns the page into code knows whom to ask.
            let before = flags.fetch_or(mark_of(self.index()), Ordering::SeqCst);
            write = before & PAGE_CODE == 0;
        }
        // SAFETY: as above.
        let second = if readonly { None } else { self.second_address(unsafe { &*block }, offset, va) };
        self.mmu.fill_data(&DataFill {
            va: va & !(PAGE - 1),
            host: second.unwrap_or(host as u64 & !(PAGE - 1)),
            read,
            write,
            local: leaf.local,
            mapping_size: leaf.mapping_size,
        });
    }

    /// Before an access: `Trapped` if a watchpoint has it done another way (see `debug`).
    fn watch(&mut self, pc: At, va: u64, len: u64, kinds: (bool, bool)) -> Result<(), Trapped> {
        let pc = |cpu: &Self| match pc {
            At::Pc(pc) => pc,
            At::Return(ret) => cpu.guest_pc(ret),
        };
        if self.watched(va, len, kinds, pc) { Err(Trapped) } else { Ok(()) }
    }

    /// Before an access: `Trapped` if it is one of a device that is caught. A trace says of a device's which instruction made it.
    #[inline]
    fn catch_at(&mut self, pc: At, place: &Place, writes: bool) -> Result<(), Trapped> {
        let Place::Io(pa) = *place else { return Ok(()) };
        if self.device_caught(writes, pa) {
            let pc = match pc {
                At::Pc(pc) => pc,
                At::Return(ret) => self.guest_pc(ret),
            };
            self.do_carefully(pc);
            return Err(Trapped);
        }
        if let At::Return(ret) = pc
            && self.tracing.is_some()
            && let Some(entry) = self.machine.store.resolve_fault(ret)
        {
            self.head.cur_insn = pack_insn(entry.pc, entry.len);
        }
        Ok(())
    }

    fn fault(&mut self, pc: At, va: u64, access: Access, fault: MemFault) -> Trapped {
        self.head.pc = match pc {
            At::Pc(pc) => pc,
            At::Return(ret) => self.guest_pc(ret),
        };
        self.abandon();
        self.debug.not_accessed();
        self.trap(va, access, fault);
        Trapped
    }

    /// Has the trap of a fault taken: at once, or, while generated code holds guest registers that delivery may
    /// change, when it has been left.
    pub(crate) fn trap(&mut self, va: u64, access: Access, fault: MemFault) {
        if self.in_generated && F::TRAPS_USE_SLOTS {
            self.fault_later = Some((va, access, fault));
            self.check_events();
        } else {
            F::deliver_fault(self, va, access, fault);
        }
    }

    pub(crate) fn io_read(&mut self, pa: GuestPhys, size: Size) -> Result<u64, MemFault> {
        let index = self.index();
        let attrs = MemTxAttrs { secure: self.alternate, ..MemTxAttrs::vcpu(index.0) };
        let answer = self.io(|io| io.mem_read(index, pa, size_of_access(size), attrs));
        self.trace_device(false, pa, size, answer.map_or(!0, |(value, _)| value));
        match answer {
            Some((value, MemTxResult::Ok)) => Ok(value),
            _ if F::LENIENT_BUS => Ok(!0),
            _ => Err(MemFault::Access),
        }
    }

    pub(crate) fn io_write(&mut self, pa: GuestPhys, size: Size, value: u64) -> Result<(), MemFault> {
        let index = self.index();
        let attrs = MemTxAttrs { secure: self.alternate, ..MemTxAttrs::vcpu(index.0) };
        self.trace_device(true, pa, size, value);
        let answer = self.io(|io| io.mem_write(index, pa, size_of_access(size), attrs, value));
        // The next instruction's load may be of what the write changed (flash that shows its status).
        self.refresh_view(false);
        match answer {
            Some(MemTxResult::Ok) => Ok(()),
            _ if F::LENIENT_BUS => Ok(()),
            _ => Err(MemFault::Access),
        }
    }

    /// An access to devices by aligned pieces: `f` is given each one's address, size and bit offset.
    fn in_pieces(
        pa: GuestPhys,
        size: Size,
        mut f: impl FnMut(GuestPhys, Size, u32) -> Result<(), MemFault>,
    ) -> Result<(), MemFault> {
        let mut done = 0;
        while done < size.bytes() {
            let at = pa.0.wrapping_add(done.into());
            let fits = |piece: &Size| at.is_multiple_of(piece.bytes().into()) && piece.bytes() <= size.bytes() - done;
            let piece = [Size::B8, Size::B4, Size::B2].into_iter().find(fits).unwrap_or(Size::B1);
            f(GuestPhys(at), piece, 8 * done)?;
            done += piece.bytes();
        }
        Ok(())
    }

    /// Loads; `pc` says which instruction does.
    pub(crate) fn load(&mut self, pc: At, va: u64, size: Size, ext: Ext) -> Result<u64, Trapped> {
        let bytes = u64::from(size.bytes());
        self.watch(pc, va, bytes, READS)?;
        if va & (PAGE - 1) > PAGE - bytes {
            return self.load_across(pc, va, size).map(|v| extend(v, size, ext));
        }
        let place = self.locate(va, Access::Load).map_err(|fault| self.fault(pc, va, Access::Load, fault))?;
        self.catch_at(pc, &place, false)?;
        let value = self.load_at(place, va, size).map_err(|fault| self.fault(pc, va, Access::Load, fault))?;
        Ok(extend(value, size, ext))
    }

    fn load_at(&mut self, place: Place, va: u64, size: Size) -> Result<u64, MemFault> {
        match place {
            // SAFETY: inside one page of a RAM block.
            Place::Ram { host, .. } => Ok(unsafe { read(host, size) }),
            Place::Io(pa) if va.is_multiple_of(u64::from(size.bytes())) => self.io_read(pa, size),
            Place::Io(pa) if F::LENIENT_BUS => {
                let mut value = 0;
                Self::in_pieces(pa, size, |at, piece, shift| {
                    value |= extend(self.io_read(at, piece)?, piece, Ext::Zero) << shift;
                    Ok(())
                })?;
                Ok(value)
            }
            // Device registers are not split: QEMU's and real fabrics' answer is an access fault.
            Place::Io(_) => Err(MemFault::Misaligned),
        }
    }

    fn load_across(&mut self, pc: At, va: u64, size: Size) -> Result<u64, Trapped> {
        // Both pages are known to be readable before either is read.
        let (first, second) = halves(va, size.bytes());
        let context = self.mmu.context();
        if let (Some(low), Some(high)) = (context.lookup_read(va), context.lookup_read(second)) {
            let mut raw = [0; 8];
            let (a, b) = raw[..size.bytes() as usize].split_at_mut(first as usize);
            // SAFETY: inside pages of RAM that the TLB grants loads of; a torn copy is what racing processors get.
            unsafe {
                ptr::copy_nonoverlapping(low as *const u8, a.as_mut_ptr(), a.len());
                ptr::copy_nonoverlapping(high as *const u8, b.as_mut_ptr(), b.len());
            }
            return Ok(u64::from_le_bytes(raw));
        }
        for page in [va, second] {
            self.locate(page, Access::Load).map_err(|f| self.fault(pc, page, Access::Load, f))?;
        }
        let mut value = 0;
        for i in 0..u64::from(size.bytes()) {
            let at = va.wrapping_add(i);
            let byte = self
                .locate(at, Access::Load)
                .and_then(|place| self.load_at(place, at, Size::B1))
                .map_err(|f| self.fault(pc, at, Access::Load, f))?;
            value |= (byte & 0xff) << (8 * i);
        }
        Ok(value)
    }

    /// Stores; `pc` says which instruction does.
    pub(crate) fn store(&mut self, pc: At, va: u64, value: u64, size: Size) -> Result<(), Trapped> {
        let bytes = u64::from(size.bytes());
        self.watch(pc, va, bytes, WRITES)?;
        if va & (PAGE - 1) > PAGE - bytes {
            return self.store_across(pc, va, value, size);
        }
        let place = self.locate(va, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        self.check_own_code(pc, &place, size.bytes())?;
        self.catch_at(pc, &place, true)?;
        self.store_at(place, va, value, size).map_err(|f| self.fault(pc, va, Access::Store, f))
    }

    /// Where stores to code must be seen at once: has an instruction of a block that is about to overwrite its own
    /// block, or one that it may be linked to, executed by itself instead.
    fn check_own_code(&mut self, pc: At, place: &Place, len: u32) -> Result<(), Trapped> {
        let (true, At::Return(ret), Place::Ram { host, readonly: false, block, offset }) =
            (F::COHERENT_CODE, pc, place)
        else {
            return Ok(());
        };
        // SAFETY: `self.view` keeps the block alive.
        let flags = unsafe { &**block }.page_flags(offset / PAGE);
        let host = *host as u64;
        if flags.load(Ordering::SeqCst) & PAGE_CODE == 0
            || !self.machine.store.hits_own_code(ret, host, host as u32 & 0xfff, len)
        {
            return Ok(());
        }
        self.head.pc = self.guest_pc(ret);
        self.head.exit_request = 1;
        self.give_back(true);
        self.step_at = Some(self.head.pc);
        self.check_events();
        Err(Trapped)
    }

    fn store_at(&mut self, place: Place, va: u64, value: u64, size: Size) -> Result<(), MemFault> {
        match place {
            Place::Ram { readonly: true, .. } => Ok(()),
            Place::Ram { host, block, offset, .. } => {
                // SAFETY: inside one page of a RAM block, which the view keeps alive.
                unsafe {
                    write(host, value, size);
                    self.stored(&*block, offset, host, size.bytes());
                }
                Ok(())
            }
            Place::Io(pa) if va.is_multiple_of(u64::from(size.bytes())) => self.io_write(pa, size, value),
            Place::Io(pa) if F::LENIENT_BUS => {
                Self::in_pieces(pa, size, |at, piece, shift| self.io_write(at, piece, value >> shift))
            }
            Place::Io(_) => Err(MemFault::Misaligned),
        }
    }

    /// After a store that did not go through the TLB: withdraws code it overlaps.
    pub(crate) fn stored(&mut self, block: &RamBlock, offset: u64, host: *mut u8, len: u32) {
        // The store before the flag: whoever sets the flag afterwards translates what was stored.
        fence(Ordering::SeqCst);
        let flags = block.page_flags(offset / PAGE);
        if flags.load(Ordering::SeqCst) & PAGE_CODE != 0 {
            let withdrawn = self.machine.store.store_to_code(host as u64, host as u32 & 0xfff, len, flags);
            self.code_changed |= withdrawn;
        }
    }

    fn store_across(&mut self, pc: At, va: u64, value: u64, size: Size) -> Result<(), Trapped> {
        let (in_first, second) = halves(va, size.bytes());
        let context = self.mmu.context();
        if let (Some(low), Some(high)) = (context.lookup_write(va), context.lookup_write(second)) {
            let raw = value.to_le_bytes();
            let (a, b) = raw[..size.bytes() as usize].split_at(in_first as usize);
            // SAFETY: inside pages of RAM that the TLB grants stores to.
            unsafe {
                ptr::copy_nonoverlapping(a.as_ptr(), low as *mut u8, a.len());
                ptr::copy_nonoverlapping(b.as_ptr(), high as *mut u8, b.len());
            }
            return Ok(());
        }
        for (page, len) in [(va, in_first), (second, size.bytes() - in_first)] {
            let place = self.locate(page, Access::Store).map_err(|f| self.fault(pc, page, Access::Store, f))?;
            self.check_own_code(pc, &place, len)?;
        }
        for i in 0..u64::from(size.bytes()) {
            let at = va.wrapping_add(i);
            self.locate(at, Access::Store)
                .and_then(|place| self.store_at(place, at, value >> (8 * i), Size::B1))
                .map_err(|f| self.fault(pc, at, Access::Store, f))?;
        }
        Ok(())
    }

    /// Loads `bytes` to the buffer of vector operands.
    pub(crate) fn load_unit(&mut self, pc: At, va: u64, bytes: u32) -> Result<(), Trapped> {
        self.watch(pc, va, bytes.into(), READS)?;
        let (first, second) = halves(va, bytes);
        // Both pages are known to be readable before either is read.
        self.host_for_load(va).map_err(|f| self.fault(pc, va, Access::Load, f))?;
        if first < bytes {
            self.host_for_load(second).map_err(|f| self.fault(pc, second, Access::Load, f))?;
        }
        let mut data = [0; 32];
        let (low, high) = data[..bytes as usize].split_at_mut(first as usize);
        self.load_bytes(va, low).map_err(|f| self.fault(pc, va, Access::Load, f))?;
        if !high.is_empty() {
            self.load_bytes(second, high).map_err(|f| self.fault(pc, second, Access::Load, f))?;
        }
        self.head.unit_buffer.0[..32].copy_from_slice(&data);
        Ok(())
    }

    /// Before a store from that buffer: whether it can be done.
    pub(crate) fn probe_unit(&mut self, pc: At, va: u64, bytes: u32) -> Result<(), Trapped> {
        self.watch(pc, va, bytes.into(), WRITES)?;
        let (first, second) = halves(va, bytes);
        for (at, len) in [(va, first), (second, bytes - first)] {
            if len > 0 && self.mmu.context().lookup_write(at).is_none() {
                let place = self.locate(at, Access::Store).map_err(|f| self.fault(pc, at, Access::Store, f))?;
                self.check_own_code(pc, &place, len)?;
            }
        }
        self.head.unit_va = va;
        Ok(())
    }

    /// The store that [`Cpu::probe_unit`] allowed.
    pub(crate) fn store_unit(&mut self, bytes: u32) {
        let (va, data) = (self.head.unit_va, self.head.unit_buffer.0);
        let (first, second) = halves(va, bytes);
        let (low, high) = data[..bytes as usize].split_at(first as usize);
        for (at, part) in [(va, low), (second, high)] {
            let stored = if part.is_empty() { Ok(()) } else { self.store_bytes(at, part) };
            debug_assert!(stored.is_ok(), "a store to {at:#x} that was allowed");
        }
    }

    /// An atomic access's host address. Faults if misaligned or not RAM.
    fn locate_atomic(&mut self, va: u64, size: Size, access: Access) -> Result<Place, MemFault> {
        if !va.is_multiple_of(u64::from(size.bytes())) {
            return Err(MemFault::Misaligned);
        }
        match self.locate(va, access)? {
            // Devices and ROM have no atomics (PMA: AMONone, RsrvNone).
            Place::Io(_) | Place::Ram { readonly: true, .. } => Err(MemFault::Access),
            place => Ok(place),
        }
    }

    /// Load-reserved.
    pub(crate) fn load_reserved(&mut self, pc: At, va: u64, size: Size, ext: Ext) -> Result<u64, Trapped> {
        self.watch(pc, va, size.bytes().into(), READS)?;
        let place = self.locate_atomic(va, size, Access::Load).map_err(|f| self.fault(pc, va, Access::Load, f))?;
        let Place::Ram { host, .. } = place else { return Ok(0) };
        // SAFETY: aligned, inside a page of RAM.
        let value = extend(unsafe { read(host, size) }, size, ext);
        self.head.reserve_addr = va;
        self.head.reserve_value = value;
        Ok(value)
    }

    /// Store-conditional: 0 if stored, else 1.
    pub(crate) fn store_conditional(&mut self, pc: At, va: u64, value: u64, size: Size) -> Result<u64, Trapped> {
        self.watch(pc, va, size.bytes().into(), WRITES)?;
        let reserved = std::mem::replace(&mut self.head.reserve_addr, !0);
        let expected = self.head.reserve_value;
        let place = self.locate_atomic(va, size, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        let Place::Ram { host, block, offset, .. } = place else { return Ok(1) };
        if reserved != va {
            return Ok(1);
        }
        // SAFETY: aligned, inside a page of RAM that the view keeps alive.
        unsafe {
            let stored = compare_exchange(host, expected, value, size);
            self.stored(&*block, offset, host, size.bytes());
            Ok(u64::from(!stored))
        }
    }

    /// Atomic read-modify-write; answers the old value, sign-extended.
    pub(crate) fn amo(&mut self, pc: At, op: AmoOp, va: u64, value: u64, size: Size) -> Result<u64, Trapped> {
        self.watch(pc, va, size.bytes().into(), (true, true))?;
        let place = self.locate_atomic(va, size, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        let Place::Ram { host, block, offset, .. } = place else { return Ok(0) };
        // SAFETY: as above.
        unsafe {
            let old = loop {
                let old = extend(read(host, size), size, Ext::Sign);
                let new = amo_result(op, old, extend(value, size, Ext::Sign), size);
                if compare_exchange(host, old, new, size) {
                    break old;
                }
            };
            self.stored(&*block, offset, host, size.bytes());
            Ok(old)
        }
    }

    /// Read-modify-write of `size` bytes at any alignment; answers the old value, zeros above. Memory becomes what
    /// `new` makes of it. Atomic in RAM with `lock` (but for an access to two pages that the host has apart).
    pub(crate) fn rmw(
        &mut self,
        pc: At,
        va: u64,
        size: Size,
        lock: bool,
        new: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Trapped> {
        self.watch(pc, va, size.bytes().into(), (true, true))?;
        self.rmw_unwatched(pc, va, size, lock, new)
    }

    /// [`Cpu::rmw`] of a helper that has taken note of watchpoints.
    pub(crate) fn rmw_unwatched(
        &mut self,
        pc: At,
        va: u64,
        size: Size,
        lock: bool,
        new: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Trapped> {
        if va & (PAGE - 1) > PAGE - u64::from(size.bytes()) {
            return self.rmw_across(pc, va, size, new);
        }
        let place = self.locate(va, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        self.check_own_code(pc, &place, size.bytes())?;
        match place {
            Place::Ram { host, readonly: false, block, offset } => {
                // SAFETY: inside one page of a RAM block, which the view keeps alive.
                unsafe {
                    let old = exchange(host, size, lock, new);
                    self.stored(&*block, offset, host, size.bytes());
                    Ok(old)
                }
            }
            place => {
                let old = self.load_at(place, va, size).map_err(|f| self.fault(pc, va, Access::Load, f))?;
                let old = extend(old, size, Ext::Zero);
                self.store_at(place, va, new(old), size).map_err(|f| self.fault(pc, va, Access::Store, f))?;
                Ok(old)
            }
        }
    }

    fn rmw_across(&mut self, pc: At, va: u64, size: Size, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, Trapped> {
        let second = (va | (PAGE - 1)).wrapping_add(1);
        let in_first = second.wrapping_sub(va) as usize;
        let first = self.locate(va, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        let after = self.locate(second, Access::Store).map_err(|f| self.fault(pc, second, Access::Store, f))?;
        self.check_own_code(pc, &first, in_first as u32)?;
        self.check_own_code(pc, &after, size.bytes() - in_first as u32)?;
        if let (
            Place::Ram { host, readonly: false, block, offset },
            Place::Ram { host: next, readonly: false, block: next_block, offset: next_offset },
        ) = (first, after)
            && host as usize + in_first == next as usize
        {
            // SAFETY: both pages are of RAM blocks, which the view keeps alive, and one follows the other.
            unsafe {
                let old = exchange(host, size, true, new);
                self.stored(&*block, offset, host, in_first as u32);
                self.stored(&*next_block, next_offset, next, size.bytes() - in_first as u32);
                return Ok(old);
            }
        }
        let old = self.load_across(pc, va, size)?;
        self.store_across(pc, va, new(old), size).map(|()| old)
    }

    /// Reads guest physical memory as page walks do: aligned. `None`: not RAM.
    pub fn phys_read(&self, pa: u64, size: Size) -> Option<u64> {
        if !pa.is_multiple_of(u64::from(size.bytes())) {
            return None;
        }
        let (host, ..) = self.ram_at(pa, Access::Load)?;
        // SAFETY: aligned, inside a RAM block.
        Some(unsafe { read(host, size) })
    }

    /// [`Cpu::phys_read`] of 8 bytes.
    pub fn phys_read_u64(&self, pa: u64) -> Option<u64> {
        self.phys_read(pa, Size::B8)
    }

    /// Compares and exchanges guest physical memory, as page walks set accessed and dirty bits: aligned. `None`:
    /// not writable RAM; else whether it was stored.
    pub fn phys_compare_exchange(&mut self, pa: u64, old: u64, new: u64, size: Size) -> Option<bool> {
        if !pa.is_multiple_of(u64::from(size.bytes())) {
            return None;
        }
        let (host, readonly, block, offset, _) = self.ram_at(pa, Access::Store)?;
        if readonly {
            return None;
        }
        // SAFETY: aligned, inside a RAM block that the view keeps alive.
        unsafe {
            let stored = compare_exchange(host, old, new, size);
            self.stored(&*block, offset, host, size.bytes());
            Some(stored)
        }
    }

    /// [`Cpu::phys_compare_exchange`] of 8 bytes.
    pub fn phys_compare_exchange_u64(&mut self, pa: u64, old: u64, new: u64) -> Option<bool> {
        self.phys_compare_exchange(pa, old, new, Size::B8)
    }

    /// Loads from guest physical memory, RAM or device, within one page; zeros above. For accesses that do not go
    /// by the current privilege (descriptor tables, frames of exceptions): the frontend has walked and checked.
    ///
    /// # Errors
    /// Nothing answers.
    pub fn phys_load(&mut self, pa: u64, size: Size) -> Result<u64, MemFault> {
        let value = match self.ram_at(pa, Access::Load) {
            // SAFETY: inside a page of a RAM block.
            Some((host, ..)) => unsafe { read(host, size) },
            None => self.load_at(Place::Io(GuestPhys(pa)), pa, size)?,
        };
        Ok(extend(value, size, Ext::Zero))
    }

    /// Stores to guest physical memory, RAM or device, within one page; see [`Cpu::phys_load`].
    ///
    /// # Errors
    /// Nothing answers.
    pub fn phys_store(&mut self, pa: u64, value: u64, size: Size) -> Result<(), MemFault> {
        let place = match self.ram_at(pa, Access::Store) {
            Some((host, readonly, block, offset, _)) => Place::Ram { host, readonly, block, offset },
            None => Place::Io(GuestPhys(pa)),
        };
        self.store_at(place, pa, value, size)
    }

    /// Loads what the page entries grant.
    pub(crate) fn load_by_page(&self, va: u64, size: Size, ext: Ext) -> Option<u64> {
        let host = self.mmu.context().lookup_read(va)?;
        // SAFETY: inside a page of RAM that the TLB grants loads of.
        (va & (PAGE - 1) <= PAGE - u64::from(size.bytes()))
            .then(|| extend(unsafe { read(host as *mut u8, size) }, size, ext))
    }

    /// Stores what the page entries grant; whether it did.
    pub(crate) fn store_by_page(&mut self, va: u64, value: u64, size: Size) -> bool {
        match self.mmu.context().lookup_write(va) {
            Some(host) if va & (PAGE - 1) <= PAGE - u64::from(size.bytes()) => {
                // SAFETY: inside a page of RAM that the TLB grants stores to.
                unsafe { write(host as *mut u8, value, size) };
                true
            }
            _ => false,
        }
    }

    /// Loads what is known to be granted to another context, one whose key has `bits` in `mask`: for accesses that do not go by the
    /// current privilege, and may go by what that context has found. Zeros above.
    pub fn load_by_context(&self, mask: u64, bits: u64, va: u64, size: Size) -> Option<u64> {
        let host = self.mmu.context_with(mask, bits)?.lookup_read(va)?;
        // SAFETY: inside a page of RAM that the TLB grants loads of.
        (va & (PAGE - 1) <= PAGE - u64::from(size.bytes()))
            .then(|| extend(unsafe { read(host as *mut u8, size) }, size, Ext::Zero))
    }

    /// Stores what is known to be granted to such a context; whether it did.
    pub fn store_by_context(&mut self, mask: u64, bits: u64, va: u64, value: u64, size: Size) -> bool {
        let host = self.mmu.context_with(mask, bits).and_then(|context| context.lookup_write(va));
        match host {
            Some(host) if va & (PAGE - 1) <= PAGE - u64::from(size.bytes()) => {
                // SAFETY: inside a page of RAM that the TLB grants stores to.
                unsafe { write(host as *mut u8, value, size) };
                true
            }
            _ => false,
        }
    }

    /// For helpers: loads as the instruction being executed, zeros above.
    ///
    /// # Errors
    /// The access trapped: return from the helper.
    pub fn load_data(&mut self, va: u64, size: Size) -> Result<u64, Trapped> {
        if let Some(value) = self.load_by_page(va, size, Ext::Zero) {
            return Ok(value);
        }
        let pc = self.current_insn().0;
        self.load(At::Pc(pc), va, size, Ext::Zero)
    }

    /// For helpers: stores as the instruction being executed. See [`Cpu::code_changed`].
    ///
    /// # Errors
    /// The access trapped, and nothing was stored: return from the helper.
    pub fn store_data(&mut self, va: u64, value: u64, size: Size) -> Result<(), Trapped> {
        if self.store_by_page(va, value, size) {
            return Ok(());
        }
        let pc = self.current_insn().0;
        self.store(At::Pc(pc), va, value, size)
    }

    /// For helpers: atomic read-modify-write as the instruction being executed; the old value.
    ///
    /// # Errors
    /// The access trapped, as a store: return from the helper.
    pub fn rmw_data(&mut self, va: u64, size: Size, mut new: impl FnMut(u64) -> u64) -> Result<u64, Trapped> {
        let pc = self.current_insn().0;
        self.rmw(At::Pc(pc), va, size, true, &mut new)
    }

    /// For helpers, where stores to code must be seen at once ([`GuestFrontend::COHERENT_CODE`]): whether a store
    /// since the last call withdrew code. The block may go on in code that is not there any more, so the helper
    /// then ends with [`Cpu::jump`] to the next instruction.
    pub fn code_changed(&mut self) -> bool {
        std::mem::take(&mut self.code_changed)
    }

    /// Zeroes `len` bytes (a power of two up to a page, `va` aligned to it): a cache-block zero.
    pub fn zero_block(&mut self, pc: u64, va: u64, len: u64) -> Result<(), Trapped> {
        let pc = At::Pc(pc);
        self.watch(pc, va, len, WRITES)?;
        if let Some(host) = self.mmu.context().lookup_write(va) {
            // SAFETY: `len` bytes inside a page that the TLB grants stores to.
            unsafe { ptr::write_bytes(host as *mut u8, 0, len as usize) };
            return Ok(());
        }
        let place = self.locate(va, Access::Store).map_err(|f| self.fault(pc, va, Access::Store, f))?;
        match place {
            Place::Ram { readonly: true, .. } => Ok(()),
            Place::Ram { host, block, offset, .. } => {
                // SAFETY: inside one page of a RAM block, which the view keeps alive.
                unsafe {
                    ptr::write_bytes(host, 0, len as usize);
                    self.stored(&*block, offset, host, len as u32);
                }
                Ok(())
            }
            Place::Io(_) => (0..len).step_by(8).try_for_each(|i| self.store(pc, va + i, 0, Size::B8)),
        }
    }

    /// Checks that `va` may be accessed, without accessing it; the trap is taken if not.
    pub fn probe(&mut self, pc: u64, va: u64, access: Access) -> Result<(), Trapped> {
        self.locate(va, access).map(drop).map_err(|f| self.fault(At::Pc(pc), va, access, f))
    }

    /// Host address of the RAM page of code at `pa` and the block's flags for it.
    pub(crate) fn code_page(&self, pa: u64) -> Option<(*const u8, &AtomicU8)> {
        let range = self.view.lookup(GuestPhys(pa))?;
        let page = pa & !(PAGE - 1);
        if page < range.base.0 || page + PAGE > range.end() {
            return None;
        }
        let (block, offset) = range.ram_at(GuestPhys(page))?;
        Some((block.host_ptr(offset), block.page_flags(offset / PAGE)))
    }

    /// The block that has the RAM page of code at `pa`, and the page's number in it.
    pub(crate) fn code_block(&self, pa: u64) -> Option<(Arc<RamBlock>, u64)> {
        self.code_page(pa)?;
        let page = GuestPhys(pa & !(PAGE - 1));
        let (block, offset) = self.view.lookup(page)?.ram_at(page)?;
        Some((block.clone(), offset / PAGE))
    }
}

fn amo_result(op: AmoOp, old: u64, value: u64, size: Size) -> u64 {
    let unsigned = |v: u64| extend(v, size, Ext::Zero);
    match op {
        AmoOp::Swap => value,
        AmoOp::Add => old.wrapping_add(value),
        AmoOp::Xor => old ^ value,
        AmoOp::And => old & value,
        AmoOp::Or => old | value,
        AmoOp::MinS => (old as i64).min(value as i64) as u64,
        AmoOp::MaxS => (old as i64).max(value as i64) as u64,
        AmoOp::MinU => unsigned(old).min(unsigned(value)),
        AmoOp::MaxU => unsigned(old).max(unsigned(value)),
    }
}

/// Reads guest memory that other vCPUs may be writing.
///
/// # Safety
/// `size` bytes at `host` are mapped.
pub(crate) unsafe fn read(host: *mut u8, size: Size) -> u64 {
    // SAFETY: mapped, by the caller; aligned accesses are atomic, others volatile, as on x86 hardware.
    unsafe {
        match size {
            Size::B1 => u64::from(AtomicU8::from_ptr(host).load(Ordering::Relaxed)),
            Size::B2 => u64::from(u16::from_le(host.cast::<u16>().read_unaligned())),
            Size::B4 if host.cast::<u32>().is_aligned() => {
                u64::from(AtomicU32::from_ptr(host.cast()).load(Ordering::Relaxed))
            }
            Size::B4 => u64::from(u32::from_le(host.cast::<u32>().read_unaligned())),
            Size::B8 if host.cast::<u64>().is_aligned() => AtomicU64::from_ptr(host.cast()).load(Ordering::Relaxed),
            Size::B8 => u64::from_le(host.cast::<u64>().read_unaligned()),
        }
    }
}

/// Writes guest memory that other vCPUs may be accessing.
///
/// # Safety
/// `size` bytes at `host` are mapped.
pub(crate) unsafe fn write(host: *mut u8, value: u64, size: Size) {
    // SAFETY: as in `read`.
    unsafe {
        match size {
            Size::B1 => AtomicU8::from_ptr(host).store(value as u8, Ordering::Relaxed),
            Size::B2 if host.cast::<u16>().is_aligned() => {
                AtomicU16::from_ptr(host.cast()).store(value as u16, Ordering::Relaxed);
            }
            Size::B2 => host.cast::<u16>().write_unaligned(value as u16),
            Size::B4 if host.cast::<u32>().is_aligned() => {
                AtomicU32::from_ptr(host.cast()).store(value as u32, Ordering::Relaxed);
            }
            Size::B4 => host.cast::<u32>().write_unaligned(value as u32),
            Size::B8 if host.cast::<u64>().is_aligned() => {
                AtomicU64::from_ptr(host.cast()).store(value, Ordering::Relaxed);
            }
            Size::B8 => host.cast::<u64>().write_unaligned(value),
        }
    }
}

/// Compares and exchanges the low `size` bytes.
///
/// # Safety
/// `host` is mapped and aligned to `size`.
pub(crate) unsafe fn compare_exchange(host: *mut u8, old: u64, new: u64, size: Size) -> bool {
    const O: Ordering = Ordering::SeqCst;
    // SAFETY: mapped and aligned, by the caller.
    unsafe {
        match size {
            Size::B1 => AtomicU8::from_ptr(host).compare_exchange(old as u8, new as u8, O, O).is_ok(),
            Size::B2 => AtomicU16::from_ptr(host.cast()).compare_exchange(old as u16, new as u16, O, O).is_ok(),
            Size::B4 => AtomicU32::from_ptr(host.cast()).compare_exchange(old as u32, new as u32, O, O).is_ok(),
            Size::B8 => AtomicU64::from_ptr(host.cast()).compare_exchange(old, new, O, O).is_ok(),
        }
    }
}

/// Replaces memory by what `new` makes of it; the old value. With `lock`, atomically.
///
/// # Safety
/// `size` bytes at `host` are mapped. They need not be aligned.
unsafe fn exchange(host: *mut u8, size: Size, lock: bool, new: &mut dyn FnMut(u64) -> u64) -> u64 {
    // SAFETY: mapped, by the caller.
    unsafe {
        let mut old = read(host, size);
        if !lock {
            write(host, new(old), size);
            return old;
        }
        loop {
            let found = lock_cmpxchg(host, old, new(old), size);
            if found == old {
                return old;
            }
            old = found;
        }
    }
}

/// The host's own compare-and-exchange, which is atomic at any alignment; what it found, zeros above.
///
/// # Safety
/// `size` bytes at `host` are mapped.
unsafe fn lock_cmpxchg(host: *mut u8, old: u64, new: u64, size: Size) -> u64 {
    use std::arch::asm;
    let mut found = old;
    // SAFETY: one instruction on memory that is mapped, by the caller.
    unsafe {
        match size {
            Size::B1 => asm!("lock cmpxchg [{}], {:l}", in(reg) host, in(reg) new, inout("rax") found),
            Size::B2 => asm!("lock cmpxchg [{}], {:x}", in(reg) host, in(reg) new, inout("rax") found),
            Size::B4 => asm!("lock cmpxchg [{}], {:e}", in(reg) host, in(reg) new, inout("rax") found),
            Size::B8 => asm!("lock cmpxchg [{}], {}", in(reg) host, in(reg) new, inout("rax") found),
        }
    }
    extend(found, size, Ext::Zero)
}

/// Bytes of an access that are in its first page, and the address of the page behind that.
fn halves(va: u64, bytes: u32) -> (u32, u64) {
    (bytes.min((PAGE - (va & (PAGE - 1))) as u32), (va | (PAGE - 1)).wrapping_add(1))
}

/// Copies bytes of a page of code that other vCPUs may be writing.
pub(crate) fn copy_code(from: *const u8, offset: usize, to: &mut [u8]) {
    assert!(offset + to.len() <= PAGE as usize, "inside the page");
    // SAFETY: `from` is a whole page of a RAM block (see `Cpu::code_page`), and the range is inside of it.
    unsafe { ptr::copy_nonoverlapping(from.add(offset), to.as_mut_ptr(), to.len()) };
}

/// Copies a page of guest memory that other vCPUs may be writing.
pub(crate) fn copy_page(from: *const u8, to: &mut crate::frontend::CodePage) {
    // SAFETY: `from` is a whole page of a RAM block (see `Cpu::code_page`); a torn copy is withdrawn by
    // whoever wrote (see `CodeStore::publish`).
    unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
}
