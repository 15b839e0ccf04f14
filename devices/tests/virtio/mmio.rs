//! The registers of virtio-mmio (VIRTIO 1.2 §4.2.2).

use super::driver::{Bus, Driver, MMIO_BASE, MMIO_IRQ, Ring, reset};
use super::machine::{ATTRS, Machine};
use mimus_core::bus::AccessSize::{B1, B2, B4, B8};
use mimus_core::bus::{GuestPhys, MemTxResult};
use mimus_core::device::ResetPhase;
use mimus_devices::virtio::balloon::{VirtioBalloon, VirtioBalloonOptions};
use mimus_devices::virtio::rng::VirtioRng;
use mimus_devices::virtio::transport::mmio::EmptySlot;
use std::sync::Arc;

fn get(d: &Driver, register: u64) -> u32 {
    d.m.read(MMIO_BASE + register, B4) as u32
}

fn set(d: &Driver, register: u64, value: u32) {
    d.m.write(MMIO_BASE + register, B4, value.into());
}

fn balloon() -> Arc<VirtioBalloon> {
    VirtioBalloon::new(VirtioBalloonOptions::default())
}

#[test]
fn identification() {
    let d = Driver::find(balloon(), Bus::Mmio);
    assert_eq!([0, 4, 8, 0xc].map(|r| get(&d, r)), [0x7472_6976, 2, 5, u32::from_le_bytes(*b"MIMU")]);
    for read_only in [0, 4, 8, 0xc, 0x10, 0x34, 0x60, 0xb0, 0xfc] {
        let before = get(&d, read_only);
        set(&d, read_only, !before);
        assert_eq!(get(&d, read_only), before, "{read_only:#x}");
    }
    // Write-only, and holes.
    for register in [0x14, 0x18, 0x20, 0x24, 0x28, 0x30, 0x38, 0x50, 0x64, 0x80, 0x84, 0x90, 0xa4, 0xc0, 0xd0, 0xf8] {
        assert_eq!(get(&d, register), 0, "{register:#x}");
    }
    for shared in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(get(&d, shared), u32::MAX, "no shared memory: length -1");
    }
}

#[test]
fn features_in_halves() {
    let d = Driver::find(balloon(), Bus::Mmio);
    let feature_word = |select| {
        set(&d, 0x14, select);
        get(&d, 0x10)
    };
    assert_eq!(feature_word(0) & 0x2000_0002, 0x2000_0002, "event index, statistics queue");
    assert_eq!(feature_word(1), 1, "version 1");
    assert_eq!((feature_word(2), feature_word(u32::MAX)), (0, 0));
}

#[test]
fn status_in_order() {
    let d = Driver::find(balloon(), Bus::Mmio);
    assert_eq!(d.status(), 0);
    d.set_status(4);
    assert_eq!(d.status(), 0, "DRIVER_OK before FEATURES_OK");
    d.set_status(3);
    d.set_features(1 << 32);
    d.set_status(11);
    d.set_status(1);
    assert_eq!(d.status(), 11, "bits are added, not taken away");
    d.set_status(11 | 64);
    assert_eq!(d.status(), 11, "NEEDS_RESET is the device's");
    d.set_features(0);
    d.set_status(15);
    assert_eq!(d.status(), 15, "features are final");
    d.set_status(15 | 128);
    assert_eq!(d.status(), 143, "the driver gave up");
    d.set_status(0);
    assert_eq!(d.status(), 0);
}

#[test]
fn queue_registers() {
    let mut d = Driver::find(VirtioRng::new(None).unwrap(), Bus::Mmio);
    for (queue, max) in [(0, 8), (1, 0), (0xffff, 0), (0x1_0000, 0), (u32::MAX, 0)] {
        set(&d, 0x30, queue);
        assert_eq!((get(&d, 0x34), get(&d, 0x44)), (max, 0), "queue {queue:#x}");
    }
    // A queue that is not there takes nothing.
    set(&d, 0x38, 8);
    set(&d, 0x44, 1);
    assert_eq!(get(&d, 0x44), 0);
    d.set_status(3);
    d.set_features(1 << 32);
    d.set_status(11);
    set(&d, 0x30, 0);
    let ring = Ring::new(&mut d.m, 8);
    for bad in [0, 3, 9, 16, 0x1_0008] {
        set(&d, 0x38, bad);
        for (at, addr) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            set(&d, at, addr as u32);
            set(&d, at + 4, (addr >> 32) as u32);
        }
        set(&d, 0x44, 1);
        assert_eq!(get(&d, 0x44), 0, "size {bad:#x}");
    }
    set(&d, 0x38, 8);
    set(&d, 0x44, 1);
    assert_eq!(get(&d, 0x44), 1);
    // Set up, it cannot be changed under the device.
    set(&d, 0x38, 4);
    set(&d, 0x80, 0);
    set(&d, 0xa4, 0x55);
    d.set_status(15);
    d.rings.push(ring);
    let buf = d.m.alloc(16, 16);
    assert_eq!(d.call(0, &[(buf, 16, true)]), 16);
}

#[test]
fn interrupt_status_and_acknowledge() {
    let device = balloon();
    let mut d = Driver::start(device.clone(), Bus::Mmio, 0);
    device.set_wanted(1 << 20);
    assert_eq!((get(&d, 0x60), d.m.line(MMIO_IRQ)), (2, true), "the configuration changed");
    let list = d.m.place(&0u32.to_le_bytes());
    d.call(1, &[(list, 4, false)]);
    assert_eq!(get(&d, 0x60), 3);
    set(&d, 0x64, 2);
    assert_eq!((get(&d, 0x60), d.m.line(MMIO_IRQ)), (1, true));
    set(&d, 0x64, 0xffff_fffe);
    assert!(d.m.line(MMIO_IRQ));
    set(&d, 0x64, 1);
    assert_eq!((get(&d, 0x60), d.m.line(MMIO_IRQ)), (0, false));
    // A reset clears it, whatever the reserved bits of the write are.
    for zero in [0, 0x100] {
        d.set_up(0);
        device.set_wanted(0);
        device.set_wanted(1 << 20);
        assert!(d.m.line(MMIO_IRQ));
        set(&d, 0x70, zero);
        assert_eq!((d.status(), get(&d, 0x60), d.m.line(MMIO_IRQ)), (0, 0, false), "{zero:#x}");
    }
}

#[test]
fn configuration_generation() {
    let device = balloon();
    let d = Driver::start(device.clone(), Bus::Mmio, 0);
    let before = get(&d, 0xfc);
    assert_eq!(get(&d, 0xfc), before);
    device.set_wanted(1 << 20);
    assert_ne!(get(&d, 0xfc), before);
}

#[test]
fn configuration_space_widths() {
    let device = balloon();
    let d = Driver::start(device.clone(), Bus::Mmio, 0);
    device.set_wanted(0x1234_5000);
    assert_eq!((d.config(0, B1), d.config(1, B1), d.config(0, B2), d.config(0, B4)), (0x45, 0x23, 0x2345, 0x12345));
    assert_eq!((d.config(4, B4), d.config(8, B4), d.config(0xfc, B4)), (0, 0, 0), "zero past the end");
    assert_eq!(d.config(0, B8), 0x12345);
    d.set_config(0, B4, 7);
    assert_eq!(d.config(0, B4), 0x12345, "what the host wants is read-only");
    d.set_config(4, B4, 9);
    assert_eq!((d.config(4, B4), device.actual()), (9, 9 << 12));
    for (at, size) in [(4, B1), (5, B1), (4, B2), (6, B2), (8, B4), (0xfc, B4)] {
        d.set_config(at, size, 0x55);
    }
    assert_eq!(device.actual(), 9 << 12, "in one access");
}

#[test]
fn register_widths() {
    let d = Driver::find(balloon(), Bus::Mmio);
    // §4.2.2.2: registers are 32 bits wide and accessed as such.
    assert_eq!((d.m.read(MMIO_BASE, B1), d.m.read(MMIO_BASE, B2)), (0, 0));
    d.m.write(MMIO_BASE + 0x70, B1, 3);
    assert_eq!(d.status(), 0);
    assert_eq!(d.m.read(MMIO_BASE, B8), 2 << 32 | 0x7472_6976, "two registers");
    let misaligned = d.m.space.read(GuestPhys(MMIO_BASE + 2), B4, ATTRS).1;
    assert_eq!(misaligned, MemTxResult::AccessError);
}

#[test]
fn notifications_of_queues_that_are_not_there() {
    let mut d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Mmio, 0);
    for queue in [1, 0xffff, 0x1_0000, u32::MAX] {
        set(&d, 0x50, queue);
    }
    assert_eq!(d.status(), 15);
    let buf = d.m.alloc(16, 16);
    assert_eq!(d.call(0, &[(buf, 16, true)]), 16);
    // Before DRIVER_OK nothing is taken.
    d.take_interrupts();
    d.set_status(0);
    d.rings[0].publish(&d.m, 0);
    d.notify(0);
    assert_eq!((d.status(), d.take_interrupts()), (0, 0));
}

#[test]
fn an_empty_slot() {
    let m = Machine::new();
    let region = EmptySlot::region();
    m.map.change(|t| {
        t.map(m.space.root(), MMIO_BASE, &region);
    });
    for at in (0..0x200).step_by(4) {
        m.write(MMIO_BASE + at, B4, !0);
        let value = m.read(MMIO_BASE + at, B4) as u32;
        let want = match at {
            0 => 0x7472_6976,
            4 => 2,
            0xc => u32::from_le_bytes(*b"MIMU"),
            _ => 0,
        };
        assert_eq!(value, want, "{at:#x}: device 0 is none");
    }
}

#[test]
fn reset_in_phases() {
    let device = balloon();
    let d = Driver::start(device.clone(), Bus::Mmio, 0);
    device.set_wanted(1 << 20);
    d.set_config(4, B4, 9);
    d.device.reset(ResetPhase::Enter);
    assert_eq!((d.status(), d.m.line(MMIO_IRQ)), (0, true), "no call out yet");
    d.device.reset(ResetPhase::Hold);
    d.device.reset(ResetPhase::Exit);
    assert_eq!((d.m.line(MMIO_IRQ), get(&d, 0x60), device.actual()), (false, 0, 0));
    assert_eq!(d.config(0, B4), 256, "what the host wants stays");
}

#[test]
fn saved_with_an_interrupt_pending() {
    let device = balloon();
    let mut d = Driver::start(device.clone(), Bus::Mmio, 0);
    device.set_wanted(3 << 20);
    d.stop();
    let saved = d.device.save().unwrap();
    let other = Driver::find(balloon(), Bus::Mmio);
    other.device.restore(&saved).unwrap();
    assert_eq!((other.m.line(MMIO_IRQ), get(&other, 0x60), other.status()), (false, 2, 15), "told silently");
    set(&other, 0x64, 2);
    assert_eq!(get(&other, 0x60), 0);
    d.take_interrupts();
    // Status bits that are not there.
    for at in 0..saved.body.len() {
        let mut bad = saved.clone();
        bad.body[at] = 0x7f;
        if other.device.restore(&bad).is_ok() {
            assert_eq!(get(&other, 0x60) & !3, 0);
        }
    }
    reset(&*other.device);
    assert!(!other.m.line(MMIO_IRQ));
    let wrong = Driver::find(VirtioRng::new(None).unwrap(), Bus::Mmio);
    let error = wrong.device.restore(&saved).unwrap_err().to_string();
    assert!(error.contains("another type of device"), "{error}");
    let more = VirtioBalloon::new(VirtioBalloonOptions { free_page_reporting: true, deflate_on_oom: false });
    assert!(Driver::find(more, Bus::Mmio).device.restore(&saved).is_err(), "another number of queues");
}
