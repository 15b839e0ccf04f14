//! The one place that the outside world's doings pass through on their way to a machine whose time is its instructions
//! (`-icount`): what is typed or sent to its character devices, frames from its networks, and completions of its disks.
//!
//! They come when they come, on the I/O thread or a worker. Here they are kept until the vCPU's thread fires a timer of
//! the virtual clock, so that each reaches its device between two instructions that have numbers. A journal can note
//! which ([`Inputs::record`]), and a later run be given the same at the same instructions ([`Inputs::replay`]): then it
//! executes the same instructions to the end. A disk needs no journal: a request takes a fixed time of the guest, and
//! the guest waits for the host where that is slower; its data go by a copy, made and given back at instructions' numbers.
//! Whether the host takes output is kept from the guest: what it does not take waits here.
//!
//! Left out: what is done to the machine by the monitor (resets, keys of a display, cables, sizes of disks).

mod journal;
mod wrap;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{BlockBackend, CharBackend, NetBackend};
use crate::clock::Timer;
use crate::clock::timer::TimerQueue;

use journal::Journal;

/// How long a disk's request takes, in ns of the guest's time.
pub const DISK_TIME: u64 = 50_000;

/// The inputs of a machine that counts instructions.
pub struct Inputs {
    timers: Arc<TimerQueue>,
    journal: Mutex<Journal>,
}

impl Inputs {
    /// Of the machine with these timers, on its virtual clock.
    pub fn new(timers: Arc<TimerQueue>) -> Arc<Inputs> {
        Arc::new(Inputs { timers, journal: Mutex::default() })
    }

    fn journal(&self) -> std::sync::MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what comes, and when, in a file. `seed`: what all chance follows from.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn record(&self, path: &Path, seed: u64) -> io::Result<()> {
        *self.journal() = Journal::record(path, seed)?;
        Ok(())
    }

    /// Gives the machine what the file says, at the same instructions, and nothing else. Answers the seed.
    ///
    /// # Errors
    /// The file cannot be read, or is none of ours.
    pub fn replay(&self, path: &Path) -> io::Result<u64> {
        let (journal, seed) = Journal::replay(path)?;
        *self.journal() = journal;
        Ok(seed)
    }

    /// Writes out what has been noted.
    ///
    /// # Errors
    /// Writing failed, now or before.
    pub fn finish(&self) -> io::Result<()> {
        self.journal().finish()
    }

    fn timer(&self) -> Timer {
        self.timers.timer()
    }

    /// A disk whose requests complete at times that the guest's instructions determine.
    pub fn disk(&self, disk: Arc<dyn BlockBackend>) -> Arc<dyn BlockBackend> {
        wrap::Disk::new(disk, self.timer())
    }

    /// A character device whose input passes through here; `id` tells it from the others.
    pub fn char(self: &Arc<Self>, id: &str, char: Arc<dyn CharBackend>) -> Arc<dyn CharBackend> {
        let line = |id: String| wrap::Line::new(self, &id);
        wrap::Char::new(char, line(format!("char:{id}")), line(format!("char:{id}:events")))
    }

    /// A network whose frames pass through here.
    pub fn net(self: &Arc<Self>, id: &str, net: Arc<dyn NetBackend>) -> Arc<dyn NetBackend> {
        wrap::Net::new(net, wrap::Line::new(self, &format!("net:{id}")))
    }
}

#[cfg(test)]
mod tests;
