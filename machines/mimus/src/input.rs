//! The monitor's commands that press keys and move a mouse: `sendkey`, `mouse_move`, `mouse_button`.
//!
//! Names of keys are those of QEMU's monitor; numbers are Linux's input event codes.

use mimus_core::backend::{InputEvent, Key, MouseButton};
use mimus_machines::config::keyval::nearest;

/// The commands, and what each does.
pub const COMMANDS: [(&str, &str); 3] = [
    ("sendkey KEY[-KEY…]", "presses keys together and lets them go: a, shift-a, ctrl-alt-delete, f1, ret"),
    ("mouse_move DX DY [NOTCHES]", "moves the mouse right and down, and turns its wheel"),
    ("mouse_button STATE", "holds these buttons of the mouse: 1 left, 2 middle, 4 right, or a sum; 0 none"),
];

/// Keys that stand in a row, by the code of the first.
const ROWS: [(u16, &str); 4] = [(2, "1234567890"), (16, "qwertyuiop"), (30, "asdfghjkl"), (44, "zxcvbnm")];

/// The others.
const KEYS: &[(&str, u16)] = &[
    ("esc", 1),
    ("minus", 12),
    ("equal", 13),
    ("backspace", 14),
    ("tab", 15),
    ("bracket_left", 26),
    ("bracket_right", 27),
    ("ret", 28),
    ("ctrl", 29),
    ("semicolon", 39),
    ("apostrophe", 40),
    ("grave_accent", 41),
    ("shift", 42),
    ("backslash", 43),
    ("comma", 51),
    ("dot", 52),
    ("slash", 53),
    ("shift_r", 54),
    ("asterisk", 55),
    ("alt", 56),
    ("spc", 57),
    ("caps_lock", 58),
    ("f1", 59),
    ("f2", 60),
    ("f3", 61),
    ("f4", 62),
    ("f5", 63),
    ("f6", 64),
    ("f7", 65),
    ("f8", 66),
    ("f9", 67),
    ("f10", 68),
    ("num_lock", 69),
    ("scroll_lock", 70),
    ("kp_7", 71),
    ("kp_8", 72),
    ("kp_9", 73),
    ("kp_subtract", 74),
    ("kp_4", 75),
    ("kp_5", 76),
    ("kp_6", 77),
    ("kp_add", 78),
    ("kp_1", 79),
    ("kp_2", 80),
    ("kp_3", 81),
    ("kp_0", 82),
    ("kp_decimal", 83),
    ("less", 86),
    ("f11", 87),
    ("f12", 88),
    ("kp_enter", 96),
    ("ctrl_r", 97),
    ("kp_divide", 98),
    ("sysrq", 99),
    ("print", 99),
    ("alt_r", 100),
    ("home", 102),
    ("up", 103),
    ("pgup", 104),
    ("left", 105),
    ("right", 106),
    ("end", 107),
    ("down", 108),
    ("pgdn", 109),
    ("insert", 110),
    ("delete", 111),
    ("pause", 119),
    ("meta_l", 125),
    ("meta_r", 126),
    ("menu", 127),
];

fn key(name: &str) -> Result<Key, String> {
    let lower = name.to_ascii_lowercase();
    let named = KEYS.iter().find(|(n, _)| *n == lower).map(|(_, code)| *code);
    let in_row = || ROWS.iter().find_map(|(first, row)| Some(first + row.find(lower.as_str())? as u16));
    let code = named.or_else(|| (lower.len() == 1).then(in_row).flatten());
    code.map(Key).ok_or_else(|| {
        let near = nearest(&lower, KEYS.iter().map(|k| k.0));
        let hint = near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
        format!("sendkey: there is no key {name:?}{hint}")
    })
}

fn keys(text: &str) -> Result<Vec<InputEvent>, String> {
    let keys = text.split('-').map(key).collect::<Result<Vec<_>, _>>()?;
    let down = keys.iter().map(|&key| InputEvent::Key { key, down: true });
    Ok(down.chain(keys.iter().rev().map(|&key| InputEvent::Key { key, down: false })).collect())
}

fn movement(words: &[&str]) -> Result<Vec<InputEvent>, String> {
    let number = |text: &&str| text.parse::<i32>().map_err(|_| format!("mouse_move: {text:?} is not a number"));
    let numbers = words.iter().map(number).collect::<Result<Vec<_>, _>>()?;
    match numbers[..] {
        [dx, dy] => Ok(vec![InputEvent::Motion { dx, dy }]),
        [dx, dy, clicks] => Ok(vec![InputEvent::Motion { dx, dy }, InputEvent::Wheel { clicks }]),
        _ => Err(usage(1)),
    }
}

fn buttons(text: &str) -> Result<Vec<InputEvent>, String> {
    let state: u8 = text.parse().ok().filter(|s| *s < 8).ok_or_else(|| usage(2))?;
    let all = [MouseButton::Left, MouseButton::Middle, MouseButton::Right];
    let event = |(bit, button)| InputEvent::Button { button, down: state >> bit & 1 != 0 };
    Ok((0u8..).zip(all).map(event).collect())
}

fn usage(command: usize) -> String {
    let (name, about) = COMMANDS[command];
    format!("{name}: {about}")
}

/// What a line has happen, or what is wrong with it; `None`: it is none of these commands.
pub fn parse(line: &str) -> Option<Result<Vec<InputEvent>, String>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (name, rest) = words.split_first()?;
    Some(match (*name, rest) {
        ("sendkey", [text]) => keys(text),
        ("sendkey", _) => Err(usage(0)),
        ("mouse_move", rest) => movement(rest),
        ("mouse_button", [text]) => buttons(text),
        ("mouse_button", _) => Err(usage(2)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(line: &str) -> Vec<(u16, bool)> {
        let event = |event| match event {
            InputEvent::Key { key, down } => (key.0, down),
            other => panic!("{other:?}"),
        };
        parse(line).unwrap().unwrap().into_iter().map(event).collect()
    }

    #[test]
    fn keys_are_pressed_in_order_and_let_go_the_other_way() {
        let expected = [(29, true), (56, true), (111, true), (111, false), (56, false), (29, false)];
        assert_eq!(codes("sendkey ctrl-alt-delete"), expected);
        for (name, code) in [("1", 2), ("0", 11), ("q", 16), ("P", 25), ("a", 30), ("l", 38), ("z", 44), ("m", 50)] {
            assert_eq!(codes(&format!("sendkey {name}")), [(code, true), (code, false)], "{name}");
        }
        assert_eq!(codes("sendkey F12"), [(88, true), (88, false)]);
    }

    #[test]
    fn the_mouse() {
        let of = |line: &str| parse(line).unwrap().unwrap();
        assert_eq!(of("mouse_move -3 4"), [InputEvent::Motion { dx: -3, dy: 4 }]);
        assert_eq!(of("mouse_move 0 0 -1")[1], InputEvent::Wheel { clicks: -1 });
        let down = |line: &str| -> Vec<bool> {
            of(line).iter().map(|e| matches!(e, InputEvent::Button { down: true, .. })).collect()
        };
        assert_eq!((down("mouse_button 5"), down("mouse_button 0")), (vec![true, false, true], vec![false; 3]));
    }

    #[test]
    fn mistakes() {
        let says = |line: &str| parse(line).unwrap().unwrap_err();
        assert!(says("sendkey ctrl-alt-delet").contains("no key \"delet\"; did you mean \"delete\"?"));
        assert!(says("sendkey é").contains("no key") && says("sendkey a--b").contains("no key \"\""));
        assert!(says("sendkey").starts_with("sendkey KEY") && says("mouse_button 8").contains("1 left"));
        assert!(says("mouse_move 1").contains("DX DY") && says("mouse_move 1 x").contains("not a number"));
        assert!(parse("info status").is_none() && parse("").is_none());
    }
}
