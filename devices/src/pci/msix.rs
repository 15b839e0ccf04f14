//! MSI-X: a table of messages, one per vector, in a BAR (PCI §6.8.2).

use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{MmioDevice, lock};
use mimus_core::irq::{MsiRoute, MsiTarget};
use mimus_core::memory::{DmaGate, MemoryRegion};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

const ENTRY_LEN: u64 = 16;
/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;
/// Most vectors the table can have.
pub const MAX_VECTORS: u16 = 2048;
/// Message control: all vectors masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
/// Message control: MSI-X instead of INTx.
pub const CONTROL_ENABLE: u16 = 1 << 15;

/// Table and pending bits of one function.
///
/// While the machine runs, a vector that may send has a way of its own to the controller if the controller has any:
/// it is signalled without its message being looked at again.
pub struct Msix {
    /// Below the device's lock.
    state: Mutex<Live>,
    target: MsiTarget,
    /// A message is a bus-master write.
    gate: DmaGate,
}

/// The registers, and what goes with them while the machine runs.
struct Live {
    registers: MsixState,
    /// One for each vector.
    ways: Vec<Way>,
    running: bool,
}

/// A vector's own way to the controller.
#[derive(Default)]
struct Way {
    route: Option<Arc<dyn MsiRoute>>,
    /// The message last connected, and whether that was possible.
    connected: Option<((u64, u32), bool)>,
}

/// What a vector that fires does.
enum Fire {
    Signal(Arc<dyn MsiRoute>),
    Send(u64, u32),
}

impl Live {
    fn new(vectors: usize) -> Self {
        let ways = (0..vectors).map(|_| Way::default()).collect();
        Self { registers: MsixState::new(vectors), ways, running: false }
    }

    /// What `vector` sends if it may now; else it becomes pending.
    fn fire(&mut self, vector: usize) -> Option<Fire> {
        let message = self.registers.fire(vector)?;
        let way = self.ways.get(vector).filter(|w| w.connected == Some((message, true)));
        Some(match way.and_then(|w| w.route.clone()) {
            Some(route) => Fire::Signal(route),
            None => Fire::Send(message.0, message.1),
        })
    }

    /// What waited and may go out now.
    fn unblocked(&mut self) -> Vec<Fire> {
        let waiting: Vec<usize> = (0..self.ways.len()).filter(|&i| self.registers.pending[i]).collect();
        waiting.into_iter().filter_map(|i| self.fire(i)).collect()
    }

    /// A vector that may send gets its way to the controller. It keeps it while it is masked: it is not signalled then.
    fn connect(&mut self, vector: usize, target: &MsiTarget) {
        let Some(message) = self.registers.message(vector).filter(|_| self.running) else { return };
        let Some(way) = self.ways.get_mut(vector).filter(|w| w.connected.map(|c| c.0) != Some(message)) else { return };
        if way.route.is_none() {
            way.route = target.route();
        }
        let connected = way.route.as_ref().is_some_and(|r| r.connect(message.0, message.1));
        way.connected = Some((message, connected));
    }

    fn connect_all(&mut self, target: &MsiTarget) {
        (0..self.ways.len()).for_each(|vector| self.connect(vector, target));
    }

    fn disconnect_all(&mut self) {
        for way in &mut self.ways {
            if way.connected.take().is_some_and(|c| c.1)
                && let Some(route) = &way.route
            {
                route.disconnect();
            }
        }
    }
}

/// The saved form of [`Msix`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    enabled: bool,
    masked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    const RESET: Self = Self { address: 0, data: 0, control: ENTRY_MASKED };
}

impl MsixState {
    fn new(vectors: usize) -> Self {
        Self { entries: vec![Entry::RESET; vectors], pending: vec![false; vectors], enabled: false, masked: false }
    }

    /// The message of `vector` if it may go out now.
    fn message(&self, vector: usize) -> Option<(u64, u32)> {
        let entry = self.entries.get(vector)?;
        let open = self.enabled && !self.masked && entry.control & ENTRY_MASKED == 0;
        open.then_some((entry.address, entry.data))
    }

    /// The message of `vector` if it may go out now; else it becomes pending.
    fn fire(&mut self, vector: usize) -> Option<(u64, u32)> {
        let message = self.message(vector);
        let pending = self.pending.get_mut(vector).filter(|_| self.enabled)?;
        *pending = message.is_none();
        message
    }
}

impl Msix {
    /// `vectors` (1 to [`MAX_VECTORS`]) messages to `target` while `gate` is open.
    pub fn new(vectors: u16, target: MsiTarget, gate: DmaGate) -> Arc<Self> {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        Arc::new(Self { state: Mutex::new(Live::new(vectors.into())), target, gate })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        lock(&self.state).ways.len() as u16
    }

    /// Length of the BAR: the table at 0, the pending bits in its second half.
    pub fn bar_len(&self) -> u64 {
        (u64::from(self.vectors()) * ENTRY_LEN * 2).next_power_of_two().max(4096)
    }

    /// Offset of the pending bits in the BAR.
    pub fn pending_offset(&self) -> u64 {
        self.bar_len() / 2
    }

    /// The BAR's region, bound.
    pub fn region(self: &Arc<Self>, name: impl Into<String>) -> MemoryRegion {
        let rules = AccessRules::sizes(AccessSize::B4, AccessSize::B8);
        let region = MemoryRegion::mmio(name, self.bar_len(), rules);
        if let Some(binding) = region.binding() {
            binding.bind_mmio(self.clone(), 0);
        }
        region
    }

    /// True if the driver chose MSI-X over INTx.
    pub fn is_enabled(&self) -> bool {
        lock(&self.state).registers.enabled
    }

    /// Sends the message of `vector`, now or when it is unmasked.
    pub fn notify(&self, vector: u16) {
        let fire = lock(&self.state).fire(vector.into());
        self.send(fire);
    }

    /// The driver wrote the capability's message control.
    pub fn set_control(&self, control: u16) {
        let mut s = lock(&self.state);
        s.registers.enabled = control & CONTROL_ENABLE != 0;
        s.registers.masked = control & CONTROL_MASK_ALL != 0;
        match s.registers.enabled {
            true => s.connect_all(&self.target),
            false => s.disconnect_all(),
        }
        let fire = s.unblocked();
        drop(s);
        self.send(fire);
    }

    /// The machine runs.
    pub fn start(&self) {
        let mut s = lock(&self.state);
        s.running = true;
        s.connect_all(&self.target);
    }

    /// The machine stops: what was sent is with the controller on return, and what is sent until it runs again
    /// goes there at once.
    pub fn stop(&self) {
        let mut s = lock(&self.state);
        s.running = false;
        s.disconnect_all();
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let mut s = lock(&self.state);
        s.disconnect_all();
        s.registers = MsixState::new(s.ways.len());
    }

    /// For a snapshot.
    pub fn save(&self) -> MsixState {
        lock(&self.state).registers.clone()
    }

    /// Takes over a saved state of a function whose message control is `control`; an error says why it does not
    /// fit.
    pub fn restore(&self, saved: MsixState, control: u16) -> Result<(), &'static str> {
        let mut s = lock(&self.state);
        if saved.entries.len() != s.ways.len() || saved.pending.len() != s.ways.len() {
            return Err("another number of MSI-X vectors");
        }
        if saved.entries.iter().any(|e| e.address & 3 != 0 || e.control & !ENTRY_MASKED != 0) {
            return Err("reserved bits in the MSI-X table");
        }
        if (saved.enabled, saved.masked) != (control & CONTROL_ENABLE != 0, control & CONTROL_MASK_ALL != 0) {
            return Err("MSI-X state and message control differ");
        }
        s.disconnect_all();
        s.registers = saved;
        s.connect_all(&self.target);
        Ok(())
    }

    /// Sends with no lock held.
    fn send(&self, fire: impl IntoIterator<Item = Fire>) {
        for fire in fire.into_iter().filter(|_| self.gate.is_open()) {
            match fire {
                Fire::Signal(route) => route.signal(),
                Fire::Send(address, data) => self.target.send(address, data),
            }
        }
    }

    fn read_dword(&self, offset: u64) -> u32 {
        let s = &lock(&self.state).registers;
        if offset >= s.bar_half() {
            let first = ((offset - s.bar_half()) / 4 * 32) as usize;
            let bits = s.pending.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |word, (i, &p)| word | u32::from(p) << i);
        }
        let Some(entry) = s.entries.get((offset / ENTRY_LEN) as usize) else { return 0 };
        match offset % ENTRY_LEN {
            0 => entry.address as u32,
            4 => (entry.address >> 32) as u32,
            8 => entry.data,
            _ => entry.control,
        }
    }

    fn write_dword(&self, offset: u64, value: u32) {
        let mut s = lock(&self.state);
        if offset >= s.registers.bar_half() {
            return;
        }
        let vector = (offset / ENTRY_LEN) as usize;
        let Some(entry) = s.registers.entries.get_mut(vector) else { return };
        match offset % ENTRY_LEN {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.data = value,
            _ => entry.control = value & ENTRY_MASKED,
        }
        s.connect(vector, &self.target);
        let fire = if s.registers.pending[vector] { s.fire(vector) } else { None };
        drop(s);
        self.send(fire);
    }
}

impl MsixState {
    fn bar_half(&self) -> u64 {
        (self.entries.len() as u64 * ENTRY_LEN * 2).next_power_of_two().max(4096) / 2
    }
}

impl MmioDevice for Msix {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        let low = u64::from(self.read_dword(a.offset));
        Ok(match a.size {
            AccessSize::B8 => low | u64::from(self.read_dword(a.offset + 4)) << 32,
            _ => low,
        })
    }

    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.write_dword(a.offset, value as u32);
        if a.size == AccessSize::B8 {
            self.write_dword(a.offset + 4, (value >> 32) as u32);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
