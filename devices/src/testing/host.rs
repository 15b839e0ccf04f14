//! Host sides that do as a test says.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use mimus_core::backend::char::CharReceiver;
use mimus_core::backend::{
    BlockBackend, BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest, CharBackend, CharEvent,
};
use mimus_core::device::lock;

type EventListener = Box<dyn Fn(CharEvent) + Send + Sync>;

/// The other end of a serial line.
#[derive(Default)]
pub struct Terminal {
    sent: Mutex<Vec<u8>>,
    /// Bytes it still takes.
    room: AtomicUsize,
    receiver: Mutex<Option<CharReceiver>>,
    writable: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
    events: Mutex<Option<EventListener>>,
    ready: AtomicUsize,
}

impl Terminal {
    /// One that takes `room` bytes.
    pub fn new(room: usize) -> Arc<Self> {
        Arc::new(Self { room: AtomicUsize::new(room), ..Self::default() })
    }

    /// Types; returns how many bytes were taken.
    pub fn type_in(&self, data: &[u8]) -> usize {
        lock(&self.receiver).as_ref().expect("a device")(data)
    }

    pub fn event(&self, event: CharEvent) {
        lock(&self.events).as_ref().expect("a device")(event);
    }

    /// Takes `room` bytes more, and says so.
    pub fn give_room(&self, room: usize) {
        self.room.store(room, Ordering::SeqCst);
        lock(&self.writable).as_ref().expect("a device")();
    }

    /// What was sent since the last call.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.sent))
    }

    /// How often the device said that it takes input again, since the last call.
    pub fn take_ready(&self) -> usize {
        self.ready.swap(0, Ordering::SeqCst)
    }
}

impl CharBackend for Terminal {
    fn write(&self, data: &[u8]) -> usize {
        let n = data.len().min(self.room.load(Ordering::SeqCst));
        self.room.fetch_sub(n, Ordering::SeqCst);
        lock(&self.sent).extend(&data[..n]);
        n
    }
    fn set_receiver(&self, receiver: CharReceiver) {
        *lock(&self.receiver) = Some(receiver);
    }
    fn input_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        *lock(&self.writable) = Some(listener);
    }
    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        *lock(&self.events) = Some(listener);
    }
}

/// A disk in memory that finishes requests at once, or when told.
pub struct Disk {
    data: Mutex<Vec<u8>>,
    read_only: bool,
    waiting: Mutex<VecDeque<(BlockRequest, BlockCompletion)>>,
    slow: Mutex<bool>,
    failing: Mutex<bool>,
    log: Mutex<Vec<(BlockOp, u64, u64)>>,
}

impl Disk {
    pub fn new(data: Vec<u8>, read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(data),
            read_only,
            waiting: Mutex::default(),
            slow: Mutex::new(false),
            failing: Mutex::new(false),
            log: Mutex::default(),
        })
    }

    /// Requests wait for [`Disk::finish`].
    pub fn set_slow(&self, slow: bool) {
        *lock(&self.slow) = slow;
    }

    /// Requests fail.
    pub fn set_failing(&self, failing: bool) {
        *lock(&self.failing) = failing;
    }

    /// Finishes the oldest waiting request; false if there is none.
    pub fn finish(&self) -> bool {
        let Some((request, done)) = lock(&self.waiting).pop_front() else { return false };
        self.carry_out(request, done);
        true
    }

    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.data).clone()
    }

    /// Operation, first byte and length of each request since the last call.
    pub fn take_log(&self) -> Vec<(BlockOp, u64, u64)> {
        std::mem::take(&mut *lock(&self.log))
    }

    fn carry_out(&self, request: BlockRequest, done: BlockCompletion) {
        let result = if *lock(&self.failing) { Err(BlockError::NoSpace) } else { self.transfer(&request) };
        done(result, request.buffer);
    }

    fn transfer(&self, request: &BlockRequest) -> Result<(), BlockError> {
        let BlockBuffer::Ram(slices) = &request.buffer else { return Ok(()) };
        let mut data = lock(&self.data);
        let mut at = (request.sector * 512) as usize;
        for s in slices {
            let part = &mut data[at..at + s.len() as usize];
            match request.op {
                BlockOp::Read => assert!(s.write(0, part)),
                BlockOp::Write if self.read_only => return Err(BlockError::ReadOnly),
                BlockOp::Write => assert!(s.read(0, part)),
                _ => return Err(BlockError::Unsupported),
            }
            at += s.len() as usize;
        }
        Ok(())
    }
}

impl BlockBackend for Disk {
    fn submit(&self, request: BlockRequest, done: BlockCompletion) {
        lock(&self.log).push((request.op, request.sector * 512, request.len));
        if *lock(&self.slow) {
            lock(&self.waiting).push_back((request, done));
        } else {
            self.carry_out(request, done);
        }
    }
    fn capacity(&self) -> u64 {
        lock(&self.data).len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn describe(&self) -> String {
        "test image".into()
    }
}
