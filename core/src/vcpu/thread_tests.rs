//! The run loop with a vCPU that counts and asks.

use super::*;
use crate::accel::{Access, CpuPin, RemoteFence, StateError, TranslateFault, Translation, VcpuSignal};
use crate::bus::GuestVirt;
use crate::clock::VirtualClock;
use crate::memory::{AddressSpace, MemoryMap, MemoryRegion};
use mimus_arch::riscv::RiscvState;
use mimus_arch::{CpuState, StateGroups};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

struct Handle {
    index: VcpuIndex,
    kicked: AtomicBool,
    pin: AtomicBool,
    signal: Arc<VcpuSignal>,
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.signal.wake();
    }
    fn set_pin(&self, _: CpuPin, level: bool) {
        self.pin.store(level, Ordering::SeqCst);
        self.signal.wake();
    }
    fn index(&self) -> VcpuIndex {
        self.index
    }
    fn remote_fence(&self, _: RemoteFence) {}
    fn signal(&self) -> &Arc<VcpuSignal> {
        &self.signal
    }
}

/// Shared by the vCPUs and the test.
struct World {
    running: AtomicU32,
    steps: AtomicU64,
    threads: VcpuThreads,
    exclusive: AtomicBool,
}

type Program = fn(&Fake, &World) -> Option<VcpuExit>;

struct Fake {
    handle: Arc<Handle>,
    world: Arc<Mutex<Option<Arc<World>>>>,
    program: Program,
    started: Option<StartRequest>,
}

impl Vcpu for Fake {
    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.clone()
    }
    fn run(&mut self, _: &dyn CpuIo) -> VcpuExit {
        let world = self.world.lock().unwrap().clone().unwrap();
        world.running.fetch_add(1, Ordering::SeqCst);
        let exit = loop {
            if self.handle.kicked.swap(false, Ordering::SeqCst) {
                break VcpuExit::Kicked;
            }
            assert!(!world.exclusive.load(Ordering::SeqCst), "running in an exclusive section");
            if let Some(exit) = (self.program)(self, &world) {
                break exit;
            }
            world.steps.fetch_add(1, Ordering::SeqCst);
        };
        world.running.fetch_sub(1, Ordering::SeqCst);
        exit
    }
    fn get_state(&mut self, _: StateGroups) -> CpuState {
        let pc = self.started.map_or(0, |s| s.pc);
        CpuState::Riscv(Box::new(RiscvState::new(self.handle.index.0.into(), 0, pc)))
    }
    fn set_state(&mut self, _: &CpuState) -> Result<(), StateError> {
        Ok(())
    }
    fn reset(&mut self, _: ResetKind, start: Option<StartRequest>) {
        self.started = start;
    }
    fn translate(&mut self, va: GuestVirt, _: Access) -> Result<Translation, TranslateFault> {
        Err(TranslateFault { va })
    }
}

struct Io {
    clock: Arc<VirtualClock>,
    memory: Arc<AddressSpace>,
}

impl CpuIo for Io {
    fn clock(&self) -> &VirtualClock {
        &self.clock
    }
    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}

fn machine(n: u32, program: Program) -> (Arc<World>, Vec<Arc<Handle>>, mpsc::Receiver<VcpuEvent>) {
    let handle = |i| {
        let (kicked, pin) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Handle { index: VcpuIndex(i), kicked, pin, signal: VcpuSignal::new() })
    };
    let handles: Vec<_> = (0..n).map(handle).collect();
    let (tx, rx) = mpsc::channel();
    let tx = Mutex::new(tx);
    let dynamic = handles.iter().map(|h| h.clone() as Arc<dyn VcpuHandle>).collect();
    let threads = VcpuThreads::new(dynamic, move |e| {
        let _ = tx.lock().unwrap().send(e);
    });
    let world = Arc::new(World {
        running: AtomicU32::new(0),
        steps: AtomicU64::new(0),
        threads,
        exclusive: AtomicBool::new(false),
    });
    let slot = Arc::new(Mutex::new(Some(world.clone())));
    let vcpu = |h: &Arc<Handle>| -> Box<dyn Vcpu> {
        Box::new(Fake { handle: h.clone(), world: slot.clone(), program, started: None })
    };
    let vcpus = handles.iter().map(vcpu).collect();
    let map = MemoryMap::new();
    let memory = map.address_space("system", &MemoryRegion::container("system", 0x1000));
    world.threads.spawn(vcpus, Arc::new(Io { clock: VirtualClock::new(), memory })).unwrap();
    (world, handles, rx)
}

fn until(what: &str, f: impl Fn() -> bool) {
    for _ in 0..5000 {
        if f() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("timed out: {what}");
}

#[test]
fn pause_resume_and_work() {
    let (world, _, _rx) = machine(2, |_, _| {
        std::thread::yield_now();
        None
    });
    let t = &world.threads;
    let how = StartRequest { pc: 0x8000, arg0: 0, arg1: 0 };
    assert!(t.start_vcpu(VcpuIndex(0), how));
    assert!(!t.start_vcpu(VcpuIndex(0), how), "already starting");
    let pc = t.run_on_sync(VcpuIndex(0), |v| v.get_state(StateGroups::Core).pc());
    assert_eq!(pc, Ok(0x8000), "work is served while paused");
    assert_eq!(world.steps.load(Ordering::SeqCst), 0);
    t.resume();
    until("vCPU 0 runs", || world.steps.load(Ordering::SeqCst) > 0);
    assert_eq!(t.status(VcpuIndex(0)), Some(VcpuStatus::Running));
    assert_eq!(t.status(VcpuIndex(1)), Some(VcpuStatus::Off));
    assert!(t.start_vcpu(VcpuIndex(1), how));
    until("both run", || world.running.load(Ordering::SeqCst) == 2);
    for _ in 0..200 {
        t.pause();
        assert_eq!(world.running.load(Ordering::SeqCst), 0);
        t.resume();
    }
    assert_eq!(t.run_on_sync(VcpuIndex(1), |_| 5), Ok(5));
    assert_eq!(t.run_on_sync(VcpuIndex(2), |_| 5), Err(WorkError::NoSuchVcpu));
    t.run_exclusive(|| {
        world.exclusive.store(true, Ordering::SeqCst);
        assert_eq!(world.running.load(Ordering::SeqCst), 0);
        t.run_exclusive(|| ());
        world.exclusive.store(false, Ordering::SeqCst);
    });
    t.power_off(VcpuIndex(1));
    until("vCPU 1 is off", || world.running.load(Ordering::SeqCst) == 1);
    t.stop();
    assert_eq!(world.running.load(Ordering::SeqCst), 0);
    assert_eq!(t.run_on_sync(VcpuIndex(0), |_| ()), Err(WorkError::Lost));
}

#[test]
fn exclusive_sections_from_inside_run() {
    // Every vCPU asks for exclusive sections while the machine is paused and resumed.
    let (world, _, _rx) = machine(3, |_, w| {
        w.threads.run_exclusive(|| {
            assert!(!w.exclusive.swap(true, Ordering::SeqCst));
            std::thread::yield_now();
            w.exclusive.store(false, Ordering::SeqCst);
        });
        None
    });
    let t = &world.threads;
    for i in 0..3 {
        assert!(t.power_on(VcpuIndex(i), None));
    }
    t.resume();
    until("sections run", || world.steps.load(Ordering::SeqCst) > 100);
    for _ in 0..50 {
        t.pause();
        let before = world.steps.load(Ordering::SeqCst);
        assert_eq!(world.running.load(Ordering::SeqCst), 0);
        assert_eq!(t.run_on_sync(VcpuIndex(2), |_| 1), Ok(1));
        assert_eq!(world.steps.load(Ordering::SeqCst), before);
        t.resume();
    }
    t.stop();
}

#[test]
fn halts_end_with_a_pin_and_events_pause() {
    let (world, handles, rx) = machine(1, |v, _| {
        let pending = v.handle.pin.load(Ordering::SeqCst);
        Some(if pending { VcpuExit::Shutdown(ShutdownCause::GuestPowerOff) } else { VcpuExit::Halted })
    });
    let t = &world.threads;
    assert!(t.power_on(VcpuIndex(0), None));
    t.resume();
    until("it halts", || t.status(VcpuIndex(0)) == Some(VcpuStatus::Halted));
    t.pause();
    t.resume();
    handles[0].set_pin(CpuPin::Mtip, true);
    let event = rx.recv_timeout(Duration::from_secs(5));
    assert!(matches!(event, Ok(VcpuEvent::Shutdown(ShutdownCause::GuestPowerOff))), "{event:?}");
    assert!(t.is_paused());
    t.stop();
}
