//! Debugging: traces of what the guest executes, symbols, views of the machine, the debugger's commands.
//!
//! * [`debugger`]: the commands; [`look`], [`walk`], [`report`]: what they show; [`expr`]: addresses and conditions;
//!   [`registers`]: names; [`help`]: what commands there are; [`catch`], [`steps`]: events and steps to stop at; [`target`]: what is asked of a machine;
//! * [`symbols`]: names and source lines of addresses;
//! * [`trace`]: the file that a trace is, and what can be asked of it.

pub mod catch;
mod complete;
pub mod debugger;
pub mod devices;
pub mod expr;
pub mod firmware;
pub mod help;
pub mod info;
pub mod linux;
pub mod look;
pub mod orc;
pub mod pci;
pub mod registers;
pub mod report;
pub mod steps;
pub mod symbols;
pub mod target;
pub mod trace;
pub mod unwind;
pub mod walk;
