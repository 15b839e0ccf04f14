//! The part of a vCPU that any thread may use.

use crate::entry::{Entry, KICK, LOOK};
use crate::sys::run_page::RunPage;
use kvm_ioctls::VcpuFd;
use mimus_core::accel::{CpuPin, RemoteFence, VcpuHandle, VcpuIndex, VcpuSignal};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// INTR is high.
pub const INTR: u32 = 1 << 0;
/// An NMI came.
pub const NMI: u32 = 1 << 1;
/// An SMI came.
pub const SMI: u32 = 1 << 2;
/// An INIT came.
pub const INIT: u32 = 1 << 3;
/// Those that are remembered until the vCPU takes them.
pub const LATCHED: u32 = NMI | SMI | INIT;

/// Kinds of exits that are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    Pio,
    Mmio,
    Halt,
    InterruptWindow,
    Eoi,
    Msr,
    Debug,
    Interrupted,
    EmulationFailure,
    DirtyRing,
    Other,
}

/// Names of the counters, in order.
pub const COUNTERS: [&str; 11] = [
    "pio exits",
    "mmio exits",
    "halt exits",
    "interrupt window exits",
    "eoi exits",
    "msr exits",
    "debug exits",
    "interrupted entries",
    "emulation failures",
    "full dirty rings",
    "other exits",
];

/// What is shared of a vCPU.
pub struct VcpuCore {
    pub index: VcpuIndex,
    pub fd: VcpuFd,
    pub page: Arc<RunPage>,
    pub entry: Arc<Entry>,
    pins: AtomicU32,
    signal: Arc<VcpuSignal>,
    counters: [AtomicU64; COUNTERS.len()],
    /// The time-stamp counter while the machine's time stands still.
    frozen_tsc: Mutex<Option<u64>>,
    /// What its time-stamp counter adds to the host's, as last looked at, and its frequency in kHz: any thread may
    /// want to know while the vCPU is in the kernel, which would have to be waited for.
    pub tsc_offset: AtomicU64,
    pub tsc_khz: AtomicU32,
}

impl VcpuCore {
    /// Nothing pending.
    pub fn new(index: VcpuIndex, fd: VcpuFd, page: Arc<RunPage>, entry: Arc<Entry>) -> Arc<Self> {
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        Arc::new(Self {
            index,
            fd,
            page,
            entry,
            pins: AtomicU32::new(0),
            signal: VcpuSignal::new(),
            counters: Default::default(),
            frozen_tsc: Mutex::default(),
            tsc_offset: AtomicU64::new(0),
            tsc_khz: AtomicU32::new(tsc_khz),
        })
    }

    /// Pins that are high or came.
    pub fn pins(&self) -> u32 {
        self.pins.load(Ordering::SeqCst)
    }

    /// Takes those of `mask` that came.
    pub fn take_pins(&self, mask: u32) -> u32 {
        if self.pins() & mask == 0 { 0 } else { self.pins.fetch_and(!mask, Ordering::SeqCst) & mask }
    }

    /// Takes over the level of INTR of a saved state, and forgets what came.
    pub fn set_restored_pins(&self, intr: bool) {
        self.pins.store(if intr { INTR } else { 0 }, Ordering::SeqCst);
    }

    /// Counts an exit.
    pub fn count(&self, kind: Count) {
        // Only the vCPU's thread adds.
        let counter = &self.counters[kind as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// A counter.
    pub fn counter(&self, kind: usize) -> u64 {
        self.counters[kind].load(Ordering::Relaxed)
    }

    /// The frozen time-stamp counter.
    pub fn frozen_tsc(&self) -> MutexGuard<'_, Option<u64>> {
        self.frozen_tsc.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn latch(&self, bit: u32) {
        self.pins.fetch_or(bit, Ordering::SeqCst);
        self.entry.request(LOOK);
        self.signal.wake();
    }
}

impl VcpuHandle for VcpuCore {
    fn kick(&self) {
        self.entry.request(KICK);
        self.signal.wake();
    }

    fn set_pin(&self, pin: CpuPin, level: bool) {
        match (pin, level) {
            (CpuPin::Intr, true) => self.latch(INTR),
            (CpuPin::Intr, false) => _ = self.pins.fetch_and(!INTR, Ordering::SeqCst),
            (CpuPin::Nmi, true) => self.latch(NMI),
            (CpuPin::Smi, true) => self.latch(SMI),
            (CpuPin::Init, true) => self.latch(INIT),
            _ => {}
        }
    }

    fn index(&self) -> VcpuIndex {
        self.index
    }

    fn remote_fence(&self, _fence: RemoteFence) {
        // x86 orders instruction fetches itself, and KVM's guests flush each other's translations.
    }

    fn signal(&self) -> &Arc<VcpuSignal> {
        &self.signal
    }
}
