//! What reaches the machine from outside and is not the guest's own doing: chance and the time of day. All of it
//! passes through here, so that a run can be repeated ([`seed`]) and, one day, recorded and replayed.
//!
//! What a user types, network packets and the moment at which a disk answers are outside inputs too; those arrive as
//! work of the I/O thread.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::clock::VirtualClock;

/// With a seed, the time of day at which every run begins: 2000-01-01 00:00:00 UTC, in ns.
pub const SEEDED_START: u64 = 946_684_800 * 1_000_000_000;

#[derive(Default)]
struct State {
    /// Chance, if it is to be repeatable.
    seeded: Option<Seeded>,
    source: Option<File>,
}

struct Seeded {
    state: u64,
    clock: Weak<VirtualClock>,
}

static STATE: Mutex<State> = Mutex::new(State { seeded: None, source: None });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on the process's chance follows from `number`, and its time of day from `clock` and [`SEEDED_START`].
pub fn seed(number: u64, clock: &Arc<VirtualClock>) {
    state().seeded = Some(Seeded { state: number, clock: Arc::downgrade(clock) });
}

/// Fills `to` by chance.
///
/// # Errors
/// The host has none.
pub fn random(to: &mut [u8]) -> io::Result<()> {
    let mut state = state();
    if let Some(seeded) = &mut state.seeded {
        for piece in to.chunks_mut(8) {
            piece.copy_from_slice(&seeded.next().to_le_bytes()[..piece.len()]);
        }
        return Ok(());
    }
    if state.source.is_none() {
        state.source = Some(File::open("/dev/urandom")?);
    }
    match &mut state.source {
        Some(file) => file.read_exact(to),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Whether chance is repeatable.
pub fn is_seeded() -> bool {
    state().seeded.is_some()
}

/// The time of day: ns since 1970, UTC.
pub fn wall_clock() -> u64 {
    let clock = state().seeded.as_ref().map(|s| s.clock.upgrade());
    match clock {
        Some(clock) => SEEDED_START + clock.map_or(0, |c| c.now()),
        None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
    }
}

impl Seeded {
    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same() {
        let mut first = Seeded { state: 7, clock: Weak::new() };
        let mut again = Seeded { state: 7, clock: Weak::new() };
        let values: Vec<u64> = (0..4).map(|_| first.next()).collect();
        assert!(values.iter().all(|v| *v == again.next()));
        assert_ne!(values[0], values[1]);
        assert_ne!(Seeded { state: 8, clock: Weak::new() }.next(), values[0]);
        let mut bytes = [0; 13];
        random(&mut bytes).unwrap();
        assert!(wall_clock() > SEEDED_START);
    }
}
