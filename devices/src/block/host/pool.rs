//! Threads for blocking calls of one disk. They are started when there is work and none
//! is idle, up to a limit, and end with the pool.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// The threads of one disk.
pub struct Pool {
    shared: Arc<Shared>,
    name: String,
    max_threads: usize,
}

struct Shared {
    /// Leaf lock.
    state: Mutex<State>,
    work: Condvar,
    empty: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Jobs queued or running.
    open: usize,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// A pool without threads yet; they will be called `name`.
    pub fn new(name: impl Into<String>, max_threads: usize) -> Self {
        let shared = Shared { state: Mutex::default(), work: Condvar::new(), empty: Condvar::new() };
        Self { shared: Arc::new(shared), name: name.into(), max_threads: max_threads.max(1) }
    }

    /// Runs `job` on a thread of the pool; here and now if the host has no thread to give.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.lock();
        state.open += 1;
        state.jobs.push_back(Box::new(job));
        let wanted = state.jobs.len() > state.idle && state.threads < self.max_threads;
        if wanted {
            state.threads += 1;
        }
        drop(state);
        self.shared.work.notify_one();
        if wanted && !self.spawn() {
            let mut state = self.shared.lock();
            state.threads -= 1;
            if state.threads == 0 {
                drop(state);
                work(&self.shared, false);
            }
        }
    }

    fn spawn(&self) -> bool {
        let shared = self.shared.clone();
        let thread = thread::Builder::new().name(self.name.clone());
        match thread.spawn(move || work(&shared, true)) {
            Ok(_) => true,
            Err(e) => {
                log::warn!("{}: cannot start a thread: {e}", self.name);
                false
            }
        }
    }

    /// Waits until no job is queued or running.
    pub fn drain(&self) {
        let mut state = self.shared.lock();
        while state.open > 0 {
            state = self.shared.empty.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
    }
}

/// Runs jobs until there are none and `stay` is false or the pool is closed.
fn work(shared: &Shared, stay: bool) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.lock();
            state.open -= 1;
            if state.open == 0 {
                shared.empty.notify_all();
            }
        } else if !stay || state.closed {
            return;
        } else {
            state.idle += 1;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn all_jobs_run() {
        let pool = Pool::new("test", 3);
        let count = Arc::new(AtomicUsize::new(0));
        for _ in 0..500 {
            let count = count.clone();
            pool.run(move || {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        pool.drain();
        assert_eq!(count.load(Ordering::Relaxed), 500);
        assert!(pool.shared.lock().threads <= 3);
    }
}
