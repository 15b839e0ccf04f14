//! Threads for host calls that block: file I/O, name look-ups.

use crate::error::HostError;
use crossbeam::channel::{Sender, unbounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// Starts a named thread.
pub fn spawn_worker(name: &str, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HostError> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(f).map_err(|e| HostError::new(format!("start thread {name}"), e))
}

/// A queue of jobs and threads that work on it. Dropping it finishes what is queued.
pub struct WorkerPool {
    sender: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl WorkerPool {
    /// `count` threads called `NAME-0` and on.
    pub fn new(name: &str, count: usize) -> Result<Self, HostError> {
        let (sender, receiver) = unbounded::<Job>();
        let mut threads = Vec::new();
        for i in 0..count.max(1) {
            let receiver = receiver.clone();
            threads.push(spawn_worker(&format!("{name}-{i}"), move || {
                for job in receiver {
                    if catch_unwind(AssertUnwindSafe(job)).is_err() {
                        log::error!("a job of a worker thread panicked");
                    }
                }
            })?);
        }
        Ok(Self { sender: Some(sender), threads })
    }

    /// Queues a job. The submitter bounds how many there are.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(sender) = &self.sender {
            // The receivers live as long as the pool.
            let _ = sender.send(Box::new(job));
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.sender = None;
        let own = std::thread::current().id();
        for t in self.threads.drain(..).filter(|t| t.thread().id() != own) {
            let _ = t.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn dropping_finishes_the_queue() {
        let pool = WorkerPool::new("test-worker", 2).unwrap();
        let n = Arc::new(AtomicU32::new(0));
        for _ in 0..100 {
            let n = n.clone();
            pool.submit(move || {
                n.fetch_add(1, Ordering::Relaxed);
            });
        }
        pool.submit(|| panic!("expected by the test"));
        drop(pool);
        assert_eq!(n.load(Ordering::Relaxed), 100);
    }
}
