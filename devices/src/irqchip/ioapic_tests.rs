use super::*;
use crate::testing::{assert_round_trip, read32, reset, restore_with, write32};
use mimus_core::bus::MemTxResult;
use mimus_core::device::Lifecycle;

/// Remembers messages; takes none while `deaf`.
#[derive(Default)]
struct Apics {
    messages: Mutex<Vec<(u64, u32)>>,
    deaf: Mutex<bool>,
    /// An accelerator's, with these vectors requested or in service.
    held: Mutex<Option<Vec<u8>>>,
}

impl IrqController for Apics {
    fn set_input(&self, _: u32, _: bool) {}
    fn msi(&self, address: u64, data: u32, _: Requester) -> MemTxResult {
        if *lock(&self.deaf) {
            return MemTxResult::DecodeError;
        }
        lock(&self.messages).push((address, data));
        MemTxResult::Ok
    }
    fn holds(&self, vector: u8) -> Option<bool> {
        lock(&self.held).as_ref().map(|held| held.contains(&vector))
    }
}

struct Pc {
    apics: Arc<Apics>,
    ioapic: Arc<Mutex<IoApic>>,
    irqs: Arc<dyn IrqController>,
}

impl Pc {
    fn new() -> Self {
        let apics = Arc::new(Apics::default());
        let ioapic = IoApic::new(apics.clone());
        Pc { apics, irqs: IoApic::irqs(&ioapic), ioapic }
    }

    fn get(&self, index: u8) -> u32 {
        write32(&*self.ioapic, 0, SELECT, index.into());
        read32(&*self.ioapic, 0, WINDOW)
    }

    fn set(&self, index: u8, value: u32) {
        write32(&*self.ioapic, 0, SELECT, index.into());
        write32(&*self.ioapic, 0, WINDOW, value);
    }

    fn entry(&self, pin: u8) -> u64 {
        u64::from(self.get(0x11 + 2 * pin)) << 32 | u64::from(self.get(0x10 + 2 * pin))
    }

    fn set_entry(&self, pin: u8, entry: u64) {
        self.set(0x11 + 2 * pin, (entry >> 32) as u32);
        self.set(0x10 + 2 * pin, entry as u32);
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut *lock(&self.apics.messages))
    }

    fn eoi(&self, vector: u8) {
        lock(&self.ioapic).end_of_interrupt(vector);
    }
}

const LEVEL: u64 = REDIRECTION_LEVEL;
const REMOTE: u64 = REDIRECTION_REMOTE_IRR;
const MASKED: u64 = REDIRECTION_MASKED;

#[test]
fn registers() {
    let pc = Pc::new();
    assert_eq!((pc.get(0), pc.get(1), pc.get(2)), (0, 0x0017_0020, 0));
    pc.set(0, 0xffff_ffff);
    assert_eq!((pc.get(0), pc.get(2)), (0x0f00_0000, 0x0f00_0000));
    pc.set(1, 0);
    assert_eq!(pc.get(1), 0x0017_0020);
    assert_eq!(pc.entry(23), MASKED);
    pc.set_entry(5, u64::MAX);
    assert_eq!(pc.entry(5), 0xff00_0000_0001_afff, "status bits are read-only");
    pc.set(0x40, 5);
    assert_eq!(pc.get(0x40), 0);
    assert_eq!(read32(&*pc.ioapic, 0, SELECT), 0x40);
    assert_eq!(read32(&*pc.ioapic, 0, 0x20), 0);
    assert_eq!(pc.sent(), []);
}

#[test]
fn edges() {
    let pc = Pc::new();
    pc.irqs.set_input(4, true);
    pc.set_entry(4, 3 << 56 | 0x31);
    assert_eq!(pc.sent(), [], "an edge while masked is lost");
    pc.irqs.set_input(4, false);
    pc.irqs.set_input(4, true);
    assert_eq!(pc.sent(), [(0xfee0_3000, 0x4031)]);
    pc.irqs.set_input(4, true);
    assert_eq!(pc.sent(), [], "no edge");
    pc.irqs.set_input(4, false);
    pc.set_entry(4, 0xf << 56 | 1 << 11 | 1 << 8 | 0x32);
    pc.irqs.set_input(4, true);
    assert_eq!(pc.sent(), [(0xfee0_f004, 0x4132)], "logical, lowest priority");
    pc.irqs.set_input(24, true);
    pc.set_entry(6, LEVEL | 4 << 8 | 0x33);
    pc.irqs.set_input(6, true);
    assert_eq!(pc.sent(), [(0xfee0_0000, 0x4433)], "an NMI is an edge");
    assert_eq!(pc.entry(6) & REMOTE, 0);
}

#[test]
fn levels() {
    let pc = Pc::new();
    pc.irqs.set_input(16, true);
    assert_eq!(pc.sent(), []);
    pc.set_entry(16, LEVEL | 0x41);
    assert_eq!(pc.sent(), [(0xfee0_0000, 0xc041)], "asserted when unmasked");
    assert_eq!(pc.entry(16), LEVEL | REMOTE | 0x41);
    pc.irqs.set_input(16, false);
    pc.irqs.set_input(16, true);
    assert_eq!(pc.sent(), [], "in service");
    pc.eoi(0x42);
    assert_eq!(pc.sent(), []);
    pc.eoi(0x41);
    assert_eq!(pc.sent(), [(0xfee0_0000, 0xc041)], "asserted still");
    pc.irqs.set_input(16, false);
    write32(&*pc.ioapic, 0, EOI, 0x41);
    assert_eq!(pc.entry(16), LEVEL | 0x41);
    assert_eq!(pc.sent(), []);
    pc.irqs.set_input(16, true);
    pc.set_entry(16, LEVEL | MASKED | 0x41);
    pc.eoi(0x41);
    assert_eq!(pc.sent().len(), 1, "not while masked");
    pc.set_entry(16, LEVEL | 0x41);
    assert_eq!(pc.sent().len(), 1);
    pc.set_entry(16, MASKED | 0x41);
    assert_eq!(pc.entry(16), MASKED | 0x41, "edge-triggered entries have no remote IRR");
}

#[test]
fn two_inputs_with_one_vector() {
    let pc = Pc::new();
    for pin in [16, 17] {
        pc.set_entry(pin, LEVEL | 0x41);
        pc.irqs.set_input(pin.into(), true);
    }
    pc.irqs.set_input(16, false);
    pc.sent();
    pc.eoi(0x41);
    assert_eq!(pc.sent().len(), 1);
    assert_eq!((pc.entry(16) & REMOTE, pc.entry(17) & REMOTE), (0, REMOTE));
}

#[test]
fn nobody_accepts() {
    let pc = Pc::new();
    *lock(&pc.apics.deaf) = true;
    pc.set_entry(16, LEVEL | 0x41);
    pc.irqs.set_input(16, true);
    assert_eq!(pc.entry(16) & REMOTE, 0);
    *lock(&pc.apics.deaf) = false;
    pc.set_entry(16, LEVEL | 0x41);
    assert_eq!(pc.entry(16) & REMOTE, REMOTE);
    assert_eq!(pc.sent().len(), 1);
}

#[test]
fn the_listener_knows_the_routes() {
    let pc = Pc::new();
    let told = Arc::new(Mutex::new(vec![None; 24]));
    let t = told.clone();
    pc.set_entry(3, LEVEL | 1 << 56 | 0x33);
    lock(&pc.ioapic).set_route_listener(Box::new(move |pin, route| lock(&t)[pin as usize] = route));
    assert_eq!(lock(&told)[3], Some(Route { address: 0xfee0_1000, data: 0xc033 }));
    assert_eq!(lock(&told)[4], None);
    pc.set(0x16, 0x34);
    assert_eq!(lock(&told)[3].map(|r| r.data), Some(0x4034));
    pc.set_entry(3, MASKED);
    assert_eq!(lock(&told)[3], None);
    pc.set_entry(3, 0x35);
    reset(&*pc.ioapic);
    assert_eq!(lock(&told)[3], None);
}

#[test]
fn reset_saved_restored() {
    let pc = Pc::new();
    pc.set_entry(16, LEVEL | 0x41);
    pc.irqs.set_input(16, true);
    pc.set(0, 5 << 24);
    let other = Pc::new();
    assert_round_trip(&pc.ioapic, &other.ioapic);
    other.ioapic.start();
    assert_eq!(other.sent(), []);
    other.eoi(0x41);
    assert_eq!(other.sent().len(), 1);
    reset(&*other.ioapic);
    assert_eq!(other.entry(16), MASKED);
    other.set_entry(16, LEVEL | 0x41);
    assert_eq!(other.sent().len(), 1, "the line is the device's");
    assert!(restore_with(&other.ioapic, "/id", 16).is_err());
    assert!(restore_with(&other.ioapic, "/lines", 1 << 24).is_err());
    assert!(restore_with(&other.ioapic, "/redirection/0", 1 << 17).is_err());
    assert!(restore_with(&other.ioapic, "/redirection", vec![0; 23]).is_err());
    other.set_entry(2, 0x50);
    restore_with(&other.ioapic, "/edges", 1 << 2 | 1 << 3).unwrap();
    other.ioapic.start();
    assert_eq!(other.sent(), [(0xfee0_0000, 0x4050)]);
}

/// An end that an accelerator knows of and has not told is not lost when the machine is saved then.
#[test]
fn ends_not_told_yet_are_saved() {
    let pc = Pc::new();
    for (pin, vector) in [(9, 0x39), (10, 0x3a), (11, 0x3b)] {
        pc.set_entry(pin, LEVEL | vector);
        pc.irqs.set_input(pin.into(), true);
    }
    // 0x39 is in service still; 0x3a was ended and lowered, 0x3b ended with its level high.
    pc.irqs.set_input(10, false);
    *lock(&pc.apics.held) = Some(vec![0x39]);
    let saved = lock(&pc.ioapic).save_state();
    let remote =
        |state: &IoApicState| (0..IOAPIC_PINS).filter(|p| state.redirection[*p] & REMOTE != 0).collect::<Vec<_>>();
    assert_eq!(remote(&saved), [9]);
    assert_eq!(remote(&lock(&pc.ioapic).s), [9, 10, 11], "the end is told to this one yet");
    let other = Pc::new();
    lock(&other.ioapic).restore_state(saved).unwrap();
    assert_eq!(other.sent(), []);
    other.ioapic.start();
    assert_eq!(other.sent(), [(0xfee0_0000, 0xc03b)]);
    other.ioapic.start();
    other.eoi(0x39);
    assert_eq!(other.sent(), [(0xfee0_0000, 0xc039)]);
}
