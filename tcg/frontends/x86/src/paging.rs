//! Page-table walks: 32-bit, PAE, 4-level and 5-level paging.
//!
//! Spec: SDM volume 3 chapter 5. Left out: shadow-stack pages, memory types (the emulated memory is coherent).

use mimus_arch::x86::regs::*;

use crate::exception::{Exception, Result};
use crate::host::Host;
use crate::state::State;

/// Present.
pub const P: u64 = 1 << 0;
/// Writable.
pub const RW: u64 = 1 << 1;
/// User.
pub const US: u64 = 1 << 2;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// A large page.
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execution.
pub const NX: u64 = 1 << 63;

/// Bits of a page fault's error code (SDM section 5.7).
pub mod error {
    pub const P: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    /// A protection key.
    pub const KEY: u32 = 1 << 5;
}

/// What the access is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Fetch,
    Load,
    Store,
}

/// A translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// Physical address.
    pub pa: u64,
    /// The same privilege may read the page.
    pub read: bool,
    /// The same privilege may write the page, and its dirty bit is set.
    pub write: bool,
    pub global: bool,
    /// Bytes of the page.
    pub size: u64,
}

/// One of the kinds of paging.
struct Format {
    levels: u32,
    entry_bytes: u32,
    /// Index bits per level.
    index_bits: u32,
}

fn format(st: &State) -> Format {
    if st.cr4 & CR4_PAE == 0 {
        Format { levels: 2, entry_bytes: 4, index_bits: 10 }
    } else if !st.long() {
        // The four pointers are in registers: what remains are two levels.
        Format { levels: 2, entry_bytes: 8, index_bits: 9 }
    } else if st.cr4 & CR4_LA57 != 0 {
        Format { levels: 5, entry_bytes: 8, index_bits: 9 }
    } else {
        Format { levels: 4, entry_bytes: 8, index_bits: 9 }
    }
}

/// Bits that must be zero in an entry (SDM tables 5-4 to 5-20).
fn reserved(st: &State, entry_bytes: u32, level: u32, entry: u64, large: bool) -> bool {
    if entry_bytes == 4 {
        // PSE-36: bits 20:13 are address bits 39:32, as far as the processor has them. The others up to 21 are reserved.
        let high = if st.features.pse36 { st.phys_bits.clamp(32, 40) - 32 } else { 0 };
        return large && entry & 0x003f_e000 & !(((1 << high) - 1) << 13) != 0;
    }
    let phys = !((1u64 << st.phys_bits) - 1) & 0x000f_ffff_ffff_f000;
    let mut bits = phys;
    if st.efer & EFER_NXE == 0 {
        bits |= NX;
    }
    if !st.long() {
        bits |= 0x7ff0_0000_0000_0000;
    }
    if large {
        // Between bit 13 (bit 12 is PAT) and the page's size.
        let size_bits = if level == 2 { 21 } else { 30 };
        bits |= ((1u64 << size_bits) - 1) & !0x1fff;
    } else if level >= 4 || (level == 3 && st.long() && !st.features.pdpe1gb) {
        bits |= PS;
    }
    if level >= 4 && st.features.amd {
        // APM volume 2 section 5.3.3: where a page would have G.
        bits |= G;
    }
    entry & bits != 0
}

/// Translates a linear address, and sets accessed and dirty bits.
///
/// # Errors
/// The page fault; `#GP(0)` for an address that is not canonical.
pub fn walk<H: Host + ?Sized>(h: &mut H, va: u64, access: Access, user: bool) -> Result<Leaf> {
    translate(h, va, access, user, true)
}

/// The same without side effects, for debuggers.
///
/// # Errors
/// As [`walk`].
pub fn peek<H: Host + ?Sized>(h: &mut H, va: u64, access: Access, user: bool) -> Result<Leaf> {
    translate(h, va, access, user, false)
}

/// Checks an access that the processor makes for itself, to a descriptor table or task-state segment: AC does not excuse it
/// from SMAP (SDM section 5.6.1, implicit accesses).
///
/// # Errors
/// The page fault.
pub fn check_implicit<H: Host + ?Sized>(h: &mut H, va: u64, bytes: u32, access: Access) -> Result<()> {
    let st = h.st();
    let flags = st.flags;
    if st.cr4 & CR4_SMAP == 0 || flags & RFLAGS_AC == 0 || st.cpl == 3 {
        return Ok(());
    }
    h.st_mut().flags &= !RFLAGS_AC;
    let (first, last) = (h.wrap(va), h.wrap(va.wrapping_add(u64::from(bytes) - 1)));
    let checked = walk(h, first, access, false).and_then(|_| walk(h, last, access, false));
    h.st_mut().flags = flags;
    checked.map(drop)
}

fn translate<H: Host + ?Sized>(h: &mut H, va: u64, access: Access, user: bool, mark: bool) -> Result<Leaf> {
    let st = h.st();
    if st.cr0 & CR0_PG == 0 {
        let pa = va & 0xffff_ffff;
        return Ok(Leaf { pa, read: true, write: true, global: true, size: 4096 });
    }
    if st.long() && !st.canonical(va) {
        return Err(Exception::GP0);
    }
    loop {
        match attempt(h, va, access, user, mark)? {
            Some(leaf) => return Ok(leaf),
            // Another processor changed an entry meanwhile.
            None => continue,
        }
    }
}

fn fault(st: &State, va: u64, access: Access, user: bool, cause: u32) -> Exception {
    let mut code = cause;
    if access == Access::Store {
        code |= error::WRITE;
    }
    if user {
        code |= error::USER;
    }
    let nx = st.efer & EFER_NXE != 0 && st.cr4 & CR4_PAE != 0;
    if access == Access::Fetch && (nx || st.cr4 & CR4_SMEP != 0) {
        code |= error::FETCH;
    }
    Exception::page(code, va)
}

fn attempt<H: Host + ?Sized>(h: &mut H, va: u64, access: Access, user: bool, mark: bool) -> Result<Option<Leaf>> {
    let st = h.st();
    let format = format(st);
    let pae32 = format.entry_bytes == 8 && !st.long();
    let mut table = if pae32 {
        let pdpte = st.pdptr[(va >> 30 & 3) as usize];
        if pdpte & P == 0 {
            return Err(fault(st, va, access, user, 0));
        }
        pdpte & 0x000f_ffff_ffff_f000
    } else if format.entry_bytes == 4 {
        st.cr3 & 0xffff_f000
    } else {
        st.cr3 & 0x000f_ffff_ffff_f000
    };
    let mut rights = RW | US;
    let mut nx = 0;
    let mut level = format.levels;
    loop {
        let shift = 12 + (level - 1) * format.index_bits;
        let index = va >> shift & ((1 << format.index_bits) - 1);
        let at = table + index * u64::from(format.entry_bytes);
        let entry = h.phys_read(at, format.entry_bytes);
        let st = h.st();
        if entry & P == 0 {
            return Err(fault(st, va, access, user, 0));
        }
        let can_be_large = match format.entry_bytes {
            4 => level == 2 && st.cr4 & CR4_PSE != 0,
            _ => level == 2 || (level == 3 && st.long() && st.features.pdpe1gb),
        };
        let large = level > 1 && entry & PS != 0 && can_be_large;
        if reserved(st, format.entry_bytes, level, entry, large) {
            return Err(fault(st, va, access, user, error::P | error::RSVD));
        }
        rights &= entry;
        nx |= entry & NX;
        if level > 1 && !large {
            if mark && entry & A == 0 && !h.phys_cmpxchg(at, format.entry_bytes, entry, entry | A) {
                return Ok(None);
            }
            table = if format.entry_bytes == 4 { entry & 0xffff_f000 } else { entry & 0x000f_ffff_ffff_f000 };
            level -= 1;
            continue;
        }
        let size = 1u64 << shift;
        let page = Page { rights, nx, key: (entry >> 59 & 15) as u32 };
        let key_forbids = st.cr4 & CR4_PKE != 0 && page.key_forbids(st, access, user);
        if key_forbids || !page.allows(st, access, user) {
            let key = if key_forbids { error::KEY } else { 0 };
            return Err(fault(st, va, access, user, error::P | key));
        }
        let grants = |access| page.allows(st, access, user) && !page.key_forbids(st, access, user);
        let (read, write) = (grants(Access::Load), grants(Access::Store));
        let dirty = if access == Access::Store { D } else { 0 };
        let new = entry | A | dirty;
        if mark && new != entry && !h.phys_cmpxchg(at, format.entry_bytes, entry, new) {
            return Ok(None);
        }
        let base = if format.entry_bytes == 4 && large {
            entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
        } else {
            entry & 0x000f_ffff_ffff_f000 & !(size - 1)
        };
        let global = entry & G != 0 && h.st().cr4 & CR4_PGE != 0;
        let pa = base | va & (size - 1);
        return Ok(Some(Leaf { pa, read, write: write && new & D != 0, global, size }));
    }
}

/// What the tables say of a page.
#[derive(Clone, Copy)]
struct Page {
    rights: u64,
    nx: u64,
    /// Protection key, of user pages in long mode.
    key: u32,
}

impl Page {
    /// SDM section 5.6.1.
    fn allows(self, st: &State, access: Access, user: bool) -> bool {
        let user_page = self.rights & US != 0;
        match access {
            Access::Fetch => self.nx == 0 && if user { user_page } else { !(user_page && st.cr4 & CR4_SMEP != 0) },
            _ if user => user_page && (access == Access::Load || self.rights & RW != 0),
            // An implicit access from user mode has no AC to excuse it.
            _ if user_page && st.cr4 & CR4_SMAP != 0 && (st.cpl == 3 || st.flags & RFLAGS_AC == 0) => false,
            Access::Load => true,
            Access::Store => self.rights & RW != 0 || st.cr0 & CR0_WP == 0,
        }
    }

    /// Whether the page's protection key forbids a data access (SDM section 5.6.2).
    fn key_forbids(self, st: &State, access: Access, user: bool) -> bool {
        if st.cr4 & CR4_PKE == 0 || !st.long() || self.rights & US == 0 || access == Access::Fetch {
            return false;
        }
        let (access_disabled, write_disabled) = (st.pkru >> (2 * self.key) & 1, st.pkru >> (2 * self.key + 1) & 1);
        let writes = access == Access::Store && (user || st.cr0 & CR0_WP != 0);
        access_disabled != 0 || writes && write_disabled != 0
    }
}

/// Loads the page-directory pointers of PAE paging from `cr3` (SDM section 5.4.1).
///
/// # Errors
/// `#GP(0)` if one has reserved bits set; the old ones stay.
pub fn load_pdptrs<H: Host + ?Sized>(h: &mut H, cr3: u64) -> Result<()> {
    let mut entries = [0; 4];
    for (i, entry) in entries.iter_mut().enumerate() {
        *entry = h.phys_read((cr3 & 0xffff_ffe0) + 8 * i as u64, 8);
        let high = !((1u64 << h.st().phys_bits) - 1);
        if *entry & P != 0 && *entry & (high | 0x1e6) != 0 {
            return Err(Exception::GP0);
        }
    }
    h.st_mut().pdptr = entries;
    Ok(())
}

/// Whether PAE paging with its pointer registers is on.
pub fn uses_pdptrs(st: &State) -> bool {
    st.cr0 & CR0_PG != 0 && st.cr4 & CR4_PAE != 0 && !st.long()
}
