use super::*;
use crate::testing::{Bench, Rng, read32, reset, write32};
use mimus_arch::x86::irqchip::LapicsState;
use mimus_core::accel::null::NullHandle;
use mimus_core::accel::{RemoteFence, VcpuSignal};
use mimus_core::bus::MemTxAttrs;
use mimus_core::snapshot::{Payload, Snapshot};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A vCPU that remembers levels, and counts the rising edges of NMI and SMI.
struct Cpu {
    pins: Arc<NullHandle>,
    nmis: AtomicU32,
    smis: AtomicU32,
}

impl VcpuHandle for Cpu {
    fn kick(&self) {}
    fn set_pin(&self, pin: CpuPin, level: bool) {
        match pin {
            CpuPin::Nmi => _ = self.nmis.fetch_add(level.into(), SeqCst),
            CpuPin::Smi => _ = self.smis.fetch_add(level.into(), SeqCst),
            _ => self.pins.set_pin(pin, level),
        }
    }
    fn index(&self) -> VcpuIndex {
        self.pins.index()
    }
    fn remote_fence(&self, _: RemoteFence) {}
    fn signal(&self) -> &Arc<VcpuSignal> {
        self.pins.signal()
    }
}

#[derive(Default)]
struct Calls(Mutex<Vec<String>>, AtomicBool);

impl Calls {
    fn add(&self, text: String) {
        lock(&self.0).push(text);
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl Processors for Calls {
    fn stop(&self, vcpu: VcpuIndex) -> bool {
        let holds = self.1.load(SeqCst);
        if holds {
            self.add(format!("hold {vcpu}"));
        }
        !holds
    }
    fn init(&self, vcpu: VcpuIndex) {
        self.add(format!("init {vcpu}"));
    }
    fn start_up(&self, vcpu: VcpuIndex, vector: u8) {
        self.add(format!("start {vcpu} at {vector:#x}"));
    }
}

/// A TSC of 2 GHz that began 1000 ticks before the clock.
struct Tsc(Arc<mimus_core::clock::VirtualClock>);

impl TscClock for Tsc {
    fn now(&self, _: VcpuIndex) -> u64 {
        self.0.now() * 2 + 1000
    }
    fn hz(&self) -> u64 {
        2_000_000_000
    }
}

struct Pc {
    bench: Bench,
    cpus: Vec<Arc<Cpu>>,
    calls: Arc<Calls>,
    lapics: Arc<Lapics>,
    lints: Arc<dyn IrqController>,
}

const ENABLED: u32 = 0x1ff;
const MS: u64 = 1_000_000;

const ID: u64 = 0x20;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const TIMER: u64 = 0x320;
const PERF: u64 = 0x340;
const LINT0_ENTRY: u64 = 0x350;
const LINT1_ENTRY: u64 = 0x360;
const ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
const MASKED: u32 = 1 << 16;

impl Pc {
    /// APICs as at power-on.
    fn cold(count: u32) -> Self {
        let (bench, calls) = (Bench::new(), Arc::new(Calls::default()));
        let cpu = |n| {
            let pins = NullHandle::new(VcpuIndex(n));
            Arc::new(Cpu { pins, nmis: AtomicU32::new(0), smis: AtomicU32::new(0) })
        };
        let cpus: Vec<_> = (0..count).map(cpu).collect();
        let wired = cpus.iter().map(|c| LapicCpu { vcpu: c.clone(), id: c.index().0, timer: bench.timer() });
        let (eoi, inta) = (calls.clone(), calls.clone());
        let links = LapicLinks {
            processors: calls.clone(),
            end_of_interrupt: Box::new(move |v| eoi.add(format!("eoi {v:#x}"))),
            acknowledge_pic: Some(Box::new(move || {
                inta.add("inta".to_owned());
                0x08
            })),
            tsc: Some(Arc::new(Tsc(bench.clock.clone()))),
        };
        let lapics = Lapics::new(wired.collect(), links);
        Pc { bench, cpus, calls, lints: Lapics::lints(&lapics), lapics }
    }

    /// All enabled by software.
    fn new(count: u32) -> Self {
        let pc = Self::cold(count);
        (0..count).for_each(|n| pc.w(n, SVR, ENABLED));
        pc
    }

    fn r(&self, cpu: u32, at: u64) -> u32 {
        read32(&*self.lapics, cpu, at)
    }

    fn w(&self, cpu: u32, at: u64, value: u32) {
        write32(&*self.lapics, cpu, at, value);
    }

    fn msr(&self, cpu: u32, index: u32) -> Option<u64> {
        self.lapics.msr_read(VcpuIndex(cpu), index)
    }

    fn set_msr(&self, cpu: u32, index: u32, value: u64) -> Option<()> {
        self.lapics.msr_write(VcpuIndex(cpu), index, value)
    }

    fn x2apic(&self, cpu: u32) {
        let base = self.msr(cpu, msr::APIC_BASE).unwrap();
        self.set_msr(cpu, msr::APIC_BASE, base | msr::APIC_BASE_X2APIC).unwrap();
    }

    fn intr(&self, cpu: u32) -> bool {
        self.cpus[cpu as usize].pins.pin(CpuPin::Intr)
    }

    /// Takes an interrupt as a vCPU does.
    fn ack(&self, cpu: u32) -> Option<u8> {
        self.lapics.acknowledge(VcpuIndex(cpu))
    }

    /// Takes and ends all interrupts.
    fn serve(&self, cpu: u32) -> Vec<u8> {
        let mut vectors = Vec::new();
        while self.intr(cpu) {
            vectors.extend(self.ack(cpu));
            self.w(cpu, EOI, 0);
        }
        vectors
    }

    fn msi(&self, address: u64, data: u32) -> bool {
        self.lapics.msi(address, data, Requester::Unspecified).is_ok()
    }

    fn ipi(&self, cpu: u32, destination: u32, low: u32) {
        self.w(cpu, ICR + 0x10, destination << 24);
        self.w(cpu, ICR, low);
    }

    /// Which vCPUs have `vector` requested; taken and ended.
    fn took(&self, vector: u8) -> Vec<u32> {
        let took = |n: &u32| self.serve(*n).contains(&vector);
        (0..self.cpus.len() as u32).filter(took).collect()
    }

    fn state(&self) -> LapicsState {
        self.lapics.save().unwrap().decode().unwrap()
    }

    fn restore(&self, state: &LapicsState) -> Result<(), String> {
        let schema = self.lapics.schema();
        self.lapics.restore(&Payload::encode(schema, state).unwrap()).map_err(|e| e.to_string())
    }
}

#[test]
fn power_on() {
    let pc = Pc::cold(2);
    assert_eq!((pc.r(1, ID), pc.r(1, 0x30)), (0x0100_0000, 0x0005_0014));
    assert_eq!((pc.r(0, SVR), pc.r(0, DFR), pc.r(0, LDR)), (0xff, u32::MAX, 0));
    assert_eq!((pc.r(0, LINT0_ENTRY), pc.r(1, LINT0_ENTRY), pc.r(0, TIMER)), (0x700, MASKED, MASKED));
    assert_eq!(pc.msr(0, msr::APIC_BASE), Some(0xfee0_0900));
    assert_eq!(pc.msr(1, msr::APIC_BASE), Some(0xfee0_0800));
    assert!(!pc.msi(0xfee0_0000, 0x4030), "not enabled by software");
    pc.w(0, TIMER, 0x30);
    assert_eq!(pc.r(0, TIMER), MASKED | 0x30, "masked as long as that");
    pc.w(0, SVR, ENABLED);
    pc.w(0, TIMER, 0x30);
    assert_eq!(pc.r(0, TIMER), 0x30);
    pc.w(0, SVR, 0xff);
    assert_eq!((pc.r(0, TIMER), pc.r(0, LINT0_ENTRY)), (MASKED | 0x30, MASKED | 0x700));
    reset(&*pc.lapics);
    assert_eq!((pc.r(0, TIMER), pc.r(0, LINT0_ENTRY)), (MASKED, 0x700));
}

#[test]
fn unaligned_and_foreign_accesses() {
    let pc = Pc::new(1);
    assert_eq!(pc.r(0, TPR + 4), 0);
    pc.w(0, TPR + 4, 0x20);
    assert_eq!(pc.r(0, TPR), 0);
    let access = |attrs| MmioAccess { region: 0, offset: SVR, size: AccessSize::B4, attrs };
    assert_eq!(pc.lapics.mmio_read(access(MemTxAttrs::default())), Ok(0x1ff), "a debugger");
    assert_eq!(pc.lapics.mmio_write(access(MemTxAttrs::default()), 0), Err(BusFault::Decode));
    assert_eq!(pc.lapics.mmio_read(access(MemTxAttrs::device(8))), Err(BusFault::Decode));
    assert_eq!(pc.lapics.mmio_read(access(MemTxAttrs::vcpu(1))), Err(BusFault::Decode));
}

#[test]
fn priorities_nest() {
    let pc = Pc::new(1);
    assert!(pc.msi(0xfee0_0000, 0x41));
    assert!(pc.intr(0));
    assert_eq!(pc.r(0, IRR + 0x20), 2);
    assert_eq!(pc.ack(0), Some(0x41));
    assert!(!pc.intr(0));
    assert_eq!((pc.r(0, ISR + 0x20), pc.r(0, IRR + 0x20), pc.r(0, PPR)), (2, 0, 0x40));
    pc.msi(0xfee0_0000, 0x4f);
    assert!(!pc.intr(0), "the same class");
    assert_eq!(pc.ack(0), None);
    pc.msi(0xfee0_0000, 0x50);
    assert_eq!(pc.ack(0), Some(0x50));
    pc.w(0, EOI, 0);
    assert_eq!(pc.r(0, PPR), 0x40);
    assert!(!pc.intr(0));
    pc.w(0, EOI, 0);
    assert!(pc.intr(0));
    assert_eq!(pc.serve(0), [0x4f]);
    pc.w(0, EOI, 0);
    assert_eq!(pc.calls.take(), [] as [&str; 0], "edges are not broadcast");
}

#[test]
fn task_priority() {
    let pc = Pc::new(1);
    let cpu = VcpuIndex(0);
    pc.w(0, TPR, 0x45);
    assert_eq!((pc.r(0, PPR), pc.lapics.cr8(cpu)), (0x45, 4));
    pc.msi(0xfee0_0000, 0x4f);
    assert!(!pc.intr(0));
    pc.lapics.set_cr8(cpu, 3).unwrap();
    assert_eq!((pc.r(0, TPR), pc.intr(0)), (0x30, true));
    pc.lapics.set_cr8(cpu, 15).unwrap();
    assert!(!pc.intr(0), "withdrawn");
    assert_eq!(pc.ack(0), None);
    assert_eq!(pc.lapics.set_cr8(cpu, 16), None);
    pc.w(0, TPR, 0);
    assert_eq!(pc.serve(0), [0x4f]);
}

#[test]
fn levels_are_broadcast_at_their_end() {
    let pc = Pc::new(1);
    pc.msi(0xfee0_0000, 0xc061);
    assert_eq!(pc.r(0, TMR + 0x30), 2);
    assert_eq!(pc.serve(0), [0x61]);
    assert_eq!(pc.calls.take(), ["eoi 0x61"]);
    pc.msi(0xfee0_0000, 0x4061);
    assert_eq!(pc.r(0, TMR + 0x30), 0);
    assert_eq!(pc.serve(0), [0x61]);
    assert_eq!(pc.calls.take(), [] as [&str; 0]);
}

#[test]
fn physical_destinations() {
    let pc = Pc::new(4);
    pc.ipi(0, 2, 0x4050);
    assert_eq!(pc.took(0x50), [2]);
    pc.ipi(0, 0xff, 0x4050);
    assert_eq!(pc.took(0x50), [0, 1, 2, 3]);
    pc.ipi(0, 9, 0x4050);
    assert_eq!(pc.took(0x50), [] as [u32; 0]);
    pc.msi(0xfee0_3000, 0x50);
    assert_eq!(pc.took(0x50), [3]);
    assert!(!pc.msi(0xfee0_9000, 0x50));
    assert!(!pc.msi(0xfed0_0000, 0x50));
    assert_eq!(pc.r(0, ICR), 0x4050);
}

#[test]
fn shorthands() {
    let pc = Pc::new(3);
    pc.w(1, ICR, 1 << 18 | 0x51);
    assert_eq!(pc.took(0x51), [1]);
    pc.w(1, ICR, 2 << 18 | 0x51);
    assert_eq!(pc.took(0x51), [0, 1, 2]);
    pc.w(1, ICR, 3 << 18 | 0x51);
    assert_eq!(pc.took(0x51), [0, 2]);
    pc.w(1, ICR, 3 << 18 | 4 << 8);
    pc.w(1, ICR, 3 << 18 | 2 << 8);
    pc.w(1, ICR, 1 << 18 | 4 << 8);
    let count = |c: &Arc<Cpu>| (c.nmis.load(SeqCst), c.smis.load(SeqCst));
    assert_eq!(pc.cpus.iter().map(count).collect::<Vec<_>>(), [(1, 1), (0, 0), (1, 1)], "self is for fixed only");
}

#[test]
fn logical_destinations() {
    let pc = Pc::new(4);
    for n in 0..4 {
        pc.w(n, LDR, 1 << (24 + n));
    }
    assert_eq!(pc.r(1, LDR), 2 << 24);
    pc.ipi(0, 0b1010, 1 << 11 | 0x52);
    assert_eq!(pc.took(0x52), [1, 3]);
    pc.msi(0xfee0_5004, 0x52);
    assert_eq!(pc.took(0x52), [0, 2]);
    pc.ipi(0, 0xff, 1 << 11 | 0x52);
    assert_eq!(pc.took(0x52), [0, 1, 2, 3]);
    // Two clusters of two.
    for n in 0..4 {
        pc.w(n, DFR, 0);
        pc.w(n, LDR, (n / 2) << 28 | 1 << (24 + n % 2));
    }
    assert_eq!(pc.r(0, DFR), 0x0fff_ffff);
    pc.ipi(0, 0x13, 1 << 11 | 0x52);
    assert_eq!(pc.took(0x52), [2, 3]);
    pc.ipi(0, 0x01, 1 << 11 | 0x52);
    assert_eq!(pc.took(0x52), [0]);
    pc.ipi(0, 0xff, 1 << 11 | 0x52);
    assert_eq!(pc.took(0x52), [0, 1, 2, 3]);
}

#[test]
fn lowest_priority() {
    let pc = Pc::new(3);
    for n in 0..3 {
        pc.w(n, LDR, 1 << (24 + n));
        pc.w(n, TPR, 0x20);
    }
    pc.w(1, TPR, 0x10);
    for _ in 0..4 {
        pc.ipi(0, 7, 1 << 11 | 1 << 8 | 0x53);
        assert_eq!(pc.took(0x53), [1]);
    }
    pc.w(1, TPR, 0x20);
    let mut takers: Vec<u32> = (0..3)
        .flat_map(|_| {
            pc.msi(0xfee0_7004, 0x4153);
            pc.took(0x53)
        })
        .collect();
    takers.sort_unstable();
    assert_eq!(takers, [0, 1, 2], "in turn");
    pc.w(2, SVR, 0xff);
    for _ in 0..3 {
        assert!(pc.msi(0xfee0_700c, 0x53), "redirection hint");
        assert_eq!(pc.took(0x53).len(), 1);
    }
}

#[test]
fn init_and_start_up() {
    let pc = Pc::new(2);
    pc.w(1, TPR, 0x30);
    pc.ipi(0, 1, 0x5031);
    pc.ipi(0, 1, 0xc500);
    assert_eq!(pc.calls.take(), ["init 1"]);
    pc.ipi(0, 1, 0x8500);
    assert_eq!(pc.calls.take(), [] as [&str; 0], "de-assertion");
    assert_eq!((pc.r(1, TPR), pc.r(1, SVR), pc.r(1, ID)), (0, 0xff, 1 << 24));
    assert_eq!(pc.msr(1, msr::APIC_BASE), Some(0xfee0_0800));
    pc.ipi(0, 1, 0x4608);
    assert_eq!(pc.calls.take(), ["start 1 at 0x8"], "vectors below 16 are pages");
    pc.w(0, ICR, 3 << 18 | 0x4610);
    pc.w(1, ICR, 3 << 18 | 0x4610);
    assert_eq!(pc.calls.take(), ["start 1 at 0x10"], "not the bootstrap processor");
    pc.w(1, ICR, 3 << 18 | 0x500);
    assert_eq!(pc.calls.take(), ["init 0"]);
}

/// In system management mode an INIT waits, and the APIC stays as it is until it is taken.
#[test]
fn an_init_is_held() {
    let pc = Pc::new(2);
    pc.w(1, TPR, 0x30);
    pc.calls.1.store(true, SeqCst);
    pc.ipi(0, 1, 0xc500);
    assert_eq!((pc.calls.take(), pc.r(1, TPR)), (vec!["hold 1".to_owned()], 0x30));
    pc.calls.1.store(false, SeqCst);
    pc.lapics.take_init(VcpuIndex(1));
    assert_eq!((pc.calls.take(), pc.r(1, TPR)), (vec!["init 1".to_owned()], 0));
    pc.lapics.take_init(VcpuIndex(7));
    assert_eq!(pc.calls.take(), [] as [&str; 0]);
}

#[test]
fn illegal_vectors_and_registers() {
    let pc = Pc::new(2);
    pc.w(0, ERROR, 0xfe);
    pc.ipi(0, 1, 0x400f);
    assert!(!pc.intr(1));
    assert_eq!(pc.r(0, ESR), 0, "not before it is written");
    pc.w(0, ESR, 0);
    assert_eq!(pc.r(0, ESR), 0x20);
    assert_eq!(pc.serve(0), [0xfe]);
    pc.w(0, ESR, 0);
    assert_eq!(pc.r(0, ESR), 0);
    assert!(pc.msi(0xfee0_0000, 0x4003));
    assert_eq!(pc.serve(0), [0xfe]);
    assert_eq!(pc.r(0, 0x2f0), 0);
    pc.w(0, 0x3a0, 1);
    pc.w(0, ISR, 1);
    pc.w(0, ESR, 0);
    assert_eq!(pc.r(0, ESR), 0xc0);
    assert_eq!(pc.serve(0), [0xfe]);
    pc.w(0, TIMER, 5);
    pc.w(0, INITIAL, 1);
    pc.bench.advance(MS);
    pc.w(0, ESR, 0);
    assert_eq!(pc.r(0, ESR), 0x40, "of the local vector table");
}

#[test]
fn lint_inputs() {
    let pc = Pc::new(2);
    pc.lints.set_input(LINT0, true);
    assert!(pc.intr(0) && !pc.intr(1));
    assert_eq!(pc.ack(0), Some(0x08));
    assert_eq!(pc.calls.take(), ["inta"]);
    assert!(pc.intr(0), "until the PIC lowers it");
    pc.msi(0xfee0_0000, 0x20);
    assert_eq!(pc.ack(0), Some(0x20), "its own come first");
    pc.w(0, EOI, 0);
    pc.w(0, LINT0_ENTRY, MASKED | 0x700);
    assert!(!pc.intr(0));
    assert_eq!(pc.ack(0), None);
    pc.lints.set_input(LINT0, false);
    // LINT1: NMI; an edge each time.
    pc.w(1, LINT1_ENTRY, 0x400);
    for _ in 0..2 {
        pc.lints.set_input(LINT1, true);
        pc.lints.set_input(LINT1, true);
        pc.lints.set_input(LINT1, false);
    }
    assert_eq!(pc.cpus[1].nmis.load(SeqCst), 2);
    assert_eq!(pc.cpus[0].nmis.load(SeqCst), 0, "masked");
    pc.lapics.inject_nmi(VcpuIndex(0));
    assert_eq!(pc.cpus[0].nmis.load(SeqCst), 1);
    pc.w(1, LINT1_ENTRY, 0x500);
    pc.lints.set_input(LINT1, true);
    assert_eq!(pc.calls.take(), ["init 1"]);
}

#[test]
fn lint_as_a_level_triggered_interrupt() {
    let pc = Pc::new(1);
    pc.w(0, LINT0_ENTRY, 1 << 15 | 0x71);
    pc.lints.set_input(LINT0, true);
    assert_eq!(pc.r(0, LINT0_ENTRY), 1 << 15 | 1 << 14 | 0x71);
    assert_eq!(pc.ack(0), Some(0x71));
    pc.w(0, EOI, 0);
    assert_eq!(pc.ack(0), Some(0x71), "asserted still");
    pc.lints.set_input(LINT0, false);
    pc.w(0, EOI, 0);
    assert_eq!((pc.ack(0), pc.r(0, LINT0_ENTRY)), (None, 1 << 15 | 0x71));
    pc.w(0, LINT0_ENTRY, 0x72);
    pc.lints.set_input(LINT0, true);
    assert_eq!(pc.serve(0), [0x72], "an edge");
    pc.w(0, PERF, 0xffff_ffff);
    assert_eq!(pc.r(0, PERF), MASKED | 0x7ff);
}

#[test]
fn one_shot_timer() {
    let pc = Pc::new(1);
    pc.w(0, TIMER, 0x30);
    pc.w(0, DIVIDE, 0xfb);
    assert_eq!(pc.r(0, DIVIDE), 0xb);
    pc.w(0, INITIAL, 1000);
    pc.bench.advance(400);
    assert_eq!((pc.r(0, INITIAL), pc.r(0, CURRENT)), (1000, 600));
    pc.bench.advance(599);
    assert!(!pc.intr(0));
    pc.bench.advance(1);
    assert!(pc.intr(0));
    assert_eq!((pc.serve(0), pc.r(0, CURRENT)), (vec![0x30], 0));
    pc.bench.advance(MS);
    assert!(!pc.intr(0));
    pc.w(0, INITIAL, 1000);
    pc.w(0, INITIAL, 0);
    pc.bench.advance(MS);
    assert!(!pc.intr(0), "0 stops it");
    pc.w(0, TIMER, MASKED | 0x30);
    pc.w(0, INITIAL, 1000);
    pc.bench.advance(MS);
    pc.w(0, TIMER, 0x30);
    assert!(!pc.intr(0), "what was masked is lost");
    pc.w(0, DIVIDE, 0);
    pc.w(0, INITIAL, 1000);
    pc.bench.advance(1000);
    assert_eq!(pc.r(0, CURRENT), 500);
    pc.w(0, DIVIDE, 3);
    pc.bench.advance(500 * 16 - 1);
    assert!(!pc.intr(0));
    pc.bench.advance(1);
    assert!(pc.intr(0));
}

#[test]
fn periodic_timer() {
    let pc = Pc::new(1);
    pc.w(0, DIVIDE, 0xb);
    pc.w(0, TIMER, 1 << 17 | 0x30);
    pc.w(0, INITIAL, 1_000_000);
    for _ in 0..100 {
        pc.bench.advance(MS - 1);
        assert!(!pc.intr(0));
        pc.bench.advance(1);
        assert_eq!(pc.serve(0), [0x30]);
    }
    pc.bench.advance(MS / 4);
    assert_eq!(pc.r(0, CURRENT), 750_000);
    pc.w(0, TIMER, MASKED | 1 << 17 | 0x30);
    pc.bench.advance(10 * MS);
    assert_eq!((pc.r(0, CURRENT), pc.intr(0)), (750_000, false), "it counts while masked");
    pc.w(0, TIMER, 1 << 17 | 0x30);
    pc.bench.advance(MS * 3 / 4);
    assert!(pc.intr(0));
    pc.w(0, INITIAL, 1);
    pc.bench.advance(10 * MS);
    assert_eq!(pc.serve(0), [0x30], "periods too short to count are merged");
}

#[test]
fn tsc_deadline() {
    let pc = Pc::new(1);
    assert_eq!(pc.msr(0, msr::TSC_DEADLINE), Some(0));
    pc.set_msr(0, msr::TSC_DEADLINE, 5000).unwrap();
    assert_eq!(pc.msr(0, msr::TSC_DEADLINE), Some(0), "not in this mode");
    pc.w(0, TIMER, 2 << 17 | 0x30);
    pc.set_msr(0, msr::TSC_DEADLINE, 5001).unwrap();
    pc.w(0, INITIAL, 77);
    assert_eq!((pc.r(0, INITIAL), pc.r(0, CURRENT)), (0, 0));
    pc.bench.advance(2000);
    assert_eq!((pc.msr(0, msr::TSC_DEADLINE), pc.intr(0)), (Some(5001), false));
    pc.bench.advance(1);
    assert_eq!(pc.serve(0), [0x30]);
    assert_eq!(pc.msr(0, msr::TSC_DEADLINE), Some(0));
    pc.set_msr(0, msr::TSC_DEADLINE, 1).unwrap();
    assert_eq!(pc.serve(0), [0x30], "in the past: at once");
    pc.set_msr(0, msr::TSC_DEADLINE, 1_000_000).unwrap();
    pc.set_msr(0, msr::TSC_DEADLINE, 0).unwrap();
    pc.bench.advance(MS);
    assert!(!pc.intr(0));
    pc.set_msr(0, msr::TSC_DEADLINE, u64::MAX).unwrap();
    pc.w(0, TIMER, 0x30);
    assert_eq!(pc.msr(0, msr::TSC_DEADLINE), Some(0), "leaving the mode disarms");
}

#[test]
fn modes() {
    let pc = Pc::new(2);
    let base = 0xfee0_0000;
    let set = |value| pc.set_msr(1, msr::APIC_BASE, base | value);
    let (on, x2) = (0x800, 0xc00);
    assert_eq!(pc.msr(1, 0x802), None, "not in xAPIC mode");
    assert_eq!(set(0x400), None);
    assert_eq!(set(on | 1), None);
    assert_eq!(pc.set_msr(1, msr::APIC_BASE, 1 << 52 | on), None);
    pc.msi(0xfee0_1000, 0x40);
    set(x2).unwrap();
    assert_eq!(pc.r(1, ID), u32::MAX);
    pc.w(1, TPR, 0xf0);
    assert_eq!((pc.msr(1, 0x802), pc.msr(1, 0x80f), pc.msr(1, 0x808)), (Some(1), Some(0x1ff), Some(0)));
    assert!(pc.intr(1), "what was requested stays");
    assert_eq!(set(on), None, "not back");
    set(0).unwrap();
    assert!(!pc.intr(1));
    assert_eq!((pc.msr(1, 0x802), pc.r(1, ID)), (None, u32::MAX));
    assert!(!pc.msi(0xfee0_1000, 0x40));
    assert_eq!(set(x2), None);
    pc.lints.set_input(LINT0, true);
    assert!(pc.intr(1), "LINT0 is INTR");
    pc.lints.set_input(LINT1, true);
    assert_eq!(pc.cpus[1].nmis.load(SeqCst), 1, "LINT1 is NMI");
    set(on).unwrap();
    assert!(!pc.intr(1));
    assert_eq!((pc.r(1, SVR), pc.r(1, ID)), (0xff, 1 << 24));
    set(on | 0x100).unwrap();
    assert_eq!(pc.msr(1, msr::APIC_BASE), Some(base | on), "BSP is fixed");
}

#[test]
fn x2apic_registers() {
    let pc = Pc::new(1);
    pc.x2apic(0);
    let get = |r: u32| pc.msr(0, 0x800 + r);
    let set = |r: u32, value: u64| pc.set_msr(0, 0x800 + r, value);
    for absent in [0, 1, 9, 0xb, 0xc, 0xe, 0x2f, 0x31, 0x3f, 0x40, 0xff] {
        assert_eq!(get(absent), None, "{absent:#x}");
    }
    for fixed in [2, 3, 9, 0xa, 0xc, 0xd, 0xe, 0x10, 0x18, 0x20, 0x27, 0x2f, 0x31, 0x39, 0x40] {
        assert_eq!(set(fixed, 0), None, "{fixed:#x}");
    }
    for (r, bad) in
        [(8, 0x100), (0xb, 1), (0xf, 0x1000), (0x28, 1), (0x30, 1 << 12), (0x32, 1 << 13), (0x3e, 4), (0x3f, 0x100)]
    {
        assert_eq!(set(r, bad), None, "{r:#x}");
        assert_eq!(set(r, 1 << 40).is_some(), r == 0x30, "{r:#x}");
    }
    set(0x38, 0xffff_ffff).unwrap();
    set(0x3f, 0x44).unwrap();
    assert_eq!(pc.ack(0), Some(0x44));
    set(0xb, 0).unwrap();
    set(0x30, 0x4045).unwrap();
    assert_eq!(get(0x30), Some(0x4045));
    assert_eq!(pc.ack(0), Some(0x45));
    set(0x3f, 3).unwrap();
    set(0x28, 0).unwrap();
    assert_eq!(get(0x28), Some(0x20));
}

#[test]
fn x2apic_destinations() {
    let pc = Pc::new(20);
    (0..20).for_each(|n| pc.x2apic(n));
    assert_eq!(pc.msr(17, 0x80d), Some(1 << 16 | 2));
    let send = |destination: u64, low: u64| {
        pc.set_msr(0, 0x830, destination << 32 | low).unwrap();
        let mut took = Vec::new();
        for n in 0..20 {
            while pc.intr(n) {
                took.extend(pc.ack(n).map(|_| n));
                pc.set_msr(n, 0x80b, 0).unwrap();
            }
        }
        took
    };
    assert_eq!(send(17, 0x60), [17]);
    assert_eq!(send(0x1_0011, 1 << 11 | 0x60), [16], "there is no 20");
    assert_eq!(send(0x1_0006, 1 << 11 | 0x60), [17, 18]);
    assert_eq!(send(0x8001, 1 << 11 | 0x60), [0, 15]);
    assert_eq!(send(0xffff_ffff, 0x60).len(), 20);
    assert_eq!(send(0xffff_ffff, 1 << 11 | 0x60).len(), 20);
    assert_eq!(send(0, 3 << 18 | 0x60).len(), 19);
    assert_eq!(send(0xff, 0x60), [] as [u32; 0], "no broadcast in 32 bits");
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new(2);
    pc.w(0, LDR, 1 << 24);
    pc.w(0, DIVIDE, 0xb);
    pc.w(0, TIMER, 1 << 17 | 0x30);
    pc.w(0, INITIAL, 1_000_000);
    pc.bench.advance(2_250_000);
    pc.ack(0);
    pc.msi(0xfee0_0000, 0xc077);
    pc.w(0, ICR, 1 << 18);
    pc.x2apic(1);
    pc.set_msr(1, 0x832, 2 << 17 | 0x31).unwrap();
    pc.set_msr(1, msr::TSC_DEADLINE, 4_502_000).unwrap();
    let state = pc.state();
    assert_eq!((state.apics[0].timer_current, state.apics[0].errors), (750_000, 0x20));
    let other = Pc::cold(2);
    other.bench.advance(2_250_000);
    other.restore(&state).unwrap();
    assert_eq!(other.state(), state);
    assert_eq!((other.intr(0), other.intr(1)), (true, false));
    other.lapics.start();
    assert_eq!(other.ack(0), Some(0x77));
    other.w(0, EOI, 0);
    assert_eq!(other.calls.take(), ["eoi 0x77"]);
    other.w(0, EOI, 0);
    other.bench.advance(750_000 - 1);
    assert_eq!((other.intr(0), other.intr(1)), (false, true), "the deadline came before");
    other.bench.advance(1);
    assert_eq!(other.serve(0), [0x30]);
    other.bench.advance(MS);
    assert_eq!(other.serve(0), [0x30]);
}

#[test]
fn what_is_due_is_not_lost_by_saving() {
    let pc = Pc::new(1);
    pc.w(0, TIMER, 0x30);
    pc.w(0, INITIAL, 10);
    pc.bench.clock.advance(MS);
    let state = pc.state();
    assert_eq!(state.apics[0].irr[1], 1 << 16);
}

#[test]
fn hostile_states() {
    let pc = Pc::new(2);
    let good = pc.state();
    let refused = |change: fn(&mut LapicsState)| {
        let mut s = good.clone();
        change(&mut s);
        pc.restore(&s).unwrap_err()
    };
    refused(|s| _ = s.apics.pop());
    refused(|s| s.apics[1].id = 300);
    refused(|s| s.apics[0].irr[0] = 1);
    refused(|s| s.apics[0].timer_divide = 4);
    refused(|s| s.apics[0].timer_current = 1);
    refused(|s| s.apics[0].apic_base = 0x400);
    assert_eq!(pc.state(), good);
    pc.restore(&good).unwrap();
}

#[test]
fn random_accesses_and_round_trips() {
    let mut rng = Rng(7);
    let pc = Pc::new(3);
    for _ in 0..30_000 {
        let cpu = rng.below(3) as u32;
        let value = rng.next() >> rng.below(64);
        match rng.below(9) {
            0..3 => pc.w(cpu, rng.below(0x40) << 4, value as u32),
            3 => _ = pc.r(cpu, rng.below(0x40) << 4),
            4 => _ = pc.set_msr(cpu, 0x800 + rng.below(0x40) as u32, value),
            5 => _ = pc.msi(0xfee0_0000 | rng.below(0x400) << 2, value as u32 & 0xcfff),
            6 => _ = pc.ack(cpu),
            7 => pc.lints.set_input(rng.below(2) as u32, value & 1 != 0),
            _ if value & 0xff < 8 => _ = pc.set_msr(cpu, msr::APIC_BASE, 0xfee0_0000 | rng.below(4) << 10),
            _ => pc.bench.advance(rng.below(100_000)),
        }
        // A pin that is high can be acknowledged, one that is low has nothing to be.
        for n in 0..3 {
            let apic = &pc.lapics.apics[n as usize];
            if !pc.intr(n) {
                assert!(!apic.wants_pic() && apic.acknowledge().is_none());
            }
        }
    }
    let state = pc.state();
    let other = Pc::cold(3);
    other.bench.advance(pc.bench.clock.now());
    other.restore(&state).unwrap();
    assert_eq!(other.state(), state);
}

/// Interrupts sent from two threads while the vCPU takes them on a third: each vector arrives after it was sent
/// last.
#[test]
fn no_interrupt_is_lost_between_threads() {
    let pc = Pc::new(3);
    let lapics = &pc.lapics;
    let (sent, seen) = ([AtomicU32::new(0), AtomicU32::new(0)], [AtomicU32::new(0), AtomicU32::new(0)]);
    const ROUNDS: u32 = 20_000;
    std::thread::scope(|scope| {
        for sender in 0..2_u32 {
            let (sent, seen) = (&sent[sender as usize], &seen[sender as usize]);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    sent.store(round, SeqCst);
                    write32(&**lapics, sender + 1, ICR + 0x10, 0);
                    write32(&**lapics, sender + 1, ICR, 0x40 + 0x10 * sender);
                    // Half of the time both senders race on.
                    while round % 2 == 0 && seen.load(SeqCst) != round {
                        std::thread::yield_now();
                    }
                }
            });
        }
        scope.spawn(|| {
            while seen.iter().any(|s| s.load(SeqCst) != ROUNDS) {
                if !pc.intr(0) {
                    std::thread::yield_now();
                    continue;
                }
                if let Some(vector) = pc.ack(0) {
                    let sender = usize::from(vector >> 4) - 4;
                    seen[sender].store(sent[sender].load(SeqCst), SeqCst);
                    pc.w(0, EOI, 0);
                }
            }
        });
    });
}
