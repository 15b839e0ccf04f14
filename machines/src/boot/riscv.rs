//! Where things go in the RAM of the RISC-V `virt` board.
//!
//! The rules are those guests expect of this board: the kernel 2 MiB above the start
//! of RAM (the firmware, here the built-in SBI, owns what is below), the initrd far
//! enough up that an unpacking kernel does not run into it, and the device tree below
//! the top of RAM but under 3 GiB, where even a kernel with a small early map sees it.

use std::ops::Range;

use super::{BootError, Kernel, KernelFormat, human};

/// Start of RAM on the `virt` board.
pub const RAM_BASE: u64 = 0x8000_0000;
/// Offset of the kernel in RAM: RISC-V Linux wants a 2 MiB boundary (64-bit, `boot.rst`).
pub const KERNEL_OFFSET: u64 = 2 * MIB;
/// Alignment of the device tree, so that an early page table maps it with one megapage.
pub const FDT_ALIGN: u64 = 2 * MIB;
/// The device tree stays below this address.
const FDT_CEILING: u64 = 3 << 30;
/// How far above the kernel's base an initrd is put when RAM allows.
const INITRD_DISTANCE: u64 = 128 * MIB;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// A contiguous stretch of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ram {
    /// Guest physical address of its first byte.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Ram {
    /// First address beyond.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// Where each part goes, in guest physical addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The kernel's memory, `.bss` included.
    pub kernel: Option<Range<u64>>,
    /// Address the kernel is entered at.
    pub entry: Option<u64>,
    /// The initrd.
    pub initrd: Option<Range<u64>>,
    /// The device tree.
    pub fdt: u64,
}

/// What is to be placed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parts<'a> {
    /// Kernel, and the name it has in errors.
    pub kernel: Option<(&'a str, &'a Kernel)>,
    /// Length of the initrd in bytes, and the name it has in errors.
    pub initrd: Option<(&'a str, u64)>,
    /// Room for the device tree, in bytes.
    pub fdt_size: u64,
}

/// Places kernel, initrd and device tree in `ram`; nothing overlaps.
pub fn place(ram: Ram, parts: Parts<'_>) -> Result<Placement, BootError> {
    let fdt = place_fdt(ram, parts.fdt_size)?;
    let mut floor = ram.base;
    let mut kernel_range = None;
    let mut entry = None;
    if let Some((what, kernel)) = parts.kernel {
        let (range, at) = place_kernel(ram, fdt, what, kernel, parts.initrd.map_or(0, |i| i.1))?;
        // Firmware and bare-metal ELFs need not lie in RAM (flash); then RAM is free.
        if range.start < ram.end() && range.end > ram.base {
            floor = range.end;
        }
        (kernel_range, entry) = (Some(range), Some(at));
    }
    let initrd = match parts.initrd {
        Some((what, size)) => Some(place_initrd(ram, fdt, floor, what, size)?),
        None => None,
    };
    Ok(Placement { kernel: kernel_range, entry, initrd, fdt })
}

/// Address of a device tree of `size` bytes: as high as allowed, on a 2 MiB boundary.
pub fn place_fdt(ram: Ram, size: u64) -> Result<u64, BootError> {
    let top = if ram.base < FDT_CEILING { ram.end().min(FDT_CEILING) } else { ram.end() };
    let at = top.saturating_sub(size) & !(FDT_ALIGN - 1);
    if at < ram.base + KERNEL_OFFSET {
        return Err(BootError::TooBig {
            what: "the machine".into(),
            detail: format!("{} of RAM leave no room for the device tree beside a kernel", human(ram.size)),
            suggest_mib: 64,
        });
    }
    Ok(at)
}

fn place_kernel(ram: Ram, fdt: u64, what: &str, kernel: &Kernel, initrd: u64) -> Result<(Range<u64>, u64), BootError> {
    let (range, entry) = match kernel.format {
        KernelFormat::Elf => {
            let (low, high) = kernel.extent().unwrap_or((ram.base, ram.base));
            (low..high, kernel.entry)
        }
        KernelFormat::LinuxImage { text_offset, .. } => {
            // text_offset counts from the start of RAM the kernel is given; the built-in SBI
            // takes the first 2 MiB, and 0x20_0000 is what every 64-bit kernel says.
            let start = ram.base + text_offset.max(KERNEL_OFFSET).next_multiple_of(FDT_ALIGN);
            (start..start.saturating_add(kernel.memory_size()), start + kernel.entry)
        }
        KernelFormat::Raw => {
            let start = ram.base + KERNEL_OFFSET;
            (start..start.saturating_add(kernel.memory_size()), start + kernel.entry)
        }
    };
    let in_ram = range.start < ram.end() && range.end > ram.base;
    if range.end > fdt && (in_ram || range.start >= ram.end()) {
        if range.start >= ram.end() && range.start - ram.base > 64 << 30 {
            return Err(BootError::Damaged {
                what: what.into(),
                detail: format!(
                    "it is linked for address {:#x}, where this machine has no memory (RAM starts at {:#x})",
                    range.start, ram.base
                ),
            });
        }
        return Err(BootError::TooBig {
            what: what.into(),
            detail: format!(
                "it needs {:#x}..{:#x}, RAM is {} from {:#x}",
                range.start,
                range.end,
                human(ram.size),
                ram.base
            ),
            suggest_mib: suggest(range.end - ram.base, initrd),
        });
    }
    Ok((range, entry))
}

fn place_initrd(ram: Ram, fdt: u64, floor: u64, what: &str, size: u64) -> Result<Range<u64>, BootError> {
    let fits = |start: u64| (size <= fdt.saturating_sub(start)).then(|| start..start + size);
    let lowest = floor.next_multiple_of(PAGE);
    let preferred = (ram.base + (ram.size / 2).min(INITRD_DISTANCE)).max(lowest).next_multiple_of(FDT_ALIGN);
    fits(preferred).or_else(|| fits(lowest)).ok_or_else(|| BootError::TooBig {
        what: what.into(),
        detail: format!(
            "it has {}, and {} of RAM leave {} after the kernel and the device tree",
            human(size),
            human(ram.size),
            human(fdt.saturating_sub(lowest)),
        ),
        suggest_mib: suggest(floor - ram.base, size),
    })
}

/// A RAM size, in MiB, that holds kernel and initrd, and the initrd once more unpacked
/// (initrds are compressed, to about 40 %).
fn suggest(kernel_end: u64, initrd: u64) -> u64 {
    let need = kernel_end + initrd * 4 + 32 * MIB;
    need.div_ceil(MIB).next_power_of_two().max(64)
}

#[cfg(test)]
mod tests {
    use super::super::Segment;
    use super::*;

    fn image(size: u64) -> Kernel {
        Kernel {
            format: KernelFormat::LinuxImage { text_offset: 0x20_0000, image_size: size },
            entry: 0,
            segments: vec![Segment { address: 0, data: vec![0; 16], memory_size: size }],
        }
    }

    fn ram(mib: u64) -> Ram {
        Ram { base: RAM_BASE, size: mib * MIB }
    }

    #[test]
    fn the_usual_layout() {
        let kernel = image(30 * MIB);
        let parts =
            Parts { kernel: Some(("-kernel k", &kernel)), initrd: Some(("-initrd i", 25 * MIB)), fdt_size: 8192 };
        let p = place(ram(512), parts).unwrap();
        assert_eq!(p.entry, Some(0x8020_0000));
        assert_eq!(p.initrd.clone().unwrap().start, RAM_BASE + 128 * MIB);
        assert_eq!(p.fdt, RAM_BASE + 510 * MIB);
        // Above 1 GiB of RAM the tree stays under the 3 GiB mark.
        assert_eq!(place(ram(4096), parts).unwrap().fdt, 0xc000_0000 - 2 * MIB);
    }

    #[test]
    fn nothing_overlaps_for_any_size() {
        for mem in 5..400 {
            for initrd in [0, 1, 7, 40, 100, 300] {
                for kernel in [1, 20, 90] {
                    let kernel = image(kernel * MIB);
                    let parts = Parts {
                        kernel: Some(("-kernel k", &kernel)),
                        initrd: Some(("-initrd i", initrd * MIB)),
                        fdt_size: 65536,
                    };
                    let Ok(p) = place(ram(mem), parts) else {
                        continue;
                    };
                    let (k, i) = (p.kernel.unwrap(), p.initrd.unwrap());
                    assert!(k.end <= i.start && i.end <= p.fdt && p.fdt + 65536 <= ram(mem).end());
                }
            }
        }
    }

    #[test]
    fn an_initrd_too_big_says_the_numbers() {
        let kernel = image(30 * MIB);
        let parts =
            Parts { kernel: Some(("-kernel k", &kernel)), initrd: Some(("-initrd big.gz", 100 * MIB)), fdt_size: 8192 };
        let text = place(ram(64), parts).unwrap_err().to_string();
        assert!(
            text.starts_with("-initrd big.gz does not fit: it has 100 MiB, and 64 MiB of RAM leave 30 MiB"),
            "{text}"
        );
        assert!(text.ends_with("use -m 512M or more"), "{text}");
        assert!(place(ram(512), parts).is_ok());
    }

    #[test]
    fn tiny_ram_is_an_error() {
        let kernel = image(30 * MIB);
        for mem in [1, 2, 8, 16] {
            let parts = Parts { kernel: Some(("-kernel k", &kernel)), initrd: None, fdt_size: 8192 };
            let text = place(ram(mem), parts).unwrap_err().to_string();
            assert!(text.contains("use -m 64M or more") || text.contains("use -m 128M or more"), "{mem}: {text}");
        }
    }

    #[test]
    fn elf_outside_ram_is_told() {
        let kernel = Kernel {
            format: KernelFormat::Elf,
            entry: 0,
            segments: vec![Segment { address: 0xffff_ffff_0000_0000, data: vec![], memory_size: 4096 }],
        };
        let text = place(ram(64), Parts { kernel: Some(("-kernel k", &kernel)), initrd: None, fdt_size: 0 })
            .unwrap_err()
            .to_string();
        assert!(text.contains("no memory"), "{text}");
    }
}
