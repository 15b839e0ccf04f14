//! `mimus try <guest>`: a ready-made Linux at a shell, with nothing to prepare.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs `mimus try …`.
pub fn main(_words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    anyhow::bail!("try: not in this build")
}
