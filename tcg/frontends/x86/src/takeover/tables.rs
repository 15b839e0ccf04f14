//! Whether what was stored may have been page tables.
//!
//! An engine that shadows the guest's page tables notices stores by the guest, not by us. It need not be told of entries
//! that were not present before: those it has no shadow of. What is left are changed entries in a page that could be a
//! table: one in which everything that looks present is an entry that could be. Taking data for a table costs time only.

use crate::frontend::X86Cpu;
use crate::paging::{A, D, P};
use mimus_arch::x86::regs::{CR0_PG, CR4_PAE};
use mimus_tcg_exec::frontend::CodePage;

/// Address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Whether an entry that was present became another one: more than marks of accesses were added.
const fn changed(before: u64, now: u64) -> bool {
    before & P != 0 && (before & !now != 0 || now & !before & !(A | D) != 0)
}

fn words(page: &CodePage) -> impl Iterator<Item = u64> + '_ {
    page.chunks_exact(8).map(|c| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(c);
        u64::from_le_bytes(bytes)
    })
}

fn halves(page: &CodePage) -> impl Iterator<Item = u64> + '_ {
    words(page).flat_map(|w| [w & 0xffff_ffff, w >> 32])
}

/// Whether a page that was a table of 8-byte entries has other ones now.
fn wide(before: &CodePage, now: &CodePage, end: u64) -> bool {
    words(before).zip(words(now)).any(|(b, n)| changed(b, n))
        && words(before).all(|entry| entry & P == 0 || entry & ADDRESS < end)
}

/// The same of 4-byte entries.
fn narrow(before: &CodePage, now: &CodePage, end: u64) -> bool {
    halves(before).zip(halves(now)).any(|(b, n)| changed(b, n))
        && halves(before).all(|entry| entry & P == 0 || entry & 0xffff_f000 < end)
}

/// Whether page tables may have been changed since the guest was lent.
pub(super) fn written(cpu: &X86Cpu) -> bool {
    let st = &cpu.guest.st;
    let old_format = st.cr0 & CR0_PG != 0 && st.cr4 & CR4_PAE == 0;
    // Devices may be above all memory.
    let end = cpu.memory_end().max(1 << 32);
    let mut found = false;
    cpu.stored_pages(|before, now| {
        found |= wide(before, now, end) || old_format && narrow(before, now, end);
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(entries: &[(usize, u64)]) -> CodePage {
        let mut page = [0; 4096];
        for (i, entry) in entries {
            page[i * 8..i * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        }
        page
    }

    #[test]
    fn tables_and_what_is_none() {
        let end = 1 << 32;
        let table = page(&[(0, 0x1000 | 7), (5, 0x8000_0000_0020_0083), (7, 0x1234_5678_9000)]);
        let with = |entries: &[(usize, u64)]| {
            let mut p = table;
            for (i, entry) in entries {
                p[i * 8..i * 8 + 8].copy_from_slice(&entry.to_le_bytes());
            }
            p
        };
        assert!(!wide(&table, &table, end));
        assert!(!wide(&table, &with(&[(0, 0x1000 | 0x67)]), end), "accessed and dirty");
        assert!(!wide(&table, &with(&[(1, 0x2000 | 7), (7, 1)]), end), "new entries");
        assert!(wide(&table, &with(&[(0, 0x2000 | 7)]), end));
        assert!(wide(&table, &with(&[(0, 0)]), end));
        assert!(wide(&with(&[(0, 0x1067)]), &with(&[(0, 0x1027)]), end), "a dirty bit was cleared");
        // A pointer's neighbour, an odd number beyond all memory: no table.
        let data = page(&[(0, 0x1007), (1, 0xffff_8880_1234_5679)]);
        let mut new = data;
        new[0] = 0;
        assert!(!wide(&data, &new, end));
    }

    #[test]
    fn short_entries() {
        let mut before = page(&[]);
        before[4..8].copy_from_slice(&0x0040_0083u32.to_le_bytes());
        let mut now = before;
        now[5] = 0x10;
        assert!(narrow(&before, &now, 1 << 32));
        assert!(!wide(&before, &now, 1 << 32));
        assert!(!narrow(&before, &now, 0x40_0000), "outside of memory");
    }
}
