//! Backends around backends: what comes waits for the virtual clock.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::journal::{Event, Journal};
use super::{DISK_TIME, Inputs};
use crate::backend::block::{BlockBuffer, BlockCompletion, BlockError, BlockRequest};
use crate::backend::char::{CharEvent, CharReceiver};
use crate::backend::net::NetReceiver;
use crate::backend::{BlockBackend, CharBackend, NetBackend};
use crate::clock::Timer;

/// Most bytes or frames that wait for the guest.
const MOST: usize = 4096;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One place that inputs go to.
pub struct Line {
    id: String,
    inputs: Weak<Inputs>,
    timer: Timer,
    waiting: Mutex<VecDeque<Vec<u8>>>,
    /// They come from a journal.
    replayed: bool,
    /// What is still to come from it.
    to_come: Mutex<VecDeque<Event>>,
}

/// Takes one input: how much of it.
type Deliver<'a> = &'a dyn Fn(&[u8]) -> usize;

impl Line {
    pub fn new(inputs: &Arc<Inputs>, id: &str) -> Line {
        // A journal's words end at spaces.
        let id = &id.replace(char::is_whitespace, "_");
        let (replayed, to_come) = match &mut *inputs.journal() {
            Journal::Replay(places) => (true, places.remove(id).unwrap_or_default()),
            _ => (false, VecDeque::new()),
        };
        let line = Line {
            id: id.to_owned(),
            inputs: Arc::downgrade(inputs),
            timer: inputs.timer(),
            waiting: Mutex::default(),
            replayed,
            to_come: Mutex::new(to_come),
        };
        line.arm_next();
        line
    }

    fn arm_next(&self) {
        if let Some(event) = lock(&self.to_come).front() {
            self.timer.arm(event.at);
        }
    }

    /// Something has come; false if there is no room for it.
    fn came(&self, bytes: &[u8]) -> bool {
        // In a replay, the outside is only what was written down.
        if self.replayed {
            return true;
        }
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MOST {
            return false;
        }
        waiting.push_back(bytes.to_vec());
        drop(waiting);
        self.timer.arm(self.timer.now());
        true
    }

    /// The device has room again.
    fn ready(&self) {
        if !lock(&self.waiting).is_empty() {
            self.timer.arm(self.timer.now());
        }
    }

    /// On the vCPU's thread: gives the device what waits.
    fn fired(&self, deliver: Deliver<'_>) {
        let now = self.timer.now();
        if self.replayed {
            let mut to_come = lock(&self.to_come);
            while let Some(event) = to_come.pop_front_if(|e| e.at <= now) {
                lock(&self.waiting).push_back(event.bytes);
            }
            drop(to_come);
            self.arm_next();
        }
        loop {
            let Some(bytes) = lock(&self.waiting).pop_front() else { break };
            let taken = deliver(&bytes).min(bytes.len());
            if taken > 0
                && let Some(inputs) = self.inputs.upgrade()
            {
                inputs.journal().note(&self.id, now, &bytes[..taken]);
            }
            if taken < bytes.len() {
                lock(&self.waiting).push_front(bytes[taken..].to_vec());
                break;
            }
        }
    }
}

/// A character device.
pub struct Char {
    inner: Arc<dyn CharBackend>,
    line: Line,
    receiver: OnceLock<CharReceiver>,
    this: Weak<Char>,
}

impl Char {
    pub fn new(inner: Arc<dyn CharBackend>, line: Line) -> Arc<Char> {
        Arc::new_cyclic(|this: &Weak<Char>| {
            let weak = this.clone();
            line.timer.bind(move || {
                if let Some(char) = weak.upgrade()
                    && let Some(receiver) = char.receiver.get()
                {
                    char.line.fired(&|bytes| receiver(bytes));
                }
            });
            Char { inner, line, receiver: OnceLock::new(), this: this.clone() }
        })
    }
}

impl CharBackend for Char {
    fn write(&self, data: &[u8]) -> usize {
        self.inner.write(data)
    }
    fn set_receiver(&self, receiver: CharReceiver) {
        let _ = self.receiver.set(receiver);
        let this = self.this.clone();
        self.inner.set_receiver(Box::new(move |bytes| match this.upgrade() {
            Some(char) if char.line.came(bytes) => bytes.len(),
            Some(_) => 0,
            None => bytes.len(),
        }));
    }
    fn input_ready(&self) {
        self.line.ready();
        self.inner.input_ready();
    }
    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.inner.set_writable_listener(listener);
    }
    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        self.inner.set_event_listener(listener);
    }
    fn flush(&self) {
        self.inner.flush();
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// A network.
pub struct Net {
    inner: Arc<dyn NetBackend>,
    line: Line,
    receiver: OnceLock<NetReceiver>,
    this: Weak<Net>,
}

impl Net {
    pub fn new(inner: Arc<dyn NetBackend>, line: Line) -> Arc<Net> {
        Arc::new_cyclic(|this: &Weak<Net>| {
            let weak = this.clone();
            line.timer.bind(move || {
                if let Some(net) = weak.upgrade()
                    && let Some(receiver) = net.receiver.get()
                {
                    net.line.fired(&|frame| if receiver(frame) { frame.len() } else { 0 });
                }
            });
            Net { inner, line, receiver: OnceLock::new(), this: this.clone() }
        })
    }
}

impl NetBackend for Net {
    fn send(&self, frame: &[u8]) {
        self.inner.send(frame);
    }
    fn set_receiver(&self, receiver: NetReceiver) {
        let _ = self.receiver.set(receiver);
        let this = self.this.clone();
        self.inner.set_receiver(Box::new(move |frame| this.upgrade().is_none_or(|net| net.line.came(frame))));
    }
    fn receive_ready(&self) {
        self.line.ready();
        self.inner.receive_ready();
    }
    fn set_link_listener(&self, listener: Box<dyn Fn(bool) + Send + Sync>) {
        self.inner.set_link_listener(listener);
    }
    fn link_up(&self) -> bool {
        self.inner.link_up()
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// A request of a disk: what the host answered, once it has.
#[derive(Default)]
struct Answer {
    answer: Mutex<Option<(Result<(), BlockError>, BlockBuffer)>>,
    came: Condvar,
}

struct Pending {
    due: u64,
    answer: Arc<Answer>,
    done: BlockCompletion,
}

impl Pending {
    /// Waits for the host and tells the device.
    fn complete(self) {
        let mut answer = lock(&self.answer.answer);
        let (result, buffer) = loop {
            match answer.take() {
                Some(came) => break came,
                None => answer = self.answer.came.wait(answer).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(answer);
        (self.done)(result, buffer);
    }
}

/// A disk.
pub struct Disk {
    inner: Arc<dyn BlockBackend>,
    timer: Timer,
    /// In the order in which they complete.
    pending: Arc<Mutex<VecDeque<Pending>>>,
}

/// Completes what is due at `now`.
fn complete(pending: &Mutex<VecDeque<Pending>>, timer: Option<&Timer>, now: u64) {
    loop {
        // Not held while the device is told: it may submit more.
        let due = lock(pending).pop_front_if(|p| p.due <= now);
        match due {
            Some(request) => request.complete(),
            None => break,
        }
    }
    if let (Some(timer), Some(next)) = (timer, lock(pending).front()) {
        timer.arm(next.due);
    }
}

impl Disk {
    pub fn new(inner: Arc<dyn BlockBackend>, timer: Timer) -> Arc<Disk> {
        let disk = Arc::new(Disk { inner, timer, pending: Arc::default() });
        let weak = Arc::downgrade(&disk);
        disk.timer.bind(move || {
            if let Some(disk) = weak.upgrade() {
                complete(&disk.pending, Some(&disk.timer), disk.timer.now());
            }
        });
        disk
    }
}

impl BlockBackend for Disk {
    fn submit(&self, request: BlockRequest, done: BlockCompletion) {
        // No instruction is executed meanwhile: flash is read while its machine is being built.
        if self.timer.stands() {
            return self.inner.submit(request, done);
        }
        let answer = Arc::<Answer>::default();
        let due = self.timer.now().saturating_add(DISK_TIME);
        let first = {
            let mut pending = lock(&self.pending);
            pending.push_back(Pending { due, answer: answer.clone(), done });
            pending.len() == 1
        };
        let told = move |result, buffer| {
            *lock(&answer.answer) = Some((result, buffer));
            answer.came.notify_all();
        };
        self.inner.submit(request, Box::new(told));
        if first {
            self.timer.arm(due);
        }
    }
    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }
    fn read_only(&self) -> bool {
        self.inner.read_only()
    }
    fn block_size(&self) -> u32 {
        self.inner.block_size()
    }
    fn can_discard(&self) -> bool {
        self.inner.can_discard()
    }
    fn can_write_zeroes(&self) -> bool {
        self.inner.can_write_zeroes()
    }
    fn write_cache(&self) -> bool {
        self.inner.write_cache()
    }
    fn set_resize_listener(&self, listener: Arc<dyn Fn(u64) + Send + Sync>) {
        self.inner.set_resize_listener(listener);
    }
    /// Time stands: what is in flight completes now.
    fn drain(&self) {
        complete(&self.pending, None, u64::MAX);
        self.inner.drain();
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}
