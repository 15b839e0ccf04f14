//! The x86-64 host backend: lowers blocks of the IR to machine code in one pass.
//!
//! Generated code runs with a fixed register convention, so that blocks chain without moving anything:
//!
//! | register | holds |
//! |---|---|
//! | `rbp` | the environment's address + 128, which puts its first 256 bytes within a byte's displacement |
//! | `rbx r12 r13 rsi rdi rdx rcx r8–r11` | the guest slots that [`BackendConfig::pin_order`] names first |
//! | `rax r14 r15 xmm0 xmm1` | scratch, dead between blocks |
//! | `xmm2`–`xmm15` | the slots that [`BackendConfig::fp_pin_order`] names first, unless `vector_dead` says that they are in memory |
//! | `gs` base | the current TLB context |
//! | `rsp` | 16-byte aligned; 24 bytes at it are the code's to use |
//! | MXCSR | the guest's rounding mode and sticky flags (with vector registers: while they are here) |
//!
//! Slots without a register are memory operands. [`asm`] is the sink, [`stubs`] the code that is emitted once,
//! [`lower`] the operations.
#![cfg_attr(not(test), forbid(unsafe_code))]
// What dynasm! expands to for registers chosen at run time.
#![allow(clippy::useless_conversion)]

mod asm;
mod lower;
mod stubs;

#[cfg(test)]
mod tests;

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, NasmFormatter};
use mimus_tcg_ir::backend::{BackendConfig, ContextLayout, Emitted, Hints, HostBackend, Optimise, Stubs};
use mimus_tcg_ir::{Block, SLOTS, Size, Slot};
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::fmt::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// Host registers for pinned slots, in the order in which they are given out; the first [`CALLEE_SAVED`] are
/// preserved by the C functions that stubs call.
const PIN_REGS: [u8; 11] = [3, 12, 13, 6, 7, 2, 1, 8, 9, 10, 11];
/// How many of [`PIN_REGS`] a C function preserves (`rbx`, `r12`, `r13`).
const CALLEE_SAVED: usize = 3;
/// The first host register for [`BackendConfig::fp_pin_order`], and how many there are.
const FIRST_FP_PIN: u8 = 2;
const FP_PINS: usize = 14;
/// What the environment's base register points past the environment's start.
const ENV_BIAS: i32 = 128;
/// Marks a slot without a register.
const UNPINNED: u8 = 0xff;

/// The backend: the configuration, where each slot lives, and the stubs' addresses.
#[derive(Debug)]
pub struct X86_64 {
    config: BackendConfig,
    /// Host register of each slot, or [`UNPINNED`].
    pin: [u8; SLOTS],
    /// Pinned slots with their registers, callee-saved registers first.
    pinned: Vec<(u8, Slot)>,
    /// Vector register of each slot, or [`UNPINNED`].
    fp_pin: [u8; SLOTS],
    stubs: stubs::Addresses,
    /// Short repeated moves of bytes are the host's fastest, those of larger elements are not ([`has_fast_byte_moves`]).
    moves_bytes: bool,
    /// Range entries that have been given to accesses, of each kind.
    ranges: [AtomicU32; ContextLayout::RANGE_KINDS],
    /// Jump entries that have been given to jumps.
    jumps: AtomicU32,
}

/// Refuses hosts without the instructions that generated code uses.
///
/// # Errors
/// One line naming what is missing.
pub fn check_host() -> Result<(), String> {
    let have = [
        ("SSE4.2", is_x86_feature_detected!("sse4.2")),
        ("POPCNT", is_x86_feature_detected!("popcnt")),
        ("AVX", is_x86_feature_detected!("avx")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("BMI1", is_x86_feature_detected!("bmi1")),
        ("BMI2", is_x86_feature_detected!("bmi2")),
        ("LZCNT", is_x86_feature_detected!("lzcnt")),
        ("FSGSBASE", kernel_allows_fsgsbase()),
    ];
    let missing: Vec<&str> = have.iter().filter(|(_, ok)| !ok).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "this host's processor or kernel lacks {}: translation needs an x86-64-v3 processor and Linux 5.9 or newer",
        missing.join(", ")
    ))
}

/// Whether user code may write the segment bases: bit 1 of `AT_HWCAP2`. Assumed where the kernel does not say.
fn kernel_allows_fsgsbase() -> bool {
    const AT_HWCAP2: u64 = 26;
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    let Ok(auxv) = std::fs::read("/proc/self/auxv") else {
        return true;
    };
    let (words, _) = auxv.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    pairs
        .iter()
        .map(|[key, value]| (u64::from_le_bytes(*key), u64::from_le_bytes(*value)))
        .find(|(key, _)| *key == AT_HWCAP2)
        .is_none_or(|(_, value)| value & HWCAP2_FSGSBASE != 0)
}

/// Whether short `rep movsb` are fast (FSRM; Intel SDM Vol. 2A, CPUID leaf 07H, EDX bit 4).
fn has_fast_byte_moves() -> bool {
    const FSRM: u32 = 1 << 4;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FSRM != 0
}

/// Vector registers for the floating-point slots that most deserve one.
fn fp_pins(config: &BackendConfig) -> [u8; SLOTS] {
    let mut pins = [UNPINNED; SLOTS];
    for (reg, slot) in (FIRST_FP_PIN..).zip(config.fp_pin_order.iter().take(FP_PINS)) {
        if let Some(place) = pins.get_mut(usize::from(slot.0)) {
            *place = reg;
        }
    }
    pins
}

impl HostBackend for X86_64 {
    fn new(mut config: BackendConfig, out: &mut Vec<u8>) -> Result<(X86_64, Stubs), String> {
        check_host()?;
        let mut pin = [UNPINNED; SLOTS];
        let mut pinned = Vec::with_capacity(PIN_REGS.len());
        for &slot in &config.pin_order {
            let (Some(reg), Some(place)) = (PIN_REGS.get(pinned.len()), pin.get_mut(usize::from(slot.0))) else {
                continue;
            };
            if *place == UNPINNED {
                *place = *reg;
                pinned.push((*reg, slot));
            }
        }
        // Their guards take the host's flags.
        if config.flags || config.vector.is_some() || config.optimise == Optimise::Off {
            config.fp_pin_order.clear();
        }
        let fp_pin = fp_pins(&config);
        let mut backend = X86_64 {
            config,
            pin,
            pinned,
            fp_pin,
            stubs: stubs::Addresses::default(),
            moves_bytes: has_fast_byte_moves(),
            ranges: Default::default(),
            jumps: Default::default(),
        };
        let (stubs, addresses) = stubs::emit(&backend, out)?;
        backend.stubs = addresses;
        Ok((backend, stubs))
    }

    fn emit(&self, block: &Block, at: usize, entry_guard: Option<u32>, out: &mut Vec<u8>, info: &mut Emitted) {
        lower::lower(self, block, at, entry_guard, out, info);
    }

    fn disassemble(&self, code: &[u8], at: usize) -> String {
        let mut decoder = Decoder::with_ip(64, code, at as u64, DecoderOptions::NONE);
        let mut formatter = NasmFormatter::new();
        let mut instruction = Instruction::default();
        let (mut text, mut line) = (String::new(), String::new());
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            line.clear();
            formatter.format(&instruction, &mut line);
            // Writing to a string does not fail.
            let _ = writeln!(text, "{:#010x}  {line}", instruction.ip());
        }
        text
    }
}

impl X86_64 {
    /// Displacement from `rbp` of an environment offset.
    #[inline]
    fn env(&self, offset: i32) -> i32 {
        offset - ENV_BIAS
    }

    /// Displacement from `rbp` of a slot's memory.
    #[inline]
    fn slot_disp(&self, slot: Slot) -> i32 {
        self.config.env.slots + 8 * i32::from(slot.0) - ENV_BIAS
    }

    /// The host register of a slot, if it has one.
    #[inline]
    fn pin_of(&self, slot: Slot) -> Option<u8> {
        self.pin.get(usize::from(slot.0)).copied().filter(|&reg| reg != UNPINNED)
    }

    /// The vector register with a copy of a slot, if it has one.
    #[inline]
    fn fp_pin_of(&self, slot: Slot) -> Option<u8> {
        self.fp_pin.get(usize::from(slot.0)).copied().filter(|&reg| reg != UNPINNED)
    }

    /// A range entry for an access.
    fn new_range(&self, size: Size, write: bool, parts: bool) -> u32 {
        let kind = ContextLayout::range_kind(size, write, parts);
        let n = self.ranges.get(kind as usize).map_or(0, |used| used.fetch_add(1, Ordering::Relaxed));
        ContextLayout::range(n, size, write, parts)
    }

    /// A jump entry: of those that say where a jump leads, or of those that count.
    fn new_jump(&self, far: bool) -> u32 {
        const FAR: u32 = ContextLayout::FAR_JUMPS;
        let n = self.jumps.fetch_add(1, Ordering::Relaxed);
        if far { n % FAR } else { FAR + n % (ContextLayout::JUMPS - FAR) }
    }

    /// Whether the loops of blocks without flags are to be copied.
    fn copies_loops(&self, hints: &Hints) -> bool {
        match self.config.optimise {
            Optimise::Off | Optimise::Compact => false,
            Optimise::Usual | Optimise::Tiered => hints.hot,
            Optimise::Forced => true,
        }
    }

    /// Whether vector registers hold guest state at times.
    fn has_vectors(&self) -> bool {
        self.config.vector.is_some() || !self.config.fp_pin_order.is_empty()
    }

    /// The pinned slots whose registers a C function does not preserve.
    fn caller_saved(&self) -> &[(u8, Slot)] {
        self.pinned.get(CALLEE_SAVED..).unwrap_or(&[])
    }
}
