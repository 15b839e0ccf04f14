//! gdb's protocol with whole machines that run small programs.

mod clients;
mod golden;
mod harness;
mod hostile;
mod programs;
