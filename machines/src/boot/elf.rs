//! ELF executables: kernels (`vmlinux`), bare-metal programs, firmware.
//!
//! Spec: System V ABI, chapter 4 and 5 (gABI 4.3). Segments go to their physical
//! address (`p_paddr`), as QEMU and boot loaders do; relocations are not applied.
//! 64-bit files, and 32-bit ones where a guest can run them (x86).

use object::Endianness;
use object::elf as e;
use object::read::elf::{FileHeader, ProgramHeader};

use super::BootError;
use super::image::{Kernel, KernelFormat, Segment, wrong_architecture};

/// Bound on the memory that one file's segments may ask for.
const MAX_MEMORY: u64 = 4 << 30;

/// Whether `bytes` begin as an ELF file does.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

/// Names of the architectures a user may well have a kernel of, with mimus's name of the guest.
fn machine(number: u16, class64: bool) -> (&'static str, &'static str) {
    match e::Machine(number) {
        e::EM_X86_64 => ("an x86-64 ELF", "x86_64"),
        e::EM_386 => ("an i386 ELF", "i386"),
        e::EM_AARCH64 => ("an AArch64 ELF", "aarch64"),
        e::EM_ARM => ("a 32-bit Arm ELF", "arm"),
        e::EM_RISCV if class64 => ("a riscv64 ELF", "riscv64"),
        e::EM_RISCV => ("a riscv32 ELF", "riscv32"),
        e::EM_PPC64 => ("a ppc64 ELF", "ppc64"),
        e::EM_PPC => ("a 32-bit PowerPC ELF", "ppc"),
        e::EM_S390 => ("an s390x ELF", "s390x"),
        e::EM_MIPS => ("a MIPS ELF", "mips"),
        e::EM_LOONGARCH => ("a LoongArch ELF", "loongarch64"),
        e::EM_SPARCV9 => ("a SPARC64 ELF", "sparc64"),
        _ => ("an ELF of an unknown architecture", ""),
    }
}

/// Reads an executable. `what` names it in errors.
pub fn load(what: &str, bytes: &[u8], guest: &str) -> Result<Kernel, BootError> {
    let short = |detail: &str| BootError::Truncated { what: what.into(), detail: detail.into() };
    if bytes.len() < 20 {
        return Err(short("its ELF header is incomplete"));
    }
    let class64 = bytes[4] == e::ELFCLASS64.0;
    let number = if bytes[5] == 2 {
        u16::from_be_bytes([bytes[18], bytes[19]])
    } else {
        u16::from_le_bytes([bytes[18], bytes[19]])
    };
    let (found, arch) = machine_checked(number, class64);
    // An x86-64 CPU starts out as an i386.
    if arch != guest && (arch, guest) != ("i386", "x86_64") {
        return Err(wrong_architecture(what, &found, arch, guest));
    }
    if class64 {
        load_class::<e::FileHeader64<Endianness>>(what, bytes)
    } else {
        load_class::<e::FileHeader32<Endianness>>(what, bytes)
    }
}

fn load_class<H: FileHeader<Endian = Endianness>>(what: &str, bytes: &[u8]) -> Result<Kernel, BootError> {
    let short = |detail: &str| BootError::Truncated { what: what.into(), detail: detail.into() };
    let header = H::parse(bytes).map_err(|_| short("its ELF header is incomplete"))?;
    let endian = header.endian().map_err(|err| damaged(what, &err.to_string()))?;
    check_type(what, header.e_type(endian))?;
    let headers = header
        .program_headers(endian, bytes)
        .map_err(|_| short("its program headers lie beyond the end of the file"))?;
    let mut segments = Vec::new();
    let mut total = 0u64;
    let mut entry: u64 = header.e_entry(endian).into();
    let virtual_entry = entry;
    for ph in headers.iter().filter(|ph| ph.p_type(endian) == e::PT_LOAD && ph.p_memsz(endian).into() > 0) {
        let (paddr, vaddr, memory_size): (u64, u64, u64) =
            (ph.p_paddr(endian).into(), ph.p_vaddr(endian).into(), ph.p_memsz(endian).into());
        if ph.p_filesz(endian).into() > memory_size || paddr.checked_add(memory_size).is_none() {
            return Err(damaged(what, &format!("segment at {paddr:#x} has impossible sizes")));
        }
        let data = ph
            .data(endian, bytes)
            .map_err(|()| short(&format!("segment at {paddr:#x} lies beyond the end of the file")))?;
        total = total.saturating_add(memory_size);
        if total > MAX_MEMORY {
            return Err(damaged(what, "its segments ask for more than 4 GiB"));
        }
        // vmlinux is linked at virtual addresses: the entry point is one too, and the CPU
        // starts with translation off.
        if let Some(offset) = virtual_entry.checked_sub(vaddr).filter(|o| *o < memory_size) {
            entry = paddr + offset;
        }
        segments.push(Segment { address: paddr, data: data.to_vec(), memory_size });
    }
    if segments.is_empty() {
        return Err(damaged(what, "no segment of it is to be loaded (is it an object file?)"));
    }
    Ok(Kernel { format: KernelFormat::Elf, entry, segments })
}

/// What the note of this owner and kind holds, in an executable that [`load`] takes.
pub fn note(bytes: &[u8], owner: &str, kind: u32) -> Option<Vec<u8>> {
    match bytes.get(4).copied() {
        Some(c) if c == e::ELFCLASS64.0 => note_class::<e::FileHeader64<Endianness>>(bytes, owner, kind),
        _ => note_class::<e::FileHeader32<Endianness>>(bytes, owner, kind),
    }
}

fn note_class<H: FileHeader<Endian = Endianness>>(bytes: &[u8], owner: &str, kind: u32) -> Option<Vec<u8>> {
    let header = H::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    for segment in header.program_headers(endian, bytes).ok()? {
        let Ok(Some(mut notes)) = segment.notes(endian, bytes) else { continue };
        while let Ok(Some(note)) = notes.next() {
            if note.name() == owner.as_bytes() && note.n_type(endian).0 == kind {
                return Some(note.desc().to_vec());
            }
        }
    }
    None
}

fn machine_checked(number: u16, class64: bool) -> (String, &'static str) {
    let (found, arch) = machine(number, class64);
    if arch.is_empty() { (format!("{found} (machine number {number})"), arch) } else { (found.into(), arch) }
}

fn check_type(what: &str, kind: e::FileType) -> Result<(), BootError> {
    match kind {
        e::ET_EXEC | e::ET_DYN => Ok(()),
        e::ET_REL => Err(damaged(what, "it is an object file, not linked: give the linked executable")),
        e::ET_CORE => Err(damaged(what, "it is a core dump, not an executable")),
        other => Err(damaged(what, &format!("ELF type {} is no executable", other.0))),
    }
}

fn damaged(what: &str, detail: &str) -> BootError {
    BootError::Damaged { what: what.into(), detail: detail.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A minimal little-endian ELF64 with one segment of `len` bytes.
    pub(crate) fn elf(machine: u16, address: u64, len: usize) -> Vec<u8> {
        let mut b = vec![0u8; 120];
        b[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        b[16..18].copy_from_slice(&2u16.to_le_bytes());
        b[18..20].copy_from_slice(&machine.to_le_bytes());
        b[20..24].copy_from_slice(&1u32.to_le_bytes());
        b[24..32].copy_from_slice(&(0xffff_ffff_8000_0000u64 + 16).to_le_bytes());
        b[32..40].copy_from_slice(&64u64.to_le_bytes());
        b[52..54].copy_from_slice(&64u16.to_le_bytes());
        b[54..56].copy_from_slice(&56u16.to_le_bytes());
        b[56..58].copy_from_slice(&1u16.to_le_bytes());
        b[64..68].copy_from_slice(&1u32.to_le_bytes());
        b[72..80].copy_from_slice(&120u64.to_le_bytes());
        b[80..88].copy_from_slice(&0xffff_ffff_8000_0000u64.to_le_bytes());
        b[88..96].copy_from_slice(&address.to_le_bytes());
        b[96..104].copy_from_slice(&(len as u64).to_le_bytes());
        b[104..112].copy_from_slice(&(len as u64 + 32).to_le_bytes());
        b.extend(std::iter::repeat_n(0x13, len));
        b
    }

    #[test]
    fn segments_go_to_physical_addresses() {
        let k = load("-kernel k", &elf(243, 0x8020_0000, 100), "riscv64").unwrap();
        assert_eq!(k.entry, 0x8020_0010);
        assert_eq!(k.extent(), Some((0x8020_0000, 0x8020_0000 + 132)));
        assert_eq!(k.segments[0].data.len(), 100);
    }

    #[test]
    fn other_architectures_are_named() {
        let text = load("-kernel vmlinux", &elf(62, 0, 10), "riscv64").unwrap_err().to_string();
        assert!(text.starts_with("-kernel vmlinux is an x86-64 ELF; this is mimus system riscv64: use "), "{text}");
        let text = load("-kernel k", &elf(9999, 0, 10), "riscv64").unwrap_err().to_string();
        assert!(text.contains("9999"), "{text}");
    }

    #[test]
    fn truncation_and_objects() {
        let full = elf(243, 0x8000_0000, 100);
        for cut in [10, 30, 100, 150] {
            let text = load("-kernel k", &full[..cut], "riscv64").unwrap_err().to_string();
            assert!(text.contains("truncated"), "{cut}: {text}");
        }
        let mut object = full;
        object[16] = 1;
        assert!(load("-kernel k", &object, "riscv64").unwrap_err().to_string().contains("object file"));
    }
}
