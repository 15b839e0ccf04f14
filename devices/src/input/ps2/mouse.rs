//! A mouse: three buttons, and as IntelliMouse a wheel and two more. It reports as fast as it is read.

use std::collections::VecDeque;

use mimus_core::backend::MouseButton;
use serde::{Deserialize, Serialize};

use super::{ACK, BUFFER, RESEND, TEST_PASSED, fits};

const SCALING_1: u8 = 0xe6;
const SCALING_2: u8 = 0xe7;
const RESOLUTION: u8 = 0xe8;
const STATUS: u8 = 0xe9;
const STREAM: u8 = 0xea;
const READ_DATA: u8 = 0xeb;
const END_WRAP: u8 = 0xec;
const WRAP: u8 = 0xee;
const REMOTE: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SAMPLE_RATE: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

/// The ids of mice that do more.
const PLAIN: u8 = 0;
const WHEEL: u8 = 3;
const FIVE_BUTTONS: u8 = 4;
/// Sample rates that, one after another, ask for more.
const WHEEL_KNOCK: [u8; 3] = [200, 100, 80];
const BUTTONS_KNOCK: [u8; 3] = [200, 200, 80];

/// Button bits; the first three as in a report.
const LEFT: u8 = 1;
const RIGHT: u8 = 2;
const MIDDLE: u8 = 4;
const SIDE: u8 = 8;
const EXTRA: u8 = 0x10;

/// Movement kept while there is no room for reports.
const FARTHEST: i32 = 1 << 16;

/// The mouse, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mouse {
    /// It reports by itself, in stream mode.
    enabled: bool,
    /// It reports when asked only.
    remote: bool,
    /// It sends back what it is sent.
    wrap: bool,
    /// Small and large movements differ more.
    scaling: bool,
    resolution: u8,
    rate: u8,
    id: u8,
    /// The last three sample rates.
    rates: [u8; 3],
    buttons: u8,
    /// Buttons changed since the last report.
    changed: bool,
    /// Movement since the last report: right, down, wheel away.
    dx: i32,
    dy: i32,
    dz: i32,
    /// The command that waits for its parameter.
    command: Option<u8>,
    last: u8,
    replies: VecDeque<u8>,
    reports: VecDeque<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            enabled: false,
            remote: false,
            wrap: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            id: PLAIN,
            rates: [0; 3],
            buttons: 0,
            changed: false,
            dx: 0,
            dy: 0,
            dz: 0,
            command: None,
            last: 0,
            replies: VecDeque::new(),
            reports: VecDeque::new(),
        }
    }
}

/// Takes up to `limit` out of `total`, either way.
fn take_some(total: &mut i32, limit: i32) -> i32 {
    let part = (*total).clamp(-limit, limit);
    *total -= part;
    part
}

/// "2:1 scaling": counts 1 to 5 become 1, 1, 3, 6, 9, more are doubled.
fn scale(counts: i32) -> i32 {
    let scaled = match counts.abs() {
        0 => 0,
        1 | 2 => 1,
        3 => 3,
        4 => 6,
        5 => 9,
        n => 2 * n,
    };
    scaled * counts.signum()
}

impl Mouse {
    /// Movement in counts, right and down positive.
    pub fn motion(&mut self, dx: i32, dy: i32) {
        self.dx = self.dx.saturating_add(dx).clamp(-FARTHEST, FARTHEST);
        self.dy = self.dy.saturating_add(dy).clamp(-FARTHEST, FARTHEST);
    }

    /// Notches of the wheel, away is positive.
    pub fn wheel(&mut self, clicks: i32) {
        self.dz = self.dz.saturating_add(clicks).clamp(-FARTHEST, FARTHEST);
    }

    /// A button went down or up.
    pub fn button(&mut self, button: MouseButton, down: bool) {
        let bit = match button {
            MouseButton::Left => LEFT,
            MouseButton::Right => RIGHT,
            MouseButton::Middle => MIDDLE,
            MouseButton::Side => SIDE,
            MouseButton::Extra => EXTRA,
        };
        let buttons = if down { self.buttons | bit } else { self.buttons & !bit };
        self.changed |= buttons != self.buttons;
        self.buttons = buttons;
    }

    /// Makes reports of what happened, as far as there is room and they are wanted.
    pub fn report(&mut self) {
        if self.id == PLAIN {
            self.dz = 0;
        }
        if !self.enabled {
            // "Counters are not changed while disabled."
            (self.dx, self.dy, self.dz, self.changed) = (0, 0, 0, false);
        }
        if self.remote || self.wrap {
            return;
        }
        while (self.changed || (self.dx, self.dy, self.dz) != (0, 0, 0)) && self.reports.len() + 4 <= BUFFER {
            let packet = self.packet(self.scaling);
            self.reports.extend(packet);
        }
    }

    fn packet(&mut self, scaled: bool) -> Vec<u8> {
        let limit = if scaled { 127 } else { 255 };
        let part = |total: &mut i32| {
            let counts = take_some(total, limit);
            if scaled { scale(counts) } else { counts }
        };
        // Up is positive on the wire.
        let (x, y) = (part(&mut self.dx), -part(&mut self.dy));
        self.changed = false;
        let sign = |v: i32, bit: u8| if v < 0 { bit } else { 0 };
        let mut packet = vec![8 | self.buttons & 7 | sign(x, 0x10) | sign(y, 0x20), x as u8, y as u8];
        match self.id {
            WHEEL => packet.push(-take_some(&mut self.dz, 127) as u8),
            FIVE_BUTTONS => {
                let more = (self.buttons & (SIDE | EXTRA)) << 1;
                packet.push(more | -take_some(&mut self.dz, 7) as u8 & 0xf);
            }
            _ => {}
        }
        packet
    }

    /// The next byte for the controller.
    pub fn take(&mut self) -> Option<u8> {
        let byte = self.replies.pop_front().or_else(|| self.reports.pop_front())?;
        self.last = byte;
        self.report();
        Some(byte)
    }

    fn reply(&mut self, bytes: &[u8]) {
        self.replies.clear();
        self.replies.extend(bytes);
    }

    fn reset(&mut self) {
        *self = Self { buttons: self.buttons, last: self.last, ..Self::default() };
    }

    fn status(&self) -> u8 {
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        let buttons =
            bit(self.buttons & LEFT != 0, 4) | bit(self.buttons & MIDDLE != 0, 2) | bit(self.buttons & RIGHT != 0, 1);
        bit(self.remote, 0x40) | bit(self.enabled, 0x20) | bit(self.scaling, 0x10) | buttons
    }

    /// A byte from the controller.
    pub fn write(&mut self, byte: u8) {
        if self.wrap && !matches!(byte, END_WRAP | RESET) {
            return self.reply(&[byte]);
        }
        if let Some(command) = self.command.take() {
            return self.parameter(command, byte);
        }
        if byte != RESEND {
            // "A command ends the report that is being sent."
            self.reports.clear();
        }
        match byte {
            SCALING_1 | SCALING_2 => self.scaling = byte == SCALING_2,
            STATUS => return self.reply(&[ACK, self.status(), self.resolution, self.rate]),
            STREAM => self.remote = false,
            READ_DATA => {
                let packet = self.packet(false);
                return self.reply(&[&[ACK], &packet[..]].concat());
            }
            END_WRAP | WRAP => self.wrap = byte == WRAP,
            REMOTE => self.remote = true,
            IDENTIFY => return self.reply(&[ACK, self.id]),
            RESOLUTION | SAMPLE_RATE => self.command = Some(byte),
            ENABLE | DISABLE => self.enabled = byte == ENABLE,
            DEFAULTS => {
                let id = self.id;
                self.reset();
                self.id = id;
            }
            RESEND => return self.reply(&[self.last]),
            RESET => {
                self.reset();
                return self.reply(&[ACK, TEST_PASSED, PLAIN]);
            }
            _ => return self.reply(&[RESEND]),
        }
        self.reply(&[ACK]);
    }

    fn parameter(&mut self, command: u8, value: u8) {
        match (command, value) {
            (RESOLUTION, 0..=3) => self.resolution = value,
            (SAMPLE_RATE, 10 | 20 | 40 | 60 | 80 | 100 | 200) => self.set_rate(value),
            _ => return self.reply(&[RESEND]),
        }
        self.reply(&[ACK]);
    }

    fn set_rate(&mut self, rate: u8) {
        self.rate = rate;
        self.rates = [self.rates[1], self.rates[2], rate];
        match self.rates {
            WHEEL_KNOCK if self.id == PLAIN => self.id = WHEEL,
            BUTTONS_KNOCK => self.id = FIVE_BUTTONS,
            _ => {}
        }
    }

    /// What no mouse could be in.
    pub fn check(&self) -> Result<(), String> {
        let moved = [self.dx, self.dy, self.dz].iter().all(|d| d.unsigned_abs() <= FARTHEST.unsigned_abs());
        let command = matches!(self.command, None | Some(RESOLUTION | SAMPLE_RATE));
        if !moved || !command || !matches!(self.id, PLAIN | WHEEL | FIVE_BUTTONS) || !fits(&self.replies, &self.reports)
        {
            return Err(format!("id {}, command {:?}, movement or queues", self.id, self.command));
        }
        Ok(())
    }
}
