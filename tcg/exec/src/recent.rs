//! The last exceptions and interrupts of a vCPU, always remembered: what a report of a crash begins with.

use mimus_core::accel::RecentEvent as Event;

/// How many.
const KEPT: usize = 32;

/// The last of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent {
    events: [Event; KEPT],
    /// How many there have been.
    count: u64,
}

impl Recent {
    pub fn push(&mut self, event: Event) {
        self.events[self.count as usize % KEPT] = event;
        self.count += 1;
    }

    /// The last ones, oldest first.
    pub fn list(&self) -> Vec<Event> {
        let first = self.count.saturating_sub(KEPT as u64);
        (first..self.count).map(|i| self.events[i as usize % KEPT]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_in_order() {
        let mut recent = Recent::default();
        assert!(recent.list().is_empty());
        (0..100).for_each(|cause| recent.push(Event { cause, ..Event::default() }));
        let causes: Vec<u64> = recent.list().iter().map(|e| e.cause).collect();
        assert_eq!(causes, (68..100).collect::<Vec<_>>());
    }
}
