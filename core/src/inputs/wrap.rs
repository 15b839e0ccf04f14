//! Backends around backends: what comes waits for the virtual clock.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::journal::{Event, Journal};
use super::{DISK_TIME, Inputs};
use crate::backend::block::{BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest};
use crate::backend::char::{CharEvent, CharReceiver};
use crate::backend::net::NetReceiver;
use crate::backend::{BlockBackend, CharBackend, NetBackend};
use crate::clock::Timer;
use crate::memory::RamSlice;

/// Most bytes or frames that wait for the guest.
const MOST: usize = 4096;
/// Most bytes of output that wait for the host. Beyond, the guest is told, and what it does then is no more repeatable.
const MOST_OUTPUT: usize = 16 << 20;
/// Longest request of a disk whose data are kept apart from the guest's memory while it is on its way.
const MOST_COPIED: u64 = 64 << 20;

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
                if !event.bytes.is_empty() {
                    lock(&self.waiting).push_back(event.bytes);
                }
            }
            drop(to_come);
            self.arm_next();
        }
        let note = |bytes: &[u8]| {
            if let Some(inputs) = self.inputs.upgrade() {
                inputs.journal().note(&self.id, now, bytes);
            }
        };
        let mut asked_for_nothing = true;
        loop {
            let Some(bytes) = lock(&self.waiting).pop_front() else { break };
            let taken = deliver(&bytes).min(bytes.len());
            if taken > 0 {
                asked_for_nothing = false;
                note(&bytes[..taken]);
            }
            if taken < bytes.len() {
                lock(&self.waiting).push_front(bytes[taken..].to_vec());
                break;
            }
        }
        if asked_for_nothing {
            note(&[]);
        }
    }
}

/// A character device.
pub struct Char {
    inner: Arc<dyn CharBackend>,
    line: Line,
    receiver: OnceLock<CharReceiver>,
    /// What happens besides data, a byte each.
    events: Line,
    event_listener: OnceLock<Box<dyn Fn(CharEvent) + Send + Sync>>,
    output: Mutex<Output>,
    writable_listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
    this: Weak<Char>,
}

/// What the device has sent and the host has not taken. The device knows nothing of it: a host that is slow now may be
/// quick when the run is repeated.
#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// The device has been told that there is no room.
    full: bool,
}

/// What happens to a character device besides data, as the journal has it.
const EVENTS: [(CharEvent, u8); 3] = [(CharEvent::Opened, 0), (CharEvent::Closed, 1), (CharEvent::Break, 2)];

impl Char {
    pub fn new(inner: Arc<dyn CharBackend>, line: Line, events: Line) -> Arc<Char> {
        let char = Arc::new_cyclic(|this: &Weak<Char>| {
            let weak = this.clone();
            line.timer.bind(move || {
                if let Some(char) = weak.upgrade()
                    && let Some(receiver) = char.receiver.get()
                {
                    char.line.fired(&|bytes| receiver(bytes));
                }
            });
            let weak = this.clone();
            events.timer.bind(move || {
                if let Some(char) = weak.upgrade()
                    && let Some(listener) = char.event_listener.get()
                {
                    char.events.fired(&|bytes| {
                        let known = bytes.iter().filter_map(|b| EVENTS.iter().find(|(_, code)| code == b));
                        known.for_each(|(event, _)| listener(*event));
                        bytes.len()
                    });
                }
            });
            Char {
                inner,
                line,
                receiver: OnceLock::new(),
                events,
                event_listener: OnceLock::new(),
                output: Mutex::default(),
                writable_listener: OnceLock::new(),
                this: this.clone(),
            }
        });
        let weak = Arc::downgrade(&char);
        char.inner.set_writable_listener(Box::new(move || {
            if let Some(char) = weak.upgrade() {
                char.writable();
            }
        }));
        char
    }

    /// Sends what waits, as much as the host takes.
    fn send(&self, output: &mut Output) {
        while !output.bytes.is_empty() {
            let taken = self.inner.write(output.bytes.as_slices().0);
            if taken == 0 {
                break;
            }
            output.bytes.drain(..taken.min(output.bytes.len()));
        }
    }

    /// The host takes more.
    fn writable(&self) {
        let mut output = lock(&self.output);
        self.send(&mut output);
        let tell = output.full && output.bytes.len() < MOST_OUTPUT;
        output.full &= !tell;
        drop(output);
        if let (true, Some(listener)) = (tell, self.writable_listener.get()) {
            listener();
        }
    }
}

impl CharBackend for Char {
    fn write(&self, data: &[u8]) -> usize {
        let mut output = lock(&self.output);
        self.send(&mut output);
        let sent = if output.bytes.is_empty() { self.inner.write(data).min(data.len()) } else { 0 };
        let room = MOST_OUTPUT.saturating_sub(output.bytes.len());
        let kept = room.min(data.len() - sent);
        output.bytes.extend(&data[sent..sent + kept]);
        if sent + kept < data.len() && !output.full {
            output.full = true;
            log::warn!(
                "{}: {} MiB of output wait for the host: from here on the run does not repeat exactly",
                self.inner.describe(),
                MOST_OUTPUT >> 20
            );
        }
        sent + kept
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
        let _ = self.writable_listener.set(listener);
    }
    fn has_connections(&self) -> bool {
        self.inner.has_connections()
    }
    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        let _ = self.event_listener.set(listener);
        let this = self.this.clone();
        self.inner.set_event_listener(Box::new(move |event| {
            if let Some(char) = this.upgrade()
                && let Some((_, code)) = EVENTS.iter().find(|(known, _)| *known == event)
            {
                char.events.came(&[*code]);
            }
        }));
    }
    fn flush(&self) {
        let mut output = lock(&self.output);
        loop {
            let before = output.bytes.len();
            self.send(&mut output);
            self.inner.flush();
            if output.bytes.is_empty() || output.bytes.len() == before {
                break;
            }
        }
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
    /// The guest's memory, of whose contents the request has a copy; and whether it is to get the copy's.
    ram: Option<(Vec<RamSlice>, bool)>,
    done: BlockCompletion,
}

impl Pending {
    /// Waits for the host and tells the device.
    fn complete(self) {
        let mut answer = lock(&self.answer.answer);
        let (result, mut buffer) = loop {
            match answer.take() {
                Some(came) => break came,
                None => answer = self.answer.came.wait(answer).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(answer);
        if let Some((slices, read)) = self.ram {
            if let (true, true, BlockBuffer::Owned(bytes)) = (read, result.is_ok(), &buffer) {
                scatter(bytes, &slices);
            }
            buffer = BlockBuffer::Ram(slices);
        }
        (self.done)(result, buffer);
    }
}

fn scatter(bytes: &[u8], slices: &[RamSlice]) {
    let mut rest = bytes;
    for slice in slices {
        let (piece, more) = rest.split_at(rest.len().min(usize::try_from(slice.len()).unwrap_or(usize::MAX)));
        rest = more;
        // A slice holds its own length.
        let _ = slice.write(0, piece);
    }
}

fn gather(slices: &[RamSlice]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in slices {
        let at = bytes.len();
        bytes.resize(at + usize::try_from(slice.len()).unwrap_or(0), 0);
        let _ = slice.read(0, &mut bytes[at..]);
    }
    bytes
}

/// Puts a copy in the place of guest memory: what the guest sees of a request, and the disk of the guest, does not
/// depend on when the host gets round to it.
fn keep_apart(request: &mut BlockRequest) -> Option<(Vec<RamSlice>, bool)> {
    let read = match request.op {
        BlockOp::Read => true,
        BlockOp::Write => false,
        _ => return None,
    };
    let len = request.buffer.len();
    if !matches!(request.buffer, BlockBuffer::Ram(_)) || len > MOST_COPIED {
        return None;
    }
    let BlockBuffer::Ram(slices) = std::mem::replace(&mut request.buffer, BlockBuffer::None) else { return None };
    let copy = if read { vec![0; usize::try_from(len).unwrap_or(0)] } else { gather(&slices) };
    request.buffer = BlockBuffer::Owned(copy);
    Some((slices, read))
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
    fn submit(&self, mut request: BlockRequest, done: BlockCompletion) {
        // No instruction is executed meanwhile: flash is read while its machine is being built.
        if self.timer.stands() {
            return self.inner.submit(request, done);
        }
        let ram = keep_apart(&mut request);
        let answer = Arc::<Answer>::default();
        let due = self.timer.now().saturating_add(DISK_TIME);
        let first = {
            let mut pending = lock(&self.pending);
            pending.push_back(Pending { due, answer: answer.clone(), ram, done });
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
