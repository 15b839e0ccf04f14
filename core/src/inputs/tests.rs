//! Inputs on a clock moved by hand.

use std::sync::{Condvar, OnceLock};

use super::*;
use crate::backend::block::{BlockBuffer, BlockCompletion, BlockOp, BlockRequest};
use crate::backend::char::{CharEvent, CharReceiver};
use crate::clock::VirtualClock;
use crate::memory::{GuestRam, RamBacking, RamSlice};

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
fn a_device_that_takes_nothing_is_asked_again_at_the_same_time() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inputs");
    let first = Setup::new();
    first.inputs.record(&file, 7).unwrap();
    let (keyboard, port, seen) = first.device(0);
    first.clock.advance(100);
    keyboard.types("x");
    first.queue.fire();
    first.clock.advance(50);
    port.input_ready();
    first.queue.fire();
    assert_eq!(seen.lock().unwrap().len(), 2);
    first.inputs.finish().unwrap();
    let noted = std::fs::read_to_string(&file).unwrap();
    assert_eq!(noted, "mimus-inputs 1 seed=7\n100 char:serial0 -\n150 char:serial0 -\n");

    let again = Setup::new();
    again.inputs.replay(&file).unwrap();
    let (_keyboard, _port, seen) = again.device(3);
    let mut times = Vec::new();
    while let Some(at) = again.queue.first_deadline() {
        again.clock.advance(at - again.clock.now());
        assert!(again.queue.fire());
        times.push(at);
    }
    assert_eq!(times, [100, 150]);
    assert!(seen.lock().unwrap().is_empty());
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

/// A terminal that takes what it is told to.
#[derive(Default)]
struct Terminal {
    room: Mutex<usize>,
    shown: Mutex<String>,
    writable: OnceLock<Box<dyn Fn() + Send + Sync>>,
    events: OnceLock<Box<dyn Fn(CharEvent) + Send + Sync>>,
}

impl CharBackend for Terminal {
    fn write(&self, data: &[u8]) -> usize {
        let mut room = self.room.lock().unwrap();
        let n = data.len().min(*room);
        *room -= n;
        self.shown.lock().unwrap().push_str(std::str::from_utf8(&data[..n]).unwrap());
        n
    }
    fn set_receiver(&self, _: CharReceiver) {}
    fn input_ready(&self) {}
    fn set_writable_listener(&self, listener: Box<dyn Fn() + Send + Sync>) {
        let _ = self.writable.set(listener);
    }
    fn set_event_listener(&self, listener: Box<dyn Fn(CharEvent) + Send + Sync>) {
        let _ = self.events.set(listener);
    }
}

impl Terminal {
    fn has_room(&self, n: usize) {
        *self.room.lock().unwrap() = n;
        self.writable.get().unwrap()();
    }
    fn shows(&self, text: &str) -> bool {
        *self.shown.lock().unwrap() == text
    }
}

#[test]
fn a_slow_terminal_is_kept_from_the_guest() {
    let setup = Setup::new();
    let terminal = Arc::<Terminal>::default();
    let port = setup.inputs.char("serial0", terminal.clone());
    let told = Arc::<Mutex<u32>>::default();
    let count = told.clone();
    port.set_writable_listener(Box::new(move || *count.lock().unwrap() += 1));
    assert_eq!(port.write(b"one "), 4);
    assert!(terminal.shows(""));
    terminal.has_room(2);
    assert!(terminal.shows("on"));
    assert_eq!(port.write(b"two "), 4);
    terminal.has_room(3);
    assert!(terminal.shows("one t"));
    terminal.has_room(100);
    assert_eq!(port.write(b"three"), 5);
    assert!(terminal.shows("one two three"));
    assert_eq!(*told.lock().unwrap(), 0, "it was never refused");
    // Without bound it is not.
    *terminal.room.lock().unwrap() = 0;
    let much = vec![b'x'; 1 << 20];
    let taken: usize = (0..20).map(|_| port.write(&much)).sum();
    assert_eq!(taken, 16 << 20);
    terminal.has_room(1);
    assert_eq!(*told.lock().unwrap(), 1);
    assert_eq!(port.write(b"yz"), 1);
}

#[test]
fn a_break_comes_at_its_time_and_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inputs");
    let run = |setup: &Setup, breaks: bool| {
        let terminal = Arc::<Terminal>::default();
        let port = setup.inputs.char("serial0", terminal.clone());
        let seen = Arc::<Mutex<Vec<(u64, CharEvent)>>>::default();
        let (log, clock) = (seen.clone(), setup.clock.clone());
        port.set_event_listener(Box::new(move |event| log.lock().unwrap().push((clock.now(), event))));
        setup.clock.advance(100);
        if breaks {
            terminal.events.get().unwrap()(CharEvent::Break);
        }
        assert!(seen.lock().unwrap().is_empty());
        setup.clock.advance(20);
        setup.queue.fire();
        seen.lock().unwrap().clone()
    };
    let first = Setup::new();
    first.inputs.record(&file, 7).unwrap();
    assert_eq!(run(&first, true), [(120, CharEvent::Break)]);
    first.inputs.finish().unwrap();
    let again = Setup::new();
    again.inputs.replay(&file).unwrap();
    assert_eq!(run(&again, false), [(120, CharEvent::Break)]);
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

/// A disk whose contents are one sector, and which does what it is asked when it is told to.
#[derive(Default)]
struct Sector {
    bytes: Mutex<Vec<u8>>,
    waiting: Mutex<Vec<(BlockRequest, BlockCompletion)>>,
}

impl BlockBackend for Sector {
    fn submit(&self, request: BlockRequest, done: BlockCompletion) {
        self.waiting.lock().unwrap().push((request, done));
    }
    fn capacity(&self) -> u64 {
        512
    }
    fn read_only(&self) -> bool {
        false
    }
}

impl Sector {
    fn work(&self) {
        for (mut request, done) in self.waiting.lock().unwrap().drain(..) {
            let mut disk = self.bytes.lock().unwrap();
            match (&mut request.buffer, request.op) {
                (BlockBuffer::Owned(to), BlockOp::Read) => to.copy_from_slice(&disk),
                (BlockBuffer::Owned(from), BlockOp::Write) => disk.clone_from(from),
                other => panic!("{other:?}"),
            }
            drop(disk);
            done(Ok(()), request.buffer);
        }
    }
}

#[test]
fn data_of_a_disk_move_when_requests_begin_and_end() {
    let setup = Setup::new();
    let sector = Arc::<Sector>::default();
    let disk = setup.inputs.disk(sector.clone());
    let all = GuestRam::new();
    let ram = all.add_block("ram", 0x2000, RamBacking::Private).unwrap();
    let slices = || vec![RamSlice::new(ram.clone(), 0x1000, 500).unwrap(), RamSlice::new(ram.clone(), 0, 12).unwrap()];
    let submit = |op| {
        let done = |result: Result<(), _>, buffer| {
            assert!(result.is_ok() && matches!(&buffer, BlockBuffer::Ram(slices) if slices.len() == 2));
        };
        disk.submit(BlockRequest::transfer(op, 0, BlockBuffer::Ram(slices())), Box::new(done));
    };
    let end = || {
        setup.clock.advance(DISK_TIME);
        setup.queue.fire();
    };
    setup.clock.advance(0);
    assert!(ram.fill(0, 0x2000, 7));
    submit(BlockOp::Write);
    // The guest changes its mind too late, however slow the host is.
    assert!(ram.fill(0, 0x2000, 8));
    sector.work();
    end();
    assert_eq!(*sector.bytes.lock().unwrap(), vec![7; 512]);
    submit(BlockOp::Read);
    sector.work();
    let byte = |at| {
        let mut byte = [0];
        assert!(ram.read(at, &mut byte));
        byte[0]
    };
    assert_eq!([byte(0x1000), byte(0)], [8, 8], "the host is quicker than the guest may see");
    end();
    assert_eq!([byte(0x1000), byte(0x11f3), byte(0), byte(11), byte(12), byte(0x11f4)], [7, 7, 7, 7, 8, 8]);
}
