//! An option ROM by which a BIOS boots the kernel of `-kernel`: its bootstrap entry reads
//! set-up code, kernel, initrd and command line through fw_cfg's DMA interface and goes to
//! the set-up code, as a boot loader would.
//!
//! Spec: BIOS Boot Specification 1.01 §3 (BEV devices), Plug and Play BIOS 1.0A §3
//! (expansion header); QEMU `docs/specs/fw_cfg` (DMA); Linux `boot.rst`, "Running the
//! Kernel". The ROM is made for one kernel: addresses and lengths are in it.

use mimus_devices::misc::fw_cfg::{self, key};

use super::fw_cfg::{SETUP_ADDRESS, SETUP_DATA};
use crate::boot::x86::{BzImage, CMDLINE};

/// Its file in fw_cfg, which BIOSes look for in this folder.
pub const FILE: &str = "genroms/kernel.bin";
/// The line of `bootorder` that has it booted first.
pub const BOOT_ORDER: &str = "/rom@genroms/kernel.bin";

/// Where the transfer's descriptor is, in memory that is nobody's while a system is booted.
const DESCRIPTOR: u16 = 0x600;
const HEADER_LEN: usize = 0x1c;
const PNP: usize = 0x20;
const PNP_LEN: usize = 0x20;
const NAME: usize = PNP + PNP_LEN;
const SECTOR: usize = 512;
/// A fw_cfg transfer: select the item, read.
const SELECT_READ: u32 = 8 | 2;
/// Where the set-up code's stack and heap end, in its segment.
pub const HEAP_END: u16 = 0xe000;

/// What is loaded: the item, its length and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    item: u16,
    len: u32,
    address: u64,
}

/// The ROM for a kernel whose set-up part has `setup_len` bytes, with an initrd at its
/// address and length, and `cmdline_len` bytes of command line.
pub fn build(kernel: &BzImage, setup_len: usize, initrd: Option<(u64, u64)>, cmdline_len: usize) -> Vec<u8> {
    let mut loads = vec![
        Load { item: SETUP_DATA, len: setup_len as u32, address: SETUP_ADDRESS },
        Load { item: key::KERNEL_DATA, len: kernel.code.len() as u32, address: kernel.load_address },
        Load { item: key::CMDLINE_DATA, len: cmdline_len as u32, address: CMDLINE },
    ];
    if let Some((address, len)) = initrd {
        loads.push(Load { item: key::INITRD_DATA, len: len as u32, address });
    }
    rom(&loads)
}

fn rom(loads: &[Load]) -> Vec<u8> {
    let name = b"Linux kernel\0";
    let entry = (NAME + name.len()).next_multiple_of(16);
    let mut code = Vec::new();
    let table = entry + code_len();
    assemble(&mut code, table as u16, loads.len() as u8);
    let mut out = vec![0; PNP];
    out[..2].copy_from_slice(&[0x55, 0xaa]);
    // Initialisation: nothing to do, `retf`.
    out[3] = 0xcb;
    out[0x1a..HEADER_LEN].copy_from_slice(&(PNP as u16).to_le_bytes());
    out.extend(pnp_header(entry as u16));
    out.extend(name);
    out.resize(entry, 0);
    out.extend(&code);
    assert_eq!(out.len(), table);
    out.extend(loads.iter().flat_map(descriptor));
    out.resize((out.len() + 1).next_multiple_of(SECTOR), 0);
    out[2] = (out.len() / SECTOR) as u8;
    let sum = out.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    if let Some(last) = out.last_mut() {
        *last = sum.wrapping_neg();
    }
    out
}

fn pnp_header(entry: u16) -> [u8; PNP_LEN] {
    let mut h = [0; PNP_LEN];
    h[..4].copy_from_slice(b"$PnP");
    // Version 1, length in 16 bytes, no next header.
    h[4..8].copy_from_slice(&[1, (PNP_LEN / 16) as u8, 0, 0]);
    h[0x0e..0x10].copy_from_slice(&(NAME as u16).to_le_bytes());
    h[0x10..0x12].copy_from_slice(&(NAME as u16).to_le_bytes());
    // Device: "other". Indicators: an initial program load device.
    h[0x12] = 0xff;
    h[0x15] = 1 << 2;
    h[0x1a..0x1c].copy_from_slice(&entry.to_le_bytes());
    h[9] = h.iter().fold(0u8, |s, b| s.wrapping_add(*b)).wrapping_neg();
    h
}

/// Control, length, address: big-endian, as the device reads them.
fn descriptor(load: &Load) -> Vec<u8> {
    let control = u32::from(load.item) << 16 | SELECT_READ;
    let mut d = control.to_be_bytes().to_vec();
    d.extend(load.len.to_be_bytes());
    d.extend(load.address.to_be_bytes());
    d
}

/// The bootstrap code: 16-bit, entered by a far call with CS the ROM's segment.
fn assemble(c: &mut Vec<u8>, table: u16, count: u8) {
    fn emit(c: &mut Vec<u8>, bytes: &[u8]) {
        c.extend(bytes);
    }
    fn jnz(c: &mut Vec<u8>, to: usize) {
        let distance = to as i64 - (c.len() as i64 + 2);
        c.extend([0x75, distance as i8 as u8]);
    }
    let port = |offset: u16| (fw_cfg::PORT + offset).to_le_bytes();
    let (dma_high, dma_low) = (port(4), port(8));
    let d = DESCRIPTOR.to_le_bytes();
    let table = table.to_le_bytes();
    emit(c, &[0xfa, 0xfc]); // cli; cld
    emit(c, &[0x31, 0xc0, 0x8e, 0xc0]); // xor ax, ax; mov es, ax
    emit(c, &[0x0e, 0x1f]); // push cs; pop ds
    emit(c, &[0xbe, table[0], table[1]]); // mov si, table
    emit(c, &[0xbb, count, 0x00]); // mov bx, count
    let next = c.len();
    emit(c, &[0xbf, d[0], d[1]]); // mov di, DESCRIPTOR
    emit(c, &[0xb9, 0x08, 0x00, 0xf3, 0xa5]); // mov cx, 8; rep movsw
    emit(c, &[0x66, 0x31, 0xc0]); // xor eax, eax
    emit(c, &[0xba, dma_high[0], dma_high[1], 0x66, 0xef]); // mov dx, 0x514; out dx, eax
    emit(c, &[0x66, 0xb8, 0x00, 0x00, d[1], d[0]]); // mov eax, bswap(DESCRIPTOR)
    emit(c, &[0xba, dma_low[0], dma_low[1], 0x66, 0xef]); // mov dx, 0x518; out dx, eax
    // The control field becomes 0, or its error bit stays.
    let wait = c.len();
    emit(c, &[0x26, 0x66, 0xa1, d[0], d[1]]); // mov eax, es:[DESCRIPTOR]
    emit(c, &[0x66, 0x25, 0xff, 0xff, 0xff, 0xfe]); // and eax, ~error (bit 0 of the last byte)
    jnz(c, wait);
    emit(c, &[0x4b]); // dec bx
    jnz(c, next);
    // The state of "Running the Kernel": all segments that of the set-up part, the stack at the heap's end.
    let segment = ((SETUP_ADDRESS >> 4) as u16).to_le_bytes();
    let entry = ((SETUP_ADDRESS >> 4) as u16 + 0x20).to_le_bytes();
    let sp = HEAP_END.to_le_bytes();
    emit(c, &[0xb8, segment[0], segment[1]]); // mov ax, segment
    emit(c, &[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xe0, 0x8e, 0xe8]); // mov ds, es, fs, gs
    emit(c, &[0x8e, 0xd0, 0xbc, sp[0], sp[1]]); // mov ss, ax; mov sp, HEAP_END
    emit(c, &[0xea, 0x00, 0x00, entry[0], entry[1]]); // jmp segment + 0x20:0
}

fn code_len() -> usize {
    let mut c = Vec::new();
    assemble(&mut c, 0, 0);
    c.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        rom(&[
            Load { item: SETUP_DATA, len: 0x4800, address: SETUP_ADDRESS },
            Load { item: key::KERNEL_DATA, len: 0x12_3456, address: 0x10_0000 },
        ])
    }

    #[test]
    fn headers() {
        let rom = sample();
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, x| s.wrapping_add(*x));
        assert_eq!((&rom[..2], usize::from(rom[2]) * SECTOR, rom[3]), (&[0x55, 0xaa][..], rom.len(), 0xcb));
        assert_eq!(sum(&rom), 0);
        assert_eq!((&rom[PNP..PNP + 4], sum(&rom[PNP..PNP + PNP_LEN])), (&b"$PnP"[..], 0));
        let entry = usize::from(u16::from_le_bytes([rom[PNP + 0x1a], rom[PNP + 0x1b]]));
        assert_eq!(rom[entry..entry + 2], [0xfa, 0xfc]);
    }

    /// Short jumps go to the beginnings of their loops, and SI to the descriptors.
    #[test]
    fn jumps_and_table() {
        let rom = sample();
        let entry = usize::from(u16::from_le_bytes([rom[PNP + 0x1a], rom[PNP + 0x1b]]));
        let code = &rom[entry..entry + code_len()];
        let find = |bytes: &[u8]| code.windows(bytes.len()).position(|w| w == bytes).unwrap();
        let target = |at: usize| (at as i64 + 2 + i64::from(code[at + 1] as i8)) as usize;
        let wait = find(&[0xfe, 0x75]) + 1;
        assert_eq!(target(wait), find(&[0x26, 0x66, 0xa1]));
        let next = find(&[0x4b, 0x75]) + 1;
        assert_eq!(target(next), find(&[0xbf, 0x00, 0x06]));
        let table = usize::from(u16::from_le_bytes([code[9], code[10]]));
        let first = &rom[table..table + 16];
        assert_eq!(first[..4], (u32::from(SETUP_DATA) << 16 | 10).to_be_bytes());
        assert_eq!((&first[4..8], &first[8..]), (&0x4800u32.to_be_bytes()[..], &SETUP_ADDRESS.to_be_bytes()[..]));
    }
}
