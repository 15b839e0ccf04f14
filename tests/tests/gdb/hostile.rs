//! Packets that make no sense, or too much, to a machine that is one.
//!
//! `cargo xtask fuzz gdb` sends ten millions: `MIMUS_FUZZ_PACKETS` says how many packets all machines together get instead of
//! the few of an ordinary test run, `MIMUS_FUZZ_SEED` where their random numbers begin.

use std::time::{Duration, Instant};

use mimus_gdbstub::packet::encode;
use mimus_gdbstub::session::Flow;
use mimus_machines::machine::{Request, RunState};
use mimus_tests::cpus::alone;
use mimus_tests::random::Random;

use crate::harness::{Debuggee, Engine, Setup};
use crate::programs;

/// Packets to each machine in an ordinary test run.
const PACKETS: u64 = 4000;
/// Machines that get them.
const MACHINES: u64 = 3;
/// How often a long run says where it is.
const TELL: u64 = 500_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|v| v.parse().ok())
}

fn packets() -> u64 {
    number("MIMUS_FUZZ_PACKETS").map_or(PACKETS, |all| all.div_ceil(MACHINES))
}

const HEADS: &[&str] = &[
    "?",
    "g",
    "G",
    "p",
    "P",
    "m",
    "M",
    "X",
    "Z0,",
    "Z1,",
    "Z2,",
    "Z3,",
    "Z4,",
    "z0,",
    "z1,",
    "z2,",
    "z3,",
    "z4,",
    "Hg",
    "Hc",
    "T",
    "D",
    "c",
    "s",
    "C05",
    "S05;",
    "vCont;c",
    "vCont;s",
    "vCont;",
    "vCont?",
    "vKill;",
    "v",
    "q",
    "Q",
    "qRcmd,",
    "qSupported:",
    "qXfer:features:read:target.xml:",
    "qXfer:memory-map:read::",
    "qXfer:",
    "qfThreadInfo",
    "qC",
    "qThreadExtraInfo,",
    "qSymbol:",
    "Qqemu.PhyMemMode:",
    "Qqemu.sstep=",
    "qqemu.sstep",
    "QStartNoAckMode",
    "qHostInfo",
    "qProcessInfo",
    "\u{0}",
    "R",
    "!",
    "i",
    "k",
];
const PIECES: &[&str] = &[
    "0",
    "1",
    "2",
    "7",
    "10",
    "20",
    "508",
    "f0340",
    "80200000",
    "80000000",
    "80400000",
    "ffffffffffffffff",
    "7fffffffffffffff",
    "-1",
    "-",
    ",",
    ";",
    ":",
    "=",
    "c",
    "s",
    "ff",
    "00",
    "xx",
    "zz",
    "3ffb",
    "ffff",
    "é",
    "#",
    "}",
    "*",
    "\u{7f}",
];

fn packet(random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random, from: &[&'static str]| from[random.below(from.len() as u64) as usize];
    let mut body = pick(random, HEADS).as_bytes().to_vec();
    // Most are nearly right.
    match random.below(8) {
        0..4 => {
            for _ in 0..random.below(6) {
                body.extend(pick(random, PIECES).bytes());
            }
        }
        4 => body.extend(format!("{:x},{:x}", random.u64(), random.below(64)).bytes()),
        5 => body.extend(format!("{:x},{:x}:{}", 0x8040_0000 + random.below(4096), 2, "abcd").bytes()),
        6 => body.extend((0..random.below(40)).map(|_| random.u64() as u8)),
        _ => {}
    }
    body
}

/// Everything is answered or not, and the guest is there afterwards.
fn torment(name: &str, guest: &Debuggee, packets: u64, seed: u64) {
    let seed = number("MIMUS_FUZZ_SEED").unwrap_or(seed);
    println!("{name}: {packets} packets, MIMUS_FUZZ_SEED={seed}");
    let mut random = Random::new(seed);
    let mut session = guest.client().session;
    let begun = Instant::now();
    let mut longest = (Duration::ZERO, Vec::new());
    let mut running = false;
    for n in 0..packets {
        if n % TELL == TELL - 1 {
            println!("{name}: {n} packets in {:.0?}", begun.elapsed());
        }
        let body = packet(&mut random);
        // Its end is not what is tried here.
        if matches!(body.first(), Some(b'k')) || body.starts_with(b"vKill") {
            continue;
        }
        let mut bytes = encode(&body);
        match random.below(50) {
            0 => bytes.truncate(random.below(bytes.len() as u64) as usize),
            1 => {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
            2 => bytes.extend([3, b'+', b'-']),
            3 => bytes.extend((0..random.below(100)).map(|_| random.u64() as u8)),
            _ => {}
        }
        let (mut out, before) = (Vec::new(), Instant::now());
        let flow = session.bytes(&bytes, &mut out);
        if before.elapsed() > longest.0 {
            longest = (before.elapsed(), body);
        }
        assert!(out.len() < 1 << 18, "{} bytes", out.len());
        running |= session.runs() || flow == Flow::Close;
        // Whether it runs at random or has been let go, it is stopped before long.
        if running && random.below(4) == 0 || flow == Flow::Close {
            stop(guest);
            session.event(mimus_gdbstub::Event::Stopped, &mut out);
            running = false;
        }
        if flow == Flow::Close {
            session = mimus_gdbstub::session::Session::new(guest.target.clone());
        }
    }
    println!(
        "{name}: {packets} packets in {:?}, {:.0} a second; the longest took {:?}: {:?}",
        begun.elapsed(),
        packets as f64 / begun.elapsed().as_secs_f64(),
        longest.0,
        String::from_utf8_lossy(&longest.1)
    );
    stop(guest);
    session.event(mimus_gdbstub::Event::Stopped, &mut Vec::new());
    session.end(true);
    // What was written to its registers and memory is nobody's fault: it answers.
    assert!((0..guest.target.vcpus()).all(|n| guest.target.state(n).is_ok()));
}

/// Stops it if it runs.
fn stop(guest: &Debuggee) {
    let deadline = Instant::now() + crate::harness::LIMIT;
    guest.control.request(Request::Stop);
    // What was asked before comes first; a guest that resets itself goes on of itself.
    while !guest.control.settle(crate::harness::LIMIT) || guest.control.state() == RunState::Running {
        assert!(Instant::now() < deadline, "it does not stop");
        guest.control.request(Request::Stop);
    }
}

#[test]
fn a_machine_of_two_harts() {
    let _one = alone();
    let kernel = programs::riscv::two_harts().finish();
    let guest = Setup::new("riscv64", "virt", 2).kernel(&kernel, false).start(Engine::Jit);
    torment("riscv64", &guest, packets(), 0x1d3f);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_pc_of_64_bits() {
    let _one = alone();
    let guest = Setup::new("x86_64", "pc", 1).rom(&programs::x86::rom(true)).start(Engine::Jit);
    torment("x86_64", &guest, packets(), 0x77a1);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_pc_of_32_bits() {
    let _one = alone();
    let guest = Setup::new("i386", "pc", 1).rom(&programs::x86::rom(false)).start(Engine::Jit);
    torment("i386", &guest, packets(), 0x3386);
}
