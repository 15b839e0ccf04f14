//! Generated code against the IR's interpreter, on random blocks and on programs that link.

mod flagged;
mod harness;
mod linking;
mod native;
mod random;
mod speed;
