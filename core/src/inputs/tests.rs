//! Inputs on a clock moved by hand.

use std::sync::{Condvar, OnceLock};

use super::*;
use crate::backend::block::{BlockBuffer, BlockCompletion, BlockOp, BlockRequest};
use crate::backend::char::CharReceiver;
use crate::clock::VirtualClock;

#[derive(Default)]
struct Keyboard(OnceLock<CharReceiver>);

impl CharBackend for Keyboard {
    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }
    fn set_receiver(&self, receiver: CharReceiver) {
        let _ = self.0.set(receiver);
    }
    fn input_ready(&self) {}
}

impl Keyboard {
    fn types(&self, text: &str) -> usize {
        self.0.get().map_or(0, |r| r(text.as_bytes()))
    }
}

/// When what was taken.
type Seen = Arc<Mutex<Vec<(u64, String)>>>;

struct Setup {
    clock: Arc<VirtualClock>,
    queue: Arc<TimerQueue>,
    inputs: Arc<Inputs>,
}

impl Setup {
    fn new() -> Setup {
        let clock = VirtualClock::new();
        let queue = TimerQueue::new(clock.clone(), || {});
        let inputs = Inputs::new(queue.clone());
        Setup { clock, queue, inputs }
    }

    /// A device that takes up to `most` bytes at once, and says when.
    fn device(&self, most: usize) -> (Arc<Keyboard>, Arc<dyn CharBackend>, Seen) {
        let (keyboard, seen) = (Arc::<Keyboard>::default(), Seen::default());
        let port = self.inputs.char("serial0", keyboard.clone());
        let (log, clock) = (seen.clone(), self.clock.clone());
        port.set_receiver(Box::new(move |bytes| {
            let n = bytes.len().min(most);
            log.lock().unwrap().push((clock.now(), String::from_utf8_lossy(&bytes[..n]).into_owned()));
            n
        }));
        (keyboard, port, seen)
    }
}

#[test]
fn what_is_typed_comes_at_its_time_and_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inputs");
    let first = Setup::new();
    first.inputs.record(&file, 7).unwrap();
    let (keyboard, port, seen) = first.device(3);
    first.clock.advance(100);
    assert_eq!(keyboard.types("hello"), 5);
    assert!(seen.lock().unwrap().is_empty(), "not on the thread that typed");
    first.clock.advance(20);
    first.queue.fire();
    // The device says that it has room, later.
    first.clock.advance(30);
    port.input_ready();
    first.clock.advance(1);
    first.queue.fire();
    let log = seen.lock().unwrap().clone();
    assert_eq!(log, [(120, "hel".to_owned()), (151, "lo".to_owned())]);
    first.inputs.finish().unwrap();

    let again = Setup::new();
    assert_eq!(again.inputs.replay(&file).unwrap(), 7);
    let (keyboard, _port, seen) = again.device(3);
    assert_eq!(keyboard.types("something else"), 14);
    for at in [119, 120, 151, 500] {
        let now = again.clock.now();
        again.clock.advance(at - now);
        again.queue.fire();
    }
    assert_eq!(*seen.lock().unwrap(), log);
}

#[test]
fn files_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inputs");
    let setup = Setup::new();
    let magic = "mimus-inputs 1 seed=7\n";
    for (text, says) in [
        (String::new(), "no record"),
        ("nonsense".to_owned(), "line 1"),
        (format!("{magic}5 char:a\n"), "line 2: it is not"),
        (format!("{magic}5 char:a 4\n"), "line 2"),
        (format!("{magic}5 char:a 4x\n"), "line 2"),
        (format!("{magic}5 char:a 41\n4 char:b 41\n4 char:a 41\n"), "line 4: it is earlier"),
    ] {
        std::fs::write(&file, &text).unwrap();
        let error = setup.inputs.replay(&file).unwrap_err().to_string();
        assert!(error.contains(says), "{text:?}: {error}");
    }
}

/// A disk that answers when it is told to.
#[derive(Default)]
struct Slow {
    waiting: Mutex<Vec<BlockCompletion>>,
    came: Condvar,
}

impl BlockBackend for Slow {
    fn submit(&self, _: BlockRequest, done: BlockCompletion) {
        self.waiting.lock().unwrap().push(done);
        self.came.notify_all();
    }
    fn capacity(&self) -> u64 {
        4096
    }
    fn read_only(&self) -> bool {
        false
    }
}

impl Slow {
    fn answer_all(&self) {
        let all = std::mem::take(&mut *self.waiting.lock().unwrap());
        all.into_iter().for_each(|done| done(Ok(()), BlockBuffer::None));
    }
}

#[test]
fn a_disk_takes_a_fixed_time() {
    let setup = Setup::new();
    let slow = Arc::<Slow>::default();
    let disk = setup.inputs.disk(slow.clone());
    let done = Arc::<Mutex<Vec<u64>>>::default();
    let submit = || {
        let (log, clock) = (done.clone(), setup.clock.clone());
        let note = move |result: Result<(), _>, _| {
            assert!(result.is_ok());
            log.lock().unwrap().push(clock.now());
        };
        disk.submit(BlockRequest::transfer(BlockOp::Read, 0, BlockBuffer::Owned(vec![0; 512])), Box::new(note));
    };
    // Time stands.
    submit();
    slow.answer_all();
    assert_eq!(done.lock().unwrap().split_off(0), [0]);
    setup.clock.advance(0);
    submit();
    setup.clock.advance(1000);
    submit();
    // The host is quick: the guest's time it is that counts.
    slow.answer_all();
    setup.clock.advance(DISK_TIME - 1001);
    setup.queue.fire();
    assert!(done.lock().unwrap().is_empty());
    setup.clock.advance(1);
    setup.queue.fire();
    setup.clock.advance(1000);
    setup.queue.fire();
    assert_eq!(*done.lock().unwrap(), [DISK_TIME, DISK_TIME + 1000]);
    // The host is slow: the guest waits.
    submit();
    setup.clock.advance(DISK_TIME);
    let host = slow.clone();
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        host.answer_all();
    });
    setup.queue.fire();
    assert_eq!(done.lock().unwrap().len(), 3);
    late.join().unwrap();
    // Time stands, and nothing may be in flight.
    submit();
    slow.answer_all();
    disk.drain();
    assert_eq!(done.lock().unwrap().len(), 4);
}
