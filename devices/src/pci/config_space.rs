//! Configuration space of a function with a type 0 header: identification, command bits,
//! BARs, capabilities (PCI §6).
//!
//! A driver's writes to the command register and the BARs take effect here: BARs are
//! mapped and unmapped, DMA is gated, the interrupt pin is masked. Map changes are queued
//! and applied by whoever dispatched the access.

use super::bus::PciSlot;
use super::intx::IntxPin;
use super::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, Msix, MsixState};
use mimus_core::bus::AccessSize;
use mimus_core::memory::{DmaGate, MemoryRegion, RegionHandle};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Bytes of registers; the extended space of PCIe reads as zero beyond.
const LEN: usize = 256;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_CODE: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

/// Command register bits (PCI §6.2.2).
pub mod command {
    /// Port BARs respond.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs respond.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may master the bus.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function may not assert INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Bits a driver may change; parity and SERR# have no effect.
const COMMAND_WRITABLE: u16 =
    command::IO | command::MEMORY | command::BUS_MASTER | 1 << 6 | 1 << 8 | command::INTX_DISABLE;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Error bits, cleared by writing ones.
const STATUS_ERRORS: u16 = 0xf900;

/// Capability number of MSI-X.
const CAP_MSIX: u8 = 0x11;

/// Who a function is.
#[derive(Clone, Copy, Debug, Default)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class, programming interface: 24 bits.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BARs.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    fn flags(self) -> u32 {
        match self {
            Self::Io => 1,
            Self::Memory32 => 0,
            Self::Memory64 { prefetchable } => 4 | if prefetchable { 8 } else { 0 },
        }
    }
}

struct Bar {
    index: usize,
    kind: BarKind,
    len: u64,
    region: RegionHandle,
    mapped: Option<u64>,
}

/// The configuration space of one function.
pub struct ConfigSpace {
    data: [u8; LEN],
    /// Bits a driver may write.
    writable: [u8; LEN],
    /// Bits a driver clears by writing ones.
    clear: [u8; LEN],
    reset: [u8; LEN],
    bars: Vec<Bar>,
    next_capability: usize,
    last_capability: usize,
    msix: Option<(usize, Arc<Msix>)>,
    gate: DmaGate,
    intx: Arc<IntxPin>,
}

/// The saved form of [`ConfigSpace`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigState {
    registers: Vec<u8>,
    intx_asserted: bool,
    msix: Option<MsixState>,
}

impl ConfigSpace {
    /// Bytes that each base address register decodes; 0: there is none.
    pub fn bar_lens(&self) -> [u64; 6] {
        let mut out = [0; 6];
        self.bars.iter().for_each(|bar| out[bar.index] = bar.len);
        out
    }

    /// A function without BARs in `slot`, with pin INTA if `intx`.
    pub fn new(ids: PciIds, slot: &PciSlot, intx: bool) -> Self {
        let mut c = Self {
            data: [0; LEN],
            writable: [0; LEN],
            clear: [0; LEN],
            reset: [0; LEN],
            bars: Vec::new(),
            next_capability: HEADER_END,
            last_capability: 0,
            msix: None,
            gate: slot.dma_gate().clone(),
            intx: slot.intx_pin().clone(),
        };
        c.put(VENDOR_ID, &ids.vendor.to_le_bytes());
        c.put(DEVICE_ID, &ids.device.to_le_bytes());
        c.put(REVISION_ID, &[ids.revision]);
        c.put(CLASS_CODE, &ids.class.to_le_bytes()[..3]);
        c.put(SUBSYSTEM_VENDOR_ID, &ids.subsystem_vendor.to_le_bytes());
        c.put(SUBSYSTEM_ID, &ids.subsystem.to_le_bytes());
        c.put(INTERRUPT_PIN, &[u8::from(intx)]);
        c.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        c.clear[STATUS..STATUS + 2].copy_from_slice(&STATUS_ERRORS.to_le_bytes());
        c.writable[CACHE_LINE_SIZE] = 0xff;
        c.writable[INTERRUPT_LINE] = 0xff;
        c
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
        self.reset[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds BAR `index` for `region`, whose length is a power of two.
    ///
    /// # Panics
    /// If the length is not one, is too small, or the BAR is taken: the author's mistake.
    pub fn add_bar(&mut self, slot: &PciSlot, index: usize, kind: BarKind, region: &MemoryRegion) {
        let len = region.len();
        let wide = matches!(kind, BarKind::Memory64 { .. });
        assert!(len.is_power_of_two() && len >= 16 && index + usize::from(wide) < 6);
        assert!(wide || len <= 1 << 31);
        let at = BAR0 + index * 4;
        let mask = !(len - 1);
        assert!(self.writable[at..at + 4] == [0; 4], "BAR {index} exists");
        self.put(at, &kind.flags().to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(mask as u32).to_le_bytes());
        if wide {
            self.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
        }
        let region = slot.bar_region(kind, region);
        self.bars.push(Bar { index, kind, len, region, mapped: None });
    }

    /// Adds a capability: `body` is what follows number and link, `writable` the bits of
    /// it a driver may change. Returns its offset.
    ///
    /// # Panics
    /// If there is no room: the author's mistake.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        assert!(at + 2 + body.len() <= LEN && writable.len() <= body.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        let link = match self.last_capability {
            0 => CAPABILITIES,
            last => last + 1,
        };
        self.put(link, &[at as u8]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_capability = at;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Gives registers of the function's own, past the header, their reset values and the bits a driver may change.
    ///
    /// # Panics
    /// If they are in the header or beyond the end: the author's mistake.
    pub fn add_register(&mut self, at: usize, reset: &[u8], writable: &[u8]) {
        assert!(at >= HEADER_END && at + reset.len().max(writable.len()) <= LEN);
        self.put(at, reset);
        self.writable[at..at + writable.len()].copy_from_slice(writable);
    }

    /// Changes writable bits of a register from inside: what locks and self-clearing bits do.
    pub fn set_register(&mut self, at: usize, value: u8) {
        if let (Some(byte), Some(w)) = (self.data.get_mut(at), self.writable.get(at)) {
            *byte = *byte & !w | value & w;
        }
    }

    /// Adds MSI-X with table and pending bits in BAR `bar`, a 32-bit memory BAR.
    pub fn add_msix(&mut self, slot: &PciSlot, bar: usize, msix: &Arc<Msix>, region: &MemoryRegion) {
        self.add_bar(slot, bar, BarKind::Memory32, region);
        let bir = bar as u32;
        let mut body = (msix.vectors() - 1).to_le_bytes().to_vec();
        body.extend(bir.to_le_bytes());
        body.extend((msix.pending_offset() as u32 | bir).to_le_bytes());
        let at = self.add_capability(CAP_MSIX, &body, &(CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes());
        self.msix = Some((at + 2, msix.clone()));
    }

    /// Reads `size` bytes at `offset`.
    pub fn read(&self, offset: u16, size: AccessSize) -> u32 {
        let byte = |i: u64| {
            let at = usize::from(offset) + i as usize;
            let live = if at == STATUS && self.intx.is_asserted() { STATUS_INTERRUPT } else { 0 };
            u32::from(self.data.get(at).copied().unwrap_or(0) | live)
        };
        (0..size.bytes().min(4)).fold(0, |v, i| v | byte(i) << (i * 8))
    }

    /// Writes `size` bytes at `offset`, with all effects.
    pub fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        let start = usize::from(offset);
        let count = size.bytes().min(4) as usize;
        for (at, byte) in (start..LEN).zip(value.to_le_bytes()).take(count) {
            let (w, c) = (self.writable[at], self.clear[at]);
            self.data[at] = (self.data[at] & !w | byte & w) & !(byte & c);
        }
        let touches = |from: usize, to: usize| start < to && from < start + count;
        if touches(COMMAND, COMMAND + 2) || touches(BAR0, BAR0 + 24) {
            self.apply_command();
        }
        if let Some((at, msix)) = &self.msix
            && touches(*at, *at + 2)
        {
            msix.set_control(self.word(*at));
        }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.data[at], self.data[at + 1]])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    /// The bytes of a capability or other register as they are, for the function itself.
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        self.data.get(at..at + len).unwrap_or(&[])
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// The interrupt pin.
    pub fn intx(&self) -> &Arc<IntxPin> {
        &self.intx
    }

    /// Where a BAR is mapped now.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        self.bars.iter().find(|b| b.index == index)?.mapped
    }

    /// Has command register and BARs take effect.
    fn apply_command(&mut self) {
        self.gate.set(self.command() & command::BUS_MASTER != 0);
        self.intx.set_disabled(self.command() & command::INTX_DISABLE != 0);
        self.map_bars();
    }

    fn map_bars(&mut self) {
        for i in 0..self.bars.len() {
            let wanted = self.wanted_address(&self.bars[i]);
            let bar = &mut self.bars[i];
            if wanted == bar.mapped {
                continue;
            }
            bar.mapped = wanted;
            match wanted {
                Some(addr) => bar.region.map(addr),
                None => bar.region.unmap(),
            }
        }
    }

    /// Where a BAR should be: nowhere while its command bit is off, at address 0, or
    /// during sizing, when it would reach the end of its space.
    fn wanted_address(&self, bar: &Bar) -> Option<u64> {
        let at = BAR0 + bar.index * 4;
        let (enable, limit, high) = match bar.kind {
            BarKind::Io => (command::IO, 0x1_0000, 0),
            BarKind::Memory32 => (command::MEMORY, 0xffff_ffff, 0),
            BarKind::Memory64 { .. } => (command::MEMORY, u64::MAX, self.dword(at + 4)),
        };
        let addr = (u64::from(high) << 32 | u64::from(self.dword(at))) & !(bar.len - 1);
        let end = addr.checked_add(bar.len)?;
        (self.command() & enable != 0 && addr != 0 && end <= limit).then_some(addr)
    }

    /// Back to power-on: BARs unmapped, DMA and interrupts off.
    pub fn reset(&mut self) {
        self.data = self.reset;
        self.apply_command();
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
    }

    /// What a snapshot keeps.
    pub fn save(&self) -> ConfigState {
        ConfigState {
            registers: self.data.to_vec(),
            intx_asserted: self.intx.is_asserted(),
            msix: self.msix.as_ref().map(|(_, m)| m.save()),
        }
    }

    /// Takes over a saved state; an error says why it does not fit. Map changes are
    /// queued.
    pub fn restore(&mut self, s: ConfigState) -> Result<(), &'static str> {
        let registers: [u8; LEN] = s.registers.try_into().map_err(|_| "not 256 bytes of registers")?;
        let same = |i: usize| {
            let fixed = !(self.writable[i] | self.clear[i]);
            (registers[i] ^ self.reset[i]) & fixed == 0
        };
        if !(0..LEN).all(same) {
            return Err("the function has other capabilities or BARs: same options as when saved?");
        }
        if s.msix.is_some() != self.msix.is_some() {
            return Err("with and without MSI-X");
        }
        if let Some(((at, msix), saved)) = self.msix.as_ref().zip(s.msix) {
            msix.restore(saved, u16::from_le_bytes([registers[*at], registers[at + 1]]))?;
        }
        self.data = registers;
        let command = self.command();
        self.intx.restore(s.intx_asserted, command & command::INTX_DISABLE != 0);
        self.gate.set(command & command::BUS_MASTER != 0);
        self.map_bars();
        Ok(())
    }
}

#[cfg(test)]
#[path = "config_space_tests.rs"]
mod tests;
