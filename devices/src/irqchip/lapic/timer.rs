//! The APIC timer (section 11.5.4).

use mimus_arch::x86::irqchip::{LVT_MASKED, LVT_TIMER};

use super::apic::{Apic, Mode, Regs};
use crate::timer::rate::{MIN_CALLBACK_NS, Rate};

/// Ticks a second before division: one a nanosecond, as KVM's.
pub const TIMER_HZ: u64 = 1_000_000_000;

const MODE: u32 = 3 << 17;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 2 << 17;

/// Where the counter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Count {
    /// At 0.
    Stopped,
    /// Restored: goes on from here when the machine runs.
    Frozen(u32),
    /// Reaches 0 at this time, in ns.
    Running(u64),
}

impl Regs {
    /// Nanoseconds per count: table 11-10's figure for the divide configuration.
    fn divisor(&self) -> u64 {
        let bits = self.timer_divide & 3 | self.timer_divide >> 1 & 4;
        1 << ((bits + 1) & 7)
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[LVT_TIMER] & MODE
    }

    /// The counter at `now` ns.
    pub fn current_count(&self, now: u64) -> u32 {
        match self.count {
            Count::Stopped => 0,
            Count::Frozen(count) => count,
            Count::Running(end) => end.saturating_sub(now).div_ceil(self.divisor()) as u32,
        }
    }
}

impl Apic {
    /// Has happen what is due.
    pub fn catch_up(&self, regs: &mut Regs) {
        if regs.tsc_deadline != 0 {
            if self.tsc_deadline_ns(regs).is_some_and(|d| d <= self.timer.now()) {
                regs.tsc_deadline = 0;
                self.fire_lvt(regs, LVT_TIMER);
            }
            return;
        }
        let now = self.timer.now();
        let Count::Running(end) = regs.count else { return };
        if end > now {
            return;
        }
        let period = u64::from(regs.timer_initial) * regs.divisor();
        regs.count = match regs.timer_mode() {
            PERIODIC if period != 0 => Count::Running(end.saturating_add(((now - end) / period + 1) * period)),
            _ => Count::Stopped,
        };
        self.fire_lvt(regs, LVT_TIMER);
    }

    /// Arms the timer for the next interrupt, at `earliest` ns or later.
    fn arm(&self, regs: &Regs, earliest: u64) {
        let masked = regs.lvt[LVT_TIMER] & LVT_MASKED != 0;
        let next = match regs.count {
            // The MSR shows when its time has come, which a masked entry does not hide.
            _ if regs.tsc_deadline != 0 => self.tsc_deadline_ns(regs),
            Count::Running(end) if !masked => Some(end),
            _ => None,
        };
        self.timer.arm(next.map_or(u64::MAX, |t| t.max(earliest)));
    }

    pub fn timer_fired(&self) {
        self.change(|regs| {
            self.catch_up(regs);
            self.arm(regs, self.timer.now().saturating_add(MIN_CALLBACK_NS));
        });
    }

    /// The virtual clock runs (again).
    pub fn resume_timer(&self) {
        self.change(|regs| {
            if let Count::Frozen(count) = regs.count {
                let ns = u64::from(count) * regs.divisor();
                regs.count = Count::Running(self.timer.now().saturating_add(ns));
            }
            self.arm(regs, 0);
        });
    }

    pub fn set_initial_count(&self, regs: &mut Regs, value: u32) {
        self.catch_up(regs);
        if regs.timer_mode() == TSC_DEADLINE {
            return;
        }
        regs.timer_initial = value;
        regs.count = match u64::from(value) * regs.divisor() {
            0 => Count::Stopped,
            ns => Count::Running(self.timer.now().saturating_add(ns)),
        };
        self.arm(regs, 0);
    }

    pub fn set_divide(&self, regs: &mut Regs, value: u32) {
        self.catch_up(regs);
        let left = regs.current_count(self.timer.now());
        regs.timer_divide = value;
        if let Count::Running(_) = regs.count {
            regs.count = Count::Running(self.timer.now().saturating_add(u64::from(left) * regs.divisor()));
        }
        self.arm(regs, 0);
    }

    /// Writes the LVT entry. Into or out of TSC-deadline mode, the timer is disarmed.
    pub fn set_timer_entry(&self, regs: &mut Regs, value: u32) {
        self.catch_up(regs);
        let before = regs.timer_mode();
        regs.lvt[LVT_TIMER] = value;
        if regs.timer_mode() != before && (before == TSC_DEADLINE || regs.timer_mode() == TSC_DEADLINE) {
            (regs.count, regs.timer_initial, regs.tsc_deadline) = (Count::Stopped, 0, 0);
        }
        self.arm(regs, 0);
    }

    /// Bits of the LVT entry that can be set.
    pub fn timer_entry_bits(&self) -> u32 {
        let tsc = if self.tsc.is_some() { TSC_DEADLINE } else { 0 };
        0xff | LVT_MASKED | PERIODIC | tsc
    }

    fn tsc_deadline_ns(&self, regs: &Regs) -> Option<u64> {
        let tsc = self.tsc.as_ref()?;
        let left = regs.tsc_deadline.saturating_sub(tsc.now(self.index()));
        Some(self.timer.now().saturating_add(Rate::from_hz(tsc.hz()).ns(left)))
    }

    /// Reads IA32_TSC_DEADLINE, if there is TSC-deadline mode.
    pub fn tsc_deadline(&self) -> Option<u64> {
        self.tsc.as_ref()?;
        Some(self.change(|regs| {
            self.catch_up(regs);
            regs.tsc_deadline
        }))
    }

    /// Writes it: in another mode, without effect.
    pub fn set_tsc_deadline(&self, value: u64) -> Option<()> {
        self.tsc.as_ref()?;
        self.change(|regs| {
            self.catch_up(regs);
            if regs.mode() != Mode::Off && regs.timer_mode() == TSC_DEADLINE {
                regs.tsc_deadline = value;
                self.catch_up(regs);
                self.arm(regs, 0);
            }
        });
        Some(())
    }

    /// The counter's place after a restore.
    pub fn restored_count(regs: &Regs, current: u32) -> Count {
        match current {
            // Between two periods.
            0 if regs.timer_mode() == PERIODIC && regs.timer_initial != 0 => Count::Frozen(regs.timer_initial),
            0 => Count::Stopped,
            n => Count::Frozen(n),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors() {
        let mut regs = Regs::reset(0, 0);
        for (value, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            regs.timer_divide = value;
            assert_eq!(regs.divisor(), divisor, "{value}");
        }
    }
}
