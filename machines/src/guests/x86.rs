//! Guests for PCs: Debian's kernels, a static busybox, SeaBIOS.

use super::{GuestSpec, Keep, Package};

/// Suites of Debian, first choice first.
const SUITES: &[&str] = &["bookworm", "trixie"];

/// A kernel and the modules of virtio devices and the power button.
macro_rules! kernel {
    ($name:literal, $package:literal, $architecture:literal) => {
        GuestSpec {
            name: $name,
            parts: &[(
                Package {
                    name: $package,
                    architecture: Some($architecture),
                    suites: SUITES,
                    dependency: Some("linux-image-"),
                },
                KERNEL_FILES,
            )],
        }
    };
}

const KERNEL_FILES: &[Keep] = &[
    Keep { path_ends: "boot/vmlinuz-*", name: "vmlinuz" },
    Keep { path_ends: "virtio/virtio.ko*", name: "virtio.ko" },
    Keep { path_ends: "virtio/virtio_ring.ko*", name: "virtio_ring.ko" },
    Keep { path_ends: "virtio/virtio_mmio.ko*", name: "virtio_mmio.ko" },
    Keep { path_ends: "virtio/virtio_pci.ko*", name: "virtio_pci.ko" },
    Keep { path_ends: "virtio/virtio_pci_modern_dev.ko*", name: "virtio_pci_modern_dev.ko" },
    Keep { path_ends: "virtio/virtio_pci_legacy_dev.ko*", name: "virtio_pci_legacy_dev.ko" },
    Keep { path_ends: "block/virtio_blk.ko*", name: "virtio_blk.ko" },
    Keep { path_ends: "net/virtio_net.ko*", name: "virtio_net.ko" },
    Keep { path_ends: "net/net_failover.ko*", name: "net_failover.ko" },
    Keep { path_ends: "net/core/failover.ko*", name: "failover.ko" },
    Keep { path_ends: "acpi/button.ko*", name: "button.ko" },
];

/// Debian's kernel for clouds.
pub const X86_64_KERNEL: GuestSpec = kernel!("x86_64-kernel", "linux-image-cloud-amd64", "amd64");

/// Debian's kernel for PCs.
pub const X86_64_GENERIC: GuestSpec = kernel!("x86_64-generic", "linux-image-amd64", "amd64");

/// Debian's kernel for 32-bit PCs without PAE.
pub const I386_KERNEL: GuestSpec = kernel!("i386-kernel", "linux-image-686", "i386");

/// Debian's kernel for 32-bit PCs with PAE.
pub const I386_PAE: GuestSpec = kernel!("i386-pae", "linux-image-686-pae", "i386");

/// Modules of these kernels, each after those it needs.
pub const MODULES: &[&str] = &[
    "virtio.ko",
    "virtio_ring.ko",
    "virtio_mmio.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
    "failover.ko",
    "net_failover.ko",
    "virtio_net.ko",
    "button.ko",
];

/// A static busybox with every applet.
pub const X86_64_BUSYBOX: GuestSpec = GuestSpec {
    name: "x86_64-busybox",
    parts: &[(
        Package { name: "busybox-static", architecture: Some("amd64"), suites: SUITES, dependency: None },
        &[Keep { path_ends: "bin/busybox", name: "busybox" }],
    )],
};

/// The same for 32-bit PCs.
pub const I386_BUSYBOX: GuestSpec = GuestSpec {
    name: "i386-busybox",
    parts: &[(
        Package { name: "busybox-static", architecture: Some("i386"), suites: SUITES, dependency: None },
        &[Keep { path_ends: "bin/busybox", name: "busybox" }],
    )],
};

/// SeaBIOS, the BIOS of `pc` and `q35`.
pub const SEABIOS: GuestSpec = GuestSpec {
    name: "seabios",
    parts: &[(
        Package { name: "seabios", architecture: None, suites: SUITES, dependency: None },
        &[Keep { path_ends: "seabios/bios-256k.bin", name: "bios-256k.bin" }],
    )],
};
