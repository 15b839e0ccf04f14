//! The tables of fixed layout: FADT, FACS, MADT, MCFG, HPET, WAET.
//!
//! Spec: ACPI 6.5 §5.2.9 (FADT), §5.2.10 (FACS), §5.2.12 (MADT); PCI Firmware 3.3
//! §4.1.2 (MCFG); IA-PC HPET 1.0a §3.2.4 (HPET); Microsoft, "Windows ACPI Emulated
//! Devices Table" (WAET).

use mimus_devices::pci::host_bridge::config_ports;

use super::table::{Gas, Table};
use super::{Config, IOAPIC_BASE, LAPIC_BASE, Platform};

/// Offsets in the FADT of the fields that point to other tables.
pub mod fadt {
    /// FACS, 32 bits.
    pub const FIRMWARE_CTRL: usize = 36;
    /// DSDT, 32 bits.
    pub const DSDT: usize = 40;
    /// DSDT, 64 bits.
    pub const X_DSDT: usize = 140;
}

/// IAPC_BOOT_ARCH: there are devices on the ISA bus.
const LEGACY_DEVICES: u16 = 1 << 0;
/// There is an 8042.
const HAS_8042: u16 = 1 << 1;
/// No VGA to probe for.
const NO_VGA: u16 = 1 << 2;
/// No PCI Express ASPM.
const NO_ASPM: u16 = 1 << 4;

/// WBINVD works.
const WBINVD: u32 = 1 << 0;
/// C1 on all processors.
const PROC_C1: u32 = 1 << 2;
/// The power button is not a fixed one.
const PWR_BUTTON: u32 = 1 << 4;
/// Nor the sleep button.
const SLP_BUTTON: u32 = 1 << 5;
/// RESET_REG can be used.
const RESET_REG_SUP: u32 = 1 << 10;
/// There is a clock from the platform that should be preferred (HPET, PM timer).
const USE_PLATFORM_CLOCK: u32 = 1 << 15;
/// Hardware-reduced ACPI.
const HW_REDUCED: u32 = 1 << 20;

/// Bytes of FADT 6.5.
const FADT_LEN: usize = 276;
const PROFILE_DESKTOP: u8 = 1;

/// The FADT; its pointers are linked by the caller.
pub fn fadt(config: &Config) -> Table {
    match &config.platform {
        Platform::Microvm(m) => reduced(m),
        Platform::Pc(p) => full(p),
    }
}

/// Offset of the century in CMOS, as the RTC keeps it.
const CENTURY: u8 = 0x32;

fn full(p: &super::Pc) -> Table {
    let io = |offset: u16| u32::from(p.pm_base + offset);
    let mut t = Table::new(b"FACP", 6);
    // FIRMWARE_CTRL, DSDT, reserved, Preferred_PM_Profile, SCI_INT
    t.u32(0).u32(0).u8(0).u8(PROFILE_DESKTOP).u16(p.sci.into());
    match p.smi {
        Some(s) => t.u32(s.port.into()).u8(s.acpi_enable).u8(s.acpi_disable),
        None => t.u32(0).u8(0).u8(0),
    };
    // S4BIOS_REQ, PSTATE_CNT, PM1a_EVT, PM1b_EVT, PM1a_CNT, PM1b_CNT, PM2_CNT, PM_TMR
    t.u8(0).u8(0).u32(io(0)).u32(0).u32(io(4)).u32(0).u32(0).u32(io(8));
    // GPE0, GPE1, lengths of PM1_EVT, PM1_CNT, PM2_CNT, PM_TMR, GPE0, GPE1; GPE1 base, CST_CNT
    t.u32(p.gpe0.into()).u32(0).bytes(&[4, 2, 0, 4, p.gpe0_len, 0, 0, 0]);
    // P_LVL2 and P_LVL3 latencies say "not there"; no cache flush; no duty; alarms; century
    t.u16(0xfff).u16(0xfff).u16(0).u16(0).bytes(&[0, 0, 0, 0, CENTURY]);
    t.u16(LEGACY_DEVICES | HAS_8042 | NO_ASPM).u8(0);
    t.u32(WBINVD | PROC_C1 | SLP_BUTTON | RESET_REG_SUP | USE_PLATFORM_CLOCK);
    reset_reg(&mut t, Gas::io(config_ports::RESET_PORT, 8), config_ports::RESET_VALUE);
    // X_FIRMWARE_CTRL stays 0: only one of the two may be used. X_DSDT.
    t.u64(0).u64(0);
    let x = |offset, bits| Gas::io(p.pm_base + offset, bits);
    t.gas(x(0, 32)).gas(Gas::NONE).gas(x(4, 16)).gas(Gas::NONE).gas(Gas::NONE).gas(x(8, 32));
    t.gas(Gas::io(p.gpe0, p.gpe0_len * 8)).gas(Gas::NONE);
    finish(t, Gas::NONE, Gas::NONE)
}

fn reduced(m: &super::Microvm) -> Table {
    let mut t = Table::new(b"FACP", 6);
    t.u32(0).u32(0).u8(0).u8(PROFILE_DESKTOP);
    // No fixed hardware: zero up to IAPC_BOOT_ARCH (§5.2.9, "HW_REDUCED_ACPI").
    t.bytes(&[0; 109 - 46]);
    t.u16(LEGACY_DEVICES | NO_VGA).u8(0);
    t.u32(WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HW_REDUCED);
    let register = |offset| Gas::memory_byte(m.ged_registers + offset);
    reset_reg(&mut t, register(2), super::GED_RESET_VALUE);
    t.u64(0).u64(0);
    for _ in 0..8 {
        t.gas(Gas::NONE);
    }
    finish(t, register(0), register(1))
}

/// RESET_REG, RESET_VALUE, ARM_BOOT_ARCH, minor version.
fn reset_reg(t: &mut Table, register: Gas, value: u8) {
    t.gas(register).u8(value).u16(0).u8(5);
}

fn finish(mut t: Table, sleep_control: Gas, sleep_status: Gas) -> Table {
    t.gas(sleep_control).gas(sleep_status).bytes(b"MIMUS\0\0\0");
    assert_eq!(t.size(), FADT_LEN);
    t
}

/// Where in the FACS a system that goes to sleep writes the address at which it wants to wake.
pub const FACS_WAKING_VECTOR: u64 = 12;

/// The FACS.
pub fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

/// Polarity active high (1), trigger mode level (3).
const LEVEL_HIGH: u16 = 0xd;
/// As the bus has it.
const CONFORMS: u16 = 0;
/// Largest APIC id of the entries for xAPIC.
const XAPIC_MAX: u32 = 254;
/// Enabled.
const LAPIC_ENABLED: u32 = 1;
/// Has a PIC besides.
const PCAT_COMPAT: u32 = 1;
/// APIC id of all processors, and LINT1, in NMI entries.
const ALL_PROCESSORS: u8 = 0xff;

/// The MADT.
pub fn madt(config: &Config) -> Table {
    let mut t = Table::new(b"APIC", 5);
    t.u32(LAPIC_BASE).u32(PCAT_COMPAT);
    for (uid, id) in (0..).zip(&config.apic_ids) {
        if *id <= XAPIC_MAX {
            t.bytes(&[0, 8, uid as u8, *id as u8]).u32(LAPIC_ENABLED);
        } else {
            t.bytes(&[9, 16, 0, 0]).u32(*id).u32(LAPIC_ENABLED).u32(uid);
        }
    }
    t.bytes(&[1, 12, 0, 0]).u32(IOAPIC_BASE).u32(0);
    for (irq, gsi, flags) in overrides(config) {
        t.bytes(&[2, 10, 0, irq]).u32(gsi).u16(flags);
    }
    t.bytes(&[4, 6, ALL_PROCESSORS]).u16(CONFORMS).u8(1);
    if config.apic_ids.iter().any(|id| *id > XAPIC_MAX) {
        t.bytes(&[10, 12]).u16(CONFORMS).u32(u32::MAX).bytes(&[1, 0, 0, 0]);
    }
    t
}

/// Interrupts whose input is another than their number, or which are not edge-triggered.
fn overrides(config: &Config) -> Vec<(u8, u32, u16)> {
    // The 8254 is wired to input 2, since 0 is the PIC's.
    let mut out = vec![(0, 2, CONFORMS)];
    if let Platform::Pc(p) = &config.platform {
        let mut level = p.level_irqs.clone();
        level.push(p.sci);
        level.sort_unstable();
        level.dedup();
        out.extend(level.into_iter().map(|irq| (irq, u32::from(irq), LEVEL_HIGH)));
    }
    out
}

/// The MCFG for one segment's configuration space of `buses` buses at `base`.
pub fn mcfg(base: u64, buses: u32) -> Table {
    let mut t = Table::new(b"MCFG", 1);
    t.u64(0).u64(base).u16(0).u8(0).u8((buses - 1) as u8).u32(0);
    t
}

/// The HPET table. `id` is the low half of the timer's capability register.
pub fn hpet(base: u64, id: u32) -> Table {
    let mut t = Table::new(b"HPET", 1);
    // Number 0, shortest periodic tick that loses none, no page protection.
    t.u32(id).gas(Gas::memory(base, 64)).u8(0).u16(100).u8(0);
    t
}

/// The WAET: RTC interrupts need no re-read of register C, the PM timer one read only.
pub fn waet() -> Table {
    let mut t = Table::new(b"WAET", 1);
    t.u32(1 << 0 | 1 << 1);
    t
}
