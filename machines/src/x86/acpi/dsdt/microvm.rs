//! The `microvm` board: virtio-mmio devices, the Generic Event Device, the power button.

use acpi_tables::aml::{FieldAccessType, Notify, OpRegionSpace};

use super::super::Microvm;
use super::super::aml::{self, Arg, Code, Local};
use super::{isa, memory};

/// Bytes of one virtio-mmio device's registers.
const VIRTIO_LEN: u32 = 0x200;
/// The power button's bit in the event register.
const POWER_BUTTON: u64 = 1 << 1;
/// "S0 power button pressed" (§5.6.6, table 5.169).
const PRESSED: u64 = 0x80;

pub fn devices(m: &Microvm) -> Vec<Code> {
    let mut out = Vec::new();
    if m.serial {
        out.push(isa::serial(1));
    }
    if m.rtc {
        out.push(isa::rtc());
    }
    if m.fw_cfg {
        out.push(isa::fw_cfg());
    }
    out.push(aml::device("PWRB", &[aml::hid("PNP0C0C"), aml::named("_UID", &aml::number(0))]));
    out.push(event_device(m));
    out.extend((0..).zip(&m.virtio).map(|(i, (base, irq))| virtio(i, *base, *irq)));
    out
}

fn virtio(index: u64, base: u64, irq: u32) -> Code {
    let crs = aml::resources(&[memory(base as u32, VIRTIO_LEN), aml::interrupts(false, &[irq])]);
    let parts = [
        aml::hid("LNRO0005"),
        aml::named("_UID", &aml::number(index)),
        aml::named("_CCA", &aml::number(1)),
        aml::named("_CRS", &crs),
    ];
    aml::device(&format!("VR{index:02}"), &parts)
}

/// The Generic Event Device (§5.6.9): one interrupt, a register that says what happened.
fn event_device(m: &Microvm) -> Code {
    let crs = aml::resources(&[aml::edge_interrupt(m.ged_irq)]);
    let register = aml::region(
        "EREG",
        OpRegionSpace::SystemMemory,
        (m.ged_event, 4),
        FieldAccessType::DWord,
        &[(Some("ESEL"), 32)],
    );
    let pressed = Code::of(&Notify::new(&aml::name("PWRB"), &aml::number(PRESSED)));
    let event = aml::method(
        "_EVT",
        1,
        &[
            // Reading clears it.
            aml::store(&Local(0), &aml::name("ESEL")),
            aml::if_(
                &aml::equal(&Arg(0), &aml::number(m.ged_irq.into())),
                &[aml::if_(&aml::and(&Local(0), &aml::number(POWER_BUTTON)), &[pressed])],
            ),
        ],
    );
    let uid = aml::named("_UID", &aml::number(0));
    aml::device("GED_", &[aml::hid("ACPI0013"), uid, aml::named("_CRS", &crs), register, event])
}
