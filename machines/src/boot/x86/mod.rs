//! Direct boot of PCs, without firmware: what a kernel file is, where everything goes,
//! what the kernel is told and how it is entered.
//!
//! Three protocols: Linux's 64-bit and 32-bit entry points for `bzImage` files, PVH for
//! ELF kernels with its note, and Linux's 64-bit entry for a bare 64-bit `vmlinux`.
//! All of it is data: a board copies the [`Piece`]s and sets the registers of [`Entry`].
//!
//! * [`bzimage`] reads Linux's set-up header.
//! * [`e820`] is the memory map.
//! * [`params`] is what the kernel finds in memory.
//! * [`cpu`] is what it finds in registers, descriptors and page tables.
//! * [`place`] has the rules of placement.

mod bytes;
pub mod bzimage;
pub mod cpu;
pub mod e820;
pub mod params;
pub mod place;

pub use bzimage::BzImage;
pub use cpu::Entry;
pub use e820::{Kind, MemoryMap};
pub use params::Handover;
pub use place::{Memory, Placement, place};

use super::image::{Segment, check_foreign, looks_like_text};
use super::{BootError, Kernel, elf, gzip};

/// Address of `boot_params`.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Address of PVH's `hvm_start_info`.
pub const START_INFO: u64 = 0x1_0000;
/// Address of the command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line that fits there, without its NUL.
pub const CMDLINE_MAX: u64 = 0xffff;
/// Address of `setup_data`.
pub const SETUP_DATA: u64 = 0x3_0000;
/// First address beyond what is used of low memory.
pub const LOW_END: u64 = 0x4_0000;

/// XEN_ELFNOTE_PHYS32_ENTRY (Xen `elfnote.h`).
const PHYS32_ENTRY: u32 = 18;
/// Bound on an unpacked kernel.
const MAX_UNPACKED: u64 = 1 << 30;

/// A kernel for a PC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// Linux, packed.
    Linux(BzImage),
    /// An ELF file.
    Elf(ElfImage),
}

/// An ELF kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfImage {
    /// What goes where.
    pub segments: Vec<Segment>,
    /// The 64-bit entry point, which is Linux's.
    pub entry: u64,
    /// The 32-bit entry point of PVH.
    pub pvh: Option<u32>,
}

/// Reads the file given as `-kernel`. `what` is option and file, for errors; `guest` is
/// `x86_64` or `i386`.
pub fn load_kernel(what: &str, bytes: Vec<u8>, guest: &str) -> Result<Image, BootError> {
    if bytes.is_empty() {
        return Err(BootError::Empty { what: what.into() });
    }
    if gzip::is_gzip(&bytes) {
        let inner = gzip::decompress(what, &bytes, MAX_UNPACKED)?;
        return load_unpacked(what, &inner, guest);
    }
    load_unpacked(what, &bytes, guest)
}

fn load_unpacked(what: &str, bytes: &[u8], guest: &str) -> Result<Image, BootError> {
    if elf::is_elf(bytes) {
        return load_elf(what, bytes, guest).map(Image::Elf);
    }
    if bzimage::is_bzimage(bytes) {
        return bzimage::parse(what, bytes, guest).map(Image::Linux);
    }
    check_foreign(what, bytes, guest)?;
    let found = if looks_like_text(bytes) {
        "it looks like text"
    } else if bytes.len() < 0x206 {
        "it is shorter than any kernel's header"
    } else {
        "it has no header that is known"
    };
    Err(BootError::unknown_format(what, found, guest))
}

fn load_elf(what: &str, bytes: &[u8], guest: &str) -> Result<ElfImage, BootError> {
    let Kernel { segments, entry, .. } = elf::load(what, bytes, guest)?;
    let note = elf::note(bytes, "Xen", PHYS32_ENTRY);
    let pvh = note.and_then(|n| Some(u32::from_le_bytes(n.get(..4)?.try_into().ok()?)));
    if pvh.is_none() && bytes.get(4) != Some(&2) {
        let found = "it is a 32-bit ELF without a PVH entry point";
        return Err(BootError::unknown_format(what, found, guest));
    }
    Ok(ElfImage { segments, entry, pvh })
}

/// Bytes for one place in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Where.
    pub address: u64,
    /// What.
    pub data: &'a [u8],
    /// Length in memory; the part beyond the data is zero.
    pub memory_size: u64,
}

impl Image {
    /// What of the kernel goes where.
    pub fn pieces(&self) -> Vec<Piece<'_>> {
        let piece = |address, data, memory_size| Piece { address, data, memory_size };
        match self {
            Self::Linux(k) => vec![piece(k.load_address, &k.code, k.code.len() as u64)],
            Self::Elf(k) => k.segments.iter().map(|s| piece(s.address, &s.data[..], s.memory_size)).collect(),
        }
    }

    /// Lowest and highest (exclusive) address it uses before it reads the memory map.
    pub fn extent(&self) -> (u64, u64) {
        match self {
            Self::Linux(k) => (k.load_address, k.memory_end()),
            Self::Elf(k) => {
                let low = k.segments.iter().map(|s| s.address).min().unwrap_or(0);
                let high = k.segments.iter().map(|s| s.address + s.memory_size).max().unwrap_or(0);
                (low, high)
            }
        }
    }

    /// Longest command line it takes, in bytes without the NUL.
    pub fn cmdline_max(&self) -> u64 {
        match self {
            Self::Linux(k) => k.cmdline_max.min(CMDLINE_MAX),
            Self::Elf(_) => CMDLINE_MAX,
        }
    }

    /// How it is entered once the hand-over is in memory.
    pub fn entry(&self) -> Entry {
        match self {
            Self::Linux(k) if k.has_64bit_entry => {
                Entry::Long { rip: k.load_address + bzimage::ENTRY_64, rsi: BOOT_PARAMS }
            }
            Self::Linux(k) => Entry::Protected { eip: k.load_address as u32, ebx: 0, esi: BOOT_PARAMS as u32 },
            Self::Elf(ElfImage { pvh: Some(eip), .. }) => {
                Entry::Protected { eip: *eip, ebx: START_INFO as u32, esi: 0 }
            }
            Self::Elf(k) => Entry::Long { rip: k.entry, rsi: BOOT_PARAMS },
        }
    }

    /// What it finds in low memory: command line, parameters, descriptors, page tables.
    pub fn hand_over(&self, cmdline: &str, seed: &[u8; 32], rest: Handover) -> Vec<(u64, Vec<u8>)> {
        let h = Handover { cmdline: CMDLINE, setup_data: SETUP_DATA, ..rest };
        let entry = self.entry();
        let mut text = cmdline.as_bytes().to_vec();
        text.push(0);
        let mut out = vec![(CMDLINE, text), (cpu::GDT, entry.gdt()), (cpu::PAGE_TABLES, entry.page_tables())];
        match self {
            Self::Elf(ElfImage { pvh: Some(_), .. }) => out.push((START_INFO, params::start_info(START_INFO, &h))),
            Self::Linux(k) => out.push((BOOT_PARAMS, params::zero_page(Some(k), &h))),
            Self::Elf(_) => out.push((BOOT_PARAMS, params::zero_page(None, &h))),
        }
        out.push((SETUP_DATA, params::rng_seed(seed)));
        out.retain(|(_, data)| !data.is_empty());
        out
    }
}

/// Checks the length of `-append`.
pub fn check_cmdline(kernel: &Image, cmdline: &str) -> Result<(), BootError> {
    let (len, max) = (cmdline.len() as u64, kernel.cmdline_max());
    if len > max {
        return Err(BootError::CommandLine { len, max });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
