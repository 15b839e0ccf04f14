//! What the tests of register-level devices share: a clock moved by hand, lines that
//! remember, port and memory accesses, random numbers; host sides, memory, damaged states.

pub mod host;
pub mod memory;
pub mod pci;
pub mod state;

use std::sync::{Arc, Mutex};

use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MmioAccess, PioAccess};
use mimus_core::clock::{Timer, TimerQueue, VirtualClock};
use mimus_core::device::{Lifecycle, MmioDevice, PioDevice, ResetPhase, lock};
use mimus_core::irq::{IrqController, IrqLine};
use mimus_core::memory::{AddressSpace, DmaHandle, GuestRam, MemoryMap, MemoryRegion, RamBacking};
use mimus_core::snapshot::{SaveRestore, Snapshot};

/// A virtual clock and its timers, on the test's thread.
pub struct Bench {
    pub clock: Arc<VirtualClock>,
    pub queue: Arc<TimerQueue>,
}

impl Bench {
    pub fn new() -> Self {
        let clock = VirtualClock::new();
        clock.advance(0);
        Self { queue: TimerQueue::new(clock.clone(), || {}), clock }
    }

    pub fn timer(&self) -> Timer {
        self.queue.timer()
    }

    /// Moves on by `ns`, firing each timer at its deadline.
    pub fn advance(&self, ns: u64) {
        let end = self.clock.now() + ns;
        for _ in 0..1_000_000 {
            let left = end - self.clock.now();
            match self.queue.wait_ns() {
                Some(wait) if wait <= left => {
                    self.clock.advance(wait);
                    self.queue.fire();
                }
                _ => return self.clock.advance(left),
            }
        }
        panic!("timers never come to rest");
    }
}

/// The levels driven on some lines.
#[derive(Default)]
pub struct Levels(Mutex<Vec<(u32, bool)>>);

impl Levels {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub fn line(self: &Arc<Self>, pin: u32) -> IrqLine {
        IrqLine::new(self.clone(), pin)
    }

    /// What was driven since the last call.
    pub fn take(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut *lock(&self.0))
    }

    /// Rising edges of `pin` since the last call.
    pub fn rises(&self, pin: u32) -> usize {
        self.take().iter().filter(|&&e| e == (pin, true)).count()
    }
}

impl IrqController for Levels {
    fn set_input(&self, pin: u32, level: bool) {
        lock(&self.0).push((pin, level));
    }
}

pub fn pio(region: u32, offset: u16) -> PioAccess {
    PioAccess { region, offset, size: AccessSize::B1, attrs: MemTxAttrs::vcpu(0) }
}

pub fn inb(device: &impl PioDevice, region: u32, offset: u16) -> u8 {
    device.pio_read(pio(region, offset)).unwrap() as u8
}

pub fn outb(device: &impl PioDevice, region: u32, offset: u16, value: u8) {
    device.pio_write(pio(region, offset), value.into()).unwrap();
}

pub fn mmio(vcpu: u32, offset: u64, size: AccessSize) -> MmioAccess {
    MmioAccess { region: 0, offset, size, attrs: MemTxAttrs::vcpu(vcpu) }
}

pub fn read32(device: &impl MmioDevice, vcpu: u32, offset: u64) -> u32 {
    device.mmio_read(mmio(vcpu, offset, AccessSize::B4)).unwrap() as u32
}

pub fn write32(device: &impl MmioDevice, vcpu: u32, offset: u64, value: u32) {
    device.mmio_write(mmio(vcpu, offset, AccessSize::B4), value.into()).unwrap();
}

pub fn reset(device: &impl Lifecycle) {
    for phase in [ResetPhase::Enter, ResetPhase::Hold, ResetPhase::Exit] {
        device.reset(phase);
    }
}

/// The saved state as JSON, for comparing.
pub fn saved<D: SaveRestore>(device: &Mutex<D>) -> serde_json::Value {
    serde_json::to_value(lock(device).save_state()).unwrap()
}

/// Restores `state` with one field replaced.
pub fn restore_with<D: SaveRestore>(
    device: &Mutex<D>,
    pointer: &str,
    value: impl Into<serde_json::Value>,
) -> Result<(), String> {
    let mut state = saved(device);
    *state.pointer_mut(pointer).expect("the field exists") = value.into();
    let state = serde_json::from_value(state).map_err(|e| e.to_string())?;
    lock(device).restore_state(state).map_err(|e| e.to_string())
}

/// Copies `from`'s state to `to` and compares.
pub fn assert_round_trip<D: SaveRestore>(from: &Mutex<D>, to: &Mutex<D>) {
    let state = lock(from).save_state();
    lock(to).restore_state(state).unwrap();
    assert_eq!(saved(from), saved(to));
}

/// xorshift64*.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }
}

/// Memory for devices that do DMA: RAM from address 0 on.
pub struct Ram {
    pub space: Arc<AddressSpace>,
}

impl Ram {
    pub fn new(len: u64) -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let block = GuestRam::new().add_block("ram", len, RamBacking::Private).unwrap();
        let ram = MemoryRegion::ram("ram", &block);
        map.change(|t| {
            t.map(&root, 0, &ram);
        });
        Self { space }
    }

    pub fn dma(&self) -> DmaHandle {
        DmaHandle::ungated(self.space.clone())
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.space.read_bytes(GuestPhys(at), &mut bytes, MemTxAttrs::default()).is_ok());
        bytes
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.space.load_bytes(GuestPhys(at), bytes).is_ok());
    }
}

/// The same for devices that are not in one mutex.
pub fn assert_snapshot_round_trip(from: &impl Snapshot, to: &impl Snapshot) {
    let state = from.save().unwrap();
    to.restore(&state).unwrap();
    assert_eq!(to.save().unwrap(), state);
}
