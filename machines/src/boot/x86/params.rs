//! What a kernel is told in memory: Linux's `boot_params` ("zero page"), PVH's
//! `hvm_start_info`.
//!
//! Spec: Linux `Documentation/arch/x86/{boot,zero-page}.rst`; Xen
//! `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h` (layout
//! version 1).

use super::bzimage::{BzImage, HEADER};
use super::e820::MemoryMap;

/// Bytes of `boot_params`.
pub const ZERO_PAGE_SIZE: usize = 4096;
/// Entries `boot_params` has room for.
const E820_MAX: usize = 128;
/// `type_of_loader`: none of those with a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// First protocol with `setup_data`.
const SETUP_DATA: u16 = 0x0209;
/// First protocol with the RSDP's address.
const RSDP: u16 = 0x020e;
/// `setup_data` with random bytes (SETUP_RNG_SEED).
const RNG_SEED: u32 = 9;

/// Where things are that a kernel is told about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// The command line, with its NUL.
    pub cmdline: u64,
    /// Address and bytes of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// The ACPI root pointer; 0 for none.
    pub rsdp: u64,
    /// The first `setup_data`; 0 for none.
    pub setup_data: u64,
    /// Memory.
    pub memory: MemoryMap,
}

/// `boot_params` for a kernel with this header; without one (a bare `vmlinux`), that of
/// the protocol's newest version.
pub fn zero_page(kernel: Option<&BzImage>, h: &Handover) -> Vec<u8> {
    let mut page = Page(vec![0; ZERO_PAGE_SIZE]);
    let protocol = match kernel {
        Some(k) => {
            page.put(HEADER, &k.header);
            k.protocol
        }
        None => {
            page.put(0x1fe, &0xaa55u16.to_le_bytes());
            page.put(0x202, b"HdrS");
            page.put(0x206, &0x020fu16.to_le_bytes());
            page.put(0x211, &[1]);
            page.put(0x230, &0x100_0000u32.to_le_bytes());
            0x020f
        }
    };
    // Fields a boot loader must write ("Details of Header Fields").
    page.put(0x210, &[LOADER_UNDEFINED]);
    page.put(0x1fa, &0xffffu16.to_le_bytes());
    page.split(0x228, 0x0c8, h.cmdline);
    if let Some((address, len)) = h.initrd {
        page.split(0x218, 0x0c0, address);
        page.split(0x21c, 0x0c4, len);
    }
    if protocol >= SETUP_DATA {
        page.put(0x250, &h.setup_data.to_le_bytes());
    }
    if protocol >= RSDP {
        page.put(0x070, &h.rsdp.to_le_bytes());
    }
    let entries = h.memory.entries().len().min(E820_MAX);
    page.put(0x1e8, &[entries as u8]);
    page.put(0x2d0, &h.memory.packed()[..entries * 20]);
    // BIOS fields of screen_info stay zero: no display, no mode to keep.
    page.0
}

struct Page(Vec<u8>);

impl Page {
    fn put(&mut self, at: usize, value: &[u8]) {
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    /// A 64-bit value whose halves are apart.
    fn split(&mut self, low: usize, high: usize, value: u64) {
        self.put(low, &(value as u32).to_le_bytes());
        self.put(high, &((value >> 32) as u32).to_le_bytes());
    }
}

/// A `setup_data` with random bytes for the kernel's entropy pool.
pub fn rng_seed(seed: &[u8; 32]) -> Vec<u8> {
    let mut out = 0u64.to_le_bytes().to_vec();
    out.extend(RNG_SEED.to_le_bytes());
    out.extend((seed.len() as u32).to_le_bytes());
    out.extend(seed);
    out
}

/// `hvm_start_info` and what it points to, for address `base`.
pub fn start_info(base: u64, h: &Handover) -> Vec<u8> {
    const INFO: u64 = 56;
    const MODULE: u64 = 32;
    const MAGIC: u32 = 0x336e_c578;
    let modules = u32::from(h.initrd.is_some());
    let list = if modules == 0 { 0 } else { base + INFO };
    let map = base + INFO + MODULE * u64::from(modules);
    let mut out = Vec::new();
    let mut words = |values: &[u32]| out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    let halves = |v: u64| [v as u32, (v >> 32) as u32];
    // magic, version, flags, nr_modules
    words(&[MAGIC, 1, 0, modules]);
    for address in [list, h.cmdline, h.rsdp, map] {
        words(&halves(address));
    }
    words(&[h.memory.entries().len() as u32, 0]);
    if let Some((address, len)) = h.initrd {
        // hvm_modlist_entry: address, size, no command line, reserved
        [address, len, 0, 0].iter().for_each(|v| words(&halves(*v)));
    }
    for e in h.memory.entries() {
        words(&halves(e.base));
        words(&halves(e.len));
        words(&[e.kind as u32, 0]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::bytes::{u16_at, u32_at, u64_at};
    use super::super::bzimage::{self, tests::bzimage};
    use super::super::e820::Kind;
    use super::*;

    fn handover() -> Handover {
        let mut memory = MemoryMap::default();
        memory.set(0, 0x9_fc00, Kind::Ram).set(0x10_0000, 0x1ff0_0000, Kind::Ram);
        Handover {
            cmdline: 0x2_0000,
            initrd: Some((0x1_8000_0000, 0x12_3456)),
            rsdp: 0xe_0000,
            setup_data: 0x3_0000,
            memory,
        }
    }

    #[test]
    fn linux() {
        let k = bzimage::parse("k", &bzimage(0x1000), "x86_64").unwrap();
        let page = zero_page(Some(&k), &handover());
        assert_eq!(page.len(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!((u16_at(&page, 0x206), page[0x210], page[0x1e8]), (Some(0x20f), 0xff, 2));
        assert_eq!((u32_at(&page, 0x228), u32_at(&page, 0x0c8)), (Some(0x2_0000), Some(0)));
        assert_eq!((u32_at(&page, 0x218), u32_at(&page, 0x0c0)), (Some(0x8000_0000), Some(1)));
        assert_eq!((u32_at(&page, 0x21c), u32_at(&page, 0x0c4)), (Some(0x12_3456), Some(0)));
        assert_eq!((u64_at(&page, 0x070), u64_at(&page, 0x250)), (Some(0xe_0000), Some(0x3_0000)));
        assert_eq!((u64_at(&page, 0x2d0 + 20), u32_at(&page, 0x2d0 + 36)), (Some(0x10_0000), Some(1)));
        // The header is the kernel's own besides.
        assert_eq!(u64_at(&page, 0x258), Some(0x100_0000));
    }

    #[test]
    fn older_kernels_are_not_told_what_they_do_not_know() {
        let mut file = bzimage(0x1000);
        bzimage::tests::put(&mut file, 0x206, &0x0206u16.to_le_bytes());
        bzimage::tests::put(&mut file, 0x250, &[0; 8]);
        let k = bzimage::parse("k", &file, "x86_64").unwrap();
        let page = zero_page(Some(&k), &handover());
        assert_eq!((u64_at(&page, 0x070), u64_at(&page, 0x250)), (Some(0), Some(0)));
        assert_eq!(u64_at(&zero_page(None, &handover()), 0x070), Some(0xe_0000));
    }

    #[test]
    fn too_many_ranges_are_cut() {
        let mut h = handover();
        (0..200).for_each(|i| _ = h.memory.set(i << 32, 0x1000, Kind::Ram));
        let page = zero_page(None, &h);
        assert_eq!(page[0x1e8], 128);
        assert_eq!(&page[0x2d0 + 128 * 20..0x2d0 + 129 * 20], &[0; 20]);
    }

    #[test]
    fn pvh() {
        let info = start_info(0x1_0000, &handover());
        assert_eq!((u32_at(&info, 0), u32_at(&info, 4)), (Some(0x336e_c578), Some(1)));
        let (modules, map) = (u64_at(&info, 16).unwrap() as usize, u64_at(&info, 40).unwrap() as usize);
        assert_eq!((u32_at(&info, 12), modules), (Some(1), 0x1_0000 + 56));
        assert_eq!(u64_at(&info, modules - 0x1_0000), Some(0x1_8000_0000));
        assert_eq!((u64_at(&info, 24), u64_at(&info, 32)), (Some(0x2_0000), Some(0xe_0000)));
        assert_eq!(u32_at(&info, 48), Some(2));
        let second = map - 0x1_0000 + 24;
        assert_eq!((u64_at(&info, second), u32_at(&info, second + 16)), (Some(0x10_0000), Some(1)));
        assert_eq!(info.len(), second + 24);
        let none = start_info(0, &Handover::default());
        assert_eq!((u32_at(&none, 12), u64_at(&none, 16), none.len()), (Some(0), Some(0), 56));
    }

    #[test]
    fn seed() {
        let data = rng_seed(&[7; 32]);
        assert_eq!((u64_at(&data, 0), u32_at(&data, 8), u32_at(&data, 12)), (Some(0), Some(9), Some(32)));
        assert_eq!(&data[16..], &[7; 32]);
    }
}
