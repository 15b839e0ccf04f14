//! Page-table walks over hand-made tables: every kind of fault, every level
//! of every mode, permissions, A/D updating and PMP on the tables.

use super::*;
use crate::state::{HartConfig, mstatus};
use mimus_arch::riscv::models::RiscvModel;
use std::collections::HashMap;

const ROOT: u64 = 0x8000_0000;
const VA: u64 = 0x12_3456_7abc;
const FRAME: u64 = 0x9_8765_4000;
const RWXAD: u64 = pte::V | pte::R | pte::W | pte::X | pte::A | pte::D;

/// Sparse memory; entries in `racing` change once when an update is tried.
#[derive(Default)]
struct Memory {
    entries: HashMap<u64, u64>,
    racing: HashMap<u64, u64>,
    read_only: bool,
}

impl PhysMem for Memory {
    fn read_pte(&mut self, pa: u64) -> Result<u64, NoMemory> {
        assert_eq!(pa % 8, 0);
        self.entries.get(&pa).copied().ok_or(NoMemory)
    }

    fn compare_exchange_pte(&mut self, pa: u64, old: u64, new: u64) -> Result<bool, NoMemory> {
        if self.read_only {
            return Err(NoMemory);
        }
        if let Some(changed) = self.racing.remove(&pa) {
            self.entries.insert(pa, changed);
        }
        let entry = self.entries.get_mut(&pa).ok_or(NoMemory)?;
        if *entry != old {
            return Ok(false);
        }
        *entry = new;
        Ok(true)
    }
}

/// A hart in `mode` with PMP open, hardware A/D updating off.
fn hart(mode: u64, privilege: Privilege) -> Hart {
    let model = RiscvModel::parse("rv64,svpbmt=on,svnapot=on").unwrap();
    let mut hart = Hart::new(HartConfig::new(&model, 0));
    hart.privilege = privilege;
    hart.satp = mode << 60 | ROOT >> 12;
    open_pmp(&mut hart, &[]);
    hart
}

/// Entries before one that allows everything.
fn open_pmp(hart: &mut Hart, first: &[(u8, u64)]) {
    let (mut config, mut address) = ([0; 16], [0; 16]);
    for (i, entry) in first.iter().chain(&[(0x1f, !0)]).enumerate() {
        (config[i], address[i]) = *entry;
    }
    hart.pmp.restore(config, address);
}

const fn frame(pa: u64) -> u64 {
    pa >> 12 << pte::PPN_SHIFT
}

/// Where the entry of `va` at `level` is: table k of the walk is at ROOT + k pages.
fn entry_address(levels: u32, level: u32, va: u64) -> u64 {
    ROOT + u64::from(levels - 1 - level) * 4096 + (va >> (12 + 9 * level) & 0x1ff) * 8
}

/// Tables for `va` down to a leaf at `level` with these bits.
fn map(mode: u64, va: u64, level: u32, leaf: u64) -> Memory {
    let levels = levels(mode << 60);
    let mut memory = Memory::default();
    for l in (level + 1..levels).rev() {
        let next = ROOT + u64::from(levels - l) * 4096;
        memory.entries.insert(entry_address(levels, l, va), frame(next) | pte::V);
    }
    memory.entries.insert(entry_address(levels, level, va), leaf);
    memory
}

fn load(hart: &Hart, memory: &mut Memory) -> Result<Leaf, Fault> {
    walk(hart, VA, Access::Load, hart.privilege, memory)
}

#[test]
fn every_level_of_every_mode() {
    for mode in [8, 9, 10] {
        let hart = hart(mode, Privilege::Supervisor);
        for level in 0..levels(mode << 60) {
            let size = 1u64 << (12 + 9 * level);
            let base = if level == 4 { 0 } else { FRAME & !(size - 1) };
            let mut memory = map(mode, VA, level, frame(base) | RWXAD | pte::G);
            let leaf = load(&hart, &mut memory).unwrap();
            assert_eq!((leaf.pa, leaf.page_size), (base | VA & (size - 1), size), "mode {mode} level {level}");
            assert_eq!(leaf.allowed, Permissions::ALL);
            assert!(leaf.global && leaf.dirty && !leaf.user);
            if level > 0 {
                let mut misaligned = map(mode, VA, level, frame(base + 4096) | RWXAD);
                assert_eq!(load(&hart, &mut misaligned), Err(Fault::Page));
            }
        }
    }
}

#[test]
fn addresses_outside_the_mode_fault() {
    for (mode, bits) in [(8, 39), (9, 48), (10, 57)] {
        let hart = hart(mode, Privilege::Supervisor);
        let top = 1u64 << (bits - 1);
        for va in [top, 1 << 63, !(top << 1), VA | 1 << 62] {
            assert_eq!(
                walk(&hart, va, Access::Load, Privilege::Supervisor, &mut Memory::default()),
                Err(Fault::Page),
                "{va:x}"
            );
        }
        // The lowest address of the upper half does reach the tables.
        let va = top.wrapping_neg();
        let mut memory = map(mode, va, 0, frame(FRAME) | RWXAD);
        assert_eq!(walk(&hart, va, Access::Load, Privilege::Supervisor, &mut memory).map(|l| l.pa), Ok(FRAME));
    }
}

#[test]
fn bare_and_machine_mode_are_identity() {
    let machine = hart(8, Privilege::Machine);
    let bare = hart(0, Privilege::User);
    for hart in [&machine, &bare] {
        let leaf = load(hart, &mut Memory::default()).unwrap();
        assert_eq!((leaf.pa, leaf.allowed), (VA, Permissions::ALL));
        let high = walk(hart, 1 << 56, Access::Fetch, hart.privilege, &mut Memory::default());
        assert_eq!(high, Err(Fault::Access));
    }
}

#[test]
fn reserved_entries_fault() {
    let hart = hart(8, Privilege::Supervisor);
    let leaf = frame(FRAME) | RWXAD;
    for bad in [
        0,
        leaf & !pte::V,
        leaf & !(pte::R | pte::X),
        leaf & !pte::R,
        leaf | 1 << 54,
        leaf | 1 << 60,
        leaf | pte::N,
        leaf | 1 << 61,
        leaf | 3 << 61,
        frame(FRAME) | pte::V,
    ] {
        assert_eq!(load(&hart, &mut map(8, VA, 0, bad)), Err(Fault::Page), "{bad:x}");
    }
    for bad in [pte::A, pte::D, pte::U, pte::N, 1 << 61, 1 << 54] {
        let mut memory = map(8, VA, 0, leaf);
        *memory.entries.get_mut(&entry_address(3, 1, VA)).unwrap() |= bad;
        assert_eq!(load(&hart, &mut memory), Err(Fault::Page), "pointer with {bad:x}");
    }
    let mut memory = map(8, VA, 0, leaf);
    memory.entries.remove(&entry_address(3, 1, VA));
    assert_eq!(load(&hart, &mut memory), Err(Fault::Access), "a table outside memory");
}

#[test]
fn permissions_by_mode_sum_and_mxr() {
    let combinations = [pte::R, pte::R | pte::W, pte::X, pte::R | pte::X, pte::R | pte::W | pte::X];
    for rwx in combinations {
        for user in [0, pte::U] {
            for privilege in [Privilege::User, Privilege::Supervisor] {
                for status in [0, mstatus::SUM, mstatus::MXR, mstatus::SUM | mstatus::MXR] {
                    let mut hart = hart(8, privilege);
                    hart.mstatus |= status;
                    let (sum, mxr) = (status & mstatus::SUM != 0, status & mstatus::MXR != 0);
                    for access in [Access::Fetch, Access::Load, Access::Store] {
                        let mode_ok = match (privilege, user != 0) {
                            (Privilege::User, u) => u,
                            (_, true) => sum && access != Access::Fetch,
                            (_, false) => true,
                        };
                        let bit_ok = match access {
                            Access::Fetch => rwx & pte::X != 0,
                            Access::Load => rwx & pte::R != 0 || mxr && rwx & pte::X != 0,
                            Access::Store => rwx & pte::W != 0,
                        };
                        let mut memory = map(8, VA, 0, frame(FRAME) | pte::V | pte::A | pte::D | rwx | user);
                        let result = walk(&hart, VA, access, privilege, &mut memory);
                        assert_eq!(
                            result.is_ok(),
                            mode_ok && bit_ok,
                            "{rwx:x} {user:x} {privilege:?} {status:x} {access:?}"
                        );
                        if let Ok(leaf) = result {
                            assert!(leaf.allowed.allows(access));
                        } else {
                            assert_eq!(result, Err(Fault::Page));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn accessed_and_dirty_by_software() {
    let hart = hart(8, Privilege::Supervisor);
    let clean = frame(FRAME) | RWXAD & !pte::D;
    assert_eq!(load(&hart, &mut map(8, VA, 0, clean & !pte::A)), Err(Fault::Page));
    let leaf = load(&hart, &mut map(8, VA, 0, clean)).unwrap();
    assert!(!leaf.dirty && !leaf.allowed.write && leaf.allowed.read, "a clean page's stores are not cached");
    assert_eq!(walk(&hart, VA, Access::Store, Privilege::Supervisor, &mut map(8, VA, 0, clean)), Err(Fault::Page));
}

#[test]
fn accessed_and_dirty_by_hardware() {
    let mut hart = hart(8, Privilege::Supervisor);
    hart.menvcfg |= envcfg::ADUE;
    let fresh = frame(FRAME) | RWXAD & !(pte::A | pte::D);
    let at = entry_address(3, 0, VA);
    let mut memory = map(8, VA, 0, fresh);
    let leaf = load(&hart, &mut memory).unwrap();
    assert!(!leaf.dirty && !leaf.allowed.write);
    assert_eq!(memory.entries[&at], fresh | pte::A);
    let leaf = walk(&hart, VA, Access::Store, Privilege::Supervisor, &mut memory).unwrap();
    assert!(leaf.dirty && leaf.allowed.write);
    assert_eq!(memory.entries[&at], fresh | pte::A | pte::D);
    // A fault for another reason must not set the bits.
    let mut read_only = map(8, VA, 0, fresh & !pte::W);
    assert_eq!(walk(&hart, VA, Access::Store, Privilege::Supervisor, &mut read_only), Err(Fault::Page));
    assert_eq!(read_only.entries[&at], fresh & !pte::W);
    let mut rom = map(8, VA, 0, fresh);
    rom.read_only = true;
    assert_eq!(load(&hart, &mut rom), Err(Fault::Access));
}

#[test]
fn an_entry_that_changes_under_the_walk_is_read_again() {
    let mut hart = hart(8, Privilege::Supervisor);
    hart.menvcfg |= envcfg::ADUE;
    let fresh = frame(FRAME) | RWXAD & !(pte::A | pte::D);
    let at = entry_address(3, 0, VA);
    let mut moved = map(8, VA, 0, fresh);
    moved.racing.insert(at, frame(0x5000) | RWXAD & !(pte::A | pte::D));
    assert_eq!(load(&hart, &mut moved).map(|l| l.pa), Ok(0x5abc));
    let mut gone = map(8, VA, 0, fresh);
    gone.racing.insert(at, 0);
    assert_eq!(load(&hart, &mut gone), Err(Fault::Page));
    assert_eq!(gone.entries[&at], 0);
}

#[test]
fn memory_types() {
    let mut hart = hart(8, Privilege::Supervisor);
    hart.menvcfg |= envcfg::PBMTE;
    for (bits, memory_type) in
        [(0, Ok(MemoryType::Pma)), (1, Ok(MemoryType::NonCacheable)), (2, Ok(MemoryType::Io)), (3, Err(Fault::Page))]
    {
        let mut memory = map(8, VA, 0, frame(FRAME) | RWXAD | bits << pte::PBMT_SHIFT);
        assert_eq!(load(&hart, &mut memory).map(|l| l.memory_type), memory_type);
    }
}

#[test]
fn napot_pages() {
    let hart = hart(8, Privilege::Supervisor);
    let leaf = frame(0x9_8765_8000) | RWXAD | pte::N;
    let result = load(&hart, &mut map(8, VA, 0, leaf)).unwrap();
    assert_eq!((result.pa, result.page_size), (0x9_8765_7abc, 1 << 16));
    assert_eq!(load(&hart, &mut map(8, VA, 0, frame(0x9_8765_4000) | RWXAD | pte::N)), Err(Fault::Page));
    assert_eq!(load(&hart, &mut map(8, VA, 1, frame(0x8000) | RWXAD | pte::N)), Err(Fault::Page));
}

#[test]
fn pmp_guards_tables_and_pages() {
    let mut hart = hart(8, Privilege::User);
    let leaf = frame(FRAME) | RWXAD | pte::U;
    let mut memory = map(8, VA, 0, leaf);
    assert!(translate(&hart, VA, 4, Access::Load, Privilege::User, &mut memory).is_ok());
    // The level-1 table is unreadable.
    open_pmp(&mut hart, &[(0x18, (ROOT + 4096) >> 2 | 0x1ff)]);
    assert_eq!(load(&hart, &mut memory), Err(Fault::Access));
    // The page itself is read-only.
    open_pmp(&mut hart, &[(0x19, FRAME >> 2 | 0x1ff)]);
    let mut translate = |access| translate(&hart, VA, 4, access, Privilege::User, &mut memory).map(|l| l.pa);
    assert_eq!(translate(Access::Load), Ok(FRAME | 0xabc));
    assert_eq!(translate(Access::Store), Err(Fault::Access));
    // The leaf's table is read-only: hardware cannot set A.
    hart.menvcfg |= envcfg::ADUE;
    open_pmp(&mut hart, &[(0x19, (ROOT + 2 * 4096) >> 2 | 0x1ff)]);
    let mut fresh = map(8, VA, 0, leaf & !pte::A);
    assert_eq!(load(&hart, &mut fresh), Err(Fault::Access));
}

#[test]
fn faults_name_their_exception() {
    for (fault, access, cause) in [
        (Fault::Page, Access::Fetch, 12),
        (Fault::Page, Access::Load, 13),
        (Fault::Page, Access::Store, 15),
        (Fault::Access, Access::Fetch, 1),
        (Fault::Access, Access::Load, 5),
        (Fault::Access, Access::Store, 7),
    ] {
        let exception = fault.exception(access, 0x77);
        assert_eq!((exception.cause as u64, exception.tval), (cause, 0x77));
    }
}

#[test]
fn context_keys_tell_address_spaces_apart() {
    let mut hart = hart(8, Privilege::Supervisor);
    let mut keys = vec![context_key(&hart)];
    let mut distinct = |hart: &Hart, translated: bool| {
        let key = context_key(hart);
        assert!(!keys.contains(&key), "{key:x}");
        assert_eq!(key_translates(key), translated);
        keys.push(key);
    };
    hart.mstatus |= mstatus::SUM;
    distinct(&hart, true);
    hart.mstatus |= mstatus::MXR;
    distinct(&hart, true);
    hart.privilege = Privilege::User;
    distinct(&hart, true);
    hart.satp |= 0x1234 << 44;
    distinct(&hart, true);
    assert_eq!(key_asid(context_key(&hart)), 0x1234);
    hart.privilege = Privilege::Machine;
    distinct(&hart, false);
    hart.mstatus |= mstatus::MPRV;
    distinct(&hart, true);
    hart.privilege = Privilege::Supervisor;
    hart.satp = 0;
    distinct(&hart, false);
}
