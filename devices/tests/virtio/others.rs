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
