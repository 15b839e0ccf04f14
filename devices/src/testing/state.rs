//! Saved states: two devices that must go on alike, and states that something damaged.

use std::fmt::Debug;
use std::sync::Mutex;

use mimus_core::device::lock;
use mimus_core::snapshot::{Payload, SaveRestore, Snapshot};
use serde_json::Value;

use super::{Rng, saved};

/// Does the same random steps to two devices, which must answer alike.
pub fn go_on_alike<R, T: PartialEq + Debug>(a: &R, b: &R, steps: usize, step: impl Fn(&R, &mut Rng) -> T) {
    let (mut ra, mut rb) = (Rng(0x1234_5678_9abc_def1), Rng(0x1234_5678_9abc_def1));
    for i in 0..steps {
        assert_eq!(step(a, &mut ra), step(b, &mut rb), "step {i}");
    }
}

/// Restores damaged forms of `device`'s state into it, thousands of times: each is an error of one line that
/// leaves the device as it was, or a state it goes on from. `go_on` uses the device a little after each.
pub fn restore_damaged<D: SaveRestore + Send>(device: &Mutex<D>, mut go_on: impl FnMut(&mut Rng)) {
    let mut rng = Rng(7);
    let good = Payload::encode(D::SCHEMA, &lock(device).save_state()).unwrap();
    let mut refused = 0;
    for round in 0..3000 {
        let before = device.save().unwrap();
        match restore_one(device, &good, &mut rng) {
            Err(e) => {
                assert!(!e.is_empty() && !e.contains('\n'), "{e:?}");
                assert_eq!(device.save().unwrap(), before, "round {round}: changed by a state that was refused: {e}");
                refused += 1;
            }
            Ok(()) => (0..20).for_each(|_| go_on(&mut rng)),
        }
        // Another schema, another version.
        if round % 100 == 0 {
            let other = Payload { schema: format!("{}x", good.schema), ..good.clone() };
            assert!(device.restore(&other).is_err());
            let newer = Payload { version: good.version + 1, ..good.clone() };
            assert!(device.restore(&newer).is_err());
        }
        device.restore(&good).unwrap();
    }
    assert!(refused > 100, "only {refused} states were refused");
}

/// Restores the state with a value changed, or with bytes of its encoding damaged.
fn restore_one<D: SaveRestore + Send>(device: &Mutex<D>, good: &Payload, rng: &mut Rng) -> Result<(), String> {
    if rng.below(3) > 0 {
        let mut state = saved(device);
        damage_value(&mut state, rng);
        let state = serde_json::from_value(state).map_err(|e| e.to_string())?;
        return lock(device).restore_state(state).map_err(|e| e.to_string());
    }
    let mut bad = good.clone();
    match rng.below(8) {
        0 => bad.body.truncate(rng.below(bad.body.len() as u64 + 1) as usize),
        1 => bad.body.push(rng.next() as u8),
        _ => {
            let at = rng.below(bad.body.len().max(1) as u64) as usize;
            if let Some(byte) = bad.body.get_mut(at) {
                *byte ^= 1 << rng.below(8);
            }
        }
    }
    device.restore(&bad).map_err(|e| e.to_string())
}

/// Changes one leaf, or one list's length, somewhere in `value`.
fn damage_value(value: &mut Value, rng: &mut Rng) {
    let inner = match value {
        Value::Object(map) if !map.is_empty() && rng.below(20) > 0 => {
            let at = rng.below(map.len() as u64) as usize;
            map.values_mut().nth(at)
        }
        Value::Array(list) if !list.is_empty() && rng.below(4) > 0 => {
            let at = rng.below(list.len() as u64) as usize;
            list.get_mut(at)
        }
        _ => None,
    };
    match inner {
        Some(inner) => damage_value(inner, rng),
        None => damage_here(value, rng),
    }
}

fn damage_here(value: &mut Value, rng: &mut Rng) {
    match value {
        Value::Array(list) if rng.below(2) == 0 => {
            list.pop();
        }
        Value::Array(list) => {
            let copy = list.first().cloned().unwrap_or(Value::from(rng.next()));
            (0..=rng.below(70)).for_each(|_| list.push(copy.clone()));
        }
        Value::Object(map) => {
            let first = map.keys().next().cloned();
            match first.filter(|_| rng.below(2) == 0) {
                Some(key) => drop(map.remove(&key)),
                None => drop(map.insert("unknown".into(), 1.into())),
            }
        }
        Value::Bool(b) if rng.below(2) == 0 => *b = !*b,
        other => {
            let numbers = [0, 1, 2, 0x7f, 0x80, 0xff, 0x100, 0xffff, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX];
            *other = match rng.below(10) {
                0 => Value::Null,
                1 => (-1).into(),
                2 => "text".into(),
                3 => rng.next().into(),
                4 => (rng.next() as u8).into(),
                _ => numbers[rng.below(numbers.len() as u64) as usize].into(),
            };
        }
    }
}
