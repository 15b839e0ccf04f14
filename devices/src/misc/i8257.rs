//! The PC's pair of DMA controllers, with their page registers.
//!
//! Spec: Intel 8237A data sheet, 231466-005; page registers as in the Intel ICH9 data sheet, 316972-004, section 13.2.
//! Modelled: eight channels, of which 0 to 3 move bytes and 5 to 7 words; current and base registers, masks, modes,
//! status, software requests; transfers in all modes, with auto-initialisation.
//! Not modelled: memory-to-memory transfers, timing, the cascade of channel 4 by itself: requests of devices are
//! calls of [`I8257::transfer`]. Addresses wrap within 64 KiB (128 KiB for words), as the page is fixed.
//! Checked with: its tests.

use std::sync::{Arc, Mutex};

use mimus_core::bus::{BusFault, GuestPhys, PioAccess};
use mimus_core::device::{MutLifecycle, MutPioDevice, ResetPhase};
use mimus_core::memory::DmaHandle;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Region number of channels 0 to 3's 16 ports (0x00).
pub const REGION_BYTES: u32 = 0;
/// Region number of channels 4 to 7's 32 ports (0xc0), of which every second is a register.
pub const REGION_WORDS: u32 = 1;
/// Region number of the page registers' 15 ports (0x81); port 0x80 is for POST codes.
pub const REGION_PAGES: u32 = 2;
/// Number of ports of each region.
pub const PORTS: [u64; 3] = [16, 32, 15];
/// Access rules of its ports.
pub use crate::ports::BYTE_PORTS as RULES;

const COMMAND: u16 = 8;
const REQUEST: u16 = 9;
const MASK: u16 = 10;
const MODE: u16 = 11;
const CLEAR_FLIP_FLOP: u16 = 12;
const MASTER_CLEAR: u16 = 13;
const CLEAR_MASK: u16 = 14;
const ALL_MASK: u16 = 15;

/// Command: the controller is disabled.
const DISABLED: u8 = 4;
const MODE_TYPE: u8 = 0x0c;
const MODE_WRITE: u8 = 0x04;
const MODE_READ: u8 = 0x08;
const MODE_AUTO: u8 = 0x10;
const MODE_DOWN: u8 = 0x20;
/// Which page register, as an offset from port 0x81, a channel has.
const PAGE_OF: [Option<usize>; 8] = [Some(6), Some(2), Some(0), Some(1), None, Some(10), Some(8), Some(9)];

/// One channel, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    base_address: u16,
    base_count: u16,
    address: u16,
    count: u16,
    mode: u8,
}

/// One controller, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerState {
    channels: [ChannelState; 4],
    command: u8,
    /// Terminal counts reached, bits 0 to 3; requests, 4 to 7.
    status: u8,
    mask: u8,
    /// The next access of a 16-bit register is of its upper byte.
    flip_flop: bool,
}

/// Both controllers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    controllers: [ControllerState; 2],
    pages: [u8; 15],
}

/// How a transfer ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transferred {
    /// Bytes moved: fewer than wanted if the channel is masked, or came to its end.
    pub bytes: usize,
    /// The terminal count was reached: the TC signal.
    pub terminal_count: bool,
}

/// What a device does with a channel.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// Memory is read, for the device to take.
    FromMemory(&'a mut [u8]),
    /// Memory is written with what the device gives.
    ToMemory(&'a [u8]),
}

/// The pair.
pub struct I8257 {
    s: State,
    dma: DmaHandle,
}

impl ControllerState {
    fn reset() -> Self {
        Self { mask: 0xf, ..Self::default() }
    }

    /// The byte pointer: whether this access is of the upper byte; the next is of the other.
    fn flip(&mut self) -> bool {
        self.flip_flop ^= true;
        !self.flip_flop
    }

    fn read(&mut self, register: u16) -> u8 {
        match register {
            0..COMMAND => {
                let high = self.flip();
                let channel = &self.channels[usize::from(register / 2)];
                let value = if register & 1 == 0 { channel.address } else { channel.count };
                if high { (value >> 8) as u8 } else { value as u8 }
            }
            // "Bits 0-3 are cleared by each status read."
            COMMAND => {
                let status = self.status;
                self.status &= 0xf0;
                status
            }
            ALL_MASK => self.mask | 0xf0,
            _ => 0,
        }
    }

    fn write(&mut self, register: u16, value: u8) {
        let channel = usize::from(value & 3);
        match register {
            0..COMMAND => self.write_channel(register, value),
            COMMAND => self.command = value,
            REQUEST => set_bit(&mut self.status, 4 + channel, value & 4 != 0),
            MASK => set_bit(&mut self.mask, channel, value & 4 != 0),
            MODE => self.channels[channel].mode = value & !3,
            CLEAR_FLIP_FLOP => self.flip_flop = false,
            MASTER_CLEAR => {
                (self.command, self.status, self.mask, self.flip_flop) = (0, 0, 0xf, false);
            }
            CLEAR_MASK => self.mask = 0,
            _ => self.mask = value & 0xf,
        }
    }

    /// "Base and current registers are written simultaneously."
    fn write_channel(&mut self, register: u16, value: u8) {
        let high = self.flip();
        let channel = &mut self.channels[usize::from(register / 2)];
        let (base, current) = match register & 1 {
            0 => (&mut channel.base_address, &mut channel.address),
            _ => (&mut channel.base_count, &mut channel.count),
        };
        let old = *base;
        *base = if high { old & 0xff | u16::from(value) << 8 } else { old & 0xff00 | u16::from(value) };
        *current = *base;
    }
}

fn set_bit(byte: &mut u8, bit: usize, on: bool) {
    *byte = *byte & !(1 << bit) | u8::from(on) << bit;
}

impl I8257 {
    /// A pair that reaches memory through `dma`.
    pub fn new(dma: DmaHandle) -> Arc<Mutex<I8257>> {
        Arc::new(Mutex::new(I8257 { s: reset_state(), dma }))
    }

    /// What a device on channel `channel` (0 to 7) requests with DREQ: moves bytes until the data, or the channel's
    /// count, is at its end. Nothing if the channel is masked, is set up for the other direction, or has no device.
    pub fn transfer(&mut self, channel: usize, mut data: Transfer<'_>) -> Transferred {
        let Some(Some(page)) = PAGE_OF.get(channel).map(|at| at.map(|at| self.s.pages[at])) else {
            return Transferred::default();
        };
        let (controller, n) = (&mut self.s.controllers[channel / 4], channel % 4);
        let usable = controller.command & DISABLED == 0 && controller.mask >> n & 1 == 0;
        let direction = match data {
            Transfer::FromMemory(_) => MODE_READ,
            Transfer::ToMemory(_) => MODE_WRITE,
        };
        let c = &mut controller.channels[n];
        // Type 0 verifies: addresses and counts run, nothing is moved.
        if !usable || !(c.mode & MODE_TYPE == direction || c.mode & MODE_TYPE == 0) {
            return Transferred::default();
        }
        let unit = if channel < 4 { 1 } else { 2 };
        let mut done = Transferred::default();
        while !done.terminal_count && done.bytes + unit <= data.len() {
            let at = place(page, c.address, unit);
            if c.mode & MODE_TYPE != 0 {
                data.unit(&self.dma, at, done.bytes, unit);
            }
            c.address = if c.mode & MODE_DOWN != 0 { c.address.wrapping_sub(1) } else { c.address.wrapping_add(1) };
            done.terminal_count = c.count == 0;
            c.count = c.count.wrapping_sub(1);
            done.bytes += unit;
        }
        if done.terminal_count {
            controller.status |= 1 << n;
            controller.status &= !(0x10 << n);
            // "Autoinitialize restores the base registers; otherwise TC sets the mask bit."
            if c.mode & MODE_AUTO != 0 {
                (c.address, c.count) = (c.base_address, c.base_count);
            } else {
                controller.mask |= 1 << n;
            }
        }
        done
    }
}

/// Where a channel's address register points: words have the page's lowest bit in theirs.
fn place(page: u8, address: u16, unit: usize) -> GuestPhys {
    let page = u64::from(page);
    GuestPhys(match unit {
        1 => page << 16 | u64::from(address),
        _ => (page & 0xfe) << 16 | u64::from(address) << 1,
    })
}

impl Transfer<'_> {
    fn len(&self) -> usize {
        match self {
            Self::FromMemory(to) => to.len(),
            Self::ToMemory(from) => from.len(),
        }
    }

    /// Moves `unit` bytes. Where there is no memory, nothing answers: all ones, and lost writes.
    fn unit(&mut self, dma: &DmaHandle, at: GuestPhys, offset: usize, unit: usize) {
        match self {
            Self::FromMemory(to) => {
                let to = &mut to[offset..offset + unit];
                if dma.read(at, to).is_err() {
                    to.fill(0xff);
                }
            }
            Self::ToMemory(from) => {
                if let Err(fault) = dma.write(at, &from[offset..offset + unit]) {
                    log::debug!(target: "guest_errors", "8237: write to {at}: {fault}");
                }
            }
        }
    }
}

fn reset_state() -> State {
    State { controllers: [ControllerState::reset(), ControllerState::reset()], pages: [0; 15] }
}

impl MutPioDevice for I8257 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        Ok(match a.region {
            REGION_BYTES => self.s.controllers[0].read(a.offset),
            REGION_WORDS => self.s.controllers[1].read(a.offset / 2),
            _ => self.s.pages.get(usize::from(a.offset)).copied().unwrap_or(0xff),
        }
        .into())
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        let value = value as u8;
        match a.region {
            REGION_BYTES => self.s.controllers[0].write(a.offset, value),
            REGION_WORDS => self.s.controllers[1].write(a.offset / 2, value),
            _ => {
                if let Some(page) = self.s.pages.get_mut(usize::from(a.offset)) {
                    *page = value;
                }
            }
        }
        Ok(())
    }
}

impl MutLifecycle for I8257 {
    fn reset(&mut self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            self.s = reset_state();
        }
    }
}

impl SaveRestore for I8257 {
    const SCHEMA: Schema = Schema::new("i8257", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        for c in &state.controllers {
            if c.mask & 0xf0 != 0 || c.channels.iter().any(|c| c.mode & 3 != 0) {
                return Err(SnapshotError::invalid(Self::SCHEMA, "mask, mode", format!("{:#04x}", c.mask)));
            }
        }
        self.s = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Ram, Rng, assert_round_trip, inb, outb, restore_with};

    fn pc() -> (Ram, Arc<Mutex<I8257>>) {
        let ram = Ram::new(0x4_0000);
        let dma = I8257::new(ram.dma());
        (ram, dma)
    }

    /// Programs byte channel 2, unmasked.
    fn program(dma: &Mutex<I8257>, mode: u8, page: u8, address: u16, count: u16) {
        outb(dma, REGION_BYTES, CLEAR_FLIP_FLOP, 0);
        for (register, value) in [(4, address), (5, count)] {
            outb(dma, REGION_BYTES, register, value as u8);
            outb(dma, REGION_BYTES, register, (value >> 8) as u8);
        }
        outb(dma, REGION_PAGES, 0, page);
        outb(dma, REGION_BYTES, MODE, mode | 2);
        outb(dma, REGION_BYTES, MASK, 2);
    }

    fn give(dma: &Mutex<I8257>, channel: usize, data: &[u8]) -> (usize, bool) {
        let t = dma.lock().unwrap().transfer(channel, Transfer::ToMemory(data));
        (t.bytes, t.terminal_count)
    }

    fn current(dma: &Mutex<I8257>, register: u16) -> u16 {
        let byte = || inb(dma, REGION_BYTES, register);
        u16::from_le_bytes([byte(), byte()])
    }

    #[test]
    fn to_memory() {
        let (ram, dma) = pc();
        program(&dma, 0x44, 1, 0xfffe, 3);
        assert_eq!(give(&dma, 2, b"ab"), (2, false));
        assert_eq!((current(&dma, 4), current(&dma, 5)), (0, 1), "the page is fixed");
        assert_eq!(give(&dma, 2, b"cdef"), (2, true));
        assert_eq!((ram.get(0x1_fffe, 2), ram.get(0x1_0000, 4)), (b"ab".to_vec(), b"cd\0\0".to_vec()));
        assert_eq!(inb(&*dma, REGION_BYTES, COMMAND), 4);
        assert_eq!(inb(&*dma, REGION_BYTES, COMMAND), 0);
        assert_eq!(inb(&*dma, REGION_BYTES, ALL_MASK), 0xff, "masked at the end");
        assert_eq!(give(&dma, 2, b"x"), (0, false));
    }

    #[test]
    fn from_memory_again_and_downwards() {
        let (ram, dma) = pc();
        ram.put(0x2000, b"0123456789");
        program(&dma, 0x58, 0, 0x2000, 3);
        let mut out = [0; 4];
        for _ in 0..2 {
            let t = dma.lock().unwrap().transfer(2, Transfer::FromMemory(&mut out));
            assert_eq!((t.bytes, t.terminal_count, &out), (4, true, b"0123"));
        }
        program(&dma, 0x68, 0, 0x2005, 9);
        let t = dma.lock().unwrap().transfer(2, Transfer::FromMemory(&mut out));
        assert_eq!((t.bytes, t.terminal_count, &out), (4, false, b"5432"));
        assert_eq!(give(&dma, 2, b"x"), (0, false), "the other direction");
        program(&dma, 0x58, 0xf0, 0, 3);
        dma.lock().unwrap().transfer(2, Transfer::FromMemory(&mut out));
        assert_eq!(out, [0xff; 4], "no memory there");
        outb(&*dma, REGION_BYTES, COMMAND, DISABLED);
        assert_eq!(dma.lock().unwrap().transfer(2, Transfer::FromMemory(&mut out)), Transferred::default());
    }

    #[test]
    fn words() {
        let (ram, dma) = pc();
        for (port, value) in [(24, 0), (4, 0), (4, 0x80), (6, 1), (6, 0), (22, 0x45), (20, 1)] {
            outb(&*dma, REGION_WORDS, port, value);
        }
        outb(&*dma, REGION_PAGES, 10, 3);
        assert_eq!(give(&dma, 5, b"abcdef"), (4, true));
        assert_eq!(ram.get(0x3_0000, 5), b"abcd\0", "the page's lowest bit is the address's");
        assert_eq!(give(&dma, 4, b"ab"), (0, false));
        assert_eq!(give(&dma, 8, b"ab"), (0, false));
    }

    #[test]
    fn clears() {
        let (_, dma) = pc();
        outb(&*dma, REGION_BYTES, CLEAR_MASK, 0);
        assert_eq!(inb(&*dma, REGION_BYTES, ALL_MASK), 0xf0);
        outb(&*dma, REGION_BYTES, ALL_MASK, 5);
        outb(&*dma, REGION_BYTES, REQUEST, 5);
        assert_eq!((inb(&*dma, REGION_BYTES, ALL_MASK), inb(&*dma, REGION_BYTES, COMMAND)), (0xf5, 0x20));
        outb(&*dma, REGION_BYTES, MASTER_CLEAR, 0);
        assert_eq!((inb(&*dma, REGION_BYTES, ALL_MASK), inb(&*dma, REGION_BYTES, COMMAND)), (0xff, 0));
    }

    #[test]
    fn random_accesses_and_round_trip() {
        let (_, dma) = pc();
        let mut rng = Rng(5);
        for _ in 0..20_000 {
            let region = rng.below(3) as u32;
            let port = rng.below(PORTS[region as usize]) as u16;
            outb(&*dma, region, port, rng.next() as u8);
            inb(&*dma, region, port);
            give(&dma, rng.below(8) as usize, b"data");
        }
        let (_, other) = pc();
        assert_round_trip(&dma, &other);
        assert!(restore_with(&other, "/controllers/0/mask", 0x10).is_err());
        assert!(restore_with(&other, "/controllers/1/channels/0/mode", 1).is_err());
    }
}
