//! Loops that wait, which have a PAUSE in them.
//!
//! One that reads the TSC once between each PAUSE and the next waits for time to pass, as kernels do for a slow device. The host
//! has better things to do meanwhile. A wait begins with more than one reading: that of the time to count from.

use std::time::Duration;

/// After how many PAUSEs the host may run something else.
const PAUSES_PER_YIELD: u8 = 32;
/// How often the clock is looked at in a wait for time, in PAUSEs.
const PAUSES_PER_LOOK: u32 = 8;
/// Waits that have lasted this many nanoseconds are slept through: for half as long again, at most [`LONGEST`]. If the wait before
/// was as long, so is this one taken to be, and is slept through from its first look on.
const LONG: u64 = 60_000;
/// An interrupt does not end a sleep.
const LONGEST: u64 = 100_000;

/// What a vCPU that waits does at a PAUSE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rest {
    Spin,
    Yield,
    Sleep(Duration),
}

/// A vCPU's PAUSEs.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Waiting {
    pauses: u8,
    /// Readings of the TSC since the last PAUSE.
    readings: u8,
    /// PAUSEs of the present wait for time, and when it began, in nanoseconds.
    rounds: u32,
    since: u64,
    /// How long it has lasted, and how long the one before it did, as far as anybody looked.
    lasted: u64,
    before: u64,
}

impl Waiting {
    /// The TSC has been read.
    pub(crate) fn time_read(&mut self) {
        self.readings = self.readings.saturating_add(1);
    }

    /// A PAUSE; `now`: the time in nanoseconds.
    pub(crate) fn pause(&mut self, now: impl FnOnce() -> u64) -> Rest {
        match std::mem::take(&mut self.readings) {
            1 if self.rounds != 0 => {
                self.rounds = self.rounds.wrapping_add(1);
                if self.rounds.is_multiple_of(PAUSES_PER_LOOK) {
                    self.lasted = now().saturating_sub(self.since);
                    let known = self.lasted.max(self.before);
                    if known >= LONG {
                        return Rest::Sleep(Duration::from_nanos((known / 2).min(LONGEST)));
                    }
                }
            }
            0 => self.rounds = 0,
            _ => {
                self.before = std::mem::take(&mut self.lasted);
                (self.rounds, self.since) = (1, now());
            }
        }
        self.pauses += 1;
        if self.pauses < PAUSES_PER_YIELD {
            return Rest::Spin;
        }
        self.pauses = 0;
        Rest::Yield
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wait of `rounds` PAUSEs, 1 microsecond each, from `start` on: the sleeps.
    fn wait(waiting: &mut Waiting, start: u64, rounds: u64) -> Vec<Duration> {
        waiting.time_read();
        (0..rounds)
            .filter_map(|n| {
                waiting.time_read();
                match waiting.pause(|| start + 1000 * n) {
                    Rest::Sleep(time) => Some(time),
                    Rest::Spin | Rest::Yield => None,
                }
            })
            .collect()
    }

    #[test]
    fn long_waits_for_time_are_slept_through() {
        let mut waiting = Waiting::default();
        let sleeps = wait(&mut waiting, 5_000_000, 400);
        assert_eq!(sleeps.first(), Some(&Duration::from_nanos(31_500)), "not before it is long");
        assert_eq!(sleeps.iter().max(), Some(&Duration::from_nanos(LONGEST)));
    }

    #[test]
    fn the_next_one_is_taken_to_be_as_long() {
        let mut waiting = Waiting::default();
        wait(&mut waiting, 0, 250);
        let sleeps = wait(&mut waiting, 5_000_000, 10);
        assert_eq!(sleeps, [Duration::from_nanos(LONGEST)]);
        // It was short after all.
        assert_eq!(wait(&mut waiting, 6_000_000, 50), []);
    }

    #[test]
    fn short_ones_are_not_even_if_there_are_many() {
        let mut waiting = Waiting::default();
        for n in 0..100 {
            assert_eq!(wait(&mut waiting, 50_000 * n, 50), []);
        }
    }

    #[test]
    fn what_waits_for_a_lock_yields_now_and_then() {
        let mut waiting = Waiting::default();
        let rests: Vec<Rest> = (0..1000).map(|n| waiting.pause(|| n * 1_000_000)).collect();
        assert_eq!(rests.iter().filter(|rest| **rest == Rest::Yield).count(), 31);
        assert!(!rests.iter().any(|rest| matches!(rest, Rest::Sleep(_))));
    }
}
