//! A small virtio driver: either transport, split rings in guest RAM.

use super::machine::{MMIO32, MMIO64, Machine};
use mimus_core::bus::AccessSize::{B1, B2, B4};
use mimus_core::device::{Device, ResetPhase};
use mimus_core::irq::IrqLine;
use mimus_devices::virtio::VirtioDevice;
use mimus_devices::virtio::transport::mmio::VirtioMmio;
use mimus_devices::virtio::transport::pci::{VirtioPci, VirtioPciOptions};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub const MMIO_BASE: u64 = 0x1000_1000;
/// Line of the virtio-mmio slot.
pub const MMIO_IRQ: usize = 5;

/// Where a device's registers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    Mmio,
    /// With MSI-X.
    Pci,
    /// With INTx.
    PciIntx,
}

pub const BUSES: [Bus; 3] = [Bus::Mmio, Bus::Pci, Bus::PciIntx];

/// One buffer: address, length, written by the device.
pub type Buf = (u64, u32, bool);

pub struct Ring {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    next_desc: u16,
    pub next_avail: u16,
    seen_used: u16,
}

impl Ring {
    pub fn new(m: &mut Machine, size: u16) -> Self {
        let n = u64::from(size);
        let desc = m.alloc(16 * n, 16);
        let avail = m.alloc(6 + 2 * n, 2);
        let used = m.alloc(6 + 8 * n, 4);
        Self { size, desc, avail, used, next_desc: 0, next_avail: 0, seen_used: 0 }
    }

    pub fn set_desc(&self, m: &Machine, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let word = u128::from(addr) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        m.put(at, &word.to_le_bytes());
    }

    /// Writes a chain of descriptors; returns its head.
    pub fn chain(&mut self, m: &Machine, bufs: &[Buf]) -> u16 {
        let head = self.next_desc;
        for (i, &(addr, len, write)) in bufs.iter().enumerate() {
            let index = (head + i as u16) % self.size;
            let next = (index + 1) % self.size;
            let more = u16::from(i + 1 < bufs.len());
            let at = self.desc + 16 * u64::from(index);
            self.set_desc(m, at, addr, len, more | u16::from(write) << 1, next);
        }
        self.next_desc = (head + bufs.len() as u16) % self.size;
        head
    }

    /// Writes an indirect table and a descriptor for it.
    pub fn indirect(&mut self, m: &mut Machine, bufs: &[Buf]) -> u16 {
        let table = m.alloc(16 * bufs.len() as u64, 16);
        for (i, &(addr, len, write)) in bufs.iter().enumerate() {
            let more = u16::from(i + 1 < bufs.len());
            self.set_desc(m, table + 16 * i as u64, addr, len, more | u16::from(write) << 1, i as u16 + 1);
        }
        let head = self.next_desc;
        self.set_desc(m, self.desc + 16 * u64::from(head), table, 16 * bufs.len() as u32, 4, 0);
        self.next_desc = (head + 1) % self.size;
        head
    }

    /// Makes a chain available.
    pub fn publish(&mut self, m: &Machine, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        m.put(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        m.put(self.avail + 2, &self.next_avail.to_le_bytes());
    }

    pub fn used_index(&self, m: &Machine) -> u16 {
        m.read(self.used + 2, B2) as u16
    }

    /// The next used entry, if there is one: head and length.
    pub fn take_used(&mut self, m: &Machine) -> Option<(u16, u32)> {
        if self.used_index(m) == self.seen_used {
            return None;
        }
        let slot = u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        let (id, len) = (m.read(self.used + 4 + 8 * slot, B4), m.read(self.used + 8 + 8 * slot, B4));
        Some((id as u16, len as u32))
    }

    /// The next used entry, which must come soon.
    pub fn wait_used(&mut self, m: &Machine) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.take_used(m) {
                return used;
            }
            assert!(Instant::now() < end, "the device does not answer");
            std::thread::yield_now();
        }
    }
}

/// Parts of a virtio-pci function, as its capabilities say.
#[derive(Clone, Copy, Default)]
struct PciParts {
    common: u64,
    isr: u64,
    device: u64,
    notify: u64,
    multiplier: u64,
}

pub struct Driver {
    pub m: Machine,
    pub bus: Bus,
    pub device: Arc<dyn Device>,
    pub rings: Vec<Ring>,
    devfn: u8,
    pci: PciParts,
    seen_interrupts: u32,
}

impl Driver {
    /// Puts `device` on `bus` and finds it, without setting it up.
    pub fn find(device: Arc<dyn VirtioDevice>, bus: Bus) -> Self {
        let m = Machine::new();
        let (built, devfn): (Arc<dyn Device>, u8) = match bus {
            Bus::Mmio => {
                let line = IrqLine::new(m.lines.clone(), MMIO_IRQ as u32);
                let (device, region) = VirtioMmio::with_region(device, m.dma(), line);
                m.map.change(|t| {
                    t.map(m.space.root(), MMIO_BASE, &region);
                });
                (device, 0)
            }
            Bus::Pci | Bus::PciIntx => {
                let slot = m.gpex.bus().reserve(None).unwrap();
                let devfn = slot.devfn().0;
                let vectors = (bus == Bus::PciIntx).then_some(0);
                (VirtioPci::plug(device, slot, VirtioPciOptions { vectors }), devfn)
            }
        };
        let mut d =
            Self { m, bus, device: built, rings: Vec::new(), devfn, pci: PciParts::default(), seen_interrupts: 0 };
        if bus != Bus::Mmio {
            d.enable_pci();
        }
        d
    }

    /// Finds a device and sets it up with all features it offers, less `without`.
    pub fn start(device: Arc<dyn VirtioDevice>, bus: Bus, without: u64) -> Self {
        let mut d = Self::find(device, bus);
        d.set_up(without);
        d
    }

    fn enable_pci(&mut self) {
        let (m, f) = (&self.m, self.devfn);
        assert_eq!(m.config(f, 0, B2), 0x1af4);
        m.set_config(f, 0x14, B4, MMIO32 as u32);
        m.set_config(f, 0x20, B4, 0);
        m.set_config(f, 0x24, B4, (MMIO64 >> 32) as u32);
        m.set_config(f, 4, B2, 6);
        let bar = MMIO64;
        let mut at = u64::from(m.config(f, 0x34, B1) as u8);
        while at != 0 {
            let offset = bar + u64::from(m.config(f, at + 8, B4));
            match (m.config(f, at, B1), m.config(f, at + 3, B1)) {
                (9, 1) => self.pci.common = offset,
                (9, 2) => {
                    self.pci.notify = offset;
                    self.pci.multiplier = m.config(f, at + 16, B4).into();
                }
                (9, 3) => self.pci.isr = offset,
                (9, 4) => self.pci.device = offset,
                (0x11, _) => {
                    m.set_config(f, at + 2, B2, 1 << 15);
                    let vectors = u64::from(m.config(f, at + 2, B2) & 0x7ff) + 1;
                    for v in 0..vectors {
                        m.write(MMIO32 + 16 * v, B4, 0xfee0_0000);
                        m.write(MMIO32 + 16 * v + 8, B4, 0x40 + v);
                        m.write(MMIO32 + 16 * v + 12, B4, 0);
                    }
                }
                _ => {}
            }
            at = m.config(f, at + 1, B1).into();
        }
        assert!(self.pci.common != 0 && self.pci.notify != 0);
    }

    pub fn devfn(&self) -> u8 {
        self.devfn
    }

    fn is_mmio(&self) -> bool {
        self.bus == Bus::Mmio
    }

    pub fn status(&self) -> u8 {
        let at = if self.is_mmio() { (MMIO_BASE + 0x70, B4) } else { (self.pci.common + 0x14, B1) };
        self.m.read(at.0, at.1) as u8
    }

    pub fn set_status(&self, status: u8) {
        match self.is_mmio() {
            true => self.m.write(MMIO_BASE + 0x70, B4, status.into()),
            false => self.m.write(self.pci.common + 0x14, B1, status.into()),
        }
    }

    pub fn device_id(&self) -> u32 {
        match self.is_mmio() {
            true => self.m.read(MMIO_BASE + 8, B4) as u32,
            false => self.m.config(self.devfn, 2, B2) - 0x1040,
        }
    }

    pub fn features(&self) -> u64 {
        let (select, value) = match self.is_mmio() {
            true => (MMIO_BASE + 0x14, MMIO_BASE + 0x10),
            false => (self.pci.common, self.pci.common + 4),
        };
        let half = |i| {
            self.m.write(select, B4, i);
            self.m.read(value, B4)
        };
        half(0) | half(1) << 32
    }

    pub fn set_features(&self, features: u64) {
        let (select, value) = match self.is_mmio() {
            true => (MMIO_BASE + 0x24, MMIO_BASE + 0x20),
            false => (self.pci.common + 8, self.pci.common + 12),
        };
        for i in 0..2 {
            self.m.write(select, B4, i);
            self.m.write(value, B4, features >> (32 * i) & 0xffff_ffff);
        }
    }

    pub fn config(&self, offset: u64, size: mimus_core::bus::AccessSize) -> u64 {
        let base = if self.is_mmio() { MMIO_BASE + 0x100 } else { self.pci.device };
        self.m.read(base + offset, size)
    }

    pub fn set_config(&self, offset: u64, size: mimus_core::bus::AccessSize, value: u64) {
        let base = if self.is_mmio() { MMIO_BASE + 0x100 } else { self.pci.device };
        self.m.write(base + offset, size, value);
    }

    /// Resets and sets the device up.
    pub fn set_up(&mut self, without: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        self.set_features(self.features() & !without);
        self.set_status(11);
        assert_eq!(self.status(), 11, "features are refused");
        self.rings.clear();
        for i in 0..16 {
            let max = self.queue_max(i);
            if max == 0 {
                break;
            }
            let ring = Ring::new(&mut self.m, max.min(16));
            self.set_up_queue(i, &ring);
            self.rings.push(ring);
        }
        self.set_status(15);
        assert_eq!(self.status(), 15);
        self.take_interrupts();
    }

    /// Selects a queue and reads its largest size.
    pub fn queue_max(&self, queue: u16) -> u16 {
        if self.is_mmio() {
            self.m.write(MMIO_BASE + 0x30, B4, queue.into());
            return self.m.read(MMIO_BASE + 0x34, B4) as u16;
        }
        self.m.write(self.pci.common + 0x16, B2, queue.into());
        let exists = u64::from(queue) < self.m.read(self.pci.common + 0x12, B2);
        if exists { self.m.read(self.pci.common + 0x18, B2) as u16 } else { 0 }
    }

    /// Programs the selected queue.
    pub fn set_up_queue(&self, queue: u16, r: &Ring) {
        let m = &self.m;
        if self.is_mmio() {
            m.write(MMIO_BASE + 0x38, B4, r.size.into());
            for (at, addr) in [(0x80, r.desc), (0x90, r.avail), (0xa0, r.used)] {
                m.write(MMIO_BASE + at, B4, addr & 0xffff_ffff);
                m.write(MMIO_BASE + at + 4, B4, addr >> 32);
            }
            return m.write(MMIO_BASE + 0x44, B4, 1);
        }
        let c = self.pci.common;
        m.write(c + 0x18, B2, r.size.into());
        for (at, addr) in [(0x20, r.desc), (0x28, r.avail), (0x30, r.used)] {
            m.write(c + at, mimus_core::bus::AccessSize::B8, addr);
        }
        if self.bus == Bus::Pci {
            m.write(c + 0x10, B2, 0);
            m.write(c + 0x1a, B2, u64::from(queue) + 1);
            assert_eq!(m.read(c + 0x1a, B2), u64::from(queue) + 1);
        }
        m.write(c + 0x1c, B2, 1);
        assert_eq!(m.read(c + 0x1c, B2), 1);
    }

    pub fn notify(&self, queue: u16) {
        match self.is_mmio() {
            true => self.m.write(MMIO_BASE + 0x50, B4, queue.into()),
            false => self.m.write(self.pci.notify + self.pci.multiplier * u64::from(queue), B2, queue.into()),
        }
    }

    /// How many interrupts came since this was last asked, all acknowledged.
    pub fn take_interrupts(&mut self) -> u32 {
        let total = match self.bus {
            Bus::Pci => self.m.messages.0.lock().unwrap().len() as u32,
            Bus::PciIntx => {
                self.m.read(self.pci.isr, B1);
                let wire = usize::from(self.devfn >> 3) % 4;
                assert!(!self.m.line(wire));
                self.m.lines.rises[wire].load(Ordering::SeqCst)
            }
            Bus::Mmio => {
                let status = self.m.read(MMIO_BASE + 0x60, B4);
                self.m.write(MMIO_BASE + 0x64, B4, status);
                assert!(!self.m.line(MMIO_IRQ));
                self.m.lines.rises[MMIO_IRQ].load(Ordering::SeqCst)
            }
        };
        let new = total - self.seen_interrupts;
        self.seen_interrupts = total;
        new
    }

    /// Makes a chain of `bufs` available on a queue and notifies.
    pub fn send(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.chain(&self.m, bufs);
        ring.publish(&self.m, head);
        self.notify(queue as u16);
        head
    }

    /// The same, and waits for the answer; returns the length written.
    pub fn call(&mut self, queue: usize, bufs: &[Buf]) -> u32 {
        let head = self.send(queue, bufs);
        let (id, len) = self.rings[queue].wait_used(&self.m);
        assert_eq!(id, head);
        len
    }

    /// Stops the machine and waits for what is in flight.
    pub fn stop(&self) {
        let drain = mimus_core::device::Drain::new();
        self.device.stop(&drain);
        assert!(drain.wait(Duration::from_secs(10)));
    }

    /// Moves the driver, rings and all, to another device of the same kind by way of a
    /// saved state. The old device is reset, so that nothing of it is left.
    pub fn migrate(&mut self, device: Arc<dyn VirtioDevice>) {
        self.stop();
        let saved = self.device.save().unwrap();
        let mut other = Self::find(device, self.bus);
        let mut ram = vec![0; self.m.ram.len() as usize];
        assert!(self.m.ram.read(0, &mut ram) && other.m.ram.write(0, &ram));
        other.device.restore(&saved).unwrap();
        assert_eq!(other.device.save().unwrap(), saved);
        reset(&*self.device);
        other.rings = std::mem::take(&mut self.rings);
        other.m.resume(&self.m);
        other.take_interrupts();
        other.device.start();
        *self = other;
    }
}

impl Machine {
    /// Goes on with another machine's allocations.
    fn resume(&mut self, other: &Machine) {
        let used = other.used();
        let _ = self.alloc(used - self.used(), 1);
    }
}

pub fn reset(device: &dyn Device) {
    for phase in [ResetPhase::Enter, ResetPhase::Hold, ResetPhase::Exit] {
        device.reset(phase);
    }
}
