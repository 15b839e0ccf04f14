use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use mimus_core::accel::{VcpuSignal, null::NullHandle};
use mimus_core::backend::char::CharReceiver;
use mimus_core::bus::{AccessRules, BusFault, MmioAccess};
use mimus_core::clock::{TimerQueue, VirtualClock};
use mimus_core::device::{MmioDevice, lock};
use mimus_core::memory::{AddressSpace, GuestRam, MemoryMap, MemoryRegion, RamBacking};

use super::*;

const RAM: u64 = 0x8000_0000;
const RAM_LEN: u64 = 0x1_0000;
const DEVICE: u64 = 0x1000_0000;
/// Filled into registers a call leaves alone.
const LEFT: u64 = 0x5a5a_5a5a_5a5a_5a5a;

const FAILED: i64 = -1;
const NOT_SUPPORTED: i64 = -2;
const INVALID_PARAM: i64 = -3;
const INVALID_ADDRESS: i64 = -5;
const ALREADY_AVAILABLE: i64 = -6;

/// A vCPU that remembers the fences asked of it.
struct Cpu {
    pins: Arc<NullHandle>,
    fences: Mutex<Vec<RemoteFence>>,
}

impl VcpuHandle for Cpu {
    fn kick(&self) {}
    fn set_pin(&self, pin: CpuPin, level: bool) {
        self.pins.set_pin(pin, level);
    }
    fn index(&self) -> VcpuIndex {
        self.pins.index()
    }
    fn remote_fence(&self, fence: RemoteFence) {
        lock(&self.fences).push(fence);
    }
    fn signal(&self) -> &Arc<VcpuSignal> {
        self.pins.signal()
    }
}

/// A console that takes `room` bytes.
#[derive(Default)]
struct Console {
    text: Mutex<Vec<u8>>,
    room: Mutex<usize>,
}

impl CharBackend for Console {
    fn write(&self, data: &[u8]) -> usize {
        let mut room = lock(&self.room);
        let n = data.len().min(*room);
        *room -= n;
        lock(&self.text).extend(&data[..n]);
        n
    }
    fn set_receiver(&self, _: CharReceiver) {}
    fn input_ready(&self) {}
}

/// Panics when touched: the firmware must not.
struct Untouchable;

impl MmioDevice for Untouchable {
    fn mmio_read(&self, _: MmioAccess) -> Result<u64, BusFault> {
        panic!("a device was read")
    }
    fn mmio_write(&self, _: MmioAccess, _: u64) -> Result<(), BusFault> {
        panic!("a device was written")
    }
}

struct Io {
    space: Arc<AddressSpace>,
    clock: Arc<VirtualClock>,
    started: Mutex<Vec<(u32, StartRequest)>>,
    refuse: AtomicBool,
}

impl CpuIo for Io {
    fn start_vcpu(&self, target: VcpuIndex, how: StartRequest) -> bool {
        lock(&self.started).push((target.0, how));
        !self.refuse.load(Ordering::SeqCst)
    }
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.space
    }
}

struct Board {
    sbi: Arc<Sbi>,
    io: Io,
    cpus: Vec<Arc<Cpu>>,
    timers: Arc<TimerQueue>,
    console: Arc<Console>,
    requests: Arc<Mutex<Vec<SysconRequest>>>,
    powered_off: Arc<Mutex<Vec<u32>>>,
    map: Arc<MemoryMap>,
}

impl Drop for Board {
    fn drop(&mut self) {
        self.map.teardown();
    }
}

impl Board {
    fn new(harts: u32) -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let blocks = GuestRam::new();
        let ram = blocks.add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        let rom = blocks.add_block("rom", 0x1000, RamBacking::Private).unwrap();
        let device = MemoryRegion::mmio("device", 0x1000, AccessRules::ANY);
        device.binding().unwrap().bind_mmio(Arc::new(Untouchable), 0);
        map.change(|t| {
            t.map(&root, RAM, &MemoryRegion::ram("ram", &ram));
            t.map(&root, RAM + RAM_LEN, &MemoryRegion::rom("rom", &rom));
            t.map(&root, DEVICE, &device);
        });
        let clock = VirtualClock::new();
        clock.advance(0);
        let timers = TimerQueue::new(clock.clone(), || {});
        let cpu = |i| Arc::new(Cpu { pins: NullHandle::new(VcpuIndex(i)), fences: Mutex::default() });
        let cpus: Vec<_> = (0..harts).map(cpu).collect();
        let with_timer = |c: &Arc<Cpu>| (c.clone() as Arc<dyn VcpuHandle>, timers.timer());
        let vcpus = cpus.iter().map(with_timer).collect();
        let console = Arc::new(Console { room: Mutex::new(1 << 20), ..Console::default() });
        let (requests, powered_off) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (r, p) = (requests.clone(), powered_off.clone());
        let sbi = Sbi::new(vcpus, Some(console.clone()), move |q| lock(&r).push(q), move |v| lock(&p).push(v.0));
        let io = Io { space, clock, started: Mutex::default(), refuse: AtomicBool::new(false) };
        Self { sbi, io, cpus, timers, console, requests, powered_off, map }
    }

    /// A call by `hart`: registers after it, and what the vCPU does then.
    fn raw(&self, hart: u32, extension: u64, function: u64, args: &[u64]) -> ([u64; 8], HypercallResult) {
        let mut regs = [LEFT; 8];
        regs[..args.len()].copy_from_slice(args);
        (regs[6], regs[7]) = (function, extension);
        let before = regs;
        let after = self.sbi.call(&self.io, VcpuIndex(hart), &mut regs);
        assert_eq!(regs[2..], before[2..], "section 3: only a0 and a1 change");
        (regs, after)
    }

    /// Error and value of a call that goes on.
    fn call(&self, hart: u32, extension: u64, function: u64, args: &[u64]) -> (i64, u64) {
        let (regs, after) = self.raw(hart, extension, function, args);
        assert_eq!(after, HypercallResult::Done);
        (regs[0] as i64, regs[1])
    }

    fn advance(&self, ns: u64) {
        self.io.clock.advance(ns);
        self.timers.fire();
    }

    fn pins(&self, pin: CpuPin) -> Vec<bool> {
        self.cpus.iter().map(|c| c.pins.pin(pin)).collect()
    }

    fn fences(&self) -> Vec<Vec<RemoteFence>> {
        self.cpus.iter().map(|c| std::mem::take(&mut *lock(&c.fences))).collect()
    }

    fn requests(&self) -> Vec<SysconRequest> {
        std::mem::take(&mut *lock(&self.requests))
    }

    fn text(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.console.text))
    }

    fn put(&self, addr: u64, data: &[u8]) {
        assert!(self.io.space.load_bytes(GuestPhys(addr), data).is_ok());
    }

    fn start(&self, hart: u64) {
        assert_eq!(self.call(0, EXT_HSM, 0, &[hart, RAM, 0]), (0, 0));
    }

    fn state(&self, hart: u64) -> u64 {
        let (error, state) = self.call(0, EXT_HSM, 2, &[hart]);
        assert_eq!(error, 0);
        state
    }
}

#[test]
fn base() {
    let b = Board::new(1);
    assert_eq!(b.call(0, EXT_BASE, 0, &[]), (0, 0x0200_0000), "version 2.0");
    assert_eq!(b.call(0, EXT_BASE, 1, &[]).0, 0);
    assert_eq!(b.call(0, EXT_BASE, 2, &[]).0, 0);
    for id in [EXT_BASE, EXT_TIME, EXT_IPI, EXT_RFENCE, EXT_HSM, EXT_SRST, EXT_DBCN, 0, 1, 2, 8] {
        assert_eq!(b.call(0, EXT_BASE, 3, &[id]), (0, 1), "{id:#x}");
    }
    // PMU, suspend, CPPC, nested acceleration, steal time, vendors', and the legacy calls that are not there.
    for id in [0x50_4d55, 0x5355_5350, 0x4350_5043, 0x4e41_434c, 0x53_5441, 0x0900_0000, 3, 4, 5, 6, 7, 9, u64::MAX] {
        assert_eq!(b.call(0, EXT_BASE, 3, &[id]), (0, 0), "{id:#x}");
        assert_eq!(b.raw(0, id, 0, &[]).0[0] as i64, NOT_SUPPORTED, "{id:#x}");
    }
    for function in 4..=6 {
        assert_eq!(b.call(0, EXT_BASE, function, &[]), (0, 0), "vendor, architecture, implementation");
    }
    for function in [7, 100, u64::MAX] {
        assert_eq!(b.call(0, EXT_BASE, function, &[]), (NOT_SUPPORTED, 0));
    }
}

#[test]
fn functions_that_do_not_exist() {
    let b = Board::new(2);
    for (extension, first) in [(EXT_TIME, 1), (EXT_IPI, 1), (EXT_RFENCE, 3), (EXT_HSM, 4), (EXT_SRST, 1), (EXT_DBCN, 3)]
    {
        for function in [first, first + 1, 0xffff, u64::MAX] {
            assert_eq!(b.call(0, extension, function, &[1, 0]), (NOT_SUPPORTED, 0), "{extension:#x} {function}");
        }
    }
    assert_eq!((b.requests(), b.fences(), b.pins(CpuPin::Ssip)), (vec![], vec![vec![], vec![]], vec![false; 2]));
}

#[test]
fn timer() {
    let b = Board::new(2);
    assert_eq!(b.call(1, EXT_TIME, 0, &[50]), (0, 0));
    b.advance(50 * map::TICK_NS - 1);
    assert_eq!(b.pins(CpuPin::Stip), [false, false]);
    b.advance(1);
    assert_eq!(b.pins(CpuPin::Stip), [false, true]);
    b.call(1, EXT_TIME, 0, &[60]);
    assert_eq!(b.pins(CpuPin::Stip), [false, false], "setting it clears the interrupt");
    b.advance(10 * map::TICK_NS);
    assert!(b.pins(CpuPin::Stip)[1]);
    b.call(0, EXT_TIME, 0, &[60]);
    assert!(b.pins(CpuPin::Stip)[0], "now");
    b.call(0, EXT_TIME, 0, &[3]);
    assert!(b.pins(CpuPin::Stip)[0], "in the past");
    for never in [u64::MAX, u64::MAX / map::TICK_NS + 1] {
        b.call(0, EXT_TIME, 0, &[never]);
        b.call(1, EXT_TIME, 0, &[never]);
        b.advance(1 << 50);
        assert_eq!(b.pins(CpuPin::Stip), [false, false]);
    }
    assert_eq!(b.call(7, EXT_TIME, 0, &[0]), (0, 0), "no such vCPU: nothing happens");
}

#[test]
fn ipi() {
    let b = Board::new(3);
    b.start(1);
    b.start(2);
    let ipi = |mask: u64, base: u64| {
        b.cpus.iter().for_each(|c| c.set_pin(CpuPin::Ssip, false));
        (b.call(0, EXT_IPI, 0, &[mask, base]), b.pins(CpuPin::Ssip))
    };
    assert_eq!(ipi(0b101, 0), ((0, 0), vec![true, false, true]));
    assert_eq!(ipi(0b11, 1), ((0, 0), vec![false, true, true]));
    assert_eq!(ipi(0, u64::MAX), ((0, 0), vec![true; 3]), "base -1: all, whatever the mask");
    assert_eq!(ipi(0, 0), ((0, 0), vec![false; 3]));
    for (mask, base) in [(0b1000, 0), (0b1001, 0), (1, 3), (2, u64::MAX - 1), (1, 1 << 40), (u64::MAX, 0)] {
        assert_eq!(ipi(mask, base), ((INVALID_PARAM, 0), vec![false; 3]), "{mask:#x} from {base}: none gets any");
    }
    // A hart that is stopped gets none: it would find it when it is started.
    b.raw(2, EXT_HSM, 1, &[]);
    assert_eq!(ipi(0, u64::MAX), ((0, 0), vec![true, true, false]));
    assert_eq!(ipi(0b110, 0), ((0, 0), vec![false, true, false]));
}

#[test]
fn remote_fences() {
    let b = Board::new(3);
    b.start(1);
    let range = |start, len, asid| RemoteFence::TlbRange { start: GuestVirt(start), len, asid };
    let fence = |function, args: &[u64]| (b.call(0, EXT_RFENCE, function, args), b.fences());
    let on_1 = |f| ((0, 0), vec![vec![], vec![f], vec![]]);
    assert_eq!(fence(0, &[2, 0]), on_1(RemoteFence::Icache));
    assert_eq!(fence(1, &[2, 0, 0x1000, 0x3000]), on_1(range(0x1000, 0x3000, None)));
    assert_eq!(fence(1, &[2, 0, 0, 0]), on_1(RemoteFence::TlbAll), "start and size 0: everything");
    assert_eq!(fence(1, &[1, 1, 0x5000, u64::MAX]), on_1(RemoteFence::TlbAll), "size -1: everything");
    assert_eq!(fence(2, &[2, 0, 0x1000, 0x1000, 7]), on_1(range(0x1000, 0x1000, Some(7))));
    assert_eq!(fence(2, &[2, 0, 0, 0, 0xffff]), on_1(range(0, u64::MAX, Some(0xffff))), "all of an address space");
    assert_eq!(fence(2, &[2, 0, 0, 0, 0x1_0000]).0, (INVALID_PARAM, 0), "no such address space");
    for function in 0..3 {
        assert_eq!(fence(function, &[8, 0, 0, 0, 0]), ((INVALID_PARAM, 0), vec![vec![]; 3]));
        assert_eq!(fence(function, &[9, 0, 0, 0, 0]), ((INVALID_PARAM, 0), vec![vec![]; 3]));
    }
    assert_eq!(
        fence(0, &[0, u64::MAX]).1,
        [vec![RemoteFence::Icache], vec![RemoteFence::Icache], vec![]],
        "started ones"
    );
    // Those of the hypervisor extension.
    for function in 3..7 {
        assert_eq!(fence(function, &[1, 0, 0, 0]).0, (NOT_SUPPORTED, 0));
    }
}

#[test]
fn harts_start_and_stop() {
    let b = Board::new(3);
    assert_eq!([0, 1, 2].map(|h| b.state(h)), [0, 1, 1], "started, stopped, stopped");
    assert_eq!(b.call(0, EXT_HSM, 0, &[1, RAM + 0x100, 0xabcd]), (0, 0));
    let how = StartRequest { pc: RAM + 0x100, arg0: 1, arg1: 0xabcd };
    assert_eq!((b.state(1), lock(&b.io.started).clone()), (0, vec![(1, how)]));
    assert_eq!(b.call(0, EXT_HSM, 0, &[1, RAM, 0]), (ALREADY_AVAILABLE, 0));
    assert_eq!(b.call(0, EXT_HSM, 0, &[0, RAM, 0]), (ALREADY_AVAILABLE, 0));
    assert_eq!(lock(&b.io.started).len(), 1);
    // Stopping does not return.
    let (_, after) = b.raw(1, EXT_HSM, 1, &[]);
    assert_eq!((after, b.state(1), lock(&b.powered_off).clone()), (HypercallResult::Leave, 1, vec![1]));
    b.start(1);
    assert_eq!(b.state(1), 0);
}

#[test]
fn harts_that_cannot_be_started() {
    let b = Board::new(2);
    for hart in [2, 63, 1 << 32, u64::MAX] {
        assert_eq!(b.call(0, EXT_HSM, 0, &[hart, RAM, 0]), (INVALID_PARAM, 0));
        assert_eq!(b.call(0, EXT_HSM, 2, &[hart]), (INVALID_PARAM, 0));
    }
    for nowhere in [0, DEVICE, RAM - 4, RAM + RAM_LEN + 0x1000, u64::MAX] {
        assert_eq!(b.call(0, EXT_HSM, 0, &[1, nowhere, 0]), (INVALID_ADDRESS, 0));
    }
    assert_eq!((b.state(1), lock(&b.io.started).len()), (1, 0));
    b.io.refuse.store(true, Ordering::SeqCst);
    assert_eq!(b.call(0, EXT_HSM, 0, &[1, RAM, 0]), (FAILED, 0));
    assert_eq!(b.state(1), 1, "may be tried again");
    b.io.refuse.store(false, Ordering::SeqCst);
    b.start(1);
}

#[test]
fn a_stopped_hart_is_quiet() {
    let b = Board::new(2);
    b.start(1);
    b.call(1, EXT_TIME, 0, &[100]);
    b.call(0, EXT_IPI, 0, &[2, 0]);
    b.raw(1, EXT_HSM, 1, &[]);
    assert_eq!((b.pins(CpuPin::Ssip), b.pins(CpuPin::Stip)), (vec![false; 2], vec![false; 2]));
    b.advance(200 * map::TICK_NS);
    assert_eq!(b.pins(CpuPin::Stip), [false; 2], "its timer is off");
    // After a restore, too.
    let other = Board::new(2);
    other.io.clock.advance(b.io.clock.now());
    other.sbi.restore(&b.sbi.save().unwrap()).unwrap();
    other.advance(1);
    assert_eq!(other.pins(CpuPin::Stip), [false; 2]);
}

#[test]
fn suspend() {
    let b = Board::new(1);
    let suspend = |kind: u64| {
        let (regs, after) = b.raw(0, EXT_HSM, 3, &[kind, RAM, 0]);
        (regs[0] as i64, after)
    };
    assert_eq!(suspend(0), (0, HypercallResult::Wait), "as WFI");
    assert_eq!(suspend(0x1_0000_0000), (0, HypercallResult::Wait), "the type has 32 bits");
    assert_eq!(suspend(0x8000_0000), (NOT_SUPPORTED, HypercallResult::Done), "non-retentive");
    assert_eq!(suspend(0xffff_ffff_8000_0000), (NOT_SUPPORTED, HypercallResult::Done));
    for reserved in [1, 0x0fff_ffff, 0x1000_0000, 0x7fff_ffff, 0x8000_0001, 0xffff_ffff] {
        assert_eq!(suspend(reserved), (INVALID_PARAM, HypercallResult::Done), "{reserved:#x}");
    }
    assert_eq!(b.state(0), 0);
}

#[test]
fn system_reset() {
    let b = Board::new(1);
    let reset = |kind: u64, reason: u64| {
        let (regs, after) = b.raw(0, EXT_SRST, 0, &[kind, reason]);
        (regs[0] as i64, after == HypercallResult::Leave, b.requests())
    };
    assert_eq!(reset(0, 0), (0, true, vec![SysconRequest::PowerOff]));
    assert_eq!(reset(0, 1), (0, true, vec![SysconRequest::PowerOff]), "after a failure");
    assert_eq!(reset(1, 0), (0, true, vec![SysconRequest::Reset]));
    assert_eq!(reset(2, 0), (0, true, vec![SysconRequest::Reset]));
    assert_eq!(reset(0x5_0000_0001, 0x7_0000_0000), (0, true, vec![SysconRequest::Reset]), "both have 32 bits");
    for (kind, reason) in [(3, 0), (0xefff_ffff, 0), (0xf000_0000, 0), (0, 2), (1, 0xdfff_ffff), (0, 0xe000_0000)] {
        assert_eq!(reset(kind, reason), (INVALID_PARAM, false, vec![]), "{kind:#x} {reason:#x}");
    }
}

#[test]
fn debug_console_writes() {
    let b = Board::new(1);
    b.put(RAM + 0x100, b"hello, world");
    assert_eq!((b.call(0, EXT_DBCN, 0, &[12, RAM + 0x100, 0]), b.text()), ((0, 12), b"hello, world".to_vec()));
    assert_eq!(b.call(0, EXT_DBCN, 0, &[0, RAM, 0]), (0, 0));
    assert_eq!((b.call(0, EXT_DBCN, 2, &[u64::from(b'x') | 0xff00]), b.text()), ((0, 0), b"x".to_vec()));
    // Across RAM into ROM; then more than is handled at a time: the caller goes on.
    b.put(RAM + RAM_LEN - 2, b"abcd");
    assert_eq!((b.call(0, EXT_DBCN, 0, &[4, RAM + RAM_LEN - 2, 0]), b.text()), ((0, 4), b"abcd".to_vec()));
    assert_eq!((b.call(0, EXT_DBCN, 0, &[RAM_LEN, RAM, 0]), b.text().len()), ((0, 4096), 4096));
    *lock(&b.console.room) = 3;
    assert_eq!((b.call(0, EXT_DBCN, 0, &[12, RAM + 0x100, 0]), b.text()), ((0, 3), b"hel".to_vec()));
    assert_eq!((b.call(0, EXT_DBCN, 0, &[12, RAM + 0x100, 0]), b.text()), ((0, 0), vec![]), "never waits");
    assert_eq!(b.call(0, EXT_DBCN, 2, &[b'x'.into()]), (FAILED, 0), "the byte is not lost silently");
}

#[test]
fn debug_console_wants_memory() {
    let b = Board::new(1);
    for function in [0, 1] {
        let call = |len, base, high| b.call(0, EXT_DBCN, function, &[len, base, high]);
        assert_eq!(call(4, 0x1000, 0), (INVALID_PARAM, 0), "nothing there");
        assert_eq!(call(4, DEVICE, 0), (INVALID_PARAM, 0), "a device");
        assert_eq!(call(4, RAM + RAM_LEN + 0xffe, 0), (INVALID_PARAM, 0), "across the end");
        assert_eq!(call(u64::MAX, RAM, 0), (INVALID_PARAM, 0));
        assert_eq!(call(u64::MAX, 1, 0), (INVALID_PARAM, 0));
        assert_eq!(call(1 << 40, RAM, 0), (INVALID_PARAM, 0));
        assert_eq!(call(4, RAM, 1), (INVALID_PARAM, 0), "above 2^64");
    }
    assert_eq!(b.call(0, EXT_DBCN, 1, &[4, RAM, 0]), (0, 0), "no input here");
    assert_eq!(b.text(), b"");
}

#[test]
fn no_console() {
    let b = Board::new(1);
    let sbi = Sbi::new(vec![], None, |_| {}, |_| {});
    for (extension, function, args) in [(EXT_DBCN, 0, [3, RAM, 0]), (EXT_DBCN, 2, [65, 0, 0]), (1, 0, [65, 0, 0])] {
        let mut regs = [args[0], args[1], args[2], 0, 0, 0, function, extension];
        sbi.call(&b.io, VcpuIndex(0), &mut regs);
        assert_eq!(regs[0], 0);
    }
}

#[test]
fn legacy_calls() {
    let b = Board::new(1);
    let legacy = |extension, arg| {
        let (regs, after) = b.raw(0, extension, LEFT, &[arg]);
        assert_eq!(regs[1], LEFT, "section 5: one result");
        (regs[0] as i64, after)
    };
    assert_eq!(legacy(0, 77), (0, HypercallResult::Done));
    b.advance(77 * map::TICK_NS);
    assert_eq!(b.pins(CpuPin::Stip), [true]);
    assert_eq!((legacy(1, b'!'.into()), b.text()), ((0, HypercallResult::Done), b"!".to_vec()));
    *lock(&b.console.room) = 0;
    assert_eq!(legacy(1, b'!'.into()), (FAILED, HypercallResult::Done));
    assert_eq!(legacy(2, 0), (-1, HypercallResult::Done), "no input");
    for absent in 3..8 {
        assert_eq!(legacy(absent, 0), (NOT_SUPPORTED, HypercallResult::Done));
    }
    assert_eq!((legacy(8, 0), b.requests()), ((0, HypercallResult::Leave), vec![SysconRequest::PowerOff]));
}

#[test]
fn reset_of_the_machine() {
    let b = Board::new(3);
    b.start(1);
    b.call(0, EXT_TIME, 0, &[100]);
    b.call(1, EXT_TIME, 0, &[0]);
    b.call(0, EXT_IPI, 0, &[3, 0]);
    [ResetPhase::Enter, ResetPhase::Hold, ResetPhase::Exit].into_iter().for_each(|p| b.sbi.reset(p));
    assert_eq!([0, 1, 2].map(|h| b.state(h)), [0, 1, 1]);
    b.advance(1000 * map::TICK_NS);
    assert_eq!((b.pins(CpuPin::Stip), b.pins(CpuPin::Ssip)), (vec![false; 3], vec![false; 3]));
}

#[test]
fn saved_in_the_middle() {
    let b = Board::new(3);
    b.start(2);
    b.call(0, EXT_TIME, 0, &[500]);
    b.call(2, EXT_TIME, 0, &[100]);
    b.advance(200 * map::TICK_NS);
    let saved = b.sbi.save().unwrap();
    let other = Board::new(3);
    other.start(1);
    other.call(1, EXT_TIME, 0, &[1]);
    other.io.clock.advance(b.io.clock.now());
    other.sbi.restore(&saved).unwrap();
    assert_eq!(other.sbi.save().unwrap(), saved);
    assert_eq!([0, 1, 2].map(|h| other.state(h)), [0, 1, 0]);
    assert_eq!(other.pins(CpuPin::Stip), b.pins(CpuPin::Stip));
    other.advance(299 * map::TICK_NS);
    assert_eq!(other.pins(CpuPin::Stip), [false, false, true]);
    other.advance(map::TICK_NS);
    assert_eq!(other.pins(CpuPin::Stip), [true, false, true]);
}

#[test]
fn damaged_states() {
    let b = Board::new(2);
    b.start(1);
    b.call(1, EXT_TIME, 0, &[1000]);
    let good = b.sbi.save().unwrap();
    let encode = |harts: Vec<SavedHart>| Payload::encode(SCHEMA, &Saved { harts }).unwrap();
    let hart = |state| SavedHart { state, deadline: 5 };
    for bad in [
        encode(vec![hart(0)]),
        encode(vec![hart(0), hart(0), hart(0)]),
        encode(vec![hart(0), hart(START_PENDING)]),
        encode(vec![hart(0), hart(255)]),
        Payload { schema: "sbi2".into(), ..good.clone() },
    ] {
        let error = b.sbi.restore(&bad).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(b.sbi.save().unwrap(), good, "{error}");
    }
    let newer = Payload { version: 2, ..good.clone() };
    assert!(b.sbi.restore(&newer).unwrap_err().to_string().contains("version 2"));
    for at in 0..good.body.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad.body[at] ^= 1 << bit;
            if b.sbi.restore(&bad).is_err() {
                continue;
            }
            b.advance(1000);
            b.call(0, EXT_HSM, 2, &[1]);
        }
        let cut = Payload { body: good.body[..at].to_vec(), ..good.clone() };
        assert!(b.sbi.restore(&cut).is_err());
    }
}

#[test]
fn random_calls() {
    let b = Board::new(3);
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let extensions = [EXT_BASE, EXT_TIME, EXT_IPI, EXT_RFENCE, EXT_HSM, EXT_SRST, EXT_DBCN, 0, 1, 2, 3, 8];
    for _ in 0..50_000 {
        let values = [0, 1, 2, 3, 64, RAM, RAM + RAM_LEN - 3, DEVICE, u64::MAX, 0x8000_0000_0000_0000, next()];
        let mut regs = std::array::from_fn(|_| values[next() as usize % values.len()]);
        regs[7] = extensions[next() as usize % extensions.len()];
        if next() % 4 != 0 {
            regs[6] = next() % 5;
        }
        let before = regs;
        b.sbi.call(&b.io, VcpuIndex((next() % 4) as u32), &mut regs);
        assert_eq!(regs[2..], before[2..]);
        if next() % 16 == 0 {
            b.advance(next() % 100_000);
        }
        lock(&b.io.started).clear();
        b.fences();
        b.requests();
        b.text();
    }
    let other = Board::new(3);
    other.io.clock.advance(b.io.clock.now());
    other.sbi.restore(&b.sbi.save().unwrap()).unwrap();
    assert_eq!(other.sbi.save().unwrap(), b.sbi.save().unwrap());
}
