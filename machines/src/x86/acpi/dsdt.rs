//! The definition block: what the fixed tables cannot say.
//!
//! Spec: ACPI 6.5 §5.6.9 (interrupt-signalled events), §6.2.11 (_OSC), §6.2.13 (_PRT),
//! §7.4.2 (sleep states); PCI Firmware 3.3 §4.5 (_OSC for host bridges); devices'
//! ids from the UEFI Forum's list of PNP ids.

mod isa;
mod microvm;
mod pci;

pub use pci::link_of as pci_link_of;

use super::aml::{self, Code};
use super::table::Table;
use super::{Config, GED_S5, Pc, Platform};

/// The DSDT.
pub fn build(config: &Config) -> Table {
    // Revision 2: integers have 64 bits.
    let mut table = Table::new(b"DSDT", 2);
    let processors = processors(config.apic_ids.len());
    match &config.platform {
        Platform::Microvm(m) => {
            let mut devices = microvm::devices(m);
            devices.push(processors);
            table.bytes(&aml::scope("\\_SB_", &devices).0);
            table.bytes(&sleep_state("\\_S5_", GED_S5).0);
        }
        Platform::Pc(p) => {
            let mut devices = pci::devices(p);
            devices.extend(platform_devices(p));
            devices.push(processors);
            table.bytes(&pci::interrupt_model().0);
            table.bytes(&aml::scope("\\_SB_", &devices).0);
            for (path, slp_typ) in [("\\_S3_", p.sleep.ram), ("\\_S4_", p.sleep.disk), ("\\_S5_", p.sleep.off)] {
                table.bytes(&sleep_state(path, slp_typ).0);
            }
        }
    }
    table
}

/// `_Sx`: SLP_TYPa and SLP_TYPb.
fn sleep_state(path: &str, slp_typ: u8) -> Code {
    let typ = aml::number(slp_typ.into());
    let zero = aml::number(0);
    aml::named(path, &aml::package(&[typ.clone(), typ, zero.clone(), zero]))
}

/// The processors, with the uids the MADT gives them.
fn processors(count: usize) -> Code {
    let one = |uid: usize| {
        let id = [aml::hid("ACPI0007"), aml::named("_UID", &aml::number(uid as u64))];
        aml::device(&format!("C{uid:03X}"), &id)
    };
    let mut parts = vec![aml::hid("ACPI0010")];
    parts.extend((0..count).map(one));
    aml::device("CPUS", &parts)
}

/// What is in memory and at ports outside of PCI.
fn platform_devices(p: &Pc) -> Vec<Code> {
    let mut out = Vec::new();
    if let Some((base, _)) = p.hpet {
        let crs = aml::resources(&[memory(base as u32, 0x400)]);
        out.push(aml::device(
            "HPET",
            &[aml::hid("PNP0103"), aml::named("_UID", &aml::number(0)), aml::named("_CRS", &crs)],
        ));
    }
    // Linux uses the enhanced configuration space only where it is reserved (PCI Firmware
    // 3.3 §4.1.2: by a motherboard resource).
    let mut reserved =
        vec![aml::ports(p.gpe0, p.gpe0_len), memory(super::IOAPIC_BASE, 0x1000), memory(super::LAPIC_BASE, 0x10_0000)];
    reserved.push(aml::ports(p.pm_base, 0x40));
    if let Some((base, buses)) = p.ecam {
        reserved.push(memory(base as u32, buses << 20));
    }
    let crs = aml::named("_CRS", &aml::resources(&reserved));
    out.push(aml::device("RSRC", &[aml::hid("PNP0C02"), aml::named("_UID", &aml::number(1)), crs]));
    out
}

/// Fixed memory that can be written.
fn memory(base: u32, len: u32) -> Code {
    Code::of(&acpi_tables::aml::Memory32Fixed::new(true, base, len))
}
