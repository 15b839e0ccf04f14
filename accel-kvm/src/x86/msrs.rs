//! Model-specific registers of a vCPU: which there are, reading and writing many at once.

use crate::error::{errno, refused};
use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use mimus_arch::x86::msr;
use mimus_arch::x86::state::Msr;
use mimus_core::accel::{AccelError, StateError};

/// MSRs that are not state: hypercall pages and time pages of other hypervisors' interfaces, whose value does
/// things; and counters that only time moves.
fn is_state(index: u32) -> bool {
    // Hyper-V's, IA32_MPERF, IA32_APERF.
    !msr::has_own_field(index) && !(0x4000_0000..0x4000_2000).contains(&index) && !matches!(index, 0xe7 | 0xe8)
}

/// MSRs that are state though no list of KVM's has them.
const UNLISTED: &[u32] = &[msr::DEBUGCTL, msr::MTRR_DEF_TYPE, msr::MCG_STATUS];

/// Fixed-range MTRRs, and as many variable ones as KVM has (8).
fn mtrrs() -> impl Iterator<Item = u32> {
    let fixed = [msr::MTRR_FIX64K_00000, msr::MTRR_FIX16K_80000, msr::MTRR_FIX16K_A0000];
    let fixed = fixed.into_iter().chain(msr::MTRR_FIX4K_C0000..msr::MTRR_FIX4K_C0000 + 8);
    fixed.chain(msr::MTRR_PHYS_BASE0..msr::MTRR_PHYS_BASE0 + 16)
}

/// Candidates for the saved list.
pub fn candidates(kvm: &Kvm) -> Result<Vec<u32>, AccelError> {
    let list = kvm.get_msr_index_list().map_err(errno("list model-specific registers"))?;
    let mut all: Vec<u32> = list.as_slice().iter().copied().chain(UNLISTED.iter().copied()).chain(mtrrs()).collect();
    all.retain(|i| is_state(*i));
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Reads as many as the kernel gives, skipping those it refuses.
pub fn read_available(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, AccelError> {
    let mut out = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let (mut batch, read) = read_batch(vcpu, part).map_err(refused("read model-specific registers"))?;
        batch.truncate(read);
        out.append(&mut batch);
        // The one it stopped at is not available.
        rest = &rest[(read + usize::from(read < part.len())).min(rest.len())..];
    }
    Ok(out)
}

fn read_batch(vcpu: &VcpuFd, indices: &[u32]) -> std::io::Result<(Vec<Msr>, usize)> {
    let entries: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| std::io::Error::from_raw_os_error(libc::E2BIG))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))?;
    let list = msrs.as_slice().iter().map(|e| Msr { index: e.index, value: e.data }).collect();
    Ok((list, read))
}

/// One register.
pub fn read_one(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    match read_batch(vcpu, &[index]) {
        Ok((list, 1)) => list.first().map(|m| m.value),
        _ => None,
    }
}

/// A value of another engine's that does not matter where there is no such register: features that can be turned on
/// until the next reset, all of them off.
///
/// Without system management mode, where its memory would be is no state either.
fn says_nothing(m: &Msr) -> bool {
    const LOCKED: u64 = 1;
    m.index == msr::FEATURE_CONTROL && m.value == LOCKED || m.index == msr::SMBASE
}

/// Writes all. One the kernel refuses is an error unless it is zero, or `initial` has the same value: the
/// guest cannot tell then.
pub fn write(vcpu: &VcpuFd, msrs: &[Msr], initial: &[Msr]) -> Result<(), StateError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entry = |m: &Msr| kvm_msr_entry { index: m.index, reserved: 0, data: m.value };
        let entries: Vec<_> = part.iter().map(entry).collect();
        let batch = Msrs::from_entries(&entries).map_err(|_| StateError("too many MSRs".to_owned()))?;
        let written = vcpu.set_msrs(&batch).map_err(|e| StateError(format!("MSRs: {e}")))?;
        if let Some(m) = part.get(written) {
            let same = initial.iter().any(|i| i == m);
            if m.value != 0 && !same && !says_nothing(m) {
                let Msr { index, value } = m;
                return Err(StateError(format!("this host's KVM does not take MSR {index:#x} = {value:#x}")));
            }
            log::debug!("kvm: MSR {:#x} = {:#x} is not taken", m.index, m.value);
        }
        rest = &rest[(written + usize::from(written < part.len())).min(rest.len())..];
    }
    Ok(())
}
