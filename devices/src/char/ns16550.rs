//! 16550A UART.
//!
//! Spec: National Semiconductor PC16550D, 1995. Section numbers below are its.
//! Modelled: FIFOs, all interrupts, loopback with modem lines, divisor latch (kept, without effect on speed), break.
//! Not modelled: transmission time: a byte is sent when written. Modem lines are as if connected.
//! Checked with: Linux 8250/of_serial, OpenSBI, U-Boot.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use mimus_core::backend::{CharBackend, CharEvent};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess, PioAccess};
use mimus_core::device::{MutLifecycle, MutMmioDevice, MutPioDevice, ResetPhase};
use mimus_core::irq::IrqLine;
use mimus_core::snapshot::{SaveRestore, Schema, SnapshotError};
use serde::{Deserialize, Serialize};

/// Bytes of the register map.
pub const SIZE: u64 = 8;
/// Accesses the region takes: each byte is a register.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B1);
/// Accesses its ports take on a PC.
pub use crate::ports::BYTE_PORTS as PORT_RULES;
/// Where a PC has its four: first port and IRQ.
pub const PC_PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
const FIFO: usize = 16;
/// Received with a break instead of a stop bit.
const RX_BREAK: u16 = 0x100;
/// Bytes kept while the host side takes none, before the transmitter looks busy.
const TX_BACKLOG: usize = 64;

const IER_RX: u8 = 1;
const IER_THRE: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const IIR_NONE: u8 = 1;
const IIR_THRE: u8 = 2;
const IIR_RX: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 12;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;
const FCR_CLEAR_TX: u8 = 4;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_BREAK: u8 = 0x10;
const LSR_THRE: u8 = 0x20;
const LSR_TEMT: u8 = 0x40;
const LSR_FIFO_ERROR: u8 = 0x80;
const MSR_CTS_DSR_DCD: u8 = 0xb0;
const MSR_RI: u8 = 0x40;
const MSR_DELTA: u8 = 0x0f;

/// The registers, as saved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    divisor: u16,
    /// The overrun bit of LSR.
    overrun: bool,
    /// The transmitter-empty interrupt is to be reported.
    thre_pending: bool,
    /// Received bytes; 0x100 marks a break that LSR has not shown.
    rx: VecDeque<u16>,
    tx: VecDeque<u8>,
}

/// A 16550A with registers one byte apart.
pub struct Ns16550 {
    s: State,
    irq: IrqLine,
    host: Option<Arc<dyn CharBackend>>,
}

impl Ns16550 {
    /// A UART that raises `irq`, connected to `host` if given.
    pub fn new(irq: IrqLine, host: Option<Arc<dyn CharBackend>>) -> Arc<Mutex<Ns16550>> {
        let uart = Arc::new(Mutex::new(Ns16550 { s: reset_state(), irq, host: host.clone() }));
        if let Some(host) = host {
            let (rx, tx, events) = (Arc::downgrade(&uart), Arc::downgrade(&uart), Arc::downgrade(&uart));
            host.set_receiver(Box::new(move |data| rx.upgrade().map_or(data.len(), |u| locked(&u).receive(data))));
            host.set_writable_listener(Box::new(move || {
                if let Some(u) = tx.upgrade() {
                    locked(&u).drain();
                }
            }));
            host.set_event_listener(Box::new(move |event| {
                if let (Some(u), CharEvent::Break) = (events.upgrade(), event) {
                    locked(&u).receive_break();
                }
            }));
        }
        uart
    }

    fn fifo_enabled(&self) -> bool {
        self.s.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    /// Takes what fits.
    fn receive(&mut self, data: &[u8]) -> usize {
        if self.s.mcr & MCR_LOOP != 0 {
            return 0;
        }
        let room = self.capacity().saturating_sub(self.s.rx.len());
        let taken = room.min(data.len());
        self.s.rx.extend(data[..taken].iter().map(|&b| u16::from(b)));
        self.update();
        taken
    }

    fn receive_break(&mut self) {
        if self.s.mcr & MCR_LOOP == 0 {
            self.push_received(RX_BREAK);
            self.update();
        }
    }

    fn push_received(&mut self, byte: u16) {
        if self.s.rx.len() < self.capacity() {
            self.s.rx.push_back(byte);
        } else {
            self.s.overrun = true;
        }
    }

    fn transmit(&mut self, byte: u8) {
        // The register is full for a moment, which edge-triggered inputs must see.
        self.s.thre_pending = false;
        self.update();
        if self.s.mcr & MCR_LOOP != 0 {
            self.push_received(byte.into());
            self.s.thre_pending = self.s.tx.is_empty();
            self.update();
        } else if self.s.tx.len() < TX_BACKLOG {
            self.s.tx.push_back(byte);
            self.drain();
        }
    }

    /// Gives the host what it takes.
    fn drain(&mut self) {
        if self.s.tx.is_empty() {
            return;
        }
        if let Some(host) = &self.host {
            let sent = host.write(self.s.tx.make_contiguous());
            self.s.tx.drain(..sent.min(self.s.tx.len()));
        } else {
            self.s.tx.clear();
        }
        if self.s.tx.is_empty() {
            self.s.thre_pending = true;
        }
        self.update();
    }

    fn line_status(&self) -> u8 {
        let mut lsr = if self.s.overrun { LSR_OVERRUN } else { 0 };
        if !self.s.rx.is_empty() {
            lsr |= LSR_DATA;
        }
        if self.at_break() {
            lsr |= LSR_BREAK;
        }
        if self.s.tx.is_empty() {
            lsr |= LSR_THRE | LSR_TEMT;
        }
        if self.fifo_enabled() && self.s.rx.iter().any(|b| b & RX_BREAK != 0) {
            lsr |= LSR_FIFO_ERROR;
        }
        lsr
    }

    /// The next byte is a break (section 8.4: reported when it is at the top of the FIFO).
    fn at_break(&self) -> bool {
        self.s.rx.front().is_some_and(|b| b & RX_BREAK != 0)
    }

    /// Highest-priority pending interrupt (section 8.6).
    fn interrupt(&self) -> u8 {
        let trigger = match (self.fifo_enabled(), self.s.fcr >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            _ => 14,
        };
        let ier = self.s.ier;
        if ier & IER_LINE != 0 && (self.s.overrun || self.at_break()) {
            IIR_LINE
        } else if ier & IER_RX != 0 && self.s.rx.len() >= trigger {
            IIR_RX
        } else if ier & IER_RX != 0 && !self.s.rx.is_empty() {
            // The four character times of the timeout have passed: bytes arrive all at once here.
            IIR_TIMEOUT
        } else if ier & IER_THRE != 0 && self.s.thre_pending {
            IIR_THRE
        } else if ier & IER_MODEM != 0 && self.s.msr & MSR_DELTA != 0 {
            0
        } else {
            IIR_NONE
        }
    }

    fn update(&self) {
        self.irq.set_level(self.interrupt() != IIR_NONE);
    }

    fn read_data(&mut self) -> u8 {
        let was_full = self.s.rx.len() >= self.capacity();
        let byte = self.s.rx.pop_front().unwrap_or(0) as u8;
        self.update();
        if was_full || self.s.rx.is_empty() {
            self.offer_input();
        }
        byte
    }

    /// The modem inputs, in the upper half of MSR.
    fn modem_lines(&self) -> u8 {
        if self.s.mcr & MCR_LOOP == 0 {
            return MSR_CTS_DSR_DCD;
        }
        // Section 8.7: RTS→CTS, DTR→DSR, OUT1→RI, OUT2→DCD.
        let m = self.s.mcr;
        (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
    }

    fn set_modem_control(&mut self, value: u8) {
        let before = self.modem_lines();
        self.s.mcr = value & 0x1f;
        let after = self.modem_lines();
        // Section 8.8: CTS, DSR and DCD report any change, RI only its end.
        let ring = before & !after & MSR_RI;
        self.s.msr |= ((before ^ after) & !MSR_RI | ring) >> 4;
        self.update();
        // Input waits while in loopback.
        self.offer_input();
    }

    fn offer_input(&self) {
        if let Some(host) = &self.host {
            host.input_ready();
        }
    }

    fn read(&mut self, register: u64) -> u8 {
        let dlab = self.s.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.s.divisor as u8,
            0 => self.read_data(),
            1 if dlab => (self.s.divisor >> 8) as u8,
            1 => self.s.ier,
            2 => {
                let id = self.interrupt();
                if id == IIR_THRE {
                    self.s.thre_pending = false;
                    self.update();
                }
                id | if self.fifo_enabled() { IIR_FIFO } else { 0 }
            }
            3 => self.s.lcr,
            4 => self.s.mcr,
            5 => {
                let lsr = self.line_status();
                self.s.overrun = false;
                if let Some(byte) = self.s.rx.front_mut() {
                    *byte &= !RX_BREAK;
                }
                self.update();
                lsr
            }
            6 => {
                let msr = self.s.msr | self.modem_lines();
                self.s.msr = 0;
                self.update();
                msr
            }
            7 => self.s.scr,
            _ => 0,
        }
    }

    fn write(&mut self, register: u64, value: u8) {
        let dlab = self.s.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.s.divisor = self.s.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value),
            1 if dlab => self.s.divisor = self.s.divisor & 0xff | u16::from(value) << 8,
            1 => {
                // Enabling the interrupt while the register is empty reports it (section 8.6.1's table).
                if value & !self.s.ier & IER_THRE != 0 && self.s.tx.is_empty() {
                    self.s.thre_pending = true;
                }
                self.s.ier = value & 0xf;
                self.update();
            }
            2 => self.set_fifo_control(value),
            3 => self.s.lcr = value,
            4 => self.set_modem_control(value),
            7 => self.s.scr = value,
            _ => {}
        }
    }

    fn set_fifo_control(&mut self, value: u8) {
        // Section 8.5: without bit 0 the others are not programmed.
        let value = if value & FCR_ENABLE != 0 { value } else { 0 };
        let toggled = (value ^ self.s.fcr) & FCR_ENABLE != 0;
        if toggled || value & FCR_CLEAR_RX != 0 {
            self.s.rx.clear();
        }
        if toggled || value & FCR_CLEAR_TX != 0 {
            // Bytes the host has not taken yet were sent long ago, as far as the line is concerned: they stay.
            self.s.thre_pending = self.s.tx.is_empty();
        }
        self.s.fcr = value & 0xc9;
        self.update();
        self.offer_input();
    }
}

fn locked(uart: &Mutex<Ns16550>) -> std::sync::MutexGuard<'_, Ns16550> {
    uart.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn reset_state() -> State {
    // Table 2; the divisor is undefined there: 9600 baud.
    State { divisor: 0x0c, ..State::default() }
}

impl MutMmioDevice for Ns16550 {
    fn mmio_read(&mut self, a: MmioAccess) -> Result<u64, BusFault> {
        Ok(u64::from(self.read(a.offset)))
    }

    fn mmio_write(&mut self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        self.write(a.offset, value as u8);
        Ok(())
    }
}

impl MutPioDevice for Ns16550 {
    fn pio_read(&mut self, a: PioAccess) -> Result<u64, BusFault> {
        Ok(u64::from(self.read(a.offset.into())))
    }

    fn pio_write(&mut self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        self.write(a.offset.into(), value as u8);
        Ok(())
    }
}

impl MutLifecycle for Ns16550 {
    fn reset(&mut self, phase: ResetPhase) {
        match phase {
            // What the guest has sent is on its way, reset or not.
            ResetPhase::Enter => self.s = State { tx: std::mem::take(&mut self.s.tx), ..reset_state() },
            ResetPhase::Hold => self.update(),
            ResetPhase::Exit => self.offer_input(),
        }
    }

    fn start(&mut self) {
        // Restored bytes, and input that came while the machine stood.
        self.drain();
        self.offer_input();
    }
}

impl SaveRestore for Ns16550 {
    const SCHEMA: Schema = Schema::new("ns16550a", 1);
    type State = State;

    fn save_state(&self) -> State {
        self.s.clone()
    }

    fn restore_state(&mut self, state: State) -> Result<(), SnapshotError> {
        let invalid = |field, reason: String| Err(SnapshotError::invalid(Self::SCHEMA, field, reason));
        if state.rx.len() > FIFO || state.tx.len() > TX_BACKLOG {
            return invalid("rx", format!("{} and {} bytes in the FIFOs", state.rx.len(), state.tx.len()));
        }
        if state.rx.iter().any(|&b| b & 0xff != b && b != RX_BREAK) {
            return invalid("rx", "not bytes".to_owned());
        }
        let stray = [state.ier & !0xf, state.fcr & !0xc9, state.mcr & !0x1f, state.msr & !MSR_DELTA];
        if stray != [0; 4] {
            return invalid("ier", "bits set that registers do not have".to_owned());
        }
        self.s = state;
        self.irq.import_level(self.interrupt() != IIR_NONE);
        Ok(())
    }
}

#[cfg(test)]
#[path = "ns16550_tests.rs"]
mod register_tests;
