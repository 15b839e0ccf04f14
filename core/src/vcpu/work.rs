//! Work for a vCPU, done on its own thread between two `run`s, paused or not.

use crate::accel::Vcpu;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A piece of work.
pub type VcpuWork = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

/// Why work was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// There is no such vCPU.
    #[error("there is no vCPU of that number")]
    NoSuchVcpu,
    /// A vCPU's thread may not wait for another one's.
    #[error("a vCPU thread may not wait for work on a vCPU")]
    OnVcpuThread,
    /// The thread ended or the work panicked.
    #[error("the vCPU's thread did not finish the work")]
    Lost,
}

/// The queue of one vCPU.
#[derive(Default)]
pub struct WorkQueue {
    items: Mutex<Items>,
    waiting: AtomicBool,
}

#[derive(Default)]
struct Items {
    list: VecDeque<VcpuWork>,
    closed: bool,
}

impl WorkQueue {
    fn lock(&self) -> MutexGuard<'_, Items> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds work; false if the queue is closed.
    pub fn push(&self, work: VcpuWork) -> bool {
        let mut items = self.lock();
        if items.closed {
            return false;
        }
        items.list.push_back(work);
        self.waiting.store(true, Ordering::Release);
        true
    }

    /// True if there is work.
    pub fn has_work(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Takes the oldest work.
    pub fn pop(&self) -> Option<VcpuWork> {
        let mut items = self.lock();
        let work = items.list.pop_front();
        self.waiting.store(!items.list.is_empty(), Ordering::Release);
        work
    }

    /// Drops all work, and takes no more.
    pub fn close(&self) {
        let dropped = {
            let mut items = self.lock();
            items.closed = true;
            std::mem::take(&mut items.list)
        };
        drop(dropped);
    }
}
