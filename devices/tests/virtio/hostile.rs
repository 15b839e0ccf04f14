//! Drivers that break the rules: nothing panics, hangs or grows, and a reset mends all.

use super::driver::{BUSES, Bus, Driver, MMIO_BASE, reset};
use super::machine::{ATTRS, MMIO64, RAM_BASE, RAM_LEN};
use mimus_core::backend::{NetBackend, net::NetReceiver};
use mimus_core::bus::{AccessSize, GuestPhys};
use mimus_devices::block::host::NullBlock;
use mimus_devices::virtio::VirtioDevice;
use mimus_devices::virtio::balloon::{VirtioBalloon, VirtioBalloonOptions};
use mimus_devices::virtio::block::{VirtioBlock, VirtioBlockOptions};
use mimus_devices::virtio::console::VirtioConsole;
use mimus_devices::virtio::net::{VirtioNet, VirtioNetOptions};
use mimus_devices::virtio::rng::VirtioRng;
use std::sync::{Arc, Mutex};

const NEEDS_RESET: u8 = 64;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[derive(Default)]
struct Wire(Mutex<Option<NetReceiver>>);

impl NetBackend for Wire {
    fn send(&self, frame: &[u8]) {
        assert!(frame.len() < 1 << 17);
    }
    fn set_receiver(&self, receiver: NetReceiver) {
        *self.0.lock().unwrap() = Some(receiver);
    }
    fn receive_ready(&self) {}
}

fn devices(wire: &Arc<Wire>) -> Vec<Arc<dyn VirtioDevice>> {
    let disk = Arc::new(NullBlock::new(1 << 20, true));
    vec![
        VirtioBlock::new(disk, VirtioBlockOptions::default()),
        VirtioNet::new(wire.clone(), VirtioNetOptions::default()),
        VirtioRng::new(None).unwrap(),
        VirtioConsole::new(),
        VirtioBalloon::new(VirtioBalloonOptions { free_page_reporting: true, ..VirtioBalloonOptions::default() }),
    ]
}

fn rng_with(change: impl Fn(&mut Driver)) -> Driver {
    let mut d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Mmio, 0);
    change(&mut d);
    d.notify(0);
    d
}

#[test]
fn broken_rings_need_a_reset() {
    type Change = fn(&mut Driver);
    let cases: [(&str, Change); 9] = [
        ("index too far ahead", |d| d.m.put(d.rings[0].avail + 2, &100u16.to_le_bytes())),
        ("head outside", |d| {
            d.rings[0].publish(&d.m, 300);
        }),
        ("loop", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, r.desc, RAM_BASE, 16, 3, 1);
            r.set_desc(&d.m, r.desc + 16, RAM_BASE, 16, 3, 0);
            r.publish(&d.m, 0);
        }),
        ("next outside", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, r.desc, RAM_BASE, 16, 3, 999);
            r.publish(&d.m, 0);
        }),
        ("readable after writable", |d| {
            let head = d.rings[0].chain(&d.m, &[(RAM_BASE, 4, true), (RAM_BASE, 4, false)]);
            d.rings[0].publish(&d.m, head);
        }),
        ("indirect of a bad length", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, r.desc, RAM_BASE, 17, 4, 0);
            r.publish(&d.m, 0);
        }),
        ("indirect in an indirect table", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, RAM_BASE, RAM_BASE, 16, 4, 0);
            r.set_desc(&d.m, r.desc, RAM_BASE, 16, 4, 0);
            r.publish(&d.m, 0);
        }),
        ("indirect table in a device", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, r.desc, MMIO_BASE, 16, 4, 0);
            r.publish(&d.m, 0);
        }),
        ("more than the address space", |d| {
            let r = &mut d.rings[0];
            r.set_desc(&d.m, r.desc, u64::MAX, 16, 2, 0);
            r.publish(&d.m, 0);
        }),
    ];
    for (name, change) in cases {
        let mut d = rng_with(change);
        assert_eq!(d.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        assert_eq!(d.take_interrupts(), 1, "{name}");
        d.notify(0);
        d.set_up(0);
        let buf = d.m.alloc(16, 16);
        assert_eq!(d.call(0, &[(buf, 16, true)]), 16, "{name}");
    }
}

#[test]
fn requests_without_their_parts() {
    let disk = || VirtioBlock::new(Arc::new(NullBlock::new(1 << 20, true)), VirtioBlockOptions::default());
    let cases: [&[(u64, u32, bool)]; 3] =
        [&[(RAM_BASE, 16, false)], &[(RAM_BASE, 1, true)], &[(RAM_BASE, 15, false), (RAM_BASE, 1, true)]];
    for bufs in cases {
        let mut d = Driver::start(disk(), Bus::Pci, 0);
        d.send(0, bufs);
        assert_eq!(d.status() & NEEDS_RESET, NEEDS_RESET, "{bufs:?}");
    }
}

#[test]
fn buffers_forever_in_use() {
    // A driver that offers the same buffers again and again without waiting.
    let mut d = Driver::start(VirtioConsole::new(), Bus::Mmio, 0);
    let head = d.rings[1].chain(&d.m, &[(RAM_BASE, 16, false)]);
    for _ in 0..100 {
        d.rings[1].publish(&d.m, head);
        d.notify(1);
    }
    assert_eq!(d.rings[1].used_index(&d.m), 100);
}

#[test]
fn features_are_negotiated_properly() {
    for bus in BUSES {
        let d = Driver::find(VirtioRng::new(None).unwrap(), bus);
        let tries = [0, 1 << 28, 1 << 32 | 1 << 50, 1 << 32 | 1 << 5];
        for features in tries {
            d.set_status(0);
            d.set_status(3);
            d.set_features(features);
            d.set_status(11);
            assert_eq!(d.status(), 3, "{features:#x} on {bus:?}");
            d.set_status(15);
            assert_eq!(d.status() & 4, 0);
        }
        assert_eq!(d.features() >> 28, 0x13);
    }
}

/// Fills rings with half-sensible descriptors and pokes.
fn scribble(d: &mut Driver, r: &mut Random) {
    let end = RAM_BASE + RAM_LEN;
    for ring in &d.rings {
        for i in 0..u64::from(ring.size) {
            let addr = match r.below(8) {
                0 => r.next(),
                1 => end - r.below(64),
                2 => MMIO_BASE,
                _ => RAM_BASE + RAM_LEN / 2 + r.below(RAM_LEN / 4),
            };
            let len = match r.below(8) {
                0 => r.next() as u32,
                1 => 0,
                2 => 16 * r.below(20) as u32,
                _ => r.below(5000) as u32,
            };
            let flags = match r.below(6) {
                0 => r.next() as u16,
                1 => 4,
                n => (n & 3) as u16,
            };
            ring.set_desc(&d.m, ring.desc + 16 * i, addr, len, flags, r.below(u64::from(ring.size) + 1) as u16);
            d.m.put(ring.avail + 4 + 2 * i, &(r.below(u64::from(ring.size)) as u16).to_le_bytes());
        }
        let ahead = if r.below(10) == 0 { r.next() as u16 } else { r.below(u64::from(ring.size)) as u16 };
        let index = ring.used_index(&d.m).wrapping_add(ahead);
        d.m.put(ring.avail, &(r.below(2) as u16).to_le_bytes());
        d.m.put(ring.avail + 2, &index.to_le_bytes());
    }
}

#[test]
fn random_rings() {
    let mut r = Random(0x1234_5678_9abc_def1);
    let wire = Arc::new(Wire::default());
    for device in devices(&wire) {
        let mut d = Driver::start(device, Bus::Mmio, 0);
        for round in 0..150 {
            // Half of the time block requests get a kind that exists.
            d.m.put(RAM_BASE + RAM_LEN / 2 + r.below(RAM_LEN / 4), &[r.below(14) as u8, 0, 0, 0]);
            scribble(&mut d, &mut r);
            for queue in 0..5 {
                d.notify(queue);
            }
            if let Some(receive) = wire.0.lock().unwrap().as_ref() {
                receive(&vec![1; r.below(3000) as usize]);
            }
            d.take_interrupts();
            if d.status() & NEEDS_RESET != 0 || round % 20 == 0 {
                d.m.free_all();
                d.set_up(if r.below(2) == 0 { 0 } else { 3 << 28 });
            }
        }
        reset(&*d.device);
        assert_eq!(d.status(), 0);
    }
}

#[test]
fn random_register_accesses() {
    let mut r = Random(0xfeed_beef_1234_4321);
    for bus in BUSES {
        for device in devices(&Arc::new(Wire::default())) {
            let d = Driver::find(device, bus);
            let base = if bus == Bus::Mmio { MMIO_BASE } else { MMIO64 };
            let len = if bus == Bus::Mmio { 0x200 } else { 0x4000 };
            for _ in 0..2000 {
                let size = [AccessSize::B1, AccessSize::B2, AccessSize::B4, AccessSize::B8][r.below(4) as usize];
                let part = if r.below(2) == 0 { r.below(0x120) } else { r.below(len) };
                let at = GuestPhys(base + (part & !(size.bytes() - 1)));
                match r.below(2) {
                    0 => drop(d.m.space.read(at, size, ATTRS)),
                    _ => {
                        let value = if r.below(2) == 0 { r.next() } else { r.below(16) };
                        let _ = d.m.space.write(at, size, value, ATTRS);
                    }
                }
            }
            let saved = d.device.save().unwrap();
            reset(&*d.device);
            d.device.restore(&saved).unwrap();
            assert_eq!(d.device.save().unwrap(), saved);
        }
    }
}

#[test]
fn damaged_saved_states() {
    let mut r = Random(77);
    let wire = Arc::new(Wire::default());
    for bus in [Bus::Mmio, Bus::Pci] {
        for device in devices(&wire) {
            let d = Driver::start(device, bus, 0);
            let saved = d.device.save().unwrap();
            for _ in 0..300 {
                let mut bad = saved.clone();
                let at = r.below(bad.body.len() as u64) as usize;
                match r.below(3) {
                    0 => bad.body.truncate(at),
                    _ => bad.body[at] = r.next() as u8,
                }
                let _ = d.device.restore(&bad);
                d.device.start();
                (0..3).for_each(|q| d.notify_anyhow(q));
            }
            reset(&*d.device);
            d.device.restore(&saved).unwrap();
            assert_eq!(d.device.save().unwrap(), saved);
        }
    }
}

impl Driver {
    /// Notifies although the BAR may be anywhere.
    fn notify_anyhow(&self, queue: u64) {
        let at = if self.bus == Bus::Mmio { MMIO_BASE + 0x50 } else { MMIO64 + 0x3000 + 4 * queue };
        let _ = self.m.space.write(GuestPhys(at), AccessSize::B4, queue, ATTRS);
    }
}
