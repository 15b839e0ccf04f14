//! Devices of the ISA bus.

use super::super::Pc;
use super::super::aml::{self, Code};

/// A serial port: COM1 is number 1.
pub fn serial(number: u8) -> Code {
    let (base, irq) = if number == 1 { (0x3f8, 4) } else { (0x2f8, 3) };
    let crs = aml::resources(&[aml::ports(base, 8), aml::irq(irq)]);
    let uid = aml::named("_UID", &aml::number(number.into()));
    aml::device(&format!("COM{number}"), &[aml::hid("PNP0501"), uid, aml::named("_CRS", &crs)])
}

/// The clock in CMOS.
pub fn rtc() -> Code {
    let crs = aml::resources(&[aml::ports(0x70, 8), aml::irq(8)]);
    aml::device("RTC_", &[aml::hid("PNP0B00"), aml::named("_CRS", &crs)])
}

/// The firmware configuration device; no driver is looked for in Windows (`_STA` without
/// "show").
pub fn fw_cfg() -> Code {
    let crs = aml::resources(&[aml::ports(0x510, 12)]);
    let sta = aml::named("_STA", &aml::number(0xb));
    aml::device("FWCF", &[aml::hid("QEMU0002"), sta, aml::named("_CRS", &crs)])
}

fn keyboard() -> Code {
    let crs = aml::resources(&[aml::ports(0x60, 1), aml::ports(0x64, 1), aml::irq(1)]);
    aml::device("KBD_", &[aml::hid("PNP0303"), aml::named("_CRS", &crs)])
}

fn mouse() -> Code {
    let crs = aml::resources(&[aml::irq(12)]);
    aml::device("MOU_", &[aml::hid("PNP0F13"), aml::named("_CRS", &crs)])
}

/// All devices of a PC's ISA bus.
pub fn devices(p: &Pc) -> Vec<Code> {
    let mut out = vec![rtc(), fw_cfg()];
    if p.i8042 {
        out.extend([keyboard(), mouse()]);
    }
    out.extend((1..).zip(p.serials).filter(|(_, present)| *present).map(|(n, _)| serial(n)));
    out
}
