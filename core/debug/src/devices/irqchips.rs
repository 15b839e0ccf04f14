//! Interrupt controllers: what is pending, in service, enabled, and where it goes.

use serde_json::Value;

use super::{DeviceState, number};

type Show = fn(&Value, &mut String);

const CHIPS: &[(&str, Show)] =
    &[("riscv-plic", plic), ("riscv-aclint", aclint), ("i8259", i8259), ("ioapic", ioapic), ("lapic", lapics)];

/// All interrupt controllers of a machine.
///
/// # Errors
/// It has none whose state is known.
pub fn irqchips(devices: &[DeviceState]) -> Result<String, String> {
    let mut out = String::new();
    for device in devices {
        let Some((_, show)) = CHIPS.iter().find(|(schema, _)| *schema == device.schema) else { continue };
        out.push_str(&format!("{} ({})\n", device.path, device.schema));
        match &device.fields {
            Ok(fields) => show(fields, &mut out),
            Err(why) => out.push_str(&format!("its state cannot be shown: {why}\n")),
        }
    }
    if out.is_empty() { Err("this machine has no interrupt controller; see: info devices".to_owned()) } else { Ok(out) }
}

fn get(fields: &Value, name: &str) -> u64 {
    fields.get(name).and_then(number).unwrap_or(0)
}

fn array(fields: &Value, name: &str) -> Vec<u64> {
    fields.get(name).and_then(Value::as_array).map_or(Vec::new(), |all| all.iter().filter_map(number).collect())
}

/// The set bits of words of 32, as numbers.
fn bits(words: &[u64]) -> String {
    let all =
        words.iter().enumerate().flat_map(|(i, w)| (0..32).filter(move |b| w >> b & 1 != 0).map(move |b| 32 * i + b));
    let all: Vec<String> = all.map(|n| n.to_string()).collect();
    if all.is_empty() { "none".to_owned() } else { all.join(" ") }
}

/// `5-9=1` for each run of equal values that are not 0.
fn runs(values: &[u64]) -> Vec<String> {
    let (mut out, mut at) = (Vec::new(), 0);
    for run in values.chunk_by(|a, b| a == b) {
        match (run[0], run.len()) {
            (0, _) => {}
            (value, 1) => out.push(format!("{at}={value}")),
            (value, n) => out.push(format!("{at}-{}={value}", at + n - 1)),
        }
        at += run.len();
    }
    out
}

fn plic(s: &Value, out: &mut String) {
    out.push_str(&format!("  pending  {}\n  claimed  {}\n", bits(&array(s, "pending")), bits(&array(s, "claimed"))));
    out.push_str(&format!("  inputs   {}\n", bits(&array(s, "level"))));
    let priorities = runs(&array(s, "priority"));
    out.push_str(&format!(
        "  priority {}\n",
        if priorities.is_empty() { "all 0".to_owned() } else { priorities.join(" ") }
    ));
    let enable = s.get("enable").and_then(Value::as_array).cloned().unwrap_or_default();
    for (context, (words, threshold)) in enable.iter().zip(array(s, "threshold")).enumerate() {
        let words: Vec<u64> = words.as_array().map_or(Vec::new(), |w| w.iter().filter_map(number).collect());
        out.push_str(&format!("  context {context}: threshold {threshold}, enabled {}\n", bits(&words)));
    }
}

fn aclint(s: &Value, out: &mut String) {
    for (hart, (msip, cmp)) in array(s, "msip").into_iter().zip(array(s, "mtimecmp")).enumerate() {
        out.push_str(&format!("  hart {hart}: msip {msip}, mtimecmp {cmp:#x}\n"));
    }
}

fn i8259(s: &Value, out: &mut String) {
    for chip in ["master", "slave"] {
        let Some(c) = s.get(chip) else { continue };
        let (lines, edges, elcr) = (get(c, "lines"), get(c, "edges"), get(c, "elcr"));
        // Level-triggered inputs request while they are high, others once for each edge.
        let irr = lines & elcr | edges;
        out.push_str(&format!(
            "  {chip:<6} IRR {irr:02x} ISR {:02x} IMR {:02x} ELCR {elcr:02x} vectors from {:#x}{}{}\n",
            get(c, "isr"),
            get(c, "imr"),
            get(c, "base"),
            if get(c, "auto_eoi") != 0 { " AEOI" } else { "" },
            if get(c, "initialised") != 0 { "" } else { " (not initialised)" },
        ));
    }
}

/// Delivery modes of messages (82093AA 3.2.4; SDM volume 3 section 11.5.1: the same).
const DELIVERY: [&str; 8] = ["Fixed", "LowestPriority", "SMI", "reserved", "NMI", "INIT", "StartUp", "ExtINT"];

fn entry(e: u64) -> String {
    let flag = |bit: u32, on: &'static str, off: &'static str| if e >> bit & 1 != 0 { on } else { off };
    format!(
        "vector {:#04x} {} {} {} {} to {} {:#04x}{}{}",
        e & 0xff,
        DELIVERY[(e >> 8 & 7) as usize],
        flag(15, "level", "edge"),
        flag(13, "low", "high"),
        flag(16, "masked", "enabled"),
        flag(11, "logical", "physical"),
        e >> 56,
        flag(14, " RemoteIRR", ""),
        flag(12, " SendPending", ""),
    )
}

fn ioapic(s: &Value, out: &mut String) {
    out.push_str(&format!("  IOAPICID {:#x}, inputs {}\n", get(s, "id"), bits(&[get(s, "lines")])));
    let all = array(s, "redirection");
    for (pin, e) in all.iter().enumerate().filter(|(_, e)| **e != 1 << 16) {
        out.push_str(&format!("  IOREDTBL[{pin}] {e:016x} {}\n", entry(*e)));
    }
    let idle = all.iter().filter(|e| **e == 1 << 16).count();
    if idle != 0 {
        out.push_str(&format!("  the other {idle} are masked and empty\n"));
    }
}

fn lapics(s: &Value, out: &mut String) {
    const LVT: [&str; 7] = ["CMCI", "Timer", "Thermal", "Performance", "LINT0", "LINT1", "Error"];
    const TIMER: [&str; 4] = ["one-shot", "periodic", "TSC-deadline", "reserved"];
    let apics = s.get("apics").and_then(Value::as_array).cloned().unwrap_or_default();
    for (vcpu, a) in apics.iter().enumerate() {
        let base = get(a, "apic_base");
        let mode = match base >> 10 & 3 {
            3 => "x2APIC",
            2 => "xAPIC",
            _ => "off",
        };
        let svr = get(a, "svr");
        let enabled = if svr & 0x100 != 0 { "" } else { ", disabled by software" };
        out.push_str(&format!("  vCPU {vcpu}: id {:#x}, {mode} at {:#x}{enabled}\n", get(a, "id"), base & !0xfff));
        out.push_str(&format!(
            "    TPR {:#04x} LDR {:#x} DFR {:#x} SVR {svr:#x} ESR {:#x} ICR {:#x}\n",
            get(a, "tpr"),
            get(a, "ldr"),
            get(a, "dfr"),
            get(a, "esr"),
            get(a, "icr")
        ));
        for (name, field) in [("ISR", "isr"), ("IRR", "irr"), ("TMR", "tmr")] {
            out.push_str(&format!("    {name} {}\n", bits(&array(a, field))));
        }
        for (name, lvt) in LVT.iter().zip(array(a, "lvt")) {
            let masked = if lvt >> 16 & 1 != 0 { " masked" } else { "" };
            let timer = if *name == "Timer" { format!(" {}", TIMER[(lvt >> 17 & 3) as usize]) } else { String::new() };
            let delivery = DELIVERY[(lvt >> 8 & 7) as usize];
            out.push_str(&format!(
                "    LVT {name:<11} {lvt:#07x} vector {:#04x} {delivery}{timer}{masked}\n",
                lvt & 0xff
            ));
        }
        out.push_str(&format!(
            "    timer: initial count {:#x}, current {:#x}, divide configuration {:#x}, IA32_TSC_DEADLINE {:#x}\n",
            get(a, "timer_initial"),
            get(a, "timer_current"),
            get(a, "timer_divide"),
            get(a, "tsc_deadline")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mimus_arch::x86::irqchip::{IoApicState, LapicState, LapicsState, PicState};
    use serde_json::json;

    fn of(schema: &str, fields: Value) -> DeviceState {
        DeviceState { path: format!("/machine/{schema}"), schema: schema.to_owned(), fields: Ok(fields) }
    }

    #[test]
    fn of_a_pc() {
        let (mut pic, mut io, mut apic) = (PicState::reset(), IoApicState::reset(), LapicState::reset(3));
        (pic.master.edges, pic.master.base, pic.master.imr) = (1, 0x30, 0xfe);
        io.redirection[4] = 0x0100_0000_0000_a921;
        (apic.irr[7], apic.lvt[1]) = (1 << 12, 0x400ec);
        let all = [
            of("i8259", serde_json::to_value(&pic).unwrap()),
            of("ioapic", serde_json::to_value(&io).unwrap()),
            of("lapic", serde_json::to_value(LapicsState { apics: vec![apic] }).unwrap()),
            of("hpet", json!({})),
        ];
        let text = irqchips(&all).unwrap();
        for line in [
            "master IRR 01 ISR 00 IMR fe ELCR 00 vectors from 0x30 (not initialised)",
            "IOREDTBL[4] 010000000000a921 vector 0x21 LowestPriority level low enabled to logical 0x01",
            "the other 23 are masked and empty",
            "vCPU 0: id 0x3, xAPIC at 0xfee00000, disabled by software",
            "IRR 236\n",
            "LVT Timer       0x400ec vector 0xec Fixed TSC-deadline\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(!text.contains("hpet"));
    }

    #[test]
    fn of_a_riscv_board() {
        let plic = json!({"priority": [0, 1, 0, 7, 7], "pending": [8], "claimed": [2], "level": [8],
                          "enable": [[0], [10]], "threshold": [0, 1]});
        let text = irqchips(&[of("riscv-plic", plic), of("riscv-aclint", json!({"msip": [true], "mtimecmp": [255]}))]);
        let text = text.unwrap();
        for line in [
            "pending  3\n",
            "claimed  1\n",
            "priority 1=1 3-4=7\n",
            "context 1: threshold 1, enabled 1 3\n",
            "hart 0: msip 1, mtimecmp 0xff",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    /// States of any shape are no reason to panic.
    #[test]
    fn of_nonsense() {
        for (schema, _) in CHIPS {
            for fields in [
                json!(null),
                json!([1, 2]),
                json!({"apics": 3, "enable": {}, "threshold": [-1]}),
                json!({"apics": [null]}),
            ] {
                assert!(irqchips(&[of(schema, fields)]).is_ok());
            }
        }
        assert!(irqchips(&[]).unwrap_err().contains("info devices"));
    }
}
