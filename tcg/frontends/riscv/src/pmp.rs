//! Physical memory protection (section 3.7): up to 16 entries, granularity 4
//! bytes. The CSRs of 16 exist if any entry does; those of absent entries are
//! read-only zero.
//!
//! The active entries are kept decoded as ranges, so that a check is a scan of
//! the few entries in use.

use mimus_arch::riscv::Privilege;

use crate::mmu::Access;

#[cfg(test)]
mod tests;

/// Bytes of a page, the unit of [`Pmp::page_permissions`].
const PAGE: u64 = 4096;
/// Physical addresses have 56 bits.
const PA_LIMIT: u64 = 1 << 56;
/// `pmpaddr` holds bits 55:2 of an address.
const ADDRESS_MASK: u64 = (1 << 54) - 1;

/// Configuration bits of an entry.
const R: u8 = 1;
const W: u8 = 2;
const X: u8 = 4;
const A_SHIFT: u32 = 3;
const LOCKED: u8 = 0x80;

/// What an access may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permissions {
    /// Loads.
    pub read: bool,
    /// Stores and AMOs.
    pub write: bool,
    /// Fetches.
    pub execute: bool,
}

impl Permissions {
    /// Everything allowed.
    pub const ALL: Self = Self { read: true, write: true, execute: true };
    /// Nothing allowed.
    pub const NONE: Self = Self { read: false, write: false, execute: false };

    /// Whether `access` is allowed.
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Fetch => self.execute,
            Access::Load => self.read,
            Access::Store => self.write,
        }
    }

    const fn from_config(config: u8) -> Self {
        Self { read: config & R != 0, write: config & W != 0, execute: config & X != 0 }
    }
}

/// An active entry as a range of addresses, end exclusive.
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    start: u64,
    end: u64,
    config: u8,
}

impl Region {
    const fn permissions(&self, privilege: Privilege) -> Permissions {
        // M-mode is bound by locked entries only.
        if matches!(privilege, Privilege::Machine) && self.config & LOCKED == 0 {
            Permissions::ALL
        } else {
            Permissions::from_config(self.config)
        }
    }
}

/// The PMP unit of one hart.
#[derive(Clone, Debug)]
pub struct Pmp {
    entries: u8,
    config: [u8; 16],
    address: [u64; 16],
    regions: [Region; 16],
    active: u8,
}

impl Pmp {
    /// All entries off. With 0 `entries` everything is allowed.
    pub fn new(entries: u8) -> Self {
        Self {
            entries: entries.min(16),
            config: [0; 16],
            address: [0; 16],
            regions: [Region::default(); 16],
            active: 0,
        }
    }

    /// How many entries exist.
    pub const fn entries(&self) -> usize {
        self.entries as usize
    }

    /// `pmpcfg0` (`word` 0) or `pmpcfg2` (`word` 1): eight configurations.
    pub fn config_word(&self, word: usize) -> u64 {
        let mut value = 0;
        for (i, config) in self.config.iter().skip(word * 8).take(8).enumerate() {
            value |= u64::from(*config) << (8 * i);
        }
        value
    }

    /// Writes eight configurations; locked ones are left alone.
    pub fn set_config_word(&mut self, word: usize, value: u64) {
        let present = self.entries();
        for (i, config) in self.config.iter_mut().take(present).skip(word * 8).take(8).enumerate() {
            if *config & LOCKED == 0 {
                *config = legal_config((value >> (8 * i)) as u8);
            }
        }
        self.decode();
    }

    /// `pmpaddr` of an entry; 0 for an entry out of range.
    pub fn address(&self, index: usize) -> u64 {
        self.address.get(index).copied().unwrap_or(0)
    }

    /// Writes a `pmpaddr` unless locked, by itself or as the base of a locked
    /// top-of-range entry.
    pub fn set_address(&mut self, index: usize, value: u64) {
        if index >= self.entries() || self.config[index] & LOCKED != 0 {
            return;
        }
        if let Some(next) = self.config.get(index + 1)
            && next & LOCKED != 0
            && matching_mode(*next) == 1
        {
            return;
        }
        self.address[index] = value & ADDRESS_MASK;
        self.decode();
    }

    /// Restores all registers at once, past any lock (snapshots).
    pub fn restore(&mut self, config: [u8; 16], address: [u64; 16]) {
        self.config = [0; 16];
        self.address = [0; 16];
        for i in 0..self.entries() {
            self.config[i] = legal_config(config[i]);
            self.address[i] = address[i] & ADDRESS_MASK;
        }
        self.decode();
    }

    /// Every configuration byte.
    pub const fn configs(&self) -> &[u8; 16] {
        &self.config
    }

    /// Every `pmpaddr`.
    pub const fn addresses(&self) -> &[u64; 16] {
        &self.address
    }

    /// Recomputes the active regions.
    fn decode(&mut self) {
        self.active = 0;
        for i in 0..16 {
            let address = self.address[i];
            let (start, end) = match matching_mode(self.config[i]) {
                0 => continue,
                1 => (if i == 0 { 0 } else { self.address[i - 1] << 2 }, address << 2),
                2 => (address << 2, (address << 2) + 4),
                _ => {
                    // NAPOT: n trailing ones give a range of 2^(n+3) bytes.
                    let size = 8u64 << (!address).trailing_zeros();
                    let start = (address & address.wrapping_add(1)) << 2;
                    (start, start + size)
                }
            };
            if start < end {
                self.regions[usize::from(self.active)] = Region { start, end, config: self.config[i] };
                self.active += 1;
            }
        }
    }

    fn active(&self) -> &[Region] {
        &self.regions[..usize::from(self.active)]
    }

    /// What accesses no entry matches may do: M-mode everything, the others
    /// nothing as soon as PMP is implemented.
    const fn unmatched(&self, privilege: Privilege) -> Permissions {
        if self.entries == 0 || matches!(privilege, Privilege::Machine) { Permissions::ALL } else { Permissions::NONE }
    }

    /// Whether an access of `len` bytes at `pa` is allowed: the first entry
    /// that matches any byte must match all and grant it (section 3.7.1.3).
    pub fn check(&self, pa: u64, len: u64, access: Access, privilege: Privilege) -> bool {
        if pa >= PA_LIMIT || len > PA_LIMIT {
            return false;
        }
        let end = pa + len;
        for region in self.active() {
            if pa < region.end && end > region.start {
                return pa >= region.start && end <= region.end && region.permissions(privilege).allows(access);
            }
        }
        self.unmatched(privilege).allows(access)
    }

    /// What the whole 4 KiB page of `pa` may be accessed for, or `None` when
    /// that differs inside the page and each access must be checked.
    pub fn page_permissions(&self, pa: u64, privilege: Privilege) -> Option<Permissions> {
        if pa >= PA_LIMIT {
            return Some(Permissions::NONE);
        }
        let start = pa & !(PAGE - 1);
        let end = start + PAGE;
        for region in self.active() {
            if start < region.end && end > region.start {
                let whole = start >= region.start && end <= region.end;
                return whole.then(|| region.permissions(privilege));
            }
        }
        Some(self.unmatched(privilege))
    }
}

/// The address-matching mode: 0 off, 1 TOR, 2 NA4, 3 NAPOT.
const fn matching_mode(config: u8) -> u8 {
    config >> A_SHIFT & 3
}

/// WARL: bits 5 and 6 read zero; W without R is reserved and loses W.
const fn legal_config(config: u8) -> u8 {
    let config = config & !0x60;
    if config & (R | W) == W { config & !W } else { config }
}
