//! Runs sequences on all three and compares; reduces what differs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mimus_arch::x86::regs::RFLAGS_RF;

use crate::build::Generator;
use crate::coverage::Coverage;
use crate::guest::{Guest, Manner};
use crate::host::Host;
use crate::layout::*;
use crate::random::Random;
use crate::regs::{Exit, FLAGS, Outcome, Regs};
use crate::select::Class;
use crate::sequence::Sequence;

/// What to run.
#[derive(Clone, Debug)]
pub struct Job {
    pub class: Class,
    /// Code size; 0: all in turn.
    pub bits: u32,
    /// Instructions.
    pub count: u64,
    pub seed: u64,
    /// Instructions of a sequence.
    pub length: usize,
    /// Of 100 accesses and stack pointers, how many more may fault.
    pub bad: u64,
    /// After how many differences to stop.
    pub failures: u64,
}

/// One try: everything it depends on.
#[derive(Clone)]
struct Case {
    sequence: Sequence,
    before: Regs,
    memory: Vec<u8>,
    manner: Manner,
}

struct Engines {
    host: Host,
    amd: bool,
    guests: Vec<(&'static str, Guest)>,
}

/// Addresses below 2 GiB are few: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs a job.
///
/// # Errors
/// The differences.
pub fn run(job: &Job) -> Result<(), String> {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
    let host = match Host::new() {
        Ok(host) => host,
        Err(why) => {
            println!("SKIPPED (random sequences): {why}");
            return Ok(());
        }
    };
    if job.bits == 16 && !host.local {
        println!("SKIPPED (16-bit code): the host's kernel has no local descriptors");
        return Ok(());
    }
    let guests = vec![("generated code", Guest::new(false, host.local)), ("interpreter", Guest::new(true, host.local))];
    let handles: Vec<_> = guests.iter().map(|(_, g)| g.handle()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A guest that runs on for ever looks at the clock when it is kicked.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(200));
                handles.iter().for_each(|h| h.kick());
            }
        });
        // Also if an engine panics.
        let _end = End(&done);
        all(job, Engines { host, amd: crate::select::host_is_amd(), guests })
    })
}

/// Ends the watchdog.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn all(job: &Job, mut engines: Engines) -> Result<(), String> {
    let mut generator = Generator::new(job.class, job.bad);
    let mut coverage = Coverage::new();
    let mut manners = [0u64; 4];
    let mut failures = Vec::new();
    let began = Instant::now();
    for n in 0.. {
        if coverage.completed >= job.count {
            break;
        }
        let seed = seed_of(job.seed, n);
        let mut r = Random::new(seed);
        let all: &[u32] = if engines.host.local { &[16, 32, 32, 64, 64, 64] } else { &[32, 64, 64] };
        let bits = if job.bits == 0 { r.pick(all) } else { job.bits };
        let (sequence, before) = generator.sequence(&mut r, bits, job.length);
        let manner = manner(&mut r, &sequence);
        let case = Case { sequence, before, memory: memory(&mut r), manner };
        if std::env::var_os("TRACE").is_some() {
            eprintln!("{n}\n{}", case.sequence.print());
        }
        let (expected, found) = engines.differences(&case);
        coverage.note(&case.sequence, &expected);
        manners[match manner {
            Manner::Plain => 0,
            Manner::Stepped => 1,
            Manner::Watched(..) => 2,
            Manner::Switched => 3,
        }] += 1;
        if found.is_empty() {
            continue;
        }
        let text = report(&mut engines, seed, case);
        if job.failures <= 1 {
            return Err(text);
        }
        println!("{text}");
        failures.push(text);
        if failures.len() as u64 >= job.failures {
            break;
        }
    }
    println!(
        "{:?}: {} instructions in {:.1} s, sequences: {} plain, {} stepped, {} with breakpoints, {} with CR0.TS (engines \
         against each other); ended by exceptions: {}",
        job.class,
        coverage.completed,
        began.elapsed().as_secs_f64(),
        manners[0],
        manners[1],
        manners[2],
        manners[3],
        coverage
            .exceptions
            .iter()
            .enumerate()
            .filter(|(_, n)| **n != 0)
            .map(|(v, n)| format!("{v}:{n} "))
            .collect::<String>(),
    );
    if job.class == Class::All {
        for bits in [16, 32, 64] {
            if job.bits != 0 && job.bits != bits {
                continue;
            }
            let (text, missing) = coverage.report(bits, generator.features());
            print!("{text}");
            // Each has come several times by then.
            if missing != 0 && coverage.completed >= 2_000_000 {
                failures.push(text);
            }
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// The seed of case `n`: the first one's is the job's, so that what a failure prints is where to begin; the others' are far
/// from those of any other job.
fn seed_of(job: u64, n: u64) -> u64 {
    if n == 0 { job } else { Random::new(job ^ Random::new(n).next()).next() }
}

/// Most sequences are run as they are.
fn manner(r: &mut Random, sequence: &Sequence) -> Manner {
    match r.below(64) {
        0 => Manner::Switched,
        1 | 2 => Manner::Stepped,
        3 | 4 => {
            let places: Vec<u64> = sequence.itemised().iter().map(|(insn, _)| insn.ip()).collect();
            let mut addresses = [0; 4];
            // Local ones are on: two of instructions, one of writes, one of reads and writes.
            let mut control = 0x455;
            for (i, address) in addresses.iter_mut().enumerate() {
                if i < 2 {
                    *address = r.pick(&places);
                    continue;
                }
                let (bytes, code) = r.pick(&[(1, 0), (2, 1), (4, 3), (8, 2)]);
                *address = (DATA + 0x400 + r.below(0x2000)) & !(bytes - 1);
                let kind = if i == 2 { 1 } else { 3 };
                control |= (kind | code << 2) << (16 + 4 * i);
            }
            Manner::Watched(addresses, control)
        }
        _ => Manner::Plain,
    }
}

/// Numbers of all kinds; small ones where gathers find their indices.
fn memory(r: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; DATA_LEN];
    let mut kind = 0;
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        if i % 8 == 0 {
            kind = r.below(5);
        }
        word.copy_from_slice(&r.word(kind).to_le_bytes());
    }
    for i in 0..64 {
        let at = (SMALL32 - DATA) as usize + 4 * i;
        bytes[at..at + 4].copy_from_slice(&(r.below(128) as u32).wrapping_sub(64).to_le_bytes());
    }
    for i in 0..32 {
        let at = (SMALL64 - DATA) as usize + 8 * i;
        bytes[at..at + 8].copy_from_slice(&r.below(128).wrapping_sub(64).to_le_bytes());
    }
    bytes
}

impl Engines {
    /// The host's outcome, and how the others' differ from it.
    fn differences(&mut self, case: &Case) -> (Outcome, Vec<String>) {
        let code = case.sequence.code();
        let (bits, start) = (case.sequence.bits, case.sequence.start);
        let mut expected = None;
        let stepped = case.manner == Manner::Stepped;
        if case.manner != Manner::Switched {
            let mut outcome = self.host.run(bits, start, &code, &case.before, &case.memory, stepped);
            outcome.regs.normalize(bits);
            case.sequence.random(outcome.regs.rip).iter().for_each(|&n| outcome.regs.gpr[n] = 0);
            let refused = matches!(outcome.exit, Exit::Exception { vector: 13, .. });
            if !(self.amd && refused && case.sequence.based_from_outside(&outcome.regs)) {
                expected = Some(outcome);
            }
        }
        let mut end = expected.as_ref().map(|e| e.regs.rip);
        let mut lines = Vec::new();
        let mut first: Option<Outcome> = None;
        for (name, guest) in &mut self.guests {
            let mut got = guest.run(bits, start, &code, &case.before, &case.memory, case.manner);
            got.regs.normalize(bits);
            // A single step may end it before a random number has gone again.
            let rip = got.regs.rip;
            case.sequence.random(rip).iter().for_each(|&n| got.regs.gpr[n] = 0);
            // The translator has AMD's values for what the manuals leave undefined. Elsewhere, what came of such flags
            // may be anywhere.
            let end = *end.get_or_insert(rip);
            let Some(undefined) = (if self.amd { Some(0) } else { case.sequence.undefined(end) }) else {
                return (expected.unwrap_or_else(|| never(case)), Vec::new());
            };
            let flags = FLAGS & !undefined;
            if let Some(first) = &first
                && got != *first
            {
                let found = different(&got, first, flags, (true, true), "generated code");
                lines.extend(found.into_iter().map(|line| format!("{name}: {line}")));
            }
            // The host has no breakpoints: they change nothing, but RF when something else is told.
            let mut expected = expected.clone();
            let mut flags = flags;
            // But the way back from their handler takes the level from a null selector, which the host's keeps.
            if matches!(case.manner, Manner::Watched(..)) && got.steps != 0 && case.sequence.loads_segments() {
                expected = None;
            }
            if let (Some(expected), Manner::Watched(..)) = (&mut expected, case.manner) {
                (expected.steps, expected.trail) = (got.steps, got.trail.clone());
                flags &= !RFLAGS_RF;
            }
            if let Some(expected) = &expected
                && got != *expected
            {
                // An exception that waits is that of the last instruction, unless a new control word unmasked an old one.
                // The host's kernel, which steps go through, loads and stores the unit's state.
                let pointers = matches!(expected.exit, Exit::Exception { vector: 16, .. })
                    && !case.sequence.loads_x87()
                    && !stepped;
                let settled = case.sequence.settled(expected.regs.rip);
                // Processors that keep the operand's address for exceptions alone have none if there is no operand.
                let mut got = got.clone();
                if !self.amd && !case.sequence.has_operand(expected.regs.x87_instruction()) {
                    got.regs.set_x87_operand(expected.regs.x87_operand());
                }
                let found = different(&got, expected, flags, (pointers, settled), "the host");
                lines.extend(found.into_iter().map(|line| format!("{name}: {line}")));
            }
            first.get_or_insert(got);
        }
        (expected.or(first).unwrap_or_else(|| never(case)), lines)
    }
}

fn never(case: &Case) -> Outcome {
    Outcome { regs: case.before.clone(), memory: Vec::new(), exit: Exit::Never, steps: 0, trail: Vec::new() }
}

/// `pointers`, `memory`: whether where the last x87 instruction was, and memory, are compared too.
fn different(
    got: &Outcome,
    expected: &Outcome,
    flags: u64,
    (pointers, memory): (bool, bool),
    whose: &str,
) -> Vec<String> {
    let mut lines = Vec::new();
    if (got.steps, &got.trail) != (expected.steps, &expected.trail) {
        let at = got.trail.iter().zip(&expected.trail).position(|(a, b)| a != b);
        lines.push(format!("{} steps, {whose} has {}; first difference: {at:?}", got.steps, expected.steps));
    }
    if got.exit != expected.exit {
        lines.push(format!("ended by {:?}, {whose} by {:?}", got.exit, expected.exit));
    }
    lines.extend(got.regs.differences(&expected.regs, flags, pointers, whose));
    for (i, (a, b)) in got.memory.chunks(8).zip(expected.memory.chunks(8)).enumerate() {
        if memory && a != b && lines.len() < 24 {
            lines.push(format!("memory at {:#x}: {a:02x?}, {whose} has {b:02x?}", DATA + 8 * i as u64));
        }
    }
    lines
}

/// The smallest part of a case that still differs, in words.
fn report(engines: &mut Engines, seed: u64, mut case: Case) -> String {
    let original = case.clone();
    let fails = |engines: &mut Engines, case: &Case| !engines.differences(case).1.is_empty();
    // Items, from the end.
    let mut i = case.sequence.items.len();
    while i > 0 {
        i -= 1;
        let mut less = case.clone();
        less.sequence.items.remove(i);
        if fails(engines, &less) {
            case = less;
        }
    }
    simplify(engines, &mut case);
    let (_, mut lines) = engines.differences(&case);
    if lines.is_empty() {
        lines = engines.differences(&original).1;
        lines.insert(0, "it cannot be reproduced".to_owned());
        case = original;
    }
    format!(
        "MIMUS_FUZZ_SEED={seed}\n{:x?}\n{}before:\n{}differences:\n  {}",
        case.manner,
        case.sequence.print(),
        case.before.print(),
        lines.join("\n  ")
    )
}

/// Registers that do not matter become zero, the place a usual one.
fn simplify(engines: &mut Engines, case: &mut Case) {
    let mut attempt = |change: &dyn Fn(&mut Case)| {
        let mut other = case.clone();
        change(&mut other);
        if !engines.differences(&other).1.is_empty() {
            *case = other;
        }
    };
    attempt(&|c| c.manner = Manner::Plain);
    attempt(&|c| c.sequence.start = CODE + 0x100);
    for n in 0..16 {
        attempt(&|c| c.before.gpr[n] = 0);
        attempt(&|c| {
            c.before.put(160 + 16 * n, &[0; 16]);
            c.before.put(576 + 16 * n, &[0; 16]);
        });
    }
    for n in 0..8 {
        attempt(&|c| c.before.put(32 + 16 * n, &[0; 10]));
    }
    attempt(&|c| c.before.flags = 0x202);
    attempt(&|c| c.before.put(0, &[0x7f, 3, 0, 0, 0]));
    attempt(&|c| c.before.put(24, &0x1f80u32.to_le_bytes()));
}
