//! One port: its registers, and the commands that are on their way through it (AHCI sections 3.3 and 5).

use std::collections::VecDeque;

use mimus_core::backend::{BlockBuffer, BlockError, BlockOp, BlockRequest};
use mimus_core::bus::GuestPhys;
use mimus_core::memory::{DmaHandle, RamSlice};
use serde::{Deserialize, Serialize};

use super::command::{self, Fetched, NoData, Started};
use super::fis::{self, HostFis};
use crate::block::ata::{Action, Drive, Medium, Protocol, Registers, TaskFile, command as ata, error, status};

/// Registers.
mod register {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// Interrupt status.
mod is {
    /// A register FIS.
    pub const DHRS: u32 = 1 << 0;
    /// PIO Setup.
    pub const PSS: u32 = 1 << 1;
    /// Set Device Bits.
    pub const SDBS: u32 = 1 << 3;
    /// A connection changed: as long as SERR says so.
    pub const PCS: u32 = 1 << 6;
    /// PHY ready changed: the same.
    pub const PRCS: u32 = 1 << 22;
    /// More data than memory for them.
    pub const OFS: u32 = 1 << 24;
    /// Data could not be moved.
    pub const HBDS: u32 = 1 << 28;
    /// A list or table could not be read.
    pub const HBFS: u32 = 1 << 29;
    /// The drive set ERR.
    pub const TFES: u32 = 1 << 30;
    /// What can be enabled, and what writing ones clears.
    pub const ALL: u32 = 0xfdc0_00ff;
    pub const CLEARED: u32 = ALL & !(PCS | PRCS | 1 << 4);
    /// What stops a port until it is started anew (AHCI section 6.2.2).
    pub const FATAL: u32 = TFES | HBFS | HBDS;
}

/// Command register.
mod cmd {
    pub const ST: u32 = 1 << 0;
    /// Spin up, power on: always.
    pub const ON: u32 = 1 << 1 | 1 << 2;
    pub const CLO: u32 = 1 << 3;
    pub const FRE: u32 = 1 << 4;
    pub const FR: u32 = 1 << 14;
    pub const CR: u32 = 1 << 15;
    /// What drivers set: start, FIS receive, ATAPI, its LED, aggressive power states.
    pub const WRITABLE: u32 = ST | FRE | 0xf << 24;
}

const SERR_X: u32 = 1 << 26;
const SERR_N: u32 = 1 << 16;
/// A device is there, the link is active, at 1.5 Gbit/s.
const LINK_UP: u32 = 0x113;
/// Software reset, in the device's control register.
const SRST: u8 = 1 << 2;
/// No device said anything yet.
const NO_STATUS: u32 = 0x7f;

/// The registers, as saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    list: u64,
    received: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    tfd: u32,
    sig: u32,
    sctl: u32,
    serr: u32,
    sact: u32,
    ci: u32,
    /// The FIS with the drive's signature waits for a place.
    signature: bool,
    /// Software reset is asserted.
    srst: bool,
    /// After an error nothing is fetched until the driver starts the list anew.
    halted: bool,
}

impl PortState {
    /// Whether a port's registers can be so.
    pub fn is_possible(&self) -> bool {
        let runs = self.cmd & cmd::CR != 0;
        let possible = cmd::WRITABLE | cmd::ON | cmd::CR;
        runs == (self.cmd & cmd::ST != 0)
            && self.cmd & !possible == 0
            && self.is & !is::CLEARED == 0
            && self.ie & !is::ALL == 0
            && self.list & 0x3ff == 0
            && self.received & 0xff == 0
            && (runs || self.ci | self.sact == 0 && !self.halted)
    }
}

/// A command that the host works on.
struct Running {
    fetched: Fetched,
    task: TaskFile,
    protocol: Protocol,
    op: BlockOp,
    bytes: u64,
}

/// One port. The controller's lock is around it.
#[derive(Default)]
pub struct Port {
    pub drive: Option<Drive>,
    /// What the host is to be asked for as soon as no lock is held.
    pub waiting: VecDeque<Box<dyn FnOnce() + Send>>,
    state: PortState,
    running: [Option<Box<Running>>; 32],
    age: u32,
}

impl Port {
    /// Back to power-on, with the drive's signature on its way. Nothing is in flight.
    pub fn reset(&mut self) {
        self.stop();
        self.state = PortState { cmd: cmd::ON, sig: u32::MAX, tfd: NO_STATUS, ..PortState::default() };
        self.link_up(None);
    }

    /// Forgets all commands: what the host has in hand completes unheard.
    pub fn stop(&mut self) {
        self.age = self.age.wrapping_add(1);
        self.running = Default::default();
        (self.state.ci, self.state.sact, self.state.halted) = (0, 0, false);
        self.state.cmd &= !cmd::CR;
    }

    pub fn save(&self) -> PortState {
        self.state.clone()
    }

    /// Takes over a saved state that was checked.
    pub fn restore(&mut self, saved: PortState) {
        self.age = self.age.wrapping_add(1);
        self.running = Default::default();
        self.state = saved;
    }

    /// Whether it asks for an interrupt.
    pub fn interrupts(&self) -> bool {
        self.status() & self.state.ie != 0
    }

    /// The interrupt status with what SERR says.
    fn status(&self) -> u32 {
        let s = &self.state;
        let bit = |on: u32, bit: u32| if s.serr & on != 0 { bit } else { 0 };
        s.is | bit(SERR_X, is::PCS) | bit(SERR_N, is::PRCS)
    }

    pub fn read(&self, at: u64) -> u32 {
        let s = &self.state;
        match at {
            register::CLB => s.list as u32,
            register::CLBU => (s.list >> 32) as u32,
            register::FB => s.received as u32,
            register::FBU => (s.received >> 32) as u32,
            register::IS => self.status(),
            register::IE => s.ie,
            register::CMD => {
                let slot = if s.cmd & cmd::ST != 0 && s.ci != 0 { s.ci.trailing_zeros() } else { 0 };
                s.cmd | slot << 8 | if s.cmd & cmd::FRE != 0 { cmd::FR } else { 0 }
            }
            register::TFD => s.tfd,
            register::SIG => s.sig,
            register::SSTS if self.drive.is_some() && s.sctl & 15 == 0 => LINK_UP,
            register::SCTL => s.sctl,
            register::SERR => s.serr,
            register::SACT => s.sact,
            register::CI => s.ci,
            _ => 0,
        }
    }

    /// True if commands were ended that the host may still work on.
    pub fn write(&mut self, at: u64, value: u32, dma: &DmaHandle) -> bool {
        let age = self.age;
        let s = &mut self.state;
        let low = |old: u64, mask: u32| old & !0xffff_ffff | u64::from(value & mask);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            register::CLB => s.list = low(s.list, !0x3ff),
            register::CLBU => s.list = high(s.list),
            register::FB => s.received = low(s.received, !0xff),
            register::FBU => s.received = high(s.received),
            register::IS => s.is &= !(value & is::CLEARED),
            register::IE => s.ie = value & is::ALL,
            register::CMD => self.set_command(value, dma),
            register::SCTL => {
                let was = s.sctl & 15;
                s.sctl = value & 0xfff;
                match (was, value & 15) {
                    // COMRESET begins: the link goes down.
                    (old, 1) if old != 1 => {
                        self.stop();
                        self.state.tfd = NO_STATUS;
                        self.state.sig = u32::MAX;
                    }
                    (1, 0) => {
                        if let Some(drive) = &mut self.drive {
                            drive.reset();
                        }
                        self.link_up(Some(dma));
                    }
                    _ => {}
                }
            }
            register::SERR => s.serr &= !value,
            // Only what a running list may take.
            register::SACT if s.cmd & cmd::ST != 0 => s.sact |= value,
            register::CI if s.cmd & cmd::ST != 0 => s.ci |= value,
            _ => {}
        }
        age != self.age
    }

    fn set_command(&mut self, value: u32, dma: &DmaHandle) {
        let s = &mut self.state;
        let old = s.cmd;
        s.cmd = old & !cmd::WRITABLE | value & cmd::WRITABLE;
        if value & cmd::CLO != 0 && old & cmd::ST == 0 {
            s.tfd &= !u32::from(status::BSY | status::DRQ);
        }
        match (old & cmd::ST != 0, value & cmd::ST != 0) {
            (true, false) => self.stop(),
            (false, true) => s.cmd |= cmd::CR,
            _ => {}
        }
        if self.state.signature && self.state.cmd & cmd::FRE != 0 {
            self.send_signature(dma);
        }
    }

    /// The link is there (again): the drive sends its signature, as soon as there is a place for it.
    fn link_up(&mut self, dma: Option<&DmaHandle>) {
        if self.drive.is_none() {
            return;
        }
        self.state.serr |= SERR_X | SERR_N;
        self.state.signature = true;
        if let Some(dma) = dma.filter(|_| self.state.cmd & cmd::FRE != 0) {
            self.send_signature(dma);
        } else {
            self.take_signature();
        }
    }

    fn take_signature(&mut self) -> Registers {
        let signature = self.drive.as_ref().map(Drive::signature).unwrap_or_default();
        self.state.sig = (signature.lba as u32) << 8 | u32::from(signature.count & 0xff);
        // A CD-ROM drive is not ready for ATA's commands.
        let ready = match self.drive.as_ref().map(Drive::medium) {
            Some(Medium::Disk) => status::READY,
            _ => 0,
        };
        self.state.tfd = u32::from(ready) | 1 << 8;
        signature
    }

    fn send_signature(&mut self, dma: &DmaHandle) {
        self.state.signature = false;
        let signature = self.take_signature();
        let fis = fis::registers(&signature, self.state.tfd as u8, 1, false);
        self.receive(dma, fis::AT_REGISTERS, &fis);
    }

    /// Puts a FIS of the drive's where the driver wants them.
    fn receive(&mut self, dma: &DmaHandle, at: u64, fis: &[u8]) {
        if self.state.cmd & cmd::FRE != 0 && dma.write(GuestPhys(self.state.received.wrapping_add(at)), fis).is_err() {
            self.raise(is::HBFS);
        }
    }

    /// Notes what happened.
    fn raise(&mut self, what: u32) {
        self.state.is |= what;
        self.state.halted |= what & is::FATAL != 0;
    }

    /// The next command that may begin, until one is for the host: others are done on the way.
    pub fn next(&mut self, dma: &DmaHandle) -> Option<Started> {
        loop {
            let s = &self.state;
            let busy = s.tfd & u32::from(status::BSY | status::DRQ) != 0;
            if s.cmd & cmd::CR == 0 || s.halted || busy && !self.queues() {
                return None;
            }
            let new = s.ci & !self.bits(|_| true);
            if new == 0 || self.drive.is_none() || s.sctl & 15 != 0 {
                return None;
            }
            let slot = new.trailing_zeros() as u8;
            let Ok(fetched) = command::fetch(dma, s.list, slot) else {
                self.raise(is::HBFS);
                return None;
            };
            match fis::parse(&fetched.fis) {
                None => {
                    self.state.ci &= !(1 << slot);
                    self.receive(dma, fis::AT_UNKNOWN, &fetched.fis);
                }
                Some(HostFis::Control(control)) => self.control(dma, slot, control),
                Some(HostFis::Command(task)) => {
                    let queued = matches!(task.command, ata::READ_QUEUED | ata::WRITE_QUEUED);
                    // Queued commands go beside each other, all others alone.
                    if self.bits(|_| true) != 0 && !(queued && self.queues()) {
                        return None;
                    }
                    if let Some(started) = self.begin(dma, slot, fetched, task) {
                        return Some(started);
                    }
                }
            }
        }
    }

    /// Slots of the commands that run and are so.
    fn bits(&self, is: impl Fn(&Running) -> bool) -> u32 {
        let running = self.running.iter().enumerate();
        running.filter(|(_, r)| r.as_deref().is_some_and(&is)).fold(0, |bits, (n, _)| bits | 1 << n)
    }

    /// Whether what runs is queued.
    fn queues(&self) -> bool {
        self.bits(|_| true) != 0 && self.bits(|r| r.protocol != Protocol::Queued) == 0
    }

    /// The device's control register: a reset is SRST set, then cleared.
    fn control(&mut self, dma: &DmaHandle, slot: u8, control: u8) {
        self.state.ci &= !(1 << slot);
        let srst = control & SRST != 0;
        let was = std::mem::replace(&mut self.state.srst, srst);
        if was && !srst {
            if let Some(drive) = &mut self.drive {
                drive.reset();
            }
            self.send_signature(dma);
        }
    }

    fn begin(&mut self, dma: &DmaHandle, slot: u8, fetched: Fetched, task: TaskFile) -> Option<Started> {
        let drive = self.drive.as_mut()?;
        let age = self.age;
        match drive.execute(&task, &fetched.packet) {
            Action::Done(registers) => {
                self.finish(dma, slot, &registers, 0);
            }
            Action::Failed(error) => self.fail(dma, slot, &task, error),
            Action::Data(protocol, data) => {
                match fetched.memory(dma, data.len() as u64, true) {
                    Ok(slices) => {
                        store(&slices, &data);
                        self.data_moved(dma, slot, &fetched, &task, (protocol, BlockOp::Read, data.len() as u64));
                    }
                    Err(why) => self.no_data(dma, slot, &task, &why),
                };
            }
            Action::Flush => {
                let (protocol, op) = (Protocol::Dma, BlockOp::Flush);
                return Some(self.run(
                    slot,
                    Running { fetched, task, protocol, op, bytes: 0 },
                    BlockRequest::flush(),
                    false,
                ));
            }
            Action::Transfer { op, protocol, sector, bytes, through } => {
                match fetched.memory(dma, bytes, op == BlockOp::Read) {
                    Ok(slices) => {
                        debug_assert_eq!(age, self.age);
                        let request = BlockRequest::transfer(op, sector, BlockBuffer::Ram(slices));
                        return Some(self.run(slot, Running { fetched, task, protocol, op, bytes }, request, through));
                    }
                    Err(why) => self.no_data(dma, slot, &task, &why),
                }
            }
        }
        None
    }

    fn run(&mut self, slot: u8, running: Running, request: BlockRequest, through: bool) -> Started {
        if running.protocol == Protocol::Queued {
            // The drive takes it, and is free for more; the slot's bit goes now, the tag's when it is done.
            self.state.ci &= !(1 << slot);
        } else {
            let drq = if running.protocol == Protocol::Pio { status::DRQ } else { status::BSY };
            self.state.tfd = u32::from(status::READY | drq);
        }
        self.running[usize::from(slot)] = Some(Box::new(running));
        Started { request, through, slot, age: self.age }
    }

    /// The host is done with a command.
    pub fn complete(&mut self, slot: u8, age: u32, result: Result<(), BlockError>, dma: &DmaHandle) {
        if age != self.age {
            return;
        }
        let Some(running) = self.running[usize::from(slot)].take() else { return };
        let Running { fetched, task, protocol, op, bytes } = *running;
        match result {
            Ok(()) if protocol == Protocol::Queued => {
                fetched.moved(dma, bytes);
                self.state.sact &= !(1 << slot);
                let fis = fis::device_bits(status::READY, 0, 1 << slot);
                self.receive(dma, fis::AT_DEVICE_BITS, &fis);
                self.state.tfd = status::READY.into();
                self.raise(is::SDBS);
            }
            Ok(()) => self.data_moved(dma, slot, &fetched, &task, (protocol, op, bytes)),
            Err(why) => {
                let tag = (protocol == Protocol::Queued).then_some(slot);
                let error = self.drive.as_mut().map_or(error::ABRT, |d| d.failed(&why, tag));
                self.fail(dma, slot, &task, error);
            }
        }
    }

    /// A command that is not queued has moved its data.
    fn data_moved(
        &mut self,
        dma: &DmaHandle,
        slot: u8,
        fetched: &Fetched,
        task: &TaskFile,
        (protocol, op, bytes): (Protocol, BlockOp, u64),
    ) {
        fetched.moved(dma, bytes);
        let packet = task.command == ata::PACKET;
        let echo = Registers { lba: task.lba, count: if packet { 3 } else { task.count }, device: task.device };
        if protocol == Protocol::Pio && bytes > 0 {
            let to_host = op == BlockOp::Read;
            let during = status::READY | status::DRQ;
            let fis = fis::pio_setup(&echo, to_host, during, status::READY, bytes);
            self.receive(dma, fis::AT_PIO_SETUP, &fis);
            self.raise(is::PSS);
            // Data to the host end a command without a word more (SATA 2.6 section 11.7), but for a packet's.
            if to_host && !packet {
                self.state.tfd = status::READY.into();
                self.state.ci &= !(1 << slot);
                return;
            }
        }
        self.finish(dma, slot, &echo, 0);
    }

    /// A register FIS, with success if `error` is 0.
    fn finish(&mut self, dma: &DmaHandle, slot: u8, registers: &Registers, error: u8) {
        let status = status::READY | if error != 0 { status::ERR } else { 0 };
        let fis = fis::registers(registers, status, error, true);
        self.receive(dma, fis::AT_REGISTERS, &fis);
        self.state.tfd = u32::from(status) | u32::from(error) << 8;
        self.raise(is::DHRS);
        if error == 0 {
            self.state.ci &= !(1 << slot);
        } else {
            self.raise(is::TFES);
        }
    }

    /// The drive says that a command failed: its slot stays, and the port stands still.
    fn fail(&mut self, dma: &DmaHandle, slot: u8, task: &TaskFile, error: u8) {
        let packet = task.command == ata::PACKET;
        if matches!(task.command, ata::READ_QUEUED | ata::WRITE_QUEUED) {
            if let Some(drive) = &mut self.drive {
                drive.note_queue_error(Some(slot), error);
            }
            // Serial ATA 2.6 section 13.6.3: by Set Device Bits, with no tag in it.
            let status = status::READY | status::ERR;
            let fis = fis::device_bits(status, error, 0);
            self.receive(dma, fis::AT_DEVICE_BITS, &fis);
            self.state.tfd = u32::from(status) | u32::from(error) << 8;
            self.raise(is::SDBS | is::TFES);
            return;
        }
        let registers = Registers { lba: task.lba, count: if packet { 3 } else { task.count }, device: task.device };
        self.finish(dma, slot, &registers, error);
    }

    fn no_data(&mut self, dma: &DmaHandle, slot: u8, task: &TaskFile, why: &NoData) {
        match why {
            NoData::Bus => self.raise(is::HBDS),
            NoData::TooShort => {
                self.raise(is::OFS);
                self.fail(dma, slot, task, error::ABRT);
            }
        }
    }
}

/// Puts bytes into scattered memory that is as long.
fn store(slices: &[RamSlice], data: &[u8]) {
    let mut at = 0;
    for slice in slices {
        let end = at + slice.len() as usize;
        // Memory that is there was asked for.
        let _ = slice.write(0, &data[at..end]);
        at = end;
    }
}
