//! Who may be in `KVM_RUN` when: kicks that are not lost, and holding all vCPUs out.
//!
//! A vCPU's thread announces that it enters, then looks for requests; whoever has a request notes it, then
//! looks whether the vCPU is in. One of the two sees the other (both are sequentially consistent). The window
//! between the look and the system call is closed by the run page's `immediate_exit`, which the
//! requester sets before it sends the signal; set too late it makes one later `KVM_RUN` return early,
//! which is harmless.

use crate::sys::run_page::RunPage;
use crate::sys::signal;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// The run loop wants `run` to return.
pub const KICK: u32 = 1 << 0;
/// Something changed that is looked at before the next entry: pins.
pub const LOOK: u32 = 1 << 1;
/// Wait until whoever holds [`Entries`] lets go.
const HOLD: u32 = 1 << 2;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One vCPU's way into the kernel.
pub struct Entry {
    requests: AtomicU32,
    inside: AtomicBool,
    thread: AtomicI32,
    page: Arc<RunPage>,
    holder: Arc<Mutex<()>>,
}

impl Entry {
    /// The caller is the vCPU's thread from now on.
    pub fn bind_thread(&self) {
        self.thread.store(signal::this_thread(), Ordering::SeqCst);
    }

    /// Notes requests and takes the vCPU out of the kernel. Any thread.
    pub fn request(&self, requests: u32) {
        self.requests.fetch_or(requests, Ordering::SeqCst);
        if self.inside.load(Ordering::SeqCst) {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        self.page.set_immediate_exit(true);
        signal::send(self.thread.load(Ordering::SeqCst));
    }

    /// Takes a request; true if it was there. The vCPU's thread.
    pub fn take(&self, request: u32) -> bool {
        self.requests.load(Ordering::SeqCst) & request != 0
            && self.requests.fetch_and(!request, Ordering::SeqCst) & request != 0
    }

    /// Calls `f`, which is in the kernel, unless there are requests other than `ignored`. Waits while the
    /// vCPUs are held. The vCPU's thread.
    pub fn enter<R>(&self, ignored: u32, f: impl FnOnce() -> R) -> Option<R> {
        loop {
            self.inside.store(true, Ordering::SeqCst);
            let requests = self.requests.load(Ordering::SeqCst) & !ignored;
            if requests == 0 {
                break;
            }
            self.inside.store(false, Ordering::SeqCst);
            if requests & HOLD == 0 {
                return None;
            }
            drop(lock(&self.holder));
        }
        let result = f();
        self.inside.store(false, Ordering::Release);
        if self.page.immediate_exit() {
            self.page.set_immediate_exit(false);
        }
        Some(result)
    }
}

/// Those of all vCPUs of a machine.
#[derive(Default)]
pub struct Entries {
    list: RwLock<Vec<Arc<Entry>>>,
    holder: Arc<Mutex<()>>,
}

impl Entries {
    /// One more vCPU.
    pub fn add(&self, page: Arc<RunPage>) -> Arc<Entry> {
        let entry = Arc::new(Entry {
            requests: AtomicU32::new(0),
            inside: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            page,
            holder: self.holder.clone(),
        });
        self.list.write().unwrap_or_else(PoisonError::into_inner).push(entry.clone());
        entry
    }

    fn snapshot(&self) -> Vec<Arc<Entry>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a request of all vCPUs.
    pub fn request_all(&self, requests: u32) {
        self.snapshot().iter().for_each(|e| e.request(requests));
    }

    /// Runs `f` while no vCPU is in `KVM_RUN`. A vCPU in a call-out counts as out, so that one may do this
    /// itself. What `f` needs must not be held by a vCPU's thread while it enters.
    pub fn hold<R>(&self, f: impl FnOnce() -> R) -> R {
        let held = lock(&self.holder);
        let entries = self.snapshot();
        entries.iter().for_each(|e| e.request(HOLD));
        for entry in &entries {
            let mut round = 0u32;
            while entry.inside.load(Ordering::SeqCst) {
                round += 1;
                std::thread::sleep(Duration::from_micros(20));
                // The signal may have met the thread on its way in, with `immediate_exit` cleared after it.
                if round.is_multiple_of(50) {
                    entry.interrupt();
                }
            }
        }
        // A panic in `f` must let the vCPUs go.
        let release = Release(&entries);
        let result = f();
        drop(release);
        drop(held);
        result
    }
}

struct Release<'a>(&'a [Arc<Entry>]);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        for entry in self.0 {
            entry.requests.fetch_and(!HOLD, Ordering::SeqCst);
        }
    }
}
