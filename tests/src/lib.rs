//! What the tests that need several crates share. The tests are in `tests/tests/`:
//!
//! | test | what it runs |
//! |---|---|
//! | `engine` | guest code on the translator, without a machine: random code on generated code and interpreter, several vCPUs |
//! | `machine` | the `virt` board as a whole machine: its registers, guests on it, saved states |

pub mod cpus;
pub mod random;
pub mod random_code;
pub mod riscv;

/// How much of the long tests to run: `MIMUS_TEST_SCALE`, 1 if it is not set. Random tests run that many times
/// as many cases.
pub fn scale() -> u64 {
    std::env::var("MIMUS_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}
