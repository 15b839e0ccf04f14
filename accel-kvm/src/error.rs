//! The host's refusals, in words that say what to do.

use crate::options::NAME;
use mimus_arch::GuestArch;
use mimus_core::accel::{AccelError, Unavailable};
use std::io;
use std::path::Path;

/// Cannot be used here, because.
pub fn unavailable(reason: impl Into<String>) -> Unavailable {
    Unavailable { accel: NAME, reason: reason.into() }
}

/// The host refuses `what`.
pub fn refused(what: impl Into<String>) -> impl FnOnce(io::Error) -> AccelError {
    let what = what.into();
    move |source| AccelError::Host { accel: NAME, what, source }
}

/// The same for an error of `kvm-ioctls`.
pub fn errno(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> AccelError {
    let refuse = refused(what);
    move |e| refuse(io::Error::from_raw_os_error(e.errno()))
}

/// The device node cannot be opened.
pub fn cannot_open(device: &Path, error: io::Error) -> Unavailable {
    let path = device.display();
    unavailable(match error.raw_os_error() {
        Some(libc::ENOENT) => format!(
            "{path} does not exist: load the module (modprobe kvm_intel or kvm_amd), turn virtualisation on in \
             the firmware setup, or use -accel tcg"
        ),
        Some(libc::EACCES | libc::EPERM) => format!(
            "no permission to open {path}: add yourself to its group (sudo usermod -aG kvm $USER, then log in \
             again), or use -accel tcg"
        ),
        Some(libc::ENODEV | libc::ENXIO) => format!(
            "{path} has no driver behind it: load the module (modprobe kvm_intel or kvm_amd), or use -accel tcg; \
             inside a virtual machine its host must allow nested virtualisation"
        ),
        _ => format!("cannot open {path}: {error}: use -accel tcg"),
    })
}

/// A virtual machine cannot be made.
pub fn cannot_create(error: io::Error) -> AccelError {
    let reason = match error.raw_os_error() {
        Some(libc::EBUSY) => "the processor's virtualisation is in use by another hypervisor (VirtualBox, VMware): \
                              stop it, or use -accel tcg"
            .to_owned(),
        Some(libc::EOPNOTSUPP | libc::ENODEV | libc::EIO) => {
            "the processor's virtualisation cannot be turned on: turn it on in the firmware setup; inside a \
             virtual machine its host must allow nested virtualisation; or use -accel tcg"
                .to_owned()
        }
        Some(libc::ENOMEM) => "the host has no memory left for another virtual machine".to_owned(),
        _ => return refused("create a virtual machine")(error),
    };
    unavailable(reason).into()
}

/// Another architecture than the host's.
pub fn foreign_guest(guest: GuestArch) -> Unavailable {
    let host = std::env::consts::ARCH;
    let article = if host.starts_with(['a', 'x']) { "an" } else { "a" };
    unavailable(format!("{article} {host} host cannot run {guest} code directly: use -accel tcg"))
}

/// The file is not KVM's, or of another age.
pub fn wrong_version(device: &Path, version: i32) -> Unavailable {
    if version < 0 {
        return unavailable(format!("{} is not KVM's device: use /dev/kvm, or -accel tcg", device.display()));
    }
    unavailable(format!(
        "{} speaks KVM version {version}, not 12: the kernel is too old or too new, use -accel tcg",
        device.display()
    ))
}

/// The kernel lacks something it cannot be done without.
pub fn lacks(what: &str) -> Unavailable {
    unavailable(format!("the kernel's KVM lacks {what}: use a newer kernel, or -accel tcg"))
}

/// More vCPUs than the host can.
pub fn too_many_vcpus(wanted: u32, most: u32) -> AccelError {
    unavailable(format!("{wanted} vCPUs are more than this host's KVM can give a machine: use -smp {most} or less"))
        .into()
}
