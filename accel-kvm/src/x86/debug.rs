//! Breakpoints, watchpoints and single steps.
//!
//! The first four points use the processor's debug registers; further breakpoints replace the instruction by
//! `INT3`, in memory and so for all vCPUs. A watchpoint takes a register from a breakpoint, which moves into memory;
//! one that is no aligned power of two takes several. To go on from a breakpoint, the points at that address are
//! lifted, one instruction is stepped, and they are put back; another vCPU may run through meanwhile.

use crate::error::errno;
use crate::handle::Count;
use crate::x86::patches::INT3;
use crate::x86::vcpu::KvmVcpu;
use kvm_bindings::*;
use mimus_arch::StateGroups;
use mimus_arch::x86::regs::{VECTOR_BP, VECTOR_DB};
use mimus_core::accel::{
    AccelError, Access, Catch, Caught, DebugCaps, DebugStop, Vcpu, VcpuDebug, VcpuExit, WatchKind,
};
use mimus_core::bus::{GuestPhys, GuestVirt};
use std::collections::BTreeMap;

/// Debug registers that hold addresses.
const HARDWARE: usize = 4;
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

/// In a debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    va: GuestVirt,
    len: u64,
    /// `None`: stop before the instruction.
    watch: Option<WatchKind>,
}

/// A breakpoint in memory.
struct Software {
    /// Where this vCPU had it put; `None` if it has no such page now, but another vCPU put one there.
    pa: Option<GuestPhys>,
    users: u32,
}

/// Debugging of one vCPU.
#[derive(Default)]
pub struct Debug {
    step: bool,
    /// Steps take no interrupts.
    mask_interrupts: bool,
    /// Each with how often it was inserted.
    hardware: Vec<(Point, u32)>,
    software: BTreeMap<GuestVirt, Software>,
    /// The last run ended in front of a breakpoint here.
    stopped_at: Option<GuestVirt>,
    /// Points at this address are lifted for one step.
    lifted: Option<GuestVirt>,
    /// Where the step that is being made began.
    step_from: u64,
    /// Accesses to ports and devices to stop at: those that leave the kernel.
    catches: Vec<Catch>,
    caught: Option<Caught>,
}

/// The aligned powers of two, up to 8, that `len` bytes at `va` are.
fn pieces(va: GuestVirt, len: u64) -> impl Iterator<Item = (GuestVirt, u64)> {
    let (mut at, end) = (va.0, va.0.saturating_add(len));
    std::iter::from_fn(move || {
        let size = [8, 4, 2, 1].into_iter().find(|n| at.is_multiple_of(*n) && end - at >= *n)?;
        at += size;
        Some((GuestVirt(at - size), size))
    })
}

impl Debug {
    /// A port or device is accessed.
    pub(super) fn note(&mut self, access: Caught) {
        if self.catches.iter().any(|c| c.matches(&access)) {
            self.caught.get_or_insert(access);
        }
    }

    /// What of that the vCPU is to stop for.
    pub(super) fn take_caught(&mut self) -> Option<Caught> {
        self.caught.take()
    }

    fn active(&self) -> bool {
        self.step || self.lifted.is_some() || !self.hardware.is_empty() || !self.software.is_empty()
    }

    fn is_breakpoint(&self, va: GuestVirt) -> bool {
        self.software.contains_key(&va) || self.hardware.iter().any(|(p, _)| p.va == va && p.watch.is_none())
    }

    /// What the kernel is told.
    fn request(&self) -> kvm_guest_debug {
        let mut control = 0;
        let mut arch = kvm_guest_debug_arch::default();
        if self.active() {
            control |= KVM_GUESTDBG_ENABLE;
        }
        if self.step || self.lifted.is_some() {
            control |= KVM_GUESTDBG_SINGLESTEP;
            // A step over a breakpoint is no step that the user knows of.
            if self.step && self.mask_interrupts {
                control |= KVM_GUESTDBG_BLOCKIRQ;
            }
        }
        if !self.software.is_empty() {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        // DR7: exact (bits 9:8), bit 10 reads as one; per register an enable bit, kind and length.
        let mut dr7 = 0x700u64;
        for (i, (p, _)) in self.hardware.iter().enumerate() {
            if p.watch.is_none() && self.lifted == Some(p.va) {
                continue;
            }
            control |= KVM_GUESTDBG_USE_HW_BP;
            let kind = match p.watch {
                None => 0,
                Some(WatchKind::Write) => 1,
                // The processor has no reads alone.
                Some(WatchKind::Read | WatchKind::ReadWrite) => 3,
            };
            let len = if p.watch.is_none() { 0 } else { [0, 0, 1, 0, 3, 0, 0, 0, 2][p.len.min(8) as usize] };
            dr7 |= 2 << (i * 2) | (kind | len << 2) << (16 + i * 4);
            arch.debugreg[i] = p.va.0;
        }
        arch.debugreg[7] = dr7;
        kvm_guest_debug { control, pad: 0, arch }
    }
}

impl KvmVcpu {
    fn apply_debug(&self) -> Result<(), AccelError> {
        let mut request = self.debug.request();
        if self.vm.known_debug_flags() & KVM_GUESTDBG_BLOCKIRQ == 0 {
            request.control &= !KVM_GUESTDBG_BLOCKIRQ;
        }
        let set = self.core.fd.set_guest_debug(&request);
        set.map_err(errno("set breakpoints"))
    }

    fn linear_pc(&mut self) -> GuestVirt {
        GuestVirt(self.read_state(StateGroups::Core).linear_pc())
    }

    /// Before a run: lets it go on from the breakpoint it stopped at.
    pub(super) fn prepare_debug(&mut self) -> Result<(), AccelError> {
        if let Some(va) = self.debug.stopped_at.take()
            && self.linear_pc() == va
            && self.debug.is_breakpoint(va)
        {
            self.lift(va)?;
        }
        self.begin_step();
        Ok(())
    }

    /// True while somebody watches what is executed.
    pub(super) fn debugging(&self) -> bool {
        self.debug.active()
    }

    /// True while single instructions are made.
    pub(super) fn stepping(&self) -> bool {
        self.debug.step || self.debug.lifted.is_some()
    }

    fn begin_step(&mut self) {
        if self.stepping() {
            self.debug.step_from = self.read_state(StateGroups::Core).rip;
        }
    }

    /// An access was made and is complete. A kernel that emulates the instruction does not report the step then.
    pub(super) fn step_after_access(&mut self) -> Option<VcpuExit> {
        if self.read_state(StateGroups::Core).rip == self.debug.step_from {
            // A string instruction with more to do.
            return None;
        }
        self.put_back();
        if self.debug.step {
            return Some(VcpuExit::Debug(DebugStop::Step));
        }
        None
    }

    /// Where a breakpoint of this vCPU is in memory.
    fn patched(&self, va: GuestVirt) -> Option<GuestPhys> {
        self.debug.software.get(&va)?.pa
    }

    fn lift(&mut self, va: GuestVirt) -> Result<(), AccelError> {
        if let Some(pa) = self.patched(va) {
            self.vm.patches.lift(pa);
        }
        self.debug.lifted = Some(va);
        self.apply_debug()
    }

    fn put_back(&mut self) -> Option<GuestVirt> {
        let va = self.debug.lifted.take()?;
        if let Some(pa) = self.patched(va) {
            self.vm.patches.put_back(pa);
        }
        if let Err(e) = self.apply_debug() {
            log::warn!("{e}");
        }
        Some(va)
    }

    /// After a run that ended before the step did: next time again.
    pub(super) fn leave_debug(&mut self) {
        if let Some(va) = self.put_back() {
            self.debug.stopped_at = Some(va);
        }
    }

    fn stop_before(&mut self, va: GuestVirt) -> Option<VcpuExit> {
        self.debug.stopped_at = Some(va);
        Some(VcpuExit::Debug(DebugStop::Breakpoint))
    }

    /// `KVM_EXIT_DEBUG`.
    pub(super) fn debug_exit(&mut self) -> Option<VcpuExit> {
        self.core.count(Count::Debug);
        let exit = self.core.page.debug();
        let pc = GuestVirt(exit.pc);
        let stepped_over = self.put_back().is_some();
        if exit.exception == u32::from(VECTOR_BP) {
            if self.debug.software.contains_key(&pc) {
                return self.stop_before(pc);
            }
            return self.give_to_guest(VECTOR_BP, None);
        }
        for (i, (point, _)) in self.debug.hardware.iter().enumerate() {
            if exit.dr6 >> i & 1 == 0 {
                continue;
            }
            return match point.watch {
                None => self.stop_before(point.va),
                Some(kind) => Some(VcpuExit::Debug(DebugStop::Watch { va: point.va, kind })),
            };
        }
        if exit.dr6 & DR6_STEP == 0 {
            return self.give_to_guest(VECTOR_DB, Some(exit.dr6));
        }
        if self.debug.step {
            return Some(VcpuExit::Debug(DebugStop::Step));
        }
        // A step of our own, over a breakpoint; another one may follow at once.
        if stepped_over {
            return None;
        }
        self.give_to_guest(VECTOR_DB, Some(exit.dr6))
    }

    /// An `INT3` of ours that the kernel could not execute.
    pub(super) fn stopped_at_patch(&mut self, insn: &[u8]) -> Option<VcpuExit> {
        if insn.first() != Some(&INT3) || self.debug.software.is_empty() {
            return None;
        }
        let pc = self.linear_pc();
        let ours = self.debug.software.contains_key(&pc);
        ours.then(|| {
            self.put_back();
            self.stop_before(pc)
        })?
    }

    /// An exception of the guest's own, that debugging has taken away from it.
    fn give_to_guest(&mut self, vector: u8, dr6: Option<u64>) -> Option<VcpuExit> {
        self.copied = false;
        let fd = &self.core.fd;
        let set = fd.get_vcpu_events().and_then(|mut e| {
            e.exception.nr = vector;
            e.exception.has_error_code = 0;
            let payload = dr6.filter(|_| self.vm.caps.events.payload);
            (e.exception.injected, e.exception.pending) = (payload.is_none().into(), payload.is_some().into());
            e.exception_has_payload = payload.is_some().into();
            e.exception_payload = payload.unwrap_or(0);
            fd.set_vcpu_events(&e)
        });
        match set {
            Ok(()) => None,
            Err(e) => Some(VcpuExit::Failed(errno("give the guest its exception")(e))),
        }
    }

    fn add_hardware(&mut self, point: Point) -> Result<(), AccelError> {
        if let Some((_, users)) = self.debug.hardware.iter_mut().find(|(p, _)| *p == point) {
            *users += 1;
            return Ok(());
        }
        self.debug.hardware.push((point, 1));
        let applied = self.apply_debug();
        if applied.is_err() {
            self.debug.hardware.pop();
        }
        applied
    }

    fn remove_hardware(&mut self, point: Point) -> Result<bool, AccelError> {
        let Some(i) = self.debug.hardware.iter().position(|(p, _)| *p == point) else { return Ok(false) };
        self.debug.hardware[i].1 -= 1;
        if self.debug.hardware[i].1 > 0 {
            return Ok(true);
        }
        self.debug.hardware.remove(i);
        self.apply_debug().map(|()| true)
    }

    /// Puts a breakpoint into memory, for `users`.
    fn patch(&mut self, va: GuestVirt, users: u32) -> Result<(), AccelError> {
        let nowhere = |e: String| AccelError::Other(format!("kvm: no breakpoint at {va}: {e}"));
        let pa = match self.translate(va, Access::Execute) {
            Ok(found) => {
                let view = self.vm.memory.view();
                let place = view.lookup(found.pa).and_then(|r| r.ram_at(found.pa));
                let (block, offset) = place.ok_or_else(|| nowhere("there is no memory".to_owned()))?;
                if !self.vm.patches.add(found.pa, block, offset) {
                    return Err(nowhere("there is no memory".to_owned()));
                }
                Some(found.pa)
            }
            // The bootstrap processor has put it there; this one has not come so far.
            Err(_) if self.core.index.0 > 0 => None,
            Err(e) => return Err(nowhere(e.to_string())),
        };
        self.debug.software.insert(va, Software { pa, users });
        self.apply_debug()
    }

    /// Frees a debug register by moving a breakpoint into memory; false if none can be.
    fn free_register(&mut self) -> bool {
        let breakpoints = self.debug.hardware.iter().rev().filter(|(p, _)| p.watch.is_none());
        for (point, users) in breakpoints.copied().collect::<Vec<_>>() {
            if self.patch(point.va, users).is_ok() {
                self.debug.hardware.retain(|(p, _)| *p != point);
                return true;
            }
        }
        false
    }

    fn watch_all(&mut self, points: &[Point]) -> Result<(), AccelError> {
        for (i, point) in points.iter().enumerate() {
            let known = self.debug.hardware.iter().any(|(p, _)| p == point);
            let room = known || self.debug.hardware.len() < HARDWARE || self.free_register();
            let added = if room {
                self.add_hardware(*point)
            } else {
                let reason = "remove a breakpoint or watchpoint first, or watch fewer bytes";
                Err(AccelError::Other(format!("kvm: all {HARDWARE} debug registers are used: {reason}")))
            };
            if added.is_err() {
                for point in &points[..i] {
                    self.remove_hardware(*point)?;
                }
                return added;
            }
        }
        Ok(())
    }
}

impl VcpuDebug for KvmVcpu {
    fn capabilities(&self) -> DebugCaps {
        DebugCaps { breakpoints: None, watchpoints: Some(HARDWARE as u32) }
    }

    fn set_single_step(&mut self, on: bool) {
        self.debug.step = on;
        if let Err(e) = self.apply_debug() {
            log::warn!("{e}");
        }
    }

    fn set_step_interrupts(&mut self, on: bool) {
        self.debug.mask_interrupts = !on;
    }

    fn insert_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError> {
        if let Some(known) = self.debug.software.get_mut(&va) {
            known.users += 1;
            return Ok(());
        }
        if self.debug.is_breakpoint(va) || self.debug.hardware.len() < HARDWARE {
            return self.add_hardware(Point { va, len: 1, watch: None });
        }
        self.patch(va, 1)
    }

    fn remove_breakpoint(&mut self, va: GuestVirt) -> Result<(), AccelError> {
        if let Some(known) = self.debug.software.get_mut(&va) {
            known.users -= 1;
            if known.users > 0 {
                return Ok(());
            }
            if let Some(pa) = self.debug.software.remove(&va).and_then(|s| s.pa) {
                self.vm.patches.remove(pa);
            }
            return self.apply_debug();
        }
        match self.remove_hardware(Point { va, len: 1, watch: None })? {
            true => Ok(()),
            false => Err(AccelError::Other(format!("kvm: there is no breakpoint at {va}"))),
        }
    }

    fn insert_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError> {
        let points: Vec<Point> =
            pieces(va, len).take(HARDWARE + 1).map(|(va, len)| Point { va, len, watch: Some(kind) }).collect();
        if points.is_empty() || points.len() > HARDWARE {
            let reason =
                format!("there are {HARDWARE} debug registers, each for 1, 2, 4 or 8 bytes at a multiple of that");
            return Err(AccelError::Other(format!("kvm: {len} bytes at {va} cannot be watched: {reason}")));
        }
        self.watch_all(&points)
    }

    fn remove_watchpoint(&mut self, va: GuestVirt, len: u64, kind: WatchKind) -> Result<(), AccelError> {
        let mut all = len > 0;
        for (va, len) in pieces(va, len).take(HARDWARE) {
            all &= self.remove_hardware(Point { va, len, watch: Some(kind) })?;
        }
        if all { Ok(()) } else { Err(AccelError::Other(format!("kvm: there is no watchpoint at {va}"))) }
    }

    fn insert_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        if !matches!(catch, Catch::Port { .. } | Catch::Device { .. }) {
            let reason = "the processor tells of ports and devices only (and of handlers' first instructions)";
            return Err(AccelError::Other(format!("kvm: this cannot be caught: {reason}; use -accel tcg")));
        }
        self.debug.catches.push(catch);
        Ok(())
    }

    fn remove_catch(&mut self, catch: Catch) -> Result<(), AccelError> {
        let at = self.debug.catches.iter().position(|c| *c == catch);
        let at = at.ok_or_else(|| AccelError::Other("kvm: nothing of the kind is caught".to_owned()))?;
        self.debug.catches.remove(at);
        self.debug.caught = None;
        Ok(())
    }

    fn hide_breakpoints(&self, pa: GuestPhys, bytes: &mut [u8]) {
        self.vm.patches.hide(pa, bytes);
    }

    fn keep_breakpoints(&mut self, pa: GuestPhys, bytes: &mut [u8]) {
        self.vm.patches.keep(pa, bytes);
    }
}
