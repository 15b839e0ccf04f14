//! The translator's runtime: blocks, code cache, software TLB, execution loop.
pub mod code;
pub mod context;
pub mod hostfp;
pub mod mmu;
