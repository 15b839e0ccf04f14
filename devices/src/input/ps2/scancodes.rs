//! Scan codes: what keys send, and the controller's translation of set 2 to set 1.

use mimus_core::backend::Key;

/// Set 2 to set 1, for codes below 128, as the 8042 of a PC translates them.
const TO_SET_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// F7 and the system-request key have codes of their own above.
const F7: (u8, u8) = (0x83, 0x41);
const SYSRQ: (u8, u8) = (0x84, 0x54);

/// Prefix of the keys that the 101-key keyboard added.
pub const EXTENDED: u8 = 0xe0;
/// Prefix of Pause.
const PAUSE_PREFIX: u8 = 0xe1;
/// Prefix of releases in set 2.
pub const RELEASE: u8 = 0xf0;
/// Released, in set 1.
const RELEASED: u8 = 0x80;

/// `KEY_PAUSE` and `KEY_SYSRQ` (Print Screen), which send more than one code.
const KEY_PAUSE: u16 = 119;
const KEY_PRINT: u16 = 99;
/// Codes up to here are the keys' set 1 codes.
const LAST_BASE: u16 = 88;

/// Extended keys: number, set 1 code after the prefix.
const EXTENDED_KEYS: [(u16, u8); 25] = [
    (96, 0x1c),  // keypad Enter
    (97, 0x1d),  // right Ctrl
    (98, 0x35),  // keypad /
    (100, 0x38), // right Alt
    (102, 0x47), // Home
    (103, 0x48), // Up
    (104, 0x49), // Page Up
    (105, 0x4b), // Left
    (106, 0x4d), // Right
    (107, 0x4f), // End
    (108, 0x50), // Down
    (109, 0x51), // Page Down
    (110, 0x52), // Insert
    (111, 0x53), // Delete
    (113, 0x20), // mute
    (114, 0x2e), // volume down
    (115, 0x30), // volume up
    (116, 0x5e), // power
    (125, 0x5b), // left Windows
    (126, 0x5c), // right Windows
    (127, 0x5d), // menu
    (142, 0x5f), // sleep
    (143, 0x63), // wake
    (163, 0x19), // next track
    (165, 0x10), // previous track
];

/// A byte on its way from the keyboard, translated. `None` for the release prefix, which `released` remembers.
pub fn translate(byte: u8, released: &mut bool) -> Option<u8> {
    let code = match byte {
        RELEASE => {
            *released = true;
            return None;
        }
        // Prefixes and replies.
        0x80.. if byte != F7.0 && byte != SYSRQ.0 => return Some(byte),
        _ => to_set_1(byte),
    };
    Some(code | if std::mem::take(released) { RELEASED } else { 0 })
}

fn to_set_1(code: u8) -> u8 {
    match code {
        _ if code == F7.0 => F7.1,
        _ if code == SYSRQ.0 => SYSRQ.1,
        _ => TO_SET_1[usize::from(code & 0x7f)],
    }
}

fn to_set_2(code: u8) -> u8 {
    match code {
        _ if code == F7.1 => F7.0,
        _ if code == SYSRQ.1 => SYSRQ.0,
        _ => TO_SET_1.iter().position(|c| *c == code).map_or(0, |at| at as u8),
    }
}

/// What a key sends in scan code set `set`, 1 or 2; nothing if the keyboard does not have the key.
pub fn key_bytes(key: Key, down: bool, set: u8) -> Vec<u8> {
    let one = |prefix: Option<u8>, code: u8, down: bool| {
        let mut bytes: Vec<u8> = prefix.into_iter().collect();
        match (set, down) {
            (1, true) => bytes.push(code),
            (1, false) => bytes.push(code | RELEASED),
            (_, true) => bytes.push(to_set_2(code)),
            (_, false) => bytes.extend([RELEASE, to_set_2(code)]),
        }
        bytes
    };
    let prefix = Some(EXTENDED);
    match key.0 {
        // Pressed and released at once.
        KEY_PAUSE if down => {
            let half = |down| [one(Some(PAUSE_PREFIX), 0x1d, down), one(None, 0x45, down)].concat();
            [half(true), half(false)].concat()
        }
        KEY_PAUSE => Vec::new(),
        // With a shift of its own.
        KEY_PRINT if down => [one(prefix, 0x2a, true), one(prefix, 0x37, true)].concat(),
        KEY_PRINT => [one(prefix, 0x37, false), one(prefix, 0x2a, false)].concat(),
        key @ (1..=83 | 86..=LAST_BASE) => one(None, key as u8, down),
        key => match EXTENDED_KEYS.iter().find(|(k, _)| *k == key) {
            Some((_, code)) => one(prefix, *code, down),
            None => Vec::new(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_one_code_in_each_set_and_translates() {
        let mut seen = std::collections::HashSet::new();
        for key in 0..256 {
            for down in [true, false] {
                let two = key_bytes(Key(key), down, 2);
                let mut released = false;
                let translated: Vec<u8> = two.iter().filter_map(|b| translate(*b, &mut released)).collect();
                assert_eq!(translated, key_bytes(Key(key), down, 1), "key {key}");
                assert!(!released);
                assert!(two.is_empty() || seen.insert(two), "key {key} is unique");
            }
        }
        assert_eq!(seen.len(), 2 * (83 + 3 + 25 + 1) + 1);
    }

    #[test]
    fn known_keys() {
        let both = |key, down| (key_bytes(Key(key), down, 2), key_bytes(Key(key), down, 1));
        assert_eq!(both(30, true), (vec![0x1c], vec![0x1e]), "A");
        assert_eq!(both(30, false), (vec![0xf0, 0x1c], vec![0x9e]));
        assert_eq!(both(65, true), (vec![0x83], vec![0x41]), "F7");
        assert_eq!(both(103, false), (vec![0xe0, 0xf0, 0x75], vec![0xe0, 0xc8]), "up");
        let pause = vec![0xe1, 0x14, 0x77, 0xe1, 0xf0, 0x14, 0xf0, 0x77];
        assert_eq!(both(119, true), (pause, vec![0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]));
        assert_eq!(both(99, true).0, [0xe0, 0x12, 0xe0, 0x7c], "print screen");
        assert_eq!(both(99, false).0, [0xe0, 0xf0, 0x7c, 0xe0, 0xf0, 0x12]);
    }
}
