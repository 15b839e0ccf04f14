//! High Precision Event Timers.
//!
//! Spec: Intel IA-PC HPET 1.0a, 2004. Section numbers below are its.
//! Modelled: the 64-bit main counter at 100 MHz, 3 to 32 timers, each one-shot or periodic and 64 or 32 bits wide,
//! edge and level interrupts, routing, FSB messages, legacy replacement of PIT and RTC.
//! Not modelled: nothing of what the specification defines for one block. Interrupts of a period shorter than
//! 20 µs are merged.
//! Checked with: its tests; register sequences of Linux's hpet driver.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{MutLifecycle, MutMmioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqLine, MsiTarget};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

use super::rate::MIN_CALLBACK_NS;

/// Where a PC has it.
pub const BASE: u64 = 0xfed0_0000;
/// Bytes of the register map.
pub const SIZE: u64 = 0x400;
/// Accesses the region takes: "32-bit or 64-bit" (section 2.3.2).
pub const RULES: AccessRules =
    AccessRules { valid_min: AccessSize::B4, ..AccessRules::sizes(AccessSize::B4, AccessSize::B8) };
/// Fewest timers a block has.
pub const MIN_TIMERS: usize = 3;
/// Most timers a block has.
pub const MAX_TIMERS: usize = 32;

/// One tick of the main counter.
const TICK_NS: u64 = 10;
const PERIOD_FS: u64 = TICK_NS * 1_000_000;

const CAPABILITIES: u64 = 0x00;
const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xf0;
const TIMERS: u64 = 0x100;
const TIMER_STRIDE: u64 = 0x20;
const TIMER_CONFIG: u64 = 0x00;
const TIMER_COMPARATOR: u64 = 0x08;
const TIMER_FSB: u64 = 0x10;

const REVISION: u64 = 1;
const COUNT_SIZE_64: u64 = 1 << 13;
const LEGACY_CAPABLE: u64 = 1 << 15;
const VENDOR: u64 = 0x8086;

const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

const LEVEL: u64 = 1 << 1;
const INT_ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const PERIODIC_CAPABLE: u64 = 1 << 4;
const SIZE_64: u64 = 1 << 5;
const VAL_SET: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE: u64 = 0x1f << 9;
const ROUTE_SHIFT: u32 = 9;
const FSB_ENABLE: u64 = 1 << 14;
const FSB_CAPABLE: u64 = 1 << 15;
/// Bits of a timer's configuration that software changes, but for the FSB's.
const WRITABLE: u64 = LEVEL | INT_ENABLE | PERIODIC | VAL_SET | MODE_32 | ROUTE;

/// One timer's registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimerState {
    /// The bits of the configuration that can be written.
    config: u64,
    comparator: u64,
    /// What is added to the comparator in periodic mode.
    period: u64,
    /// FSB route: value in the lower half, address in the upper.
    fsb: u64,
    /// Clock tick at which the comparator matches next, while the counter runs.
    next: Option<u64>,
}

/// The registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    config: u64,
    status: u64,
    /// The main counter while it stands; what it is ahead of the clock, in ticks, while it runs.
    counter: u64,
    timers: Vec<TimerState>,
}

/// How a block is wired.
#[derive(Default)]
pub struct HpetLines {
    /// Inputs of the I/O APIC, by number; those that timers cannot be routed to may be disconnected.
    pub inputs: Vec<IrqLine>,
    /// Which inputs timers can be routed to: bit n is input n.
    pub routable: u32,
    /// The PIT's interrupt, which timer 0 takes over: a clone of its line.
    pub irq0: IrqLine,
    /// The RTC's interrupt, which timer 1 takes over: a clone of its line.
    pub irq8: IrqLine,
    /// High while the PIT's and the RTC's interrupts are taken over; one for each ([`I8254::replaced`](super::i8254::I8254::replaced),
    /// [`Mc146818::replaced`](super::mc146818::Mc146818::replaced)).
    pub replace: [IrqLine; 2],
    /// Where FSB messages go, if the timers can send them.
    pub fsb: Option<MsiTarget>,
}

/// A block of timers.
pub struct Hpet {
    s: State,
    lines: HpetLines,
    timer: Timer,
}

/// What the ACPI table calls the event timer block ID: the lower half of the capabilities of `timers` timers.
pub const fn block_id(timers: usize) -> u32 {
    (VENDOR << 16 | LEGACY_CAPABLE | COUNT_SIZE_64 | (timers as u64 - 1) << 8 | REVISION) as u32
}

impl Hpet {
    /// A block of `timers` timers that count `timer`'s clock, the virtual one.
    ///
    /// # Panics
    /// If there are not 3 to 32 timers.
    pub fn new(timers: usize, lines: HpetLines, timer: Timer) -> Arc<Mutex<Hpet>> {
        assert!((MIN_TIMERS..=MAX_TIMERS).contains(&timers), "an HPET has 3 to 32 timers");
        let hpet = Arc::new(Mutex::new(Hpet { s: reset_state(timers), lines, timer: timer.clone() }));
        let weak = Arc::downgrade(&hpet);
        timer.bind(move || {
            if let Some(hpet) = weak.upgrade() {
                lock(&hpet).tick();
            }
        });
        hpet
    }

    fn ticks(&self) -> u64 {
        self.timer.now() / TICK_NS
    }

    fn enabled(&self) -> bool {
        self.s.config & ENABLE != 0
    }

    /// Section 2.3.6: needs both bits.
    fn legacy(&self) -> bool {
        self.s.config & (ENABLE | LEGACY) == ENABLE | LEGACY
    }

    fn counter(&self) -> u64 {
        if self.enabled() { self.ticks().wrapping_add(self.s.counter) } else { self.s.counter }
    }

    fn writable(&self) -> u64 {
        if self.lines.fsb.is_some() { WRITABLE | FSB_ENABLE } else { WRITABLE }
    }

    fn timer_config(&self, n: usize) -> u64 {
        let fsb = if self.lines.fsb.is_some() { FSB_CAPABLE } else { 0 };
        u64::from(self.lines.routable) << 32 | PERIODIC_CAPABLE | SIZE_64 | fsb | self.s.timers[n].config
    }

    /// The line that timer `n` drives, unless it sends messages.
    fn line(&self, n: usize) -> Option<&IrqLine> {
        let t = &self.s.timers[n];
        match n {
            0 if self.legacy() => Some(&self.lines.irq0),
            1 if self.legacy() => Some(&self.lines.irq8),
            _ if t.config & FSB_ENABLE != 0 => None,
            _ => {
                let input = (t.config & ROUTE) >> ROUTE_SHIFT;
                let routable = self.lines.routable >> input & 1 != 0;
                self.lines.inputs.get(input as usize).filter(|_| routable)
            }
        }
    }

    /// The level of timer `n`'s line.
    fn level(&self, n: usize) -> bool {
        self.enabled() && self.s.timers[n].config & INT_ENABLE != 0 && self.s.status >> n & 1 != 0
    }

    /// Drives all lines that are level-triggered now. Lines shared by timers are high while one wants them.
    fn drive(&self, silently: bool) {
        let mut wanted: Vec<(&IrqLine, bool)> = Vec::new();
        for n in 0..self.s.timers.len() {
            if let Some(line) = self.line(n) {
                let at = wanted.iter().position(|(l, _)| std::ptr::eq(*l, line));
                match at {
                    Some(i) => wanted[i].1 |= self.level(n),
                    None => wanted.push((line, self.level(n))),
                }
            }
        }
        for (line, level) in wanted {
            if silently {
                line.import_level(level);
            } else {
                line.set_level(level);
            }
        }
    }

    /// The comparator of timer `n` matched.
    fn fire(&mut self, n: usize) {
        let t = &self.s.timers[n];
        if t.config & LEVEL != 0 {
            self.s.status |= 1 << n;
        }
        if t.config & INT_ENABLE == 0 {
            return;
        }
        if t.config & FSB_ENABLE != 0
            && let Some(msi) = &self.lines.fsb
            && !(self.legacy() && n < 2)
        {
            msi.send(t.fsb >> 32, t.fsb as u32);
        } else if t.config & LEVEL == 0
            && let Some(line) = self.line(n)
        {
            line.pulse();
        }
    }

    /// Has everything happen that is due; true if something did.
    fn catch_up(&mut self) -> bool {
        let now = self.ticks();
        let mut fired = false;
        for n in 0..self.s.timers.len() {
            if self.s.timers[n].next.is_some_and(|next| next <= now) {
                self.s.timers[n].pass(now);
                self.fire(n);
                fired = true;
            }
        }
        if fired {
            self.drive(false);
        }
        fired
    }

    /// Computes when timer `n` matches next after something about it changed.
    fn schedule(&mut self, n: usize) {
        let (enabled, counter, now) = (self.enabled(), self.counter(), self.ticks());
        let t = &mut self.s.timers[n];
        let distance = t.comparator.wrapping_sub(counter) & t.mask();
        t.next = now.checked_add(distance).filter(|_| enabled);
    }

    fn schedule_all(&mut self) {
        (0..self.s.timers.len()).for_each(|n| self.schedule(n));
    }

    /// Arms the timer for the first match that interrupts, at `earliest` ns or later.
    fn arm(&self, earliest: u64) {
        let interrupts = |t: &&TimerState| t.config & INT_ENABLE != 0;
        let first = self.s.timers.iter().filter(interrupts).filter_map(|t| t.next).min();
        self.timer.arm(first.map_or(u64::MAX, |t| t.saturating_mul(TICK_NS).max(earliest)));
    }

    fn tick(&mut self) {
        self.catch_up();
        self.arm(self.timer.now().saturating_add(MIN_CALLBACK_NS));
    }

    fn read(&mut self, register: u64) -> u64 {
        self.catch_up();
        match register {
            CAPABILITIES => PERIOD_FS << 32 | u64::from(block_id(self.s.timers.len())),
            CONFIGURATION => self.s.config,
            STATUS => self.s.status,
            COUNTER => self.counter(),
            _ => match self.timer_register(register) {
                Some((n, TIMER_CONFIG)) => self.timer_config(n),
                Some((n, TIMER_COMPARATOR)) => self.s.timers[n].comparator,
                Some((n, TIMER_FSB)) => self.s.timers[n].fsb,
                _ => 0,
            },
        }
    }

    fn timer_register(&self, register: u64) -> Option<(usize, u64)> {
        let at = register.checked_sub(TIMERS)?;
        let n = (at / TIMER_STRIDE) as usize;
        (n < self.s.timers.len()).then_some((n, at % TIMER_STRIDE))
    }

    /// Writes the bits `mask` of a register.
    fn write(&mut self, register: u64, value: u64, mask: u64) {
        self.catch_up();
        let merge = |old: u64| old & !mask | value & mask;
        match register {
            CONFIGURATION => self.set_config(merge(self.s.config) & (ENABLE | LEGACY)),
            // "Software clears a bit by writing 1"; those of edge-triggered timers are always 0.
            STATUS => self.s.status &= !(value & mask),
            COUNTER => {
                let counter = merge(self.counter());
                self.s.counter = if self.enabled() { counter.wrapping_sub(self.ticks()) } else { counter };
                self.schedule_all();
            }
            _ => match self.timer_register(register) {
                Some((n, TIMER_CONFIG)) => self.set_timer_config(n, merge(self.s.timers[n].config)),
                Some((n, TIMER_COMPARATOR)) => {
                    self.s.timers[n].set_comparator(value, mask);
                    self.schedule(n);
                }
                Some((n, TIMER_FSB)) => self.s.timers[n].fsb = merge(self.s.timers[n].fsb),
                _ => {}
            },
        }
        self.catch_up();
        self.drive(false);
        self.arm(0);
    }

    fn set_config(&mut self, value: u64) {
        let counter = self.counter();
        // What the old routing drove is let go first.
        self.release_lines();
        self.s.config = value;
        self.s.counter = if self.enabled() { counter.wrapping_sub(self.ticks()) } else { counter };
        self.lines.replace.iter().for_each(|line| line.set_level(self.legacy()));
        self.schedule_all();
    }

    fn set_timer_config(&mut self, n: usize, value: u64) {
        self.release_lines();
        let writable = self.writable();
        let routable = self.lines.routable;
        let t = &mut self.s.timers[n];
        let mut new = value & writable;
        // Section 2.3.8: a route that does not exist does not read back.
        if routable >> ((new & ROUTE) >> ROUTE_SHIFT) & 1 == 0 {
            new = new & !ROUTE | t.config & ROUTE;
        }
        let width_or_type = (new ^ t.config) & (MODE_32 | PERIODIC) != 0;
        t.config = new;
        // Section 2.3.8: the upper half is not there in 32-bit mode.
        (t.comparator, t.period) = (t.comparator & t.mask(), t.period & t.mask());
        // "Software must not switch to edge with the status bit set": it is one of a level-triggered timer.
        if new & LEVEL == 0 {
            self.s.status &= !(1 << n);
        }
        if width_or_type {
            self.schedule(n);
        }
    }

    fn release_lines(&self) {
        (0..self.s.timers.len()).filter_map(|n| self.line(n)).for_each(IrqLine::lower);
    }
}

impl TimerState {
    /// The bits that are compared.
    fn mask(&self) -> u64 {
        if self.config & MODE_32 != 0 { u32::MAX.into() } else { u64::MAX }
    }

    /// The matches up to tick `now` are over.
    fn pass(&mut self, now: u64) {
        let Some(next) = self.next else { return };
        let step = match self.config & PERIODIC != 0 {
            true if self.period != 0 => self.period,
            // One-shot: again after the counter wrapped.
            _ if self.config & MODE_32 != 0 => 1 << 32,
            _ => return self.next = None,
        };
        let count = (now - next) / step + 1;
        if self.config & PERIODIC != 0 {
            self.comparator = self.comparator.wrapping_add(self.period.wrapping_mul(count)) & self.mask();
        }
        self.next = step.checked_mul(count).and_then(|d| next.checked_add(d));
    }

    /// Sections 2.3.9.2.2 and 2.3.8 (VAL_SET): in periodic mode a write is the period, and with VAL_SET the next
    /// match as well.
    fn set_comparator(&mut self, value: u64, mask: u64) {
        let width = self.mask();
        let merge = |old: u64| (old & !mask | value & mask) & width;
        if self.config & PERIODIC == 0 || self.config & VAL_SET != 0 {
            self.comparator = merge(self.comparator);
        }
        if self.config & PERIODIC != 0 {
            self.period = merge(self.period);
        }
        self.config &= !VAL_SET;
    }
}

fn reset_state(timers: usize) -> State {
    let timer = TimerState { comparator: u64::MAX, ..TimerState::default() };
    State { timers: vec![timer; timers], ..State::default() }
}

impl MutMmioDevice for Hpet {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        let value = self.read(a.offset & !7);
        Ok(value >> ((a.offset & 4) * 8))
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        let shift = (a.offset & 4) * 8;
        self.write(a.offset & !7, value << shift, a.size.mask() << shift);
        Ok(())
    }
}

impl MutLifecycle for Hpet {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = reset_state(self.s.timers.len()),
            ResetPhase::Hold => {
                self.timer.disarm();
                let own = [&self.lines.irq0, &self.lines.irq8].into_iter().chain(&self.lines.replace);
                own.chain(&self.lines.inputs).for_each(IrqLine::lower);
            }
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        self.arm(0);
    }
}

impl SaveRestore for Hpet {
    const SCHEMA: Schema = Schema::new("hpet", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        let timers = self.s.timers.len();
        if state.timers.len() != timers {
            return invalid("timers", format!("{} instead of {timers}", state.timers.len()));
        }
        let stray = |t: &TimerState| t.config & !self.writable() != 0 || (t.comparator | t.period) & !t.mask() != 0;
        if state.config & !(ENABLE | LEGACY) != 0 || state.status >> timers != 0 || state.timers.iter().any(stray) {
            return invalid("config", "bits set that registers do not have".to_owned());
        }
        if state.config & ENABLE == 0 && state.timers.iter().any(|t| t.next.is_some()) {
            return invalid("next", "the counter stands".to_owned());
        }
        self.s = state;
        self.timer.disarm();
        self.lines.replace.iter().for_each(|line| line.import_level(self.legacy()));
        self.drive(true);
        Ok(())
    }
}

#[cfg(test)]
#[path = "hpet_tests.rs"]
mod tests;
