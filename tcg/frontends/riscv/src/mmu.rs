//! Page-table walks: Sv39, Sv48 and Sv57 with Svpbmt and Svnapot, and A/D updating as
//! Svadu or Svade (sections 12.3 to 12.6, 12.10).
//!
//! A walk gives the engine what it caches in its TLB. It is exact: every
//! reserved encoding faults, and the page-table accesses themselves pass PMP.

use mimus_arch::riscv::Privilege;

use crate::pmp::Permissions;
use crate::state::{Hart, envcfg};
use crate::trap::{Cause, Exception};

#[cfg(test)]
mod tests;

/// Page-table entry bits.
pub mod pte {
    /// Valid.
    pub const V: u64 = 1;
    /// Readable.
    pub const R: u64 = 1 << 1;
    /// Writable.
    pub const W: u64 = 1 << 2;
    /// Executable.
    pub const X: u64 = 1 << 3;
    /// Accessible to U-mode.
    pub const U: u64 = 1 << 4;
    /// In every address space.
    pub const G: u64 = 1 << 5;
    /// Accessed.
    pub const A: u64 = 1 << 6;
    /// Dirty.
    pub const D: u64 = 1 << 7;
    /// Position of the physical page number.
    pub const PPN_SHIFT: u32 = 10;
    /// The physical page number (44 bits).
    pub const PPN: u64 = ((1 << 44) - 1) << PPN_SHIFT;
    /// Reserved: must be zero.
    pub const RESERVED: u64 = 0x7f << 54;
    /// Position of the memory type.
    pub const PBMT_SHIFT: u32 = 61;
    /// Memory type (Svpbmt).
    pub const PBMT: u64 = 3 << PBMT_SHIFT;
    /// One of 16 entries that map 64 KiB together (Svnapot).
    pub const N: u64 = 1 << 63;
}

/// Physical addresses have 56 bits.
const PA_LIMIT: u64 = 1 << 56;
const PAGE_SHIFT: u32 = 12;

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Access {
    /// Fetch an instruction.
    Fetch = 0,
    /// Load.
    Load = 1,
    /// Store, AMO or store-conditional.
    Store = 2,
}

/// Why a walk gave no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The page table does not allow it.
    Page,
    /// The physical access is not allowed or reaches nothing.
    Access,
}

impl Fault {
    /// The exception this fault of `access` at `va` raises.
    pub const fn exception(self, access: Access, va: u64) -> Exception {
        let cause = match (self, access) {
            (Self::Page, Access::Fetch) => Cause::FetchPage,
            (Self::Page, Access::Load) => Cause::LoadPage,
            (Self::Page, Access::Store) => Cause::StorePage,
            (Self::Access, Access::Fetch) => Cause::FetchAccess,
            (Self::Access, Access::Load) => Cause::LoadAccess,
            (Self::Access, Access::Store) => Cause::StoreAccess,
        };
        Exception { cause, tval: va }
    }
}

/// There is no memory that can hold a page table at this address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoMemory;

/// Guest physical memory as the walker sees it: little-endian, 8-byte aligned
/// entries. An implementation must not block or touch devices.
pub trait PhysMem {
    /// Reads the entry at `pa`.
    ///
    /// # Errors
    /// [`NoMemory`] when `pa` is not in RAM or ROM.
    fn read_pte(&mut self, pa: u64) -> Result<u64, NoMemory>;

    /// Atomically replaces the entry at `pa` if it still equals `old`;
    /// returns whether it did.
    ///
    /// # Errors
    /// [`NoMemory`] when `pa` cannot be written.
    fn compare_exchange_pte(&mut self, pa: u64, old: u64, new: u64) -> Result<bool, NoMemory>;
}

/// The memory type of a page (Svpbmt).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MemoryType {
    /// As the physical address says.
    #[default]
    Pma,
    /// Non-cacheable main memory.
    NonCacheable,
    /// Strongly ordered I/O.
    Io,
}

/// A translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The physical address of the byte asked for.
    pub pa: u64,
    /// Bytes the entry maps: 4 KiB up to 256 TiB.
    pub page_size: u64,
    /// What the walk's privilege may do with the page now, with SUM and MXR
    /// applied. `write` is set only when the D bit is, so that a store
    /// permission in it can be cached; the same for A and the others.
    pub allowed: Permissions,
    /// The entry's U bit.
    pub user: bool,
    /// The entry's G bit: the translation is good in every address space.
    pub global: bool,
    /// The entry's D bit, after this access.
    pub dirty: bool,
    /// The memory type.
    pub memory_type: MemoryType,
}

impl Leaf {
    /// The translation of an address that is not translated.
    const fn identity(pa: u64) -> Self {
        Self {
            pa,
            page_size: 1 << PAGE_SHIFT,
            allowed: Permissions::ALL,
            user: false,
            global: true,
            dirty: true,
            memory_type: MemoryType::Pma,
        }
    }
}

/// Whether accesses with `privilege` go through a page table.
pub const fn translates(hart: &Hart, privilege: Privilege) -> bool {
    !matches!(privilege, Privilege::Machine) && hart.satp() >> 60 != 0
}

/// Names the address space `hart` sees now: harts with equal keys translate
/// equally, up to `sfence.vma`.
///
/// | bits | what |
/// |---|---|
/// | 15:0 | ASID |
/// | 19:16 | `satp.MODE` |
/// | 21:20, 23:22 | privilege of fetches, of loads and stores |
/// | 25:24 | SUM, MXR |
///
/// What does not matter in Bare mode and for M-mode is zero.
pub fn context_key(hart: &Hart) -> u64 {
    let data = hart.data_privilege();
    let mut key = (hart.privilege as u64) << 20 | (data as u64) << 22;
    // M-mode fetches translate only if its loads and stores do, by MPRV.
    if translates(hart, data) {
        key |= (hart.satp() >> 44 & 0xf_ffff) | u64::from(hart.sum()) << 24 | u64::from(hart.mxr()) << 25;
    }
    key
}

/// Whether the address space of `key` is translated, so that `sfence.vma`
/// concerns it.
pub const fn key_translates(key: u64) -> bool {
    key >> 16 & 0xf != 0
}

/// The ASID of the address space of `key`.
pub const fn key_asid(key: u64) -> u16 {
    key as u16
}

/// Translates `va` for `access` with `privilege` (see
/// [`Hart::data_privilege`]), updating A and D when `menvcfg.ADUE` is set.
///
/// PMP is applied to the page-table accesses only: see [`translate`].
///
/// # Errors
/// A page fault or, for page tables that cannot be accessed, an access fault.
pub fn walk<M: PhysMem + ?Sized>(
    hart: &Hart,
    va: u64,
    access: Access,
    privilege: Privilege,
    mem: &mut M,
) -> Result<Leaf, Fault> {
    if !translates(hart, privilege) {
        return if va < PA_LIMIT { Ok(Leaf::identity(va)) } else { Err(Fault::Access) };
    }
    let levels = levels(hart.satp());
    if !is_canonical(va, levels) {
        return Err(Fault::Page);
    }
    let request = Request { va, access, privilege };
    // A walk starts again only when another agent changed the entry it was
    // about to update, so that somebody always makes progress.
    loop {
        if let Some(leaf) = walk_once(hart, request, levels, mem)? {
            return Ok(leaf);
        }
    }
}

/// One walk; `None` when the leaf changed before its A and D bits were set.
fn walk_once<M: PhysMem + ?Sized>(
    hart: &Hart,
    request: Request,
    levels: u32,
    mem: &mut M,
) -> Result<Option<Leaf>, Fault> {
    let mut table = (hart.satp() & ((1 << 44) - 1)) << PAGE_SHIFT;
    for level in (0..levels).rev() {
        let address = table + (request.va >> (PAGE_SHIFT + 9 * level) & 0x1ff) * 8;
        let entry = read_entry(hart, address, mem)?;
        if entry & (pte::R | pte::W | pte::X) != 0 {
            return leaf(hart, request, Found { address, entry, level }, mem);
        }
        check_pointer(entry)?;
        table = (entry & pte::PPN) << (PAGE_SHIFT - pte::PPN_SHIFT);
    }
    // A pointer at the last level leads nowhere.
    Err(Fault::Page)
}

/// [`walk`], then PMP on the access of `len` bytes itself (which must not
/// cross a page).
///
/// # Errors
/// A page fault or an access fault.
pub fn translate<M: PhysMem + ?Sized>(
    hart: &Hart,
    va: u64,
    len: u64,
    access: Access,
    privilege: Privilege,
    mem: &mut M,
) -> Result<Leaf, Fault> {
    let leaf = walk(hart, va, access, privilege, mem)?;
    if hart.pmp.check(leaf.pa, len, access, privilege) { Ok(leaf) } else { Err(Fault::Access) }
}

/// What is being translated.
#[derive(Clone, Copy)]
struct Request {
    va: u64,
    access: Access,
    privilege: Privilege,
}

/// The leaf entry the walk arrived at.
struct Found {
    address: u64,
    entry: u64,
    level: u32,
}

/// Levels of the page table `satp.MODE` selects.
const fn levels(satp: u64) -> u32 {
    match satp >> 60 {
        8 => 3,
        9 => 4,
        _ => 5,
    }
}

/// Whether the bits above the translated ones all equal the highest of them.
const fn is_canonical(va: u64, levels: u32) -> bool {
    let unused = 64 - (PAGE_SHIFT + 9 * levels);
    (va << unused) as i64 >> unused == va as i64
}

/// Reads an entry with the checks common to leaves and pointers.
fn read_entry<M: PhysMem + ?Sized>(hart: &Hart, address: u64, mem: &mut M) -> Result<u64, Fault> {
    // Page-table accesses are S-mode accesses to PMP (section 12.3.2).
    if !hart.pmp.check(address, 8, Access::Load, Privilege::Supervisor) {
        return Err(Fault::Access);
    }
    let entry = mem.read_pte(address).map_err(|NoMemory| Fault::Access)?;
    let write_only = entry & (pte::R | pte::W) == pte::W;
    if entry & pte::V == 0 || write_only || entry & pte::RESERVED != 0 {
        return Err(Fault::Page);
    }
    Ok(entry)
}

/// A pointer to the next level must have D, A, U, N and the memory type clear.
const fn check_pointer(entry: u64) -> Result<(), Fault> {
    if entry & (pte::D | pte::A | pte::U | pte::N | pte::PBMT) != 0 { Err(Fault::Page) } else { Ok(()) }
}

/// Checks the leaf, updates A and D, and builds the translation; `None` when
/// the entry changed meanwhile.
fn leaf<M: PhysMem + ?Sized>(hart: &Hart, request: Request, found: Found, mem: &mut M) -> Result<Option<Leaf>, Fault> {
    let Found { address, mut entry, level } = found;
    let memory_type = memory_type(hart, entry)?;
    let permitted = permitted(hart, entry, request.privilege);
    if !permitted.allows(request.access) {
        return Err(Fault::Page);
    }
    let (base, page_size) = mapped(hart, entry, level)?;
    if base & (page_size - 1) != 0 {
        return Err(Fault::Page); // misaligned superpage
    }
    let wanted = if request.access == Access::Store { pte::A | pte::D } else { pte::A };
    if entry & wanted != wanted {
        if !update(hart, address, entry, entry | wanted, mem)? {
            return Ok(None);
        }
        entry |= wanted;
    }
    let dirty = entry & pte::D != 0;
    Ok(Some(Leaf {
        pa: base | request.va & (page_size - 1),
        page_size,
        allowed: Permissions { write: permitted.write && dirty, ..permitted },
        user: entry & pte::U != 0,
        global: entry & pte::G != 0,
        dirty,
        memory_type,
    }))
}

/// The base and size of what the leaf maps. Of Svnapot's patterns only 64 KiB
/// is defined (section 12.8): 1000 in the low bits of the page number, which
/// are then address bits.
const fn mapped(hart: &Hart, entry: u64, level: u32) -> Result<(u64, u64), Fault> {
    const NAPOT_64K: u64 = 8 << PAGE_SHIFT;
    const NAPOT_BITS: u64 = 0xf << PAGE_SHIFT;
    let base = (entry & pte::PPN) << (PAGE_SHIFT - pte::PPN_SHIFT);
    if entry & pte::N == 0 {
        Ok((base, 1 << (PAGE_SHIFT + 9 * level)))
    } else if hart.config.svnapot && level == 0 && base & NAPOT_BITS == NAPOT_64K {
        Ok((base & !NAPOT_BITS, 1 << 16))
    } else {
        Err(Fault::Page)
    }
}

/// The leaf's memory type; a type is reserved unless `menvcfg.PBMTE` is set.
const fn memory_type(hart: &Hart, entry: u64) -> Result<MemoryType, Fault> {
    let enabled = hart.menvcfg() & envcfg::PBMTE != 0;
    match (entry & pte::PBMT) >> pte::PBMT_SHIFT {
        0 => Ok(MemoryType::Pma),
        1 if enabled => Ok(MemoryType::NonCacheable),
        2 if enabled => Ok(MemoryType::Io),
        _ => Err(Fault::Page),
    }
}

/// What the leaf's permission bits let `privilege` do (section 12.3.2, step 8).
const fn permitted(hart: &Hart, entry: u64, privilege: Privilege) -> Permissions {
    let user_page = entry & pte::U != 0;
    let (data, execute) = match privilege {
        Privilege::User => (user_page, user_page),
        // S-mode never executes user pages, and reads them only with SUM.
        _ => (!user_page || hart.sum(), !user_page),
    };
    let readable = entry & pte::R != 0 || hart.mxr() && entry & pte::X != 0;
    Permissions { read: data && readable, write: data && entry & pte::W != 0, execute: execute && entry & pte::X != 0 }
}

/// Sets A and D in memory. `Ok(false)` means the entry changed meanwhile.
fn update<M: PhysMem + ?Sized>(hart: &Hart, address: u64, old: u64, new: u64, mem: &mut M) -> Result<bool, Fault> {
    // Svade: software sets the bits.
    if hart.menvcfg() & envcfg::ADUE == 0 {
        return Err(Fault::Page);
    }
    if !hart.pmp.check(address, 8, Access::Store, Privilege::Supervisor) {
        return Err(Fault::Access);
    }
    mem.compare_exchange_pte(address, old, new).map_err(|NoMemory| Fault::Access)
}
