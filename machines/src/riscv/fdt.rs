//! The `virt` board's device tree, written beside its map.
//!
//! Spec: Devicetree Specification 0.4; Linux's bindings for each `compatible`.

use vm_fdt::{FdtReserveEntry, FdtWriter, FdtWriterResult};

use super::map;

/// What the tree says beyond the map.
#[derive(Clone, Debug)]
pub struct FdtConfig {
    pub harts: u32,
    /// `riscv,isa`.
    pub isa: String,
    /// Single extensions, for `riscv,isa-extensions`.
    pub extensions: Vec<String>,
    /// `sv39`, `sv48`, `sv57`.
    pub mmu: &'static str,
    pub ram: u64,
    pub bootargs: Option<String>,
    /// Address range of the initrd.
    pub initrd: Option<std::ops::Range<u64>>,
    pub rng_seed: [u8; 32],
    /// Physical memory firmware keeps for itself.
    pub reserved: Option<std::ops::Range<u64>>,
    /// Machine-mode interrupts are wired (false under the built-in SBI, which owns M-mode).
    pub machine_mode: bool,
    pub fw_cfg: bool,
    pub flash: bool,
    pub pcie: bool,
}

const PHANDLE_PLIC: u32 = 1;
const PHANDLE_TEST: u32 = 2;
const PHANDLE_CPU: u32 = 16;

fn phandle_intc(hart: u32) -> u32 {
    PHANDLE_CPU + 64 + hart
}

fn cells(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

fn reg(range: map::Range) -> [u32; 4] {
    let ([a, b], [c, d]) = (cells(range.base), cells(range.size));
    [a, b, c, d]
}

/// The tree as a flattened blob.
///
/// # Errors
/// A string with a NUL in it (the command line's, say).
pub fn build(config: &FdtConfig) -> FdtWriterResult<Vec<u8>> {
    let reserved: Vec<FdtReserveEntry> = Vec::new();
    let mut f = FdtWriter::new_with_mem_reserv(&reserved)?;
    let root = f.begin_node("")?;
    f.property_u32("#address-cells", 2)?;
    f.property_u32("#size-cells", 2)?;
    f.property_string("compatible", "riscv-virtio")?;
    f.property_string("model", "riscv-virtio,qemu")?;
    chosen(&mut f, config)?;
    memory(&mut f, config)?;
    cpus(&mut f, config)?;
    if let Some(r) = &config.reserved {
        let node = f.begin_node("reserved-memory")?;
        f.property_u32("#address-cells", 2)?;
        f.property_u32("#size-cells", 2)?;
        f.property_null("ranges")?;
        let child = f.begin_node(&format!("firmware@{:x}", r.start))?;
        f.property_array_u32("reg", &reg(map::Range { base: r.start, size: r.end - r.start }))?;
        f.property_null("no-map")?;
        f.end_node(child)?;
        f.end_node(node)?;
    }
    power(&mut f)?;
    soc(&mut f, config)?;
    aliases(&mut f)?;
    f.end_node(root)?;
    f.finish()
}

fn chosen(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    let node = f.begin_node("chosen")?;
    f.property_string("stdout-path", &format!("/soc/serial@{:x}", map::UART.base))?;
    if let Some(args) = &config.bootargs {
        f.property_string("bootargs", args)?;
    }
    if let Some(initrd) = &config.initrd {
        f.property_u64("linux,initrd-start", initrd.start)?;
        f.property_u64("linux,initrd-end", initrd.end)?;
    }
    f.property("rng-seed", &config.rng_seed)?;
    f.end_node(node)
}

fn memory(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    let node = f.begin_node(&format!("memory@{:x}", map::DRAM_BASE))?;
    f.property_string("device_type", "memory")?;
    f.property_array_u32("reg", &reg(map::Range { base: map::DRAM_BASE, size: config.ram }))?;
    f.end_node(node)
}

fn cpus(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    let node = f.begin_node("cpus")?;
    f.property_u32("#address-cells", 1)?;
    f.property_u32("#size-cells", 0)?;
    f.property_u32("timebase-frequency", map::TIMEBASE)?;
    for hart in 0..config.harts {
        let cpu = f.begin_node(&format!("cpu@{hart:x}"))?;
        f.property_string("device_type", "cpu")?;
        f.property_u32("reg", hart)?;
        f.property_string("status", "okay")?;
        f.property_string("compatible", "riscv")?;
        f.property_string("riscv,isa", &config.isa)?;
        f.property_string("riscv,isa-base", "rv64i")?;
        f.property_string_list("riscv,isa-extensions", config.extensions.clone())?;
        f.property_string("mmu-type", &format!("riscv,{}", config.mmu))?;
        f.property_u32("riscv,cbom-block-size", 64)?;
        f.property_u32("riscv,cboz-block-size", 64)?;
        f.property_phandle(PHANDLE_CPU + hart)?;
        let intc = f.begin_node("interrupt-controller")?;
        f.property_u32("#interrupt-cells", 1)?;
        f.property_null("interrupt-controller")?;
        f.property_string("compatible", "riscv,cpu-intc")?;
        f.property_phandle(phandle_intc(hart))?;
        f.end_node(intc)?;
        f.end_node(cpu)?;
    }
    let map_node = f.begin_node("cpu-map")?;
    let cluster = f.begin_node("cluster0")?;
    for hart in 0..config.harts {
        let core = f.begin_node(&format!("core{hart}"))?;
        f.property_u32("cpu", PHANDLE_CPU + hart)?;
        f.end_node(core)?;
    }
    f.end_node(cluster)?;
    f.end_node(map_node)?;
    f.end_node(node)
}

fn power(f: &mut FdtWriter) -> FdtWriterResult<()> {
    use mimus_devices::misc::syscon::{POWER_OFF, RESET};
    for (name, compatible, value) in [("poweroff", "syscon-poweroff", POWER_OFF), ("reboot", "syscon-reboot", RESET)] {
        let node = f.begin_node(name)?;
        f.property_string("compatible", compatible)?;
        f.property_u32("regmap", PHANDLE_TEST)?;
        f.property_u32("offset", 0)?;
        f.property_u32("value", value)?;
        f.end_node(node)?;
    }
    Ok(())
}

fn soc(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    let node = f.begin_node("soc")?;
    f.property_u32("#address-cells", 2)?;
    f.property_u32("#size-cells", 2)?;
    f.property_string("compatible", "simple-bus")?;
    f.property_null("ranges")?;
    interrupt_controllers(f, config)?;
    let test = f.begin_node(&format!("test@{:x}", map::TEST.base))?;
    f.property_array_u32("reg", &reg(map::TEST))?;
    f.property_string_list("compatible", vec!["sifive,test1".into(), "sifive,test0".into(), "syscon".into()])?;
    f.property_phandle(PHANDLE_TEST)?;
    f.end_node(test)?;
    device(f, "rtc", map::RTC, "google,goldfish-rtc", Some(map::IRQ_RTC), |_| Ok(()))?;
    device(f, "serial", map::UART, "ns16550a", Some(map::IRQ_UART), |f| f.property_u32("clock-frequency", 3_686_400))?;
    for slot in (0..map::VIRTIO_SLOTS).rev() {
        let at = map::Range { base: map::VIRTIO.base + u64::from(slot) * map::VIRTIO.size, ..map::VIRTIO };
        device(f, "virtio_mmio", at, "virtio,mmio", Some(map::IRQ_VIRTIO + slot), |_| Ok(()))?;
    }
    if config.fw_cfg {
        device(f, "fw-cfg", map::FW_CFG, "qemu,fw-cfg-mmio", None, |f| f.property_null("dma-coherent"))?;
    }
    if config.pcie {
        pcie(f, config)?;
    }
    f.end_node(node)?;
    if config.flash {
        let flash = f.begin_node(&format!("flash@{:x}", map::FLASH.base))?;
        let bank = map::FLASH.size / 2;
        let first = reg(map::Range { base: map::FLASH.base, size: bank });
        let second = reg(map::Range { base: map::FLASH.base + bank, size: bank });
        f.property_string("compatible", "cfi-flash")?;
        f.property_array_u32("reg", &[first, second].concat())?;
        f.property_u32("bank-width", 4)?;
        f.end_node(flash)?;
    }
    Ok(())
}

fn device(
    f: &mut FdtWriter,
    name: &str,
    at: map::Range,
    compatible: &str,
    irq: Option<u32>,
    more: impl FnOnce(&mut FdtWriter) -> FdtWriterResult<()>,
) -> FdtWriterResult<()> {
    let node = f.begin_node(&format!("{name}@{:x}", at.base))?;
    f.property_string("compatible", compatible)?;
    f.property_array_u32("reg", &reg(at))?;
    if let Some(irq) = irq {
        f.property_u32("interrupts", irq)?;
        f.property_u32("interrupt-parent", PHANDLE_PLIC)?;
    }
    more(f)?;
    f.end_node(node)
}

fn interrupt_controllers(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    // Numbers are the interrupts' in `mip`.
    let (msip, mtip, meip, seip) = (3, 7, 11, 9);
    if config.machine_mode {
        let clint: Vec<u32> = (0..config.harts).flat_map(|h| [phandle_intc(h), msip, phandle_intc(h), mtip]).collect();
        let node = f.begin_node(&format!("clint@{:x}", map::CLINT.base))?;
        f.property_string_list("compatible", vec!["sifive,clint0".into(), "riscv,clint0".into()])?;
        f.property_array_u32("reg", &reg(map::CLINT))?;
        f.property_array_u32("interrupts-extended", &clint)?;
        f.end_node(node)?;
    }
    // A context that nobody owns is marked with -1 (riscv,plic binding).
    let machine = if config.machine_mode { meip } else { u32::MAX };
    let plic: Vec<u32> = (0..config.harts).flat_map(|h| [phandle_intc(h), machine, phandle_intc(h), seip]).collect();
    let node = f.begin_node(&format!("plic@{:x}", map::PLIC.base))?;
    f.property_string_list("compatible", vec!["sifive,plic-1.0.0".into(), "riscv,plic0".into()])?;
    f.property_array_u32("reg", &reg(map::PLIC))?;
    f.property_array_u32("interrupts-extended", &plic)?;
    f.property_null("interrupt-controller")?;
    f.property_u32("#interrupt-cells", 1)?;
    f.property_u32("#address-cells", 0)?;
    f.property_u32("riscv,ndev", map::PLIC_SOURCES)?;
    f.property_phandle(PHANDLE_PLIC)?;
    f.end_node(node)
}

fn pcie(f: &mut FdtWriter, config: &FdtConfig) -> FdtWriterResult<()> {
    // PCI bus binding: space code in the first cell of an address.
    const IO: u32 = 0x0100_0000;
    const MEM32: u32 = 0x0200_0000;
    const MEM64: u32 = 0x0300_0000;
    let node = f.begin_node(&format!("pci@{:x}", map::PCIE_ECAM.base))?;
    f.property_string("compatible", "pci-host-ecam-generic")?;
    f.property_string("device_type", "pci")?;
    f.property_u32("#address-cells", 3)?;
    f.property_u32("#size-cells", 2)?;
    f.property_u32("#interrupt-cells", 1)?;
    f.property_u32("linux,pci-domain", 0)?;
    f.property_array_u32("bus-range", &[0, (map::PCIE_ECAM.size >> 20) as u32 - 1])?;
    f.property_null("dma-coherent")?;
    f.property_array_u32("reg", &reg(map::PCIE_ECAM))?;
    let high = map::pcie_mmio_high(config.ram);
    let window = |space: u32, pci: u64, cpu: map::Range| {
        let ([p, q], [a, b], [c, d]) = (cells(pci), cells(cpu.base), cells(cpu.size));
        [space, p, q, a, b, c, d]
    };
    let ranges = [
        window(IO, 0, map::PCIE_PIO),
        window(MEM32, map::PCIE_MMIO.base, map::PCIE_MMIO),
        window(MEM64, high.base, high),
    ];
    f.property_array_u32("ranges", &ranges.concat())?;
    // Pins of devices 0 to 3; others repeat them (standard swizzle).
    let mut interrupts = Vec::new();
    for slot in 0..4 {
        for pin in 0..4 {
            let irq = map::IRQ_PCIE + (slot + pin) % 4;
            interrupts.extend([slot << 11, 0, 0, pin + 1, PHANDLE_PLIC, irq]);
        }
    }
    f.property_array_u32("interrupt-map", &interrupts)?;
    f.property_array_u32("interrupt-map-mask", &[0x1800, 0, 0, 7])?;
    f.end_node(node)
}

fn aliases(f: &mut FdtWriter) -> FdtWriterResult<()> {
    let node = f.begin_node("aliases")?;
    f.property_string("serial0", &format!("/soc/serial@{:x}", map::UART.base))?;
    f.end_node(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_with_everything_is_well_formed() {
        let config = FdtConfig {
            harts: 8,
            isa: "rv64imafdc_zicsr".into(),
            extensions: vec!["i".into(), "m".into()],
            mmu: "sv57",
            ram: 1 << 30,
            bootargs: Some("console=ttyS0".into()),
            initrd: Some(0x8800_0000..0x8810_0000),
            rng_seed: [7; 32],
            reserved: Some(0x8000_0000..0x8020_0000),
            machine_mode: true,
            fw_cfg: true,
            flash: true,
            pcie: true,
        };
        let blob = build(&config).unwrap();
        assert_eq!(&blob[..4], [0xd0, 0x0d, 0xfe, 0xed]);
        assert!(blob.len() < 0x1_0000);
    }
}
