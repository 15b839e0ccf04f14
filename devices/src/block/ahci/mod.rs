//! The SATA controller of the ICH9, in its AHCI mode: six ports, each with a disk, a CD-ROM drive, or nothing.
//!
//! Spec: Serial ATA AHCI 1.3.1; Serial ATA 2.6 chapter 10 (frame information structures); Intel ICH9 data sheet,
//! 316972-004, chapter 15 for its place and numbers. Modelled: command lists, PIO, DMA, queued and packet commands,
//! COMRESET and software reset, errors, MSI and INTx. Not modelled: port multipliers, power states of links, hot plug,
//! enclosure management, command completion coalescing, the IDE modes.
//! Checked with: its tests; SeaBIOS, GRUB, Linux ahci.
//!
//! Commands are fetched where the port is told of them, and again where one completes. Data move between the image and
//! guest RAM without a copy. All ports share the controller's lock; a completion takes it on the thread it comes on.

mod command;
mod fis;
mod port;

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use mimus_core::backend::{BlockBuffer, BlockRequest};
use mimus_core::bus::{AccessRules, AccessSize, BusFault, MmioAccess};
use mimus_core::device::{Drain, DrainToken, Lifecycle, MmioDevice, ResetPhase, lock};
use mimus_core::irq::MsiTarget;
use mimus_core::memory::{DmaHandle, MemoryRegion};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use serde::{Deserialize, Serialize};

use super::ata::{Drive, DriveState};
use crate::pci::bus::{PciBus, PciFunction, PciSlot};
use crate::pci::config_space::{BarKind, ConfigSpace, ConfigState, PciIds};
use crate::pci::{CHIPSET, DevFn, PciError};
use crate::virtio::device::decode_payload;
use command::Started;
use port::{Port, PortState};

/// How many ports it has.
pub const PORTS: usize = 6;
/// Where it is on the root bus: function 2 of device 31.
pub const DEVICE: DevFn = DevFn(31 << 3 | 2);

const SCHEMA: Schema = Schema::new("ahci", 1);
const IDS: PciIds = PciIds { vendor: 0x8086, device: 0x2922, revision: 2, class: 0x01_0601, ..CHIPSET };
const BAR: usize = 5;
const BAR_LEN: u64 = 0x1000;
const PORT_BASE: u64 = 0x100;
const PORT_LEN: u64 = 0x80;
/// The capability of message-signalled interrupts: control, 64-bit address, data.
const CAP_MSI: u8 = 5;
const MSI_64: u8 = 1 << 7;
const MSI_ENABLE: u8 = 1;

/// Registers of the controller (AHCI section 3.1).
mod register {
    pub const CAP: u64 = 0x00;
    pub const GHC: u64 = 0x04;
    pub const IS: u64 = 0x08;
    pub const PI: u64 = 0x0c;
    pub const VS: u64 = 0x10;
}

/// 64-bit addresses, queued commands, command list override, AHCI only, 1.5 Gbit/s, 32 slots, six ports.
const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 24 | 1 << 18 | 1 << 20 | 31 << 8 | (PORTS as u32 - 1);
const VERSION: u32 = 0x1_0301;
const GHC_AE: u32 = 1 << 31;
const GHC_IE: u32 = 1 << 1;
const GHC_HR: u32 = 1;

/// Controller and ports.
struct Inner {
    interrupts: bool,
    pending: u32,
    ports: Vec<Port>,
}

/// As saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: ConfigState,
    interrupts: bool,
    pending: u32,
    ports: Vec<PortState>,
    drives: Vec<Option<DriveState>>,
}

#[derive(Default)]
struct InFlight {
    count: usize,
    /// Who waits for `count` to become 0.
    drains: Vec<DrainToken>,
}

/// The controller.
pub struct Ahci {
    this: Weak<Self>,
    slot: PciSlot,
    dma: DmaHandle,
    msi: Option<MsiTarget>,
    /// Device-level lock, taken with `inner` held.
    config: Mutex<ConfigSpace>,
    /// Where the MSI capability is.
    capability: usize,
    /// Device-level lock.
    inner: Mutex<Inner>,
    /// Leaf lock.
    in_flight: Mutex<InFlight>,
    none_in_flight: Condvar,
}

impl Ahci {
    /// The controller on `bus`, without drives.
    pub fn new(bus: &Arc<PciBus>) -> Result<Arc<Self>, PciError> {
        Ok(Self::plug(bus.reserve(Some(DEVICE))?))
    }

    /// The same in another slot.
    pub fn plug(slot: PciSlot) -> Arc<Self> {
        let mut config = ConfigSpace::new(IDS, &slot, true);
        let region = MemoryRegion::mmio("ahci", BAR_LEN, AccessRules::sizes(AccessSize::B1, AccessSize::B8));
        config.add_bar(&slot, BAR, BarKind::Memory32, &region);
        let body = [MSI_64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let writable = [MSI_ENABLE, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let capability = config.add_capability(CAP_MSI, &body, &writable);
        let this = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            dma: slot.dma(),
            msi: slot.msi(),
            config: Mutex::new(config),
            capability,
            inner: Mutex::new(Inner {
                interrupts: false,
                pending: 0,
                ports: (0..PORTS).map(|_| Port::default()).collect(),
            }),
            in_flight: Mutex::default(),
            none_in_flight: Condvar::new(),
            slot,
        });
        if let Some(binding) = region.binding() {
            binding.bind_mmio(this.clone(), 0);
        }
        this.slot.plug(this.clone());
        this
    }

    /// Puts a drive on a port, or on the first that is free; an error is one line.
    pub fn attach(&self, port: Option<usize>, drive: Drive) -> Result<(), String> {
        let mut inner = lock(&self.inner);
        let free = |p: &Port| p.drive.is_none();
        let port = match port {
            Some(n) if n >= PORTS => return Err(format!("bus=ide.{n}: the ports are ide.0 to ide.{}", PORTS - 1)),
            Some(n) if !free(&inner.ports[n]) => return Err(format!("bus=ide.{n} is in use")),
            Some(n) => n,
            None => inner.ports.iter().position(free).ok_or_else(|| format!("all {PORTS} SATA ports are in use"))?,
        };
        inner.ports[port].drive = Some(drive);
        inner.ports[port].reset();
        Ok(())
    }

    /// The ports that have drives.
    pub fn ports_in_use(&self) -> Vec<usize> {
        let inner = lock(&self.inner);
        (0..PORTS).filter(|n| inner.ports[*n].drive.is_some()).collect()
    }

    fn read(&self, offset: u64) -> u32 {
        let inner = lock(&self.inner);
        match offset {
            register::CAP => CAPABILITIES,
            register::GHC => GHC_AE | if inner.interrupts { GHC_IE } else { 0 },
            register::IS => inner.pending,
            register::PI => (1 << PORTS) - 1,
            register::VS => VERSION,
            _ => match port_of(offset) {
                Some((n, at)) => inner.ports[n].read(at),
                None => 0,
            },
        }
    }

    fn write(&self, offset: u64, value: u32) {
        match offset {
            register::GHC => {
                if value & GHC_HR != 0 {
                    self.reset_ports();
                }
                let mut inner = lock(&self.inner);
                inner.interrupts = value & GHC_IE != 0 && value & GHC_HR == 0;
                self.signal(&mut inner, true);
            }
            register::IS => {
                let mut inner = lock(&self.inner);
                inner.pending &= !value;
                self.signal(&mut inner, false);
            }
            _ => {
                let Some((n, at)) = port_of(offset) else { return };
                let mut inner = lock(&self.inner);
                let ended = inner.ports[n].write(at, value, &self.dma);
                self.go_on(&mut inner, n);
                self.signal(&mut inner, false);
                drop(inner);
                if ended {
                    self.wait_for_host();
                }
            }
        }
    }

    /// Fetches what a port may begin, and hands it to the host.
    fn go_on(&self, inner: &mut Inner, n: usize) {
        while let Some(started) = inner.ports[n].next(&self.dma) {
            let (slot, age) = (started.slot, started.age);
            let Some(drive) = &inner.ports[n].drive else { return };
            let backend = drive.backend().clone();
            lock(&self.in_flight).count += 1;
            let this = self.this.clone();
            let submit = move || {
                let Started { request, through, .. } = started;
                let after = backend.clone();
                backend.submit(
                    request,
                    Box::new(move |result, _| {
                        let Some(this) = this.upgrade() else { return };
                        if through && result.is_ok() {
                            let done = Box::new(move |r, _: BlockBuffer| this.completed(n, slot, age, r));
                            return after.submit(BlockRequest::flush(), done);
                        }
                        this.completed(n, slot, age, result);
                    }),
                );
            };
            // A back end may complete at once, on this thread, and that takes the lock.
            inner.ports[n].waiting.push_back(Box::new(submit));
        }
    }

    fn completed(&self, n: usize, slot: u8, age: u32, result: Result<(), mimus_core::backend::BlockError>) {
        let mut inner = lock(&self.inner);
        inner.ports[n].complete(slot, age, result, &self.dma);
        self.go_on(&mut inner, n);
        self.signal(&mut inner, false);
        drop(inner);
        self.submit_waiting(n);
        let mut flight = lock(&self.in_flight);
        flight.count -= 1;
        if flight.count == 0 {
            self.none_in_flight.notify_all();
            let drains = std::mem::take(&mut flight.drains);
            drop(flight);
            drop(drains);
        }
    }

    /// Hands over what [`Ahci::go_on`] began, with no lock held.
    fn submit_waiting(&self, n: usize) {
        loop {
            let Some(submit) = lock(&self.inner).ports[n].waiting.pop_front() else { return };
            submit();
        }
    }

    /// After ports changed: which have something to tell, and telling it.
    fn signal(&self, inner: &mut Inner, enabled: bool) {
        let ports = inner.ports.iter().enumerate();
        let asserted = ports.filter(|(_, p)| p.interrupts()).fold(0, |bits, (n, _)| bits | 1 << n);
        let new = asserted & !inner.pending;
        inner.pending |= asserted;
        let on = inner.interrupts && inner.pending != 0;
        let config = lock(&self.config);
        let capability = config.bytes(self.capability + 2, 12);
        let message = self.msi.as_ref().filter(|_| capability[0] & MSI_ENABLE != 0);
        config.intx().set_level(on && message.is_none());
        if let Some(msi) = message.filter(|_| on && (new != 0 || enabled) && self.dma.gate().is_open()) {
            let address = u64::from_le_bytes(capability[2..10].try_into().unwrap_or_default());
            let data = u16::from_le_bytes([capability[10], capability[11]]);
            msi.send(address, data.into());
        }
    }

    /// Waits until the host moves nothing any more: drivers may reuse the memory of commands that were ended at once.
    fn wait_for_host(&self) {
        (0..PORTS).for_each(|n| self.submit_waiting(n));
        let mut flight = lock(&self.in_flight);
        while flight.count > 0 {
            flight = self.none_in_flight.wait(flight).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn reset_ports(&self) {
        lock(&self.inner).ports.iter_mut().for_each(Port::stop);
        self.wait_for_host();
        let mut inner = lock(&self.inner);
        inner.ports.iter_mut().for_each(Port::reset);
        (inner.interrupts, inner.pending) = (false, 0);
        self.signal(&mut inner, false);
    }
}

/// Port and register of an offset.
fn port_of(offset: u64) -> Option<(usize, u64)> {
    let at = offset.checked_sub(PORT_BASE)?;
    let n = (at / PORT_LEN) as usize;
    (n < PORTS).then_some((n, at % PORT_LEN))
}

impl PciFunction for Ahci {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
        self.signal(&mut lock(&self.inner), false);
    }
}

impl MmioDevice for Ahci {
    fn mmio_read(&self, a: MmioAccess) -> Result<u64, BusFault> {
        let aligned = a.offset & !3;
        let low = u64::from(self.read(aligned));
        let wide = (a.offset & 3) + a.size.bytes() > 4;
        let high = if wide { u64::from(self.read(aligned + 4)) } else { 0 };
        Ok((low | high << 32) >> (8 * (a.offset & 3)) & a.size.mask())
    }

    /// Registers are written as 32 bits, or two at once (AHCI section 3); narrower writes are lost.
    fn mmio_write(&self, a: MmioAccess, value: u64) -> Result<(), BusFault> {
        if a.offset & 3 == 0 && a.size.bytes() >= 4 {
            self.write(a.offset, value as u32);
            if a.size == AccessSize::B8 {
                self.write(a.offset + 4, (value >> 32) as u32);
            }
            for at in [a.offset, a.offset + 4] {
                if let Some((n, _)) = port_of(at) {
                    self.submit_waiting(n);
                }
            }
        }
        Ok(())
    }
}

impl Lifecycle for Ahci {
    fn reset(&self, phase: ResetPhase) {
        match phase {
            ResetPhase::Enter => {
                self.reset_ports();
                lock(&self.inner).ports.iter_mut().filter_map(|p| p.drive.as_mut()).for_each(Drive::reset);
            }
            ResetPhase::Hold => {
                lock(&self.config).reset();
                self.slot.apply_map_changes();
            }
            ResetPhase::Exit => {}
        }
    }

    fn stop(&self, drain: &Drain) {
        let mut flight = lock(&self.in_flight);
        if flight.count > 0 {
            flight.drains.push(drain.token());
        }
    }
}

impl Snapshot for Ahci {
    fn schema(&self) -> Schema {
        SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let inner = lock(&self.inner);
        let state = State {
            config: lock(&self.config).save(),
            interrupts: inner.interrupts,
            pending: inner.pending,
            ports: inner.ports.iter().map(Port::save).collect(),
            drives: inner.ports.iter().map(|p| p.drive.as_ref().map(Drive::save)).collect(),
        };
        Payload::encode(SCHEMA, &state)
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let invalid = |field, why: &str| SnapshotError::invalid(SCHEMA, field, why);
        let state: State = decode_payload(SCHEMA, payload)?;
        if state.ports.len() != PORTS || state.drives.len() != PORTS || state.pending >> PORTS != 0 {
            return Err(invalid("ports", "another number of ports"));
        }
        if !state.ports.iter().all(PortState::is_possible) {
            return Err(invalid("ports", "a port's registers cannot be so"));
        }
        let mut inner = lock(&self.inner);
        for (port, drive) in inner.ports.iter().zip(&state.drives) {
            match (&port.drive, drive) {
                (Some(own), Some(drive)) => own.check(drive).map_err(|why| invalid("drives", why))?,
                (None, None) => {}
                _ => return Err(invalid("drives", "another port has a drive: same -drive options as when saved?")),
            }
        }
        lock(&self.config).restore(state.config).map_err(|why| invalid("config", why))?;
        for (port, (saved, drive)) in inner.ports.iter_mut().zip(state.ports.into_iter().zip(state.drives)) {
            if let Some((own, drive)) = port.drive.as_mut().zip(drive) {
                own.restore(drive);
            }
            port.restore(saved);
        }
        (inner.interrupts, inner.pending) = (state.interrupts, state.pending);
        drop(inner);
        self.slot.apply_map_changes();
        Ok(())
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
