//! Real-time clock and CMOS RAM of a PC.
//!
//! Spec: Motorola MC146818, ADI856R2; ports, century byte and NMI mask as in the Intel ICH9 data sheet, 316972-004,
//! section 13.6.
//! Modelled: time and calendar in BCD or binary, 12 and 24 hours, SET, divider reset, update-in-progress, alarms
//! with don't-care codes, periodic and update-ended interrupts, 114 bytes of RAM, the century at 0x32.
//! Not modelled: daylight saving, square wave, other crystals than 32.768 kHz, ICH's second bank of RAM. Dates that
//! do not exist carry over into the next month when the clock starts.
//! Checked with: its tests; register sequences of Linux's rtc-cmos and SeaBIOS.

use std::sync::{Arc, Mutex, Weak};

use mimus_core::bus::{BusFault, PioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{Drain, MutLifecycle, MutPioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

use super::calendar::{DAY, DateTime, weekday};
use super::rate::Rate;

/// Ports: index and data (0x70).
pub const PORTS: u64 = 2;
/// Offset of the index port.
pub const INDEX: u64 = 0;
/// Access rules of its ports.
pub use crate::ports::BYTE_PORTS as RULES;

/// CMOS byte with the century, as the FADT says.
pub const CENTURY: u8 = 0x32;

const LEN: usize = 128;
const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY_OF_MONTH: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const REG_A: usize = 10;
const REG_B: usize = 11;
const REG_C: usize = 12;
const REG_D: usize = 13;
const CENTURY_AT: usize = CENTURY as usize;

const A_UIP: u8 = 0x80;
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;
/// 32.768 kHz, 976 µs: what firmware sets.
const A_DEFAULT: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_PIE: u8 = 0x40;
const B_AIE: u8 = 0x20;
const B_UIE: u8 = 0x10;
const B_SQWE: u8 = 0x08;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const C_IRQF: u8 = 0x80;
const FLAGS: u8 = 0x70;
const C_PF: u8 = 0x40;
const C_AF: u8 = 0x20;
const C_UF: u8 = 0x10;
/// Valid RAM and time: the battery is good.
const D_VRT: u8 = 0x80;
const PM: u8 = 0x80;
/// Alarm bytes from here on match anything.
const DONT_CARE: u8 = 0xc0;
const NMI_MASK: u8 = 0x80;

const SECOND: u64 = 1_000_000_000;
const CRYSTAL: Rate = Rate::from_hz(32_768);
/// Largest distance between the guest's time and the clock's, in seconds: some 30,000 years.
const MAX_OFFSET: i64 = 1_000_000_000_000;
/// "UIP goes high 244 µs before an update".
const UIP_NS: u64 = 244_000;
/// "The first update cycle begins one-half second" after the divider starts.
const RELEASE_PHASE: u64 = SECOND / 2;

/// The registers, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// 128 bytes: time while it stands, registers A to D, RAM.
    cmos: Vec<u8>,
    /// The index port, with the NMI mask.
    index: u8,
    /// Seconds the guest's time is ahead of the clock's.
    offset_s: i64,
    /// Nanoseconds of a second the divider is ahead of the clock's.
    phase_ns: u64,
    /// What is added to the weekday the calendar has.
    weekday_shift: u8,
    /// Clock time up to which flags of register C have been set, in ns.
    seen_ns: u64,
    /// The HPET drives the interrupt.
    replaced: bool,
}

/// The input that takes the interrupt away.
struct Replaced(Weak<Mutex<Mc146818>>);

/// A real-time clock.
pub struct Mc146818 {
    s: State,
    irq: IrqLine,
    /// Follows the interrupt, whoever drives its line.
    alarm: IrqLine,
    timer: Timer,
}

impl Mc146818 {
    /// A clock `offset_ns` ahead of `timer`'s clock, which counts from 1970: 0 on the host clock shows the world's
    /// time, after a restore too; on the virtual clock, the time it was at the start makes one that stops with the
    /// machine.
    pub fn new(irq: IrqLine, timer: Timer, offset_ns: i128) -> Arc<Mutex<Mc146818>> {
        let second = i128::from(SECOND);
        let limit = i128::from(MAX_OFFSET);
        let offset_s = offset_ns.div_euclid(second).clamp(-limit, limit) as i64;
        let phase_ns = offset_ns.rem_euclid(second) as u64;
        let mut cmos = vec![0; LEN];
        (cmos[REG_A], cmos[REG_B], cmos[REG_D]) = (A_DEFAULT, B_24_HOURS, D_VRT);
        let seen_ns = timer.now();
        let s = State { cmos, index: NMI_MASK, offset_s, phase_ns, weekday_shift: 0, seen_ns, replaced: false };
        let rtc = Arc::new(Mutex::new(Mc146818 { s, irq, alarm: IrqLine::disconnected(), timer: timer.clone() }));
        let weak = Arc::downgrade(&rtc);
        timer.bind(move || {
            if let Some(rtc) = weak.upgrade() {
                lock(&rtc).advance();
            }
        });
        rtc
    }

    /// Has power management told of the interrupt too: by a line that an HPET does not take away.
    pub fn connect_alarm(&mut self, line: IrqLine) {
        self.alarm = line;
    }

    /// A line that, while high, takes the interrupt away: an HPET drives a clone of this clock's line instead.
    pub fn replaced(rtc: &Arc<Mutex<Mc146818>>) -> IrqLine {
        IrqLine::new(Arc::new(Replaced(Arc::downgrade(rtc))), 0)
    }

    fn set_replaced(&mut self, replaced: bool) {
        self.irq.lower();
        self.s.replaced = replaced;
        self.update();
    }

    /// Puts a byte into the RAM, where firmware looks for the machine's configuration. Time and registers, below 14,
    /// and numbers above 127 are left alone.
    pub fn set_ram(&mut self, at: u8, value: u8) {
        if at > REG_D as u8
            && let Some(byte) = self.s.cmos.get_mut(usize::from(at))
        {
            *byte = value;
        }
    }

    /// A byte of the RAM, as the guest left it.
    pub fn ram(&self, at: u8) -> u8 {
        self.s.cmos.get(usize::from(at)).copied().unwrap_or(0)
    }

    /// NMI sources are masked: bit 7 of the index port.
    pub fn nmi_masked(&self) -> bool {
        self.s.index & NMI_MASK != 0
    }

    /// The divider counts.
    fn running(&self) -> bool {
        self.s.cmos[REG_A] & A_DIVIDER_RESET != A_DIVIDER_RESET
    }

    /// Time goes on by update cycles.
    fn updating(&self) -> bool {
        self.running() && self.s.cmos[REG_B] & B_SET == 0
    }

    /// Where the divider is at `clock` ns.
    fn divider(&self, clock: u64) -> u64 {
        clock.saturating_add(self.s.phase_ns)
    }

    /// Seconds since 1970 as the guest has it, at `clock` ns.
    fn seconds(&self, clock: u64) -> i64 {
        (self.divider(clock) / SECOND) as i64 + self.s.offset_s
    }

    /// Clock time at which the guest's time becomes `seconds`, in ns.
    fn clock_at(&self, seconds: i64) -> u64 {
        let divider = i128::from(seconds.saturating_sub(self.s.offset_s)) * i128::from(SECOND);
        (divider - i128::from(self.s.phase_ns)).clamp(0, u64::MAX.into()) as u64
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.s.cmos[REG_B] & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> i64 {
        let (tens, ones) = (i64::from(byte >> 4), i64::from(byte & 0xf));
        if self.s.cmos[REG_B] & B_BINARY != 0 { byte.into() } else { tens * 10 + ones }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.s.cmos[REG_B] & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        self.encode((hour + 11) % 12 + 1) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.s.cmos[REG_B] & B_24_HOURS != 0 {
            return self.decode(byte);
        }
        self.decode(byte & !PM) % 12 + if byte & PM != 0 { 12 } else { 0 }
    }

    /// Writes a time into the time registers.
    fn store_time(&mut self, seconds: i64) {
        let t = DateTime::from_seconds(seconds);
        let weekday = (weekday(seconds) + i64::from(self.s.weekday_shift)) % 7 + 1;
        let bytes = [
            (SECONDS, self.encode(t.second)),
            (MINUTES, self.encode(t.minute)),
            (HOURS, self.encode_hour(t.hour)),
            (WEEKDAY, self.encode(weekday)),
            (DAY_OF_MONTH, self.encode(t.day)),
            (MONTH, self.encode(t.month)),
            (YEAR, self.encode(t.year.rem_euclid(100))),
            (CENTURY_AT, self.encode(t.year.div_euclid(100).rem_euclid(100))),
        ];
        for (at, byte) in bytes {
            self.s.cmos[at] = byte;
        }
    }

    /// Starts the clock at what the time registers hold.
    fn load_time(&mut self, clock: u64) {
        let byte = |at: usize| self.decode(self.s.cmos[at]);
        let t = DateTime {
            year: byte(CENTURY_AT) * 100 + byte(YEAR),
            month: byte(MONTH),
            day: byte(DAY_OF_MONTH),
            hour: self.decode_hour(self.s.cmos[HOURS]),
            minute: byte(MINUTES),
            second: byte(SECONDS),
        };
        let seconds = t.to_seconds();
        self.s.weekday_shift = (byte(WEEKDAY) - 1 - weekday(seconds)).rem_euclid(7) as u8;
        self.s.offset_s = seconds - (self.divider(clock) / SECOND) as i64;
    }

    /// The first second after `after` that the alarm is set to.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let matches = |at: usize, now: u8| self.s.cmos[at] >= DONT_CARE || self.s.cmos[at] == now;
        let hour = |h: i64| matches(HOURS_ALARM, self.encode_hour(h));
        let second = (0..60).find(|&s| matches(SECONDS_ALARM, self.encode(s)))?;
        let minutes = |from: i64| (from..60).find(|&m| matches(MINUTES_ALARM, self.encode(m)));
        let start = after + 1;
        let (midnight, tod) = (start - start.rem_euclid(DAY), start.rem_euclid(DAY));
        // Still in the minute of `start`?
        if hour(tod / 3600)
            && minutes(tod / 60 % 60) == Some(tod / 60 % 60)
            && let Some(s) = (tod % 60..60).find(|&s| matches(SECONDS_ALARM, self.encode(s)))
        {
            return Some(start - tod % 60 + s);
        }
        // In a later minute of this hour, else at the first of a later hour.
        if hour(tod / 3600)
            && let Some(m) = minutes(tod / 60 % 60 + 1)
        {
            return Some(midnight + tod / 3600 * 3600 + m * 60 + second);
        }
        let first = minutes(0)?;
        let later = (tod / 3600 + 1..tod / 3600 + 25).find(|&h| hour(h % 24))?;
        Some(midnight + later * 3600 + first * 60 + second)
    }

    /// Periodic interrupt's period in cycles of the crystal.
    fn period(&self) -> Option<u64> {
        match self.s.cmos[REG_A] & A_RATE {
            0 => None,
            // "3.90625 ms, 7.8125 ms", as rates 8 and 9.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Sets the flags of all that happened since the last time, without telling anybody.
    fn catch_up(&mut self) {
        let (since, now) = (self.s.seen_ns, self.timer.now());
        self.s.seen_ns = now;
        // The host's clock may have been set back.
        if now <= since {
            return;
        }
        if let Some(period) = self.period().filter(|_| self.running()) {
            let count = |clock| CRYSTAL.ticks(self.divider(clock)) / period;
            if count(now) != count(since) {
                self.s.cmos[REG_C] |= C_PF;
            }
        }
        let (from, to) = (self.seconds(since), self.seconds(now));
        if self.updating() && to > from {
            self.s.cmos[REG_C] |= C_UF;
            if self.next_alarm(from).is_some_and(|t| t <= to) {
                self.s.cmos[REG_C] |= C_AF;
            }
        }
    }

    /// "IRQF = PF·PIE + AF·AIE + UF·UIE"
    fn update(&mut self) {
        let c = self.s.cmos[REG_C] & FLAGS;
        let request = c & self.s.cmos[REG_B] & FLAGS != 0;
        self.s.cmos[REG_C] = c | if request { C_IRQF } else { 0 };
        self.alarm.set_level(request);
        if !self.s.replaced {
            self.irq.set_level(request);
        }
    }

    /// Arms the timer for the first event that would raise an interrupt that is not raised yet.
    fn arm(&self) {
        let wanted = self.s.cmos[REG_B] & !self.s.cmos[REG_C] & FLAGS;
        let now = self.timer.now();
        let mut deadline = u64::MAX;
        if wanted & C_PF != 0
            && self.running()
            && let Some(period) = self.period()
        {
            let edge = (CRYSTAL.ticks(self.divider(now)) / period + 1).saturating_mul(period);
            deadline = CRYSTAL.ns(edge).saturating_sub(self.s.phase_ns);
        }
        if wanted & (C_UF | C_AF) != 0 && self.updating() {
            let second = self.seconds(now);
            let at = if wanted & C_UF != 0 { Some(second + 1) } else { self.next_alarm(second) };
            deadline = deadline.min(at.map_or(u64::MAX, |t| self.clock_at(t)));
        }
        self.timer.arm(deadline);
    }

    fn advance(&mut self) {
        self.catch_up();
        self.update();
        self.arm();
    }

    fn read(&mut self, index: usize) -> u8 {
        let now = self.timer.now();
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY_OF_MONTH | MONTH | YEAR | CENTURY_AT if self.updating() => {
                self.store_time(self.seconds(now));
                self.s.cmos[index]
            }
            REG_A => {
                let soon = self.updating() && self.divider(now) % SECOND >= SECOND - UIP_NS;
                self.s.cmos[REG_A] | if soon { A_UIP } else { 0 }
            }
            REG_C => {
                self.catch_up();
                self.update();
                let flags = std::mem::take(&mut self.s.cmos[REG_C]);
                self.advance();
                flags
            }
            _ => self.s.cmos[index],
        }
    }

    fn write(&mut self, index: usize, value: u8) {
        self.catch_up();
        let now = self.timer.now();
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY_OF_MONTH | MONTH | YEAR | CENTURY_AT => {
                if self.updating() {
                    self.store_time(self.seconds(now));
                }
                self.s.cmos[index] = value;
                if self.updating() {
                    self.load_time(now);
                }
            }
            REG_A => self.change_control(now, REG_A, value & !A_UIP),
            REG_B => {
                // "The UIE bit is cleared by the SET bit going high."
                let clear = if value & !self.s.cmos[REG_B] & B_SET != 0 { B_UIE } else { 0 };
                self.change_control(now, REG_B, value & !clear);
            }
            REG_C | REG_D => {}
            _ => self.s.cmos[index] = value,
        }
        self.update();
        self.arm();
    }

    /// Writes A or B, stopping or starting the clock if that is what it means.
    fn change_control(&mut self, now: u64, register: usize, value: u8) {
        let (ran, updated) = (self.running(), self.updating());
        if updated {
            self.store_time(self.seconds(now));
        }
        self.s.cmos[register] = value;
        if self.running() && !ran {
            let (seconds, at) = (self.seconds(now), now % SECOND);
            self.s.phase_ns = (RELEASE_PHASE + SECOND - at) % SECOND;
            self.s.offset_s = seconds - (self.divider(now) / SECOND) as i64;
        }
        if self.updating() && !updated {
            self.load_time(now);
        }
    }
}

impl IrqController for Replaced {
    fn set_input(&self, _pin: u32, level: bool) {
        if let Some(rtc) = self.0.upgrade() {
            lock(&rtc).set_replaced(level);
        }
    }
}

impl MutPioDevice for Mc146818 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        // The index port is write-only.
        Ok(if a.offset == 0 { 0xff } else { self.read(usize::from(self.s.index & !NMI_MASK)).into() })
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        match a.offset {
            0 => self.s.index = value as u8,
            _ => self.write(usize::from(self.s.index & !NMI_MASK), value as u8),
        }
        Ok(())
    }
}

impl MutLifecycle for Mc146818 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            // RESET clears interrupt enables and flags; time, RAM and the rest have a battery.
            ResetPhase::Enter => {
                self.s.index = NMI_MASK;
                self.s.cmos[REG_B] &= !(B_PIE | B_AIE | B_UIE | B_SQWE);
                self.s.cmos[REG_C] = 0;
                self.s.replaced = false;
                self.s.seen_ns = self.timer.now();
            }
            ResetPhase::Hold => {
                self.update();
                self.timer.disarm();
            }
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        // What came due while the machine stood.
        self.advance();
    }

    fn stop(&mut self, _: &Drain) {
        self.timer.disarm();
    }
}

impl SaveRestore for Mc146818 {
    const SCHEMA: Schema = Schema::new("mc146818", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        if state.cmos.len() != LEN {
            return invalid("cmos", format!("{} bytes instead of {LEN}", state.cmos.len()));
        }
        if state.cmos[REG_A] & A_UIP != 0 || state.cmos[REG_D] != D_VRT || state.cmos[REG_C] & !(C_IRQF | FLAGS) != 0 {
            return invalid("cmos", "registers A, C or D have bits they cannot have".to_owned());
        }
        if state.phase_ns >= SECOND
            || state.weekday_shift > 6
            || state.offset_s.unsigned_abs() > 2 * MAX_OFFSET.unsigned_abs()
        {
            return invalid("offset_s", format!("{} s, {} ns", state.offset_s, state.phase_ns));
        }
        self.s = state;
        self.timer.disarm();
        let request = self.s.cmos[REG_C] & self.s.cmos[REG_B] & FLAGS != 0;
        self.alarm.import_level(request);
        if !self.s.replaced {
            self.irq.import_level(request);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "mc146818_tests.rs"]
mod tests;
