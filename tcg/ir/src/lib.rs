//! The translator's intermediate representation: the one thing that guest frontends and host backends share.
//!
//! * [`op`]: the operations and the block;
//! * [`flags`]: condition flags and the arithmetic that sets them;
//! * [`backend`]: what a host backend owes, and the environment's layout as data;
//! * [`interp`]: executes a block on the spot: the oracle for every backend;
//! * [`unit`]: instructions of x86's vector and floating-point units;
//! * [`text`]: the text form, written and read;
//! * [`verify`]: the rules a block obeys;
//! * [`filetest`]: test cases in files, for every executor of blocks;
//! * [`random`]: random blocks and states, for comparing two executors.
#![forbid(unsafe_code)]

pub mod backend;
pub mod filetest;
pub mod flags;
pub mod interp;
pub mod op;
pub mod random;
pub mod text;
pub mod unit;
pub mod verify;

pub use op::*;
