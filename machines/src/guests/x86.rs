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

/// The same kernel with the modules of SATA disks and CD-ROM drives.
pub const X86_64_SATA: GuestSpec = GuestSpec {
    name: "x86_64-sata",
    parts: &[(
        Package {
            name: "linux-image-amd64",
            architecture: Some("amd64"),
            suites: SUITES,
            dependency: Some("linux-image-"),
        },
        &[
            Keep { path_ends: "boot/vmlinuz-*", name: "vmlinuz" },
            Keep { path_ends: "scsi/scsi_common.ko*", name: "scsi_common.ko" },
            Keep { path_ends: "scsi/scsi_mod.ko*", name: "scsi_mod.ko" },
            Keep { path_ends: "ata/libata.ko*", name: "libata.ko" },
            Keep { path_ends: "ata/libahci.ko*", name: "libahci.ko" },
            Keep { path_ends: "ata/ahci.ko*", name: "ahci.ko" },
            Keep { path_ends: "crypto/crct10dif_common.ko*", name: "crct10dif_common.ko" },
            Keep { path_ends: "crypto/crct10dif_generic.ko*", name: "crct10dif_generic.ko" },
            Keep { path_ends: "lib/crc-t10dif.ko*", name: "crc-t10dif.ko" },
            Keep { path_ends: "lib/crc64.ko*", name: "crc64.ko" },
            Keep { path_ends: "crypto/crc64_rocksoft_generic.ko*", name: "crc64_rocksoft_generic.ko" },
            Keep { path_ends: "lib/crc64-rocksoft.ko*", name: "crc64-rocksoft.ko" },
            Keep { path_ends: "block/t10-pi.ko*", name: "t10-pi.ko" },
            Keep { path_ends: "scsi/sd_mod.ko*", name: "sd_mod.ko" },
            Keep { path_ends: "cdrom/cdrom.ko*", name: "cdrom.ko" },
            Keep { path_ends: "scsi/sr_mod.ko*", name: "sr_mod.ko" },
        ],
    )],
};

/// Modules of [`X86_64_SATA`], each after those it needs.
pub const SATA_MODULES: &[&str] = &[
    "scsi_common.ko",
    "scsi_mod.ko",
    "libata.ko",
    "libahci.ko",
    "ahci.ko",
    "crct10dif_common.ko",
    "crct10dif_generic.ko",
    "crc-t10dif.ko",
    "crc64.ko",
    "crc64_rocksoft_generic.ko",
    "crc64-rocksoft.ko",
    "t10-pi.ko",
    "sd_mod.ko",
    "cdrom.ko",
    "sr_mod.ko",
];

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
