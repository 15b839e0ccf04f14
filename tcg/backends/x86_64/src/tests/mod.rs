//! Generated code against the IR's interpreter, on random blocks and on programs that link.

mod harness;
mod linking;
mod random;
mod speed;
