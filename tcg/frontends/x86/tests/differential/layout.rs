//! Where a sequence finds code and data: the same addresses on the host and in the guest.

/// Three pages of data, then one that is read-only, then nothing.
pub const DATA: u64 = 0x1000_0000;
pub const DATA_LEN: usize = 0x4000;
pub const READ_ONLY: u64 = DATA + 0x3000;
/// Pages of code, which code may write to; the last it may not. Nothing is as far from the code or the data as the data
/// is from 0: a segment may begin there.
pub const CODE: u64 = 0x2400_0000;
pub const CODE_LEN: usize = 0x4000;
/// On the host: how to leave a sequence.
pub const LEAVE: u64 = CODE + 0x3f00;
/// On the host: registers before and after.
pub const CONTROL: u64 = 0x3000_0000;
pub const CONTROL_LEN: usize = 0x2000;
/// Addresses of single steps that are remembered.
pub const TRAIL: usize = 0x200;
/// What the guest's XCR0 has on: x87, SSE, AVX.
pub const GUEST_XCR0: u64 = 7;
/// About where the register that points into the data points.
pub const P_VALUE: u64 = DATA + 0x1000;
/// Addresses that are not canonical, or are and lead nowhere.
pub const W_VALUE: [u64; 4] = [0x8000_0000_0000_0000, 0x0000_8000_0000_0000, 0xffff_7fff_ffff_f000, DATA + 0x8000];
/// Selectors as Linux has them.
pub const CODE32: u16 = 0x23;
pub const DATA32: u16 = 0x2b;
pub const CODE64: u16 = 0x33;
/// Selectors in a local descriptor table that host and guest have: 16-bit code, which is at [`CODE`] and cannot be read,
/// and data at [`DATA`].
pub const CODE16: u16 = 0x07;
pub const DATA16: u16 = 0x0f;

/// One of its descriptors.
#[derive(Clone, Copy)]
pub struct Local {
    pub base: u64,
    pub limit: u32,
    pub code: bool,
    /// Data that goes down from 64 KiB to its limit.
    pub down: bool,
    /// It is written to, or code that is read.
    pub full: bool,
    pub present: bool,
    pub wide: bool,
}

const DATA_SEGMENT: Local =
    Local { base: DATA, limit: DATA_LEN as u32 - 1, code: false, down: false, full: true, present: true, wide: false };

pub const LOCAL: [Local; 8] = [
    Local { base: CODE, limit: CODE_LEN as u32 - 1, code: true, full: false, ..DATA_SEGMENT },
    DATA_SEGMENT,
    Local { limit: 0x1bff, ..DATA_SEGMENT },
    Local { limit: 0x5ff, down: true, ..DATA_SEGMENT },
    Local { full: false, ..DATA_SEGMENT },
    Local { present: false, ..DATA_SEGMENT },
    Local { wide: true, ..DATA_SEGMENT },
    // It reaches everywhere.
    Local { base: 0, limit: 0x9ff, down: true, wide: true, ..DATA_SEGMENT },
];

/// Where offset 0 of the data is in code of `bits` bits.
pub const fn data_base(bits: u32) -> u64 {
    if bits == 16 { DATA } else { 0 }
}

/// Where offset 0 of code of `bits` bits is.
pub const fn code_base(bits: u32) -> u64 {
    if bits == 16 { CODE } else { 0 }
}
/// Indices in a page of data of small numbers: doublewords, then quadwords.
pub const SMALL32: u64 = DATA + 0x2800;
pub const SMALL64: u64 = DATA + 0x2900;
