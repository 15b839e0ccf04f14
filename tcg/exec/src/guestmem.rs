//! Guest memory for helpers: accesses that answer a fault instead of taking the trap, so that a helper can make
//! several and do the rest only when all have succeeded.
//!
//! Where nothing answers, loads give all ones and stores are lost; unaligned accesses to devices are split.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;

use mimus_core::accel::trace::words;
use mimus_core::bus::GuestPhys;
use mimus_tcg_ir::Size;

use crate::access::{At, Place, read, write};
use crate::env::Cpu;
use crate::frontend::{Access, GuestFrontend, MemFault};

const PAGE: u64 = 4096;

/// The largest power of two that divides `at`, up to 8 and to `left`.
fn piece(at: u64, left: usize) -> (Size, usize) {
    for (size, bytes) in [(Size::B8, 8), (Size::B4, 4), (Size::B2, 2)] {
        if at.is_multiple_of(bytes as u64) && left >= bytes {
            return (size, bytes);
        }
    }
    (Size::B1, 1)
}

impl<F: GuestFrontend> Cpu<F> {
    /// Host address of `va` if a load may use it directly up to its page's end; `None` for devices, and pages with
    /// a watchpoint.
    ///
    /// # Errors
    /// The fault of a load.
    pub fn host_for_load(&mut self, va: u64) -> Result<Option<*const u8>, MemFault> {
        if let Some(host) = self.mmu.context().lookup_read(va) {
            return Ok(Some(host as *const u8));
        }
        Ok(match self.locate(va, Access::Load)? {
            Place::Ram { host, .. } if self.watches_no_load_of(va) => Some(host.cast_const()),
            _ => None,
        })
    }

    /// Host address of `va` if stores may use it directly up to its page's end; `None` for devices, ROM, and pages
    /// that hold translated code or have a watchpoint.
    ///
    /// # Errors
    /// The fault of a store.
    pub fn host_for_store(&mut self, va: u64) -> Result<Option<*mut u8>, MemFault> {
        if let Some(host) = self.mmu.context().lookup_write(va) {
            return Ok(Some(host as *mut u8));
        }
        self.locate(va, Access::Store)?;
        Ok(self.mmu.context().lookup_write(va).map(|host| host as *mut u8))
    }

    /// The same, as [`Cpu::host_for_load`] or [`Cpu::host_for_store`], if the TLB has the page.
    #[inline]
    pub fn host_at_once(&self, va: u64, write: bool) -> Option<*mut u8> {
        let context = self.mmu.context();
        let host = if write { context.lookup_write(va) } else { context.lookup_read(va) };
        host.map(|host| host as *mut u8)
    }

    /// Loads bytes that are inside one page.
    ///
    /// # Errors
    /// The fault.
    pub fn load_bytes(&mut self, va: u64, to: &mut [u8]) -> Result<(), MemFault> {
        debug_assert!((va & (PAGE - 1)) + to.len() as u64 <= PAGE);
        if let Some(host) = self.host_for_load(va)? {
            // SAFETY: inside a page of RAM; a torn copy is what racing processors get.
            unsafe { std::ptr::copy_nonoverlapping(host, to.as_mut_ptr(), to.len()) };
            self.trace_bulk(false, va, to.len() as u64);
            return Ok(());
        }
        self.note_watched(va, to.len() as u64, (true, false));
        match self.locate(va, Access::Load)? {
            // SAFETY: inside a page of RAM.
            Place::Ram { host, .. } => unsafe {
                std::ptr::copy_nonoverlapping(host.cast_const(), to.as_mut_ptr(), to.len());
                self.trace_bulk(false, va, to.len() as u64);
            },
            Place::Io(pa) => self.io_bytes(pa.0, to),
        }
        Ok(())
    }

    fn io_bytes(&mut self, pa: u64, to: &mut [u8]) {
        let mut done = 0;
        while done < to.len() {
            let at = pa + done as u64;
            let (size, bytes) = piece(at, to.len() - done);
            let value = self.io_read(GuestPhys(at), size).unwrap_or(!0);
            to[done..done + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
            done += bytes;
        }
    }

    /// Stores bytes that are inside one page.
    ///
    /// # Errors
    /// The fault; nothing is stored then.
    pub fn store_bytes(&mut self, va: u64, from: &[u8]) -> Result<(), MemFault> {
        debug_assert!((va & (PAGE - 1)) + from.len() as u64 <= PAGE);
        if let Some(host) = self.mmu.context().lookup_write(va) {
            // SAFETY: inside a page that the TLB grants stores to.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host as *mut u8, from.len()) };
            self.trace_bulk(true, va, from.len() as u64);
            return Ok(());
        }
        let place = self.locate(va, Access::Store)?;
        self.note_watched(va, from.len() as u64, (false, true));
        match place {
            Place::Ram { readonly: true, .. } => {}
            Place::Ram { host, block, offset, .. } => {
                // SAFETY: inside one page of a RAM block, which the view keeps alive.
                unsafe {
                    std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len());
                    self.stored(&*block, offset, host, from.len() as u32);
                }
                self.trace_bulk(true, va, from.len() as u64);
            }
            Place::Io(pa) => self.io_store(pa.0, from),
        }
        Ok(())
    }

    fn io_store(&mut self, pa: u64, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let at = pa + done as u64;
            let (size, bytes) = piece(at, from.len() - done);
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(&from[done..done + bytes]);
            // Nobody there: the store is lost.
            let _lost = self.io_write(GuestPhys(at), size, u64::from_le_bytes(value));
            done += bytes;
        }
    }

    /// Loads 1, 2, 4 or 8 bytes inside a page, in one access if aligned.
    ///
    /// # Errors
    /// The fault.
    pub fn try_load(&mut self, va: u64, size: Size) -> Result<u64, MemFault> {
        if let Some(host) = self.host_for_load(va)? {
            // SAFETY: inside a page of RAM.
            let value = unsafe { read(host.cast_mut(), size) };
            self.trace_access(0, va, size, value);
            return Ok(value);
        }
        let mut bytes = [0; 8];
        self.load_bytes(va, &mut bytes[..size.bytes() as usize])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Stores 1, 2, 4 or 8 bytes inside a page, in one access if aligned.
    ///
    /// # Errors
    /// The fault.
    pub fn try_store(&mut self, va: u64, value: u64, size: Size) -> Result<(), MemFault> {
        if let Some(host) = self.host_for_store(va)? {
            // SAFETY: inside a page that the TLB grants stores to.
            unsafe { write(host, value, size) };
            self.trace_access(words::WRITE, va, size, value);
            return Ok(());
        }
        self.store_bytes(va, &value.to_le_bytes()[..size.bytes() as usize])
    }

    /// Atomic read-modify-write of 1, 2, 4 or 8 bytes, whatever their alignment; answers what was there.
    ///
    /// # Errors
    /// The fault of a store.
    pub fn try_rmw(&mut self, va: u64, size: Size, new: &mut dyn FnMut(u64) -> u64) -> Result<u64, MemFault> {
        let last = va.wrapping_add(u64::from(size.bytes()) - 1) & !(PAGE - 1);
        for at in [va, last] {
            self.locate(at, Access::Store)?;
        }
        self.note_watched(va, size.bytes().into(), (true, true));
        let pc = self.current_insn().0;
        let old = self.rmw_unwatched(At::Pc(pc), va, size, true, &mut *new).map_err(|_| MemFault::Access)?;
        if self.traces_memory() {
            let value = new(old);
            self.trace_access(words::WRITE, va, size, value);
        }
        Ok(old)
    }

    /// Compares and exchanges 16 bytes, aligned; answers what was there. `None` of devices and ROM.
    ///
    /// # Errors
    /// The fault of a store.
    pub fn compare_exchange_16(&mut self, va: u64, old: u128, new: u128) -> Result<Option<u128>, MemFault> {
        debug_assert!(va.is_multiple_of(16));
        self.note_watched(va, 16, (true, true));
        match self.locate(va, Access::Store)? {
            Place::Ram { host, readonly: false, block, offset } => {
                let (mut low, mut high) = (old as u64, (old >> 64) as u64);
                // SAFETY: 16 aligned bytes inside a page of RAM that the view keeps alive; every x86-64 processor
                // with FSGSBASE, which the engine asks for, has CMPXCHG16B.
                unsafe {
                    std::arch::asm!(
                        "xchg rsi, rbx",
                        "lock cmpxchg16b [rdi]",
                        "mov rbx, rsi",
                        inout("rsi") new as u64 => _,
                        in("rdi") host,
                        inout("rax") low,
                        inout("rdx") high,
                        in("rcx") (new >> 64) as u64,
                        options(nostack),
                    );
                    self.stored(&*block, offset, host, 16);
                }
                self.trace_bulk(true, va, 16);
                Ok(Some(u128::from(low) | u128::from(high) << 64))
            }
            _ => Ok(None),
        }
    }

    /// Whether the vCPU has been asked to look up from what it does: long helpers stop in between then.
    pub fn kicked(&self) -> bool {
        if self.counting.on {
            // What others do must not show.
            return self.budget_spent();
        }
        self.head.kick.load(Ordering::Relaxed) != 0
    }
}
