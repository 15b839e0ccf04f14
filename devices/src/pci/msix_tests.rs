use super::*;
use crate::testing::Rng;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::pci::Messages;
use crate::testing::state::go_on_alike;
use mimus_core::bus::AccessSize::{B1, B4, B8};
use mimus_core::bus::{MemTxResult, Requester};
use mimus_core::irq::MsiSink;
use std::sync::atomic::{AtomicBool, Ordering};

const ME: Requester = Requester::Device(0x18);
const ON: u16 = CONTROL_ENABLE;
const NONE: [u32; 0] = [];

struct Board {
    msix: Arc<Msix>,
    bus: OnBus,
    messages: Arc<Messages>,
    gate: DmaGate,
}

impl Board {
    /// MSI-X is off, each vector's address is 0x1000 and its own number times 4.
    fn new(vectors: u16) -> Self {
        let (messages, gate) = (Arc::new(Messages::default()), DmaGate::new(true));
        let msix = Msix::new(vectors, MsiTarget::to_sink(messages.clone(), ME), gate.clone());
        let bus = OnBus::new(&msix, AccessRules::sizes(B4, B8));
        let b = Self { msix, bus, messages, gate };
        for vector in 0..msix_vectors(&b) {
            b.set(vector * 16, 0x1000 + vector as u32 * 4);
            b.set(vector * 16 + 8, 0x100 + vector as u32);
        }
        b
    }

    fn get(&self, offset: u64) -> u32 {
        self.bus.read(offset, B4).unwrap() as u32
    }

    fn set(&self, offset: u64, value: u32) {
        self.bus.write(offset, B4, value.into()).unwrap();
    }

    fn mask(&self, vector: u64, masked: bool) {
        self.set(vector * 16 + 12, masked.into());
    }

    fn pending(&self) -> u32 {
        self.get(self.msix.pending_offset())
    }

    /// Numbers of the vectors whose messages were sent.
    fn sent(&self) -> Vec<u32> {
        let sent = self.messages.take();
        let number = |&(address, data, from): &(u64, u32, Requester)| {
            assert_eq!((address, from), (0x1000 + u64::from(data - 0x100) * 4, ME));
            data - 0x100
        };
        sent.iter().map(number).collect()
    }
}

fn msix_vectors(b: &Board) -> u64 {
    b.msix.vectors().into()
}

#[test]
fn table_registers() {
    let b = Board::new(3);
    b.msix.reset();
    for vector in 0..3 {
        let entry: Vec<u32> = (0..4).map(|i| b.get(vector * 16 + i * 4)).collect();
        assert_eq!(entry, [0, 0, 0, 1], "masked after a reset");
        (0..4).for_each(|i| b.set(vector * 16 + i * 4, !0));
        let entry: Vec<u32> = (0..4).map(|i| b.get(vector * 16 + i * 4)).collect();
        assert_eq!(entry, [!3, !0, !0, 1], "addresses are of whole words; 31 bits of control are reserved");
    }
    for hole in [48, 0x7fc, 0x804, 0xffc] {
        b.set(hole, !0);
        assert_eq!(b.get(hole), 0, "{hole:#x}");
    }
    b.bus.write(0, B8, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(b.bus.read(0, B8), Ok(0x1122_3344_5566_7788));
    assert_eq!((b.get(0), b.get(4)), (0x5566_7788, 0x1122_3344));
    b.bus.write(8, B8, 0x1_0000_0042).unwrap();
    assert_eq!((b.get(8), b.get(12)), (0x42, 1));
    assert!(b.bus.read(4, B8).is_err() && b.bus.read(2, B4).is_err());
    assert_eq!(b.bus.read(1, B1), Ok(0x77));
}

#[test]
fn sizes() {
    for (vectors, count, bar) in [(0, 1, 4096), (1, 1, 4096), (128, 128, 4096), (129, 129, 8192), (5000, 2048, 65536)] {
        let b = Board::new(vectors);
        assert_eq!((b.msix.vectors(), b.msix.bar_len(), b.msix.pending_offset()), (count, bar, bar / 2));
        assert!(u64::from(count) * 16 <= bar / 2 && u64::from(count).div_ceil(64) * 8 <= bar / 2);
        assert_eq!(b.msix.region("r").len(), bar);
    }
}

#[test]
fn nothing_while_off() {
    let b = Board::new(3);
    b.mask(0, false);
    b.msix.notify(0);
    assert_eq!((b.sent(), b.pending(), b.msix.is_enabled()), (vec![], 0, false));
    b.msix.set_control(ON);
    assert_eq!((b.sent(), b.msix.is_enabled()), (vec![], true));
    b.msix.notify(0);
    assert_eq!((b.sent(), b.pending()), (vec![0], 0));
    b.msix.notify(3);
    b.msix.notify(u16::MAX);
    assert_eq!(b.sent(), NONE, "no such vectors");
}

#[test]
fn a_masked_vector_is_pending() {
    let b = Board::new(3);
    b.msix.set_control(ON);
    b.mask(2, false);
    b.msix.notify(1);
    b.msix.notify(1);
    b.msix.notify(2);
    assert_eq!((b.sent(), b.pending()), (vec![2], 1 << 1));
    b.set(b.msix.pending_offset(), 0);
    assert_eq!(b.pending(), 1 << 1, "read-only");
    b.set(16, 0x1004);
    assert_eq!(b.sent(), NONE, "still masked");
    b.mask(1, false);
    assert_eq!((b.sent(), b.pending()), (vec![1], 0), "once, when it is unmasked");
    b.mask(1, true);
    b.mask(1, false);
    assert_eq!(b.sent(), NONE);
}

#[test]
fn the_function_is_masked() {
    let b = Board::new(3);
    (0..2).for_each(|v| b.mask(v, false));
    b.msix.set_control(ON | CONTROL_MASK_ALL);
    (0..3).for_each(|v| b.msix.notify(v));
    assert_eq!((b.sent(), b.pending()), (vec![], 7));
    b.mask(0, true);
    b.mask(0, false);
    assert_eq!(b.sent(), NONE, "both masks must be off");
    b.msix.set_control(ON);
    assert_eq!((b.sent(), b.pending()), (vec![0, 1], 1 << 2));
    // The message is what the table says when it goes out.
    b.set(2 * 16, 0x1000);
    b.set(2 * 16 + 8, 0x100);
    b.mask(2, false);
    assert_eq!(b.sent(), [0]);
}

#[test]
fn switched_off_while_pending() {
    let b = Board::new(2);
    b.msix.set_control(ON);
    b.msix.notify(0);
    b.msix.set_control(0);
    b.mask(0, false);
    assert_eq!(b.sent(), NONE, "off");
    b.msix.set_control(ON);
    assert_eq!((b.sent(), b.pending()), (vec![0], 0));
}

#[test]
fn messages_are_bus_master_writes() {
    let b = Board::new(1);
    b.msix.set_control(ON);
    b.mask(0, false);
    b.gate.set(false);
    b.msix.notify(0);
    assert_eq!(b.sent(), NONE);
    b.gate.set(true);
    b.msix.notify(0);
    assert_eq!(b.sent(), [0]);
}

#[test]
fn many_vectors() {
    let b = Board::new(100);
    b.msix.set_control(ON);
    (0..100).step_by(3).for_each(|v| b.msix.notify(v));
    let at = b.msix.pending_offset();
    let words: Vec<u32> = (0..5).map(|i| b.get(at + i * 4)).collect();
    let want: u128 = (0..100).step_by(3).fold(0, |w, v| w | 1 << v);
    assert_eq!(words, [want as u32, (want >> 32) as u32, (want >> 64) as u32, (want >> 96) as u32, 0]);
    assert_eq!(b.bus.read(at + 8, B8), Ok((want >> 64) as u64));
    (0..100).for_each(|v| b.mask(v, false));
    assert_eq!(b.sent(), (0..100).step_by(3).collect::<Vec<u32>>());
}

#[test]
fn saved_in_the_middle() {
    let b = Board::new(40);
    b.msix.set_control(ON);
    b.mask(3, false);
    [3, 4, 35].into_iter().for_each(|v| b.msix.notify(v));
    b.sent();
    let c = Board::new(40);
    c.msix.restore(b.msix.save(), ON).unwrap();
    assert_eq!((c.sent(), c.msix.save()), (vec![], b.msix.save()), "nothing is sent by restoring");
    c.mask(35, false);
    b.mask(35, false);
    assert_eq!((c.sent(), b.sent()), (vec![35], vec![35]));
    go_on_alike(&b, &c, 20_000, random_step);
    assert_eq!(b.msix.save(), c.msix.save());
    for vectors in [39, 41] {
        let other = Board::new(vectors);
        let before = other.msix.save();
        assert!(other.msix.restore(b.msix.save(), ON).is_err() && other.msix.save() == before);
    }
}

#[test]
fn states_that_cannot_be() {
    let b = Board::new(2);
    let refused = |why: &str, control, change: fn(&mut MsixState)| {
        let mut bad = b.msix.save();
        change(&mut bad);
        assert!(b.msix.restore(bad, control).unwrap_err().contains(why), "{why}");
    };
    refused("number", 0, |s| s.pending.truncate(1));
    refused("reserved", 0, |s| s.entries[1].control = 3);
    refused("reserved", 0, |s| s.entries[0].address = 2);
    refused("differ", ON, |_| {});
    refused("differ", ON, |s| (s.enabled, s.masked) = (true, true));
}

fn random_step(b: &Board, rng: &mut Rng) -> (u64, Vec<(u64, u32, Requester)>) {
    let range = if rng.below(2) == 0 { 64 } else { b.msix.bar_len() };
    let at = rng.below(range);
    let size = any_size(rng.next());
    let mut seen = 0;
    match rng.below(6) {
        0 => b.msix.notify(rng.below(50) as u16),
        1 => b.msix.set_control(rng.next() as u16 & 0xc000),
        2 => b.mask(rng.below(40), rng.below(2) == 0),
        3 => _ = b.bus.write(at & !7, size, rng.next()),
        _ => seen = b.bus.read(at, size).unwrap_or(!0),
    }
    (seen, b.messages.take())
}

#[test]
fn random_accesses() {
    let b = Board::new(40);
    let mut rng = Rng(23);
    (0..50_000).for_each(|_| _ = random_step(&b, &mut rng));
    b.msix.reset();
    assert_eq!(b.msix.save(), MsixState::new(40));
}

/// A controller with ways of their own for messages.
#[derive(Default)]
struct Routes {
    log: Mutex<Vec<String>>,
    refuse: AtomicBool,
}

struct OneWay(Arc<Routes>);

impl Routes {
    fn say(&self, text: String) {
        lock(&self.log).push(text);
    }

    fn said(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.log))
    }
}

struct RouteSink(Arc<Routes>);

impl MsiSink for RouteSink {
    fn deliver(&self, address: u64, data: u32, _requester: Requester) -> MemTxResult {
        self.0.say(format!("send {address:x} {data:x}"));
        MemTxResult::Ok
    }
    fn route(&self) -> Option<Arc<dyn MsiRoute>> {
        Some(Arc::new(OneWay(self.0.clone())))
    }
}

impl MsiRoute for OneWay {
    fn connect(&self, address: u64, data: u32) -> bool {
        self.0.say(format!("connect {address:x} {data:x}"));
        !self.0.refuse.load(Ordering::Relaxed)
    }
    fn disconnect(&self) {
        self.0.say("disconnect".to_owned());
    }
    fn signal(&self) {
        self.0.say("signal".to_owned());
    }
}

/// A vector has its own way while the machine runs and it may send; the way follows its message.
#[test]
fn ways_of_their_own() {
    let routes = Arc::new(Routes::default());
    let (msix, gate) = {
        let gate = DmaGate::new(true);
        (Msix::new(2, MsiTarget::to_sink(Arc::new(RouteSink(routes.clone())), ME), gate.clone()), gate)
    };
    let bus = OnBus::new(&msix, AccessRules::sizes(B4, B8));
    let set = |at: u64, value: u32| bus.write(at, B4, value.into()).unwrap();
    set(0, 0x1000);
    set(8, 0x41);
    msix.set_control(ON);
    set(12, 0);
    msix.notify(0);
    assert_eq!(routes.said(), ["send 1000 41"], "the machine stands");
    msix.start();
    msix.notify(0);
    msix.notify(1);
    assert_eq!(routes.said(), ["connect 1000 41", "signal"], "vector 1 is masked");
    // Masked, it is pending; the way stays, and is changed only when it may be used again.
    set(12, 1);
    set(8, 0x42);
    msix.notify(0);
    assert_eq!(routes.said(), NONE_SAID);
    set(12, 0);
    assert_eq!(routes.said(), ["connect 1000 42", "signal"]);
    set(12, 1);
    set(12, 0);
    assert_eq!(routes.said(), NONE_SAID, "nothing changed");
    // Bus mastering counts for both ways.
    gate.set(false);
    msix.notify(0);
    gate.set(true);
    assert_eq!(routes.said(), NONE_SAID);
    // Stopped: what is sent goes straight to the controller.
    msix.stop();
    msix.notify(0);
    msix.start();
    msix.notify(0);
    assert_eq!(routes.said(), ["disconnect", "send 1000 42", "connect 1000 42", "signal"]);
    // A restored table has other messages.
    let saved = msix.save();
    set(8, 0x43);
    msix.restore(saved, ON).unwrap();
    assert_eq!(routes.said(), ["connect 1000 43", "disconnect", "connect 1000 42"]);
    msix.set_control(0);
    msix.reset();
    assert_eq!(routes.said(), ["disconnect"]);
    // One that cannot be connected is sent, and not tried each time.
    routes.refuse.store(true, Ordering::Relaxed);
    set(0, 0x2000);
    msix.set_control(ON);
    set(12, 0);
    msix.notify(0);
    msix.notify(0);
    assert_eq!(routes.said(), ["connect 2000 0", "send 2000 0", "send 2000 0"]);
}

const NONE_SAID: [&str; 0] = [];
