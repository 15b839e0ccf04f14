//! A 101-key keyboard with scan code sets 2 and 1. Held keys repeat if who presses them says so again.
//! Set 3, which PCs do not use, is refused.

use std::collections::VecDeque;

use mimus_core::backend::Key;
use serde::{Deserialize, Serialize};

use super::scancodes::key_bytes;
use super::{ACK, BUFFER, RESEND, TEST_PASSED, fits};

const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const TYPEMATIC: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const DEFAULTS: u8 = 0xf6;
const ALL_KEYS: std::ops::RangeInclusive<u8> = 0xf7..=0xfa;
const RESET: u8 = 0xff;
const ID: [u8; 2] = [0xab, 0x83];
/// 10.9 characters a second after half a second.
const DEFAULT_TYPEMATIC: u8 = 0x2b;

/// The keyboard, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keyboard {
    /// It scans its keys.
    enabled: bool,
    /// Scan code set, 1 or 2.
    set: u8,
    /// Scroll, Num, Caps Lock in bits 0 to 2.
    leds: u8,
    typematic: u8,
    /// The command that waits for its parameter.
    command: Option<u8>,
    /// The byte that "resend" sends.
    last: u8,
    replies: VecDeque<u8>,
    keys: VecDeque<u8>,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            enabled: true,
            set: 2,
            leds: 0,
            typematic: DEFAULT_TYPEMATIC,
            command: None,
            last: 0,
            replies: VecDeque::new(),
            keys: VecDeque::new(),
        }
    }
}

impl Keyboard {
    /// Scroll, Num, Caps Lock in bits 0 to 2.
    pub fn leds(&self) -> u8 {
        self.leds
    }

    /// A key went down or up.
    pub fn key(&mut self, key: Key, down: bool) {
        let bytes = key_bytes(key, down, self.set);
        if !self.enabled || bytes.is_empty() {
            return;
        }
        if self.keys.len() + bytes.len() < BUFFER {
            self.keys.extend(bytes);
        } else if self.keys.len() < BUFFER {
            // "An overrun condition is placed in the last position."
            self.keys.resize(BUFFER - 1, 0);
            self.keys.push_back(if self.set == 1 { 0xff } else { 0 });
        }
    }

    /// The next byte for the controller.
    pub fn take(&mut self) -> Option<u8> {
        let byte = self.replies.pop_front().or_else(|| self.keys.pop_front())?;
        self.last = byte;
        Some(byte)
    }

    fn reply(&mut self, bytes: &[u8]) {
        self.replies.clear();
        self.replies.extend(bytes);
    }

    fn set_defaults(&mut self, enabled: bool) {
        *self = Self { enabled, leds: self.leds, last: self.last, ..Self::default() };
    }

    /// A byte from the controller.
    pub fn write(&mut self, byte: u8) {
        if let Some(command) = self.command.take()
            && byte < SET_LEDS
        {
            return self.parameter(command, byte);
        }
        match byte {
            SET_LEDS | SCAN_SET | TYPEMATIC => {
                self.command = Some(byte);
                self.reply(&[ACK]);
            }
            ECHO => self.reply(&[ECHO]),
            IDENTIFY => self.reply(&[ACK, ID[0], ID[1]]),
            ENABLE => {
                self.enabled = true;
                self.keys.clear();
                self.reply(&[ACK]);
            }
            DISABLE | DEFAULTS => {
                self.set_defaults(byte == DEFAULTS);
                self.reply(&[ACK]);
            }
            // They concern set 3.
            _ if ALL_KEYS.contains(&byte) => self.reply(&[ACK]),
            RESEND => self.reply(&[self.last]),
            RESET => {
                *self = Self::default();
                self.reply(&[ACK, TEST_PASSED]);
            }
            _ => self.reply(&[RESEND]),
        }
    }

    fn parameter(&mut self, command: u8, value: u8) {
        match (command, value) {
            (SET_LEDS, _) => self.leds = value & 7,
            (TYPEMATIC, _) => self.typematic = value & 0x7f,
            (SCAN_SET, 0) => return self.reply(&[ACK, self.set]),
            (SCAN_SET, 1 | 2) => {
                self.keys.clear();
                self.set = value;
            }
            _ => return self.reply(&[RESEND]),
        }
        self.reply(&[ACK]);
    }

    /// What no keyboard could be in.
    pub fn check(&self) -> Result<(), String> {
        let known = |c: u8| matches!(c, SET_LEDS | SCAN_SET | TYPEMATIC);
        if !matches!(self.set, 1 | 2) || !fits(&self.replies, &self.keys) || self.command.is_some_and(|c| !known(c)) {
            return Err(format!("scan code set {}, command {:?}, queues", self.set, self.command));
        }
        Ok(())
    }
}
