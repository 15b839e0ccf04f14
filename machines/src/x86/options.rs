//! Properties of the x86 boards, from `-machine NAME,key=value`.

use mimus_core::accel::IrqChipMode;

use crate::config::keyval::{nearest, parse_size};
use crate::config::{ConfigError, MachineConfig};

/// Which board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `microvm`
    Microvm,
    /// `pc`
    Pc,
    /// `q35`
    Q35,
}

impl Kind {
    /// The name in `-machine`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }
}

/// The properties, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Who runs the interrupt controllers, if it was said.
    pub irqchip: Option<IrqChipMode>,
    /// The guest gets ACPI tables.
    pub acpi: bool,
    /// There is an HPET.
    pub hpet: bool,
    /// There is system management mode, if it was said.
    pub smm: Option<bool>,
    /// There is an 8042.
    pub i8042: bool,
    /// There is a CMOS clock (`microvm`).
    pub rtc: bool,
    /// There is a serial port on the ISA bus (`microvm`).
    pub isa_serial: bool,
    /// The kernel's command line is told of virtio-mmio devices if there is no ACPI (`microvm`).
    pub auto_kernel_cmdline: bool,
    /// Most RAM below 4 GiB, if it was said.
    pub max_ram_below_4g: Option<u64>,
}

/// Properties with an effect, and on which boards.
const ALL: &[Kind] = &[Kind::Microvm, Kind::Pc, Kind::Q35];
const PCS: &[Kind] = &[Kind::Pc, Kind::Q35];
const MICROVM: &[Kind] = &[Kind::Microvm];
const EFFECTIVE: &[(&str, &[Kind])] = &[
    ("kernel-irqchip", ALL),
    ("kernel_irqchip", ALL),
    ("acpi", ALL),
    ("hpet", PCS),
    ("smm", PCS),
    ("i8042", PCS),
    ("max-ram-below-4g", PCS),
    ("rtc", MICROVM),
    ("isa-serial", MICROVM),
    ("auto-kernel-cmdline", MICROVM),
];

/// Properties of QEMU's boards that are here with some values only.
const FIXED: &[(&str, &[&str], &[Kind])] = &[
    ("usb", &["off"], ALL),
    ("vmport", &["off", "auto"], PCS),
    ("sata", &["off"], PCS),
    ("smbus", &["off"], PCS),
    ("nvdimm", &["off"], PCS),
    ("graphics", &["off"], ALL),
    ("mem-merge", &["on", "off"], ALL),
    ("dump-guest-core", &["on", "off"], ALL),
    ("hmat", &["off"], ALL),
    ("pit", &["on", "auto"], ALL),
    ("pic", &["on", "auto"], ALL),
    ("pcie", &["off", "auto"], MICROVM),
    ("ioapic2", &["off", "auto"], MICROVM),
    ("x-option-roms", &["off"], MICROVM),
];

impl Options {
    /// Reads the properties of a board of this kind.
    pub fn parse(kind: Kind, config: &MachineConfig) -> Result<Self, ConfigError> {
        let mut out = Options {
            irqchip: None,
            acpi: true,
            hpet: true,
            smm: None,
            i8042: true,
            rtc: true,
            isa_serial: true,
            auto_kernel_cmdline: true,
            max_ram_below_4g: None,
        };
        for (key, value) in &config.machine.options {
            out.set(kind, key, value)?;
        }
        Ok(out)
    }

    fn set(&mut self, kind: Kind, key: &str, value: &str) -> Result<(), ConfigError> {
        let fail = |reason: String| ConfigError::new("-machine", &format!("{key}={value}"), reason);
        let board = kind.name();
        if let Some((_, values, _)) = FIXED.iter().find(|(k, _, kinds)| *k == key && kinds.contains(&kind)) {
            return match values.contains(&value) {
                true => Ok(()),
                false => Err(fail(format!("the {board} board has only {key}={}", values[0]))),
            };
        }
        if !EFFECTIVE.iter().any(|(k, kinds)| *k == key && kinds.contains(&kind)) {
            let names = EFFECTIVE.iter().filter(|p| p.1.contains(&kind)).map(|p| p.0);
            let near = nearest(key, names.chain(FIXED.iter().map(|f| f.0)));
            let hint = near.map_or(String::new(), |n| format!(" (did you mean {n}?)"));
            return Err(fail(format!("the {board} board has no property '{key}'{hint}")));
        }
        let switch = || match value {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            // Where QEMU decides by itself, the answer is yes here.
            "auto" => Ok(true),
            _ => Err(fail("it is on or off".into())),
        };
        match key {
            "kernel-irqchip" | "kernel_irqchip" => self.irqchip = Some(irqchip(value).map_err(fail)?),
            "acpi" => self.acpi = switch()?,
            "hpet" => self.hpet = switch()?,
            "smm" => self.smm = if value == "auto" { None } else { Some(switch()?) },
            "i8042" => self.i8042 = switch()?,
            "rtc" => self.rtc = switch()?,
            "isa-serial" => self.isa_serial = switch()?,
            "auto-kernel-cmdline" => self.auto_kernel_cmdline = switch()?,
            _ => self.max_ram_below_4g = Some(below_4g(value).map_err(fail)?),
        }
        Ok(())
    }
}

fn irqchip(value: &str) -> Result<IrqChipMode, String> {
    match value {
        "on" => Ok(IrqChipMode::Kernel),
        "split" => Ok(IrqChipMode::Split),
        "off" => Ok(IrqChipMode::User),
        _ => Err("it is on, split or off".into()),
    }
}

fn below_4g(value: &str) -> Result<u64, String> {
    const MOST: u64 = 0xe000_0000;
    let bytes = parse_size(value, 0)?;
    if !(1 << 20..=MOST).contains(&bytes) || bytes % (1 << 20) != 0 {
        return Err("it is whole MiB, from 1M to 3584M".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: Kind, text: &str) -> Result<Options, String> {
        let mut config = MachineConfig::new("x86_64");
        config.machine.options = text
            .split(',')
            .filter(|p| !p.is_empty())
            .map(|p| p.split_once('=').unwrap())
            .map(|(k, v)| (k.into(), v.into()))
            .collect();
        Options::parse(kind, &config).map_err(|e| e.to_string())
    }

    #[test]
    fn values() {
        let o = parse(Kind::Q35, "kernel-irqchip=split,hpet=off,smm=off,max-ram-below-4g=2G").unwrap();
        assert_eq!((o.irqchip, o.hpet, o.max_ram_below_4g), (Some(IrqChipMode::Split), false, Some(2 << 30)));
        assert!(!parse(Kind::Microvm, "acpi=off,pit=on").unwrap().acpi);
        assert_eq!(parse(Kind::Pc, "").unwrap().irqchip, None);
    }

    #[test]
    fn mistakes() {
        for (kind, text, says) in [
            (Kind::Pc, "kernel-irqchip=maybe", "on, split or off"),
            (Kind::Pc, "hpte=on", "did you mean hpet?"),
            (Kind::Microvm, "hpet=on", "has no property 'hpet'"),
            (Kind::Q35, "smm=maybe", "on or off"),
            (Kind::Q35, "usb=on", "only usb=off"),
            (Kind::Pc, "acpi=x", "on or off"),
            (Kind::Pc, "max-ram-below-4g=8G", "3584M"),
        ] {
            let e = parse(kind, text).unwrap_err();
            assert!(e.contains(says), "{says}: {e}");
        }
    }
}
