//! What a PC's host bridge does to the first megabyte and to memory for system management: shadowing of ROM by RAM
//! (PAM registers), the display's window, SMRAM and TSEG.
//!
//! Spec: Intel 440FX data sheet, 290549-001, sections 3.2.11 and 3.2.18; Intel Q35 data sheet, 316966-002, sections
//! 5.1.17 and following; both chips have the same registers in different places.
//! RAM lies below everything here: a segment that is RAM for reading and writing is one where nothing hides it.

use mimus_core::bus::{AccessRules, AccessSize, BusFault, GuestPhys, MmioAccess};
use mimus_core::device::MmioDevice;
use mimus_core::memory::{AddressSpace, FlatKind, MemoryMap, MemoryRegion, RamBlock, Transaction};
use std::sync::Arc;

use super::gpex::Unclaimed;
use crate::pci::bus::PciBus;

/// Where option ROMs and BIOS are: 0xc0000 to 0xfffff.
pub const ROM_BASE: u64 = 0xc_0000;
/// Bytes from [`ROM_BASE`] to the end of the first megabyte.
pub const ROM_LEN: u64 = 0x4_0000;
/// Number of PAM registers.
pub const PAM_REGISTERS: usize = 7;

const VGA_BASE: u64 = 0xa_0000;
const VGA_LEN: u64 = 0x2_0000;

/// PAM: reads come from RAM.
const READ: u8 = 1;
/// PAM: writes go to RAM.
const WRITE: u8 = 2;
/// Bits of a PAM register that exist.
pub const PAM_BITS: u8 = 0x33;

/// SMRAM register: compatible SMRAM at 0xa0000 is enabled.
pub const SMRAM_ENABLE: u8 = 1 << 3;
/// SMRAM register: nothing can be changed any more.
pub const SMRAM_LOCK: u8 = 1 << 4;
/// SMRAM register: closed for data.
pub const SMRAM_CLOSED: u8 = 1 << 5;
/// SMRAM register: open outside of SMM.
pub const SMRAM_OPEN: u8 = 1 << 6;
/// SMRAM register: fixed bits, "SMRAM at A0000h".
pub const SMRAM_BASE_SEGMENT: u8 = 2;
/// ESMRAMC register: TSEG is enabled.
pub const TSEG_ENABLE: u8 = 1;

/// Above RAM, below what boards map at fixed places.
const OVER_RAM: i32 = 1;
/// Below RAM and everything else: PCI.
const BEHIND: i32 = -1;

/// What a board gives its host bridge.
pub struct PcMemory<'a> {
    /// Memory as CPUs see it.
    pub system: &'a Arc<AddressSpace>,
    /// The root of the port space.
    pub io: &'a MemoryRegion,
    /// RAM; below 4 GiB it is mapped at the addresses that its offsets are.
    pub ram: &'a Arc<RamBlock>,
    /// Bytes of RAM below 4 GiB.
    pub ram_below_4g: u64,
    /// [`ROM_LEN`] bytes that are seen at [`ROM_BASE`] when RAM is not: the BIOS at their end.
    pub rom: &'a MemoryRegion,
}

/// One segment with what hides RAM in each state but the last.
struct Segment {
    /// Neither bit: reads and writes are PCI's.
    rom: MemoryRegion,
    /// READ: RAM that cannot be written.
    read_only: MemoryRegion,
    /// WRITE: reads are PCI's.
    write_only: MemoryRegion,
}

/// Takes writes to a segment in state WRITE.
struct WriteToRam {
    ram: Arc<RamBlock>,
    /// Address of the region's byte 0, which may lie below 0 of memory.
    base: u64,
}

impl MmioDevice for WriteToRam {
    /// Only a ROM that is not memory is read here.
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(a.size.mask())
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        let bytes = &value.to_le_bytes()[..a.size.bytes() as usize];
        let _ = self.ram.write(self.base.wrapping_add(a.offset), bytes);
        Ok(())
    }
}

/// The regions by which registers have effect.
pub(super) struct PcRegions {
    map: Arc<MemoryMap>,
    segments: Vec<Segment>,
    /// PCI's view of 0xa0000.
    vga: MemoryRegion,
    /// Hides TSEG's RAM, for each size.
    tseg_hidden: [Option<MemoryRegion>; 4],
    tseg: [Option<MemoryRegion>; 4],
    smram: MemoryRegion,
    /// What SMM sees on top of memory.
    overlay: MemoryRegion,
}

/// MiB of the TSEG that the data sheet does not have: the reserved value of ESMRAMC's size bits. A larger one than
/// its 8 MiB is what firmware for emulated machines with many processors needs.
pub const EXTENDED_TSEG_MIB: u16 = 16;
/// Bytes of TSEG by the two bits of ESMRAMC.
const TSEG_LEN: [u64; 4] = [1 << 20, 2 << 20, 8 << 20, (EXTENDED_TSEG_MIB as u64) << 20];

impl PcRegions {
    /// Maps the bus behind everything and what the registers at reset say.
    pub fn new(name: &str, m: &PcMemory<'_>, bus: &Arc<PciBus>) -> Self {
        let map = m.system.map().clone();
        let mut t = Transaction::default();
        let (root, ram_view) = (m.system.root(), MemoryRegion::rom(format!("{name}-ram-read-only"), m.ram));
        let everything =
            |what: &str, target: &MemoryRegion| MemoryRegion::alias(format!("{name}-{what}"), target, 0, target.len());
        t.map_with_priority(root, 0, BEHIND, &everything("pci", bus.memory()));
        t.map_with_priority(m.io, 0, BEHIND, &everything("pci-io", bus.io()));

        let segments: Vec<_> = (0..13).map(|n| segment(name, n, m, &ram_view)).collect();
        for (n, s) in segments.iter().enumerate() {
            for region in [&s.rom, &s.read_only, &s.write_only] {
                t.map_with_priority(root, segment_range(n).0, OVER_RAM, region);
            }
        }
        let vga = over_unclaimed(&format!("{name}-vga"), VGA_LEN, bus.memory(), VGA_BASE, &mut t);
        t.map_with_priority(root, VGA_BASE, OVER_RAM, &vga);

        let overlay = MemoryRegion::container(format!("{name}-smm"), u64::MAX);
        let ram_rw = MemoryRegion::ram(format!("{name}-ram"), m.ram);
        let smram = MemoryRegion::alias(format!("{name}-smram"), &ram_rw, VGA_BASE, VGA_LEN);
        t.map(&overlay, VGA_BASE, &smram);
        let tseg = TSEG_LEN.map(|len| {
            let base = m.ram_below_4g.checked_sub(len)?;
            let region = MemoryRegion::alias(format!("{name}-tseg"), &ram_rw, base, len);
            t.map(&overlay, base, &region);
            Some(region)
        });
        let tseg_hidden = TSEG_LEN.map(|len| {
            let base = m.ram_below_4g.checked_sub(len)?;
            let region = unclaimed(&format!("{name}-tseg-hidden"), len);
            t.map_with_priority(root, base, OVER_RAM, &region);
            Some(region)
        });
        map.queue(t);
        let regions = Self { map, segments, vga, tseg_hidden, tseg, smram, overlay };
        regions.set_pam(&[0; PAM_REGISTERS]);
        regions.set_smram(SMRAM_BASE_SEGMENT, 0);
        regions.map.apply_pending();
        regions
    }

    /// What SMM sees on top of memory: a container for the address space of CPUs in SMM.
    pub fn overlay(&self) -> &MemoryRegion {
        &self.overlay
    }

    /// Takes over the PAM registers. The change is queued.
    pub fn set_pam(&self, pam: &[u8; PAM_REGISTERS]) {
        let mut t = Transaction::default();
        for (n, s) in self.segments.iter().enumerate() {
            // Segment 0 is the upper half of the first register, whose lower half is reserved.
            let shift = if n % 2 == 0 { 4 } else { 0 };
            let state = (pam[n.div_ceil(2)] >> shift) & 3;
            t.set_enabled(&s.rom, state == 0);
            t.set_enabled(&s.read_only, state == READ);
            t.set_enabled(&s.write_only, state == WRITE);
        }
        self.map.queue(t);
    }

    /// Takes over SMRAM and ESMRAMC. The change is queued.
    pub fn set_smram(&self, smram: u8, esmramc: u8) {
        let mut t = Transaction::default();
        let on = smram & SMRAM_ENABLE != 0;
        t.set_enabled(&self.vga, !(on && smram & SMRAM_OPEN != 0));
        t.set_enabled(&self.smram, on);
        for n in 0..TSEG_LEN.len() {
            let used = on && esmramc & TSEG_ENABLE != 0 && usize::from(esmramc >> 1 & 3) == n;
            for region in [&self.tseg[n], &self.tseg_hidden[n]].into_iter().flatten() {
                t.set_enabled(region, used);
            }
        }
        self.map.queue(t);
    }
}

/// Address and length of segment `n`: the BIOS, then 16 KiB each from 0xc0000 on.
fn segment_range(n: usize) -> (u64, u64) {
    match n {
        0 => (0xf_0000, 0x1_0000),
        n => (ROM_BASE + (n as u64 - 1) * 0x4000, 0x4000),
    }
}

fn segment(name: &str, n: usize, m: &PcMemory<'_>, ram_view: &MemoryRegion) -> Segment {
    let (base, len) = segment_range(n);
    let label = |what: &str| format!("{name}-pam{n}-{what}");
    let mut t = Transaction::default();
    let rom = over_unclaimed(&label("rom"), len, m.rom, base - ROM_BASE, &mut t);
    m.system.map().queue(t);
    Segment {
        write_only: write_only(&label("write-only"), base, len, m),
        read_only: MemoryRegion::alias(label("read-only"), ram_view, base, len),
        rom,
    }
}

/// A segment whose reads come from the ROM and whose writes go to RAM. A ROM that is not one piece of memory is not
/// seen in this state.
fn write_only(label: &str, base: u64, len: u64, m: &PcMemory<'_>) -> MemoryRegion {
    let view = m.rom.render();
    let at = base - ROM_BASE;
    let memory = view.lookup(GuestPhys(at)).and_then(|range| match &range.kind {
        FlatKind::Ram { block, offset, .. } if range.end() >= at + len => {
            Some((block.clone(), offset + (at - range.base.0)))
        }
        _ => None,
    });
    let rules = AccessRules::ANY.with_unaligned();
    let (whole, offset) = match memory {
        Some((block, offset)) => (MemoryRegion::rom_device(label, &block, rules), offset),
        None => (MemoryRegion::mmio(label, len, rules), 0),
    };
    if let Some(binding) = whole.binding() {
        let writes = WriteToRam { ram: m.ram.clone(), base: base.wrapping_sub(offset) };
        binding.bind_mmio(Arc::new(writes), 0);
    }
    MemoryRegion::alias(format!("{label}-window"), &whole, offset, len)
}

/// Reads as all ones.
fn unclaimed(label: &str, len: u64) -> MemoryRegion {
    let region = MemoryRegion::mmio(label, len, AccessRules::sizes(AccessSize::B1, AccessSize::B8).with_unaligned());
    if let Some(binding) = region.binding() {
        binding.bind_mmio(Arc::new(Unclaimed), 0);
    }
    region
}

/// A window on `target`, in whose holes nothing below is seen.
fn over_unclaimed(label: &str, len: u64, target: &MemoryRegion, offset: u64, t: &mut Transaction) -> MemoryRegion {
    let container = MemoryRegion::container(label, len);
    let window = MemoryRegion::alias(format!("{label}-window"), target, offset, len);
    t.map(&container, 0, &window);
    t.map_with_priority(&container, 0, BEHIND, &unclaimed(&format!("{label}-unclaimed"), len));
    container
}
