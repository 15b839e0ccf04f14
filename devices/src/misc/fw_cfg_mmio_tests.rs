use super::*;
use crate::testing::memory::{Memory, OnBus, RAM, RAM_LEN, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{Rng, assert_round_trip, reset, restore_with, saved};
use mimus_core::device::lock;
use std::sync::atomic::{AtomicUsize, Ordering};

const DESCRIPTOR: u64 = RAM + 0x100;
const BUFFER: u64 = RAM + 0x1000;
const KERNEL: &[u8] = b"kernel image";

struct Board {
    memory: Memory,
    device: Arc<Mutex<FwCfg>>,
    bus: OnBus,
    /// Key of a file the guest may write, and how often it did.
    writable: u16,
    writes: Arc<AtomicUsize>,
}

impl Board {
    fn new() -> Self {
        let memory = Memory::new();
        let device = FwCfg::new(memory.dma());
        let writes = Arc::new(AtomicUsize::new(0));
        let count = writes.clone();
        let writable = {
            let mut f = lock(&device);
            f.add_bytes(key::KERNEL_DATA, KERNEL).unwrap();
            f.add_u64(key::RAM_SIZE, 0x1122_3344_5566_7788).unwrap();
            f.add_file("opt/org.example/b", *b"0123456789").unwrap();
            let listener = move |_: &[u8]| _ = count.fetch_add(1, Ordering::SeqCst);
            f.add_writable_file("opt/org.example/a", *b"........", Box::new(listener)).unwrap()
        };
        let bus = OnBus::new(&device, RULES);
        Self { memory, device, bus, writable, writes }
    }

    /// As a little-endian CPU writes the big-endian register.
    fn select(&self, key: u16) {
        self.bus.write(SELECTOR, AccessSize::B2, key.swap_bytes().into()).unwrap();
    }

    /// The next bytes of the item, read one by one.
    fn bytes(&self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.bus.read(DATA, AccessSize::B1).unwrap() as u8).collect()
    }

    fn describe(&self, control: u32, length: u32, address: u64) {
        let mut d = control.to_be_bytes().to_vec();
        d.extend(length.to_be_bytes());
        d.extend(address.to_be_bytes());
        self.memory.put(DESCRIPTOR, &d);
    }

    /// One DMA transfer; what its control field became.
    fn dma(&self, control: u32, length: u32, address: u64) -> u32 {
        self.describe(control, length, address);
        self.bus.write(DMA, AccessSize::B8, DESCRIPTOR.swap_bytes()).unwrap();
        self.control()
    }

    fn control(&self) -> u32 {
        u32::from_be_bytes(self.memory.get(DESCRIPTOR, 4).try_into().unwrap())
    }
}

fn select_bits(key: u16) -> u32 {
    u32::from(key) << 16 | DMA_SELECT
}

#[test]
fn signature_and_features() {
    let b = Board::new();
    assert_eq!(b.bytes(6), b"QEMU\0\0", "selected after a reset; zeros behind the end");
    b.select(key::ID);
    assert_eq!(b.bytes(4), [3, 0, 0, 0], "traditional interface and DMA, little-endian");
    assert_eq!(b.bus.read(DMA, AccessSize::B8), Ok(u64::from_le_bytes(*b"QEMU CFG")));
    assert_eq!(b.bus.read(DMA, AccessSize::B4), Ok(u32::from_le_bytes(*b"QEMU").into()));
    assert_eq!(b.bus.read(DMA_LOW, AccessSize::B4), Ok(u32::from_le_bytes(*b" CFG").into()));
}

#[test]
fn data_register_widths() {
    let b = Board::new();
    b.select(key::RAM_SIZE);
    assert_eq!(b.bus.read(DATA, AccessSize::B8), Ok(0x1122_3344_5566_7788), "bytes in memory order");
    b.select(key::KERNEL_DATA);
    assert_eq!(b.bus.read(DATA, AccessSize::B4), Ok(u32::from_le_bytes(*b"kern").into()));
    assert_eq!(b.bus.read(DATA, AccessSize::B2), Ok(u16::from_le_bytes(*b"el").into()));
    assert_eq!(b.bus.read(DATA, AccessSize::B1), Ok(b' '.into()));
    assert_eq!(b.bus.read(DATA, AccessSize::B8), Ok(u64::from_le_bytes(*b"image\0\0\0")), "past the end: zeros");
    assert_eq!(b.bytes(2), [0, 0]);
    b.select(key::KERNEL_DATA);
    for size in [AccessSize::B1, AccessSize::B2, AccessSize::B4, AccessSize::B8] {
        b.bus.write(DATA, size, !0).unwrap();
    }
    assert_eq!(b.bytes(12), KERNEL, "writes are ignored");
}

#[test]
fn selector() {
    let b = Board::new();
    b.select(key::KERNEL_DATA);
    b.bytes(5);
    b.select(key::KERNEL_DATA);
    assert_eq!(b.bytes(6), b"kernel", "selecting starts over");
    b.select(key::KERNEL_DATA | 0x4000);
    assert_eq!(b.bytes(6), b"kernel", "the obsolete write flag is no part of the key");
    for unknown in [0x10, 0x3fff, 0x8000, 0xffff] {
        b.select(unknown);
        assert_eq!(b.bytes(2), [0, 0]);
    }
    assert_eq!(b.bus.read(SELECTOR, AccessSize::B2), Ok(0), "write-only");
    for size in [AccessSize::B1, AccessSize::B4, AccessSize::B8] {
        assert!(b.bus.write(SELECTOR, size, 0).is_err());
    }
    assert!(b.bus.write(SELECTOR + 2, AccessSize::B2, 0).is_err());
}

#[test]
fn directory() {
    let b = Board::new();
    b.select(key::FILE_DIR);
    assert_eq!(b.bytes(4), [0, 0, 0, 2], "a big-endian count");
    let mut entries = Vec::new();
    for _ in 0..2 {
        let size = u32::from_be_bytes(b.bytes(4).try_into().unwrap());
        let key = u16::from_be_bytes(b.bytes(2).try_into().unwrap());
        assert_eq!(b.bytes(2), [0, 0]);
        let name = b.bytes(NAME_BYTES);
        let end = name.iter().position(|&c| c == 0).unwrap();
        entries.push((String::from_utf8(name[..end].to_vec()).unwrap(), size, key));
    }
    assert_eq!(
        entries,
        [("opt/org.example/a".into(), 8, b.writable), ("opt/org.example/b".into(), 10, key::FILE_FIRST)]
    );
    b.select(key::FILE_FIRST);
    assert_eq!(b.bytes(11), b"0123456789\0");
    assert!(lock(&b.device).modify_file("opt/org.example/b", *b"xyz"));
    b.select(key::FILE_DIR);
    b.bytes(4 + 64);
    assert_eq!(b.bytes(4), [0, 0, 0, 3]);
    assert!(!lock(&b.device).modify_file("opt/other", *b"xyz"));
}

#[test]
fn what_cannot_be_added() {
    let b = Board::new();
    let mut f = lock(&b.device);
    let long = "x".repeat(56);
    for name in ["", "a\nb", "ä", long.as_str()] {
        assert_eq!(f.add_file(name, *b""), Err(FwCfgError::Name(name.into())));
    }
    f.add_file(&long[1..], *b"").unwrap();
    assert!(matches!(f.add_file("opt/org.example/a", *b""), Err(FwCfgError::Duplicate(_))));
    assert!(matches!(f.add_u16(key::KERNEL_DATA, 0), Err(FwCfgError::Duplicate(_))));
    assert!(matches!(f.add_u16(key::FILE_FIRST + 100, 0), Err(FwCfgError::Duplicate(_))), "numbers of files");
    assert!(matches!(f.add_u16(key::KERNEL_DATA | 0x4000, 0), Err(FwCfgError::Duplicate(_))));
    f.add_u32(0x8001, 5).unwrap();
    f.add_string(key::CMDLINE_DATA, "quiet").unwrap();
    drop(f);
    b.select(key::CMDLINE_DATA);
    assert_eq!(b.bytes(6), b"quiet\0");
    b.select(0x8001);
    assert_eq!(b.bytes(4), [5, 0, 0, 0]);
}

#[test]
fn dma_reads() {
    let b = Board::new();
    b.memory.put(BUFFER, &[0xee; 32]);
    assert_eq!(b.dma(select_bits(key::KERNEL_DATA) | DMA_READ, 6, BUFFER), 0);
    assert_eq!(b.memory.get(BUFFER, 8), b"kernel\xee\xee");
    assert_eq!(b.dma(DMA_READ, 10, BUFFER), 0, "goes on where it was");
    assert_eq!(b.memory.get(BUFFER, 12), b" image\0\0\0\0\xee\xee", "zeros behind the end");
    assert_eq!(b.dma(select_bits(0x3000) | DMA_READ, 4, BUFFER), 0);
    assert_eq!(b.memory.get(BUFFER, 4), [0; 4], "an item that does not exist is empty");
    // The same position as the data register's.
    b.select(key::KERNEL_DATA);
    b.bytes(7);
    assert_eq!(b.dma(DMA_READ, 5, BUFFER), 0);
    assert_eq!(b.memory.get(BUFFER, 5), b"image");
    b.dma(select_bits(key::KERNEL_DATA) | DMA_READ, 7, BUFFER);
    assert_eq!(b.bytes(5), b"image");
}

#[test]
fn dma_skips_and_selects() {
    let b = Board::new();
    assert_eq!(b.dma(select_bits(key::KERNEL_DATA) | DMA_SKIP, 7, u64::MAX), 0);
    assert_eq!(b.bytes(5), b"image");
    assert_eq!(b.dma(select_bits(key::KERNEL_DATA), 100, 0), 0, "only selects");
    assert_eq!(b.bytes(6), b"kernel");
    assert_eq!(b.dma(DMA_SKIP, u32::MAX, 0), 0);
    assert_eq!(b.bytes(2), [0, 0]);
    assert_eq!(b.dma(0, 5, 0), 0);
    assert_eq!(b.dma(select_bits(key::KERNEL_DATA) | DMA_READ, 0, u64::MAX), 0, "nothing to read");
    // Reading comes before writing and skipping.
    assert_eq!(b.dma(DMA_READ | DMA_WRITE | DMA_SKIP, 3, BUFFER), 0);
    assert_eq!(b.memory.get(BUFFER, 3), b"ker");
    assert_eq!(b.bytes(1), b"n");
}

#[test]
fn dma_writes() {
    let b = Board::new();
    b.memory.put(BUFFER, b"ABCDEFGHIJ");
    assert_eq!(b.dma(select_bits(b.writable) | DMA_WRITE, 4, BUFFER), 0);
    assert_eq!(b.dma(DMA_WRITE, 2, BUFFER), 0);
    assert_eq!((b.writes.load(Ordering::SeqCst), b.bytes(2)), (2, b"..".to_vec()));
    b.select(b.writable);
    assert_eq!(b.bytes(9), b"ABCDAB..\0");
    b.select(b.writable);
    assert_eq!(b.dma(DMA_WRITE, 9, BUFFER), DMA_ERROR, "an item is not lengthened");
    assert_eq!(b.dma(DMA_WRITE, u32::MAX, BUFFER), DMA_ERROR);
    assert_eq!(b.dma(select_bits(key::KERNEL_DATA) | DMA_WRITE, 1, BUFFER), DMA_ERROR, "read-only");
    assert_eq!(b.dma(select_bits(0x3000) | DMA_WRITE, 1, BUFFER), DMA_ERROR, "does not exist");
    b.select(b.writable);
    assert_eq!(b.dma(DMA_WRITE, 1, 0x10), DMA_ERROR, "from nowhere");
    assert_eq!(b.bytes(8), b"ABCDAB..");
    assert_eq!(b.writes.load(Ordering::SeqCst), 2);
}

#[test]
fn dma_address_in_halves() {
    let b = Board::new();
    b.describe(select_bits(key::KERNEL_DATA) | DMA_READ, 3, BUFFER);
    b.bus.write(DMA, AccessSize::B4, 0).unwrap();
    assert_eq!(b.control(), select_bits(key::KERNEL_DATA) | DMA_READ, "the low half starts it");
    b.bus.write(DMA_LOW, AccessSize::B4, (DESCRIPTOR as u32).swap_bytes().into()).unwrap();
    assert_eq!((b.control(), b.memory.get(BUFFER, 3)), (0, b"ker".to_vec()));
    // The high half holds for one transfer.
    b.describe(DMA_READ, 3, BUFFER);
    b.bus.write(DMA, AccessSize::B4, 1u32.swap_bytes().into()).unwrap();
    b.bus.write(DMA_LOW, AccessSize::B4, (DESCRIPTOR as u32).swap_bytes().into()).unwrap();
    assert_eq!(b.control(), DMA_READ, "there is nothing at 0x1_8000_0100");
    b.bus.write(DMA_LOW, AccessSize::B4, (DESCRIPTOR as u32).swap_bytes().into()).unwrap();
    assert_eq!((b.control(), b.memory.get(BUFFER, 3)), (0, b"nel".to_vec()));
    // A whole address replaces a half that was written before.
    b.bus.write(DMA, AccessSize::B4, 1u32.swap_bytes().into()).unwrap();
    assert_eq!(b.dma(DMA_READ, 1, BUFFER), 0);
    b.describe(DMA_READ, 2, BUFFER);
    b.bus.write(DMA_LOW, AccessSize::B4, (DESCRIPTOR as u32).swap_bytes().into()).unwrap();
    assert_eq!((b.control(), b.memory.get(BUFFER, 2)), (0, b"im".to_vec()));
    for (at, size) in [(DMA, AccessSize::B2), (DMA_LOW, AccessSize::B1), (DMA_LOW, AccessSize::B2)] {
        assert!(b.bus.write(at, size, 0).is_err());
    }
}

#[test]
fn dma_where_memory_is_not() {
    let b = Board::new();
    let read = select_bits(key::KERNEL_DATA) | DMA_READ;
    assert_eq!(b.dma(read, 4, 0x10), DMA_ERROR);
    assert_eq!(b.dma(read, 4, u64::MAX - 1), DMA_ERROR);
    assert_eq!(b.dma(read, 4, RAM - 0x1000), DMA_ERROR, "ROM");
    assert_eq!(b.dma(read, 4, RAM + RAM_LEN - 2), DMA_ERROR, "across the end");
    // The zeros behind an item, for more memory than there is.
    b.memory.put(RAM + RAM_LEN - 1, &[9]);
    assert_eq!(b.dma(read, u32::MAX, RAM + 0x2000), DMA_ERROR);
    assert_eq!(b.memory.get(RAM + 0x2000, 16), b"kernel image\0\0\0\0");
    // A descriptor out of reach does nothing.
    for at in [0, RAM + RAM_LEN - 8, u64::MAX - 7, u64::MAX] {
        b.bus.write(DMA, AccessSize::B8, at.swap_bytes()).unwrap();
    }
}

#[test]
fn holes() {
    let b = Board::new();
    assert!(b.bus.read(SIZE, AccessSize::B1).is_err());
    assert_eq!(b.bus.read(12, AccessSize::B4), Ok(0));
    assert!(b.bus.write(12, AccessSize::B4, 0).is_err());
}

#[test]
fn resetting() {
    let b = Board::new();
    b.memory.put(BUFFER, b"A");
    b.dma(select_bits(b.writable) | DMA_WRITE, 1, BUFFER);
    b.bus.write(DMA, AccessSize::B4, 5).unwrap();
    reset(&*b.device);
    assert_eq!(b.bytes(4), b"QEMU");
    b.describe(select_bits(b.writable) | DMA_READ, 2, BUFFER);
    b.bus.write(DMA_LOW, AccessSize::B4, (DESCRIPTOR as u32).swap_bytes().into()).unwrap();
    assert_eq!((b.control(), b.memory.get(BUFFER, 2)), (0, b"A.".to_vec()), "high half 0; items stay");
}

#[test]
fn saved_in_the_middle() {
    let b = Board::new();
    b.memory.put(BUFFER, b"WXYZ");
    b.dma(select_bits(b.writable) | DMA_WRITE, 4, BUFFER);
    b.select(key::KERNEL_DATA);
    b.bytes(3);
    b.bus.write(DMA, AccessSize::B4, 0).unwrap();
    let other = Board::new();
    other.memory.put(BUFFER, b"WXYZ");
    other.memory.put(DESCRIPTOR, &b.memory.get(DESCRIPTOR, 16));
    assert_round_trip(&b.device, &other.device);
    assert_eq!(other.writes.load(Ordering::SeqCst), 1, "whoever listens has the contents, too");
    go_on_alike(&b, &other, 10_000, random_step);
    assert_eq!(saved(&b.device), saved(&other.device));
    assert_eq!(b.memory.get(RAM, RAM_LEN as usize), other.memory.get(RAM, RAM_LEN as usize));
}

fn random_step(b: &Board, rng: &mut Rng) -> u64 {
    let keys = [key::KERNEL_DATA, key::FILE_DIR, key::FILE_FIRST, b.writable, key::SIGNATURE, 0x1234];
    let key = keys[rng.below(6) as usize];
    let address =
        [BUFFER, BUFFER, RAM - 0x1000, RAM + RAM_LEN - 4, DESCRIPTOR + 4, 0, rng.next()][rng.below(7) as usize];
    let length = [rng.below(12), rng.below(5000), rng.next()][rng.below(3) as usize] as u32;
    match rng.below(6) {
        0 => b.select(key),
        1 => return b.dma(select_bits(key) | rng.next() as u32 & 0x1f, length, address).into(),
        2 => return b.dma(rng.next() as u32 & 0x17, length, address).into(),
        3 => {
            let (at, size) = (rng.below(SIZE), any_size(rng.next()));
            let _ = b.bus.write(at, size, rng.next());
        }
        _ => {
            let (at, size) = (rng.below(SIZE), any_size(rng.next()));
            return b.bus.read(at, size).unwrap_or(!0);
        }
    }
    0
}

#[test]
fn damaged_states() {
    let b = Board::new();
    b.select(key::KERNEL_DATA);
    for (field, value) in [("/offset", 13), ("/selected", 0x4000), ("/selected", 0x8000_0000u64)] {
        assert!(restore_with(&b.device, field, value).is_err(), "{field}");
    }
    assert!(restore_with(&b.device, &format!("/written/{}", b.writable), vec![0; 9]).is_err());
    let plain = FwCfg::new(b.memory.dma());
    let state = lock(&b.device).save_state();
    assert!(lock(&plain).restore_state(state).unwrap_err().to_string().contains("no writable item"));
    restore_damaged(&b.device, |rng| _ = random_step(&b, rng));
}

#[test]
fn random_accesses() {
    let b = Board::new();
    let mut rng = Rng(13);
    (0..20_000).for_each(|_| _ = random_step(&b, &mut rng));
    reset(&*b.device);
    assert_eq!(b.bytes(4), b"QEMU");
}
