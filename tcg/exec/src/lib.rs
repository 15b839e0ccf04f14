//! The translator's runtime: blocks, code cache, software TLB, execution loop.
//!
//! * [`frontend`]: what a guest architecture owes ([`frontend::GuestFrontend`]);
//! * [`env`]: the vCPU ([`env::Cpu`]) as generated code, helpers and the runtime share it;
//! * [`engine`]: one virtual machine: code store, host backend, its vCPUs;
//! * [`vcpu`]: the loop around generated code;
//! * [`code`]: the code cache and what is known about the code in it;
//! * [`context`], [`mmu`], `ranges`: the software TLB;
//! * `access`, `runtime`, `translate`, `interp`: the slow paths of generated code, by what they are for;
//! * `claim`: pages that become code;
//! * `debug`: breakpoints, watchpoints, single steps;
//! * `instrument`, `tracing`, `count`: traces of what is executed, and counting instructions; `recent`: the last
//!   exceptions;
//! * `sampling`: which code runs often;
//! * `perf`: what generated code is, for the host's profiler;
//! * [`lent`]: executing single instructions of another engine's guest;
//! * [`hostfp`]: the host's floating-point control word.

mod access;
pub use access::Trapped;
mod catch;
mod claim;
pub use mimus_tcg_ir::backend::Optimise;
pub mod code;
pub mod context;
mod count;
mod debug;
pub mod engine;
pub mod env;
mod far;
pub mod frontend;
mod gather;
mod guestmem;
pub mod hostfp;
mod instrument;
mod interp;
mod jumps;
pub mod lent;
pub mod mmu;
mod perf;
mod ranges;
mod recent;
mod runtime;
mod sampling;
mod trace;
mod tracing;
mod translate;
pub mod vcpu;
