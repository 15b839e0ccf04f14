//! What the rules of the architecture need of whoever executes: registers, physical memory, the machine.
//!
//! The system parts of this crate are functions over a [`Host`]. The translator's vCPU is one, and so is the
//! memory and register file of the unit tests.

use mimus_core::accel::SysReg;

use crate::exception::{Exception, Result};
use crate::paging::{self, Access};
use crate::state::{ARITH, CS, SYSTEM, State, mask};
use mimus_arch::x86::regs::*;

/// What to forget of cached translations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// Everything, global translations too.
    All,
    /// All that is not global, of this PCID (`None`: of all).
    NonGlobal(Option<u64>),
    /// Every translation of the address; with a PCID, only its and global ones.
    Page(u64, Option<u64>),
}

/// Why a vCPU stops for good.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    TripleFault,
}

/// Who executes.
pub trait Host {
    fn st(&self) -> &State;
    fn st_mut(&mut self) -> &mut State;
    /// General register, in encoding order.
    fn gpr(&self, n: usize) -> u64;
    fn set_gpr(&mut self, n: usize, value: u64);
    /// The flags of [`ARITH`].
    fn arith(&self) -> u64;
    fn set_arith(&mut self, flags: u64);
    /// Takes note of a segment's new base: it is in the state already.
    fn base_changed(&mut self, seg: usize);
    /// Goes on at this offset of the (new) code segment.
    fn set_ip(&mut self, ip: u64);
    /// RF may have been set, for the instruction where it goes on now.
    fn resume_flag_set(&mut self) {}
    /// Something that [`State::context_key`] or [`State::code_mode`] depends on changed.
    fn mode_changed(&mut self);
    /// [`State::smm`] changed: so does the memory that accesses see, from now on.
    fn smm_changed(&mut self);
    /// Interrupts may have become deliverable, or single-stepping on.
    fn check_events(&mut self);
    /// Whether an interrupt or NMI may be waiting. One that comes later is noticed by itself.
    fn event_waits(&self) -> bool {
        true
    }
    fn flush(&mut self, what: Flush);
    /// Reads 1 to 8 bytes of physical memory inside a page; all ones where there is nothing.
    fn phys_read(&mut self, pa: u64, bytes: u32) -> u64;
    fn phys_write(&mut self, pa: u64, bytes: u32, value: u64);
    /// Compares and exchanges 4 or 8 aligned bytes; false if they were not `old`.
    fn phys_cmpxchg(&mut self, pa: u64, bytes: u32, old: u64, new: u64) -> bool;
    /// The virtual clock in ns.
    fn now(&self) -> u64;
    fn sysreg_read(&mut self, reg: SysReg) -> Option<u64>;
    fn sysreg_write(&mut self, reg: SysReg, value: u64) -> Option<()>;
    /// The machine ends or resets.
    fn stop(&mut self, why: Stop);
    /// An event is about to be delivered at this offset of the code segment: for traces and reports. `value`: the
    /// address of a page fault, else the error code.
    fn note_event(&mut self, vector: u8, hardware: bool, ip: u64, value: u64) {
        let _ = (vector, hardware, ip, value);
    }
    /// Memory was accessed through [`Host::lin_read`] or [`Host::lin_write`]: for traces.
    fn note_access(&mut self, writes: bool, va: u64, bytes: u32, value: u64) {
        let _ = (writes, va, bytes, value);
    }

    /// Reads 1 to 8 bytes at a linear address, as a user or the supervisor would. `implicit` accesses (descriptor
    /// tables, TSS) are the supervisor's whatever the privilege.
    ///
    /// # Errors
    /// The page fault.
    fn lin_read(&mut self, va: u64, bytes: u32, user: bool) -> Result<u64> {
        let mut value = 0;
        let mut done = 0;
        while done < bytes {
            let at = self.wrap(va.wrapping_add(u64::from(done)));
            let part = (4096 - (at & 4095)).min(u64::from(bytes - done)) as u32;
            let leaf = paging::walk(self, at, Access::Load, user)?;
            value |= (self.phys_read(leaf.pa, part) & mask(part)) << (done * 8);
            done += part;
        }
        self.note_access(false, va, bytes, value);
        Ok(value)
    }

    /// Writes 1 to 8 bytes at a linear address.
    ///
    /// # Errors
    /// The page fault; nothing is written then.
    fn lin_write(&mut self, va: u64, bytes: u32, value: u64, user: bool) -> Result<()> {
        let first = (4096 - (va & 4095)).min(u64::from(bytes)) as u32;
        let leaf = paging::walk(self, self.wrap(va), Access::Store, user)?;
        if first < bytes {
            let at = self.wrap(va.wrapping_add(u64::from(first)));
            let next = paging::walk(self, at, Access::Store, user)?;
            self.phys_write(next.pa, bytes - first, value >> (first * 8));
        }
        self.phys_write(leaf.pa, first, value & mask(first));
        self.note_access(true, va, bytes, value);
        Ok(())
    }

    /// Reads 1 to 8 bytes of a descriptor table or a task-state segment.
    ///
    /// # Errors
    /// The page fault.
    fn table_read(&mut self, va: u64, bytes: u32) -> Result<u64> {
        paging::check_implicit(self, va, bytes, Access::Load)?;
        self.lin_read(va, bytes, false)
    }

    /// Writes 1 to 8 bytes of one.
    ///
    /// # Errors
    /// The page fault; nothing is written then.
    fn table_write(&mut self, va: u64, bytes: u32, value: u64) -> Result<()> {
        paging::check_implicit(self, va, bytes, Access::Store)?;
        self.lin_write(va, bytes, value, false)
    }

    /// Sets and clears bits of a byte of a descriptor table, by a locked cycle; answers what it was.
    ///
    /// # Errors
    /// The page fault.
    fn table_change(&mut self, va: u64, set: u8, clear: u8) -> Result<u8> {
        change_byte(self, va, set, clear)
    }

    /// Truncates a linear address to what the mode has.
    fn wrap(&self, va: u64) -> u64 {
        if self.st().long() { va } else { va & 0xffff_ffff }
    }

    /// All of RFLAGS.
    fn rflags(&self) -> u64 {
        self.arith() & ARITH | self.st().flags & SYSTEM | RFLAGS_FIXED
    }

    /// Replaces the bits of RFLAGS in `bits`.
    fn set_rflags(&mut self, value: u64, bits: u64) {
        let arith = self.arith();
        self.set_arith(arith & !(bits & ARITH) | value & bits & ARITH);
        let bits = bits & SYSTEM;
        let old = self.st().flags;
        let new = old & !bits | value & bits;
        self.st_mut().flags = new;
        if (old ^ new) & (RFLAGS_AC | RFLAGS_VM) != 0 {
            self.mode_changed();
        }
        if new & !old & RFLAGS_IF != 0 && self.event_waits() || new & RFLAGS_TF != 0 {
            self.check_events();
        }
    }

    /// Sets the privilege level.
    fn set_cpl(&mut self, cpl: u8) {
        if self.st().cpl != cpl {
            self.st_mut().cpl = cpl;
            self.mode_changed();
        }
    }

    /// Whether ordinary accesses are a user's.
    fn user(&self) -> bool {
        self.st().cpl == 3
    }

    /// The code segment's base.
    fn cs_base(&self) -> u64 {
        if self.st().is_64bit() { 0 } else { self.st().seg[CS].base }
    }

    /// Fails unless the privilege level is 0.
    ///
    /// # Errors
    /// `#GP(0)`
    fn need_cpl0(&self) -> Result<()> {
        if self.st().cpl == 0 { Ok(()) } else { Err(Exception::GP0) }
    }
}

/// [`Host::table_change`]
///
/// # Errors
/// The page fault.
pub fn change_byte<H: Host + ?Sized>(h: &mut H, va: u64, set: u8, clear: u8) -> Result<u8> {
    paging::check_implicit(h, va, 1, Access::Store)?;
    let va = h.wrap(va);
    let leaf = paging::walk(h, va, Access::Store, false)?;
    let (word, shift) = (leaf.pa & !3, 8 * (leaf.pa & 3));
    loop {
        let old = h.phys_read(word, 4);
        let new = (old | u64::from(set) << shift) & !(u64::from(clear) << shift);
        if h.phys_cmpxchg(word, 4, old, new) {
            h.note_access(true, va, 1, new >> shift & 0xff);
            return Ok((old >> shift) as u8);
        }
    }
}
