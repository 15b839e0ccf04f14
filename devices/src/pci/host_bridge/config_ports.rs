//! Configuration mechanism #1 of x86: an address port (0xcf8) and a data port (0xcfc), and the reset control register
//! (0xcf9), which hides behind the address port.
//!
//! Spec: PCI §3.2.2.3.2; reset control as in the Intel ICH9 data sheet, 316972-004, section 13.7.5. Only whole
//! doublewords reach the address port; a byte of it is an ordinary port.

use crate::pci::DevFn;
use crate::pci::bus::PciBus;
use crate::virtio::device::decode_payload;
use mimus_core::bus::{AccessRules, AccessSize, BusFault, PioAccess};
use mimus_core::device::{Lifecycle, PioDevice, ResetPhase};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// First of the ports.
pub const PORT: u16 = 0xcf8;
/// Number of ports.
pub const PORTS: u64 = 8;
/// Accesses the ports take.
pub const RULES: AccessRules = AccessRules::sizes(AccessSize::B1, AccessSize::B4).with_unaligned();
/// The reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that resets everything (FADT RESET_VALUE): full reset, reset CPU, system reset.
pub const RESET_VALUE: u8 = 0x0e;

const SCHEMA: Schema = Schema::new("pci-config-ports", 1);
const ADDRESS: u16 = 0;
const RESET_CONTROL: u16 = RESET_PORT - PORT;
const DATA: u16 = 4;
const ENABLE: u32 = 1 << 31;
/// Bits of CONFIG_ADDRESS that are not reserved.
const ADDRESS_BITS: u32 = 0x80ff_fffc;
const RESET_CPU: u8 = 1 << 2;
const RESET_BITS: u8 = 0x0e;

/// The registers, as saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    address: u32,
    reset_control: u8,
}

/// The ports of a host bridge.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    /// CONFIG_ADDRESS. No lock: functions are called without one.
    address: AtomicU32,
    reset_control: AtomicU8,
    reset: Box<dyn Fn() + Send + Sync>,
}

impl ConfigPorts {
    /// Ports for `bus`, which is bus 0. `reset` resets the machine and must not wait.
    pub fn new(bus: &Arc<PciBus>, reset: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let (address, reset_control) = (AtomicU32::new(0), AtomicU8::new(0));
        Arc::new(Self { bus: bus.clone(), address, reset_control, reset: Box::new(reset) })
    }

    /// Function and register that an access `at` bytes into the data port is about.
    fn target(&self, at: u16) -> Option<(DevFn, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let on_root = address & ENABLE != 0 && address >> 16 & 0xff == 0;
        let register = (address & 0xfc) as u16 + at;
        on_root.then_some((DevFn((address >> 8) as u8), register))
    }

    fn write_reset_control(&self, value: u8) {
        let value = value & RESET_BITS;
        let before = self.reset_control.swap(value, Ordering::Relaxed);
        if value & !before & RESET_CPU != 0 {
            (self.reset)();
        }
    }
}

impl PioDevice for ConfigPorts {
    fn pio_read(&self, a: PioAccess) -> Result<u64, BusFault> {
        let value = match (a.offset, a.size) {
            (ADDRESS, AccessSize::B4) => self.address.load(Ordering::Relaxed),
            (RESET_CONTROL, AccessSize::B1) => self.reset_control.load(Ordering::Relaxed).into(),
            (DATA.., _) => match self.target(a.offset - DATA) {
                Some((function, register)) => self.bus.config_read(function, register, a.size),
                None => u32::MAX,
            },
            _ => u32::MAX,
        };
        Ok(u64::from(value) & a.size.mask())
    }

    fn pio_write(&self, a: PioAccess, value: u64) -> Result<(), BusFault> {
        match (a.offset, a.size) {
            (ADDRESS, AccessSize::B4) => self.address.store(value as u32 & ADDRESS_BITS, Ordering::Relaxed),
            (RESET_CONTROL, AccessSize::B1) => self.write_reset_control(value as u8),
            (DATA.., _) => {
                if let Some((function, register)) = self.target(a.offset - DATA) {
                    self.bus.config_write(function, register, a.size, value as u32);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Lifecycle for ConfigPorts {
    fn reset(&self, phase: ResetPhase) {
        if phase == ResetPhase::Enter {
            self.address.store(0, Ordering::Relaxed);
            self.reset_control.store(0, Ordering::Relaxed);
        }
    }
}

impl Snapshot for ConfigPorts {
    fn schema(&self) -> Schema {
        SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let (address, reset_control) = (&self.address, &self.reset_control);
        let (address, reset_control) = (address.load(Ordering::Relaxed), reset_control.load(Ordering::Relaxed));
        Payload::encode(SCHEMA, &State { address, reset_control })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let s: State = decode_payload(SCHEMA, payload)?;
        if s.address & !ADDRESS_BITS != 0 || s.reset_control & !RESET_BITS != 0 {
            let reason = format!("{:#x}, {:#x}", s.address, s.reset_control);
            return Err(SnapshotError::invalid(SCHEMA, "address, reset_control", reason));
        }
        self.address.store(s.address, Ordering::Relaxed);
        self.reset_control.store(s.reset_control, Ordering::Relaxed);
        Ok(())
    }
}
