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
            hart.deadline.store(u64::MAX, Ordering::SeqCst);
            hart.timer.disarm();
            hart.vcpu.set_pin(CpuPin::Stip, false);
            hart.vcpu.set_pin(CpuPin::Ssip, false);
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
                after = HypercallResult::Leave;
                self.system_reset(regs[0])
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
                if let Some(console) = &self.console {
                    console.write(&[regs[0] as u8]);
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
            EXT_BASE, EXT_TIME, EXT_IPI, EXT_RFENCE, EXT_HSM, EXT_SRST, EXT_DBCN, LEGACY_SET_TIMER, LEGACY_PUTCHAR,
            LEGACY_GETCHAR, LEGACY_SHUTDOWN,
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

    fn started(&self) -> Vec<&Hart> {
        self.harts.iter().filter(|h| h.state.load(Ordering::SeqCst) == STARTED).collect()
    }

    fn send_ipi(&self, mask: u64, base: u64) -> SbiResult {
        for hart in self.select(mask, base)? {
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
                let hart = usize::try_from(regs[0]).ok().and_then(|i| self.harts.get(i)).ok_or(SbiError::InvalidParam)?;
                if io.memory().load().lookup(GuestPhys(regs[1])).is_none() {
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
                hart.timer.disarm();
                // In this order: who sees it stopped may start it at once.
                (self.power_off)(vcpu);
                hart.state.store(STOPPED, Ordering::SeqCst);
                Ok((0, HypercallResult::Leave))
            }
            2 => {
                let hart = usize::try_from(regs[0]).ok().and_then(|i| self.harts.get(i)).ok_or(SbiError::InvalidParam)?;
                done(u64::from(hart.state.load(Ordering::SeqCst)))
            }
            // Retentive suspend is WFI; a non-retentive one may be refused.
            3 if regs[0] == 0 => Ok((0, HypercallResult::Wait)),
            _ => Err(SbiError::NotSupported),
        }
    }

    /// Section 10.
    fn system_reset(&self, kind: u64) -> SbiResult {
        (self.request)(match kind {
            0 => SysconRequest::PowerOff,
            1 | 2 => SysconRequest::Reset,
            _ => return Err(SbiError::InvalidParam),
        });
        Ok(0)
    }

    /// Section 12.
    fn debug_console(&self, io: &dyn CpuIo, function: u64, regs: &[u64; 8]) -> SbiResult {
        match function {
            0 => {
                let len = regs[0].min(CONSOLE_CHUNK);
                let mut bytes = vec![0; len as usize];
                let read = io.memory().read_bytes(GuestPhys(regs[1]), &mut bytes, MemTxAttrs::default());
                if regs[2] != 0 || !read.is_ok() {
                    return Err(SbiError::InvalidParam);
                }
                Ok(self.console.as_ref().map_or(len, |c| c.write(&bytes) as u64))
            }
            // Input goes to the serial port.
            1 => Ok(0),
            2 => {
                if let Some(console) = &self.console {
                    console.write(&[regs[0] as u8]);
                }
                Ok(0)
            }
            _ => Err(SbiError::NotSupported),
        }
    }
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
        let saved = |h: &Hart| SavedHart {
            state: h.state.load(Ordering::SeqCst),
            deadline: h.deadline.load(Ordering::SeqCst),
        };
        Payload::encode(SCHEMA, &Saved { harts: self.harts.iter().map(saved).collect() })
    }

    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        if (payload.schema.as_str(), payload.version) != (SCHEMA.name, SCHEMA.version) {
            return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: SCHEMA.name });
        }
        let saved: Saved = payload.decode()?;
        if saved.harts.len() != self.harts.len() || saved.harts.iter().any(|h| h.state > START_PENDING) {
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
