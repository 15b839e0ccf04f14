//! ACPI tables of PCs.
//!
//! Spec: ACPI 6.5; sections are named where they matter. Two shapes: full hardware (the
//! `pc` and `q35` boards) and hardware-reduced with a Generic Event Device (`microvm`).
//!
//! * [`table`] is what tables are made of and how they are placed.
//! * [`fixed`] has the tables of fixed layout.
//! * [`aml`] are small pieces of AML, [`dsdt`] the definition blocks made of them.
//! * [`loader`] hands the tables to firmware.

pub mod aml;
pub mod dsdt;
pub mod fixed;
pub mod loader;
pub mod table;

pub use table::TableSet;

/// Address of the first I/O APIC.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Address of the local APICs.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// What is written to the Generic Event Device's reset register.
pub const GED_RESET_VALUE: u8 = 0x42;
/// SLP_TYP of S5 at the Generic Event Device.
pub const GED_S5: u8 = 5;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// APIC ids of the processors, in order.
    pub apic_ids: Vec<u32>,
    /// The rest, by kind of board.
    pub platform: Platform,
}

/// A kind of board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platform {
    /// Hardware-reduced, virtio-mmio.
    Microvm(Microvm),
    /// With a south bridge and PCI.
    Pc(Pc),
}

/// A window of addresses: base and length in bytes.
pub type Window = (u64, u64);

/// The `microvm` board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Microvm {
    /// The Generic Event Device's event register.
    pub ged_event: u64,
    /// Its sleep control, sleep status and reset registers.
    pub ged_registers: u64,
    /// Its interrupt.
    pub ged_irq: u32,
    /// The virtio-mmio devices: address of 512 bytes, interrupt.
    pub virtio: Vec<(u64, u32)>,
    /// There is a CMOS clock.
    pub rtc: bool,
    /// There is a serial port COM1.
    pub serial: bool,
    /// There is a fw_cfg device.
    pub fw_cfg: bool,
}

/// How guests turn ACPI on through the south bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmiCommand {
    /// The port.
    pub port: u16,
    /// What turns ACPI on.
    pub acpi_enable: u8,
    /// What turns it off.
    pub acpi_disable: u8,
}

/// Which chips make a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chipset {
    /// 440FX and PIIX3.
    I440fx,
    /// Q35 and ICH9.
    Q35,
}

/// SLP_TYP of S3, S4 and S5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SleepStates {
    /// With memory kept.
    pub ram: u8,
    /// Saved to disk by the system itself.
    pub disk: u8,
    /// Soft-off.
    pub off: u8,
}

impl SleepStates {
    /// What firmware is told in `etc/system-states`: a byte for each of S0 to S5, bit 7 if it is there.
    pub fn packed(self) -> [u8; 6] {
        const THERE: u8 = 0x80;
        [THERE, 0, 0, THERE | self.ram, THERE | self.disk, THERE | self.off]
    }
}

/// A `pc` or `q35` board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pc {
    /// The chips.
    pub chipset: Chipset,
    /// First port of the power management block.
    pub pm_base: u16,
    /// First port of the general purpose event block.
    pub gpe0: u16,
    /// Its length in bytes.
    pub gpe0_len: u8,
    /// The SCI's interrupt.
    pub sci: u8,
    /// How ACPI is turned on; `None` if it is on already.
    pub smi: Option<SmiCommand>,
    /// ISA interrupts that PCI may use, which are level-triggered.
    pub level_irqs: Vec<u8>,
    /// PCI memory window below 4 GiB.
    pub mmio32: Window,
    /// PCI memory window above 4 GiB.
    pub mmio64: Option<Window>,
    /// PCI Express configuration space and its buses.
    pub ecam: Option<(u64, u32)>,
    /// The HPET: address and the low half of its capability register.
    pub hpet: Option<(u64, u32)>,
    /// Serial ports present of COM1 and COM2.
    pub serials: [bool; 2],
    /// There is an 8042.
    pub i8042: bool,
    /// SLP_TYP of the sleep states there are, by number.
    pub sleep: SleepStates,
}

/// Builds the tables.
pub fn build(config: &Config) -> TableSet {
    let mut set = TableSet::default();
    let facs = match config.platform {
        Platform::Microvm(_) => None,
        Platform::Pc(_) => Some(set.add_raw(&fixed::facs())),
    };
    let dsdt = set.add_linked(dsdt::build(config));
    let fadt = set.add(fixed::fadt(config));
    if let Some(facs) = facs {
        set.link(fadt + fixed::fadt::FIRMWARE_CTRL, 4, facs);
        set.set_facs(facs);
    }
    set.link(fadt + fixed::fadt::DSDT, 4, dsdt);
    set.link(fadt + fixed::fadt::X_DSDT, 8, dsdt);
    set.add(fixed::madt(config));
    if let Platform::Pc(p) = &config.platform {
        if let Some((base, id)) = p.hpet {
            set.add(fixed::hpet(base, id));
        }
        if let Some((base, buses)) = p.ecam {
            set.add(fixed::mcfg(base, buses));
        }
        set.add(fixed::waet());
    }
    set.finish()
}

#[cfg(test)]
pub(crate) mod tests;
