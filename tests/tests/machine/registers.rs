//! Every region of a machine with every device, through the bus; its state saved and restored.

use mimus_core::bus::AccessSize;
use mimus_core::memory::FlatKind;
use mimus_machines::config::DriveInterface;
use mimus_tests::cpus::alone;
use mimus_tests::random::Random;

use crate::harness::{Engine, Guest, Setup, idle};

/// Every model there is, and both banks of flash.
pub fn everything() -> Setup {
    let mut flash = vec![0; 32 << 20];
    flash[..0x1000].fill(0xff);
    let mut setup = Setup::new(2, 16 << 20)
        .kernel(&idle())
        .drive(DriveInterface::Virtio, "disk0", &[1; 1 << 20])
        .drive(DriveInterface::None, "disk1", &[2; 1 << 20])
        .drive(DriveInterface::Pflash, "flash0", &flash)
        .device("virtio-blk-pci,drive=disk1,id=second")
        .device("virtio-rng-pci,id=rng")
        .device("virtio-rng-device")
        .device("virtio-balloon-pci")
        .device("virtio-balloon-device")
        .device("virtio-serial-pci");
    setup.config.nics = vec![nic("virtio-net-pci"), nic("virtio-net-device")];
    setup
}

fn nic(model: &str) -> mimus_machines::config::Nic {
    let text = format!("user,model={model}");
    mimus_machines::config::Nic::parse(&text).unwrap_or_else(|e| panic!("{e}"))
}

/// Base and length of what the guest sees as devices.
fn devices(guest: &Guest) -> Vec<(u64, u64)> {
    let view = guest.machine.services().memory.view();
    let ranges = view.ranges().iter().filter(|r| !matches!(r.kind, FlatKind::Ram { .. }));
    ranges.map(|r| (r.base.0, r.len)).collect()
}

fn size(random: u64) -> AccessSize {
    [AccessSize::B1, AccessSize::B2, AccessSize::B4, AccessSize::B8][random as usize % 4]
}

/// One access somewhere in `ranges`; what was read.
fn access(guest: &Guest, ranges: &[(u64, u64)], rng: &mut Random) -> u64 {
    let (base, len) = ranges[rng.below(ranges.len() as u64) as usize];
    // Registers are mostly at the beginning.
    let span = [0x40, 0x200, 0x4000, 1 << 31][rng.below(4) as usize].min(len);
    let size = size(rng.u64());
    let at = base + (rng.below(span) & !(size.bytes() - 1));
    match rng.below(2) {
        0 => guest.read(at, size).0,
        _ => {
            let _ = guest.write(at, size, if rng.below(2) == 0 { rng.below(64) } else { rng.u64() });
            0
        }
    }
}

#[test]
fn every_device_has_its_place() {
    let _alone = alone();
    let guest = everything().start(Engine::Null);
    let word = |at| guest.read(at, AccessSize::B4).0;
    assert_eq!(word(0x200_4000), 0xffff_ffff, "mtimecmp");
    assert_eq!(guest.read(0x1000_0005, AccessSize::B1).0, 0x60, "the UART's line status");
    assert_eq!(word(0x1000_8000), 0x7472_6976, "the first disk is in the last virtio-mmio slot");
    assert_eq!(word(0x1000_8008), 2);
    assert_eq!(word(0x1000_1008), 0, "the first slot is empty");
    assert_eq!(word(0x3000_0000), 0x0008_1b36, "the host bridge");
    assert_eq!(word(0x3000_8000), 0x1042_1af4, "virtio-blk-pci");
    assert_eq!(guest.read(0x1010_0000, AccessSize::B4).0, u64::from(u32::from_le_bytes(*b"QEMU")), "fw_cfg");
    assert_eq!((word(0x2000_0000), word(0x2200_0000)), (0xffff_ffff, 0), "flash with and without an image");
    let rtc = word(0x10_1000) | word(0x10_1004) << 32;
    assert!(rtc > 1_600_000_000_000_000_000, "the RTC shows the world's time: {rtc}");
    assert!(guest.machine.devices().count() > 15);
    for (path, device) in guest.machine.devices() {
        let saved = device.save().unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(saved.schema, device.schema().name, "{path}");
    }
}

#[test]
fn saved_and_restored_after_random_accesses() {
    let _alone = alone();
    let setup = everything();
    let mut guest = setup.start(Engine::Null);
    let mut rng = Random::new(1);
    for round in 0..3 {
        guest.machine.resume();
        for _ in 0..10_000 {
            // BARs come and go.
            let ranges = devices(&guest);
            for _ in 0..20 {
                access(&guest, &ranges, &mut rng);
            }
            if rng.below(400) == 0 {
                break;
            }
        }
        let snapshot = guest.save();
        let mut other = setup.start(Engine::Null);
        other.restore(&snapshot).unwrap_or_else(|e| panic!("round {round}: {e}"));
        assert_eq!(devices(&guest), devices(&other), "the memory map is the same");
        for (path, device) in guest.machine.devices() {
            let restored = other.machine.device(path).unwrap().save().unwrap();
            assert_eq!(device.save().unwrap(), restored, "{path}");
        }
        assert!(snapshot == other.save(), "round {round}: and the rest, to the last byte");
        alike(&guest, &other, &mut rng);
        guest = other;
    }
    guest.machine.reset().unwrap();
    assert_eq!(guest.read(0x1000_0005, AccessSize::B1).0, 0x60);
}

/// Both answer the same, where no clock of the host and no disk has a say.
fn alike(a: &Guest, b: &Guest, rng: &mut Random) {
    const RANGES: [(u64, u64); 6] = [
        (0x200_0000, 0x1_0000),
        (0xc00_0000, 0x20_4000),
        (0x1000_0000, 8),
        (0x1010_0000, 0x10),
        (0x2000_0000, 0x400_0000),
        (0x3000_0000, 0x1_0000),
    ];
    let seed = rng.u64();
    let (mut ra, mut rb) = (Random::new(seed), Random::new(seed));
    for i in 0..5000 {
        assert_eq!(access(a, &RANGES, &mut ra), access(b, &RANGES, &mut rb), "access {i} of seed {seed:#x}");
    }
}

#[test]
fn a_snapshot_of_another_machine_is_refused() {
    let _alone = alone();
    let plain = |cpus, memory| Setup::new(cpus, memory).kernel(&idle());
    let snapshot = plain(2, 16 << 20).start(Engine::Null).save();
    let refused = |setup: Setup, why: &str| {
        let error = setup.start(Engine::Null).restore(&snapshot).unwrap_err().to_string();
        assert!(error.contains(why) && !error.contains('\n'), "{error}");
    };
    refused(plain(1, 16 << 20), "vcpus is 2 there and 1 here");
    refused(plain(2, 32 << 20), "ram is");
    refused(plain(2, 16 << 20).device("virtio-rng-device"), "/machine/peripheral");
    refused(plain(2, 16 << 20).bare(), "/machine/sbi, which this machine does not have");
    let with = plain(2, 16 << 20).device("virtio-rng-device,id=r").start(Engine::Null).save();
    let error = plain(2, 16 << 20).start(Engine::Null).restore(&with).unwrap_err().to_string();
    assert!(error.contains("/machine/peripheral/r"), "{error}");
    let moved = plain(2, 16 << 20).device("virtio-balloon-device,id=r").start(Engine::Null).restore(&with);
    let error = moved.unwrap_err().to_string();
    assert!(error.contains("/machine/peripheral/r: "), "{error}");
}
