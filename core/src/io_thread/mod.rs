//! The event loop that host I/O, timers and their guest-visible effects run on, and
//! threads for calls that block.

pub mod event_loop;
mod keeper;
pub mod worker;

pub use event_loop::{FdRegistration, Interest, IoThread, IoThreadHandle, Readiness, SharedFd};
pub use worker::{WorkerPool, spawn_worker};
