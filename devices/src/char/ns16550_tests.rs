use super::*;
use crate::testing::host::Terminal;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::state::{go_on_alike, restore_damaged};
use crate::testing::{Levels, Rng, assert_round_trip, inb, mmio, outb, read32, reset, restore_with, saved};
use mimus_core::device::{Lifecycle, MmioDevice, lock};

const RBR: u64 = 0;
const THR: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

struct Port {
    uart: Arc<Mutex<Ns16550>>,
    host: Arc<Terminal>,
    levels: Arc<Levels>,
}

impl Port {
    fn new() -> Self {
        Self::with_room(1 << 20)
    }

    fn with_room(room: usize) -> Self {
        let (host, levels) = (Terminal::new(room), Levels::new());
        let uart = Ns16550::new(levels.line(0), Some(host.clone()));
        Self { uart, host, levels }
    }

    fn with_fifos(room: usize, fcr: u8) -> Self {
        let p = Self::with_room(room);
        p.set(FCR, fcr);
        p
    }

    fn get(&self, register: u64) -> u8 {
        self.uart.mmio_read(mmio(0, register, AccessSize::B1)).unwrap() as u8
    }

    fn set(&self, register: u64, value: u8) {
        self.uart.mmio_write(mmio(0, register, AccessSize::B1), value.into()).unwrap();
    }

    fn irq(&self) -> bool {
        lock(&self.uart).irq.level()
    }

    fn read_all(&self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.get(LSR) & LSR_DATA != 0 {
            out.push(self.get(RBR));
        }
        out
    }
}

#[test]
fn reset_values() {
    // Table 2 ("UART reset functions"): all of IER, FCR, LCR, MCR is 0, IIR 1, LSR 0x60, MSR xxxx0000.
    let p = Port::new();
    let check = |p: &Port| {
        let values: Vec<u8> = [IER, IIR, LCR, MCR, LSR, MSR].iter().map(|&r| p.get(r)).collect();
        assert_eq!(values, [0, 1, 0, 0, 0x60, 0xb0]);
        assert!(!p.irq());
    };
    check(&p);
    p.set(FCR, 0xc1);
    p.set(IER, 0xf);
    p.set(MCR, 0xf);
    p.set(SCR, 0x77);
    p.host.type_in(b"x");
    assert!(p.irq());
    reset(&*p.uart);
    check(&p);
    assert!(p.host.take_ready() > 0, "input that waits is asked for");
    p.set(THR, b'a');
    assert_eq!(p.host.take(), b"a");
}

#[test]
fn reset_in_phases() {
    let p = Port::with_fifos(0, 1);
    p.set(IER, 1);
    p.host.type_in(b"ab");
    p.set(THR, b'1');
    p.levels.take();
    p.host.take_ready();
    p.uart.reset(ResetPhase::Enter);
    assert_eq!(p.levels.take(), [], "no call out yet");
    p.uart.reset(ResetPhase::Hold);
    assert_eq!(p.levels.take(), [(0, false)]);
    assert_eq!(p.host.take_ready(), 0);
    p.uart.reset(ResetPhase::Exit);
    assert_eq!(p.host.take_ready(), 1);
    // What was written before is still on its way.
    p.host.give_room(10);
    assert_eq!(p.host.take(), b"1");
}

#[test]
fn writable_bits() {
    let p = Port::new();
    for (register, mask) in [(IER, 0x0f), (LCR, 0xff), (MCR, 0x1f), (SCR, 0xff)] {
        for value in [0xff, 0xaa, 0x55, 0] {
            p.set(register, value & if register == LCR { 0x7f } else { 0xff });
            let want = value & mask & if register == LCR { 0x7f } else { 0xff };
            assert_eq!(p.get(register), want, "register {register}");
        }
    }
    p.set(LSR, 0);
    p.set(MSR, 0xff);
    assert_eq!(p.get(LSR), 0x60, "read-only");
    p.get(MSR);
    assert_eq!(p.get(MSR), 0xb0);
}

#[test]
fn divisor_latch() {
    let p = Port::new();
    p.set(IER, 5);
    p.set(LCR, 0x83);
    p.set(0, 0x34);
    p.set(1, 0x12);
    assert_eq!((p.get(0), p.get(1)), (0x34, 0x12));
    assert_eq!(p.host.take(), b"", "nothing was sent");
    p.set(LCR, 3);
    assert_eq!(p.get(IER), 5);
    p.host.type_in(b"z");
    assert_eq!(p.get(RBR), b'z');
    p.set(LCR, 0x83);
    assert_eq!((p.get(0), p.get(1)), (0x34, 0x12), "data do not touch it");
    assert_eq!(p.get(IIR), 1, "the other registers are there with DLAB, too");
    p.set(SCR, 9);
    assert_eq!(p.get(SCR), 9);
}

#[test]
fn character_mode() {
    let p = Port::new();
    assert_eq!(p.host.type_in(b"abc"), 1, "a holding register of one byte");
    assert_eq!(p.host.type_in(b"bc"), 0);
    assert_eq!(p.get(LSR), 0x61);
    p.host.take_ready();
    assert_eq!(p.get(RBR), b'a');
    assert_eq!(p.host.take_ready(), 1, "there is room again");
    assert_eq!((p.get(LSR), p.get(RBR)), (0x60, 0), "empty");
    // Section 8.5: without bit 0 the other bits of FCR are not programmed.
    p.host.type_in(b"b");
    p.set(FCR, 0xce);
    assert_eq!((p.get(IIR), p.get(RBR)), (1, b'b'));
}

#[test]
fn fifo_mode() {
    let p = Port::with_fifos(100, 1);
    assert_eq!(p.get(IIR), 0xc1);
    assert_eq!(p.host.type_in(b"0123456789abcdefgh"), 16);
    p.host.take_ready();
    p.get(RBR);
    assert_eq!(p.host.take_ready(), 1);
    assert_eq!(p.host.type_in(b"gh"), 1);
    assert_eq!(p.read_all(), b"123456789abcdefg");
    p.host.type_in(b"xy");
    p.set(FCR, 1 | 2);
    assert_eq!(p.get(LSR), 0x60, "cleared");
    p.host.type_in(b"xy");
    p.set(FCR, 1 | 4);
    assert_eq!(p.read_all(), b"xy", "the other FIFO was cleared");
    p.host.type_in(b"xy");
    p.set(FCR, 0);
    assert_eq!((p.get(LSR), p.get(IIR)), (0x60, 1), "changing modes clears the FIFOs");
    // The clear bits clear themselves.
    p.set(FCR, 1 | 2);
    p.host.type_in(b"k");
    p.set(FCR, 1);
    assert_eq!(p.read_all(), b"k");
}

#[test]
fn receive_interrupt_at_the_trigger_level() {
    for (bits, trigger) in [(0u8, 1), (1, 4), (2, 8), (3, 14)] {
        let p = Port::with_fifos(0, bits << 6 | 1);
        p.set(IER, 1);
        assert!(!p.irq());
        for n in 1..=16 {
            p.host.type_in(b"x");
            // Below the trigger level it is the timeout that speaks.
            assert_eq!(p.get(IIR), if n >= trigger { 0xc4 } else { 0xcc }, "{n} bytes of {trigger}");
            assert!(p.irq());
        }
        for n in (0..16).rev() {
            p.get(RBR);
            let want = if n >= trigger { 0xc4 } else { 0xcc };
            assert_eq!(p.get(IIR), if n == 0 { 0xc1 } else { want }, "{n} bytes left of {trigger}");
            assert_eq!(p.irq(), n != 0);
        }
    }
    let p = Port::new();
    p.host.type_in(b"x");
    assert!(!p.irq(), "not enabled");
    p.set(IER, 1);
    assert_eq!((p.irq(), p.get(IIR)), (true, 4));
    p.get(RBR);
    assert!(!p.irq());
}

#[test]
fn transmitter_interrupt() {
    let p = Port::with_room(0);
    p.levels.take();
    // Enabled while the register is empty: at once. Reading IIR ends it, as it is the cause.
    p.set(IER, 2);
    assert_eq!(p.levels.take(), [(0, true)]);
    assert_eq!(p.get(IIR), 2);
    assert_eq!(p.levels.take(), [(0, false)]);
    assert_eq!(p.get(IIR), 1);
    // Enabled again without having been disabled: not news.
    p.set(IER, 2);
    assert!(!p.irq());
    p.set(IER, 0);
    p.set(IER, 2);
    assert!(p.irq());
    // A byte is written: not empty until the host takes it.
    p.set(THR, b'a');
    assert_eq!((p.irq(), p.get(LSR)), (false, 0));
    p.host.give_room(100);
    assert_eq!((p.irq(), p.get(LSR), p.get(IIR)), (true, 0x60, 2));
    p.levels.take();
    // A byte that goes out at once: an edge for edge-triggered inputs.
    p.set(THR, b'b');
    assert_eq!(p.levels.take(), [(0, true)]);
    p.set(THR, b'c');
    assert_eq!(p.levels.take(), [(0, false), (0, true)]);
    assert_eq!(p.host.take(), b"abc");
    // Reading IIR for another cause leaves it.
    p.set(IER, 3);
    p.host.type_in(b"x");
    assert_eq!((p.get(IIR), p.get(IIR)), (4, 4));
    p.get(RBR);
    assert_eq!((p.get(IIR), p.get(IIR)), (2, 1));
}

#[test]
fn a_full_host_keeps_bytes_back() {
    let p = Port::with_fifos(3, 1);
    for b in b'a'..=b'z' {
        p.set(THR, b);
    }
    assert_eq!((p.host.take(), p.get(LSR)), (b"abc".to_vec(), 0));
    p.host.give_room(2);
    assert_eq!((p.host.take(), p.get(LSR)), (b"de".to_vec(), 0));
    p.set(FCR, 1 | 4);
    p.host.give_room(1000);
    assert_eq!((p.host.take(), p.get(LSR)), (b"fghijklmnopqrstuvwxyz".to_vec(), 0x60));
    // A guest that does not look at LSR loses bytes; memory stays bounded.
    p.host.give_room(0);
    (0..1000).for_each(|i| p.set(THR, i as u8));
    assert_eq!(lock(&p.uart).s.tx.len(), TX_BACKLOG);
    p.host.give_room(1000);
    assert_eq!(p.host.take().len(), TX_BACKLOG);
    assert_eq!(p.get(LSR), 0x60);
}

#[test]
fn nothing_connected() {
    let levels = Levels::new();
    let uart = Ns16550::new(levels.line(0), None);
    let bus = OnBus::new(&uart, RULES);
    for _ in 0..100 {
        bus.write(THR, AccessSize::B1, 0x41).unwrap();
        assert_eq!(bus.read(LSR, AccessSize::B1), Ok(0x60));
    }
    uart.start();
}

#[test]
fn line_status_interrupt() {
    let p = Port::with_fifos(0, 1);
    p.set(IER, 4);
    p.host.type_in(b"a");
    p.host.event(CharEvent::Break);
    p.host.type_in(b"b");
    assert_eq!((p.irq(), p.get(LSR)), (false, 0xe1), "a break waits behind the byte: only bit 7 tells");
    p.get(RBR);
    assert_eq!((p.irq(), p.get(IIR)), (true, 0xc6), "section 8.4: it speaks at the top of the FIFO");
    assert_eq!(p.get(LSR), 0xf1);
    assert_eq!((p.irq(), p.get(LSR), p.get(IIR)), (false, 0x61, 0xc1), "reading LSR ends it");
    assert_eq!((p.get(RBR), p.get(RBR)), (0, b'b'), "one zero for the break");
    // Without FIFOs bit 7 is 0.
    p.set(FCR, 0);
    p.host.event(CharEvent::Break);
    assert_eq!(p.get(LSR), 0x71);
    p.host.event(CharEvent::Opened);
    p.host.event(CharEvent::Closed);
    assert_eq!(p.get(LSR), 0x61);
}

#[test]
fn overrun() {
    let p = Port::with_fifos(0, 1);
    p.set(IER, 4);
    p.host.type_in(b"0123456789abcdef");
    p.host.event(CharEvent::Break);
    assert_eq!((p.irq(), p.get(IIR)), (true, 0xc6));
    // Bit 1 is reset by reading LSR, not by emptying the FIFO (section 8.4).
    p.set(FCR, 1 | 2);
    assert_eq!((p.irq(), p.get(LSR)), (true, 0x62));
    assert_eq!((p.irq(), p.get(LSR)), (false, 0x60));
}

#[test]
fn priorities() {
    let p = Port::with_fifos(1000, 1 | 1 << 6);
    p.set(IER, 0xf);
    p.set(MCR, 0x10);
    p.set(MCR, 0);
    p.host.event(CharEvent::Break);
    p.host.type_in(b"abcd");
    p.set(THR, b'x');
    assert_eq!(p.get(IIR), 0xc6, "line status");
    p.get(LSR);
    assert_eq!(p.get(IIR), 0xc4, "data");
    p.get(RBR);
    p.get(RBR);
    assert_eq!(p.get(IIR), 0xcc, "timeout");
    p.read_all();
    assert_eq!(p.get(IIR), 0xc2, "transmitter");
    assert_eq!(p.get(IIR), 0xc0, "modem status");
    assert!(p.irq());
    p.get(MSR);
    assert_eq!((p.get(IIR), p.irq()), (0xc1, false));
}

#[test]
fn loopback_of_data() {
    let p = Port::with_fifos(100, 1);
    p.set(MCR, 0x10);
    p.set(IER, 3);
    p.get(IIR);
    p.set(THR, 0x5a);
    assert_eq!(p.get(IIR), 0xc4, "interrupts work in loopback");
    assert_eq!((p.get(LSR), p.get(RBR)), (0x61, 0x5a));
    assert_eq!(p.host.take(), b"", "nothing goes out");
    assert_eq!(p.host.type_in(b"x"), 0, "and nothing comes in");
    p.host.event(CharEvent::Break);
    assert_eq!(p.get(LSR), 0x60);
    (0..17).for_each(|i| p.set(THR, i));
    assert_eq!(p.get(LSR), 0x63, "overrun");
    assert_eq!(p.read_all(), (0..16).collect::<Vec<u8>>());
    p.host.take_ready();
    p.set(MCR, 0);
    assert_eq!(p.host.take_ready(), 1, "input may come again");
}

#[test]
fn loopback_of_modem_lines() {
    let p = Port::new();
    assert_eq!(p.get(MSR), 0xb0, "CTS, DSR and DCD");
    p.set(MCR, 0x10);
    assert_eq!(p.get(MSR), 0x0b, "all three changed");
    // Section 8.7: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    for (out, status, delta) in [(1, 0x20, 2), (2, 0x10, 1), (8, 0x80, 8)] {
        p.set(MCR, 0x10 | out);
        assert_eq!((p.get(MSR), p.get(MSR)), (status | delta, status));
        p.set(MCR, 0x10);
        assert_eq!((p.get(MSR), p.get(MSR)), (delta, 0));
    }
    p.set(MCR, 0x14);
    assert_eq!(p.get(MSR), 0x40, "the ring indicator reports its end only");
    p.set(MCR, 0x10);
    assert_eq!((p.get(MSR), p.get(MSR)), (4, 0));
    p.set(IER, 8);
    assert!(!p.irq());
    p.set(MCR, 0x11);
    assert_eq!((p.irq(), p.get(IIR)), (true, 0));
    p.get(MSR);
    assert_eq!((p.irq(), p.get(IIR)), (false, 1));
}

#[test]
fn access_widths() {
    let p = Port::new();
    let bus = OnBus::new(&p.uart, RULES);
    bus.write(LCR, AccessSize::B1, 3).unwrap();
    bus.write(SCR, AccessSize::B1, 0x5a).unwrap();
    // Wider accesses are bytes, lowest address first.
    assert_eq!(bus.read(4, AccessSize::B4), Ok(0x5ab0_6000));
    assert_eq!(bus.read(0, AccessSize::B8), Ok(0x5ab0_6000_0301_0000));
    bus.write(SCR - 1, AccessSize::B2, 0x1234).unwrap();
    assert_eq!(p.get(SCR), 0x12);
    assert!(bus.read(1, AccessSize::B2).is_err());
}

#[test]
fn saved_in_the_middle() {
    let p = Port::with_fifos(0, 0x41);
    p.set(IER, 0xf);
    p.set(LCR, 0x1b);
    p.set(MCR, 0x0b);
    p.set(SCR, 0x42);
    p.host.type_in(b"abc");
    p.host.event(CharEvent::Break);
    p.host.type_in(b"d");
    p.set(THR, b'1');
    p.set(THR, b'2');
    let q = Port::with_room(1);
    assert_round_trip(&p.uart, &q.uart);
    assert_eq!(q.levels.take(), [], "the controller restores its own inputs");
    assert!(q.irq());
    q.uart.start();
    assert_eq!((q.host.take(), q.host.take_ready()), (b"1".to_vec(), 1), "goes on when the machine starts");
    p.host.give_room(1);
    assert_eq!(p.host.take(), b"1");
    go_on_alike(&p, &q, 5000, random_step);
    assert_eq!(saved(&p.uart), saved(&q.uart));
}

fn random_step(p: &Port, rng: &mut Rng) -> (u64, bool, Vec<u8>) {
    let register = rng.below(8);
    let value = rng.next();
    let seen = match rng.below(12) {
        0 => p.host.type_in(&value.to_le_bytes()) as u64,
        1 => {
            p.host.event(CharEvent::Break);
            0
        }
        2 => {
            p.host.give_room(rng.below(30) as usize);
            0
        }
        3..7 => {
            p.set(register, value as u8);
            0
        }
        _ => p.get(register).into(),
    };
    (seen, p.irq(), p.host.take())
}

#[test]
fn damaged_states() {
    let p = Port::with_fifos(5, 1);
    p.host.type_in(b"abcdef");
    (0..20).for_each(|i| p.set(THR, i));
    for (field, value) in
        [("/ier", 0x10), ("/fcr", 2), ("/mcr", 0x20), ("/msr", 0x10), ("/rx/0", 0x101), ("/rx/1", 0x200)]
    {
        assert!(restore_with(&p.uart, field, value).is_err(), "{field}");
    }
    assert!(restore_with(&p.uart, "/rx", vec![0u16; 17]).is_err());
    assert!(restore_with(&p.uart, "/tx", vec![0u8; TX_BACKLOG + 1]).is_err());
    restore_damaged(&p.uart, |rng| drop(random_step(&p, rng)));
}

#[test]
fn random_accesses() {
    let p = Port::with_room(100);
    let bus = OnBus::new(&p.uart, RULES);
    let mut rng = Rng(1);
    for i in 0..100_000 {
        random_step(&p, &mut rng);
        let (at, size) = (rng.below(SIZE), any_size(rng.next()));
        let _ = if i & 1 == 0 { bus.read(at, size).map(drop) } else { bus.write(at, size, rng.next()) };
        if rng.below(1000) == 0 {
            reset(&*p.uart);
        }
    }
    assert_round_trip(&p.uart, &Port::new().uart);
}

#[test]
fn ports_and_memory_reach_the_same_registers() {
    let levels = Levels::new();
    let uart = Ns16550::new(levels.line(4), None);
    outb(&*uart, 0, 7, 0x5a);
    assert_eq!((inb(&*uart, 0, 7), read32(&*uart, 0, 7)), (0x5a, 0x5a));
    outb(&*uart, 0, 3, LCR_DLAB);
    outb(&*uart, 0, 0, 1);
    assert_eq!((inb(&*uart, 0, 0), inb(&*uart, 0, 1)), (1, 0));
    outb(&*uart, 0, 3, 3);
    outb(&*uart, 0, 1, IER_THRE);
    assert_eq!((levels.take(), inb(&*uart, 0, 2)), (vec![(4, true)], IIR_THRE));
    outb(&*uart, 0, 4, MCR_LOOP);
    outb(&*uart, 0, 0, b'x');
    assert_eq!((inb(&*uart, 0, 5) & LSR_DATA, inb(&*uart, 0, 0)), (LSR_DATA, b'x'));
    assert_round_trip(&uart, &Ns16550::new(IrqLine::disconnected(), None));
}
