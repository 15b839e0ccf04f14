//! KVM as one of the accelerators.

#[cfg(not(target_arch = "x86_64"))]
use crate::error::unavailable;
use crate::options::NAME;
use mimus_arch::GuestArch;
use mimus_core::accel::{AccelCaps, AccelError, AccelVm, Accelerator, Unavailable, VmConfig};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The accelerator.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmAccelerator;

#[cfg(target_arch = "x86_64")]
impl KvmAccelerator {
    fn check_guest(guest: GuestArch) -> Result<(), Unavailable> {
        match guest {
            GuestArch::X86_64 | GuestArch::I386 => Ok(()),
            other => Err(crate::error::foreign_guest(other)),
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Accelerator for KvmAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self, guest: GuestArch) -> Result<AccelCaps, Unavailable> {
        self.probe_with(guest, &BTreeMap::new())
    }

    fn probe_with(&self, guest: GuestArch, options: &BTreeMap<String, String>) -> Result<AccelCaps, Unavailable> {
        Self::check_guest(guest)?;
        let said = |e: AccelError| match e {
            AccelError::Unavailable(u) => u,
            other => crate::error::unavailable(other.to_string()),
        };
        // Options that are wrong are no reason to run the guest on something else: making the machine tells.
        let options = crate::options::KvmOptions::parse(options).unwrap_or_default();
        let kvm = crate::vm::open(&options.device).map_err(said)?;
        crate::vm::require(&kvm).map_err(said)?;
        // Another hypervisor may have the processor.
        crate::vm::create_fd(&kvm).map_err(said)?;
        Ok(AccelCaps { max_vcpus: crate::vm::most_vcpus(&kvm), debug: true, icount: false })
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
        Self::check_guest(config.arch)?;
        Ok(crate::vm::KvmVm::create(config)?)
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Accelerator for KvmAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self, _guest: GuestArch) -> Result<AccelCaps, Unavailable> {
        let host = std::env::consts::ARCH;
        Err(unavailable(format!("there is no support for {host} hosts yet: use -accel tcg")))
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn AccelVm>, AccelError> {
        Err(self.probe(config.arch).map_or_else(AccelError::from, |_| unavailable("no VM").into()))
    }
}
