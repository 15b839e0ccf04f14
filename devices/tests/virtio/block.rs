use super::driver::{BUSES, Bus, Driver};
use mimus_core::backend::{BlockBackend, BlockCompletion, BlockRequest};
use mimus_core::bus::AccessSize::{B1, B4};
use mimus_devices::block::host::{NullBlock, RawBlock, RawOptions};
use mimus_devices::virtio::block::{VirtioBlock, VirtioBlockOptions};
use std::sync::{Arc, Mutex};

const SECTORS: u64 = 256;

fn options() -> VirtioBlockOptions {
    VirtioBlockOptions { serial: "disk-0".to_owned(), queues: 2, ..VirtioBlockOptions::default() }
}

fn image(read_only: bool) -> (tempfile::NamedTempFile, Arc<VirtioBlock>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512) as u8).collect();
    std::fs::write(file.path(), bytes).unwrap();
    let disk = open(&file, read_only);
    (file, disk)
}

fn open(file: &tempfile::NamedTempFile, read_only: bool) -> Arc<VirtioBlock> {
    let raw = RawOptions { read_only, lock: false, ..RawOptions::default() };
    VirtioBlock::new(Arc::new(RawBlock::open(file.path(), raw).unwrap()), options())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut h = kind.to_le_bytes().to_vec();
    h.extend([0; 4]);
    h.extend(sector.to_le_bytes());
    h
}

/// Runs a request; returns the status and how much was written.
fn request(d: &mut Driver, queue: usize, kind: u32, sector: u64, data: Option<(u64, u32, bool)>) -> (u8, u32) {
    let h = d.m.place(&header(kind, sector));
    let status = d.m.place(&[0xff]);
    let mut bufs = vec![(h, 16, false)];
    bufs.extend(data);
    bufs.push((status, 1, true));
    let len = d.call(queue, &bufs);
    (d.m.bytes(status, 1)[0], len)
}

#[test]
fn read_write_flush() {
    for bus in BUSES {
        let (file, disk) = image(false);
        let mut d = Driver::start(disk, bus, 0);
        assert_eq!((d.device_id(), d.config(0, B4)), (2, SECTORS), "{bus:?}");
        let buf = d.m.alloc(8192, 512);
        assert_eq!(request(&mut d, 0, 0, 3, Some((buf, 1024, true))), (0, 1025));
        assert_eq!(d.m.bytes(buf, 1024)[511..513], [3, 4]);
        d.m.put(buf, &[0xaa; 8192]);
        assert_eq!(request(&mut d, 1, 1, 8, Some((buf, 8192, false))), (0, 1));
        assert_eq!(request(&mut d, 0, 4, 0, None).0, 0);
        assert_eq!(std::fs::read(file.path()).unwrap()[8 * 512..24 * 512], [0xaa; 8192]);
        let id = d.m.alloc(20, 1);
        assert_eq!(request(&mut d, 0, 8, 0, Some((id, 20, true))), (0, 21));
        assert_eq!(&d.m.bytes(id, 8), b"disk-0\0\0");
        assert_eq!(request(&mut d, 0, 99, 0, None).0, 2);
        assert!(d.take_interrupts() > 0, "{bus:?}");
        // Out of range, not whole sectors, device memory.
        assert_eq!(request(&mut d, 0, 0, SECTORS - 1, Some((buf, 1024, true))).0, 1);
        assert_eq!(request(&mut d, 0, 0, u64::MAX, Some((buf, 512, true))).0, 1);
        assert_eq!(request(&mut d, 0, 0, 0, Some((buf, 100, true))).0, 1);
        assert_eq!(request(&mut d, 0, 0, 0, Some((0x100, 512, true))).0, 1);
        assert_eq!(d.status(), 15);
    }
}

#[test]
fn discard_and_write_zeroes() {
    let (file, disk) = image(false);
    let mut d = Driver::start(disk, Bus::Mmio, 0);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut r = sector.to_le_bytes().to_vec();
        r.extend(count.to_le_bytes());
        r.extend(flags.to_le_bytes());
        r
    };
    for (kind, sector, flags) in [(11, 8, 0), (13, 16, 0), (13, 24, 1)] {
        let at = d.m.place(&range(sector, 8, flags));
        assert_eq!(request(&mut d, 0, kind, 0, Some((at, 16, false))).0, 0);
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes[sector as usize * 512..][..4096], [0; 4096]);
    }
    for (kind, sector, count, flags, want) in
        [(11, 8, 8, 1, 2), (13, 8, 8, 2, 2), (13, 250, 8, 0, 1), (11, 0, u32::MAX, 0, 1)]
    {
        let at = d.m.place(&range(sector, count, flags));
        assert_eq!(request(&mut d, 0, kind, 0, Some((at, 16, false))).0, want);
    }
}

#[test]
fn read_only_disks_refuse_writes() {
    let (_file, disk) = image(true);
    let mut d = Driver::start(disk, Bus::Pci, 0);
    assert_ne!(d.features() & 1 << 5, 0);
    let buf = d.m.alloc(512, 512);
    assert_eq!(request(&mut d, 0, 1, 0, Some((buf, 512, false))).0, 1);
    assert_eq!(request(&mut d, 0, 0, 0, Some((buf, 512, true))).0, 0);
    assert_eq!(request(&mut d, 0, 4, 0, None).0, 0);
}

#[test]
fn scattered_and_indirect() {
    let (_file, disk) = image(false);
    let mut d = Driver::start(disk, Bus::Mmio, 0);
    let buf = d.m.alloc(4096, 512);
    let h = d.m.place(&header(0, 1));
    let mut bufs = vec![(h, 8, false), (h + 8, 8, false)];
    bufs.extend((0..64).map(|i| (buf + 16 * (63 - i), 16, true)));
    bufs.push((d.m.place(&[9]), 1, true));
    let head = d.rings[0].indirect(&mut d.m, &bufs);
    d.rings[0].publish(&d.m, head);
    d.notify(0);
    assert_eq!(d.rings[0].wait_used(&d.m), (head, 1025));
    // Sector 1 went to the end, in pieces of 16 backwards.
    assert_eq!(d.m.bytes(buf + 1008, 16), [1; 16]);
    assert_eq!(d.m.bytes(buf, 16), [2; 16]);
}

#[test]
fn write_through_flushes() {
    /// Counts flushes.
    struct Flushes(NullBlock, Mutex<u32>);
    impl BlockBackend for Flushes {
        fn submit(&self, r: BlockRequest, done: BlockCompletion) {
            *self.1.lock().unwrap() += u32::from(matches!(r.op, mimus_core::backend::BlockOp::Flush));
            self.0.submit(r, done);
        }
        fn capacity(&self) -> u64 {
            self.0.capacity()
        }
        fn read_only(&self) -> bool {
            false
        }
    }
    let backend = Arc::new(Flushes(NullBlock::new(1 << 20, true), Mutex::new(0)));
    let mut d = Driver::start(VirtioBlock::new(backend.clone(), options()), Bus::Mmio, 0);
    let buf = d.m.alloc(512, 512);
    assert_eq!(d.config(32, B1), 1);
    request(&mut d, 0, 1, 0, Some((buf, 512, false)));
    assert_eq!(*backend.1.lock().unwrap(), 0);
    d.set_config(32, B1, 0);
    assert_eq!(request(&mut d, 0, 1, 0, Some((buf, 512, false))), (0, 1));
    assert_eq!(*backend.1.lock().unwrap(), 1);
    // Without the flush feature, the driver cannot ask: every write is flushed.
    d.set_up(1 << 9 | 1 << 11);
    request(&mut d, 0, 1, 0, Some((buf, 512, false)));
    assert_eq!(*backend.1.lock().unwrap(), 2);
}

/// A disk whose requests wait until they are let go.
struct Held(NullBlock, Mutex<Vec<(BlockRequest, BlockCompletion)>>);

impl BlockBackend for Held {
    fn submit(&self, r: BlockRequest, done: BlockCompletion) {
        self.1.lock().unwrap().push((r, done));
    }
    fn capacity(&self) -> u64 {
        self.0.capacity()
    }
    fn read_only(&self) -> bool {
        false
    }
}

impl Held {
    fn new() -> Arc<Self> {
        Arc::new(Self(NullBlock::new(1 << 20, true), Mutex::default()))
    }
    fn release(&self) {
        let held = std::mem::take(&mut *self.1.lock().unwrap());
        held.into_iter().rev().for_each(|(r, done)| self.0.submit(r, done));
    }
}

#[test]
fn reset_and_stop_wait_for_the_disk() {
    for stop in [false, true] {
        let backend = Held::new();
        let mut d = Driver::start(VirtioBlock::new(backend.clone(), options()), Bus::Pci, 0);
        let buf = d.m.alloc(1024, 512);
        d.m.put(buf, &[1; 1024]);
        let (h, status) = (d.m.place(&header(0, 0)), d.m.place(&[0xff; 2]));
        for i in 0..2 {
            d.send(0, &[(h, 16, false), (buf + 512 * i, 512, true), (status + i, 1, true)]);
        }
        assert_eq!(d.rings[0].used_index(&d.m), 0);
        let later = {
            let backend = backend.clone();
            std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                backend.release();
            })
        };
        if stop {
            d.stop();
            assert_eq!(d.rings[0].used_index(&d.m), 2);
        } else {
            d.set_status(0);
            assert_eq!(d.rings[0].used_index(&d.m), 0, "the ring of before the reset is left alone");
        }
        assert_eq!(d.m.bytes(buf, 1024), [0; 1024]);
        later.join().unwrap();
    }
}

#[test]
fn out_of_order_and_event_index() {
    let backend = Held::new();
    let mut d = Driver::start(VirtioBlock::new(backend.clone(), options()), Bus::Mmio, 0);
    let (h, status) = (d.m.place(&header(4, 0)), d.m.place(&[0xff; 4]));
    // An interrupt only after the third: used_event is 2.
    let ring = &d.rings[0];
    d.m.put(ring.avail + 4 + 2 * u64::from(ring.size), &2u16.to_le_bytes());
    let heads: Vec<u16> = (0..4).map(|i| d.send(0, &[(h, 16, false), (status + i, 1, true)])).collect();
    let avail_event = d.rings[0].used + 4 + 8 * u64::from(d.rings[0].size);
    assert_eq!(d.m.bytes(avail_event, 2), 4u16.to_le_bytes());
    backend.release();
    let used: Vec<u16> = (0..4).map(|_| d.rings[0].wait_used(&d.m).0).collect();
    assert_eq!(used, heads.into_iter().rev().collect::<Vec<_>>());
    // The first ever is unconditional, the second is that of used_event.
    assert!((1..=2).contains(&d.take_interrupts()));
    d.m.put(d.rings[0].avail + 4 + 2 * u64::from(d.rings[0].size), &100u16.to_le_bytes());
    d.send(0, &[(h, 16, false), (status, 1, true)]);
    backend.release();
    d.rings[0].wait_used(&d.m);
    assert_eq!(d.take_interrupts(), 0);
}

#[test]
fn no_interrupt_flag_without_event_index() {
    let (_file, disk) = image(false);
    let mut d = Driver::start(disk, Bus::Pci, 1 << 29);
    request(&mut d, 0, 4, 0, None);
    d.stop();
    assert_eq!(d.take_interrupts(), 1);
    d.device.start();
    d.m.put(d.rings[0].avail, &1u16.to_le_bytes());
    request(&mut d, 0, 4, 0, None);
    d.stop();
    assert_eq!(d.take_interrupts(), 0);
}

#[test]
fn saved_between_requests() {
    for bus in BUSES {
        let (file, disk) = image(false);
        let mut d = Driver::start(disk, bus, 0);
        let buf = d.m.alloc(512, 512);
        for sector in 0..20 {
            assert_eq!(request(&mut d, 0, 0, sector, Some((buf, 512, true))).0, 0);
            assert_eq!(d.m.bytes(buf, 1), [sector as u8]);
            if sector % 3 == 0 {
                d.migrate(open(&file, false));
            }
        }
        assert_eq!(request(&mut d, 1, 4, 0, None).0, 0);
    }
}

#[test]
fn made_available_while_stopped() {
    let (file, disk) = image(false);
    let mut d = Driver::start(disk, Bus::Mmio, 0);
    let buf = d.m.alloc(512, 512);
    let (h, status) = (d.m.place(&header(0, 7)), d.m.place(&[0xff]));
    d.stop();
    let head = d.send(0, &[(h, 16, false), (buf, 512, true), (status, 1, true)]);
    assert_eq!(d.rings[0].used_index(&d.m), 0);
    d.migrate(open(&file, false));
    assert_eq!(d.rings[0].wait_used(&d.m), (head, 513));
    assert_eq!(d.m.bytes(buf, 1), [7]);
}
