//! gdb's protocol with whole machines that run small programs.

mod clients;
mod golden;
mod harness;
mod hostile;
mod programs;
#[cfg(target_arch = "x86_64")]
mod steps;
