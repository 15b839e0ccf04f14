//! Telling kernel formats apart, and the Linux `Image` format of RISC-V.
//!
//! Spec: Linux `Documentation/arch/riscv/boot-image-header.rst`. Read: the plain
//! Image, the gzip'ed Image, the EFI zboot container around a gzip'ed Image, ELF.

use super::elf;
use super::{BootError, SUPPORTED_GUESTS, gzip};

/// `magic2` of the RISC-V boot image header, at offset 56: "RSC\x05".
const RISCV_MAGIC2: &[u8; 4] = b"RSC\x05";
/// The arm64 Image's magic, at the same offset: "ARM\x64".
const ARM64_MAGIC: &[u8; 4] = b"ARM\x64";
/// Length of both headers.
const HEADER: usize = 64;
/// Bound on an unpacked kernel; the largest distribution kernels are near 100 MiB.
const MAX_UNPACKED: u64 = 1 << 30;

/// Bytes that go to one place in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address, or an offset for images that may go anywhere.
    pub address: u64,
    /// The bytes from the file.
    pub data: Vec<u8>,
    /// Length in memory; the part beyond `data` is zero.
    pub memory_size: u64,
}

/// What kind of file a kernel was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// Linux `Image`, placed by the board at its kernel address plus `text_offset`.
    LinuxImage {
        /// Offset from a 2 MiB boundary (header field `text_offset`).
        text_offset: u64,
        /// Memory the kernel needs from its load address on, `.bss` included.
        image_size: u64,
    },
    /// ELF: goes where its program headers say.
    Elf,
    /// No header: placed by the board, entered at its first byte.
    Raw,
}

/// A kernel or firmware ready to be copied to guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// What the file was.
    pub format: KernelFormat,
    /// Entry point: absolute for ELF, else an offset from the load address.
    pub entry: u64,
    /// What to copy; one segment at address 0 for images without addresses.
    pub segments: Vec<Segment>,
}

impl Kernel {
    /// Bytes of guest memory needed from the load address on, for images without addresses.
    pub fn memory_size(&self) -> u64 {
        match self.format {
            KernelFormat::LinuxImage { image_size, .. } => image_size,
            _ => self.segments.iter().map(|s| s.memory_size).max().unwrap_or(0),
        }
    }

    /// Lowest and highest (exclusive) address of an ELF's segments.
    pub fn extent(&self) -> Option<(u64, u64)> {
        let low = self.segments.iter().map(|s| s.address).min()?;
        let high = self.segments.iter().map(|s| s.address.saturating_add(s.memory_size)).max()?;
        Some((low, high))
    }

    fn raw(bytes: Vec<u8>) -> Self {
        let memory_size = bytes.len() as u64;
        Kernel { format: KernelFormat::Raw, entry: 0, segments: vec![Segment { address: 0, data: bytes, memory_size }] }
    }
}

/// Loads the file given as `-kernel`. `what` is the option and the file, for errors;
/// `guest` the architecture, as in `mimus system <guest>`.
pub fn load_kernel(what: &str, bytes: Vec<u8>, guest: &str) -> Result<Kernel, BootError> {
    if bytes.is_empty() {
        return Err(BootError::Empty { what: what.into() });
    }
    if gzip::is_gzip(&bytes) {
        let inner = gzip::decompress(what, &bytes, MAX_UNPACKED)?;
        return load_unpacked(what, inner, guest);
    }
    if let Some(payload) = zboot_payload(what, &bytes)? {
        let inner = gzip::decompress(what, payload, MAX_UNPACKED)?;
        return load_unpacked(what, inner, guest);
    }
    load_unpacked(what, bytes, guest)
}

/// Loads the file given as `-bios`: an ELF, or raw bytes entered at the first.
pub fn load_firmware(what: &str, bytes: Vec<u8>, guest: &str) -> Result<Kernel, BootError> {
    if bytes.is_empty() {
        return Err(BootError::Empty { what: what.into() });
    }
    if elf::is_elf(&bytes) {
        return elf::load(what, &bytes, guest);
    }
    check_foreign(what, &bytes, guest)?;
    Ok(Kernel::raw(bytes))
}

fn load_unpacked(what: &str, bytes: Vec<u8>, guest: &str) -> Result<Kernel, BootError> {
    if elf::is_elf(&bytes) {
        return elf::load(what, &bytes, guest);
    }
    if magic_at(&bytes, 56) == Some(RISCV_MAGIC2) {
        if guest != "riscv64" {
            return Err(wrong_architecture(what, "a riscv64 Linux Image", "riscv64", guest));
        }
        return load_riscv_image(what, bytes);
    }
    check_foreign(what, &bytes, guest)?;
    if looks_like_text(&bytes) {
        return Err(BootError::unknown_format(what, "it looks like text", guest));
    }
    if bytes.len() < HEADER {
        return Err(BootError::Truncated {
            what: what.into(),
            detail: format!("it has {} bytes, less than any kernel's header", bytes.len()),
        });
    }
    if bytes[..HEADER].iter().all(|b| *b == 0) {
        return Err(BootError::unknown_format(what, "it begins with zeros", guest));
    }
    // Bare-metal programs have no header: QEMU runs them from the kernel address, so do we.
    log::info!("{what}: no known header, taken as raw code");
    Ok(Kernel::raw(bytes))
}

fn load_riscv_image(what: &str, bytes: Vec<u8>) -> Result<Kernel, BootError> {
    let text_offset = u64_at(&bytes, 8);
    let declared = u64_at(&bytes, 16);
    let flags = u64_at(&bytes, 24);
    if flags & 1 != 0 {
        return Err(BootError::Damaged {
            what: what.into(),
            detail: "its header says big-endian, which no RISC-V Linux is".into(),
        });
    }
    // The file leaves out .bss only, so it may be shorter than image_size, but not by much
    // more than .bss: half is far beyond what any kernel has.
    let file = bytes.len() as u64;
    if declared > MAX_UNPACKED || text_offset > MAX_UNPACKED {
        return Err(BootError::Damaged {
            what: what.into(),
            detail: format!("its header asks for {declared:#x} bytes at offset {text_offset:#x}"),
        });
    }
    if file < declared / 2 || pe_sections_end(&bytes).is_some_and(|end| end > file) {
        return Err(BootError::Truncated {
            what: what.into(),
            detail: format!("the file has {file} bytes, its header describes more ({declared} in memory)"),
        });
    }
    let image_size = declared.max(file);
    Ok(Kernel {
        format: KernelFormat::LinuxImage { text_offset, image_size },
        entry: 0,
        segments: vec![Segment { address: 0, data: bytes, memory_size: image_size }],
    })
}

/// Where the last section of a PE image (the EFI stub's view of an `Image`) ends in the file.
fn pe_sections_end(bytes: &[u8]) -> Option<u64> {
    if !bytes.starts_with(b"MZ") {
        return None;
    }
    let pe = u32_at(bytes, 60)? as usize;
    if bytes.get(pe..pe.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    let count = u16_at(bytes, pe + 6)?;
    let table = pe + 24 + usize::from(u16_at(bytes, pe + 20)?);
    let mut end = 0;
    for i in 0..usize::from(count) {
        let at = table + i * 40;
        end = end.max(u64::from(u32_at(bytes, at + 16)?) + u64::from(u32_at(bytes, at + 20)?));
    }
    Some(end)
}

/// The gzip data inside an EFI zboot image (Linux `drivers/firmware/efi/libstub/zboot-header.S`).
fn zboot_payload<'a>(what: &str, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, BootError> {
    if !bytes.starts_with(b"MZ\0\0zimg") || bytes.len() < HEADER {
        return Ok(None);
    }
    let kind: Vec<u8> = bytes[24..56].iter().copied().take_while(|b| *b != 0).collect();
    if kind != b"gzip" {
        let tool = match kind.as_slice() {
            b"zstd" | b"zstd22" => "zstd",
            b"xzkern" => "xz",
            b"lzma" => "lzma",
            b"lz4" => "lz4",
            _ => "an unknown method",
        };
        return Err(BootError::Compressed { what: format!("{what} (EFI zboot)"), tool });
    }
    let offset = u32_at(bytes, 8).unwrap_or(0) as usize;
    let size = u32_at(bytes, 12).unwrap_or(0) as usize;
    let end = offset.saturating_add(size);
    bytes.get(offset..end).map(Some).ok_or_else(|| BootError::Truncated {
        what: what.into(),
        detail: format!("its payload ends at byte {end}, the file at {}", bytes.len()),
    })
}

/// Errors for files that are recognised and cannot be run here.
pub(super) fn check_foreign(what: &str, bytes: &[u8], guest: &str) -> Result<(), BootError> {
    if let Some(tool) = compression(bytes) {
        return Err(BootError::Compressed { what: what.into(), tool });
    }
    let foreign = if magic_at(bytes, 0x202) == Some(b"HdrS") {
        // Kernels of 32-bit x86 have the same header.
        Some(("an x86 bzImage", if guest == "i386" { "i386" } else { "x86_64" }))
    } else if magic_at(bytes, 56) == Some(ARM64_MAGIC) {
        Some(("an AArch64 Linux Image", "aarch64"))
    } else if magic_at(bytes, 36) == Some(&[0x18, 0x28, 0x6f, 0x01]) {
        Some(("a 32-bit Arm zImage", "arm"))
    } else if magic_at(bytes, 56) == Some(RISCV_MAGIC2) {
        Some(("a riscv64 Linux Image", "riscv64"))
    } else {
        pe_machine(bytes)
    };
    match foreign {
        Some((found, arch)) if arch != guest => Err(wrong_architecture(what, found, arch, guest)),
        _ if bytes.starts_with(&[0x27, 0x05, 0x19, 0x56]) => Err(BootError::unknown_format(
            what,
            "it is a U-Boot uImage; boot the Image inside it (dumpimage -p 0)",
            guest,
        )),
        _ if bytes.starts_with(&[0xd0, 0x0d, 0xfe, 0xed]) => {
            Err(BootError::unknown_format(what, "it is a device tree: that is -dtb", guest))
        }
        _ if bytes.starts_with(b"070701") => {
            Err(BootError::unknown_format(what, "it is a cpio archive: that is -initrd", guest))
        }
        _ if bytes.starts_with(b"QFI\xfb")
            || bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && bytes.len() > 1 << 20 =>
        {
            Err(BootError::unknown_format(what, "it is a disk image: that is -drive file=…,if=virtio", guest))
        }
        _ => Ok(()),
    }
}

fn compression(bytes: &[u8]) -> Option<&'static str> {
    const MAGICS: &[(&[u8], &str)] = &[
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (b"BZh", "bzip2"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
        (&[0x04, 0x22, 0x4d, 0x18], "lz4"),
        (&[0x89, b'L', b'Z', b'O'], "lzop"),
    ];
    MAGICS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, tool)| *tool)
}

/// Architecture of a PE file (PE/COFF specification, "Machine Types").
fn pe_machine(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    if !bytes.starts_with(b"MZ") {
        return None;
    }
    let pe = u32_at(bytes, 60)? as usize;
    if bytes.get(pe..pe.checked_add(4)?)? != b"PE\0\0" {
        return None;
    }
    match u16_at(bytes, pe + 4)? {
        0x8664 => Some(("an x86-64 EFI program", "x86_64")),
        0x014c => Some(("an i386 EFI program", "i386")),
        0xaa64 => Some(("an AArch64 EFI program", "aarch64")),
        0x5064 => Some(("a riscv64 EFI program", "riscv64")),
        0x6264 => Some(("a LoongArch EFI program", "loongarch64")),
        _ => None,
    }
}

/// The error for a file of another architecture, saying where it would run if anywhere.
pub(super) fn wrong_architecture(what: &str, found: &str, arch: &str, guest: &str) -> BootError {
    let advice = if SUPPORTED_GUESTS.contains(&arch) {
        format!("use mimus system {arch}")
    } else {
        format!("use a {guest} kernel")
    };
    BootError::WrongArchitecture { what: what.into(), found: found.into(), guest: guest.into(), advice }
}

pub(super) fn looks_like_text(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(256)];
    head.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e))
}

fn magic_at(bytes: &[u8], at: usize) -> Option<&[u8; 4]> {
    bytes.get(at..at + 4)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn riscv_image(len: usize, text_offset: u64, image_size: u64) -> Vec<u8> {
        let mut bytes = vec![0x13u8; len];
        bytes[..64].fill(0);
        bytes[0..4].copy_from_slice(&[0x6f, 0, 0, 0]);
        bytes[8..16].copy_from_slice(&text_offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&image_size.to_le_bytes());
        bytes[48..56].copy_from_slice(b"RISCV\0\0\0");
        bytes[56..60].copy_from_slice(RISCV_MAGIC2);
        bytes
    }

    #[test]
    fn plain_and_gzipped_image() {
        let image = riscv_image(8192, 0x20_0000, 12288);
        let kernel = load_kernel("-kernel k", image.clone(), "riscv64").unwrap();
        assert_eq!(kernel.format, KernelFormat::LinuxImage { text_offset: 0x20_0000, image_size: 12288 });
        assert_eq!(kernel.memory_size(), 12288);
        assert_eq!(load_kernel("-kernel k", gzip::tests::compress(&image), "riscv64").unwrap(), kernel);
    }

    #[test]
    fn zboot_container() {
        let image = riscv_image(8192, 0, 8192);
        let gz = gzip::tests::compress(&image);
        let mut file = vec![0; 64];
        file[..8].copy_from_slice(b"MZ\0\0zimg");
        file[8..12].copy_from_slice(&64u32.to_le_bytes());
        file[12..16].copy_from_slice(&(gz.len() as u32).to_le_bytes());
        file[24..28].copy_from_slice(b"gzip");
        file.extend(&gz);
        assert!(matches!(
            load_kernel("-kernel k", file.clone(), "riscv64").unwrap().format,
            KernelFormat::LinuxImage { .. }
        ));
        file.truncate(file.len() - 10);
        assert!(load_kernel("-kernel k", file, "riscv64").unwrap_err().to_string().contains("truncated"));
    }

    #[test]
    fn a_truncated_image_is_refused() {
        let mut image = riscv_image(65536, 0, 65536);
        image.truncate(20000);
        let text = load_kernel("-kernel k", image, "riscv64").unwrap_err().to_string();
        assert!(text.contains("truncated") && text.contains("20000"), "{text}");
    }

    #[test]
    fn foreign_kernels_are_named() {
        let mut bz = vec![1u8; 4096];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        let mut arm = vec![1u8; 4096];
        arm[56..60].copy_from_slice(ARM64_MAGIC);
        for (bytes, name) in [(bz, "an x86 bzImage"), (arm, "an AArch64 Linux Image")] {
            let text = load_kernel("-kernel vmlinuz", bytes, "riscv64").unwrap_err().to_string();
            assert!(
                text.starts_with(&format!("-kernel vmlinuz is {name}; this is mimus system riscv64: use ")),
                "{text}"
            );
        }
        let text = load_kernel("-kernel k", riscv_image(4096, 0, 4096), "x86_64").unwrap_err().to_string();
        assert!(text.ends_with("use mimus system riscv64"), "{text}");
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        let cases: [(&[u8], &str); 6] = [
            (b"#!/bin/sh\necho hello, this is not a kernel\n", "text"),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0, 1, 2], "xz -d"),
            (&[0xd0, 0x0d, 0xfe, 0xed, 0, 0], "-dtb"),
            (b"0707010000", "-initrd"),
            (&[0x13, 0, 0, 0xff], "truncated"),
            (&[0; 4096], "zeros"),
        ];
        for (bytes, says) in cases {
            let text = load_kernel("-kernel k", bytes.to_vec(), "riscv64").unwrap_err().to_string();
            assert!(text.contains(says) && text.lines().count() == 1, "{says}: {text}");
        }
    }

    #[test]
    fn raw_firmware_is_taken_as_it_is() {
        let fw = load_firmware("-bios f", vec![0x13; 100], "riscv64").unwrap();
        assert_eq!((fw.format, fw.memory_size()), (KernelFormat::Raw, 100));
    }

    /// Whatever the bytes are, an answer comes back.
    #[test]
    fn mutated_headers_never_panic() {
        let mut seed = 0x1234_5678_9abc_def1u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..20_000 {
            let mut bytes = match round % 3 {
                0 => riscv_image(256, 0, 256),
                1 => b"MZ\0\0zimg".iter().copied().chain(std::iter::repeat_n(7, 200)).collect(),
                _ => super::elf::tests::elf(243, 0x8020_0000, 64),
            };
            for _ in 0..4 {
                let at = next() as usize % bytes.len();
                bytes[at] = next() as u8;
            }
            bytes.truncate(1 + next() as usize % bytes.len());
            let _ = load_kernel("-kernel k", bytes.clone(), "riscv64");
            let _ = load_firmware("-bios k", bytes, "riscv64");
        }
    }
}
