//! The RISC-V `virt` board as a whole machine: registers on the `null` accelerator, guests on the translator,
//! saved states on both.

mod counting;
mod damaged;
mod harness;
mod linux;
mod programs;
mod registers;
