use super::*;
use crate::testing::Rng;
use crate::testing::host::Disk;
use crate::testing::memory::{Memory, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{assert_round_trip, reset, restore_with, saved};
use mimus_core::bus::MemTxResult;
use mimus_core::device::Lifecycle;
use mimus_core::memory::{MemoryRegion, RamBacking};
use std::time::Duration;

const BASE: u64 = 0x2000_0000;
const LEN: u64 = 2 * SECTOR;

struct Board {
    memory: Memory,
    flash: Arc<Mutex<Pflash>>,
}

fn region(memory: &Memory, len: u64) -> RegionHandle {
    let block = memory.blocks.add_block("flash", len, RamBacking::Private).unwrap();
    let root = memory.space.root();
    RegionHandle::new(&memory.map, MemoryRegion::rom_device("flash", &block, RULES), Some(root), 0)
}

fn try_new(image: Option<Arc<Disk>>) -> Result<Board, FlashError> {
    let memory = Memory::new();
    let region = region(&memory, LEN);
    let flash = Pflash::new(region.clone(), image.map(|i| i as Arc<dyn BlockBackend>))?;
    region.map(BASE);
    memory.map.apply_pending();
    Ok(Board { memory, flash })
}

/// Different in every page.
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i ^ i >> 8 ^ i >> 16) as u8 | 0x10).collect()
}

impl Board {
    fn new() -> Self {
        try_new(None).unwrap()
    }

    fn with_image(image: &Arc<Disk>) -> Self {
        try_new(Some(image.clone())).unwrap()
    }

    fn erased() -> (Self, Arc<Disk>) {
        let disk = Disk::new(vec![0xff; LEN as usize], false);
        (Self::with_image(&disk), disk)
    }

    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let (value, result) = self.memory.read(BASE + offset, size);
        assert_eq!(result, MemTxResult::Ok);
        value
    }

    fn get(&self, offset: u64) -> u32 {
        self.read(offset, AccessSize::B4) as u32
    }

    fn set(&self, offset: u64, value: u32) {
        assert!(self.memory.write(BASE + offset, AccessSize::B4, value.into()).is_ok());
    }

    /// A command, to both chips.
    fn command(&self, offset: u64, command: u8) {
        self.set(offset, u32::from(command) << 16 | u32::from(command));
    }

    /// The status register, the same in both chips.
    fn status(&self) -> u8 {
        let both = self.get(0);
        assert_eq!(both >> 16, both & 0xffff);
        both as u8
    }

    fn word_program(&self, offset: u64, value: u32) -> u8 {
        self.command(offset, 0x40);
        self.set(offset, value);
        self.status()
    }

    fn erase(&self, offset: u64) -> u8 {
        self.command(offset, 0x20);
        self.command(offset, 0xd0);
        self.status()
    }

    fn array(&self, offset: u64, len: usize) -> Vec<u8> {
        self.command(0, 0xff);
        (0..len).map(|i| self.read(offset + i as u64, AccessSize::B1) as u8).collect()
    }

    fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; LEN as usize];
        assert!(lock(&self.flash).block.read(0, &mut all));
        all
    }

    /// Stops the machine; true if everything is written.
    fn stop(&self) -> bool {
        let drain = Drain::new();
        self.flash.stop(&drain);
        drain.wait(Duration::ZERO)
    }
}

#[test]
fn array_shows_the_image() {
    let image = Disk::new(pattern(LEN), false);
    let b = Board::with_image(&image);
    assert_eq!(
        b.read(0x1_2340, AccessSize::B8),
        u64::from_le_bytes(pattern(LEN)[0x1_2340..0x1_2348].try_into().unwrap())
    );
    assert_eq!(b.contents(), pattern(LEN));
    assert_eq!(lock(&b.flash).size(), LEN);
    image.take_log();
    assert!(b.stop());
    assert_eq!(image.take_log(), [(BlockOp::Flush, 0, 0)], "nothing changed");
    assert_eq!(Board::new().array(0, 4), [0; 4], "nothing without an image");
}

#[test]
fn images_that_do_not_fit() {
    let error = |len: u64, read_only| {
        let e = try_new(Some(Disk::new(vec![1; len as usize], read_only))).err().expect("an error").to_string();
        assert!(e.contains("test image") && !e.contains('\n'), "{e}");
        e
    };
    let short = error(LEN - 512, false);
    assert!(short.contains("truncate -s 524288"), "{short}");
    assert!(error(LEN + 512, false).contains("smaller image"));
    assert!(error(LEN + 512, true).contains("smaller image"));
    let failing = Disk::new(vec![1; LEN as usize], false);
    failing.set_failing(true);
    assert!(try_new(Some(failing)).err().unwrap().to_string().contains("cannot read"));
    // A read-only one may be shorter: the rest is erased.
    let b = Board::with_image(&Disk::new(vec![7; 1024], true));
    assert_eq!(b.array(1022, 4), [7, 7, 0xff, 0xff]);
    assert_eq!(b.array(LEN - 1, 1), [0xff]);
}

#[test]
fn regions_that_are_no_flash() {
    let memory = Memory::new();
    for (len, name) in [(SECTOR, "one"), (3 * SECTOR, "three")] {
        let block = memory.blocks.add_block(name, len, RamBacking::Private).unwrap();
        let region = MemoryRegion::rom_device(name, &block, RULES);
        let handle = RegionHandle::new(&memory.map, region, None, 0);
        assert!(matches!(Pflash::new(handle, None), Err(FlashError::Region(_))));
    }
    let rom = memory.blocks.add_block("rom2", LEN, RamBacking::Private).unwrap();
    let handle = RegionHandle::new(&memory.map, MemoryRegion::rom("rom2", &rom), None, 0);
    assert!(Pflash::new(handle, None).is_err());
}

#[test]
fn query() {
    let b = Board::new();
    // As drivers do: at word 0x55 of each chip.
    b.command(0x55 * 4, 0x98);
    let q = |at: u64| {
        let both = b.get(at * 4);
        assert_eq!(both >> 16, both & 0xffff, "both chips answer");
        (both & 0xff) as u8
    };
    assert_eq!([q(0x10), q(0x11), q(0x12)], *b"QRY");
    assert_eq!([q(0x13), q(0x14)], [1, 0], "the Intel command set");
    let extended = u64::from(q(0x15)) | u64::from(q(0x16)) << 8;
    assert_eq!([q(extended), q(extended + 1), q(extended + 2)], *b"PRI");
    assert_eq!(1u64 << q(0x27), LEN / 2, "bytes of one chip");
    assert_eq!([q(0x28), q(0x29)], [2, 0], "8 or 16 bits wide");
    assert_eq!(1u64 << q(0x2a), 2048, "bytes of its write buffer");
    assert_eq!(q(0x2c), 1);
    let sectors = u64::from(q(0x2d)) + (u64::from(q(0x2e)) << 8) + 1;
    let sector = (u64::from(q(0x2f)) | u64::from(q(0x30)) << 8) * 256;
    assert_eq!((sectors, sector), (2, SECTOR / 2));
    for time in [0x1f, 0x20, 0x21, 0x23, 0x24, 0x25] {
        assert!(q(time) > 0, "a time-out at {time:#x}");
    }
    assert_eq!((q(0x80), b.get(0)), (0, 0));
    // Narrow reads give parts of the word.
    assert_eq!(b.read(0x10 * 4, AccessSize::B2), u64::from(b'Q'));
    assert_eq!(b.read(0x10 * 4 + 2, AccessSize::B1), u64::from(b'Q'));
    assert_eq!(b.read(0x10 * 4 + 1, AccessSize::B1), 0);
    assert_eq!(b.read(0x10 * 4, AccessSize::B8), 0x0052_0052_0051_0051);
    b.command(0, 0xff);
    assert_eq!(b.get(0x40), 0, "the array again");
}

#[test]
fn identifier() {
    let b = Board::new();
    b.command(0, 0x90);
    assert_eq!((b.get(0), b.get(4)), (0x0089_0089, 0x0018_0018), "manufacturer and device");
    assert_eq!((b.get(8), b.get(SECTOR + 8)), (0, 0), "blocks are not locked");
    b.command(0, 0xf0);
    assert_eq!(b.get(0), 0);
}

#[test]
fn status() {
    let b = Board::new();
    b.command(0, 0x70);
    assert_eq!(b.status(), 0x80);
    assert_eq!(b.get(LEN - 4), 0x0080_0080, "anywhere in the bank");
    b.command(0, 0x20);
    b.command(0, 0x55);
    assert_eq!(b.status(), 0xb0, "a command sequence error sets both error bits");
    b.command(0, 0xff);
    b.command(0, 0x70);
    assert_eq!(b.status(), 0xb0, "they stay");
    b.command(0, 0x50);
    b.command(0, 0x70);
    assert_eq!(b.status(), 0x80, "until they are cleared");
    for unknown in [0x01, 0x33, 0xc0, 0xfe] {
        b.command(0, unknown);
        assert_eq!(b.get(0), 0, "{unknown:#x}: back to the array");
    }
}

/// OVMF takes for flash what is neither as it was, nor the command, nor ready.
#[test]
fn a_pc_bank_clears_its_ready_bit() {
    let memory = Memory::new();
    let region = region(&memory, 64 << 10);
    let disk = Disk::new(vec![0xff; 64 << 10], false);
    let flash = Pflash::with_geometry(region.clone(), Some(disk), PC).unwrap();
    region.map(BASE);
    memory.map.apply_pending();
    let command = |value: u64| assert!(memory.write(BASE + 0x40, AccessSize::B1, value).is_ok());
    let get = || memory.read(BASE + 0x40, AccessSize::B1).0;
    command(0x70);
    assert_eq!(get(), 0x80);
    command(0x50);
    assert_eq!(get(), 0xff, "the array");
    command(0x70);
    assert_eq!(get(), 0);
    assert!(lock(&flash).s.cleared);
    command(0x10);
    command(0x5a);
    assert_eq!(get(), 0x80, "ready after an operation");
    command(0xff);
    assert_eq!(get(), 0x5a);
}

#[test]
fn word_program() {
    let (b, image) = Board::erased();
    assert_eq!(b.word_program(0x100, 0x1234_5678), 0x80);
    assert_eq!(b.array(0x0ff, 6), [0xff, 0x78, 0x56, 0x34, 0x12, 0xff]);
    b.word_program(0x100, 0xff00_ff00);
    assert_eq!(b.array(0x100, 4), [0, 0x56, 0, 0x12], "bits only go from one to zero");
    // The other setup command, and narrow words.
    assert!(b.memory.write(BASE + 0x200, AccessSize::B2, 0x10).is_ok());
    assert!(b.memory.write(BASE + 0x200, AccessSize::B2, 0xabcd).is_ok());
    assert!(b.memory.write(BASE + 0x203, AccessSize::B1, 0x40).is_ok());
    assert!(b.memory.write(BASE + 0x203, AccessSize::B1, 0x5a).is_ok());
    assert_eq!(b.status(), 0x80);
    assert_eq!(b.array(0x200, 4), [0xcd, 0xab, 0xff, 0x5a]);
    assert!(b.stop());
    assert_eq!(image.bytes(), b.contents());
}

#[test]
fn block_erase() {
    let image = Disk::new(pattern(LEN), false);
    let b = Board::with_image(&image);
    assert_eq!(b.erase((SECTOR + 0x1234) & !3), 0x80, "any address of the block");
    let mut want = pattern(LEN);
    want[SECTOR as usize..].fill(0xff);
    assert_eq!(b.contents(), want);
    assert!(b.stop());
    assert_eq!(image.bytes(), want);
    // Given up with a reset.
    b.command(0, 0x20);
    b.command(0, 0xff);
    assert_eq!(b.array(0, 8), want[..8]);
    b.command(0, 0x70);
    assert_eq!(b.status(), 0x80);
}

#[test]
fn buffered_program() {
    let (b, image) = Board::erased();
    b.command(SECTOR, 0xe8);
    assert_eq!(b.status(), 0x80, "a buffer is available");
    b.command(SECTOR, 3);
    for (i, at) in [0u64, 4, 12, 8].into_iter().enumerate() {
        b.set(SECTOR + 0x40 + at, 0x1111_1111 * (i as u32 + 1));
    }
    assert!(b.contents().iter().all(|&x| x == 0xff), "nothing before the confirmation");
    b.command(SECTOR, 0xd0);
    assert_eq!(b.status(), 0x80);
    let mut want = vec![0xff; LEN as usize];
    let at = SECTOR as usize + 0x40;
    want[at..at + 16].copy_from_slice(&[[0x11; 4], [0x22; 4], [0x44; 4], [0x33; 4]].concat());
    assert_eq!(b.contents(), want);
    assert!(b.stop());
    assert_eq!(image.bytes(), want);
    // As many as the query table says: 2 KiB for each of two chips.
    b.command(0, 0xe8);
    b.command(0, 0);
    b.set(0, 1);
    b.command(0, 0xd0);
    b.command(0, 0xe8);
    b.set(0, 1023 << 16 | 1023);
    (0..1024).for_each(|i| b.set(0x1000 + i * 4, i as u32));
    b.command(0, 0xd0);
    assert_eq!((b.status(), b.array(0x1ffc, 5)), (0x80, vec![0xff, 3, 0, 0, 0xff]));
}

#[test]
fn buffered_program_gone_wrong() {
    let (b, _) = Board::erased();
    let failed = |b: &Board| {
        assert_eq!(b.status(), 0xb0);
        b.command(0, 0x50);
        assert!(b.contents().iter().all(|&x| x == 0xff));
    };
    // Too many words.
    b.command(0, 0xe8);
    b.set(0, 1024 << 16 | 1024);
    failed(&b);
    // Across the end of the block.
    b.command(0, 0xe8);
    b.command(0, 1);
    b.set(SECTOR - 4, 1);
    b.set(SECTOR, 1);
    failed(&b);
    // Not confirmed.
    b.command(0, 0xe8);
    b.command(0, 0);
    b.set(0, 1);
    b.command(0, 0x70);
    failed(&b);
    // Given up.
    b.command(0, 0xe8);
    b.command(0, 0);
    b.set(0, 1);
    b.command(0, 0xff);
    assert_eq!(b.get(0), !0);
    // None of it is left for the next.
    b.command(SECTOR, 0xe8);
    b.command(SECTOR, 0);
    b.set(SECTOR, 0);
    b.command(SECTOR, 0xd0);
    assert_eq!((b.array(0, 4), b.array(SECTOR, 8)), (vec![0xff; 4], vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]));
}

#[test]
fn locks_have_no_effect() {
    let (b, _) = Board::erased();
    for confirm in [0x01, 0xd0] {
        b.command(0, 0x60);
        b.command(0, confirm);
        assert_eq!(b.status(), 0x80);
    }
    assert_eq!(b.word_program(0, 0), 0x80);
    b.command(0, 0x60);
    b.command(0, 0x77);
    assert_eq!(b.status(), 0xb0);
}

#[test]
fn read_only() {
    let image = Disk::new(pattern(LEN), true);
    let b = Board::with_image(&image);
    assert_eq!(b.word_program(0, 0), 0x80 | 0x10 | 0x02, "program error, block locked");
    b.command(0, 0x50);
    assert_eq!(b.erase(0), 0x80 | 0x20 | 0x02, "erase error, block locked");
    b.command(0, 0x50);
    b.command(0, 0xe8);
    b.command(0, 0);
    b.set(0, 0);
    b.command(0, 0xd0);
    assert_eq!(b.status(), 0x80 | 0x10 | 0x02);
    assert_eq!(b.contents(), pattern(LEN));
    image.take_log();
    assert!(b.stop());
    assert_eq!(image.take_log(), []);
}

#[test]
fn written_back_in_pages() {
    let (b, image) = Board::erased();
    image.take_log();
    b.word_program(0x5ffc, 0);
    assert_eq!(image.take_log(), [(BlockOp::Write, 0x5000, 0x1000)], "at once");
    b.erase(SECTOR);
    assert_eq!(image.take_log(), [(BlockOp::Write, SECTOR, SECTOR)], "runs in one piece");
    // While a request is under way, changes gather; the same page is never written twice at a time.
    image.set_slow(true);
    b.word_program(0x1000, 0);
    b.word_program(0x1004, 1);
    b.word_program(0x3000, 2);
    b.word_program(0x4000, 3);
    assert_eq!(image.take_log(), [(BlockOp::Write, 0x1000, 0x1000)]);
    let drain = Drain::new();
    b.flash.stop(&drain);
    assert!(!drain.wait(Duration::ZERO), "a stop waits for it");
    assert!(image.finish());
    assert_eq!(image.take_log(), [(BlockOp::Write, 0x1000, 0x1000)], "it changed meanwhile");
    assert!(image.finish() && image.finish());
    assert_eq!(image.take_log(), [(BlockOp::Write, 0x3000, 0x2000), (BlockOp::Flush, 0, 0)]);
    assert!(!drain.wait(Duration::ZERO));
    assert!(image.finish() && !image.finish());
    assert!(drain.wait(Duration::ZERO));
    assert_eq!(image.bytes(), b.contents());
}

#[test]
fn a_host_that_cannot_write() {
    let (b, image) = Board::erased();
    image.set_failing(true);
    assert_eq!(b.word_program(0, 0), 0x80, "the guest has its change");
    assert!(b.stop(), "and nothing hangs");
    image.set_failing(false);
    b.word_program(4, 0);
    assert!(b.stop());
    assert_eq!(image.bytes(), b.contents());
}

#[test]
fn reset_shows_the_array() {
    let (b, _) = Board::erased();
    b.word_program(0, 0x55);
    b.command(0, 0x20);
    b.command(0, 0x11);
    b.command(0, 0xe8);
    reset(&*b.flash);
    b.memory.map.apply_pending();
    assert_eq!(b.get(0), 0x55, "contents stay");
    b.command(0, 0x70);
    assert_eq!(b.status(), 0x80, "errors do not");
}

#[test]
fn saved_in_the_middle() {
    let (b, _) = Board::erased();
    b.command(0, 0x20);
    b.command(0, 0x33);
    b.command(SECTOR, 0xe8);
    b.command(SECTOR, 2);
    b.set(SECTOR, 0x11);
    b.set(SECTOR + 4, 0x22);
    let (c, image) = Board::erased();
    assert_round_trip(&b.flash, &c.flash);
    c.memory.map.apply_pending();
    assert_eq!(c.status(), 0xb0);
    // The contents come with RAM; the image gets all of them when the machine starts.
    image.take_log();
    c.flash.start();
    assert_eq!(image.take_log(), [(BlockOp::Write, 0, LEN)]);
    c.flash.start();
    assert_eq!(image.take_log(), []);
    for x in [&b, &c] {
        x.set(SECTOR + 8, 0x33);
        x.command(SECTOR, 0xd0);
        assert_eq!(x.array(SECTOR, 12), [0x11, 0, 0, 0, 0x22, 0, 0, 0, 0x33, 0, 0, 0]);
    }
    go_on_alike(&b, &c, 20_000, random_step);
    assert_eq!((saved(&b.flash), b.contents() == c.contents()), (saved(&c.flash), true));
    assert!(c.stop());
    assert_eq!(image.bytes(), c.contents());
}

#[test]
fn restored_in_the_array() {
    let b = Board::new();
    let c = Board::new();
    c.command(0, 0x98);
    assert_round_trip(&b.flash, &c.flash);
    c.memory.map.apply_pending();
    assert_eq!(c.get(0x40), 0);
    assert!(c.memory.write(BASE, AccessSize::B4, 0x90).is_ok());
    assert_eq!(c.get(0), 0x0089_0089);
}

fn random_step(b: &Board, rng: &mut Rng) -> u64 {
    const COMMANDS: [u8; 20] = [
        0x00, 0x10, 0x20, 0x28, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xb0, 0xd0, 0xd0, 0xd0, 0xe8, 0xe8, 0xf0, 0xff, 3,
        1,
    ];
    let size = any_size(rng.next());
    let mut offset = rng.below(LEN / 8) * 8;
    if rng.below(2) == 0 {
        offset &= 0x18;
    }
    if rng.below(3) == 0 {
        return b.read(offset, size);
    }
    let value = if rng.below(5) > 0 { COMMANDS[rng.below(20) as usize].into() } else { rng.next() };
    let _ = b.memory.write(BASE + offset, size, value);
    0
}

#[test]
fn damaged_states() {
    let (b, _) = Board::erased();
    b.command(SECTOR, 0xe8);
    b.command(SECTOR, 9);
    b.set(SECTOR + 0x100, 1);
    b.set(SECTOR + 0x104, 2);
    for (field, value) in [
        ("/errors", 0x80),
        ("/sector", 0),
        ("/sector", LEN),
        ("/buffer/0/0", 0),
        ("/buffer/0/0", u64::MAX - 1),
        ("/buffer/0/0", LEN - 2),
        ("/buffer/1/1", 3),
        ("/buffer/1/1", 8),
        ("/cycle/BufferData/left", 1022),
    ] {
        assert!(restore_with(&b.flash, field, value).is_err(), "{field}");
    }
    assert!(restore_with(&b.flash, "/mode", "Array").is_err());
    assert!(restore_with(&b.flash, "/mode", "Nothing").is_err());
    restore_damaged(&b.flash, |rng| {
        b.memory.map.apply_pending();
        random_step(&b, rng);
    });
}

#[test]
fn random_accesses() {
    let (b, image) = Board::erased();
    let mut rng = Rng(17);
    for _ in 0..20_000 {
        random_step(&b, &mut rng);
    }
    assert!(b.stop());
    assert_eq!(image.bytes(), b.contents());
}
