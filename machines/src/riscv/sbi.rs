//! The built-in supervisor binary interface: what firmware would offer a kernel, without firmware.
//!
//! Spec: RISC-V SBI specification 2.0; section numbers below are its. Offered: base, timer, IPI, remote fence,
//! hart state management, system reset, debug console, and the legacy console, timer and shutdown calls that
//! early-boot code of older kernels makes. A call arrives as the vCPU's `a0`–`a7` and runs on its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use mimus_core::accel::{CpuIo, CpuPin, HypercallResult, RemoteFence, StartRequest, VcpuHandle, VcpuIndex};
use mimus_core::backend::CharBackend;
use mimus_core::bus::{GuestPhys, GuestVirt, MemTxAttrs};
use mimus_core::clock::Timer;
use mimus_core::device::{Lifecycle, ResetPhase};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError};
use mimus_devices::misc::syscon::SysconRequest;
use serde::{Deserialize, Serialize};

use super::map;
use crate::machine::Hypercalls;

/// Error codes (section 3, table 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i64)]
enum SbiError {
    Failed = -1,
    NotSupported = -2,
    InvalidParam = -3,
    InvalidAddress = -5,
    AlreadyAvailable = -6,
}

type SbiResult = Result<u64, SbiError>;

const EXT_BASE: u64 = 0x10;
const EXT_TIME: u64 = 0x5449_4d45;
const EXT_IPI: u64 = 0x73_5049;
const EXT_RFENCE: u64 = 0x5246_4e43;
const EXT_HSM: u64 = 0x48_534d;
const EXT_SRST: u64 = 0x5352_5354;
const EXT_DBCN: u64 = 0x4442_434e;
const LEGACY_SET_TIMER: u64 = 0;
const LEGACY_PUTCHAR: u64 = 1;
const LEGACY_GETCHAR: u64 = 2;
const LEGACY_SHUTDOWN: u64 = 8;

/// Hart states (section 9, table 1).
const STARTED: u8 = 0;
const STOPPED: u8 = 1;
const START_PENDING: u8 = 2;

/// Suspend types (section 9.4) that every platform has.
const SUSPEND_RETENTIVE: u32 = 0;
const SUSPEND_NON_RETENTIVE: u32 = 0x8000_0000;

/// Bytes of one debug console call that are handled; the caller is told how many were.
const CONSOLE_CHUNK: u64 = 4096;

/// Version 2.0 (section 4.1).
const SPEC_VERSION: u64 = 2 << 24;
/// Not an id registered with RISC-V International; any number a kernel does not know will do.
const IMPLEMENTATION: u64 = 0x6d69_6d75;

struct Hart {
    vcpu: Arc<dyn VcpuHandle>,
    timer: Timer,
    /// The deadline set last, in ns of the virtual clock; `u64::MAX` for none.
    deadline: AtomicU64,
    state: AtomicU8,
}

impl Hart {
    /// One that is being started may run already, before whoever starts it is told.
    fn is_started(&self) -> bool {
        self.state.load(Ordering::SeqCst) != STOPPED
    }

    /// No timer, and no interrupt of a call that was for who ran before.
    fn quiet(&self) {
        self.deadline.store(u64::MAX, Ordering::SeqCst);
        self.timer.disarm();
        self.vcpu.set_pin(CpuPin::Stip, false);
        self.vcpu.set_pin(CpuPin::Ssip, false);
    }
}

/// The firmware's state.
pub struct Sbi {
    harts: Vec<Hart>,
    console: Option<Arc<dyn CharBackend>>,
    request: Box<dyn Fn(SysconRequest) + Send + Sync>,
    power_off: Box<dyn Fn(VcpuIndex) + Send + Sync>,
}

const SCHEMA: Schema = Schema::new("sbi", 1);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedHart {
    state: u8,
    deadline: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    harts: Vec<SavedHart>,
}

impl Sbi {
    /// Firmware for `vcpus`, each with a timer of the virtual clock; hart 0 is started. `request` is told of
    /// system resets, `power_off` turns off a vCPU that is about to leave its call; neither may wait.
    pub fn new(
        vcpus: Vec<(Arc<dyn VcpuHandle>, Timer)>,
        console: Option<Arc<dyn CharBackend>>,
        request: impl Fn(SysconRequest) + Send + Sync + 'static,
        power_off: impl Fn(VcpuIndex) + Send + Sync + 'static,
    ) -> Arc<Sbi> {
        let harts = vcpus
            .into_iter()
            .enumerate()
            .map(|(i, (vcpu, timer))| {
                let state = AtomicU8::new(if i == 0 { STARTED } else { STOPPED });
                let pin = vcpu.clone();
                timer.bind(move || pin.set_pin(CpuPin::Stip, true));
                Hart { vcpu, timer, deadline: AtomicU64::new(u64::MAX), state }
            })
            .collect();
        Arc::new(Sbi { harts, console, request: Box::new(request), power_off: Box::new(power_off) })
    }

    /// After a machine reset: only hart 0 is started, no timer is armed.
    fn reset_harts(&self) {
        for (i, hart) in self.harts.iter().enumerate() {
            hart.state.store(if i == 0 { STARTED } else { STOPPED }, Ordering::SeqCst);
            hart.quiet();
        }
    }

    /// Handles a call: `a0`–`a7` in `regs`, results in `a0` and `a1`.
    pub fn call(&self, io: &dyn CpuIo, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        let (extension, function) = (regs[7], regs[6]);
        if matches!(extension, LEGACY_SET_TIMER..=LEGACY_SHUTDOWN) {
            return self.legacy(vcpu, extension, regs);
        }
        let mut after = HypercallResult::Done;
        let result = match extension {
            EXT_BASE => self.base(function, regs[0]),
            EXT_TIME if function == 0 => {
                self.set_timer(vcpu, regs[0]);
                Ok(0)
            }
            EXT_IPI if function == 0 => self.send_ipi(regs[0], regs[1]),
            EXT_RFENCE => self.remote_fence(function, regs),
            EXT_HSM => match self.hart_state(io, vcpu, function, regs) {
                Ok((value, how)) => {
                    after = how;
                    Ok(value)
                }
                Err(e) => Err(e),
            },
            EXT_SRST if function == 0 => {
                self.system_reset(regs[0], regs[1]).inspect(|_| after = HypercallResult::Leave)
            }
            EXT_DBCN => self.debug_console(io, function, regs),
            _ => Err(SbiError::NotSupported),
        };
        (regs[0], regs[1]) = match result {
            Ok(value) => (0, value),
            Err(error) => (error as i64 as u64, 0),
        };
        after
    }

    /// Section 5: one return value, no error code.
    fn legacy(&self, vcpu: VcpuIndex, extension: u64, regs: &mut [u64; 8]) -> HypercallResult {
        match extension {
            LEGACY_SET_TIMER => self.set_timer(vcpu, regs[0]),
            LEGACY_PUTCHAR => {
                if !self.put(regs[0] as u8) {
                    regs[0] = SbiError::Failed as i64 as u64;
                    return HypercallResult::Done;
                }
            }
            LEGACY_SHUTDOWN => {
                (self.request)(SysconRequest::PowerOff);
                return HypercallResult::Leave;
            }
            LEGACY_GETCHAR => {
                regs[0] = !0;
                return HypercallResult::Done;
            }
            _ => {
                regs[0] = SbiError::NotSupported as i64 as u64;
                return HypercallResult::Done;
            }
        }
        regs[0] = 0;
        HypercallResult::Done
    }

    fn base(&self, function: u64, extension: u64) -> SbiResult {
        const KNOWN: [u64; 11] = [
            EXT_BASE,
            EXT_TIME,
            EXT_IPI,
            EXT_RFENCE,
            EXT_HSM,
            EXT_SRST,
            EXT_DBCN,
            LEGACY_SET_TIMER,
            LEGACY_PUTCHAR,
            LEGACY_GETCHAR,
            LEGACY_SHUTDOWN,
        ];
        Ok(match function {
            0 => SPEC_VERSION,
            1 => IMPLEMENTATION,
            2 => 1,
            3 => u64::from(KNOWN.contains(&extension)),
            // mvendorid, marchid, mimpid
            4..=6 => 0,
            _ => return Err(SbiError::NotSupported),
        })
    }

    fn hart(&self, vcpu: VcpuIndex) -> Option<&Hart> {
        self.harts.get(vcpu.as_usize())
    }

    /// Section 6.1: also clears the pending interrupt.
    fn set_timer(&self, vcpu: VcpuIndex, ticks: u64) {
        let Some(hart) = self.hart(vcpu) else { return };
        let deadline = ticks.checked_mul(map::TICK_NS);
        hart.deadline.store(deadline.unwrap_or(u64::MAX), Ordering::SeqCst);
        arm(&hart.vcpu, &hart.timer, CpuPin::Stip, deadline);
    }

    /// The harts of a mask (section 3.1).
    fn select(&self, mask: u64, base: u64) -> Result<Vec<&Hart>, SbiError> {
        if base == !0 {
            return Ok(self.started());
        }
        let mut selected = Vec::new();
        for bit in (0..64).filter(|bit| mask >> bit & 1 != 0) {
            let id = base.checked_add(bit).and_then(|id| usize::try_from(id).ok()).ok_or(SbiError::InvalidParam)?;
            selected.push(self.harts.get(id).ok_or(SbiError::InvalidParam)?);
        }
        Ok(selected)
    }

    /// Those that run, or are about to.
    fn started(&self) -> Vec<&Hart> {
        self.harts.iter().filter(|h| h.is_started()).collect()
    }

    fn send_ipi(&self, mask: u64, base: u64) -> SbiResult {
        for hart in self.select(mask, base)?.into_iter().filter(|h| h.is_started()) {
            // An edge: the target clears sip.SSIP, which is this pin's memory, itself.
            hart.vcpu.set_pin(CpuPin::Ssip, true);
        }
        Ok(0)
    }

    /// Section 8.
    fn remote_fence(&self, function: u64, regs: &[u64; 8]) -> SbiResult {
        let [mask, base, start, size, asid, ..] = *regs;
        let range = |asid: Option<u16>| {
            let everything = (start == 0 && size == 0) || size == !0;
            if everything && asid.is_none() {
                RemoteFence::TlbAll
            } else if everything {
                RemoteFence::TlbRange { start: GuestVirt(0), len: !0, asid }
            } else {
                RemoteFence::TlbRange { start: GuestVirt(start), len: size, asid }
            }
        };
        let fence = match function {
            0 => RemoteFence::Icache,
            1 => range(None),
            2 => range(Some(u16::try_from(asid).map_err(|_| SbiError::InvalidParam)?)),
            _ => return Err(SbiError::NotSupported),
        };
        for hart in self.select(mask, base)? {
            hart.vcpu.remote_fence(fence);
        }
        Ok(0)
    }

    /// Section 9.
    fn hart_state(
        &self,
        io: &dyn CpuIo,
        vcpu: VcpuIndex,
        function: u64,
        regs: &[u64; 8],
    ) -> Result<(u64, HypercallResult), SbiError> {
        let done = |value| Ok((value, HypercallResult::Done));
        match function {
            0 => {
                let hart =
                    usize::try_from(regs[0]).ok().and_then(|i| self.harts.get(i)).ok_or(SbiError::InvalidParam)?;
                if !is_memory(io, regs[1], 2) {
                    return Err(SbiError::InvalidAddress);
                }
                let claim = hart.state.compare_exchange(STOPPED, START_PENDING, Ordering::SeqCst, Ordering::SeqCst);
                if claim.is_err() {
                    return Err(SbiError::AlreadyAvailable);
                }
                let how = StartRequest { pc: regs[1], arg0: regs[0], arg1: regs[2] };
                let started = io.start_vcpu(hart.vcpu.index(), how);
                hart.state.store(if started { STARTED } else { STOPPED }, Ordering::SeqCst);
                if started { done(0) } else { Err(SbiError::Failed) }
            }
            1 => {
                let hart = self.hart(vcpu).ok_or(SbiError::Failed)?;
                hart.quiet();
                // In this order: who sees it stopped may start it at once.
                (self.power_off)(vcpu);
                hart.state.store(STOPPED, Ordering::SeqCst);
                Ok((0, HypercallResult::Leave))
            }
            2 => {
                let hart =
                    usize::try_from(regs[0]).ok().and_then(|i| self.harts.get(i)).ok_or(SbiError::InvalidParam)?;
                done(u64::from(hart.state.load(Ordering::SeqCst)))
            }
            // The type is 32 bits wide.
            3 => match regs[0] as u32 {
                // Retentive suspend is WFI.
                SUSPEND_RETENTIVE => Ok((0, HypercallResult::Wait)),
                SUSPEND_NON_RETENTIVE => Err(SbiError::NotSupported),
                // Reserved, or of platforms.
                _ => Err(SbiError::InvalidParam),
            },
            _ => Err(SbiError::NotSupported),
        }
    }

    /// Section 10. Type and reason are 32 bits wide.
    fn system_reset(&self, kind: u64, reason: u64) -> SbiResult {
        // 0: none, 1: system failure. The others are reserved, or of platforms and vendors.
        if reason as u32 > 1 {
            return Err(SbiError::InvalidParam);
        }
        (self.request)(match kind as u32 {
            0 => SysconRequest::PowerOff,
            1 | 2 => SysconRequest::Reset,
            _ => return Err(SbiError::InvalidParam),
        });
        Ok(0)
    }

    /// Section 12.
    fn debug_console(&self, io: &dyn CpuIo, function: u64, regs: &[u64; 8]) -> SbiResult {
        let [len, base, base_high, ..] = *regs;
        if function < 2 && (base_high != 0 || !is_memory(io, base, len)) {
            return Err(SbiError::InvalidParam);
        }
        match function {
            0 => {
                let mut bytes = vec![0; len.min(CONSOLE_CHUNK) as usize];
                match io.memory().read_bytes(GuestPhys(base), &mut bytes, MemTxAttrs::default()).is_ok() {
                    true => Ok(self.console.as_ref().map_or(bytes.len(), |c| c.write(&bytes)) as u64),
                    false => Err(SbiError::InvalidParam),
                }
            }
            // Input goes to the serial port.
            1 => Ok(0),
            2 if self.put(regs[0] as u8) => Ok(0),
            2 => Err(SbiError::Failed),
            _ => Err(SbiError::NotSupported),
        }
    }

    /// Sends one byte; false if the host does not take it now.
    fn put(&self, byte: u8) -> bool {
        self.console.as_ref().is_none_or(|c| c.write(&[byte]) == 1)
    }
}

/// True if all of it is RAM or ROM.
fn is_memory(io: &dyn CpuIo, base: u64, len: u64) -> bool {
    let Some(end) = base.checked_add(len) else { return false };
    let view = io.memory().load();
    let mut at = base;
    while at < end {
        match view.lookup(GuestPhys(at)) {
            Some(range) if range.ram_at(GuestPhys(at)).is_some() => at = range.end(),
            _ => return false,
        }
    }
    true
}

impl Hypercalls for Sbi {
    fn call(&self, io: &dyn CpuIo, vcpu: VcpuIndex, regs: &mut [u64; 8]) -> HypercallResult {
        Sbi::call(self, io, vcpu, regs)
    }
}

impl Lifecycle for Sbi {
    fn reset(&self, phase: ResetPhase) {
        if phase == ResetPhase::Hold {
            self.reset_harts();
        }
    }
}

impl Snapshot for Sbi {
    fn schema(&self) -> Schema {
        SCHEMA
    }

    fn save(&self) -> Result<Payload, SnapshotError> {
        let saved =
            |h: &Hart| SavedHart { state: h.state.load(Ordering::SeqCst), deadline: h.deadline.load(Ordering::SeqCst) };
        Payload::encode(SCHEMA, &Saved { harts: self.harts.iter().map(saved).collect() })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        if payload.schema != SCHEMA.name {
            return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: SCHEMA.name });
        }
        if payload.version != SCHEMA.version {
            let (found, expected) = (payload.version, SCHEMA.version);
            return Err(SnapshotError::WrongVersion { schema: SCHEMA.name, found, expected });
        }
        let saved: Saved = payload.decode()?;
        if saved.harts.len() != self.harts.len() || saved.harts.iter().any(|h| h.state > STOPPED) {
            return Err(SnapshotError::invalid(SCHEMA, "harts", "not those of this machine"));
        }
        for (hart, s) in self.harts.iter().zip(saved.harts) {
            hart.state.store(s.state, Ordering::SeqCst);
            hart.deadline.store(s.deadline, Ordering::SeqCst);
            arm(&hart.vcpu, &hart.timer, CpuPin::Stip, Some(s.deadline).filter(|&d| d != u64::MAX));
        }
        Ok(())
    }
}

/// Lowers `pin`, and raises it when the virtual clock reaches `deadline`; `None`: never.
fn arm(vcpu: &Arc<dyn VcpuHandle>, timer: &Timer, pin: CpuPin, deadline: Option<u64>) {
    match deadline {
        Some(at) if at <= timer.now() => {
            timer.disarm();
            vcpu.set_pin(pin, true);
        }
        Some(at) => {
            vcpu.set_pin(pin, false);
            timer.arm(at);
        }
        None => {
            timer.disarm();
            vcpu.set_pin(pin, false);
        }
    }
}

#[cfg(test)]
#[path = "sbi_tests.rs"]
mod tests;
