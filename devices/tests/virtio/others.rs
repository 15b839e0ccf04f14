//! Console, entropy source, balloon.

use super::driver::{BUSES, Bus, Driver};
use super::machine::{RAM_BASE, RAM_LEN};
use mimus_core::backend::CharBackend;
use mimus_core::backend::char::CharReceiver;
use mimus_core::bus::AccessSize::{B1, B4};
use mimus_core::bus::GuestPhys;
use mimus_devices::virtio::balloon::{VirtioBalloon, VirtioBalloonOptions};
use mimus_devices::virtio::console::VirtioConsole;
use mimus_devices::virtio::rng::VirtioRng;
use mimus_devices::virtio::virtio_device_of;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A terminal that takes at most `room` bytes.
#[derive(Default)]
struct Terminal {
    out: Mutex<Vec<u8>>,
    room: AtomicUsize,
    receiver: Mutex<Option<CharReceiver>>,
    writable: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    ready: AtomicUsize,
}

impl CharBackend for Terminal {
    fn write(&self, data: &[u8]) -> usize {
        let n = data.len().min(self.room.load(Ordering::SeqCst));
        self.room.fetch_sub(n, Ordering::SeqCst);
        self.out.lock().unwrap().extend(&data[..n]);
        n
    }
    fn set_receiver(&self, receiver: CharReceiver) {
        *self.receiver.lock().unwrap() = Some(receiver);
    }
    fn input_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        *self.writable.lock().unwrap() = Some(listener);
    }
}

impl Terminal {
    fn new(room: usize) -> Arc<Self> {
        let t = Self::default();
        t.room.store(room, Ordering::SeqCst);
        Arc::new(t)
    }
    fn give_room(&self, room: usize) {
        self.room.store(room, Ordering::SeqCst);
        self.writable.lock().unwrap().as_ref().unwrap()();
    }
    fn type_in(&self, data: &[u8]) -> usize {
        self.receiver.lock().unwrap().as_ref().unwrap()(data)
    }
    fn text(&self) -> String {
        String::from_utf8(self.out.lock().unwrap().clone()).unwrap()
    }
}

fn console(t: &Arc<Terminal>) -> Arc<VirtioConsole> {
    let console = VirtioConsole::new();
    assert!(console.connect(t.clone()));
    console
}

#[test]
fn console_output_and_input() {
    for bus in BUSES {
        let t = Terminal::new(1000);
        let mut d = Driver::start(console(&t), bus, 0);
        assert_eq!((d.device_id(), d.config(4, B4)), (3, 1));
        let text = d.m.place(b"hello");
        d.call(1, &[(text, 5, false)]);
        d.set_config(8, B1, b'!'.into());
        assert_eq!(t.text(), "hello!");
        let buf = d.m.alloc(8, 8);
        d.send(0, &[(buf, 4, true)]);
        assert_eq!(t.type_in(b"abcdef"), 4);
        assert_eq!(d.rings[0].take_used(&d.m).map(|u| u.1), Some(4));
        assert_eq!(d.m.bytes(buf, 4), b"abcd");
        let ready = t.ready.load(Ordering::SeqCst);
        d.send(0, &[(buf + 4, 4, true)]);
        assert!(t.ready.load(Ordering::SeqCst) > ready);
        assert_eq!(t.type_in(b"ef"), 2);
        assert!(d.take_interrupts() > 0);
    }
}

#[test]
fn console_saved_in_the_middle_of_a_write() {
    let t = Terminal::new(3);
    let mut d = Driver::start(console(&t), Bus::Mmio, 0);
    let text = d.m.place(b"abcdefgh");
    d.send(1, &[(text, 4, false), (text + 4, 4, false)]);
    d.send(1, &[(text, 2, false)]);
    assert_eq!((t.text().as_str(), d.rings[1].used_index(&d.m)), ("abc", 0));
    t.give_room(2);
    assert_eq!(t.text(), "abcde");
    let other = Terminal::new(1);
    d.migrate(console(&other));
    assert_eq!(other.text(), "f");
    other.give_room(100);
    assert_eq!((other.text().as_str(), d.rings[1].used_index(&d.m)), ("fghab", 2));
}

#[test]
fn entropy() {
    for bus in BUSES {
        let mut d = Driver::start(VirtioRng::new(None).unwrap(), bus, 0);
        let buf = d.m.alloc(8192, 16);
        assert_eq!(d.call(0, &[(buf, 64, true), (buf + 64, 64, true)]), 128);
        assert_ne!(d.m.bytes(buf, 64), d.m.bytes(buf + 64, 64));
        assert!((1..=8192).contains(&d.call(0, &[(buf, 8192, true)])));
        d.migrate(VirtioRng::new(None).unwrap());
        assert_eq!(d.call(0, &[(buf, 16, true)]), 16);
        assert_eq!(d.call(0, &[(buf, 16, false)]), 0, "no room is no entropy");
    }
    let missing = VirtioRng::new(Some("/nonexistent")).err().unwrap().to_string();
    assert!(missing.contains("/nonexistent"), "{missing}");
}

fn balloon() -> Arc<VirtioBalloon> {
    VirtioBalloon::new(VirtioBalloonOptions { deflate_on_oom: true, free_page_reporting: true })
}

#[test]
fn balloon_takes_pages() {
    let device = balloon();
    let mut d = Driver::start(device.clone(), Bus::Mmio, 0);
    let pages = RAM_BASE + RAM_LEN / 2;
    let in_page = |page: u64, d: &Driver| d.m.bytes(pages + page * 4096, 1)[0];
    d.m.dma().fill(GuestPhys(pages), 16 * 4096, 7).unwrap();
    // Upwards, downwards, a single one, one that is not RAM.
    let numbers = [0u32, 1, 2, 7, 6, 9, 0x7000_0000].map(|n| if n < 100 { (pages >> 12) as u32 + n } else { n });
    let list = d.m.place(&numbers.map(u32::to_le_bytes).concat());
    d.call(0, &[(list, 28, false)]);
    let left: Vec<u64> = (0..16).filter(|&p| in_page(p, &d) == 7).collect();
    assert_eq!(left, [3, 4, 5, 8, 10, 11, 12, 13, 14, 15]);
    d.call(1, &[(list, 28, false)]);
    // Free page reporting: the pages themselves.
    d.call(3, &[(pages + 10 * 4096, 8192, true), (pages + 13 * 4096 + 100, 8192, true)]);
    let left: Vec<u64> = (10..16).filter(|&p| in_page(p, &d) == 7).collect();
    assert_eq!(left, [12, 13, 15]);
    assert_eq!(d.status(), 15);

    device.set_wanted(1 << 20);
    assert_eq!((d.config(0, B4), d.take_interrupts() > 0), (256, true));
    d.set_config(4, B4, 128);
    assert_eq!(device.actual(), 512 << 10);
}

#[test]
fn balloon_statistics_across_a_save() {
    let mut d = Driver::start(balloon(), Bus::Pci, 0);
    let now = |d: &Driver| virtio_device_of::<VirtioBalloon>(&*d.device).unwrap();
    assert!(!now(&d).request_statistics());
    let mut stats = 4u16.to_le_bytes().to_vec();
    stats.extend(12345u64.to_le_bytes());
    let at = d.m.place(&stats);
    d.send(2, &[(at, 10, false)]);
    assert_eq!(now(&d).statistics(), [(4, 12345)]);
    assert_eq!(d.rings[2].used_index(&d.m), 0, "the device keeps the buffer");
    now(&d).set_wanted(4096);
    d.migrate(balloon());
    assert_eq!(d.config(0, B4), 1);
    assert_eq!(now(&d).statistics(), [(4, 12345)]);
    assert!(now(&d).request_statistics());
    assert_eq!(d.rings[2].used_index(&d.m), 1);
    assert!(!now(&d).request_statistics());
}

#[test]
fn console_waits_for_its_driver() {
    let t = Terminal::new(0);
    let device = console(&t);
    let mut d = Driver::find(device.clone(), Bus::Mmio);
    assert_eq!(t.type_in(b"early"), 0, "nobody takes input yet");
    d.set_config(8, B4, 0x1_0041);
    t.give_room(10);
    d.set_config(8, B4, 0x1_0042);
    assert_eq!(
        (t.text().as_str(), d.config(8, B4)),
        ("B", 0),
        "the emergency register takes a byte, and is written only"
    );
    let ready = t.ready.load(Ordering::SeqCst);
    d.set_up(0);
    assert!(t.ready.load(Ordering::SeqCst) > ready, "asks for what waits");
    assert_eq!(t.type_in(b"x"), 0, "no buffers");
    let buf = d.m.alloc(8, 8);
    d.send(0, &[(buf, 2, true), (buf + 4, 2, true)]);
    d.send(0, &[(buf + 2, 0, true)]);
    assert_eq!(t.type_in(b"abcdefgh"), 4);
    assert_eq!(d.m.bytes(buf, 8), b"ab\0\0cd\0\0");
    assert_eq!(d.rings[0].take_used(&d.m).map(|u| u.1), Some(4));
    // A transmit buffer that cannot be read is given back, and what is written to the receive queue's is not sent.
    d.call(1, &[(0x10, 4, false)]);
    assert_eq!(t.text(), "B");
    d.set_status(0);
    assert_eq!(t.type_in(b"late"), 0);
}

#[test]
fn console_size() {
    let t = Terminal::new(10);
    let device = console(&t);
    assert_eq!(Driver::find(device.clone(), Bus::Mmio).features() & 1, 0, "not known");
    device.set_size(80, 25);
    let device = console(&Terminal::new(10));
    device.set_size(80, 25);
    let mut d = Driver::start(device.clone(), Bus::Mmio, 0);
    assert_eq!((d.features() & 1, d.config(0, B4)), (1, 25 << 16 | 80));
    device.set_size(132, 43);
    assert_eq!((d.take_interrupts(), d.config(0, B4)), (1, 43 << 16 | 132));
}

#[test]
fn a_console_connected_to_nothing() {
    let mut d = Driver::start(VirtioConsole::new(), Bus::Pci, 0);
    let text = d.m.place(b"gone");
    d.call(1, &[(text, 4, false)]);
    d.set_config(8, B1, 65);
    assert!(console(&Terminal::new(1)).connect(Terminal::new(1)).eq(&false), "one back end");
}

#[test]
fn entropy_in_odd_places() {
    let mut d = Driver::start(VirtioRng::new(None).unwrap(), Bus::Mmio, 0);
    let buf = d.m.alloc(64, 16);
    assert_eq!(d.call(0, &[(buf, 3, true), (buf + 10, 1, true), (buf + 20, 0, true)]), 4);
    assert_eq!(d.m.bytes(buf + 11, 8), [0; 8], "not a byte beside");
    assert_eq!(d.call(0, &[(0x10, 16, true)]), 0, "nowhere");
    // A source that has no more.
    let mut d = Driver::start(VirtioRng::new(Some("/dev/null")).unwrap(), Bus::Mmio, 0);
    let buf = d.m.alloc(16, 16);
    assert_eq!((d.call(0, &[(buf, 16, true)]), d.status()), (0, 15));
}

#[test]
fn balloon_queues_depend_on_features() {
    // Without statistics the reporting queue is number 2 (§5.5.2).
    let mut d = Driver::start(balloon(), Bus::Mmio, 1 << 1);
    let page = RAM_BASE + RAM_LEN / 2;
    d.m.dma().fill(GuestPhys(page), 4096, 7).unwrap();
    d.call(2, &[(page, 4096, true)]);
    assert_eq!(d.m.bytes(page, 1), [0]);
    let now = virtio_device_of::<VirtioBalloon>(&*d.device).unwrap();
    assert!(!now.request_statistics() && now.statistics().is_empty());
    // With neither there are two.
    let plain = VirtioBalloon::new(VirtioBalloonOptions::default());
    let mut d = Driver::start(plain, Bus::Mmio, 1 << 1);
    assert_eq!((d.rings.len(), d.features() & 0x3f), (3, 2));
    let page = d.m.alloc(4096, 4096);
    d.m.put(page, &[7]);
    d.call(2, &[(page, 4096, true)]);
    assert_eq!(d.m.bytes(page, 1), [7], "nobody asked for it");
}

#[test]
fn balloon_lists_of_any_length() {
    let mut d = Driver::start(balloon(), Bus::Mmio, 0);
    let first = (RAM_BASE + RAM_LEN / 2) >> 12;
    // More than is read at a time, in two buffers that split a number.
    let numbers: Vec<u8> = (0..2000u32).flat_map(|i| (first as u32 + i % 100).to_le_bytes()).collect();
    let list = d.m.place(&numbers);
    d.m.dma().fill(GuestPhys(first << 12), 101 << 12, 7).unwrap();
    d.call(0, &[(list, 4098, false), (list + 4098, 8000 - 4098, false)]);
    let left: Vec<u64> = (0..101).filter(|i| d.m.bytes((first + i) << 12, 1) == [7]).collect();
    assert_eq!(left, [100]);
    // Half a number, nothing, numbers of no page, a list that is nowhere.
    let odd = d.m.place(&[0xff; 7]);
    for buffer in [(odd, 7, false), (odd, 3, false), (odd, 0, false), (0x10, 8, false)] {
        for queue in [0, 1] {
            d.call(queue, &[buffer]);
        }
    }
    assert_eq!(d.status(), 15);
}

#[test]
fn balloon_statistics_that_make_no_sense() {
    let mut d = Driver::start(balloon(), Bus::Mmio, 0);
    let now = virtio_device_of::<VirtioBalloon>(&*d.device).unwrap();
    let at = d.m.alloc(4096, 8);
    d.m.put(at, &[0xff; 4096]);
    d.send(2, &[(at, 4096, false)]);
    assert!(now.statistics().len() <= 64, "not without bound");
    assert!(now.statistics().iter().all(|s| *s == (0xffff, u64::MAX)));
    // A second buffer pushes the first one out.
    d.send(2, &[(at, 19, false)]);
    assert_eq!((d.rings[2].used_index(&d.m), now.statistics().len()), (1, 1));
    d.send(2, &[(0x10, 100, false)]);
    assert!(now.statistics().is_empty());
    assert!(now.request_statistics());
    d.set_status(0);
    assert!(!now.request_statistics() && now.statistics().is_empty(), "forgotten in a reset");
}
