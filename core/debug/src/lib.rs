//! Debugging: traces of what the guest executes, symbols, views of the machine, the debugger's commands.
//!
//! * [`trace`]: the file that a trace is, and what can be asked of it.

pub mod trace;
