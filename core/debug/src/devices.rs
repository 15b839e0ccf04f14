//! Devices' registers by name, decoded from their saved states.
//!
//! A saved state has every register, whoever runs the chip: a model, or the host's kernel. Looking changes nothing. What
//! is known of a chip is one row of [`CHIPS`] with the spelling of its manual; what a state has beyond that is shown by
//! the state's own names.

mod chips;
mod irqchips;

pub use irqchips::irqchips;

use serde_json::Value;

/// A device's state.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceState {
    /// Such as `/machine/serial.0`.
    pub path: String,
    /// What kind of state it is.
    pub schema: String,
    /// The state, or why there is none.
    pub fields: Result<Value, String>,
}

/// A field of a register: its name, lowest bit and width.
pub struct Field(&'static str, u32, u32);

/// A register: its name, where its value is in the state, and its fields, highest first.
pub struct Register(&'static str, &'static str, &'static [Field]);

/// A kind of chip.
pub struct Chip {
    schema: &'static str,
    /// What it is, and the manual whose names are used.
    about: &'static str,
    registers: &'static [Register],
}

/// Most elements of an array that are shown.
const MOST: usize = 32;

fn chip(schema: &str) -> Option<&'static Chip> {
    chips::CHIPS.iter().find(|c| c.schema == schema)
}

/// What a device is.
fn about(schema: &str) -> &'static str {
    let others = || chips::OTHERS.iter().find(|(name, _)| *name == schema).map(|(_, about)| *about);
    chip(schema).map(|c| c.about).or_else(others).unwrap_or("")
}

/// The devices by path.
pub fn list(devices: &[DeviceState]) -> String {
    let line = |d: &DeviceState| {
        let about = about(&d.schema);
        format!("{:<32} {:<20} {about}\n", d.path, d.schema)
    };
    devices.iter().map(line).collect()
}

/// A device's registers. `name`: its path, or the end of it.
///
/// # Errors
/// There is none such; says which is near.
pub fn show(name: &str, devices: &[DeviceState]) -> Result<String, String> {
    if name.is_empty() {
        return Err("the device is missing: info device PATH; 'info devices' lists them".to_owned());
    }
    // The last part of a path is enough, and without its number if it is the only one.
    let last = |d: &DeviceState| d.path.rsplit('/').next().unwrap_or_default().to_owned();
    let exact = devices.iter().find(|d| d.path == name || last(d) == name);
    let mut kind = devices.iter().filter(|d| last(d).split_once('.').is_some_and(|(kind, _)| kind == name));
    let only = kind.next().filter(|_| kind.next().is_none());
    let found = exact.or(only);
    let Some(device) = found else {
        let near = devices.iter().map(|d| (strsim::damerau_levenshtein(&last(d), name), &d.path)).min();
        let near = near.filter(|(distance, _)| *distance <= 1 + name.len() / 3);
        return Err(near.map_or_else(
            || format!("there is no device {name}; 'info devices' lists them"),
            |(_, path)| format!("there is no device {name}; did you mean {path}?"),
        ));
    };
    let about = Some(about(&device.schema)).filter(|a| !a.is_empty()).map_or(String::new(), |a| format!(": {a}"));
    let mut out = format!("{} ({}){about}\n", device.path, device.schema);
    match &device.fields {
        Ok(fields) => registers(&device.schema, fields, &mut out),
        Err(why) => out.push_str(&format!("its state cannot be shown: {why}\n")),
    }
    Ok(out)
}

/// The registers of a state, then what else is in it.
fn registers(schema: &str, fields: &Value, out: &mut String) {
    let known = chip(schema).map_or(&[][..], |c| c.registers);
    for Register(name, path, bits) in known {
        for (name, value) in values(name, fields, path) {
            out.push_str(&format!("{name:<16} {}\n", decoded(value, bits)));
        }
    }
    let mut others = Vec::new();
    flatten("", fields, &mut others);
    let shown = |name: &str| known.iter().any(|Register(_, path, _)| matches(path, name));
    others.retain(|(name, _)| !shown(name));
    if !others.is_empty() && !known.is_empty() {
        out.push_str("state beside registers:\n");
    }
    out.extend(others.into_iter().map(|(name, value)| format!("{name:<32} {value}\n")));
}

/// Whether a state's value is at a register's path, in which `*` is any index.
fn matches(path: &str, name: &str) -> bool {
    let (mut a, mut b) = (path.split('/'), name.split('/'));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return true,
            (Some(x), Some(y)) if x == "*" || x == y => {}
            // Elements of an array that the register is made of.
            (None, Some(y)) => return y.bytes().all(|c| c.is_ascii_digit()),
            _ => return false,
        }
    }
}

/// The values of a register, several if its path has a `*`; the name's `n` is the index.
fn values(name: &str, fields: &Value, path: &str) -> Vec<(String, u64)> {
    let Some((before, after)) = path.split_once("/*") else {
        let value = fields.pointer(&format!("/{path}")).and_then(number);
        return value.map(|v| (name.to_owned(), v)).into_iter().collect();
    };
    let Some(Value::Array(all)) = fields.pointer(&format!("/{before}")) else { return Vec::new() };
    let element = |(i, v): (usize, &Value)| Some((name.replacen('n', &i.to_string(), 1), number(v.pointer(after)?)?));
    all.iter().enumerate().filter_map(element).collect()
}

/// A number or a flag.
fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Bool(on) => Some(u64::from(*on)),
        Value::Number(n) => n.as_u64().or_else(|| n.as_i64().map(|n| n as u64)),
        _ => None,
    }
}

/// A value with its fields; those that are 0 are left out.
fn decoded(value: u64, bits: &[Field]) -> String {
    let field = |Field(name, low, width): &Field| {
        let value = value >> low & 1u64.checked_shl(*width).unwrap_or(0).wrapping_sub(1);
        match (width, value) {
            // A number that is 0 says as little as a flag that is not set.
            (_, 0) => String::new(),
            (1, _) => format!(" {name}"),
            _ => format!(" {name}={value:#x}"),
        }
    };
    let fields: String = bits.iter().map(field).collect();
    if bits.is_empty() {
        format!("{value:#x}")
    } else {
        format!("{value:#x}{}", if fields.is_empty() { " (none set)" } else { &fields })
    }
}

/// All of a state as names and values; long arrays of numbers are one value.
fn flatten(name: &str, value: &Value, out: &mut Vec<(String, String)>) {
    let join = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}/{key}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, v)| flatten(&join(key), v, out)),
        Value::Array(all) if !all.is_empty() && all.iter().all(|v| number(v).is_some()) => {
            let shown: Vec<String> = all.iter().take(MOST).filter_map(number).map(|n| format!("{n:x}")).collect();
            let more = if all.len() > MOST { format!(" … ({} in all)", all.len()) } else { String::new() };
            out.push((name.to_owned(), format!("{}{more}", shown.join(" "))));
        }
        Value::Array(all) => {
            for (i, v) in all.iter().enumerate().take(MOST) {
                flatten(&join(&i.to_string()), v, out);
            }
            if all.is_empty() {
                out.push((name.to_owned(), "none".to_owned()));
            }
        }
        Value::Bool(on) => out.push((name.to_owned(), (if *on { "yes" } else { "no" }).to_owned())),
        Value::Null => out.push((name.to_owned(), "none".to_owned())),
        Value::Number(_) => out.push((name.to_owned(), format!("{:#x}", number(value).unwrap_or(0)))),
        Value::String(text) => out.push((name.to_owned(), format!("{text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn devices() -> Vec<DeviceState> {
        let serial = json!({"ier": 5, "fcr": 0xc1, "lcr": 0x13, "mcr": 8, "msr": 0xb0, "scr": 0, "divisor": 1,
                            "overrun": false, "rx": [65, 66], "tx": []});
        let hpet = json!({"config": 3, "status": 0, "counter": 7, "timers": [{"config": 0x104, "comparator": 9}]});
        let of = |path: &str, schema: &str, fields| DeviceState { path: path.into(), schema: schema.into(), fields };
        vec![
            of("/machine/serial.0", "ns16550a", Ok(serial)),
            of("/machine/hpet", "hpet", Ok(hpet)),
            of("/machine/x", "new", Ok(json!({"deep": {"er": [{"a": 1}, {"a": null}]}, "long": vec![0; 100]}))),
            of("/machine/y", "worse", Err("no".to_owned())),
        ]
    }

    #[test]
    fn names_of_the_manual() {
        let text = show("serial", &devices()).unwrap();
        assert!(text.contains("IER              0x5 ELSI ERBFI\n"), "{text}");
        assert!(text.contains("LCR              0x13 EPS WLS=0x3\n"), "{text}");
        assert!(text.contains("rx                               41 42\n"), "{text}");
        assert!(!text.contains("ier "), "not twice: {text}");
        let text = show("/machine/hpet", &devices()).unwrap();
        assert!(text.contains("T0_CONFIG        0x104 T0_32MODE_CNF T0_INT_ENB_CNF"), "{text}");
    }

    #[test]
    fn what_is_not_known() {
        let text = show("x", &devices()).unwrap();
        assert!(text.contains("deep/er/1/a                      none\n") && text.contains("(100 in all)"), "{text}");
        assert!(show("y", &devices()).unwrap().contains("cannot be shown: no"));
        assert!(show("serail", &devices()).unwrap_err().contains("did you mean /machine/serial.0?"));
        assert!(show("", &devices()).unwrap_err().contains("info devices"));
        assert!(list(&devices()).contains("HPET"));
    }
}
