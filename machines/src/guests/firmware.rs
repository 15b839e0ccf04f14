//! Firmware and boot loaders for PCs, for tests with real ones: OVMF, GRUB, memtest86+.

use super::{GuestSpec, Keep, Package};

const SUITES: &[&str] = &["bookworm", "trixie"];

/// OVMF, the UEFI of PCs, plain and with secure boot in system management mode.
pub const OVMF: GuestSpec = GuestSpec {
    name: "ovmf",
    parts: &[(
        Package { name: "ovmf", architecture: None, suites: SUITES, dependency: None },
        &[
            Keep { path_ends: "OVMF/OVMF_CODE_4M.fd", name: "code.fd" },
            Keep { path_ends: "OVMF/OVMF_CODE_4M.secboot.fd", name: "code-secboot.fd" },
            Keep { path_ends: "OVMF/OVMF_VARS_4M.fd", name: "vars.fd" },
        ],
    )],
};

/// Files of a platform's GRUB.
macro_rules! grub_files {
    ($platform:literal: $($name:literal)*) => {
        &[$(Keep { path_ends: concat!($platform, "/", $name), name: $name }),*]
    };
}

/// GRUB for BIOSes: its boot sector, what an image is made from, and the program that makes it.
pub const GRUB_PC: GuestSpec = GuestSpec {
    name: "grub-pc",
    parts: &[
        (
            Package { name: "grub-pc-bin", architecture: Some("amd64"), suites: SUITES, dependency: None },
            grub_files!("i386-pc":
                "boot.img" "diskboot.img" "kernel.img" "lzma_decompress.img" "moddep.lst"
                "biosdisk.mod" "boot.mod" "bufio.mod" "configfile.mod" "crypto.mod" "datetime.mod" "extcmd.mod"
                "fat.mod" "fshelp.mod" "gettext.mod" "linux.mod" "mmap.mod" "net.mod" "normal.mod" "part_msdos.mod"
                "priority_queue.mod" "relocator.mod" "serial.mod" "terminal.mod" "terminfo.mod" "vbe.mod"
                "verifiers.mod" "video.mod" "video_fb.mod"),
        ),
        (
            Package { name: "grub-common", architecture: Some("amd64"), suites: SUITES, dependency: None },
            &[Keep { path_ends: "bin/grub-mkimage", name: "grub-mkimage" }],
        ),
        (
            Package { name: "libdevmapper1.02.1", architecture: Some("amd64"), suites: SUITES, dependency: None },
            &[Keep { path_ends: "libdevmapper.so.1.02.1", name: "libdevmapper.so.1.02.1" }],
        ),
    ],
};

/// GRUB for UEFI, in one file.
pub const GRUB_EFI: GuestSpec = GuestSpec {
    name: "grub-efi",
    parts: &[(
        Package { name: "grub-efi-amd64-bin", architecture: Some("amd64"), suites: SUITES, dependency: None },
        &[Keep { path_ends: "monolithic/grubx64.efi", name: "grubx64.efi" }],
    )],
};

/// memtest86+, for 64 and 32 bits; both start as Linux kernels do.
pub const MEMTEST: GuestSpec = GuestSpec {
    name: "memtest86+",
    parts: &[(
        Package { name: "memtest86+", architecture: Some("amd64"), suites: SUITES, dependency: None },
        &[
            Keep { path_ends: "boot/memtest86+x64.bin", name: "x64.bin" },
            Keep { path_ends: "boot/memtest86+ia32.bin", name: "ia32.bin" },
        ],
    )],
};
