//! What this host's KVM can do, for people.

use kvm_bindings::*;
use mimus_core::accel::{AccelError, Unavailable};

use crate::error::unavailable;
use crate::options::KvmOptions;
use crate::vm;

/// Capabilities that make a difference to a machine, with what they are for.
const ABILITIES: &[(u32, &str)] = &[
    (KVM_CAP_IRQCHIP, "interrupt controllers in the kernel (kernel-irqchip=on)"),
    (KVM_CAP_SPLIT_IRQCHIP, "local APICs in the kernel, the others here (kernel-irqchip=split)"),
    (KVM_CAP_PIT2, "interval timer in the kernel"),
    (KVM_CAP_IRQFD, "interrupts by file descriptor"),
    (KVM_CAP_IOEVENTFD, "doorbells by file descriptor"),
    (KVM_CAP_READONLY_MEM, "read-only memory"),
    (KVM_CAP_DIRTY_LOG_RING, "rings of written pages"),
    (KVM_CAP_TSC_DEADLINE_TIMER, "TSC-deadline timer"),
    (KVM_CAP_ADJUST_CLOCK, "kvmclock that can be set"),
    (KVM_CAP_X86_SMM, "system management mode"),
    (KVM_CAP_NESTED_STATE, "virtual machines inside guests (nested)"),
    (KVM_CAP_X86_USER_SPACE_MSR, "model-specific registers handled here"),
    (KVM_CAP_SYNC_REGS, "registers without system calls"),
    (KVM_CAP_TSC_CONTROL, "time-stamp counters of another frequency"),
    (KVM_CAP_SET_GUEST_DEBUG, "debugging"),
];

/// The host's KVM in figures and abilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Version of the interface.
    pub version: i32,
    /// vCPUs a machine should have at most.
    pub recommended_vcpus: usize,
    /// vCPUs a machine can have at most.
    pub max_vcpus: u32,
    /// Memory slots.
    pub memory_slots: usize,
    /// Each ability, and whether it is there.
    pub list: Vec<(&'static str, bool)>,
}

impl Abilities {
    /// Asks `/dev/kvm`.
    pub fn of_host() -> Result<Self, Unavailable> {
        let said = |e: AccelError| match e {
            AccelError::Unavailable(u) => u,
            other => unavailable(other.to_string()),
        };
        let kvm = vm::open(&KvmOptions::default().device).map_err(said)?;
        let has = |cap: u32| kvm.check_extension_raw(cap.into()) > 0;
        Ok(Self {
            version: kvm.get_api_version(),
            recommended_vcpus: kvm.get_nr_vcpus(),
            max_vcpus: vm::most_vcpus(&kvm),
            memory_slots: kvm.get_nr_memslots(),
            list: ABILITIES.iter().map(|(cap, what)| (*what, has(*cap))).collect(),
        })
    }
}
