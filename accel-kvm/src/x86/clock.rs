//! TSC and kvmclock: they stand still with the machine.
//!
//! kvmclock is the machine's virtual clock, so that it needs no state of its own. The time-stamp counters are
//! frozen at the value they had at the stop (or that was set meanwhile) and let go together, through
//! the offset that KVM adds to the host's counter: all vCPUs stay as far apart as they were.

use crate::handle::VcpuCore;
use crate::sys::{ioctl, x86 as sys_x86};
use crate::vm::VmShared;
use crate::x86::msrs;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clock_data};
use mimus_arch::x86::msr;
use mimus_arch::x86::state::Msr;
use mimus_core::accel::{GuestClock, TscClock, VcpuIndex};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The guest's counter without its offset when the host's is at `host`.
fn scaled(vm: &VmShared, vcpu: &VcpuCore, host: u64) -> u64 {
    let guest_khz = vcpu.tsc_khz.load(Ordering::Relaxed);
    if guest_khz == 0 || vm.host_tsc_khz == 0 || guest_khz == vm.host_tsc_khz {
        return host;
    }
    (u128::from(host) * u128::from(guest_khz) / u128::from(vm.host_tsc_khz)) as u64
}

fn offset(vcpu: &VcpuCore) -> Option<u64> {
    ioctl::get_vcpu_attr(&vcpu.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into()).ok()
}

/// Looks at what a vCPU's counter adds to the host's: the guest may have set it. Not while it is in `KVM_RUN`.
pub fn note_offset(vm: &VmShared, vcpu: &VcpuCore) {
    let read = || msrs::read_one(&vcpu.fd, msr::TSC).map(|tsc| tsc.wrapping_sub(scaled(vm, vcpu, sys_x86::host_tsc())));
    if let Some(now) = offset(vcpu).or_else(read) {
        vcpu.tsc_offset.store(now, Ordering::Relaxed);
    }
}

/// The counters as a local APIC outside of the kernel sees them.
pub struct Tsc {
    vm: Arc<VmShared>,
    /// The guest sees the host's counter, whatever the kernel says of an offset.
    fixed: bool,
}

impl Tsc {
    /// Those of a VM.
    pub fn of(vm: &Arc<VmShared>) -> Self {
        Self { vm: vm.clone(), fixed: vm.tsc_is_fixed() }
    }
}

impl TscClock for Tsc {
    fn now(&self, vcpu: VcpuIndex) -> u64 {
        let host = sys_x86::host_tsc();
        let vcpus = self.vm.vcpus();
        let Some(vcpu) = vcpus.get(vcpu.as_usize()) else { return host };
        if self.fixed {
            return host;
        }
        let frozen = *vcpu.frozen_tsc();
        frozen.unwrap_or_else(|| scaled(&self.vm, vcpu, host).wrapping_add(vcpu.tsc_offset.load(Ordering::Relaxed)))
    }

    fn hz(&self) -> u64 {
        let first = self.vm.vcpus().first().map_or(0, |v| v.tsc_khz.load(Ordering::Relaxed));
        let khz = if self.fixed || first == 0 { self.vm.host_tsc_khz } else { first };
        u64::from(khz.max(1)) * 1000
    }
}

/// The counter of a vCPU that is not in `KVM_RUN`.
pub fn read_tsc(vcpu: &VcpuCore) -> u64 {
    let frozen = *vcpu.frozen_tsc();
    frozen.or_else(|| msrs::read_one(&vcpu.fd, msr::TSC)).unwrap_or(0)
}

/// Sets it; it counts on from there at once, or when the machine's time does.
pub fn write_tsc(vcpu: &VcpuCore, value: u64) {
    if let Some(frozen) = &mut *vcpu.frozen_tsc() {
        *frozen = value;
    }
    let msr = Msr { index: msr::TSC, value };
    if let Err(e) = msrs::write(&vcpu.fd, &[msr], &[]) {
        log::debug!("kvm: the time-stamp counter cannot be set: {e}");
    }
}

impl GuestClock for VmShared {
    fn start(&self) {
        let host = sys_x86::host_tsc();
        for vcpu in self.vcpus().iter() {
            let Some(value) = vcpu.frozen_tsc().take() else { continue };
            let offset = value.wrapping_sub(scaled(self, vcpu, host));
            let set = ioctl::set_vcpu_attr(&vcpu.fd, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into(), offset);
            if set.is_err() {
                write_tsc(vcpu, value);
            }
            note_offset(self, vcpu);
        }
        let clock = kvm_clock_data { clock: self.clock.now(), ..Default::default() };
        if self.caps.clock
            && let Err(e) = self.fd.set_clock(&clock)
        {
            log::warn!("kvm: kvmclock cannot be set: {e}");
        }
    }

    fn stop(&self) {
        let host = sys_x86::host_tsc();
        for vcpu in self.vcpus().iter() {
            let value = match offset(vcpu) {
                Some(offset) => scaled(self, vcpu, host).wrapping_add(offset),
                None => read_tsc(vcpu),
            };
            *vcpu.frozen_tsc() = Some(value);
            // Tells a guest that uses kvmclock that it was stopped; others give an error.
            let _ = vcpu.fd.kvmclock_ctrl();
        }
    }
}
