//! gdb's remote serial protocol for a virtual machine: threads are vCPUs, all stop together.
//!
//! Spec: Debugging with GDB, Appendix E "GDB Remote Serial Protocol".
//!
//! * [`packet`]: bytes to packets and back;
//! * [`registers`]: how a client numbers them;
//! * [`target`]: what is asked of the machine ([`Target`]);
//! * [`session`]: one connection, without input and output;
//! * [`vm`]: the target that the vCPU threads and memory of a machine are;
//! * [`server`] - sockets.
//!
//! Left out: non-stop mode, several processes, extended mode (`!`, `R`), tracepoints, files, reverse execution.
#![forbid(unsafe_code)]

mod memory;
pub mod packet;
pub mod registers;
mod resume;
pub mod server;
pub mod session;
pub mod target;
pub mod vm;

pub use server::{Address, Listener, Server};
pub use session::Event;
pub use target::{Action, Point, Target};
