//! Debugging: traces of what the guest executes, symbols, views of the machine, the debugger's commands.
//!
//! * [`symbols`]: names and source lines of addresses;
//! * [`trace`]: the file that a trace is, and what can be asked of it.

pub mod symbols;
pub mod trace;
