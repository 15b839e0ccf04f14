//! Programmable interval timer of a PC, and port 0x61, which shows and controls it.
//!
//! Spec: Intel 8254 data sheet, 231164-005 (section names below are its); port 0x61 (NMI status and control) as in
//! the Intel ICH9 data sheet, 316972-004, section 13.7.1.
//! Modelled: three counters in all six modes, binary and BCD, latch and read-back commands, GATE of counter 2;
//! counter 0's interrupt; port 0x61 with gate, speaker enable, refresh toggle and counter 2's output.
//! Not modelled: sound; the clock pulse that loads a count; a new count of a running counter in modes 2 and 3
//! waiting for the end of the period (it is loaded at once); the NMI sources of port 0x61. The low phases of
//! counter 0's output in modes 2 to 5 have no duration on the interrupt line: it has its rising edges.
//! Checked with: its tests; register sequences of Linux's i8253 driver and TSC calibration.

use std::sync::{Arc, Mutex, Weak};

use mimus_arch::x86::irqchip::{PitChannelState, PitState};
use mimus_core::accel::irqchip::PIT_SCHEMA;
use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};

use super::rate::{MIN_CALLBACK_NS, Rate};

/// Region number of the counters' four ports (0x40).
pub const REGION_COUNTERS: u32 = 0;
/// Region number of port 0x61.
pub const REGION_CONTROL: u32 = 1;
/// Number of ports of [`REGION_COUNTERS`].
pub const PORTS: u64 = 4;
/// Access rules of its ports.
pub use crate::ports::BYTE_PORTS as RULES;

/// The counters' clock.
pub const CLOCK: Rate = Rate::from_hz(1_193_182);

const CONTROL_WORD: u16 = 3;
const READ_BACK: u8 = 3;
const NO_COUNT_LATCH: u8 = 0x20;
const NO_STATUS_LATCH: u8 = 0x10;
const STATUS_OUT: u8 = 0x80;
const STATUS_NULL: u8 = 0x40;
const BOTH_BYTES: u8 = 3;

const GATE_2: u8 = 1;
const SPEAKER: u8 = 2;
const REFRESH: u8 = 0x10;
const OUT_2: u8 = 0x20;
/// The refresh bit toggles this often: "about every 15 µs".
const REFRESH_NS: u64 = 15_085;

/// What a counter does with its registers. Times are of the virtual clock, in ns.
trait Channel {
    fn ticks(&self, now: u64) -> u64;
    fn half(&self) -> u64;
    fn output(&self, now: u64) -> bool;
    fn value(&self, now: u64) -> u16;
    fn rises(&self, now: u64) -> u64;
    fn next_rise(&self, now: u64) -> Option<u64>;
    fn load(&mut self, now: u64, count: u16);
    fn set_gate(&mut self, now: u64, level: bool);
    fn set_control(&mut self, value: u8);
    fn write(&mut self, now: u64, value: u8);
    fn read(&mut self, now: u64) -> u8;
    fn latch_count(&mut self, now: u64);
    fn status(&self, now: u64) -> u8;
}

impl Channel for PitChannelState {
    /// Clock pulses counted since the count was loaded.
    fn ticks(&self, now: u64) -> u64 {
        let since = (now as i64).saturating_sub(self.loaded_ns);
        CLOCK.ticks(self.paused_ns.unwrap_or(since.max(0) as u64))
    }

    /// "If the count is odd, OUT will be high for (N + 1)/2 counts and low for (N - 1)/2."
    fn half(&self) -> u64 {
        u64::from(self.count).div_ceil(2)
    }

    fn output(&self, now: u64) -> bool {
        let (d, n) = (self.ticks(now), u64::from(self.count));
        match self.mode {
            0 | 1 if self.waiting => self.mode == 1,
            _ if self.waiting => true,
            0 | 1 => d >= n,
            // "If GATE goes low, OUT is set high immediately."
            2 | 3 if self.paused_ns.is_some() => true,
            2 => d % n != n - 1,
            3 => d % n < self.half(),
            _ => d != n,
        }
    }

    /// The counter as it is read.
    fn value(&self, now: u64) -> u16 {
        let (d, n) = (if self.waiting { 0 } else { self.ticks(now) }, u64::from(self.count));
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = match self.mode {
            2 => n - d % n,
            // It counts by twos, twice.
            3 => {
                let phase = d % n;
                let counted = if phase < self.half() { phase } else { phase - self.half() };
                (n & !1).saturating_sub(2 * counted)
            }
            // "Counter wraps around and continues counting."
            _ => (n + modulus - d % modulus) % modulus,
        };
        encode(value % modulus, self.bcd)
    }

    /// Rising edges of the output since the count was loaded.
    fn rises(&self, now: u64) -> u64 {
        let (d, n) = (self.ticks(now), u64::from(self.count));
        match self.mode {
            _ if self.waiting => 0,
            0 | 1 => u64::from(d >= n),
            2 | 3 => d / n,
            _ => u64::from(d > n),
        }
    }

    /// When the output rises next.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let (d, n) = (self.ticks(now), u64::from(self.count));
        let at = match self.mode {
            _ if self.waiting || self.paused_ns.is_some() => return None,
            0 | 1 if d < n => n,
            2 | 3 => (d / n + 1).saturating_mul(n),
            4 | 5 if d <= n => n + 1,
            _ => return None,
        };
        let ns = i64::try_from(CLOCK.ns(at)).ok()?.checked_add(self.loaded_ns)?;
        Some(ns.max(0) as u64)
    }

    fn load(&mut self, now: u64, count: u16) {
        self.count = decode(count, self.bcd);
        self.loaded_ns = now as i64;
        self.paused_ns = (!self.gate).then_some(0);
        // There, the trigger loads the count.
        self.waiting = matches!(self.mode, 1 | 5);
    }

    fn set_gate(&mut self, now: u64, level: bool) {
        if level == self.gate {
            return;
        }
        self.gate = level;
        match (self.mode, level) {
            (1 | 5, true) => (self.loaded_ns, self.waiting, self.paused_ns) = (now as i64, false, None),
            (1 | 5, false) => {}
            // "GATE = 1 enables counting; the trigger reloads the counter."
            (2 | 3, true) => (self.loaded_ns, self.paused_ns) = (now as i64, None),
            (_, true) => {
                let counted = self.paused_ns.take().unwrap_or(0);
                self.loaded_ns = now.saturating_sub(counted) as i64;
            }
            (_, false) => self.paused_ns = Some((now as i64).saturating_sub(self.loaded_ns).max(0) as u64),
        }
    }

    /// "Control word register": bits 5:0.
    fn set_control(&mut self, value: u8) {
        self.access = value >> 4 & 3;
        self.mode = match value >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        self.bcd = value & 1 != 0;
        self.waiting = true;
        (self.read_high, self.write_high) = (false, false);
        // "Held in the latch until it is read by the CPU (or until the counter is reprogrammed)."
        (self.latched_count, self.latched_high) = (None, false);
    }

    fn write(&mut self, now: u64, value: u8) {
        let value = u16::from(value);
        match self.access {
            0 => {}
            1 => self.load(now, value),
            2 => self.load(now, value << 8),
            _ if self.write_high => {
                self.write_high = false;
                self.load(now, value << 8 | u16::from(self.write_latch));
            }
            _ => {
                self.write_latch = value as u8;
                self.write_high = true;
                // "Mode 0: writing the first byte disables counting. OUT is set low immediately."
                self.waiting |= self.mode == 0;
            }
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let Some(count) = self.latched_count else {
            let value = self.value(now);
            let high = self.access == 2 || self.access == BOTH_BYTES && self.read_high;
            self.read_high ^= self.access == BOTH_BYTES;
            return if high { value >> 8 } else { value } as u8;
        };
        let high = self.access == 2 || self.latched_high;
        if self.access == BOTH_BYTES && !self.latched_high {
            self.latched_high = true;
        } else {
            (self.latched_count, self.latched_high) = (None, false);
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    /// "If the counter is latched already, the command is ignored."
    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
            self.latched_high = false;
        }
    }

    fn status(&self, now: u64) -> u8 {
        let out = if self.output(now) { STATUS_OUT } else { 0 };
        let null = if self.waiting { STATUS_NULL } else { 0 };
        out | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd)
    }
}

/// A count of the register's form: "the largest possible count is 0".
fn decode(count: u16, bcd: bool) -> u32 {
    let digits = || (0..4).rev().fold(0, |v, n| v * 10 + u32::from(count >> (4 * n) & 0xf)) % 10_000;
    match if bcd { digits() } else { count.into() } {
        0 if bcd => 10_000,
        0 => 0x1_0000,
        n => n,
    }
}

fn encode(value: u64, bcd: bool) -> u16 {
    if !bcd {
        return value as u16;
    }
    [1000, 100, 10, 1].iter().fold(0, |v, unit| v << 4 | (value / unit % 10) as u16)
}

/// The timer.
pub struct I8254 {
    s: PitState,
    irq: IrqLine,
    timer: Timer,
}

/// The input that takes the interrupt away.
struct Replaced(Weak<Mutex<I8254>>);

impl I8254 {
    /// A timer that counts `timer`'s clock, the virtual one, and whose counter 0 drives `irq`.
    pub fn new(irq: IrqLine, timer: Timer) -> Arc<Mutex<I8254>> {
        let pit = Arc::new(Mutex::new(I8254 { s: PitState::reset(), irq, timer: timer.clone() }));
        let weak = Arc::downgrade(&pit);
        timer.bind(move || {
            if let Some(pit) = weak.upgrade() {
                lock(&pit).tick();
            }
        });
        pit
    }

    /// A line that, while high, takes the interrupt away: an HPET drives a clone of this timer's line instead.
    pub fn replaced(pit: &Arc<Mutex<I8254>>) -> IrqLine {
        IrqLine::new(Arc::new(Replaced(Arc::downgrade(pit))), 0)
    }

    fn set_replaced(&mut self, replaced: bool) {
        self.catch_up();
        if replaced {
            self.irq.lower();
        }
        self.s.irq_disabled = replaced;
        self.drive();
        self.arm(0);
    }

    fn now(&self) -> u64 {
        self.timer.now()
    }

    /// Interrupts for what counter 0 did since the last time.
    fn catch_up(&mut self) {
        let now = self.now();
        let before = u64::try_from(std::mem::replace(&mut self.s.driven_ns, now as i64)).unwrap_or(0);
        let channel = &self.s.channels[0];
        if channel.rises(now) != channel.rises(before) && !self.s.irq_disabled {
            self.irq.lower();
            self.irq.raise();
        }
    }

    /// The line's level where no edge is due: low in mode 0 until the count is over.
    fn level(&self) -> bool {
        let channel = &self.s.channels[0];
        channel.access != 0 && (channel.mode != 0 || channel.output(self.now()))
    }

    fn drive(&self) {
        if !self.s.irq_disabled {
            self.irq.set_level(self.level());
        }
    }

    /// Arms the timer for counter 0's next edge, at `earliest` ns or later.
    fn arm(&self, earliest: u64) {
        let next = self.s.channels[0].next_rise(self.now()).filter(|_| !self.s.irq_disabled);
        self.timer.arm(next.map_or(u64::MAX, |t| t.max(earliest)));
    }

    fn tick(&mut self) {
        self.catch_up();
        self.arm(self.now().saturating_add(MIN_CALLBACK_NS));
    }

    fn write_control(&mut self, value: u8) {
        let now = self.now();
        let channel = value >> 6;
        if channel == READ_BACK {
            return self.read_back(value);
        }
        let c = &mut self.s.channels[usize::from(channel)];
        if value >> 4 & 3 == 0 {
            c.latch_count(now);
        } else {
            c.set_control(value);
        }
    }

    fn read_back(&mut self, value: u8) {
        let now = self.now();
        for (_, c) in self.s.channels.iter_mut().enumerate().filter(|(n, _)| value >> (n + 1) & 1 != 0) {
            if value & NO_COUNT_LATCH == 0 {
                c.latch_count(now);
            }
            if value & NO_STATUS_LATCH == 0 && c.latched_status.is_none() {
                c.latched_status = Some(c.status(now));
            }
        }
    }

    fn read_port_61(&self) -> u8 {
        let (now, c) = (self.now(), &self.s.channels[2]);
        let gate = if c.gate { GATE_2 } else { 0 };
        let speaker = if self.s.speaker { SPEAKER } else { 0 };
        let refresh = if (now / REFRESH_NS) & 1 != 0 { REFRESH } else { 0 };
        let out = if c.output(now) { OUT_2 } else { 0 };
        gate | speaker | refresh | out
    }
}

impl IrqController for Replaced {
    fn set_input(&self, _pin: u32, level: bool) {
        if let Some(pit) = self.0.upgrade() {
            lock(&pit).set_replaced(level);
        }
    }
}

impl MutPioDevice for I8254 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        let now = self.now();
        Ok(match (a.region, a.offset) {
            (REGION_CONTROL, _) => self.read_port_61().into(),
            // "No-operation: the data bus is not driven."
            (_, CONTROL_WORD..) => 0xff,
            (_, n) => self.s.channels[usize::from(n)].read(now).into(),
        })
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        let (now, value) = (self.now(), value as u8);
        if a.region == REGION_CONTROL {
            self.s.speaker = value & SPEAKER != 0;
            self.s.channels[2].set_gate(now, value & GATE_2 != 0);
            return Ok(());
        }
        self.catch_up();
        match a.offset {
            CONTROL_WORD.. => self.write_control(value),
            n => self.s.channels[usize::from(n)].write(now, value),
        }
        self.drive();
        self.arm(0);
        Ok(())
    }
}

impl MutLifecycle for I8254 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => self.s = PitState { driven_ns: self.now() as i64, ..PitState::reset() },
            ResetPhase::Hold => {
                self.timer.disarm();
                self.irq.lower();
            }
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        self.tick();
        self.arm(0);
    }
}

impl SaveRestore for I8254 {
    const SCHEMA: Schema = PIT_SCHEMA;
    type State = PitState;

    fn save_state(&self) -> PitState {
        self.s.clone()
    }

    fn restore_state(&mut self, state: PitState) -> Result<(), SnapshotError> {
        state.check().map_err(|(field, reason)| SnapshotError::invalid(Self::SCHEMA, field, reason))?;
        self.s = state;
        self.timer.disarm();
        if !self.s.irq_disabled {
            let before = u64::try_from(self.s.driven_ns).unwrap_or(0);
            let channel = &self.s.channels[0];
            self.irq.import_level(channel.access != 0 && (channel.mode != 0 || channel.output(before)));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "i8254_tests.rs"]
mod tests;
