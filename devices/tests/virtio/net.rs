use super::driver::{BUSES, Bus, Driver};
use mimus_core::backend::net::NetReceiver;
use mimus_core::backend::{MacAddress, NetBackend};
use mimus_core::bus::AccessSize::{B1, B2};
use mimus_devices::virtio::net::{VirtioNet, VirtioNetOptions};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

type LinkListener = Box<dyn Fn(bool) + Send + Sync>;

/// A wire whose other end is the test.
#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<Vec<u8>>>,
    receiver: Mutex<Option<NetReceiver>>,
    ready: AtomicU32,
    down: AtomicBool,
    link: Mutex<Option<LinkListener>>,
}

impl NetBackend for Wire {
    fn send(&self, frame: &[u8]) {
        self.sent.lock().unwrap().push(frame.to_vec());
    }
    fn set_receiver(&self, receiver: NetReceiver) {
        *self.receiver.lock().unwrap() = Some(receiver);
    }
    fn receive_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
    fn set_link_listener(&self, listener: LinkListener) {
        *self.link.lock().unwrap() = Some(listener);
    }
    fn link_up(&self) -> bool {
        !self.down.load(Ordering::SeqCst)
    }
}

impl Wire {
    fn deliver(&self, frame: &[u8]) -> bool {
        self.receiver.lock().unwrap().as_ref().unwrap()(frame)
    }
}

fn card(wire: &Arc<Wire>) -> Arc<VirtioNet> {
    let options = VirtioNetOptions { mac: MacAddress::nth(1), mtu: Some(1400), ..VirtioNetOptions::default() };
    VirtioNet::new(wire.clone(), options)
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| i as u8).collect()
}

/// Sends `data` behind an empty header.
fn transmit(d: &mut Driver, data: &[u8]) {
    let header = d.m.place(&[0; 12]);
    let at = d.m.place(data);
    d.call(1, &[(header, 12, false), (at, data.len() as u32, false)]);
}

#[test]
fn transmit_and_receive() {
    for bus in BUSES {
        let wire = Arc::new(Wire::default());
        let mut d = Driver::start(card(&wire), bus, 0);
        assert_eq!((d.device_id(), d.config(5, B1), d.config(6, B2), d.config(10, B2)), (1, 0x57, 1, 1400));
        transmit(&mut d, &frame(100));
        assert_eq!(*wire.sent.lock().unwrap(), [frame(100)]);

        let buf = d.m.alloc(2048, 16);
        let head = d.send(0, &[(buf, 2048, true)]);
        d.take_interrupts();
        assert!(wire.deliver(&frame(200)));
        assert_eq!(d.rings[0].take_used(&d.m), Some((head, 212)));
        assert_eq!(d.take_interrupts(), 1);
        let got = d.m.bytes(buf, 212);
        assert_eq!((&got[..12], &got[12..]), (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], &frame(200)[..]));
    }
}

#[test]
fn frames_are_spread_over_buffers() {
    let wire = Arc::new(Wire::default());
    let mut d = Driver::start(card(&wire), Bus::Mmio, 0);
    let buf = d.m.alloc(400, 16);
    for i in 0..2 {
        d.send(0, &[(buf + 100 * i, 60, true), (buf + 100 * i + 60, 40, true)]);
    }
    // Too long for what is there: kept back whole.
    assert!(!wire.deliver(&frame(200)));
    assert_eq!(d.rings[0].used_index(&d.m), 0);
    let ready = wire.ready.load(Ordering::SeqCst);
    d.send(0, &[(buf + 200, 100, true)]);
    assert_eq!(wire.ready.load(Ordering::SeqCst), ready + 1, "room is announced");
    assert!(wire.deliver(&frame(200)));
    let lens: Vec<u32> = std::iter::from_fn(|| d.rings[0].take_used(&d.m)).map(|u| u.1).collect();
    assert_eq!(lens, [100, 100, 12]);
    assert_eq!(d.m.bytes(buf + 10, 2), 3u16.to_le_bytes());
    assert_eq!(d.m.bytes(buf + 100, 100), frame(200)[88..188]);
    assert_eq!(d.m.bytes(buf + 200, 12), frame(200)[188..]);
}

#[test]
fn without_mergeable_buffers_long_frames_are_dropped() {
    let wire = Arc::new(Wire::default());
    let mut d = Driver::start(card(&wire), Bus::Mmio, 1 << 15);
    let buf = d.m.alloc(100, 16);
    d.send(0, &[(buf, 100, true)]);
    assert!(wire.deliver(&frame(89)), "dropped");
    assert!(wire.deliver(&frame(88)));
    assert_eq!(d.rings[0].take_used(&d.m).map(|u| u.1), Some(100));
    assert_eq!(d.rings[0].take_used(&d.m), None);
}

#[test]
fn checksum_offload() {
    let wire = Arc::new(Wire::default());
    let mut d = Driver::start(card(&wire), Bus::Pci, 0);
    let mut header = [0; 12];
    header[0] = 1;
    header[6] = 34;
    header[8] = 6;
    let h = d.m.place(&header);
    let data = d.m.place(&frame(64));
    d.call(1, &[(h, 12, false), (data, 64, false)]);
    let sent = wire.sent.lock().unwrap().pop().unwrap();
    let sum: u32 = sent[34..].chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c[1])).sum();
    let original = u32::from(frame(64)[40]) << 8 | u32::from(frame(64)[41]);
    // The field held a part of the sum: taken out again, the rest is all ones.
    let folded = |mut s: u32| {
        while s >> 16 != 0 {
            s = (s & 0xffff) + (s >> 16);
        }
        s
    };
    assert_eq!(folded(sum + original), 0xffff);
    // Outside the frame: dropped.
    header[6] = 200;
    let h = d.m.place(&header);
    d.call(1, &[(h, 12, false), (data, 64, false)]);
    assert!(wire.sent.lock().unwrap().is_empty());
}

#[test]
fn nobody_listens() {
    let wire = Arc::new(Wire::default());
    let mut d = Driver::find(card(&wire), Bus::Mmio);
    assert!(wire.deliver(&frame(60)), "dropped before the driver is there");
    d.set_up(0);
    d.stop();
    assert!(!wire.deliver(&frame(60)), "kept while the machine stands");
    d.device.start();
    assert!(!wire.deliver(&frame(60)), "kept while there is no buffer");
    let buf = d.m.alloc(100, 16);
    d.send(0, &[(buf, 100, true)]);
    assert!(wire.deliver(&frame(60)));
}

#[test]
fn link_changes_and_saving() {
    let wire = Arc::new(Wire::default());
    let mut d = Driver::start(card(&wire), Bus::PciIntx, 0);
    wire.down.store(true, Ordering::SeqCst);
    wire.link.lock().unwrap().as_ref().unwrap()(false);
    assert_eq!((d.config(6, B2), d.take_interrupts()), (0, 1));
    let buf = d.m.alloc(200, 16);
    d.send(0, &[(buf, 200, true)]);
    let other = Arc::new(Wire::default());
    d.migrate(card(&other));
    assert!(other.deliver(&frame(100)));
    assert_eq!(d.rings[0].take_used(&d.m).map(|u| u.1), Some(112));
    transmit(&mut d, &frame(60));
    assert_eq!(other.sent.lock().unwrap().len(), 1);
}
