//! Snapshots that are cut short or damaged: an error of one line, or a machine that goes on; never a panic, and no
//! more memory than the machine has.

use std::sync::OnceLock;

use mimus_core::accel::VcpuIndex;
use mimus_core::arch::StateGroups;
use mimus_tests::cpus::alone;
use mimus_tests::random::Random;
use mimus_tests::scale;

use crate::harness::{Engine, Guest, Setup, idle};
use crate::registers::everything;

fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| everything().device("virtio-rng-device,id=last"))
}

/// Where the sections of RAM begin: the states are before.
fn ram_section(snapshot: &[u8]) -> usize {
    snapshot.windows(8).position(|w| w == b"RAM \0\0\0\0").expect("RAM")
}

fn sample(guest: &mut Guest) -> Vec<u8> {
    let pages = guest.machine.services().ram.block("ram").unwrap();
    for page in (0..pages.page_count()).step_by(300) {
        assert!(pages.store(page * 4096 + 8, page));
    }
    guest.save()
}

/// Restores what may be damaged. After an error the machine is reset, as it must be.
fn try_restore(guest: &mut Guest, bad: &[u8], what: &str) -> bool {
    match guest.restore(bad) {
        Ok(()) => {
            guest.machine.resume();
            guest.machine.pause();
            true
        }
        Err(e) => {
            let e = e.to_string();
            assert!(!e.is_empty() && !e.contains('\n') && e.len() < 1000, "{what}: {e:?}");
            false
        }
    }
}

/// Memory the process has had at most, and address space, in KiB.
struct Peak([u64; 2]);

impl Peak {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self([field("VmHWM:"), field("VmPeak:")])
    }

    /// What restoring damaged files took must have been little.
    fn check(&self) {
        let grown: Vec<u64> = Self::now().0.iter().zip(self.0).map(|(now, then)| now.saturating_sub(then)).collect();
        assert!(grown[0] < 64 << 10 && grown[1] < 512 << 10, "memory and address space grew by {grown:?} KiB");
    }
}

#[test]
fn cut_short() {
    let _alone = alone();
    let mut guest = setup().start(Engine::Null);
    let good = sample(&mut guest);
    let states = ram_section(&good);
    let peak = Peak::now();
    let mut rng = Random::new(31);
    for i in 0..400 {
        let cut = match i % 4 {
            0 => i / 4,
            1 => states + rng.below(200) as usize,
            2 => good.len() - 1 - rng.below(200) as usize,
            _ => rng.below(good.len() as u64) as usize,
        };
        assert!(!try_restore(&mut guest, &good[..cut], "cut"), "cut at {cut} of {}", good.len());
    }
    peak.check();
    guest.machine.reset().unwrap();
    guest.restore(&good).unwrap();
    assert!(guest.save() == good);
}

#[test]
fn damaged_bits() {
    let _alone = alone();
    let mut guest = setup().start(Engine::Null);
    let good = sample(&mut guest);
    let states = ram_section(&good);
    let peak = Peak::now();
    let mut rng = Random::new(33);
    let (mut refused, mut taken) = (0, 0);
    for round in 0..1500 * scale() {
        let mut bad = good.clone();
        for _ in 0..=rng.below(2) {
            // Mostly in the states; pages themselves may hold anything.
            let at = if rng.one_in(20) {
                rng.below(good.len() as u64) as usize
            } else {
                rng.below(states as u64 + 64) as usize
            };
            match rng.below(3) {
                0 => bad[at] = rng.pick(&[0, 1, 0x7f, 0x80, 0xc0, 0xdd, 0xdf, 0xff]),
                1 => bad[at] = rng.u64() as u8,
                _ => bad[at] ^= 1 << rng.below(8),
            }
        }
        if bad == good {
            continue;
        }
        match try_restore(&mut guest, &bad, &format!("round {round}")) {
            true => taken += 1,
            false => refused += 1,
        }
        if round % 100 == 0 {
            guest.machine.reset().unwrap();
        }
    }
    assert!(refused > taken && taken > 0, "{refused} refused, {taken} taken");
    peak.check();
    guest.machine.reset().unwrap();
    guest.restore(&good).unwrap();
    assert!(guest.save() == good);
}

/// The lengths in a file are claims.
#[test]
fn claims_of_length() {
    let _alone = alone();
    let mut guest = setup().start(Engine::Null);
    let good = sample(&mut guest);
    let states = ram_section(&good);
    let tree = good.windows(8).position(|w| w == b"TREE\0\0\0\0").unwrap();
    let peak = Peak::now();
    // Lengths of META, TREE and RAM, of RAM's name and of RAM itself, the first page and the number of pages.
    for at in [24, tree + 8, states + 8, states + 16, states + 27, states + 35, states + 43] {
        for claim in [0u64, 1, 0xffff, 1 << 24, (256 << 20) - 1, 1 << 32, 1 << 48, 1 << 63, u64::MAX] {
            let mut bad = good.clone();
            bad[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            if bad != good {
                try_restore(&mut guest, &bad, &format!("{claim:#x} at {at}"));
            }
        }
    }
    peak.check();
}

/// Registers of vCPUs that no vCPU can have, on the accelerator that uses them.
#[test]
fn damaged_vcpus_on_the_translator() {
    let _alone = alone();
    let setup = Setup::new(2, 16 << 20).kernel(&idle());
    let mut guest = setup.start(Engine::Jit);
    guest.machine.resume();
    guest.machine.pause();
    let good = guest.save();
    let states = ram_section(&good);
    let cpu = good.windows(14).position(|w| w == b"/machine/cpu.0").unwrap();
    let end = good.windows(14).position(|w| w == b"/machine/cpu.1").unwrap();
    assert!(cpu < end && end < states);
    let mut rng = Random::new(35);
    let (mut refused, mut taken) = (0, 0);
    for round in 0..400 * scale() {
        let mut bad = good.clone();
        for _ in 0..=rng.below(3) {
            bad[cpu + rng.below((end - cpu) as u64) as usize] = rng.u64() as u8;
        }
        match guest.restore(&bad) {
            Ok(()) => {
                guest.machine.resume();
                std::thread::yield_now();
                guest.machine.pause();
                let state = guest.machine.vcpu_state(VcpuIndex(0), StateGroups::All);
                assert!(state.is_ok(), "round {round}");
                taken += 1;
            }
            Err(e) => {
                assert!(!e.to_string().contains('\n'), "{e}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
    guest.machine.reset().unwrap();
    guest.restore(&good).unwrap();
}
