use super::*;
use crate::block::ata::Medium;
use crate::testing::host::Disk;
use crate::testing::memory::RAM;
use crate::testing::pci::{MMIO32, PciMachine};
use crate::testing::{Rng, assert_snapshot_round_trip, reset};
use mimus_core::bus::AccessSize::{B2, B4};

const SLOT: u8 = 0x18;
const LIST: u64 = RAM + 0x1000;
const RECEIVED: u64 = RAM + 0x2000;
const TABLES: u64 = RAM + 0x4000;
const BUFFER: u64 = RAM + 0x1_0000;

struct Bench {
    m: PciMachine,
    ahci: Arc<Ahci>,
    disk: Arc<Disk>,
    cd: Arc<Disk>,
}

impl Bench {
    /// A disk on port 0, a CD-ROM drive on port 2; the controller mapped and mastering.
    fn new() -> Self {
        let m = PciMachine::new();
        let ahci = Ahci::plug(m.slot(SLOT));
        let disk = Disk::new((0..1 << 20).map(|i: u32| (i / 512 + i) as u8).collect(), false);
        let cd = Disk::new((0..64 << 10).map(|i: u32| (i / 2048) as u8).collect(), true);
        ahci.attach(Some(0), Drive::new(disk.clone(), Medium::Disk, "S")).unwrap();
        ahci.attach(Some(2), Drive::new(cd.clone(), Medium::Cdrom, "")).unwrap();
        reset(&*ahci);
        m.set_config(SLOT, 0x24, B4, MMIO32 as u32);
        m.set_config(SLOT, 4, B2, 6);
        Self { m, ahci, disk, cd }
    }

    fn get(&self, at: u64) -> u32 {
        self.m.read(MMIO32 + at, B4) as u32
    }

    fn set(&self, at: u64, value: u32) {
        assert!(self.m.memory.write(MMIO32 + at, B4, value.into()).is_ok());
    }

    fn port(&self, n: u64, at: u64) -> u32 {
        self.get(0x100 + 0x80 * n + at)
    }

    fn set_port(&self, n: u64, at: u64, value: u32) {
        self.set(0x100 + 0x80 * n + at, value);
    }

    /// As a driver does: list, area of FISes, everything enabled, started.
    fn start(&self, n: u64) {
        self.set(4, 1 << 31 | 2);
        self.set_port(n, 0x00, LIST as u32);
        self.set_port(n, 0x08, RECEIVED as u32);
        self.set_port(n, 0x18, 1 << 4);
        self.set_port(n, 0x30, u32::MAX);
        self.set_port(n, 0x10, u32::MAX);
        self.set_port(n, 0x14, u32::MAX);
        self.set_port(n, 0x18, 1 << 4 | 1);
    }

    /// Writes a command into a slot: its FIS and packet, and where its data go.
    fn command(&self, slot: u64, fis: &[u8], packet: &[u8], regions: &[(u64, u32)]) {
        let table = TABLES + 0x400 * slot;
        let flags = 5 | (regions.len() as u32) << 16;
        let header = [flags, 0, table as u32, (table >> 32) as u32];
        self.m.memory.put(LIST + 32 * slot, &header.map(u32::to_le_bytes).concat());
        let mut bytes = vec![0; 0x80];
        bytes[..fis.len()].copy_from_slice(fis);
        bytes[0x40..0x40 + packet.len()].copy_from_slice(packet);
        for (at, len) in regions {
            bytes.extend([*at as u32, (*at >> 32) as u32, 0, len - 1].map(u32::to_le_bytes).concat());
        }
        self.m.memory.put(table, &bytes);
    }

    fn moved(&self, slot: u64) -> u32 {
        let bytes = self.m.memory.get(LIST + 32 * slot + 4, 4);
        u32::from_le_bytes(bytes.try_into().unwrap())
    }

    fn is_on(&self) -> bool {
        self.m.wires().iter().any(|w| *w)
    }

    /// Serves the interrupt of a port: what it was.
    fn serve(&self, n: u64) -> u32 {
        let what = self.port(n, 0x10);
        self.set_port(n, 0x10, what);
        self.set(8, u32::MAX);
        assert!(!self.is_on());
        what
    }
}

/// Register, host to device, with a 48-bit address.
fn fis(command: u8, lba: u64, count: u16) -> [u8; 20] {
    let (l, c) = (lba.to_le_bytes(), count.to_le_bytes());
    [0x27, 0x80, command, 0, l[0], l[1], l[2], 0x40, l[3], l[4], l[5], 0, c[0], c[1], 0, 0, 0, 0, 0, 0]
}

/// A queued command: its count is in the features, its tag in the count.
fn queued(command: u8, lba: u64, count: u16, tag: u8) -> [u8; 20] {
    let mut f = fis(command, lba, u16::from(tag) << 3);
    (f[3], f[11]) = (count as u8, (count >> 8) as u8);
    f
}

#[test]
fn what_it_is() {
    let b = Bench::new();
    assert_eq!(b.m.config(SLOT, 0, B4), 0x2922_8086);
    assert_eq!(b.m.config(SLOT, 8, B4) >> 8, 0x01_0601);
    assert_eq!((b.get(0) & 31, b.get(0) >> 8 & 31, b.get(0x0c), b.get(0x10)), (5, 31, 0x3f, 0x1_0301));
    assert_eq!(b.get(4), 1 << 31, "AHCI, and nothing else");
    // The ports with drives: link, signature, ready.
    assert_eq!((b.port(0, 0x28), b.port(0, 0x24), b.port(0, 0x20)), (0x113, 0x0000_0101, 0x150));
    assert_eq!((b.port(1, 0x28), b.port(1, 0x20)), (0, 0x7f));
    assert_eq!((b.port(2, 0x28), b.port(2, 0x24)), (0x113, 0xeb14_0101));
    assert_eq!(b.port(0, 0x10), 1 << 6 | 1 << 22, "a connection changed");
    b.set_port(0, 0x30, u32::MAX);
    assert_eq!(b.port(0, 0x10), 0);
}

#[test]
fn dma_there_and_back() {
    let b = Bench::new();
    b.start(0);
    // Scattered over three places.
    let regions = [(BUFFER, 512), (BUFFER + 0x2000, 1000), (BUFFER + 0x1000, 536)];
    b.command(3, &fis(0x25, 10, 4), &[], &regions);
    b.set_port(0, 0x38, 1 << 3);
    assert_eq!((b.port(0, 0x38), b.port(0, 0x20), b.moved(3)), (0, 0x50, 2048));
    assert!(b.is_on());
    assert_eq!((b.get(8), b.serve(0)), (1, 1), "a register FIS");
    assert_eq!(b.m.memory.get(RECEIVED + 0x40, 4), [0x34, 0x40, 0x50, 0]);
    let disk = b.disk.bytes();
    let at = |n: usize| 10 * 512 + n;
    assert_eq!(b.m.memory.get(BUFFER, 512), disk[at(0)..at(512)]);
    assert_eq!(b.m.memory.get(BUFFER + 0x2000, 1000), disk[at(512)..at(1512)]);
    assert_eq!(b.m.memory.get(BUFFER + 0x1000, 536), disk[at(1512)..at(2048)]);
    // And to the disk, through to it.
    b.m.memory.put(BUFFER, &[0x5a; 1024]);
    b.command(0, &fis(0x3d, 100, 2), &[], &[(BUFFER, 1024)]);
    b.disk.take_log();
    b.set_port(0, 0x38, 1);
    assert_eq!((b.port(0, 0x38), b.serve(0)), (0, 1));
    assert_eq!(b.disk.bytes()[51200..52224], [0x5a; 1024]);
    let ops: Vec<_> = b.disk.take_log().into_iter().map(|l| l.0).collect();
    assert_eq!(ops, [mimus_core::backend::BlockOp::Write, mimus_core::backend::BlockOp::Flush]);
}

#[test]
fn pio_and_commands_without_data() {
    let b = Bench::new();
    b.start(0);
    b.command(0, &fis(0xec, 0, 0), &[], &[(BUFFER, 512)]);
    b.set_port(0, 0x38, 1);
    assert_eq!((b.port(0, 0x38), b.serve(0), b.moved(0)), (0, 2, 512), "PIO Setup is all that comes");
    let setup = b.m.memory.get(RECEIVED + 0x20, 18);
    assert_eq!((setup[0], setup[1], setup[2], setup[15], setup[16], setup[17]), (0x5f, 0x60, 0x58, 0x50, 0, 2));
    assert_eq!(b.m.memory.get(BUFFER + 120, 4), 2048u32.to_le_bytes());
    b.command(0, &fis(0xea, 0, 0), &[], &[]);
    b.set_port(0, 0x38, 1);
    assert_eq!((b.port(0, 0x38), b.serve(0)), (0, 1));
    // What it does not know.
    b.command(0, &fis(0xfe, 0, 0), &[], &[]);
    b.set_port(0, 0x38, 1);
    assert_eq!((b.port(0, 0x38), b.port(0, 0x20), b.serve(0)), (1, 0x451, 1 << 30 | 1));
}

#[test]
fn queued_commands_end_in_any_order() {
    let b = Bench::new();
    b.start(0);
    b.disk.set_slow(true);
    for tag in 0..3u8 {
        let at = BUFFER + 0x1000 * u64::from(tag);
        b.command(tag.into(), &queued(0x60, 20 + u64::from(tag), 1, tag), &[], &[(at, 512)]);
    }
    b.set_port(0, 0x34, 7);
    b.set_port(0, 0x38, 7);
    assert_eq!((b.port(0, 0x38), b.port(0, 0x34)), (0, 7), "taken, not done");
    // One that is not queued waits for all of them.
    b.command(5, &fis(0xea, 0, 0), &[], &[]);
    b.set_port(0, 0x38, 1 << 5);
    assert_eq!(b.disk.take_log().len(), 3);
    for left in [6, 4, 0] {
        assert!(b.disk.finish());
        assert_eq!(b.port(0, 0x34), left);
        assert_eq!(b.serve(0), 8, "Set Device Bits");
    }
    assert_eq!(b.port(0, 0x38), 1 << 5);
    assert!(b.disk.finish());
    assert_eq!((b.port(0, 0x38), b.serve(0)), (0, 1));
    let disk = b.disk.bytes();
    for tag in 0..3 {
        let sector = (20 + tag) * 512;
        assert_eq!(b.m.memory.get(BUFFER + 0x1000 * tag as u64, 512), disk[sector..sector + 512]);
    }
}

#[test]
fn a_failed_queued_command_is_in_the_log() {
    let b = Bench::new();
    b.start(0);
    b.disk.set_failing(true);
    b.command(4, &queued(0x60, 0, 1, 4), &[], &[(BUFFER, 512)]);
    b.set_port(0, 0x34, 1 << 4);
    b.set_port(0, 0x38, 1 << 4);
    assert_eq!((b.serve(0), b.port(0, 0x20), b.port(0, 0x34)), (1 << 30 | 8, 0x4051, 1 << 4));
    // Nothing more until the driver starts it anew.
    b.disk.set_failing(false);
    b.set_port(0, 0x18, 1 << 4);
    assert_eq!((b.port(0, 0x34), b.port(0, 0x38), b.port(0, 0x18) >> 15 & 1), (0, 0, 0));
    b.set_port(0, 0x18, 1 << 4 | 1);
    b.command(0, &fis(0x2f, 0x10, 1), &[], &[(BUFFER, 512)]);
    b.set_port(0, 0x38, 1);
    assert_eq!((b.serve(0), b.m.memory.get(BUFFER, 4)), (2, vec![4, 0, 0x51, 0x40]));
}

#[test]
fn a_cdrom_reads() {
    let b = Bench::new();
    b.start(2);
    let mut f = fis(0xa0, 0, 0);
    f[3] = 1;
    b.command(0, &f, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0, 0, 0], &[(BUFFER, 4096)]);
    b.set_port(2, 0x38, 1);
    assert_eq!((b.port(2, 0x38), b.serve(2), b.moved(0)), (0, 1, 4096));
    let data = b.m.memory.get(BUFFER, 4096);
    assert_eq!((data[0], data[2047], data[2048], data[4095]), (7, 7, 8, 8));
    // By PIO: setup, then the status.
    let f = fis(0xa0, 0x800 << 8, 0);
    b.command(0, &f, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[(BUFFER, 8)]);
    b.set_port(2, 0x38, 1);
    assert_eq!((b.serve(2), b.m.memory.get(BUFFER, 8)), (3, vec![0, 0, 0, 31, 0, 0, 8, 0]));
    // An error: the sense key is in the register.
    b.command(0, &f, &[0x28, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], &[(BUFFER, 2048)]);
    b.set_port(2, 0x38, 1);
    assert_eq!((b.serve(2), b.port(2, 0x20)), (1 << 30 | 1, 0x5451));
    assert_eq!(b.cd.bytes().len(), 64 << 10);
}

#[test]
fn resets() {
    let b = Bench::new();
    b.start(0);
    // Software reset: two control FISes, then the signature.
    let mut control = [0; 20];
    (control[0], control[15]) = (0x27, 4);
    b.command(0, &control, &[], &[]);
    b.set_port(0, 0x38, 1);
    control[15] = 0;
    b.command(1, &control, &[], &[]);
    b.set_port(0, 0x38, 2);
    assert_eq!((b.port(0, 0x38), b.port(0, 0x20)), (0, 0x150));
    assert_eq!(b.m.memory.get(RECEIVED + 0x40, 8), [0x34, 0, 0x50, 1, 1, 0, 0, 0]);
    // COMRESET, with a write on its way: it is waited for.
    b.m.memory.put(RECEIVED, &[0; 0x100]);
    b.set_port(0, 0x2c, 1);
    assert_eq!((b.port(0, 0x28), b.port(0, 0x20)), (0, 0x7f));
    b.set_port(0, 0x2c, 0);
    assert_eq!((b.port(0, 0x28), b.port(0, 0x20), b.port(0, 0x30)), (0x113, 0x150, 1 << 26 | 1 << 16));
    assert_eq!(b.m.memory.get(RECEIVED + 0x40, 1), [0x34]);
    // The whole controller.
    b.set(4, 1);
    assert_eq!((b.get(4), b.port(0, 0x00), b.port(0, 0x18), b.port(0, 0x14)), (1 << 31, 0, 6, 0));
}

#[test]
fn messages() {
    let b = Bench::new();
    let at = u64::from(b.m.config(SLOT, 0x34, mimus_core::bus::AccessSize::B1));
    assert_eq!(b.m.config(SLOT, at, B4) & 0xff, 5);
    b.m.set_config(SLOT, at + 4, B4, 0xfee0_1000);
    b.m.set_config(SLOT, at + 8, B4, 0);
    b.m.set_config(SLOT, at + 12, B2, 0x41);
    b.m.set_config(SLOT, at + 2, B2, 1);
    b.start(0);
    b.set_port(0, 0x10, u32::MAX);
    b.set(8, u32::MAX);
    b.m.messages.take();
    for round in 0..2 {
        b.command(0, &fis(0xea, 0, 0), &[], &[]);
        b.set_port(0, 0x38, 1);
        let sent = b.m.messages.take();
        assert_eq!(sent.len(), 1, "round {round}");
        assert_eq!((sent[0].0, sent[0].1), (0xfee0_1000, 0x41));
        assert!(!b.is_on());
        // The port's status goes first, then the controller's: nothing more is sent.
        b.set_port(0, 0x10, 1);
        b.set(8, 1);
        assert!(b.m.messages.take().is_empty());
    }
    // The other way round, the controller finds the port still asserted, and says so again.
    b.set_port(0, 0x38, 1);
    b.m.messages.take();
    b.set(8, 1);
    assert_eq!(b.m.messages.take().len(), 1);
}

#[test]
fn lists_that_lead_nowhere() {
    let b = Bench::new();
    b.start(0);
    // Data beyond memory; too little room; a table, then a list, that is not there.
    b.command(0, &fis(0x25, 0, 1), &[], &[(0x10, 512)]);
    b.set_port(0, 0x38, 1);
    assert_eq!((b.serve(0), b.port(0, 0x38)), (1 << 28, 1));
    let again = || {
        b.set_port(0, 0x18, 1 << 4);
        b.set_port(0, 0x18, 1 << 4 | 1);
    };
    again();
    b.command(0, &fis(0x25, 0, 2), &[], &[(BUFFER, 512)]);
    b.set_port(0, 0x38, 1);
    assert_eq!(b.serve(0), 1 << 30 | 1 << 24 | 1);
    again();
    b.m.memory.put(LIST + 8, &[0; 8]);
    b.set_port(0, 0x38, 1);
    assert_eq!(b.serve(0), 1 << 29);
    again();
    b.set_port(0, 0x04, 0xffff_ffff);
    b.set_port(0, 0x38, 1);
    assert_eq!(b.serve(0), 1 << 29);
    assert!(b.disk.take_log().is_empty());
    // Without bus mastering nothing is read or written.
    b.set_port(0, 0x04, 0);
    again();
    b.m.set_config(SLOT, 4, B2, 2);
    b.set_port(0, 0x38, 1);
    assert_eq!(b.port(0, 0x10) & 1 << 29, 1 << 29);
}

#[test]
fn saved_and_restored() {
    let (a, b) = (Bench::new(), Bench::new());
    a.start(0);
    a.command(0, &fis(0xef, 0, 0), &[], &[]);
    let mut off = fis(0xef, 0, 0);
    off[3] = 0x82;
    a.command(1, &off, &[], &[]);
    a.set_port(0, 0x38, 2);
    assert_snapshot_round_trip(&*a.ahci, &*b.ahci);
    assert!(b.is_on() && b.port(0, 0x10) == 1 && b.get(8) == 1);
    // The other goes on where the first was: the write cache stays off.
    b.serve(0);
    b.command(0, &fis(0x35, 0, 1), &[], &[(BUFFER, 512)]);
    b.set_port(0, 0x38, 1);
    assert_eq!(b.disk.take_log().len(), 2, "a write, and a flush");
    // Another drive is refused, and changes nothing.
    let before = b.ahci.save().unwrap();
    let other = Ahci::plug(b.m.slot(0x20));
    assert!(other.restore(&before).unwrap_err().to_string().contains("-drive"));
    assert_eq!(b.ahci.save().unwrap(), before);
}

/// Registers, lists and tables of random numbers; states that something damaged.
#[test]
fn rubbish_does_no_harm() {
    let b = Bench::new();
    let mut rng = Rng(11);
    let good = b.ahci.save().unwrap();
    let mut refused = 0;
    for round in 0..400 {
        b.start(0);
        b.start(2);
        for _ in 0..60 {
            let word = rng.next();
            let place = [LIST, RECEIVED, TABLES, TABLES + 0x80][(word >> 60 & 3) as usize] + (word >> 40 & 0xff8);
            let near = [rng.next(), TABLES, BUFFER | (0x2000_0000_0000 * (word & 1))][(word >> 58) as usize % 3];
            b.m.memory.put(place, &near.to_le_bytes());
            let at = word >> 8 & 0xff | ((0x100 * (word >> 16 & 1)) & 0x17c);
            match word & 7 {
                0..=2 => b.set_port(word >> 20 & 2, 0x38, (word >> 32) as u32),
                3 => b.command(word >> 24 & 31, &fis((word >> 32) as u8, word >> 50, 3), &[], &[(BUFFER, 0x800)]),
                4 => b.set_port(word >> 20 & 2, 0x18, (word >> 32) as u32 & 1 | 0x10),
                _ => b.set(0x100 + (at & !3), (word >> 32) as u32 & !0xf),
            }
        }
        let mut bad = good.clone();
        let at = rng.below(bad.body.len() as u64) as usize;
        bad.body[at] ^= 1 << rng.below(8);
        let before = b.ahci.save().unwrap();
        if b.ahci.restore(&bad).is_err() {
            refused += 1;
            assert_eq!(b.ahci.save().unwrap(), before, "round {round}");
        }
        b.ahci.restore(&good).unwrap();
        b.m.set_config(SLOT, 0x24, B4, MMIO32 as u32);
        b.m.set_config(SLOT, 4, B2, 6);
    }
    assert!(refused > 50, "{refused}");
}
