//! Goldfish real-time clock.
//!
//! Spec: Android "goldfish virtual hardware", RTC section; binding `google,goldfish-rtc`.
//! Modelled: time in nanoseconds since 1970, setting it, the alarm and its interrupt.
//! Checked with: Linux rtc-goldfish.

use std::sync::{Arc, Mutex, PoisonError};

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::clock::Timer;
use mimus_core::device::{Drain, MutLifecycle, MutMmioDevice, ResetPhase};
use mimus_core::irq::IrqLine;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Bytes of the register map.
pub const SIZE: u64 = 0x1000;
/// Accesses the region takes.
pub const RULES: AccessRules = AccessRules::only(AccessSize::B4);
const TIME_LOW: u64 = 0x00;
const TIME_HIGH: u64 = 0x04;
const ALARM_LOW: u64 = 0x08;
const ALARM_HIGH: u64 = 0x0c;
const IRQ_ENABLED: u64 = 0x10;
const CLEAR_ALARM: u64 = 0x14;
const ALARM_STATUS: u64 = 0x18;
const CLEAR_INTERRUPT: u64 = 0x1c;

/// The registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// What is added to the timer's clock to get the guest's time, in nanoseconds.
    offset: u64,
    alarm: u64,
    alarm_running: bool,
    irq_enabled: bool,
    irq_pending: bool,
    /// High half of the time at the last read of the low half.
    latched_high: u32,
    /// High half written, taking effect with the low half.
    written_high: u32,
}

/// A goldfish RTC.
pub struct GoldfishRtc {
    s: State,
    irq: IrqLine,
    timer: Timer,
}

impl GoldfishRtc {
    /// A clock that is `offset` nanoseconds ahead of `timer`'s clock: 0 on the host clock shows the world's time,
    /// after a restore too; on the virtual clock, the time it was at the start makes a clock that stops with the
    /// machine.
    pub fn new(irq: IrqLine, timer: Timer, offset: u64) -> Arc<Mutex<GoldfishRtc>> {
        let s = State { offset, ..State::default() };
        let rtc = Arc::new(Mutex::new(GoldfishRtc { s, irq, timer: timer.clone() }));
        let weak = Arc::downgrade(&rtc);
        timer.bind(move || {
            if let Some(rtc) = weak.upgrade() {
                // Not `alarm`: on the host clock the deadline may have been reached by a step back and forth.
                rtc.lock().unwrap_or_else(PoisonError::into_inner).arm();
            }
        });
        rtc
    }

    fn now(&self) -> u64 {
        self.timer.now().wrapping_add(self.s.offset)
    }

    fn alarm(&mut self) {
        self.s.alarm_running = false;
        self.s.irq_pending = true;
        self.update();
    }

    fn update(&self) {
        self.irq.set_level(self.s.irq_pending && self.s.irq_enabled);
    }

    fn arm(&mut self) {
        if !self.s.alarm_running {
            return self.timer.disarm();
        }
        let now = self.now();
        if self.s.alarm <= now {
            self.timer.disarm();
            self.alarm();
        } else {
            self.timer.arm(self.timer.now().saturating_add(self.s.alarm - now));
        }
    }
}

impl MutMmioDevice for GoldfishRtc {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(match a.offset {
            TIME_LOW => {
                let now = self.now();
                self.s.latched_high = (now >> 32) as u32;
                now & 0xffff_ffff
            }
            TIME_HIGH => u64::from(self.s.latched_high),
            ALARM_LOW => self.s.alarm & 0xffff_ffff,
            ALARM_HIGH => self.s.alarm >> 32,
            IRQ_ENABLED => u64::from(self.s.irq_enabled),
            ALARM_STATUS => u64::from(self.s.alarm_running),
            _ => 0,
        })
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        match a.offset {
            TIME_HIGH => self.s.written_high = value as u32,
            TIME_LOW => {
                let time = u64::from(self.s.written_high) << 32 | value & 0xffff_ffff;
                self.s.offset = time.wrapping_sub(self.timer.now());
                self.arm();
            }
            ALARM_HIGH => self.s.alarm = self.s.alarm & 0xffff_ffff | value << 32,
            ALARM_LOW => {
                self.s.alarm = self.s.alarm & !0xffff_ffff | value & 0xffff_ffff;
                self.s.alarm_running = true;
                self.arm();
            }
            IRQ_ENABLED => {
                self.s.irq_enabled = value & 1 != 0;
                self.update();
            }
            CLEAR_ALARM => {
                self.s.alarm_running = false;
                self.timer.disarm();
            }
            CLEAR_INTERRUPT => {
                self.s.irq_pending = false;
                self.update();
            }
            _ => {}
        }
        Ok(())
    }
}

impl MutLifecycle for GoldfishRtc {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            // The clock itself runs on through a reset, as one with a battery does.
            ResetPhase::Enter => self.s = State { offset: self.s.offset, ..State::default() },
            ResetPhase::Hold => {
                self.timer.disarm();
                self.update();
            }
            ResetPhase::Exit => {}
        }
    }

    fn start(&mut self) {
        // An alarm that came due while the machine stood rings now.
        self.arm();
    }

    fn stop(&mut self, _: &Drain) {
        self.timer.disarm();
    }
}

impl SaveRestore for GoldfishRtc {
    const SCHEMA: Schema = Schema::new("goldfish-rtc", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        self.s = state;
        self.timer.disarm();
        self.irq.import_level(self.s.irq_pending && self.s.irq_enabled);
        Ok(())
    }
}

#[cfg(test)]
#[path = "goldfish_rtc_tests.rs"]
mod tests;
