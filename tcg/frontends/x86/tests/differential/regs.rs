//! What an instruction can depend on or change, and differences of it.

use std::fmt::Write;

use mimus_arch::x86::regs::*;

use crate::layout::{DATA, DATA_LEN, P_VALUE, READ_ONLY, W_VALUE, data_base};
use crate::random::Random;

/// Bytes of an XSAVE area with x87, SSE and AVX.
pub const AREA: usize = 832;
/// Parts of it.
pub const FCW: usize = 0;
pub const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const HEADER: usize = 512;
const YMM: usize = 576;
/// Flags that a program sees.
pub const FLAGS: u64 =
    ARITHMETIC | RFLAGS_DF | RFLAGS_AC | RFLAGS_ID | RFLAGS_TF | RFLAGS_RF | RFLAGS_NT | RFLAGS_IOPL | RFLAGS_IF;
pub const ARITHMETIC: u64 = RFLAGS_CF | RFLAGS_PF | RFLAGS_AF | RFLAGS_ZF | RFLAGS_SF | RFLAGS_OF;
const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// A program's registers.
#[derive(Clone, PartialEq)]
pub struct Regs {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    /// x87, SSE and AVX as XSAVE stores them.
    pub area: [u8; AREA],
    /// DS, ES, FS, GS.
    pub selectors: [u16; 4],
    pub fs_base: u64,
    pub gs_base: u64,
}

/// Which registers hold addresses in a sequence: never written by it.
#[derive(Clone, Copy, Debug)]
pub struct Roles {
    /// Points into the data.
    pub p: usize,
    /// A small index.
    pub x: usize,
    /// An address where nothing is.
    pub w: usize,
}

impl Roles {
    pub fn random(r: &mut Random, bits: u32) -> Roles {
        if bits == 16 {
            // What 16-bit addresses are made of.
            let (p, x) = (r.pick(&[RBX, RBP]), r.pick(&[RSI, RDI, RSI, RDI, RDX]));
            // SI and DI are at times no addresses, which strings want, and so are RAX to RBX.
            let w = if x == RDX {
                r.pick(&[RAX, RCX, RBX ^ RBP ^ p])
            } else {
                r.pick(&[RAX, RCX, RBX ^ RBP ^ p, RSI ^ RDI ^ x])
            };
            return Roles { p, x, w };
        }
        let count = if bits == 64 { 16 } else { 8 };
        loop {
            let [p, x, w] = [(); 3].map(|()| r.below(count) as usize);
            if p != x && x != w && p != w && ![p, x, w].contains(&RSP) {
                return Roles { p, x, w };
            }
        }
    }

    pub fn contains(&self, n: usize) -> bool {
        [self.p, self.x, self.w].contains(&n)
    }
}

impl Regs {
    pub fn random(r: &mut Random, bits: u32, roles: &Roles) -> Regs {
        let mut regs = Regs {
            gpr: std::array::from_fn(|_| r.value()),
            rip: 0,
            flags: r.next() & ARITHMETIC | RFLAGS_FIXED | RFLAGS_IF,
            area: [0; AREA],
            selectors: [0x2b, 0x2b, 0, 0],
            fs_base: 0,
            gs_base: 0,
        };
        if r.chance(6) {
            regs.flags |= RFLAGS_DF;
        }
        if r.chance(4) {
            regs.flags |= RFLAGS_AC;
        }
        if r.chance(10) {
            regs.flags |= RFLAGS_ID;
        }
        if bits == 64 {
            (regs.fs_base, regs.gs_base) = (r.below(64) * 8, r.below(256));
        }
        let base = data_base(bits);
        regs.gpr[roles.p] = P_VALUE - base + r.below(16);
        regs.gpr[roles.x] = r.below(64);
        regs.gpr[roles.w] = match bits {
            64 => r.pick(&W_VALUE),
            32 => 0x1000_8000,
            _ => 0xf000,
        };
        regs.gpr[RSP] = P_VALUE - base + 0x800 - 8 * r.below(16);
        if bits != 64 {
            for g in &mut regs.gpr {
                *g &= 0xffff_ffff;
            }
        }
        regs.random_units(r);
        regs
    }

    /// A stack pointer near where nothing can be pushed or popped, or nowhere; alignment is checked more often.
    pub fn faulting(&mut self, r: &mut Random, bits: u32, roles: &Roles) {
        let base = data_base(bits);
        let near = r.pick(&[DATA, READ_ONLY, DATA + DATA_LEN as u64, DATA + 0x1000, DATA + 0x8000]) - base;
        self.gpr[RSP] = match bits {
            64 if r.chance(20) => r.pick(&W_VALUE),
            16 => near.wrapping_add(r.below(33)).wrapping_sub(16) & 0xffff,
            _ => near.wrapping_add(r.below(33)).wrapping_sub(16),
        };
        if r.chance(25) {
            self.flags |= RFLAGS_AC;
        }
        if r.chance(20) {
            // The other pointer, too.
            self.gpr[roles.x] = self.gpr[RSP];
        }
    }

    fn random_units(&mut self, r: &mut Random) {
        let control = r.below(4) << 10 | r.pick(&[0, 2, 3, 3]) << 8 | 0x40;
        let masks = if r.chance(15) { r.below(64) } else { 63 };
        self.put(FCW, &((control | masks) as u16).to_le_bytes());
        let top = r.below(8) << 11;
        // Of flags of exceptions, those that are masked: no exception waits.
        let status = r.next() & (masks & 0x3f) | r.next() & 0x4700;
        let status = if r.chance(50) { status } else { 0 };
        self.put(2, &((status | top) as u16).to_le_bytes());
        let tags = if r.chance(35) { r.next() as u8 } else { 0xff };
        self.put(4, &[tags]);
        for i in 0..8 {
            let n = r.extended();
            self.put(ST + 16 * i, &n);
        }
        let masks = if r.chance(15) { r.below(64) << 7 } else { 0x1f80 };
        let mxcsr = masks | r.pick(&[0, 0, 0x40, 0x8000, 0x8040]) | r.below(4) << 13 | r.next() & r.next() & 0x3f;
        self.put(MXCSR, &(mxcsr as u32).to_le_bytes());
        for i in 0..16 {
            let kind = r.below(5);
            for j in 0..4 {
                let at = Self::vector_at(i, j);
                let w = r.word(kind);
                self.put(at, &w.to_le_bytes());
            }
        }
        self.put(HEADER, &7u64.to_le_bytes());
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.area[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where a quadword of a vector register is.
    fn vector_at(i: usize, j: usize) -> usize {
        if j < 2 { XMM + 16 * i + 8 * j } else { YMM + 16 * i + 8 * (j - 2) }
    }

    pub fn word(&self, at: usize) -> u64 {
        let mut w = [0; 8];
        w.copy_from_slice(&self.area[at..at + 8]);
        u64::from_le_bytes(w)
    }

    fn half(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.area[at], self.area[at + 1]])
    }

    pub fn vector(&self, i: usize) -> [u64; 4] {
        std::array::from_fn(|j| self.word(Self::vector_at(i, j)))
    }

    /// Puts in what a component's initial state is where the header says it is in it.
    pub fn normalize(&mut self, bits: u32) {
        let components = self.word(HEADER);
        if components & 1 == 0 {
            self.area[..24].fill(0);
            self.area[ST..XMM].fill(0);
            self.put(FCW, &0x37fu16.to_le_bytes());
        }
        if components & 2 == 0 {
            self.area[XMM..416].fill(0);
        }
        if components & 4 == 0 {
            self.area[YMM..].fill(0);
        }
        self.area[28..32].fill(0);
        self.area[5] = 0;
        for i in 0..8 {
            self.area[ST + 16 * i + 10..ST + 16 * i + 16].fill(0);
        }
        self.area[416..YMM].fill(0);
        self.put(HEADER, &7u64.to_le_bytes());
        if bits != 64 {
            for g in &mut self.gpr[..8] {
                *g &= 0xffff_ffff;
            }
            self.gpr[8..].fill(0);
        }
        self.flags &= FLAGS;
    }

    /// Where the last x87 instruction was.
    pub fn x87_instruction(&self) -> u64 {
        self.word(8)
    }

    /// Where its operand was.
    pub fn x87_operand(&self) -> u64 {
        self.word(16)
    }

    pub fn set_x87_operand(&mut self, address: u64) {
        self.area[16..24].copy_from_slice(&address.to_le_bytes());
    }

    /// What differs, a line each; of the flags, only `flags`.
    pub fn differences(&self, expected: &Regs, flags: u64, pointers: bool, whose: &str) -> Vec<String> {
        let mut lines = Vec::new();
        let mut line = |name: &str, got: u64, want: u64| {
            if got != want {
                lines.push(format!("{name}: {got:#x}, {whose} has {want:#x}"));
            }
        };
        line("rip", self.rip, expected.rip);
        for (i, name) in NAMES.iter().enumerate() {
            line(name, self.gpr[i], expected.gpr[i]);
        }
        line("flags", self.flags & flags, expected.flags & flags);
        for (i, name) in ["ds", "es", "fs", "gs"].iter().enumerate() {
            // A null selector's privilege is lost on the way through some kernels.
            let seen = |s: u16| if s & !3 == 0 { 0 } else { u64::from(s) };
            line(name, seen(self.selectors[i]), seen(expected.selectors[i]));
        }
        line("fs base", self.fs_base, expected.fs_base);
        line("gs base", self.gs_base, expected.gs_base);
        for (name, at) in [("fcw", 0), ("fsw", 2), ("tags", 4)] {
            line(name, self.half(at).into(), expected.half(at).into());
        }
        // Where the last instruction was, is kept if an exception of it waits (see `mimus_tcg_frontend_x86::fpu`).
        if pointers {
            line("fop", self.half(6).into(), expected.half(6).into());
            line("fip", self.word(8), expected.word(8));
            line("fdp", self.word(16), expected.word(16));
        }
        line("mxcsr", self.word(MXCSR), expected.word(MXCSR));
        for i in 0..8 {
            let at = ST + 16 * i;
            line(&format!("st{i}"), self.word(at), expected.word(at));
            line(&format!("st{i} exponent"), self.half(at + 8).into(), expected.half(at + 8).into());
        }
        for i in 0..16 {
            let (got, want) = (self.vector(i), expected.vector(i));
            if got != want {
                lines.push(format!("ymm{i}: {}, {whose} has {}", hex(got), hex(want)));
            }
        }
        lines
    }

    /// The registers of a failing sequence.
    pub fn print(&self) -> String {
        let mut text = String::new();
        for (i, name) in NAMES.iter().enumerate() {
            let _ = write!(text, "{name:>4}={:016x}{}", self.gpr[i], if i % 4 == 3 { "\n" } else { " " });
        }
        let _ = writeln!(
            text,
            "flags={:x} fs base={:x} gs base={:x} fcw={:x} fsw={:x} tags={:x} mxcsr={:x}",
            self.flags,
            self.fs_base,
            self.gs_base,
            self.half(0),
            self.half(2),
            self.area[4],
            self.word(MXCSR) as u32
        );
        for i in 0..8 {
            let at = ST + 16 * i;
            let _ = write!(text, "st{i}={:04x}:{:016x}{}", self.half(at + 8), self.word(at), end(i, 4));
        }
        for i in 0..16 {
            let _ = write!(text, "ymm{i}={}{}", hex(self.vector(i)), end(i, 2));
        }
        text
    }
}

fn end(i: usize, row: usize) -> &'static str {
    if i % row == row - 1 { "\n" } else { " " }
}

fn hex(v: [u64; 4]) -> String {
    format!("{:016x}_{:016x}_{:016x}_{:016x}", v[3], v[2], v[1], v[0])
}

/// How a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// At its end.
    End,
    /// By an exception: vector, error code, and of page faults the address.
    Exception { vector: u8, error: u32, address: u64 },
    /// Not at all.
    Never,
}

/// What running a sequence made of registers and memory.
#[derive(Clone, PartialEq)]
pub struct Outcome {
    pub regs: Regs,
    pub memory: Vec<u8>,
    pub exit: Exit,
    /// Debug exceptions whose handler went on, and where they came from (the first [`crate::layout::TRAIL`]).
    pub steps: u64,
    pub trail: Vec<u64>,
}
