//! The machine's side: devices are a hole that answers and remembers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mimus_core::accel::{CpuIo, CpuPin, VcpuHandle, VcpuIndex};
use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult};
use mimus_core::clock::VirtualClock;
use mimus_core::memory::AddressSpace;

/// A write here ends `run`.
pub const PORT_STOP: u16 = 0xf4;

/// An access to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    In(u16, u64),
    Out(u16, u64, u64),
    Read(u64, u64),
    Write(u64, u64, u64),
}

pub struct Bus {
    pub clock: Arc<VirtualClock>,
    pub memory: Arc<AddressSpace>,
    pub handle: OnceLock<Arc<dyn VcpuHandle>>,
    seen: Mutex<Vec<Seen>>,
    /// Vectors of interrupt acknowledge cycles; INTR goes low with the last.
    pub vectors: Mutex<VecDeque<u8>>,
    pub stopped: AtomicBool,
}

pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    pub fn new(clock: Arc<VirtualClock>, memory: Arc<AddressSpace>) -> Arc<Self> {
        let stopped = AtomicBool::new(false);
        Arc::new(Self {
            clock,
            memory,
            handle: OnceLock::new(),
            seen: Mutex::default(),
            vectors: Mutex::default(),
            stopped,
        })
    }

    /// What was accessed, in order.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut lock(&self.seen))
    }

    fn see(&self, what: Seen) {
        lock(&self.seen).push(what);
    }
}

/// What a device answers at an address.
fn answer(at: u64, size: AccessSize) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15) & size.mask()
}

impl CpuIo for Bus {
    fn mem_read(&self, _: VcpuIndex, pa: GuestPhys, size: AccessSize, _: MemTxAttrs) -> (u64, MemTxResult) {
        self.see(Seen::Read(pa.0, size.bytes()));
        (answer(pa.0, size), MemTxResult::Ok)
    }

    fn mem_write(&self, _: VcpuIndex, pa: GuestPhys, size: AccessSize, _: MemTxAttrs, value: u64) -> MemTxResult {
        self.see(Seen::Write(pa.0, size.bytes(), value & size.mask()));
        MemTxResult::Ok
    }

    fn pio_read(&self, _: VcpuIndex, port: u16, size: AccessSize) -> u64 {
        self.see(Seen::In(port, size.bytes()));
        answer(port.into(), size)
    }

    fn pio_write(&self, _: VcpuIndex, port: u16, size: AccessSize, value: u64) {
        if port == PORT_STOP {
            self.stopped.store(true, Ordering::SeqCst);
            if let Some(handle) = self.handle.get() {
                handle.kick();
            }
            return;
        }
        self.see(Seen::Out(port, size.bytes(), value & size.mask()));
    }

    fn acknowledge_interrupt(&self, _: VcpuIndex) -> Option<u8> {
        let mut vectors = lock(&self.vectors);
        let vector = vectors.pop_front();
        if let Some(handle) = self.handle.get().filter(|_| vectors.is_empty()) {
            handle.set_pin(CpuPin::Intr, false);
        }
        vector
    }

    fn clock(&self) -> &VirtualClock {
        &self.clock
    }

    fn memory(&self) -> &AddressSpace {
        &self.memory
    }
}
