//! Configuration space, BARs, bus mastering, MSI-X, the bridge.

use super::driver::{Bus, Driver};
use super::machine::{ATTRS, ECAM, MMIO32, MMIO64, Machine, PIO};
use mimus_core::bus::AccessSize::{B1, B2, B4, B8};
use mimus_core::bus::{GuestPhys, MemTxResult, Requester};
use mimus_devices::pci::{DevFn, PciError};
use mimus_devices::virtio::rng::VirtioRng;
use mimus_devices::virtio::transport::pci::{VirtioPci, VirtioPciOptions};
use std::sync::Arc;

fn plug(m: &Machine, devfn: u8) -> Arc<VirtioPci> {
    let slot = m.gpex.bus().reserve(Some(DevFn(devfn))).unwrap();
    VirtioPci::plug(VirtioRng::new(None).unwrap(), slot, VirtioPciOptions::default())
}

#[test]
fn enumeration() {
    let m = Machine::new();
    assert_eq!(m.config(0, 0, B4), 0x0008_1b36);
    assert_eq!(m.config(0, 8, B4) >> 8, 0x06_0000);
    assert_eq!(m.config(8, 0, B4), 0xffff_ffff);
    plug(&m, 8);
    assert_eq!((m.config(8, 0, B4), m.config(8, 0xe, B1)), (0x1044_1af4, 0));
    plug(&m, 9);
    assert_eq!((m.config(8, 0xe, B1), m.config(8, 0xc, B4) >> 16), (0x80, 0x80));
    assert_eq!(m.config(8, 0x100, B4), 0, "no extended capabilities");
    let taken = m.gpex.bus().reserve(Some(DevFn(9))).err().unwrap();
    assert_eq!(taken, PciError::Taken { bus: "pcie.0".to_owned(), devfn: DevFn(9) });
    assert_eq!(taken.to_string(), "pcie.0: address 01.1 is taken");
    // Read-only registers stay; other buses are empty.
    m.set_config(8, 0, B4, 0);
    assert_eq!(m.config(8, 0, B4), 0x1044_1af4);
    assert_eq!(m.space.read(GuestPhys(ECAM + 0xf_f000), B4, ATTRS), (0xffff_ffff, MemTxResult::Ok));
    assert_eq!("1f.7".parse(), Ok(DevFn(0xff)));
    for bad in ["20", "1.8", "", "x", "1.2.3"] {
        assert!(bad.parse::<DevFn>().is_err(), "{bad}");
    }
}

#[test]
fn bar_sizing_and_mapping() {
    let m = Machine::new();
    plug(&m, 8);
    for (bar, size, flags) in [(0x14, 0xffff_f000, 0), (0x20, 0xffff_c000, 0xc), (0x24, 0xffff_ffff, 0), (0x10, 0, 0)] {
        m.set_config(8, bar, B4, 0xffff_ffff);
        assert_eq!(m.config(8, bar, B4), size | flags, "BAR at {bar:#x}");
        m.set_config(8, bar, B4, 0);
    }
    let seen = |at| m.space.read(GuestPhys(at), B2, ATTRS).0;
    m.set_config(8, 0x20, B4, 0);
    m.set_config(8, 0x24, B4, (MMIO64 >> 32) as u32);
    assert_eq!(seen(MMIO64 + 0x12), 0xffff, "memory space is off");
    m.set_config(8, 4, B2, 2);
    assert_eq!(seen(MMIO64 + 0x12), 1);
    // Moved byte by byte, and sized while enabled.
    m.set_config(8, 0x22, B1, 1);
    assert_eq!((seen(MMIO64 + 0x12), seen(MMIO64 + 0x1_0012)), (0xffff, 1));
    m.set_config(8, 0x20, B4, 0xffff_ffff);
    m.set_config(8, 0x24, B4, 0xffff_ffff);
    m.set_config(8, 0x24, B4, 0);
    m.set_config(8, 0x20, B4, MMIO32 as u32);
    assert_eq!(seen(MMIO32 + 0x12), 1, "a 64-bit BAR below 4 GiB");
    m.set_config(8, 4, B2, 0);
    assert_eq!(seen(MMIO32 + 0x12), 0xffff);
    assert_eq!(m.space.read(GuestPhys(PIO + 0x100), B4, ATTRS), (0xffff_ffff, MemTxResult::Ok));
    m.write(MMIO32 + 0x100, B8, 1);
}

#[test]
fn bus_mastering_gates_dma() {
    let mut d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Pci, 0);
    let (f, buf) = (d.devfn(), d.m.alloc(16, 16));
    d.m.set_config(f, 4, B2, 2);
    d.send(0, &[(buf, 16, true)]);
    assert_eq!(d.status() & 64, 64);
    assert!(d.m.messages.0.lock().unwrap().is_empty(), "no message either");
    d.m.set_config(f, 4, B2, 6);
    d.set_up(0);
    assert_eq!(d.call(0, &[(buf, 16, true)]), 16);
}

#[test]
fn messages() {
    let mut d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Pci, 1 << 29);
    let (f, buf) = (d.devfn(), d.m.alloc(16, 16));
    let sent = |d: &Driver| std::mem::take(&mut *d.m.messages.0.lock().unwrap());
    d.call(0, &[(buf, 16, true)]);
    assert_eq!(sent(&d), [(0xfee0_0000, 0x41, Requester::Device(f.into()))]);
    // Masked: pending until it is unmasked, once.
    let (control, pending) = (MMIO32 + 16 + 12, MMIO32 + 0x800);
    d.m.write(control, B4, 1);
    for _ in 0..3 {
        d.call(0, &[(buf, 16, true)]);
    }
    assert_eq!((sent(&d).len(), d.m.read(pending, B4)), (0, 2));
    d.m.write(control, B4, 0);
    assert_eq!((sent(&d).len(), d.m.read(pending, B4)), (1, 0));
    // The same for all vectors at once.
    let cap = (0x40..0x100).step_by(4).find(|&c| d.m.config(f, c, B1) == 0x11).unwrap();
    assert_eq!(d.m.config(f, cap + 2, B2), 0x8001);
    d.m.set_config(f, cap + 2, B2, 0xc000);
    d.call(0, &[(buf, 16, true)]);
    let saved = d.device.save().unwrap();
    d.device.restore(&saved).unwrap();
    assert_eq!((sent(&d).len(), d.m.read(pending, B4)), (0, 2));
    d.m.set_config(f, cap + 2, B2, 0x8000);
    assert_eq!(sent(&d).len(), 1);
    // A vector that does not exist is refused.
    d.m.write(MMIO64 + 0x16, B2, 0);
    d.m.write(MMIO64 + 0x1a, B2, 9);
    assert_eq!(d.m.read(MMIO64 + 0x1a, B2), 0xffff);
    d.call(0, &[(buf, 16, true)]);
    assert!(sent(&d).is_empty());
    // MSI-X off: the pin.
    d.m.set_config(f, cap + 2, B2, 0);
    d.call(0, &[(buf, 16, true)]);
    let wire = usize::from(f >> 3) % 4;
    assert_eq!((d.m.line(wire), d.m.config(f, 6, B2) & 8), (true, 8));
    d.m.set_config(f, 4, B2, 0x406);
    assert!(!d.m.line(wire), "INTx disable");
    d.m.set_config(f, 4, B2, 6);
    assert!(d.m.line(wire));
    assert_eq!(d.m.read(MMIO64 + 0x1000, B1), 1);
    assert!(!d.m.line(wire));
}

#[test]
fn shared_wire() {
    let m = Machine::new();
    let devices = [plug(&m, 8), plug(&m, 5 << 3)];
    let pins = devices.each_ref().map(|d| d.slot().intx_pin().clone());
    pins[0].set_level(true);
    pins[1].set_level(true);
    pins[0].set_level(false);
    assert!(m.line(1));
    pins[1].set_level(false);
    assert!(!m.line(1));
}

#[test]
fn access_through_configuration_space() {
    let m = Machine::new();
    plug(&m, 8);
    let is_access = |&c: &u64| m.config(8, c, B1) == 9 && m.config(8, c + 3, B1) == 5;
    let cap = (0x40..0x100).step_by(4).find(is_access).unwrap();
    // Read num_queues, write and read the device status.
    let at = |offset, len| {
        m.set_config(8, cap + 4, B1, 4);
        m.set_config(8, cap + 8, B4, offset);
        m.set_config(8, cap + 12, B4, len);
    };
    at(0x12, 2);
    assert_eq!(m.config(8, cap + 16, B4), 1);
    at(0x14, 1);
    m.set_config(8, cap + 16, B4, 3);
    assert_eq!(m.config(8, cap + 16, B4), 3);
    at(0x4000, 4);
    assert_eq!(m.config(8, cap + 16, B4), 0);
    at(0x13, 2);
    assert_eq!(m.config(8, cap + 16, B4), 0);
}

#[test]
fn reset_unmaps() {
    let d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Pci, 0);
    let saved = d.device.save().unwrap();
    super::driver::reset(&*d.device);
    let seen = || d.m.space.read(GuestPhys(MMIO64 + 0x14), B1, ATTRS).0;
    assert_eq!((seen(), d.m.config(d.devfn(), 4, B2)), (0xff, 0));
    d.device.restore(&saved).unwrap();
    assert_eq!((seen(), d.m.config(d.devfn(), 4, B2)), (15, 6));
}
