//! How long an emulator takes to get to its guest's first instruction.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;

use super::child::Running;
use super::median;

/// Milliseconds from the start of the emulator to the first thing its guest does: the
/// median of a few starts of a program that writes one byte to the serial port.
pub fn milliseconds(mut command: Command, target: &Path) -> anyhow::Result<f64> {
    let image = target.join("bench-start.bin");
    let mut code = START_IMAGE.map(u32::to_le_bytes).concat();
    code.resize(4096, 0);
    std::fs::write(&image, code).with_context(|| image.display().to_string())?;
    command.args(["-m", "512", "-nographic", "-bios", "none"]);
    command.arg("-kernel").arg(&image).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut times = Vec::new();
    for _ in 0..5 {
        let from = Instant::now();
        let mut running = Running(command.spawn().with_context(|| format!("{:?}", command.get_program()))?);
        let mut out = running.0.stdout.take().context("no output")?;
        let mut byte = [0];
        while byte != *b"!" {
            out.read_exact(&mut byte).context("the start program did not run")?;
        }
        times.push(from.elapsed().as_secs_f64() * 1000.0);
    }
    median(times).context("no times")
}

/// Stores `!` to the virt board's serial port, then turns it off at the test finisher.
const START_IMAGE: [u32; 8] = [
    0x1000_02b7, // lui  t0, 0x10000
    0x0210_0313, // li   t1, '!'
    0x0062_8023, // sb   t1, 0(t0)
    0x0010_02b7, // lui  t0, 0x100
    0x0000_5337, // lui  t1, 0x5
    0x5553_0313, // addi t1, t1, 0x555
    0x0062_a023, // sw   t1, 0(t0)
    0x0000_006f, // j    .
];
