//! Tests of the PC's host bridges, by the ports and memory that guests use.

use super::config_ports::{PORT, RESET_VALUE};
use super::pc_memory::ROM_LEN;
use super::*;
use crate::testing::{Levels, assert_snapshot_round_trip, reset};
use mimus_core::bus::PioSpace;
use mimus_core::bus::{AccessRules, GuestPhys, MemTxAttrs};
use mimus_core::memory::{AddressSpace, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_core::snapshot::Snapshot as _;
use std::sync::atomic::{AtomicU32, Ordering};

const A: MemTxAttrs = MemTxAttrs::vcpu(0);
const RAM: u64 = 16 << 20;
const BIOS_LEN: u64 = 0x2_0000;

/// Memory and ports of a PC: RAM full of 0x11, a BIOS full of 0x22 at the end of the first megabyte.
struct Pc {
    system: Arc<AddressSpace>,
    pio: Arc<PioSpace>,
    ram: Arc<RamBlock>,
    rom: MemoryRegion,
    resets: Arc<AtomicU32>,
    levels: Arc<Levels>,
}

impl Pc {
    fn new() -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let system = map.address_space("system", &root);
        let pio = PioSpace::new(&map);
        let blocks = GuestRam::new();
        let ram = blocks.add_block("ram", RAM, RamBacking::Private).unwrap();
        let bios = blocks.add_block("bios", 2 * BIOS_LEN, RamBacking::Private).unwrap();
        assert!(ram.fill(0, RAM, 0x11) && bios.fill(BIOS_LEN, BIOS_LEN, 0x22));
        let rom = MemoryRegion::container("rom", ROM_LEN);
        let bios = MemoryRegion::rom("bios", &bios);
        let end = MemoryRegion::alias("bios-end", &bios, BIOS_LEN, BIOS_LEN);
        let all_ram = MemoryRegion::ram("ram", &ram);
        map.change(|t| {
            t.map(&rom, ROM_LEN - BIOS_LEN, &end).map(&root, 0, &all_ram);
        });
        Pc { system, pio, ram, rom, resets: Arc::default(), levels: Levels::new() }
    }

    fn memory(&self) -> PcMemory<'_> {
        PcMemory { system: &self.system, io: self.pio.root(), ram: &self.ram, ram_below_4g: RAM, rom: &self.rom }
    }

    fn reset_hook(&self) -> impl Fn() + Send + Sync + 'static {
        let resets = self.resets.clone();
        move || _ = resets.fetch_add(1, Ordering::Relaxed)
    }

    fn q35(&self) -> Arc<Q35> {
        let pirqs = std::array::from_fn(|n| self.levels.line(n as u32));
        Q35::new("pcie.0", &self.memory(), pirqs, None, self.reset_hook()).unwrap()
    }

    fn i440fx(&self) -> Arc<I440fx> {
        let pirqs = std::array::from_fn(|n| self.levels.line(n as u32));
        I440fx::new("pci.0", &self.memory(), pirqs, None, self.reset_hook()).unwrap()
    }

    fn out(&self, port: u16, size: AccessSize, value: u32) {
        self.pio.write(port, size, value.into(), A);
    }

    fn inp(&self, port: u16, size: AccessSize) -> u32 {
        self.pio.read(port, size, A) as u32
    }

    fn select(&self, devfn: u8, register: u8) {
        self.out(PORT, AccessSize::B4, 1 << 31 | u32::from(devfn) << 8 | u32::from(register & !3));
    }

    fn config(&self, devfn: u8, register: u8) -> u8 {
        self.select(devfn, register);
        self.inp(PORT + 4 + u16::from(register & 3), AccessSize::B1) as u8
    }

    fn set_config(&self, devfn: u8, register: u8, value: u8) {
        self.select(devfn, register);
        self.out(PORT + 4 + u16::from(register & 3), AccessSize::B1, value.into());
    }

    fn peek(&self, at: u64) -> u8 {
        self.system.read(GuestPhys(at), AccessSize::B1, A).0 as u8
    }

    fn poke(&self, at: u64, value: u8) {
        let _ = self.system.write(GuestPhys(at), AccessSize::B1, value.into(), A);
    }
}

#[test]
fn configuration_ports() {
    let pc = Pc::new();
    let bridge = pc.q35();
    assert_eq!(pc.inp(PORT, AccessSize::B4), 0);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), u32::MAX, "not enabled");
    pc.select(0, 0);
    assert_eq!(pc.inp(PORT, AccessSize::B4), 0x8000_0000);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), 0x29c0_8086);
    assert_eq!(pc.inp(PORT + 6, AccessSize::B2), 0x29c0);
    assert_eq!((pc.config(0, 8), pc.config(0, 11), pc.config(0, 14)), (2, 6, 0));
    pc.select(0, 0x2c);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), 0x1100_1af4, "what SeaBIOS looks for");
    assert_eq!(pc.config(8, 0), 0xff, "nobody there");
    pc.out(PORT, AccessSize::B4, 0x8001_0000);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), u32::MAX, "another bus");
    pc.out(PORT, AccessSize::B2, 0);
    assert_eq!(pc.inp(PORT, AccessSize::B4), 0x8001_0000, "doublewords only");
    pc.out(PORT, AccessSize::B4, u32::MAX);
    assert_eq!(pc.inp(PORT, AccessSize::B4), 0x80ff_fffc);
    assert_eq!(pc.inp(PORT + 2, AccessSize::B1), 0xff);
    pc.out(PORT + 7, AccessSize::B4, 0);
    let other = Pc::new().q35();
    assert_snapshot_round_trip(&**bridge.ports(), &**other.ports());
}

#[test]
fn reset_control() {
    let pc = Pc::new();
    let bridge = pc.q35();
    let resets = || pc.resets.load(Ordering::Relaxed);
    pc.select(0, 4);
    pc.out(PORT + 1, AccessSize::B1, 2);
    assert_eq!((resets(), pc.inp(PORT + 1, AccessSize::B1)), (0, 2));
    assert_eq!(pc.inp(PORT, AccessSize::B4), 0x8000_0004, "not the address");
    pc.out(PORT + 1, AccessSize::B1, 6);
    pc.out(PORT + 1, AccessSize::B1, 6);
    assert_eq!(resets(), 1, "when the bit rises");
    reset(&**bridge.ports());
    assert_eq!(pc.inp(PORT + 1, AccessSize::B1), 0);
    pc.out(PORT + 1, AccessSize::B1, RESET_VALUE.into());
    assert_eq!(resets(), 2);
}

/// PAM registers of either bridge, from `pam0` on.
fn shadowing(pc: &Pc, pam0: u8) {
    assert_eq!((pc.peek(0xf_0000), pc.peek(0xe_0000), pc.peek(0xc_0000)), (0x22, 0x22, 0xff));
    assert_eq!((pc.peek(0x9_ffff), pc.peek(0x10_0000), pc.peek(0xa_0000)), (0x11, 0x11, 0xff));
    pc.poke(0xf_0000, 0x33);
    pc.poke(0xc_0000, 0x33);
    assert_eq!((pc.peek(0xf_0000), pc.peek(0xc_0000)), (0x22, 0xff));
    // Writes to RAM, reads of ROM: how a BIOS copies itself.
    pc.set_config(0, pam0, 0x20);
    for at in [0xf_0000, 0xf_fff0] {
        pc.poke(at, pc.peek(at) + 1);
        assert_eq!(pc.peek(at), 0x22);
    }
    pc.set_config(0, pam0, 0x10);
    assert_eq!((pc.peek(0xf_0000), pc.peek(0xf_fff0), pc.peek(0xf_0001)), (0x23, 0x23, 0x11));
    pc.poke(0xf_0000, 0x44);
    assert_eq!(pc.peek(0xf_0000), 0x23, "read-only");
    pc.set_config(0, pam0, 0x30);
    pc.poke(0xf_0000, 0x44);
    assert_eq!(pc.peek(0xf_0000), 0x44);
    pc.set_config(0, pam0, 0xff);
    assert_eq!(pc.config(0, pam0), 0x30, "the lower half is reserved");
    // Every other segment has its own bits.
    for n in 0..12_u8 {
        let (register, shift) = (pam0 + 1 + n / 2, 4 * (n % 2));
        let at = 0xc_0000 + 0x4000 * u64::from(n);
        pc.set_config(0, register, 3 << shift);
        assert_eq!((pc.peek(at), pc.peek(at + 0x3fff)), (0x11, 0x11), "segment {n}");
        let beside = if n % 2 == 0 { at + 0x4000 } else { at - 1 };
        assert_ne!(pc.peek(beside), 0x11, "segment {n}");
        pc.set_config(0, register, 2 << shift);
        pc.poke(at, 0x55);
        pc.set_config(0, register, 1 << shift);
        assert_eq!(pc.peek(at), 0x55, "segment {n}");
        pc.set_config(0, register, 0);
    }
}

/// The SMRAM register of either bridge, at `smram`.
fn system_management_ram(pc: &Pc, smram: u8, overlay: &MemoryRegion) {
    let seen = |at| overlay.render().lookup(GuestPhys(at)).is_some();
    assert_eq!((pc.config(0, smram), seen(0xa_0000)), (2, false));
    pc.set_config(0, smram, 0x48);
    assert_eq!((pc.config(0, smram), pc.peek(0xa_0000), seen(0xa_0000)), (0x4a, 0x11, true));
    pc.poke(0xb_ffff, 0x66);
    pc.set_config(0, smram, 0x08);
    assert_eq!((pc.peek(0xb_ffff), seen(0xa_0000)), (0xff, true), "for SMM only");
    pc.set_config(0, smram, 0x58);
    assert_eq!(pc.config(0, smram), 0x1a, "locking closes");
    pc.set_config(0, smram, 0x40);
    assert_eq!(pc.config(0, smram), 0x1a, "and is for good");
    assert_eq!(pc.ram.load::<u8>(0xb_ffff), Some(0x66));
}

#[test]
fn i440fx() {
    let pc = Pc::new();
    let bridge = pc.i440fx();
    pc.select(0, 0);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), 0x1237_8086);
    shadowing(&pc, 0x59);
    system_management_ram(&pc, 0x72, bridge.smm_overlay());
    pc.set_config(0, 0x67, 0x40);
    assert_eq!(pc.config(0, 0x67), 0x40);
    let other = Pc::new();
    let copy = other.i440fx();
    assert_snapshot_round_trip(&*bridge, &*copy);
    other.system.map().apply_pending();
    assert!(other.ram.store(0xf_0000, 0x77_u8));
    assert_eq!(other.peek(0xf_0000), 0x77, "shadowed as saved");
    reset(&*copy);
    other.system.map().apply_pending();
    assert_eq!((other.peek(0xf_0000), other.config(0, 0x72)), (0x22, 2));
    assert_eq!(i440fx::pirq_of(1, 0), 0);
    assert_eq!(i440fx::pirq_of(3, 2), 0);
}

#[test]
fn q35() {
    let pc = Pc::new();
    let bridge = pc.q35();
    shadowing(&pc, 0x90);
    // TSEG of 2 MiB.
    let overlay = bridge.smm_overlay();
    let seen = |at| overlay.render().lookup(GuestPhys(at)).is_some();
    pc.set_config(0, 0x9e, 0x03);
    assert_eq!((pc.config(0, 0x9e), pc.peek(RAM - 1)), (0x3b, 0x11), "SMRAM is off");
    pc.set_config(0, 0x9d, 0x08);
    assert_eq!((pc.peek(RAM - 1), pc.peek(RAM - (2 << 20))), (0xff, 0xff));
    assert_eq!((pc.peek(RAM - (2 << 20) - 1), seen(RAM - 1), seen(RAM - (2 << 20) - 1)), (0x11, true, false));
    // Its place, for firmware; the extended one, which says its size.
    pc.set_config(0, 0xaf, 0x7f);
    pc.set_config(0, 0x50, 0xff);
    assert_eq!(pc.config(0, 0x50), 16);
    pc.set_config(0, 0x9e, 0x07);
    let below_8_mib = RAM - (8 << 20) - 1;
    assert_eq!((seen(below_8_mib), pc.peek(below_8_mib)), (true, 0xff));
    pc.set_config(0, 0x9e, 0);
    pc.set_config(0, 0x9d, 0);
    system_management_ram(&pc, 0x9d, overlay);
    pc.set_config(0, 0x9e, 1);
    pc.set_config(0, 0xaf, 1);
    assert_eq!((pc.config(0, 0x9e), pc.config(0, 0xaf)), (0x38, 0x7f), "locked too");
    let other = Pc::new();
    let copy = other.q35();
    assert_snapshot_round_trip(&*bridge, &*copy);
    assert_eq!((q35::pirq_of(31, 0), q35::pirq_of(3, 0), q35::pirq_of(4, 1)), (0, 7, 5));
}

#[test]
fn pciexbar() {
    let pc = Pc::new();
    let bridge = pc.q35();
    let read = |at| pc.system.read(GuestPhys(at), AccessSize::B4, A).0 as u32;
    let set = |value: u64| {
        for (n, byte) in value.to_le_bytes().into_iter().enumerate() {
            pc.set_config(0, 0x60 + n as u8, byte);
        }
    };
    set(0xb000_0001);
    assert_eq!((read(0xb000_0000), read(0xb000_8000)), (0x29c0_8086, u32::MAX));
    assert_eq!(read(0xbfff_f000), u32::MAX);
    let _ = pc.system.write(GuestPhys(0xb000_0090), AccessSize::B1, 0x30, A);
    assert_eq!(pc.config(0, 0x90), 0x30);
    set(0xe400_0005);
    assert_eq!((read(0xe400_0000), read(0xb000_0000)), (0x29c0_8086, u32::MAX));
    set(0xf_e400_0005);
    assert_eq!((read(0xf_e400_0000), read(0xe400_0000)), (0x29c0_8086, u32::MAX));
    set(0xb000_0007);
    assert_eq!(read(0xb000_0000), u32::MAX, "a reserved size");
    set(u64::MAX);
    pc.select(0, 0x64);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), 0xf);
    set(0xb000_0001);
    reset(&*bridge);
    pc.system.map().apply_pending();
    assert_eq!(read(0xb000_0000), u32::MAX);
}

#[test]
fn pci_memory_and_ports_are_behind_everything() {
    let pc = Pc::new();
    let bridge = pc.q35();
    struct Tag(u8);
    impl mimus_core::device::MmioDevice for Tag {
        fn mmio_read(&self, _: mimus_core::bus::MmioAccess) -> Result<u64, mimus_core::bus::BusFault> {
            Ok(self.0.into())
        }
        fn mmio_write(&self, _: mimus_core::bus::MmioAccess, _: u64) -> Result<(), mimus_core::bus::BusFault> {
            Ok(())
        }
    }
    let tagged = |tag| {
        let region = MemoryRegion::mmio("bar", 0x1000, AccessRules::ANY);
        region.binding().unwrap().bind_mmio(Arc::new(Tag(tag)), 0);
        region
    };
    let (high, low, vga) = (tagged(1), tagged(2), tagged(3));
    pc.system.map().change(|t| {
        let memory = bridge.bus().memory();
        t.map(memory, 0xe000_0000, &high).map(memory, 0x1000, &low).map(memory, 0xa_0000, &vga);
        t.map(bridge.bus().io(), 0xc000, &tagged(4));
        t.map(bridge.bus().io(), 0xc00, &tagged(5));
    });
    assert_eq!((pc.peek(0xe000_0000), pc.peek(0x1000), pc.peek(0xa_0000)), (1, 0x11, 3));
    assert_eq!((pc.inp(0xc000, AccessSize::B1), pc.inp(0xcf0, AccessSize::B1)), (4, 5));
    pc.select(0, 0);
    assert_eq!(pc.inp(PORT + 4, AccessSize::B4), 0x29c0_8086);
}

#[test]
fn hostile_states() {
    let pc = Pc::new();
    let bridge = pc.q35();
    let mut saved = bridge.save().unwrap();
    saved.body.truncate(5);
    assert!(bridge.restore(&saved).is_err());
    let ports = pc.q35_ports_state(0x7f00_0000, 0);
    assert!(bridge.ports().restore(&ports).is_err());
    assert!(bridge.ports().restore(&pc.q35_ports_state(0, 1)).is_err());
}

impl Pc {
    fn q35_ports_state(&self, address: u32, reset_control: u8) -> mimus_core::snapshot::Payload {
        #[derive(serde::Serialize)]
        struct State {
            address: u32,
            reset_control: u8,
        }
        let schema = mimus_core::snapshot::Schema::new("pci-config-ports", 1);
        mimus_core::snapshot::Payload::encode(schema, &State { address, reset_control }).unwrap()
    }
}

/// A system that wakes finds firmware in RAM, and configuration space open; everything else is as after any reset, and the
/// next reset keeps nothing.
#[test]
fn what_is_kept_for_a_waking_system() {
    let pc = Pc::new();
    let bridge = pc.q35();
    let set = |at: u8, value: u64| {
        value.to_le_bytes().into_iter().enumerate().for_each(|(n, byte)| pc.set_config(0, at + n as u8, byte));
    };
    let get = |at: u8| u64::from_le_bytes(std::array::from_fn(|n| pc.config(0, at + n as u8)));
    for (pciexbar, kept) in [(0xd000_0001, 0xd000_0001), (0, q35::ECAM_BASE | 1)] {
        set(0x60, pciexbar);
        pc.set_config(0, 0x90, 0x30);
        pc.set_config(0, 0x9d, 0x4a);
        bridge.keep_map();
        reset(&*bridge);
        assert_eq!((get(0x60), pc.config(0, 0x90), pc.config(0, 0x9d)), (kept, 0x30, 2));
        reset(&*bridge);
        assert_eq!((get(0x60) & 1, pc.config(0, 0x90)), (0, 0));
    }
    let pc = Pc::new();
    let bridge = pc.i440fx();
    pc.set_config(0, 0x59, 0x30);
    bridge.keep_map();
    reset(&*bridge);
    assert_eq!(pc.config(0, 0x59), 0x30);
    reset(&*bridge);
    assert_eq!(pc.config(0, 0x59), 0);
}
