//! Linux `bzImage` files: the boot sector's set-up header and what it promises.
//!
//! Spec: Linux `Documentation/arch/x86/boot.rst`, "The Linux/x86 Boot Protocol"; field
//! offsets are its. Read: protocol 2.06 (2007) and later, loaded high. The 16-bit
//! set-up code is not run: a kernel is entered at its 64-bit entry point (2.12) or at
//! its 32-bit one. Checked with: Debian 6.1, memtest86+ 6.

use super::super::BootError;
use super::bytes::{u8_at, u16_at, u32_at, u64_at};

/// "HdrS" at 0x202.
pub const MAGIC: &[u8; 4] = b"HdrS";
/// Where the set-up header begins, in the file and in `boot_params`.
pub const HEADER: usize = 0x1f1;
/// The oldest protocol read.
const OLDEST: u16 = 0x0206;
/// First protocol with `kernel_alignment` and `relocatable_kernel`.
const RELOCATABLE: u16 = 0x0205;
/// First protocol with `pref_address` and `init_size`.
const PREFERRED: u16 = 0x020a;
/// First protocol with `xloadflags`.
const XLOADFLAGS: u16 = 0x020c;
/// Protected-mode code is loaded at 1 MiB (`loadflags` bit 0).
const LOADED_HIGH: u8 = 1;
/// The kernel has the 64-bit entry point (`xloadflags` bit 0).
const XLF_KERNEL_64: u16 = 1;
/// Kernel, parameters, command line and initrd may be above 4 GiB (bit 1).
const XLF_ABOVE_4G: u16 = 2;
/// Offset of the 64-bit entry point from where the protected-mode code is.
pub const ENTRY_64: u64 = 0x200;
/// Bytes per unit of `setup_sects`.
const SECTOR: usize = 512;
/// Where protected-mode code goes unless the kernel says otherwise.
pub const LOAD_ADDRESS: u64 = 0x10_0000;
/// Bound on the memory a kernel may ask for while it unpacks itself.
const MAX_INIT_SIZE: u64 = 1 << 30;

/// A kernel as its file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BzImage {
    /// Boot protocol, major in the high byte.
    pub protocol: u16,
    /// The set-up header from [`HEADER`] on, as in the file.
    pub header: Vec<u8>,
    /// The protected-mode part, which goes to [`BzImage::load_address`].
    pub code: Vec<u8>,
    /// Entered in 64-bit mode at [`ENTRY_64`]; otherwise in 32-bit mode at its start.
    pub has_64bit_entry: bool,
    /// The initrd may be above 4 GiB.
    pub above_4g: bool,
    /// Where [`BzImage::code`] is loaded.
    pub load_address: u64,
    /// Where the kernel runs from once it has unpacked itself.
    pub run_address: u64,
    /// Bytes from [`BzImage::run_address`] on that it needs to do so.
    pub init_size: u64,
    /// Longest command line in bytes, without its NUL.
    pub cmdline_max: u64,
    /// Last address an initrd may occupy, unless it may be above 4 GiB.
    pub initrd_max: u64,
}

/// Whether `bytes` begin as a bzImage does.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x202..0x206) == Some(MAGIC)
}

/// Reads a bzImage. `what` names it in errors; `guest` is `x86_64` or `i386`.
pub fn parse(what: &str, bytes: &[u8], guest: &str) -> Result<BzImage, BootError> {
    let truncated = |detail: String| BootError::Truncated { what: what.into(), detail };
    let old = |detail: String| BootError::Damaged { what: what.into(), detail };
    let protocol = u16_at(bytes, 0x206).ok_or_else(|| truncated("its header is incomplete".into()))?;
    let version = format!("{}.{:02}", protocol >> 8, protocol & 0xff);
    if protocol < OLDEST {
        let detail = format!("it speaks boot protocol {version}, from before 2007: 2.06 is the oldest that is read");
        return Err(old(detail));
    }
    let end = header_end(bytes).ok_or_else(|| truncated("its header is incomplete".into()))?;
    let header = bytes[HEADER..end].to_vec();
    if u8_at(bytes, 0x211).unwrap_or(0) & LOADED_HIGH == 0 {
        return Err(old("it is a zImage, loaded below 640 KiB: build it as a bzImage".into()));
    }
    let code = protected_mode(bytes).map_err(truncated)?.to_vec();
    let xloadflags = if protocol >= XLOADFLAGS { u16_at(bytes, 0x236).unwrap_or(0) } else { 0 };
    if guest == "i386" && xloadflags & XLF_KERNEL_64 != 0 {
        return Err(BootError::WrongArchitecture {
            what: what.into(),
            found: "an x86-64 kernel".into(),
            guest: guest.into(),
            advice: "use mimus system x86_64".into(),
        });
    }
    let mut image = BzImage {
        protocol,
        header,
        code,
        has_64bit_entry: xloadflags & XLF_KERNEL_64 != 0,
        above_4g: xloadflags & XLF_ABOVE_4G != 0,
        load_address: LOAD_ADDRESS,
        run_address: LOAD_ADDRESS,
        init_size: 0,
        cmdline_max: u64::from(u32_at(bytes, 0x238).unwrap_or(0)).max(255),
        initrd_max: u64::from(u32_at(bytes, 0x22c).unwrap_or(0)),
    };
    image.place(bytes);
    if image.init_size > MAX_INIT_SIZE || image.run_address > MAX_INIT_SIZE {
        let (size, at) = (image.init_size, image.run_address);
        return Err(old(format!("its header asks for {size:#x} bytes at {at:#x}")));
    }
    if image.has_64bit_entry && (image.code.len() as u64) <= ENTRY_64 {
        return Err(truncated("it ends before its 64-bit entry point".into()));
    }
    Ok(image)
}

impl BzImage {
    /// Where it is loaded and where it runs ("pref_address", "init_size").
    fn place(&mut self, bytes: &[u8]) {
        let relocatable = self.protocol >= RELOCATABLE && u8_at(bytes, 0x234).unwrap_or(0) != 0;
        let preferred = u64_at(bytes, 0x258).filter(|_| self.protocol >= PREFERRED);
        let size = self.code.len() as u64;
        match preferred {
            // A relocatable kernel moves itself up to its preferred address at least.
            Some(at) if relocatable => self.run_address = at.max(LOAD_ADDRESS),
            Some(at) => (self.load_address, self.run_address) = (at, at),
            None => {}
        }
        let init = u32_at(bytes, 0x260).filter(|_| self.protocol >= PREFERRED);
        // Before init_size: three times its size was the rule of thumb of boot loaders.
        self.init_size = init.map_or(size.saturating_mul(3), u64::from).max(size);
    }

    /// First address beyond what the kernel uses before it reads the memory map.
    pub fn memory_end(&self) -> u64 {
        let loaded = self.load_address + self.code.len() as u64;
        loaded.max(self.run_address + self.init_size)
    }
}

/// Where the header ends: the jump at 0x200 goes over it, 0x202 + its distance.
fn header_end(bytes: &[u8]) -> Option<usize> {
    let end = 0x202 + usize::from(u8_at(bytes, 0x201)?);
    (end <= bytes.len() && end >= 0x23c).then_some(end)
}

/// Bytes of boot sector and set-up code, before the protected-mode part.
pub fn setup_len(bytes: &[u8]) -> usize {
    let sectors = match u8_at(bytes, HEADER).unwrap_or(0) {
        0 => 4,
        n => usize::from(n),
    };
    (sectors + 1) * SECTOR
}

fn protected_mode(bytes: &[u8]) -> Result<&[u8], String> {
    let start = setup_len(bytes);
    let length = u32_at(bytes, 0x1f4).unwrap_or(0) as usize * 16;
    if length == 0 {
        return Err("its header says the kernel has no bytes".into());
    }
    // syssize rounds up to 16; what follows the kernel is a signature.
    let rest = bytes.get(start..).unwrap_or(&[]);
    if rest.len() + 15 < length {
        let (need, have) = (start + length, bytes.len());
        return Err(format!("the file has {have} bytes, its header describes {need}"));
    }
    Ok(&rest[..length.min(rest.len())])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A bzImage of `len` protected-mode bytes with the fields of a current 64-bit kernel.
    pub(crate) fn bzimage(len: usize) -> Vec<u8> {
        let len = len.next_multiple_of(16);
        let mut b = vec![0u8; 0x400 + len];
        b[0x1f1] = 1;
        put(&mut b, 0x1f4, &(len as u32 / 16).to_le_bytes());
        b[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
        b[0x202..0x206].copy_from_slice(MAGIC);
        put(&mut b, 0x206, &0x020fu16.to_le_bytes());
        b[0x211] = 1;
        put(&mut b, 0x214, &0x10_0000u32.to_le_bytes());
        put(&mut b, 0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(&mut b, 0x230, &0x20_0000u32.to_le_bytes());
        b[0x234] = 1;
        put(&mut b, 0x236, &0x7fu16.to_le_bytes());
        put(&mut b, 0x238, &2047u32.to_le_bytes());
        put(&mut b, 0x258, &0x100_0000u64.to_le_bytes());
        put(&mut b, 0x260, &0x200_0000u32.to_le_bytes());
        b[0x400..].fill(0x90);
        b
    }

    pub(crate) fn put(b: &mut [u8], at: usize, value: &[u8]) {
        b[at..at + value.len()].copy_from_slice(value);
    }

    #[test]
    fn a_current_kernel() {
        let k = parse("-kernel k", &bzimage(0x1000), "x86_64").unwrap();
        assert!(k.has_64bit_entry && k.above_4g);
        assert_eq!((k.load_address, k.run_address, k.init_size), (0x10_0000, 0x100_0000, 0x200_0000));
        assert_eq!((k.cmdline_max, k.initrd_max, k.code.len()), (2047, 0x7fff_ffff, 0x1000));
        assert_eq!((k.memory_end(), k.header.len()), (0x300_0000, 0x26c - HEADER));
    }

    #[test]
    fn a_32bit_kernel_that_does_not_move() {
        let mut b = bzimage(0x2000);
        put(&mut b, 0x206, &0x020cu16.to_le_bytes());
        b[0x234] = 0;
        put(&mut b, 0x236, &4u16.to_le_bytes());
        put(&mut b, 0x258, &0x10_0000u64.to_le_bytes());
        for guest in ["i386", "x86_64"] {
            let k = parse("-kernel k", &b, guest).unwrap();
            assert!(!k.has_64bit_entry && !k.above_4g);
            assert_eq!((k.load_address, k.run_address), (0x10_0000, 0x10_0000));
        }
    }

    #[test]
    fn older_protocols_have_fewer_fields() {
        let mut b = bzimage(0x1000);
        put(&mut b, 0x206, &0x0208u16.to_le_bytes());
        let k = parse("-kernel k", &b, "x86_64").unwrap();
        assert!(!k.has_64bit_entry);
        assert_eq!((k.run_address, k.init_size), (LOAD_ADDRESS, 0x3000));
    }

    #[test]
    fn a_64bit_kernel_on_i386() {
        let text = parse("-kernel k", &bzimage(0x1000), "i386").unwrap_err().to_string();
        assert_eq!(text, "-kernel k is an x86-64 kernel; this is mimus system i386: use mimus system x86_64");
    }

    #[test]
    fn every_truncation_is_told() {
        let b = bzimage(0x1000);
        for len in [0x206, 0x210, 0x240, 0x3ff, 0x600, b.len() - 16] {
            let text = parse("-kernel k", &b[..len], "x86_64").unwrap_err().to_string();
            assert!(text.contains("truncated"), "{len:#x}: {text}");
        }
    }

    #[test]
    fn old_and_damaged_files() {
        type Change = fn(&mut Vec<u8>);
        let cases: &[(Change, &str)] = &[
            (|b| b[0x206] = 3, "boot protocol 2.03"),
            (|b| b[0x211] = 0, "zImage"),
            (|b| put(b, 0x260, &u32::MAX.to_le_bytes()), "its header asks for"),
            (|b| put(b, 0x258, &u64::MAX.to_le_bytes()), "its header asks for"),
            (|b| put(b, 0x1f4, &[0; 4]), "no bytes"),
            (|b| put(b, 0x1f4, &[0xff; 4]), "describes"),
        ];
        for (change, says) in cases {
            let mut b = bzimage(0x1000);
            change(&mut b);
            let text = parse("-kernel k", &b, "x86_64").unwrap_err().to_string();
            assert!(text.contains(says) && text.lines().count() == 1, "{says}: {text}");
        }
    }

    #[test]
    fn rubbish_headers_do_no_harm() {
        let mut seed = 0x1234_5678u32;
        for _ in 0..2000 {
            let mut b = bzimage(0x800);
            for byte in &mut b[0x206..0x264] {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if seed >> 30 == 0 {
                    *byte = (seed >> 16) as u8;
                }
            }
            b[0x1f1..0x1f8].rotate_left((seed >> 29) as usize);
            if let Ok(k) = parse("-kernel k", &b, "x86_64") {
                assert!(k.memory_end() <= 3 << 30);
            }
        }
    }
}
