//! PCI: the host bridge with its windows, interrupt routing, the south bridge.

use acpi_tables::aml::{AddressSpace, AddressSpaceCacheable, EISAName, Else, FieldAccessType, OpRegionSpace, Uuid};

use mimus_devices::pci::host_bridge::{i440fx, q35};

use super::super::aml::{self, Aml, Arg, Code, Local};
use super::super::{Chipset, Pc};
use super::isa;

/// Devices on the root bus.
const SLOTS: u8 = 32;
/// First input of the I/O APIC that PCI interrupts are wired to on Q35.
const APIC_PIRQ: u64 = 16;
/// A PIRQ route register's "not routed" bit.
const ROUTE_DISABLED: u64 = 0x80;

/// `\_PIC`, by which the system says how it takes interrupts (§5.8.1).
pub fn interrupt_model() -> Code {
    let model = aml::named("\\PICM", &aml::number(0));
    let pic = aml::method("\\_PIC", 1, &[aml::store(&aml::name("\\PICM"), &Arg(0))]);
    Code::join(&[model, pic])
}

/// Host bridge and interrupt links.
pub fn devices(p: &Pc) -> Vec<Code> {
    let mut out = vec![host_bridge(p)];
    out.extend(link_methods());
    let links = match p.chipset {
        Chipset::I440fx => 4,
        Chipset::Q35 => 8,
    };
    out.extend((0..links).map(|i| link(p, i)));
    if p.chipset == Chipset::I440fx {
        out.push(sci_link(p));
    }
    out
}

fn host_bridge(p: &Pc) -> Code {
    let mut parts = Vec::new();
    match p.chipset {
        Chipset::I440fx => parts.push(aml::hid("PNP0A03")),
        Chipset::Q35 => {
            parts.extend([aml::hid("PNP0A08"), aml::named("_CID", &EISAName::new("PNP0A03")), osc()]);
        }
    }
    parts.push(aml::named("_UID", &aml::number(0)));
    parts.push(aml::named("_BBN", &aml::number(0)));
    parts.push(aml::named("_CRS", &windows(p)));
    parts.push(routing(p));
    parts.push(south_bridge(p));
    aml::device("PCI0", &parts)
}

/// What the bridge passes on: buses, ports but for its own, memory.
fn windows(p: &Pc) -> Code {
    let code = |part: &dyn Aml| Code::of(part);
    let buses = p.ecam.map_or(256, |e| e.1) as u16;
    let memory32 = |(base, len): (u64, u64)| {
        let last = (base + len - 1) as u32;
        code(&AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, base as u32, last, None))
    };
    let mut out = vec![
        code(&AddressSpace::<u16>::new_bus_number(0, buses - 1)),
        aml::ports(0xcf8, 8),
        code(&AddressSpace::<u16>::new_io(0, 0xcf7, None)),
        code(&AddressSpace::<u16>::new_io(0xd00, 0xffff, None)),
        memory32((0xa_0000, 0x2_0000)),
        memory32(p.mmio32),
    ];
    if let Some((base, len)) = p.mmio64 {
        let last = base + len - 1;
        out.push(code(&AddressSpace::<u64>::new_memory(AddressSpaceCacheable::Cacheable, true, base, last, None)));
    }
    aml::resources(&out)
}

/// `_OSC`: the system may have every PCI Express feature it knows.
fn osc() -> Code {
    const HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    // Hot plug, SHPC, PME, AER, capability structure.
    const CONTROL: u64 = 0x1f;
    const UNKNOWN_REVISION: u64 = 1 << 3;
    const MASKED: u64 = 1 << 4;
    const UNKNOWN_UUID: u64 = 1 << 2;
    let status = aml::name("CDW1");
    let granted = [
        aml::dword_field(&Arg(3), 8, "CDW3"),
        aml::store(&Local(0), &aml::and(&aml::name("CDW3"), &aml::number(CONTROL))),
        Code::of(&acpi_tables::aml::If::new(
            &acpi_tables::aml::NotEqual::new(&Arg(1), &aml::number(1)),
            vec![&aml::set_bits(&status, UNKNOWN_REVISION)],
        )),
        Code::of(&acpi_tables::aml::If::new(
            &acpi_tables::aml::NotEqual::new(&aml::name("CDW3"), &Local(0)),
            vec![&aml::set_bits(&status, MASKED)],
        )),
        aml::store(&aml::name("CDW3"), &Local(0)),
    ];
    let is_bridge = aml::equal(&Arg(0), &Uuid::new(HOST_BRIDGE));
    let refuse = aml::set_bits(&status, UNKNOWN_UUID);
    aml::method(
        "_OSC",
        4,
        &[
            aml::dword_field(&Arg(3), 0, "CDW1"),
            aml::if_(&is_bridge, &granted),
            Code::of(&Else::new(vec![&refuse])),
            aml::return_(&Arg(3)),
        ],
    )
}

/// The link of a pin (0 is INTA) of a device, on the root bus.
pub fn link_of(chipset: Chipset, device: u8, pin: u8) -> u64 {
    let link = match chipset {
        Chipset::I440fx => i440fx::pirq_of(device, pin),
        Chipset::Q35 => q35::pirq_of(device, pin),
    };
    link as u64
}

fn link_name(link: u64) -> String {
    format!("LNK{}", (b'A' + link as u8) as char)
}

/// `_PRT`: by links, or straight to the I/O APIC.
fn routing(p: &Pc) -> Code {
    let row = |device: u8, pin: u8, source: Code, index: u64| {
        let address = u64::from(device) << 16 | 0xffff;
        aml::package(&[aml::number(address), aml::number(pin.into()), source, aml::number(index)])
    };
    let pins = || (0..SLOTS).flat_map(|d| (0..4).map(move |pin| (d, pin)));
    // PIIX4's power management has the SCI on its INTA.
    let sci = |d: u8, pin: u8| p.chipset == Chipset::I440fx && (d, pin) == (1, 0);
    let by_link = pins().map(|(d, pin)| {
        let link = if sci(d, pin) { "LNKS".to_owned() } else { link_name(link_of(p.chipset, d, pin)) };
        row(d, pin, aml::name(&link), 0)
    });
    let by_link = table(by_link.collect());
    if p.chipset == Chipset::I440fx {
        return aml::named("_PRT", &by_link);
    }
    let direct =
        table(pins().map(|(d, pin)| row(d, pin, aml::number(0), APIC_PIRQ + link_of(p.chipset, d, pin))).collect());
    let method = aml::method(
        "_PRT",
        0,
        &[aml::if_(&aml::name("\\PICM"), &[aml::return_(&aml::name("PRTA"))]), aml::return_(&aml::name("PRTL"))],
    );
    Code::join(&[aml::named("PRTL", &by_link), aml::named("PRTA", &direct), method])
}

fn table(rows: Vec<Code>) -> Code {
    aml::package(&rows)
}

/// The ISA bridge, with the registers that route PCI interrupts to the PIC.
fn south_bridge(p: &Pc) -> Code {
    let routes = |first: &[&'static str; 4]| first.map(|n| (Some(n), 8));
    let region = |name: &str, offset: u64, fields: &[(Option<&str>, usize)]| {
        aml::region(name, OpRegionSpace::PCIConfig, (offset, 4), FieldAccessType::Byte, fields)
    };
    let mut parts = Vec::new();
    let address: u64 = match p.chipset {
        Chipset::I440fx => 0x1_0000,
        Chipset::Q35 => 0x1f_0000,
    };
    parts.push(aml::named("_ADR", &aml::number(address)));
    parts.push(region("PIRA", 0x60, &routes(&["RTEA", "RTEB", "RTEC", "RTED"])));
    if p.chipset == Chipset::Q35 {
        parts.push(region("PIRE", 0x68, &routes(&["RTEE", "RTEF", "RTEG", "RTEH"])));
    }
    parts.extend(isa::devices(p));
    aml::device("ISA_", &parts)
}

/// What all links do, given their route register's value: status, current setting.
fn link_methods() -> [Code; 2] {
    let disabled = || aml::and(&Arg(0), &aml::number(ROUTE_DISABLED));
    let status = aml::method(
        "LSTA",
        1,
        &[aml::if_(&disabled(), &[aml::return_(&aml::number(0x9))]), aml::return_(&aml::number(0xb))],
    );
    let setting = aml::method(
        "LCRS",
        1,
        &[
            aml::named("LBUF", &aml::resources(&[aml::interrupts(true, &[0])])),
            aml::dword_field(&aml::name("LBUF"), aml::INTERRUPT_NUMBER, "LNUM"),
            aml::if_(
                &aml::equal(&disabled(), &aml::number(0)),
                &[aml::store(&aml::name("LNUM"), &aml::and(&Arg(0), &aml::number(0xf)))],
            ),
            aml::return_(&aml::name("LBUF")),
        ],
    );
    [status, setting]
}

fn link(p: &Pc, index: u64) -> Code {
    let route = aml::name(&format!("\\_SB_.PCI0.ISA_.RTE{}", (b'A' + index as u8) as char));
    let call = |method: &str| Code::join(&[aml::name(method), route.clone()]);
    let numbers: Vec<u32> = p.level_irqs.iter().map(|n| u32::from(*n)).collect();
    let parts = [
        aml::hid("PNP0C0F"),
        aml::named("_UID", &aml::number(index)),
        aml::named("_PRS", &aml::resources(&[aml::interrupts(true, &numbers)])),
        aml::method("_STA", 0, &[aml::return_(&call("LSTA"))]),
        aml::method("_CRS", 0, &[aml::return_(&call("LCRS"))]),
        aml::method("_DIS", 0, &[aml::set_bits(&route, ROUTE_DISABLED)]),
        aml::method(
            "_SRS",
            1,
            &[aml::dword_field(&Arg(0), aml::INTERRUPT_NUMBER, "LNUM"), aml::store(&route, &aml::name("LNUM"))],
        ),
    ];
    aml::device(&link_name(index), &parts)
}

/// A link that is always the SCI.
fn sci_link(p: &Pc) -> Code {
    let fixed = aml::resources(&[aml::interrupts(true, &[p.sci.into()])]);
    let parts = [
        aml::hid("PNP0C0F"),
        aml::named("_UID", &aml::number(0x10)),
        aml::named("_PRS", &fixed),
        aml::method("_STA", 0, &[aml::return_(&aml::number(0xb))]),
        aml::method("_CRS", 0, &[aml::return_(&aml::name("_PRS"))]),
        aml::method("_DIS", 0, &[]),
        aml::method("_SRS", 1, &[]),
    ];
    aml::device("LNKS", &parts)
}
