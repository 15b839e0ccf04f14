//! Random sequences of every instruction of the `max` model, by generated code, by the interpreter and by the host's own
//! processor, from the same registers and memory: all must agree in all they leave, exceptions included.
//!
//! `cargo test` runs a few thousand. More, by `cargo xtask fuzz x86`, or by environment variables:
//!
//! | variable | |
//! |---|---|
//! | `MIMUS_FUZZ_COUNT` | instructions to run |
//! | `MIMUS_FUZZ_SEED` | what the sequences are made from: another number, other sequences |
//! | `MIMUS_FUZZ_CLASS` | `integer`, `vector`, `x87`, `all` |
//! | `MIMUS_FUZZ_BITS` | 16, 32, 64, or all (0) |
//! | `MIMUS_FUZZ_LENGTH` | instructions of a sequence |
//! | `MIMUS_FUZZ_BAD` | of 100 accesses and stack pointers, how many more are to where they may fault |
//! | `MIMUS_FUZZ_KEEP_GOING` | report so many failures before stopping |
//!
//! Left out is what a program of the host's cannot execute alike: system calls, identification and clocks, INT1 (which
//! hypervisors intercept), XSAVEOPT (only the processor knows what has been modified), SGDT and its like (the kernel
//! executes them), TSX, where the last x87 instruction was while no exception of it waits. With
//! CR0.TS the engines are compared with each other.
//!
//! A failing sequence is reduced to what it needs, and printed as assembly with the state before it and the
//! differences after it.

mod build;
mod compare;
mod coverage;
mod guest;
mod host;
mod layout;
mod modify;
mod random;
mod regs;
mod select;
mod sequence;
mod special;

use compare::{Job, run};
use select::Class;

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(otherwise)
}

fn job(class: Class, bits: u32) -> Job {
    Job {
        class,
        bits,
        count: number("MIMUS_TEST_ROUNDS", 8_000),
        seed: number("MIMUS_TEST_SEED", 1),
        length: 16,
        bad: 0,
        failures: 1,
    }
}

fn check(job: Job) {
    if let Err(text) = run(&job) {
        panic!("{text}");
    }
}

#[test]
fn integer_64() {
    check(job(Class::Integer, 64));
}

#[test]
fn integer_32() {
    check(job(Class::Integer, 32));
}

#[test]
fn integer_16() {
    check(job(Class::Integer, 16));
}

#[test]
fn vector_64() {
    check(job(Class::Vector, 64));
}

#[test]
fn vector_32() {
    check(job(Class::Vector, 32));
}

#[test]
fn x87() {
    check(job(Class::X87, 0));
}

#[test]
fn mixed() {
    check(job(Class::All, 0));
}

/// Short sequences of which most fault, by more than one thing at once: what comes first.
#[test]
fn faults() {
    for bits in [64, 32, 16] {
        check(Job { count: number("MIMUS_TEST_ROUNDS", 6_000), length: 3, bad: 60, ..job(Class::All, bits) });
    }
}

/// What `cargo xtask fuzz x86` runs.
#[test]
fn fuzz() {
    let Ok(count) = std::env::var("MIMUS_FUZZ_COUNT") else {
        println!("SKIPPED (fuzz): MIMUS_FUZZ_COUNT is not set; see cargo xtask fuzz");
        return;
    };
    let class = std::env::var("MIMUS_FUZZ_CLASS").unwrap_or_else(|_| "all".to_owned());
    check(Job {
        class: Class::named(&class).expect("MIMUS_FUZZ_CLASS: integer, vector, x87 or all"),
        bits: number("MIMUS_FUZZ_BITS", 0) as u32,
        count: count.parse().expect("MIMUS_FUZZ_COUNT: a number"),
        seed: number("MIMUS_FUZZ_SEED", 1),
        length: number("MIMUS_FUZZ_LENGTH", 16) as usize,
        bad: number("MIMUS_FUZZ_BAD", 0),
        failures: number("MIMUS_FUZZ_KEEP_GOING", 1),
    });
}
