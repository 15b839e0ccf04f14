use super::*;
use crate::testing::{Ram, assert_round_trip, inb, mmio, restore_with};
use mimus_core::bus::MemTxAttrs;
use mimus_core::device::{MmioDevice, PioDevice, lock};
use std::sync::atomic::{AtomicU32, Ordering};

fn device(ram: &Ram) -> Arc<Mutex<FwCfg>> {
    let f = FwCfg::new(ram.dma());
    lock(&f).add_u16(key::NB_CPUS, 0x1234).unwrap();
    lock(&f).add_file("etc/b", b"contents of b".to_vec()).unwrap();
    lock(&f).add_file("etc/a", b"a".to_vec()).unwrap();
    f
}

fn port(offset: u16, size: AccessSize) -> PioAccess {
    PioAccess { region: 0, offset, size, attrs: MemTxAttrs::vcpu(0) }
}

fn out(f: &Mutex<FwCfg>, offset: u16, size: AccessSize, value: u64) {
    f.pio_write(port(offset, size), value).unwrap();
}

fn select(f: &Mutex<FwCfg>, key: u16) {
    out(f, PORT_SELECTOR, AccessSize::B2, key.into());
}

fn read(f: &Mutex<FwCfg>, len: usize) -> Vec<u8> {
    (0..len).map(|_| inb(f, 0, PORT_DATA)).collect()
}

/// A descriptor at 0x1000, whose address is given by the two ports; returns its control field.
fn dma(f: &Mutex<FwCfg>, ram: &Ram, control: u32, length: u32, address: u64) -> u32 {
    let descriptor = [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat();
    ram.put(0x1000, &descriptor);
    out(f, PORT_DMA, AccessSize::B4, 0);
    out(f, PORT_DMA_LOW, AccessSize::B4, 0x1000_u32.swap_bytes().into());
    u32::from_be_bytes(ram.get(0x1000, 4).try_into().unwrap())
}

#[test]
fn items_by_ports() {
    let ram = Ram::new(0x1_0000);
    let f = device(&ram);
    assert_eq!(read(&f, 5), b"QEMU\0");
    select(&f, key::ID);
    assert_eq!(read(&f, 4), [3, 0, 0, 0]);
    select(&f, key::NB_CPUS);
    assert_eq!(read(&f, 3), [0x34, 0x12, 0], "items are little-endian, zeros follow");
    select(&f, 0x4000 | key::NB_CPUS);
    assert_eq!(read(&f, 1), [0x34]);
    select(&f, 0x3fff);
    assert_eq!(read(&f, 1), [0]);
    out(&f, PORT_SELECTOR, AccessSize::B1, 1);
    out(&f, PORT_DATA, AccessSize::B1, 7);
    assert_eq!(inb(&*f, 0, PORT_SELECTOR), 0);
    assert_eq!(f.pio_read(port(PORT_DMA, AccessSize::B4)).unwrap(), u64::from(u32::from_le_bytes(*b"QEMU")));
    assert_eq!(f.pio_read(port(PORT_DMA + 6, AccessSize::B1)).unwrap(), u64::from(b'F'));
    assert_eq!(f.pio_read(port(PORT_DMA + 7, AccessSize::B4)).unwrap(), u64::from(b'G'));
}

#[test]
fn the_directory() {
    let ram = Ram::new(0x1_0000);
    let f = device(&ram);
    select(&f, key::FILE_DIR);
    let dir = read(&f, 4 + 2 * 64);
    assert_eq!(dir[..4], [0, 0, 0, 2]);
    assert_eq!(dir[4..20], *b"\0\0\0\x01\0\x21\0\0etc/a\0\0\0", "sorted by name");
    select(&f, key::FILE_FIRST);
    assert_eq!(read(&f, 13), b"contents of b");
    assert!(lock(&f).modify_file("etc/a", b"longer".to_vec()));
    assert!(!lock(&f).modify_file("etc/c", b"".to_vec()));
    select(&f, key::FILE_DIR);
    assert_eq!(read(&f, 8)[4..], [0, 0, 0, 6]);
    let mut f = lock(&f);
    assert!(matches!(f.add_file("etc/a", b"".to_vec()), Err(FwCfgError::Duplicate(_))));
    assert!(matches!(f.add_file("", b"".to_vec()), Err(FwCfgError::Name(_))));
    assert!(matches!(f.add_file(&"x".repeat(56), b"".to_vec()), Err(FwCfgError::Name(_))));
    assert!(matches!(f.add_u16(key::NB_CPUS, 1), Err(FwCfgError::Duplicate(_))));
    assert!(matches!(f.add_u16(key::FILE_FIRST + 9, 1), Err(FwCfgError::Duplicate(_))));
}

#[test]
fn dma_by_ports_and_memory() {
    let ram = Ram::new(0x1_0000);
    let f = device(&ram);
    let select_b = u32::from(key::FILE_FIRST) << 16 | DMA_SELECT;
    assert_eq!(dma(&f, &ram, select_b | DMA_SKIP, 12, 0), 0);
    ram.put(0x2000, b"xxxx");
    assert_eq!(dma(&f, &ram, DMA_READ, 4, 0x2000), 0);
    assert_eq!(ram.get(0x2000, 4), b"b\0\0\0");
    assert_eq!(dma(&f, &ram, select_b | DMA_READ, 8, 0x2000), 0);
    assert_eq!(ram.get(0x2000, 8), b"contents");
    assert_eq!(dma(&f, &ram, DMA_READ, 4, 0xffff_0000), DMA_ERROR);
    assert_eq!(dma(&f, &ram, DMA_READ, 4, u64::MAX), DMA_ERROR);
    assert_eq!(dma(&f, &ram, select_b | DMA_WRITE, 4, 0x2000), DMA_ERROR, "read-only");
    out(&f, PORT_DMA, AccessSize::B4, 0xffff_ffff);
    out(&f, PORT_DMA_LOW, AccessSize::B4, 0);
    f.mmio_write(mmio(0, 16, AccessSize::B8), 0x1000).unwrap();
    assert_eq!(f.mmio_read(mmio(0, 16, AccessSize::B8)).unwrap(), u64::from_be_bytes(*b"QEMU CFG"));
    assert!(f.mmio_read(mmio(0, 24, AccessSize::B1)).is_err());
    f.mmio_write(mmio(0, 8, AccessSize::B2), key::FILE_FIRST.into()).unwrap();
    assert_eq!(f.mmio_read(mmio(0, 0, AccessSize::B4)).unwrap(), u64::from(u32::from_be_bytes(*b"cont")));
}

#[test]
fn writable_files_saved_and_restored() {
    let ram = Ram::new(0x1_0000);
    let told = Arc::new(AtomicU32::new(0));
    let make = || {
        let (f, t) = (device(&ram), told.clone());
        let listener =
            Box::new(move |data: &[u8]| t.store(u32::from_le_bytes(data.try_into().unwrap()), Ordering::Relaxed));
        lock(&f).add_writable_file("etc/w", [0; 4], listener).unwrap();
        f
    };
    let f = make();
    let select_w = u32::from(key::FILE_FIRST + 2) << 16 | DMA_SELECT;
    ram.put(0x2000, &[1, 2, 3, 4]);
    assert_eq!(dma(&f, &ram, select_w | DMA_WRITE, 4, 0x2000), 0);
    assert_eq!(told.swap(0, Ordering::Relaxed), 0x0403_0201);
    assert_eq!(dma(&f, &ram, select_w | DMA_WRITE, 5, 0x2000), DMA_ERROR, "no longer than it is");
    let other = make();
    assert_round_trip(&f, &other);
    assert_eq!(told.load(Ordering::Relaxed), 0x0403_0201);
    select(&other, key::FILE_FIRST + 2);
    assert_eq!(read(&other, 4), [1, 2, 3, 4]);
    assert!(restore_with(&other, "/offset", 5).is_err());
    assert!(restore_with(&other, "/selected", 0x4000).is_err());
    crate::testing::reset(&*other);
    assert_eq!(read(&other, 4), b"QEMU");
}

/// Made when it is selected, as long as it always was; written, if it may be, from then on.
#[test]
fn files_that_are_made() {
    let ram = Ram::new(0x1_0000);
    let value = Arc::new(AtomicU32::new(0));
    let build = || {
        let (f, shown, told) = (device(&ram), value.clone(), value.clone());
        let make = move || vec![shown.load(Ordering::Relaxed) as u8; 3];
        let written = Box::new(move |d: &[u8]| told.store(d[0].into(), Ordering::Relaxed));
        let w = lock(&f).add_made_file("etc/w", 2, Box::new(make.clone()), Some(written)).unwrap();
        let m = lock(&f).add_made_file("etc/m", 4, Box::new(make), None).unwrap();
        (f, w, m)
    };
    let (f, w, m) = build();
    ram.put(0x2000, &[5]);
    assert_eq!(dma(&f, &ram, u32::from(w) << 16 | DMA_SELECT | DMA_WRITE, 1, 0x2000), 0);
    select(&f, m);
    assert_eq!(read(&f, 5), [5, 5, 5, 0, 0]);
    assert_eq!(dma(&f, &ram, u32::from(m) << 16 | DMA_SELECT | DMA_WRITE, 1, 0x2000), DMA_ERROR);
    // What was made is saved, for it may be half read; what it was made of is not this device's.
    select(&f, m);
    assert_eq!(read(&f, 1), [5]);
    value.store(7, Ordering::Relaxed);
    let (other, _, _) = build();
    assert_round_trip(&f, &other);
    assert_eq!((read(&other, 2), value.load(Ordering::Relaxed)), (vec![5, 5], 7));
    select(&other, w);
    assert_eq!(read(&other, 2), [7, 7]);
}
