//! Generated code against the IR's interpreter, on random blocks and on programs that link.

mod division;
mod edge;
mod files;
mod flagged;
mod harness;
mod linking;
mod marching;
mod native;
mod quiet;
mod random;
mod searching;
mod speed;
mod sums;
