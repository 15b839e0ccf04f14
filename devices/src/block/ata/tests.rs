use super::*;
use crate::testing::host::Disk;

fn drive(medium: Medium, bytes: usize) -> Drive {
    Drive::new(Disk::new(vec![0; bytes], medium == Medium::Cdrom), medium, "SER1")
}

fn task(command: u8, lba: u64, count: u16) -> TaskFile {
    TaskFile { command, lba, count, device: 0x40, ..TaskFile::default() }
}

fn data(action: Action) -> Vec<u8> {
    match action {
        Action::Data(_, data) => data,
        other => panic!("{other:?}"),
    }
}

fn word(data: &[u8], n: usize) -> u16 {
    u16::from_le_bytes([data[2 * n], data[2 * n + 1]])
}

#[test]
fn a_disk_says_what_it_is() {
    let mut d = drive(Medium::Disk, 10 << 20);
    let id = data(d.execute(&task(0xec, 0, 0), &[]));
    assert_eq!(id.len(), 512);
    assert_eq!(id.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0, "the sum over all");
    assert_eq!((word(&id, 60), word(&id, 100)), (20480, 20480));
    assert_eq!(&id[20..24], b"ES1R", "bytes of words are swapped");
    assert_eq!(word(&id, 75), 31);
    assert_ne!(word(&id, 76) & 1 << 8, 0, "queued commands");
    // A change of settings shows.
    assert_ne!(word(&id, 85) & 1 << 5, 0);
    assert!(matches!(d.execute(&TaskFile { features: 0x82, ..task(0xef, 0, 0) }, &[]), Action::Done(_)));
    assert_eq!(word(&data(d.execute(&task(0xec, 0, 0), &[])), 85) & 1 << 5, 0);
    assert_eq!(d.execute(&task(0xa1, 0, 0), &[]), Action::Failed(error::ABRT));
}

#[test]
fn addresses_of_every_kind() {
    let mut d = drive(Medium::Disk, 10 << 20);
    let transfer = |a: Action| match a {
        Action::Transfer { op, protocol, sector, bytes, through } => (op, protocol, sector, bytes, through),
        other => panic!("{other:?}"),
    };
    use BlockOp::{Read, Write};
    use Protocol::{Dma, Pio, Queued};
    assert_eq!(transfer(d.execute(&task(0xc8, 5, 2), &[])), (Read, Dma, 5, 1024, false));
    assert_eq!(transfer(d.execute(&task(0x20, 5, 0), &[])), (Read, Pio, 5, 256 * 512, false), "0 is 256");
    assert_eq!(d.execute(&task(0x25, 0, 0), &[]), Action::Failed(error::IDNF), "0 is 65536, more than there are");
    assert_eq!(transfer(d.execute(&task(0x35, 0x100, 0x101), &[])), (Write, Dma, 0x100, 0x101 * 512, false));
    assert!(transfer(d.execute(&task(0x3d, 0, 1), &[])).4, "FUA");
    let queued = TaskFile { features: 3, device: 0xc0, ..task(0x61, 7, 9 << 3) };
    assert_eq!(transfer(d.execute(&queued, &[])), (Write, Queued, 7, 1536, true));
    // By cylinder, head and sector: 1, 2, 3.
    let chs = TaskFile { device: 2, ..task(0x20, 1 << 8 | 3, 1) };
    assert_eq!(transfer(d.execute(&chs, &[])).2, (16 + 2) * 63 + 2);
    assert_eq!(d.execute(&TaskFile { device: 0, ..task(0x20, 0, 1) }, &[]), Action::Failed(error::IDNF), "no sector 0");
    // The last sector, and one more.
    assert_eq!(transfer(d.execute(&task(0xc8, 20479, 1), &[])).2, 20479);
    for (command, lba, count) in [(0xc8, 20479, 2), (0x25, u64::MAX >> 16, 1), (0x40, 20480, 1), (0x42, 20479, 2)] {
        assert_eq!(d.execute(&task(command, lba, count), &[]), Action::Failed(error::IDNF), "{command:x}");
    }
    let Action::Done(native) = d.execute(&task(0xf8, 0, 0), &[]) else { panic!() };
    assert_eq!((native.lba, native.device & 15), (20479, 0));
}

#[test]
fn multiple_needs_its_block() {
    let mut d = drive(Medium::Disk, 1 << 20);
    assert_eq!(d.execute(&task(0xc4, 0, 8), &[]), Action::Failed(error::ABRT));
    assert_eq!(d.execute(&task(0xc6, 0, 3), &[]), Action::Failed(error::ABRT));
    assert!(matches!(d.execute(&task(0xc6, 0, 16), &[]), Action::Done(_)));
    assert!(matches!(d.execute(&task(0xc4, 0, 8), &[]), Action::Transfer { .. }));
    assert_eq!(word(&data(d.execute(&task(0xec, 0, 0), &[])), 59), 0x110);
    d.reset();
    assert_eq!(d.execute(&task(0xc4, 0, 8), &[]), Action::Failed(error::ABRT));
}

#[test]
fn the_log_has_the_queued_command_that_failed() {
    let mut d = drive(Medium::Disk, 1 << 20);
    let error = d.failed(&BlockError::Io("x".into()), Some(5));
    assert_eq!(error, error::UNC);
    let page = data(d.execute(&task(0x2f, 0x10, 1), &[]));
    assert_eq!((page[0], page[3], page.iter().fold(0u8, |s, b| s.wrapping_add(*b))), (5, error::UNC, 0));
    assert_eq!(data(d.execute(&task(0x2f, 0x10, 1), &[]))[0], 0x80, "once");
    assert_eq!(d.execute(&task(0x2f, 0x11, 1), &[]), Action::Failed(error::ABRT));
}

#[test]
fn a_cdrom_reads_by_packets() {
    let mut d = drive(Medium::Cdrom, 100 * 2048);
    let dma = TaskFile { features: 1, ..task(command::PACKET, 0, 0) };
    let packet = |b: &[u8]| {
        let mut p = [0; 16];
        p[..b.len()].copy_from_slice(b);
        p
    };
    assert_eq!(d.execute(&task(0xec, 0, 0), &[]), Action::Failed(error::ABRT));
    assert_eq!(data(d.execute(&task(0xa1, 0, 0), &[]))[1], 0x85);
    assert_eq!(data(d.execute(&dma, &packet(&[0x25]))), [0, 0, 0, 99, 0, 0, 8, 0]);
    let read = d.execute(&dma, &packet(&[0x28, 0, 0, 0, 0, 98, 0, 0, 2]));
    let want =
        Action::Transfer { op: BlockOp::Read, protocol: Protocol::Dma, sector: 392, bytes: 4096, through: false };
    assert_eq!(read, want);
    // One too many: the sense says why, once.
    assert_eq!(d.execute(&dma, &packet(&[0x28, 0, 0, 0, 0, 99, 0, 0, 2])), Action::Failed(5 << 4 | error::ABRT));
    let sense = data(d.execute(&dma, &packet(&[3, 0, 0, 0, 18])));
    assert_eq!((sense[2], sense[12]), (5, 0x21));
    assert_eq!(data(d.execute(&dma, &packet(&[3, 0, 0, 0, 18])))[2], 0);
    // The table of contents: track 1 and the lead-out at the end; cut where the host wants no more.
    let toc = data(d.execute(&dma, &packet(&[0x43, 0, 0, 0, 0, 0, 0, 0, 200])));
    assert_eq!((toc.len(), toc[1], toc[6], toc[14], toc[19]), (20, 18, 1, 0xaa, 100));
    assert_eq!(data(d.execute(&dma, &packet(&[0x43, 0, 0, 0, 0, 0, 0, 0, 4]))).len(), 4);
    assert_eq!(data(d.execute(&dma, &packet(&[0x12, 0, 0, 0, 36]))).len(), 36);
    assert_eq!(d.execute(&dma, &packet(&[0xff])), Action::Failed(5 << 4 | error::ABRT));
}

/// Whatever the registers and packets are: no panic, and nothing beyond the end.
#[test]
fn any_command_is_answered() {
    let mut rng = crate::testing::Rng(5);
    for medium in [Medium::Disk, Medium::Cdrom] {
        let mut d = drive(medium, 1 << 20);
        for _ in 0..200_000 {
            let word = rng.next();
            let t = TaskFile {
                command: rng.next() as u8,
                features: word as u16,
                lba: (rng.next() >> 16) >> (word >> 16 & 31),
                count: (word >> 32) as u16,
                device: (word >> 48) as u8,
            };
            let packet: Vec<u8> = (0..16).map(|_| (rng.next() >> (word & 7)) as u8).collect();
            match d.execute(&t, &packet) {
                Action::Transfer { sector, bytes, .. } => assert!(sector * 512 + bytes <= 1 << 20),
                Action::Data(_, data) => assert!((1..=512).contains(&data.len())),
                _ => {}
            }
        }
    }
}
