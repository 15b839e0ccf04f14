//! RISC-V ACLINT in its CLINT-compatible arrangement: software interrupts and machine timers.
//!
//! Spec: RISC-V ACLINT specification 1.0-rc4: MSWI at offset 0, MTIMER at 0x4000 with `mtime` at 0xbff8.
//! Checked with: OpenSBI, U-Boot, Linux (M-mode not used there).

use std::sync::{Arc, Mutex, PoisonError};

use mimus_core::accel::{CpuPin, VcpuHandle};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{MutLifecycle, MutMmioDevice, ResetPhase};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Bytes of the register map.
pub const SIZE: u64 = 0x1_0000;
/// Accesses the region takes.
pub const RULES: AccessRules =
    AccessRules { valid_min: AccessSize::B4, ..AccessRules::sizes(AccessSize::B4, AccessSize::B8) };
const MTIMECMP: u64 = 0x4000;
const MTIME: u64 = 0xbff8;
const MTIMECMP_END: u64 = MTIME;

/// The registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    msip: Vec<bool>,
    mtimecmp: Vec<u64>,
    /// What a write of `mtime` added to the virtual clock, in ticks.
    mtime_offset: u64,
}

/// An ACLINT.
pub struct Aclint {
    s: State,
    harts: Vec<Arc<dyn VcpuHandle>>,
    timers: Vec<Timer>,
    /// Nanoseconds per tick.
    tick_ns: u64,
}

impl Aclint {
    /// An ACLINT for `harts`, with one timer of the virtual clock for each, counting a tick every `tick_ns`.
    ///
    /// # Panics
    /// If there is not one timer per hart, or a tick takes no time.
    pub fn new(harts: Vec<Arc<dyn VcpuHandle>>, timers: Vec<Timer>, tick_ns: u64) -> Arc<Mutex<Aclint>> {
        assert_eq!(harts.len(), timers.len(), "one timer per hart");
        assert_ne!(tick_ns, 0, "a tick takes time");
        let s = empty(harts.len());
        let aclint = Arc::new(Mutex::new(Aclint { s, harts, timers: timers.clone(), tick_ns }));
        for (hart, timer) in timers.iter().enumerate() {
            let aclint = Arc::downgrade(&aclint);
            timer.bind(move || {
                if let Some(aclint) = aclint.upgrade() {
                    aclint.lock().unwrap_or_else(PoisonError::into_inner).update_timer(hart);
                }
            });
        }
        aclint
    }

    /// The virtual clock, in whole ticks.
    fn ticks(&self) -> u64 {
        self.timers.first().map_or(0, Timer::now) / self.tick_ns
    }

    fn mtime(&self) -> u64 {
        self.ticks().wrapping_add(self.s.mtime_offset)
    }

    fn update_timer(&mut self, hart: usize) {
        let ticks = self.ticks();
        let (now, deadline) = (ticks.wrapping_add(self.s.mtime_offset), self.s.mtimecmp[hart]);
        let due = now >= deadline;
        self.harts[hart].set_pin(CpuPin::Mtip, due);
        if due {
            self.timers[hart].disarm();
        } else {
            // At the beginning of the tick that makes them equal; never, if that is beyond the clock's range.
            self.timers[hart].arm(ticks.saturating_add(deadline - now).saturating_mul(self.tick_ns));
        }
    }

    fn set_msip(&mut self, hart: usize, level: bool) {
        if let Some(msip) = self.s.msip.get_mut(hart) {
            *msip = level;
            self.harts[hart].set_pin(CpuPin::Msip, level);
        }
    }

    fn update_all(&mut self) {
        for hart in 0..self.harts.len() {
            self.harts[hart].set_pin(CpuPin::Msip, self.s.msip[hart]);
            self.update_timer(hart);
        }
    }
}

fn empty(harts: usize) -> State {
    State { msip: vec![false; harts], mtimecmp: vec![u64::MAX; harts], mtime_offset: 0 }
}

/// The part of a 64-bit register that an access of 4 or 8 bytes at `offset` covers: shift and mask.
fn part(offset: u64, size: AccessSize) -> (u32, u64) {
    let shift = (offset & 4) as u32 * 8;
    (shift, if size == AccessSize::B8 { !0 } else { 0xffff_ffff << shift })
}

impl MutMmioDevice for Aclint {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        let (shift, _) = part(a.offset, a.size);
        let index = |base: u64, stride: u64| ((a.offset - base) / stride) as usize;
        Ok(match a.offset {
            0..MTIMECMP => {
                let msip = |i| self.s.msip.get(i).map_or(0, |&m| u64::from(m));
                let upper = if a.size == AccessSize::B8 { msip(index(0, 4) + 1) } else { 0 };
                msip(index(0, 4)) | upper << 32
            }
            MTIMECMP..MTIMECMP_END => self.s.mtimecmp.get(index(MTIMECMP, 8)).map_or(0, |&t| t >> shift),
            MTIME.. if a.offset < MTIME + 8 => self.mtime() >> shift,
            _ => 0,
        })
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        let (shift, mask) = part(a.offset, a.size);
        let merge = |old: u64| old & !mask | value << shift & mask;
        let index = |base: u64, stride: u64| ((a.offset - base) / stride) as usize;
        match a.offset {
            0..MTIMECMP => {
                self.set_msip(index(0, 4), value & 1 != 0);
                if a.size == AccessSize::B8 {
                    self.set_msip(index(0, 4) + 1, value >> 32 & 1 != 0);
                }
            }
            MTIMECMP..MTIMECMP_END => {
                let hart = index(MTIMECMP, 8);
                if let Some(deadline) = self.s.mtimecmp.get_mut(hart) {
                    *deadline = merge(*deadline);
                    self.update_timer(hart);
                }
            }
            MTIME.. if a.offset < MTIME + 8 => {
                let now = self.mtime();
                self.s.mtime_offset = self.s.mtime_offset.wrapping_add(merge(now).wrapping_sub(now));
                self.update_all();
            }
            _ => {}
        }
        Ok(())
    }
}

impl MutLifecycle for Aclint {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            // mtime goes back to the virtual clock, which the `time` register shows, and which runs on.
            ResetPhase::Enter => self.s = empty(self.harts.len()),
            ResetPhase::Hold => self.update_all(),
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        // The clock may have been set since the state was restored.
        self.update_all();
    }
}

impl SaveRestore for Aclint {
    const SCHEMA: Schema = Schema::new("riscv-aclint", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let harts = self.harts.len();
        if state.msip.len() != harts || state.mtimecmp.len() != harts {
            return Err(SnapshotError::Invalid {
                schema: Self::SCHEMA.name,
                field: "mtimecmp",
                reason: format!("{} harts instead of {harts}", state.mtimecmp.len()),
            });
        }
        self.s = state;
        self.update_all();
        Ok(())
    }
}

#[cfg(test)]
#[path = "aclint_tests.rs"]
mod tests;
