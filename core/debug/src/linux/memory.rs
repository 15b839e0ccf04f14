//! A guest kernel's memory, by its page tables, with a bound on what is read.
//!
//! Everything here is the guest's: any address may be anything, lists may be rings, sizes may be absurd. Reads fail when
//! more was read than any well-formed answer needs.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use mimus_arch::CpuState;

use crate::target::Target;
use crate::walk::{self, Scheme};

const PAGE: u64 = 4096;
/// Bytes that one question may read, each access counted as at least [`LEAST`].
const BUDGET: u64 = 1 << 30;
const LEAST: u64 = 64;
/// Longest single read.
const LONGEST: usize = 64 << 20;
/// Most translations remembered.
const REMEMBERED: usize = 1 << 17;

/// Virtual memory of a guest's kernel.
pub struct Memory<'a> {
    target: &'a dyn Target,
    scheme: Scheme,
    /// Bytes of a pointer: 4 or 8.
    pub word: usize,
    /// RISC-V, not x86.
    pub riscv: bool,
    pages: RefCell<HashMap<u64, Option<u64>>>,
    left: Cell<u64>,
}

impl<'a> Memory<'a> {
    /// As a vCPU's current page tables have it; `None` while paging is off.
    pub fn new(target: &'a dyn Target, cpu: &CpuState) -> Option<Memory<'a>> {
        const LMA: u64 = 1 << 10;
        let scheme = walk::scheme(cpu)?;
        let (word, riscv) = match cpu {
            CpuState::X86(s) if s.efer & LMA == 0 => (4, false),
            CpuState::X86(_) => (8, false),
            _ => (8, true),
        };
        Some(Memory { target, scheme, word, riscv, pages: RefCell::default(), left: Cell::new(BUDGET) })
    }

    /// The same with other tables: with page-table isolation a program runs on a copy in the next page that lacks the
    /// kernel.
    pub fn isolated(self) -> Memory<'a> {
        let scheme = self.scheme.with_root(self.scheme.root() & !PAGE);
        Memory { scheme, pages: RefCell::default(), ..self }
    }

    /// The physical address of the topmost page table.
    pub fn root(&self) -> u64 {
        self.scheme.root()
    }

    /// The same memory by other page tables, those of a program.
    pub fn of_space(&self, root: u64) -> Memory<'a> {
        let (target, scheme) = (self.target, self.scheme.with_root(root));
        Memory {
            target,
            scheme,
            pages: RefCell::default(),
            left: Cell::new(BUDGET),
            word: self.word,
            riscv: self.riscv,
        }
    }

    /// How addresses are translated.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// An address with the bits that the guest's have.
    pub fn address(&self, va: u64) -> u64 {
        if self.word == 4 { va & 0xffff_ffff } else { va }
    }

    /// Whether an address can be the kernel's.
    pub fn is_kernel(&self, va: u64) -> bool {
        if self.word == 4 { va >> 31 == 1 } else { va >> 63 == 1 }
    }

    fn entry(&self, at: u64, bytes: usize) -> Option<u64> {
        let mut buffer = [0; 8];
        self.target.read(at, &mut buffer[..bytes]).then(|| u64::from_le_bytes(buffer))
    }

    /// The physical address of a virtual one.
    pub fn translate(&self, va: u64) -> Option<u64> {
        let va = self.address(va);
        let page = va & !(PAGE - 1);
        let mut pages = self.pages.borrow_mut();
        if pages.len() > REMEMBERED {
            pages.clear();
        }
        let found = pages
            .entry(page)
            .or_insert_with(|| self.scheme.lookup(page, &|at, bytes| self.entry(at, bytes)).ok().map(|(pa, _)| pa));
        found.map(|pa| pa + (va - page))
    }

    fn spend(&self, bytes: u64) -> bool {
        match self.left.get().checked_sub(bytes.max(LEAST)) {
            Some(left) => self.left.set(left),
            None => return false,
        }
        true
    }

    /// Reads memory; false if some of it is not there.
    pub fn read(&self, va: u64, out: &mut [u8]) -> bool {
        if !self.spend(out.len() as u64) {
            return false;
        }
        let mut done = 0;
        while done < out.len() {
            let at = va.wrapping_add(done as u64);
            let n = (out.len() - done).min((PAGE - (at & (PAGE - 1))) as usize);
            match self.translate(at) {
                Some(pa) if self.target.read(pa, &mut out[done..done + n]) => done += n,
                _ => return false,
            }
        }
        true
    }

    /// So many bytes.
    pub fn bytes(&self, va: u64, len: usize) -> Option<Vec<u8>> {
        // Nothing is allocated for a size that the guest made up: its first and last byte must be there.
        let mut probe = [0];
        if len > LONGEST
            || len > 0 && !(self.read(va, &mut probe) && self.read(va.wrapping_add(len as u64 - 1), &mut probe))
        {
            return None;
        }
        let mut out = vec![0; len];
        self.read(va, &mut out).then_some(out)
    }

    /// A little-endian number of up to 8 bytes.
    pub fn number(&self, va: u64, bytes: usize) -> Option<u64> {
        let mut buffer = [0; 8];
        self.read(va, buffer.get_mut(..bytes)?).then(|| u64::from_le_bytes(buffer))
    }

    /// A pointer or `long`.
    pub fn long(&self, va: u64) -> Option<u64> {
        self.number(va, self.word)
    }

    /// Text up to its NUL, at most so many bytes.
    pub fn text(&self, va: u64, most: usize) -> Option<String> {
        let mut bytes = vec![0; most.min(4096)];
        if !self.read(va, &mut bytes) {
            return None;
        }
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        Some(printable(&bytes[..end]))
    }

    /// Text that ends within so many bytes, and has some.
    pub fn name(&self, va: u64, most: usize) -> Option<String> {
        let mut bytes = Vec::new();
        let mut byte = [0];
        while bytes.len() <= most {
            if !self.read(va.wrapping_add(bytes.len() as u64), &mut byte) {
                return None;
            }
            if byte[0] == 0 {
                return (!bytes.is_empty()).then(|| printable(&bytes));
            }
            bytes.push(byte[0]);
        }
        None
    }

    /// Hands the mapped pages from `from` to `to` (exclusive) to `look`, in order, until it is satisfied.
    pub fn pages(&self, from: u64, to: u64, look: &mut dyn FnMut(u64, &[u8]) -> bool) {
        let mut buffer = vec![0; PAGE as usize];
        let mut va = from & !(PAGE - 1);
        while va < to {
            let found = self.scheme.lookup(self.address(va), &|at, bytes| self.entry(at, bytes));
            let (pa, run) = match found {
                Ok((pa, run)) => (Some(pa), run),
                Err(hole) => (None, hole),
            };
            let end = va.saturating_add(run.max(1)).min(to).max(va + 1);
            let Some(pa) = pa else {
                if !self.spend(LEAST) {
                    return;
                }
                // Holes end at pages.
                match va.checked_add(run.max(PAGE)) {
                    Some(next) => va = next & !(PAGE - 1),
                    None => return,
                }
                continue;
            };
            let mut at = va;
            while at < end {
                if !self.spend(PAGE) {
                    return;
                }
                if self.target.read(pa + (at - va), &mut buffer) && look(at, &buffer) {
                    return;
                }
                match at.checked_add(PAGE) {
                    Some(next) => at = next,
                    None => return,
                }
            }
            va = at;
        }
    }

    /// Looks at the beginning of each page of RAM, at most so many, until `look` is satisfied.
    pub fn physical(&self, most: u64, first: usize, look: &mut dyn FnMut(u64, &[u8]) -> bool) {
        let (mut left, mut buffer) = (most, vec![0; first]);
        for region in self.target.regions().iter().filter(|r| r.kind == "ram") {
            let mut at = region.base.next_multiple_of(PAGE);
            while at.saturating_add(PAGE) <= region.base.saturating_add(region.len) {
                if left == 0 {
                    return;
                }
                left -= 1;
                if self.target.read(at, &mut buffer) && look(at, &buffer) {
                    return;
                }
                at += PAGE;
            }
        }
    }

    /// Physical memory.
    pub fn read_physical(&self, pa: u64, out: &mut [u8]) -> bool {
        self.spend(out.len() as u64) && self.target.read(pa, out)
    }
}

/// What of a guest's text can be printed; a terminal must not be told what to do.
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() && c != '\t' { '.' } else { c }).collect()
}
