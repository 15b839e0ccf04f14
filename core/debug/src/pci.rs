//! PCI functions from their configuration space (PCI 3.0 chapter 6): identity, BARs, capabilities.

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// The bus's name, such as `pcie.0`.
    pub bus: String,
    /// Device in bits 7:3, function in bits 2:0.
    pub devfn: u8,
    /// The first 256 bytes of its configuration space.
    pub registers: Vec<u8>,
    /// Bytes that each BAR decodes; 0: there is none.
    pub bars: [u64; 6],
}

impl PciFunction {
    fn number(&self, at: usize, bytes: usize) -> u64 {
        let part = self.registers.get(at..at + bytes).unwrap_or_default();
        part.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    }
}

/// Base classes and sub-classes (appendix D) that are met.
const CLASSES: &[(u64, &str)] = &[
    (0x0100, "SCSI storage controller"),
    (0x0101, "IDE controller"),
    (0x0106, "SATA controller"),
    (0x0108, "NVM controller"),
    (0x0180, "storage controller"),
    (0x0200, "Ethernet controller"),
    (0x0300, "VGA-compatible controller"),
    (0x0380, "display controller"),
    (0x0403, "audio device"),
    (0x0500, "RAM controller"),
    (0x0600, "host bridge"),
    (0x0601, "ISA bridge"),
    (0x0604, "PCI-to-PCI bridge"),
    (0x0680, "bridge"),
    (0x0780, "communication controller"),
    (0x0c03, "USB controller"),
    (0x0c05, "SMBus controller"),
    (0x00ff, "unclassified device"),
];

/// Capabilities by number (appendix H).
const CAPABILITIES: &[(u64, &str)] = &[
    (0x01, "Power Management"),
    (0x05, "MSI"),
    (0x09, "vendor-specific"),
    (0x0a, "Debug Port"),
    (0x0d, "Subsystem ID"),
    (0x10, "PCI Express"),
    (0x11, "MSI-X"),
    (0x12, "SATA"),
    (0x13, "Advanced Features"),
];

fn named(list: &[(u64, &'static str)], number: u64) -> &'static str {
    list.iter().find(|(n, _)| *n == number).map_or("", |(_, name)| name)
}

/// All functions.
pub fn show(functions: &[PciFunction]) -> String {
    if functions.is_empty() {
        return "this machine has no PCI bus\n".to_owned();
    }
    let mut out = String::new();
    let mut bus = "";
    for f in functions {
        if f.bus != bus {
            bus = &f.bus;
            out.push_str(&format!("bus {bus}\n"));
        }
        function(f, &mut out);
    }
    out
}

fn function(f: &PciFunction, out: &mut String) {
    let class = f.number(0x0a, 2);
    out.push_str(&format!(
        "  {:02x}.{} {} [{class:04x}] {:04x}:{:04x} revision {:#x}, subsystem {:04x}:{:04x}\n",
        f.devfn >> 3,
        f.devfn & 7,
        named(CLASSES, class),
        f.number(0, 2),
        f.number(2, 2),
        f.number(8, 1),
        f.number(0x2c, 2),
        f.number(0x2e, 2)
    ));
    let command = f.number(4, 2);
    let names = [(0, "IO"), (1, "Memory"), (2, "BusMaster"), (8, "SERR#"), (10, "InterruptDisable")];
    let set: Vec<&str> = names.iter().filter(|(bit, _)| command >> bit & 1 != 0).map(|(_, name)| *name).collect();
    let pin = match f.number(0x3d, 1) {
        pin @ 1..=4 => format!(", pin INT{}# on line {}", char::from(b'@' + pin as u8), f.number(0x3c, 1)),
        _ => String::new(),
    };
    let set = if set.is_empty() { "(off)".to_owned() } else { set.join(" ") };
    out.push_str(&format!("       Command {command:#06x} {set}, Status {:#06x}{pin}\n", f.number(6, 2)));
    bars(f, command, out);
    capabilities(f, out);
}

fn bars(f: &PciFunction, command: u64, out: &mut String) {
    let mut upper = false;
    for i in 0..6 {
        // The upper half of the one before.
        if std::mem::take(&mut upper) {
            continue;
        }
        let value = f.number(0x10 + 4 * i, 4);
        if f.bars[i] == 0 && value == 0 {
            continue;
        }
        let io = value & 1 != 0;
        let wide = !io && value >> 1 & 3 == 2;
        upper = wide;
        let address = match (io, wide) {
            (true, _) => value & !3,
            (_, true) => value & !0xf | f.number(0x14 + 4 * i, 4) << 32,
            _ => value & !0xf,
        };
        let kind = match (io, wide, value & 8 != 0) {
            (true, ..) => "ports",
            (_, true, true) => "64-bit prefetchable memory",
            (_, true, false) => "64-bit memory",
            (.., true) => "prefetchable memory",
            _ => "memory",
        };
        let decoded = command >> u64::from(!io) & 1 != 0;
        let end = match f.bars[i] {
            0 => String::new(),
            len => format!("-{:#x}", address.wrapping_add(len - 1)),
        };
        let off = if decoded { "" } else { " (not decoded)" };
        out.push_str(&format!("       BAR{i} {kind} at {address:#x}{end}{off}\n"));
    }
}

fn capabilities(f: &PciFunction, out: &mut String) {
    // Status bit 4: there is a list. One that bites its tail ends after as many as there is room for.
    let mut at = if f.number(6, 2) >> 4 & 1 != 0 { f.number(0x34, 1) & !3 } else { 0 };
    for _ in 0..48 {
        if at < 0x40 {
            return;
        }
        let (id, place) = (f.number(at as usize, 1), at as usize);
        let control = f.number(place + 2, 2);
        let more = match id {
            0x05 => format!(": {}", if control & 1 != 0 { "enabled" } else { "off" }),
            0x11 => {
                let (table, pending) = (f.number(place + 4, 4), f.number(place + 8, 4));
                format!(
                    ": {} vectors, {}{}, table in BAR{} at {:#x}, PBA in BAR{} at {:#x}",
                    (control & 0x7ff) + 1,
                    if control >> 15 != 0 { "enabled" } else { "off" },
                    if control >> 14 & 1 != 0 { ", all masked" } else { "" },
                    table & 7,
                    table & !7,
                    pending & 7,
                    pending & !7
                )
            }
            // virtio 1.2, 4.1.4: what of the device is where.
            0x09 if f.number(0, 2) == 0x1af4 => {
                let kinds = ["?", "common configuration", "notifications", "ISR", "device configuration", "PCI access"];
                let kind = kinds.get(f.number(place + 3, 1) as usize).unwrap_or(&"?");
                let (bar, offset) = (f.number(place + 4, 1), f.number(place + 8, 4));
                format!(": virtio {kind} in BAR{bar} at {offset:#x}, {:#x} bytes", f.number(place + 12, 4))
            }
            _ => String::new(),
        };
        out.push_str(&format!("       capability {at:#04x} {} [{id:02x}]{more}\n", named(CAPABILITIES, id)));
        at = f.number(place + 1, 1) & !3;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net() -> PciFunction {
        let mut r = vec![0; 256];
        let mut put = |at: usize, bytes: &[u8]| r[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0xf4, 0x1a, 0x41, 0x10, 6, 4, 0x10, 0, 1, 0, 0, 2]);
        put(0x14, &[0, 0, 0xbf, 0xfe]);
        put(0x20, &[0x0c, 0, 0, 0, 1, 0, 0, 0]);
        put(0x34, &[0x40]);
        put(0x3c, &[11, 1]);
        put(0x40, &[0x11, 0x50, 3, 0x80, 1, 0, 0, 0, 1, 8, 0, 0]);
        put(0x50, &[9, 0x40, 16, 1, 4, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0, 0]);
        PciFunction { bus: "pcie.0".into(), devfn: 0x10, registers: r, bars: [0, 0x1000, 0, 0, 0x4000, 0] }
    }

    #[test]
    fn a_function() {
        let text = show(&[net()]);
        for line in [
            "bus pcie.0\n  02.0 Ethernet controller [0200] 1af4:1041 revision 0x1",
            "Command 0x0406 Memory BusMaster InterruptDisable, Status 0x0010, pin INTA# on line 11\n",
            "BAR1 memory at 0xfebf0000-0xfebf0fff\n",
            "BAR4 64-bit prefetchable memory at 0x100000000-0x100003fff\n",
            "MSI-X [11]: 4 vectors, enabled, table in BAR1 at 0x0, PBA in BAR1 at 0x800\n",
            "virtio common configuration in BAR4 at 0x1000, 0x1000 bytes\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        // Its list of capabilities is a ring.
        assert!(text.lines().count() < 60);
        assert!(show(&[]).contains("no PCI bus"));
    }

    #[test]
    fn registers_of_any_value() {
        for (value, len) in [(0xff, 256), (0x41, 256), (0xff, 3), (0, 0)] {
            show(&[PciFunction { registers: vec![value; len], bars: [u64::MAX; 6], ..net() }]);
        }
    }
}
