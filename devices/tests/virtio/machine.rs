//! A machine of RAM, a PCI bridge and logs of interrupts: what devices are tested in.

use mimus_core::bus::{AccessSize, GuestPhys, MemTxAttrs, MemTxResult, Requester};
use mimus_core::irq::{IrqController, IrqLine, MsiSink, MsiTarget};
use mimus_core::memory::{AddressSpace, DmaHandle, GuestRam, MemoryMap, MemoryRegion, RamBacking, RamBlock};
use mimus_devices::pci::host_bridge::{Gpex, GpexWindows};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

pub const RAM_BASE: u64 = 0x8000_0000;
pub const RAM_LEN: u64 = 4 << 20;
pub const ECAM: u64 = 0x3000_0000;
pub const MMIO32: u64 = 0x4000_0000;
pub const MMIO64: u64 = 0x4_0000_0000;
const WINDOW: u64 = 0x1000_0000;
pub const PIO: u64 = 0x0300_0000;

/// Levels of interrupt lines, and how often each rose.
#[derive(Default)]
pub struct Lines {
    pub level: Mutex<[bool; 8]>,
    pub rises: [AtomicU32; 8],
}

impl IrqController for Lines {
    fn set_input(&self, pin: u32, level: bool) {
        self.level.lock().unwrap()[pin as usize] = level;
        if level {
            self.rises[pin as usize].fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Messages sent.
#[derive(Default)]
pub struct Messages(pub Mutex<Vec<(u64, u32, Requester)>>);

impl MsiSink for Messages {
    fn deliver(&self, address: u64, data: u32, requester: Requester) -> MemTxResult {
        self.0.lock().unwrap().push((address, data, requester));
        MemTxResult::Ok
    }
}

pub struct Machine {
    pub map: Arc<MemoryMap>,
    pub space: Arc<AddressSpace>,
    pub ram: Arc<RamBlock>,
    pub lines: Arc<Lines>,
    pub messages: Arc<Messages>,
    pub gpex: Gpex,
    next: u64,
}

pub const ATTRS: MemTxAttrs = MemTxAttrs::vcpu(0);

impl Machine {
    pub fn new() -> Self {
        let map = MemoryMap::new();
        let root = MemoryRegion::container("system", u64::MAX);
        let space = map.address_space("system", &root);
        let ram = GuestRam::new().add_block("ram", RAM_LEN, RamBacking::Private).unwrap();
        map.change(|t| {
            t.map(&root, RAM_BASE, &MemoryRegion::ram("ram", &ram));
        });
        let (lines, messages) = (Arc::new(Lines::default()), Arc::new(Messages::default()));
        let irqs = std::array::from_fn(|i| IrqLine::new(lines.clone(), i as u32));
        let msi = MsiTarget::to_sink(messages.clone(), Requester::Unspecified);
        let windows = GpexWindows {
            ecam: (ECAM, 1 << 20),
            mmio32: (MMIO32, WINDOW),
            mmio64: Some((MMIO64, WINDOW)),
            pio: Some((PIO, 0x1_0000)),
        };
        let gpex = Gpex::new("pcie.0", &space, &windows, irqs, Some(msi)).unwrap();
        Self { map, space, ram, lines, messages, gpex, next: RAM_BASE + 0x1000 }
    }

    /// Guest memory for a test's buffers, never given back.
    pub fn alloc(&mut self, len: u64, align: u64) -> u64 {
        let at = self.next.next_multiple_of(align);
        self.next = at + len;
        assert!(self.next <= RAM_BASE + RAM_LEN);
        at
    }

    /// Gives all allocations back.
    pub fn free_all(&mut self) {
        self.next = RAM_BASE + 0x1000;
    }

    /// End of the memory given out.
    pub fn used(&self) -> u64 {
        self.next
    }

    pub fn dma(&self) -> DmaHandle {
        DmaHandle::ungated(self.space.clone())
    }

    pub fn read(&self, addr: u64, size: AccessSize) -> u64 {
        let (value, result) = self.space.read(GuestPhys(addr), size, ATTRS);
        assert_eq!(result, MemTxResult::Ok, "read of {addr:#x}");
        value
    }

    pub fn write(&self, addr: u64, size: AccessSize, value: u64) {
        let result = self.space.write(GuestPhys(addr), size, value, ATTRS);
        assert_eq!(result, MemTxResult::Ok, "write of {addr:#x}");
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.dma().read(GuestPhys(addr), &mut out).unwrap();
        out
    }

    pub fn put(&self, addr: u64, data: &[u8]) {
        self.dma().write(GuestPhys(addr), data).unwrap();
    }

    /// Memory with `data` in it.
    pub fn place(&mut self, data: &[u8]) -> u64 {
        let at = self.alloc(data.len() as u64, 16);
        self.put(at, data);
        at
    }

    pub fn config(&self, devfn: u8, offset: u64, size: AccessSize) -> u32 {
        self.read(ECAM + (u64::from(devfn) << 12) + offset, size) as u32
    }

    pub fn set_config(&self, devfn: u8, offset: u64, size: AccessSize, value: u32) {
        self.write(ECAM + (u64::from(devfn) << 12) + offset, size, value.into());
    }

    pub fn line(&self, pin: usize) -> bool {
        self.lines.level.lock().unwrap()[pin]
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.map.teardown();
    }
}
