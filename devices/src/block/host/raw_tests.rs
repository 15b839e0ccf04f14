use super::*;
use mimus_core::memory::{GuestRam, RamBacking};
use std::sync::mpsc;

fn run(disk: &dyn BlockBackend, request: BlockRequest) -> (Result<(), BlockError>, BlockBuffer) {
    let (tx, rx) = mpsc::channel();
    disk.submit(request, Box::new(move |r, b| tx.send((r, b)).unwrap()));
    rx.recv().unwrap()
}

fn owned(op: BlockOp, sector: u64, bytes: Vec<u8>) -> BlockRequest {
    BlockRequest::transfer(op, sector, BlockBuffer::Owned(bytes))
}

fn open(path: &Path, read_only: bool) -> Result<RawBlock, OpenError> {
    RawBlock::open(path, RawOptions { read_only, ..RawOptions::default() })
}

#[test]
fn data_and_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![7; 1000]).unwrap();
    let disk = open(&path, false).unwrap();
    assert_eq!(disk.capacity(), 1024);
    let (result, BlockBuffer::Owned(bytes)) = run(&disk, owned(BlockOp::Read, 1, vec![1; 512])) else { panic!() };
    assert_eq!(result, Ok(()));
    assert_eq!((bytes[487], bytes[488], bytes[511]), (7, 0, 0));

    let ram = GuestRam::new();
    let block = ram.add_block("ram", 8192, RamBacking::Private).unwrap();
    assert!(block.fill(0, 8192, 0x55));
    let slice = |at, len| RamSlice::new(block.clone(), at, len).unwrap();
    let scattered = BlockBuffer::Ram(vec![slice(100, 300), slice(4096, 724)]);
    assert_eq!(run(&disk, BlockRequest::transfer(BlockOp::Write, 0, scattered.clone())).0, Ok(()));
    assert_eq!(run(&disk, BlockRequest::flush()).0, Ok(()));
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x55; 1024]);
    for op in [BlockOp::Discard, BlockOp::WriteZeroes { unmap: false }, BlockOp::WriteZeroes { unmap: true }] {
        let request = BlockRequest { op, sector: 1, len: 512, buffer: BlockBuffer::None };
        assert_eq!(run(&disk, request).0, Ok(()), "{op:?}");
    }
    assert_eq!(run(&disk, BlockRequest::transfer(BlockOp::Read, 0, scattered)).0, Ok(()));
    assert_eq!(block.load::<u8>(4096 + 211), Some(0x55));
    assert_eq!(block.load::<u8>(4096 + 212), Some(0));
}

#[test]
fn ranges_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![7; 1024]).unwrap();
    let disk = open(&path, true).unwrap();
    let out = |r| matches!(run(&disk, r).0, Err(BlockError::OutOfRange { .. }));
    assert!(out(owned(BlockOp::Read, 1, vec![0; 1024])));
    assert!(out(owned(BlockOp::Read, u64::MAX, vec![0; 512])));
    assert!(out(owned(BlockOp::Read, 0, vec![0; 100])));
    assert_eq!(run(&disk, owned(BlockOp::Write, 0, vec![0; 512])).0, Err(BlockError::ReadOnly));
}

#[test]
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let message = |p: &Path, ro| open(p, ro).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(message(&path, false).contains("no such file"));
    assert!(message(dir.path(), false).contains("is a directory"));
    assert!(message(dir.path(), true).contains("is a directory"));
    assert!(message(Path::new("/dev/null"), false).contains("neither a file nor a disk"));
    std::fs::write(&path, vec![0; 512]).unwrap();
    let first = open(&path, false).unwrap();
    assert!(message(&path, false).contains("in use by another process"));
    assert!(message(&path, true).contains("another process is writing"));
    drop(first);
    let _a = open(&path, true).unwrap();
    let _b = open(&path, true).unwrap();
    assert!(message(&path, false).contains("in use"));
}
