//! Pushing to and popping from a stack that may not be the current one, so that nothing is changed before
//! all that can fail has succeeded.

use mimus_arch::x86::state::{Segment, attr};

use crate::exception::{Exception, Result};
use crate::frontend::{X86Cpu, taken};
use crate::host::Host;
use crate::segment::in_limit;
use crate::state::{SS, State, mask};

/// Bytes that PUSH and POP access for a segment register in an item of `room` bytes: of four Intel's processors leave the
/// upper two alone (SDM volume 2 "PUSH"), AMD's clear them.
pub const fn selector_bytes(room: u32, amd: bool) -> u32 {
    if room == 4 && !amd { 2 } else { room }
}

/// A stack in use.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub ss: Segment,
    pub sp: u64,
    /// What SP is truncated to.
    pub mask: u64,
    /// Accesses are a user's.
    pub user: bool,
    /// 64-bit: no segment.
    flat: bool,
    /// What of it does not fit is an exception with its selector: of a stack that is not the current one.
    other: bool,
}

impl Stack {
    /// The current one.
    pub fn current<H: Host + ?Sized>(h: &H) -> Self {
        let st = h.st();
        Self { ss: st.seg[SS], sp: h.gpr(4), mask: st.stack_mask(), user: h.user(), flat: st.is_64bit(), other: false }
    }

    /// Another one, of privilege level `cpl`; not for 64-bit code.
    pub fn new(ss: Segment, sp: u64, cpl: u8) -> Self {
        let mask = if ss.attributes & attr::DB != 0 { 0xffff_ffff } else { 0xffff };
        Self { ss, sp, mask, user: cpl == 3, flat: false, other: true }
    }

    /// Another one, for 64-bit code.
    pub fn long(ss: Segment, sp: u64, cpl: u8) -> Self {
        Self { ss, sp, mask: !0, user: cpl == 3, flat: true, other: false }
    }

    fn linear(&self, st: &State, bytes: u32) -> Result<u64> {
        let va = if self.flat {
            let last = self.sp.wrapping_add(u64::from(bytes) - 1);
            if !st.canonical(self.sp) || !st.canonical(last) {
                return Err(Exception::ss(0));
            }
            self.sp
        } else {
            let offset = self.sp & self.mask;
            if !in_limit(&self.ss, offset, bytes) {
                let selector = if self.other { u32::from(self.ss.selector) & 0xfffc } else { 0 };
                return Err(Exception::ss(selector));
            }
            self.ss.base.wrapping_add(offset) & 0xffff_ffff
        };
        if self.user {
            st.check_alignment(va, bytes)?;
        }
        Ok(va)
    }

    /// Pushes `bytes` of `value`.
    ///
    /// # Errors
    /// `#SS(0)` or a page fault.
    pub fn push<H: Host + ?Sized>(&mut self, h: &mut H, value: u64, bytes: u32) -> Result<()> {
        self.push_into(h, bytes, value, bytes)
    }

    /// Pushes `bytes` of `value` into the lowest bytes of `room`; the others stay as they are.
    ///
    /// # Errors
    /// `#SS(0)` or a page fault.
    pub fn push_into<H: Host + ?Sized>(&mut self, h: &mut H, room: u32, value: u64, bytes: u32) -> Result<()> {
        let old = self.sp;
        self.sp = old & !self.mask | old.wrapping_sub(u64::from(room)) & self.mask;
        let at = self.linear(h.st(), bytes)?;
        h.lin_write(at, bytes, value & mask(bytes), self.user)
    }

    /// Whether `bytes` can be pushed.
    ///
    /// # Errors
    /// What [`Stack::push`] would fail with.
    pub fn probe_push(mut self, cpu: &mut X86Cpu, bytes: u32) -> Result<()> {
        self.skip(u64::from(bytes).wrapping_neg());
        self.probe(cpu, bytes)
    }

    /// Whether `bytes` can be written on top.
    ///
    /// # Errors
    /// `#SS(0)` or a page fault.
    pub fn probe(&self, cpu: &mut X86Cpu, bytes: u32) -> Result<()> {
        let at = self.linear(&cpu.guest.st, bytes)?;
        let last = at.wrapping_add(u64::from(bytes) - 1);
        let behind = ((at ^ last) > 4095).then_some(last & !4095);
        for page in std::iter::once(at).chain(behind) {
            let page = cpu.wrap(page);
            if cpu.host_for_store(page).is_err() {
                return Err(taken(cpu, page));
            }
        }
        Ok(())
    }

    /// Pops `bytes`.
    ///
    /// # Errors
    /// `#SS(0)` or a page fault.
    pub fn pop<H: Host + ?Sized>(&mut self, h: &mut H, bytes: u32) -> Result<u64> {
        self.pop_from(h, bytes, bytes)
    }

    /// Pops the lowest `bytes` of `room`.
    ///
    /// # Errors
    /// `#SS(0)` or a page fault.
    pub fn pop_from<H: Host + ?Sized>(&mut self, h: &mut H, room: u32, bytes: u32) -> Result<u64> {
        let at = self.linear(h.st(), bytes)?;
        let value = h.lin_read(at, bytes, self.user)?;
        self.skip(u64::from(room));
        Ok(value)
    }

    /// Moves SP up.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
    }

    /// Makes SP the stack pointer.
    pub fn commit<H: Host + ?Sized>(&self, h: &mut H) {
        let old = h.gpr(4);
        // A 32-bit stack pointer clears the upper half, a 16-bit one leaves what is above it.
        let new = if self.mask == 0xffff { old & !0xffff | self.sp & 0xffff } else { self.sp & self.mask };
        h.set_gpr(4, new);
    }
}
