//! What the moments say at which something from outside, a timer mostly, finds a vCPU in generated code: which pages run often,
//! and are made anew for that ([`CodeStore::sampled`]), and when that does not pay.
//!
//! Code that runs often has for each access a range entry in each address space, which is a line of the host's caches that nothing
//! else uses. In loops these lines are there; in code that runs once a system call they are not, and while address spaces come
//! and go the entries are empty besides. So of a kernel's pages, which run in every address space, only those count in which
//! most of the time is spent; and if address spaces do not last, nothing is taken to run often any more. A compiler has no place
//! where it spends its time: a program's page counts when it has been found before, or where programs of late have such places.
//!
//! [`CodeStore::sampled`]: crate::code::CodeStore::sampled

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use mimus_tcg_ir::backend::ExitCode;

use crate::engine::Machine;
use crate::env::{Cpu, KICK_EVENT, KICK_REQUEST, KICK_SELF};
use crate::frontend::GuestFrontend;

/// Samples that are looked back at.
const KEPT: usize = 8;
/// How many of them say that a vCPU spends its time in a page.
const MOST: usize = 4;
/// What a sample adds before which contexts lost what they had; one before which they did not takes 1 off.
const LOST: u32 = 2;
/// At how much nothing is taken to run often any more.
const RESTLESS: u32 = 8 * LOST;

/// What a vCPU's last samples were.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    /// Entry tables of pages.
    tables: [u32; KEPT],
    next: usize,
    /// Samples since contexts last lost what they had.
    calm: usize,
    restless: u32,
    /// Entry tables of programs' pages, by the samples of those alone.
    programs: [u32; KEPT],
    next_program: usize,
}

impl Samples {
    /// A program was in the page with this entry table. Whether that says where programs spend their time.
    fn says_where(&mut self, table: u32) -> bool {
        let says = self.programs_stay() || self.programs.contains(&table);
        self.programs[self.next_program % KEPT] = table;
        self.next_program = (self.next_program + 1) % KEPT;
        says
    }

    /// Whether programs of late have places where they spend their time.
    fn programs_stay(&self) -> bool {
        let again = |(i, t): &(usize, &u32)| **t != 0 && self.programs[..*i].contains(t);
        self.programs.iter().enumerate().filter(again).count() >= MOST
    }

    /// The vCPU was in the page with this entry table. Whether it mostly is, and contexts have kept what they had meanwhile.
    fn is_mostly_in(&mut self, table: u32) -> bool {
        self.tables[self.next % KEPT] = table;
        self.next = (self.next + 1) % KEPT;
        self.calm >= KEPT && self.tables.iter().filter(|t| **t == table).count() >= MOST
    }

    /// Contexts have kept what they had since the last sample, or not. Whether code is not to be taken to run often any more.
    fn is_restless(&mut self, calm: bool) -> bool {
        if calm {
            self.calm = self.calm.saturating_add(1);
            self.restless = self.restless.saturating_sub(1);
            return false;
        }
        self.calm = 0;
        self.restless += LOST;
        let restless = self.restless >= RESTLESS;
        if restless {
            self.restless = 0;
        }
        restless
    }
}

impl<F: GuestFrontend> Cpu<F> {
    /// After generated code was left: if what made it leave came from outside, as timers do, where the vCPU is says
    /// something about where it spends its time. Not if it counts: when something comes is the host's affair, and what is
    /// made of the code, which a trace shows, has to be the same when the run is repeated.
    pub(crate) fn sample(&mut self) {
        if self.counting.on
            || self.head.exit_code != ExitCode::Kicked as u32
            || self.head.kick.load(Ordering::Relaxed) & (KICK_EVENT | KICK_REQUEST | KICK_SELF) != KICK_EVENT
        {
            return;
        }
        self.mailbox.samples.fetch_add(1, Ordering::Relaxed);
        let calm = self.mmu.calm_since_sample();
        if self.samples.is_restless(calm) {
            self.machine.store.cool();
        }
        let Some(table) = self.mmu.context().code_table(self.head.pc) else { return };
        let mostly = self.samples.is_mostly_in(table);
        let is_program = F::address_space(self).1 == F::PROGRAMS;
        if is_program {
            self.note_dwelling(table);
        }
        let program = is_program && self.samples.says_where(table);
        if !calm || !(mostly || program) {
            return;
        }
        let start = (self.head.pc & 4095) as u16;
        let block = self.machine.store.sampled(table, start);
        if program && self.samples.programs_stay() {
            // It will be found there again: what else of the page begins often is of the same loops.
            self.machine.store.sampled(table, start);
        }
        if block && let Some(page) = self.machine.store.page_of(table) {
            // If it cannot be now, it is when the block begins next.
            let _made = self.make_anew(self.head.pc, page);
        }
    }
}

/// How often a vCPU is looked at whose guest has set no timer yet.
const PERIOD: Duration = Duration::from_millis(4);
/// Looks one after the other at which nobody had to be kicked, until the guest is on its own.
const ENOUGH: u32 = 100;
/// How long a guest may take until then.
const LONGEST: Duration = Duration::from_secs(30);

/// Before a guest has timers (a kernel unpacks itself first) nothing finds its vCPUs: a thread does, until it is no longer needed.
pub(crate) fn watch_beginning<F: GuestFrontend>(machine: &Arc<Machine<F>>) {
    if machine.instrumentation().count || machine.interpret || !machine.optimise.learns() {
        return;
    }
    if machine.watched.swap(true, Ordering::SeqCst) {
        return;
    }
    let weak = Arc::downgrade(machine);
    let thread = std::thread::Builder::new().name("beginning".to_owned()).spawn(move || watch(&weak));
    // Without it the beginning takes longer.
    if let Err(e) = thread {
        log::debug!("no thread that looks where guests spend their time at first: {e}");
    }
}

fn watch<F: GuestFrontend>(machine: &Weak<Machine<F>>) {
    let began = Instant::now();
    let (mut seen, mut quiet) = (Vec::new(), 0);
    while quiet < ENOUGH && began.elapsed() < LONGEST {
        std::thread::sleep(PERIOD);
        let Some(machine) = machine.upgrade() else { return };
        let peers = machine.peers();
        seen.resize(peers.len(), 0);
        quiet += 1;
        for (peer, seen) in peers.iter().zip(&mut seen) {
            let before = std::mem::replace(seen, peer.mailbox.samples.load(Ordering::Relaxed));
            if before == *seen && peer.mailbox.in_guest.load(Ordering::Relaxed) {
                peer.cell.kick(KICK_EVENT);
                // Its answer is none of another's.
                *seen = seen.wrapping_add(1);
                quiet = 0;
            }
        }
    }
    if let Some(machine) = machine.upgrade() {
        machine.watched.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_to_be_found_again_and_again() {
        let mut samples = Samples::default();
        let mut find = |table, calm| {
            samples.is_restless(calm);
            samples.is_mostly_in(table)
        };
        for table in [7, 1, 7, 2, 7, 3, 7] {
            assert!(!find(table, true), "not for long enough");
        }
        assert!(find(7, true), "half of the last eight and more");
        for table in 10..18 {
            assert!(!find(table, true));
        }
        assert!(!find(7, true), "that was long ago");
        assert!((0..3).map(|_| find(7, true)).last() == Some(true));
        assert!(!find(7, false));
        assert!((1..KEPT).all(|_| !find(7, true)), "contexts lose what they have");
        assert!(find(7, true));
    }

    #[test]
    fn a_program_s_page_counts_at_once_where_programs_have_such_pages() {
        let mut samples = Samples::default();
        assert!(!samples.says_where(1), "it may be anywhere");
        assert!(samples.says_where(1), "there again");
        assert_eq!((10..18).filter(|t| samples.says_where(*t)).count(), 0, "a compiler's");
        assert!(!samples.says_where(1) && !samples.programs_stay(), "that was long ago");
        assert_eq!((0..5).filter(|_| samples.says_where(2)).count(), 4);
        assert!(samples.programs_stay() && samples.says_where(3), "the next program's loop");
    }

    #[test]
    fn what_loses_its_contexts_is_restless_now_and_then() {
        let mut samples = Samples::default();
        let mut times = |calm: &[bool]| calm.iter().cycle().take(96).filter(|c| samples.is_restless(**c)).count();
        assert_eq!(times(&[true]), 0);
        assert_eq!(times(&[false]), 12);
        assert_eq!(times(&[false, true]), 3);
        assert_eq!(times(&[false, true, true, true]), 0);
    }
}
