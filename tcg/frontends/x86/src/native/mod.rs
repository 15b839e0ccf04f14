//! Computations on the host's own units.
//!
//! SSE, AVX, x87 and MMX instructions, and integer ones that the IR has no operation for, are executed as they are: a
//! *stub* loads the guest registers the instruction names into the host's, executes the same instruction with its
//! memory operand at a host address, and stores the results. So every result and flag is the host's, bit for bit. What
//! surrounds the computation (which instructions the model has, memory and its faults, alignment, unmasked
//! floating-point exceptions, control words) is this crate's.
//!
//! While a vCPU runs, its x87 registers are in the host's x87 unit, which Rust code does not use, with all exceptions
//! masked; the guest's own mask is in [`crate::fpu`]. A host of another architecture needs software in the place of
//! this module.

mod arena;
mod stub;

pub use stub::{Built, Memory, Native, Unit, asks_for_alignment, needs_alignment, unit_of, uses_mmx, uses_mxcsr};

use mimus_arch::x86::X86Features;

/// Features of the host that guest instructions can use.
pub fn host_features() -> X86Features {
    let mut set = X86Features::EMPTY;
    let mut add = |name: &str, present: bool| {
        if present {
            set = set.union(X86Features::of(&[name]));
        }
    };
    add("ssse3", is_x86_feature_detected!("ssse3"));
    add("sse4-1", is_x86_feature_detected!("sse4.1"));
    add("sse4-2", is_x86_feature_detected!("sse4.2"));
    add("popcnt", is_x86_feature_detected!("popcnt"));
    add("aes", is_x86_feature_detected!("aes"));
    add("pclmulqdq", is_x86_feature_detected!("pclmulqdq"));
    add("avx", is_x86_feature_detected!("avx"));
    add("f16c", is_x86_feature_detected!("f16c"));
    add("fma", is_x86_feature_detected!("fma"));
    add("avx2", is_x86_feature_detected!("avx2"));
    add("bmi1", is_x86_feature_detected!("bmi1"));
    add("bmi2", is_x86_feature_detected!("bmi2"));
    add("adx", is_x86_feature_detected!("adx"));
    add("lzcnt", is_x86_feature_detected!("lzcnt"));
    add("sha-ni", is_x86_feature_detected!("sha"));
    add("vaes", is_x86_feature_detected!("vaes"));
    add("vpclmulqdq", is_x86_feature_detected!("vpclmulqdq"));
    add("gfni", is_x86_feature_detected!("gfni"));
    let extended = std::arch::x86_64::__cpuid(0x8000_0000).eax;
    add("misalignsse", extended > 0x8000_0000 && std::arch::x86_64::__cpuid(0x8000_0001).ecx >> 7 & 1 != 0);
    set
}
