//! tests that need several crates.
